"""The whole pool without Docker: `make dev`. Real processes, for work on the application.

What a container gives is missing here: agents are not confined to the workspace, and unless
this is started by root they run as the developer.
"""

import argparse
import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from claude_jobs.agent.command import AgentUser, bundled_claude
from claude_jobs.secret_files import make_secret_files
from claude_jobs.workspace import DIRECTORY_MODE

# The users of the image, when root starts this: agents never run as root.
_AGENT = AgentUser(uid=10001, gid=10002)
# A process that ends at once, again and again, is not started more often than this (seconds).
_RESTART_DELAY = 0.05
# Who was given a port may only be about to use it.
_given_ports: set[int] = set()
# Below those that Linux gives to whoever asks for any, connections to others among them.
_PORTS = range(10_000, 32_768)


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody uses, and that it never returned."""
    while True:
        with socket.socket() as probe:
            port = secrets.choice(_PORTS)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                if port not in _given_ports:
                    _given_ports.add(port)
                    return port


def _gateway_name(number: int) -> str:
    return f"gateway-{number}" if number else "gateway"


@dataclass
class Pool:
    """The processes of one pool, below the directory `root`.

    The first of several gateways is at `port`. Without `credentials` (JSON, see
    `agent.credentials`) the model stub answers. `settings` are added to every process's
    environment. With a `broker_url` the broker is somebody else's, with the secrets of this pool.
    A replica that exits is started again, as Swarm does.
    """

    root: Path
    workspace: Path
    replicas: int = 5
    gateways: int = 1
    port: int = field(default_factory=free_port)
    credentials: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    broker_url: str = ""

    def __post_init__(self) -> None:
        self.token = make_secret_files(self.root / "secrets", credentials=self.credentials)
        ports = [self.port, *(free_port() for _ in range(1, self.gateways))]
        self._gateway_ports = {_gateway_name(number): port for number, port in enumerate(ports)}
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.url = self.urls[0]
        self._broker_port, self._stub_port = free_port(), free_port()
        self._monitor_port = free_port()
        self._runs_broker = not self.broker_url
        self.broker_url = self.broker_url or f"nats://127.0.0.1:{self._broker_port}"
        self.stub_url = f"http://127.0.0.1:{self._stub_port}"
        self.processes: dict[str, Process] = {}
        self._user = _AGENT if os.geteuid() == 0 else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run every process until the block ends, then end them all."""
        self._prepare_directories()
        replicas = (f"replica-{number}" for number in range(self.replicas))
        names = [*self._gateway_ports, *replicas]
        if self._runs_broker:
            names.insert(0, "broker")
        if self.credentials is None:
            names.insert(0, "model-stub")
        keepers = [asyncio.create_task(self._keep_running(name)) for name in names]
        try:
            yield
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep_running(self, name: str) -> None:
        kind = re.sub(r"-\d+$", "", name)
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "claude_jobs", kind, env=self._environment(name)
            )
            self.processes[name] = process
            try:
                await process.wait()
            except asyncio.CancelledError:
                await _end(process)
                raise
            await asyncio.sleep(_RESTART_DELAY)

    def _environment(self, name: str) -> dict[str, str]:
        home = self.root / "home" / name
        variables = {
            "PATH": os.environ.get("PATH", os.defpath),
            # Nothing is imported from the directory that this is started in.
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "SECRETS_DIR": str(self.root / "secrets"),
            "WORKSPACE_DIR": str(self.workspace),
            "BROKER_URL": self.broker_url,
            "BROKER_PORT": str(self._broker_port),
            "BROKER_MONITOR_PORT": str(self._monitor_port),
            "BROKER_DATA_DIR": str(self.root / "broker"),
            "BROKER_CONFIG_DIR": str(self.root / "broker-config"),
            "EVENT_BYTES": str(2**28),
            "SESSION_BYTES": str(2**28),
        }
        match name:
            case _ if name in self._gateway_ports:
                variables["PORT"] = str(self._gateway_ports[name])
                variables["DEMO_MODE"] = str(self.credentials is None)
            case "model-stub":
                variables["PORT"] = str(self._stub_port)
            case "broker":
                pass
            case _:
                home.mkdir(parents=True, exist_ok=True)
                variables |= {
                    "PORT": str(free_port()),
                    "REPLICA_NAME": f"{name}-{secrets.token_hex(4)}",
                    "AGENT_HOME": str(home),
                    "CLAUDE_PATH": str(self._claude()),
                }
                if self.credentials is None:
                    variables["ANTHROPIC_BASE_URL"] = self.stub_url
                if self._user:
                    os.chown(home, self._user.uid, self._user.gid)
                    variables["AGENT_UID"] = str(self._user.uid)
                    variables["AGENT_GID"] = str(self._user.gid)
        return variables | dict(self.settings)

    def _prepare_directories(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        # Agents reach their home below it, and nothing else.
        self.root.chmod(0o711)
        for name in ("broker", "broker-config"):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        self.workspace.mkdir(parents=True, exist_ok=True)
        if self._user:
            os.chown(self.workspace, os.geteuid(), self._user.gid)
            self.workspace.chmod(DIRECTORY_MODE)

    def _claude(self) -> Path:
        """Return the CLI, where the agent's user can run it: perhaps not below a private home."""
        bundled = bundled_claude()
        if self._user is None or all(path.stat().st_mode & 0o001 for path in bundled.parents):
            return bundled
        copy = self.root / "claude"
        if not copy.exists():
            shutil.copy(bundled, copy)
            copy.chmod(0o755)
        return copy


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(5):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _develop(pool: Pool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with pool.running():
        model = "the model stub" if pool.credentials is None else "your credentials"
        sys.stderr.write(
            f"\nA pool of {pool.replicas} replicas with {model} at {pool.url} . Try:\n"
            f"  curl -N -H 'Authorization: Bearer '\"$(cat {pool.root}/secrets/api_token)\" "
            f"-H 'Content-Type: application/json' "
            f'-d \'{{"prompt": "create a file called hello.txt"}}\' {pool.url}/api/execute\n\n'
        )
        await stop.wait()


def main() -> None:
    """Run a pool until it is interrupted."""
    parser = argparse.ArgumentParser(prog="make dev", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".dev"), help="keeps everything")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    parser.add_argument("--replicas", type=int, default=5)
    parser.add_argument("--port", type=int, default=3000)
    arguments = parser.parse_args()
    pool = Pool(
        root=arguments.root.resolve(),
        workspace=arguments.workspace.resolve(),
        replicas=arguments.replicas,
        port=arguments.port,
        credentials=os.environ.get("CLAUDE_CODE_CREDENTIALS_JSON"),
    )
    asyncio.run(_develop(pool))


if __name__ == "__main__":
    main()
