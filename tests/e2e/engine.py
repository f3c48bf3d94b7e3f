"""What the tests ask the Docker engine, by its command line."""

import json
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any

STACK_LABEL = "com.docker.stack.namespace"


def docker(*arguments: str) -> str:
    """Run a docker command and return what it prints; raises when it fails."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def is_manager() -> bool:
    """Say whether an engine runs here and manages a swarm; a fresh machine has neither."""
    if shutil.which("docker") is None:
        return False
    try:
        return docker("info", "--format", "{{.Swarm.ControlAvailable}}").strip() == "true"
    except RuntimeError:
        return False


def inspect(kind: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the full description of the named things, of one kind."""
    names = list(names)
    if not names:
        return []
    found: list[dict[str, Any]] = json.loads(docker(kind, "inspect", *names))
    return found


def is_running(container: str) -> bool:
    """Say whether a container runs; one that is gone does not."""
    try:
        return bool(inspect("container", [container])[0]["State"]["Running"])
    except RuntimeError:
        return False


def free_cpus() -> float:
    """Return how many of this node's CPUs no task has reserved."""
    node = inspect("node", ["self"])[0]
    total = float(node["Description"]["Resources"]["NanoCPUs"])
    tasks = docker("node", "ps", "self", "--filter", "desired-state=running", "--quiet").split()
    for task in inspect_tasks(tasks):
        reserved = task["Spec"].get("Resources", {}).get("Reservations") or {}
        total -= float(reserved.get("NanoCPUs", 0))
    return total / 1e9


def inspect_tasks(tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Return the full description of tasks; those that vanish meanwhile are left out."""
    found = []
    for task in tasks:
        try:
            found += json.loads(docker("inspect", "--type", "task", task))
        except RuntimeError:
            continue
    return found


class Stack:
    """The things of one stack."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _listed(self, kind: str, *options: str) -> list[str]:
        label = f"label={STACK_LABEL}={self.name}"
        return docker(kind, "ls", "--quiet", "--filter", label, *options).split()

    def services(self) -> dict[str, dict[str, Any]]:
        """Return the services' descriptions by their short names."""
        return {
            service["Spec"]["Name"].removeprefix(f"{self.name}_"): service
            for service in inspect("service", self._listed("service"))
        }

    def containers(self, service: str | None = None, *, dead: bool = False) -> list[str]:
        """Return the ids of the containers of the stack or of one of its services."""
        options = ["--no-trunc"] + (["--all"] if dead else [])
        if service:
            options += ["--filter", f"label=com.docker.swarm.service.name={self.name}_{service}"]
        return self._listed("container", *options)

    def tasks(self, service: str) -> list[dict[str, Any]]:
        """Return the tasks of a service that are to run."""
        full_name = f"{self.name}_{service}"
        ids = docker("service", "ps", full_name, "--quiet", "--filter", "desired-state=running")
        return inspect_tasks(ids.split())

    def secrets(self) -> set[str]:
        """Return the names of the stack's secrets. They carry no label, but its name."""
        names = docker("secret", "ls", "--format", "{{.Name}}").split()
        return {name for name in names if name.startswith(f"{self.name}_")}

    def everything(self) -> dict[str, list[str]]:
        """Return all that the engine holds of this stack, by kind."""
        return {
            "services": self._listed("service"),
            "containers": self.containers(dead=True),
            "networks": self._listed("network"),
            "volumes": self._listed("volume"),
            "secrets": sorted(self.secrets()),
        }
