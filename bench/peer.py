"""Deploys the design that the pool is compared with: round robin over replicas, without a queue."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from target import Target, docker

PARTS = Path(__file__).with_name("round_robin")


@dataclass(frozen=True)
class Peer:
    """A deployment beside the pool, of names that nothing else has."""

    pool: Target
    port: int

    @property
    def url(self) -> str:
        """The address of its proxy."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def replicas(self) -> str:
        """The name of the replicas' service."""
        return f"{self.pool.stack}-bench-round-robin"

    @property
    def _proxy(self) -> str:
        """The name of the proxy's service and of its image."""
        return f"{self.pool.stack}-bench-haproxy"

    def deploy(self, *, replicas: int) -> None:
        """Start so many replicas, of the pool's image and limits, and the proxy before them."""
        spec = json.loads(docker("service", "inspect", self.pool.service("claude-api")))[0]["Spec"]
        container = spec["TaskTemplate"]["ContainerSpec"]
        limits = spec["TaskTemplate"]["Resources"]["Limits"]
        model = next(one for one in container["Env"] if one.startswith("ANTHROPIC_BASE_URL="))
        self._build(container["Image"])
        docker("config", "create", self.replicas, str(PARTS / "replica.py"))
        create = (
            *("service", "create", "--detach", "--quiet", "--no-resolve-image"),
            *("--network", f"{self.pool.stack}_backend", "--endpoint-mode", "dnsrr"),
            # The proxy checks the replicas itself.
            *("--no-healthcheck", "--stop-grace-period", "1s"),
        )
        docker(
            *create,
            *("--name", self.replicas, "--replicas", str(replicas)),
            *("--restart-condition", "any", "--restart-delay", "0s"),
            *("--limit-cpu", str(limits["NanoCPUs"] / 1e9)),
            *("--limit-memory", str(limits["MemoryBytes"])),
            *("--user", "10001:10002", "--env", model),
            *("--config", f"source={self.replicas},target=/replica.py"),
            *("--entrypoint", "tini", container["Image"], "--", "python3", "/replica.py"),
        )
        docker(
            *create,
            *("--name", self._proxy),
            *("--env", f"REPLICAS={replicas}", "--env", f"SERVICE={self.replicas}"),
            # Its image is on this machine alone.
            *(
                "--constraint",
                "node.id==" + docker("info", "--format", "{{.Swarm.NodeID}}").strip(),
            ),
            *("--publish", f"mode=host,published={self.port},target=8080"),
            self._proxy,
        )

    def _build(self, pool_image: str) -> None:
        """Build the proxy's image; what the builder says is shown only when it fails."""
        command = ("docker", "build", "--quiet", "--tag", self._proxy)
        argument = ("--build-arg", f"POOL_IMAGE={pool_image}")
        done = subprocess.run(
            [*command, *argument, str(PARTS)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"the proxy's image was not built:\n{done.stdout}{done.stderr}")

    def wait_ready(self, *, seconds: float = 120) -> None:
        """Wait until the proxy knows every replica."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            try:
                if httpx.get(f"{self.url}/ready").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"the replicas were not ready within {seconds:.0f} s")

    def remove(self) -> None:
        """Remove whatever is there of it."""
        services = (self._proxy, self.replicas)
        for service in services:
            _remove("service", "rm", service)
        labels = [f"label=com.docker.swarm.service.name={service}" for service in services]
        while any(docker("ps", "--all", "--quiet", "--filter", label) for label in labels):
            time.sleep(0.2)
        _remove("config", "rm", self.replicas)
        _remove("image", "rm", self._proxy)


@contextmanager
def round_robin(pool: Target, *, replicas: int) -> Iterator[Peer]:
    """Have the peer for as long as the block runs."""
    with socket.socket() as free:
        free.bind(("", 0))
        peer = Peer(pool, free.getsockname()[1])
    peer.remove()  # what a run that was killed has left
    try:
        peer.deploy(replicas=replicas)
        peer.wait_ready()
        yield peer
    finally:
        peer.remove()


def _remove(*command: str) -> None:
    # What is not there need not be removed.
    subprocess.run(["docker", *command], capture_output=True, check=False)
