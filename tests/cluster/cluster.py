"""A deployed cluster: its machines over ssh, and its API on every node."""

import asyncio
import json
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import testinfra
from testinfra.host import Host
from testinfra.utils.ansible_runner import AnsibleRunner

from claude_jobs.client import ApiError, Client, ClientError

STACK = "claude-code-stack"
T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], what: str, *, seconds: float) -> T:
    """Ask until the answer is true and return it; fail with `what` after `seconds`."""
    give_up = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < give_up, f"not within {seconds:.0f} s: {what}"
        time.sleep(1)
    return answer


class Cluster:
    """The machines of an inventory as one pool."""

    def __init__(self, inventory: Path, token_file: Path) -> None:
        self.inventory = inventory
        self._token_file = token_file
        self._runner = AnsibleRunner.get_runner(str(inventory))
        self.managers: list[str] = sorted(self._runner.get_hosts("swarm_managers"))
        groups = self._runner.inventory
        self.workers: list[str] = sorted(groups.get("swarm_workers", {}).get("hosts", []))
        self.nodes = [*self.managers, *self.workers]
        self.agents = [
            name for name in self.nodes if self.variables(name).get("node_runs_agents", True)
        ]
        # Without such a group the first manager is it (playbooks/vars/cluster.yml).
        servers = groups.get("nfs_server", {}).get("hosts", []) or groups["swarm_managers"]["hosts"]
        self.nfs_server: str = servers[0]
        # The node that has the registry, or "": then the image goes from node to node.
        address = str(self.variables(self.managers[0]).get("app_image_registry", "")).split(":")[0]
        self.registry: str = next(
            (name for name in self.nodes if address == self.variables(name).get("node_address")),
            "",
        )

    def in_roles(self, directory: Path, *, managers: list[str], workers: list[str]) -> "Cluster":
        """Return the same machines in other roles, by an inventory that is made in a directory."""
        changed = directory / "inventory"
        changed.mkdir(parents=True)
        for name in ("group_vars", "machines.json"):
            (changed / name).symlink_to((self.inventory / name).absolute())
        # What the group variables name from there.
        (directory / ".machines").symlink_to(self._token_file.absolute().parent.parent)

        def hosts(names: list[str]) -> dict[str, object]:
            return {
                "hosts": {
                    name: {
                        "node_address": self.variables(name)["node_address"],
                        "node_runs_agents": name in self.agents,
                    }
                    for name in names
                }
            }

        groups = {
            "swarm_managers": hosts(managers),
            "swarm_workers": hosts(workers),
            "nfs_server": {"hosts": {self.nfs_server: {}}},
        }
        (changed / "hosts.yml").write_text(json.dumps(groups))
        return Cluster(changed, self._token_file)

    def host(self, name: str) -> Host:
        """Return a machine to run commands on, as root."""
        return testinfra.get_host(f"ansible://{name}?ansible_inventory={self.inventory}", sudo=True)

    def variables(self, name: str) -> dict[str, Any]:
        """Return what the inventory says of a machine."""
        variables: dict[str, Any] = self._runner.get_variables(name)
        return variables

    def api(self, name: str) -> str:
        """Return the address of the API on one node."""
        variables = self.variables(name)
        port = variables.get("machine_api_port", variables.get("app_stack_port", 3000))
        return f"http://{variables.get('ansible_host', name)}:{port}"

    def client(self, name: str, *, give_up_after: float = 120) -> Client:
        """Return a client of the API that talks to one node."""
        return Client(self.api(name), self.token, give_up_after=give_up_after)

    @property
    def token(self) -> str:
        """The API token as it is now: a rotation makes another one."""
        return self._token_file.read_text().strip()

    def forget_secrets(self) -> None:
        """Lose what the machine that runs Ansible keeps."""
        shutil.rmtree(self._token_file.parent)

    def accepts(self, token: str) -> bool:
        """Tell whether the API lets somebody in who has this token."""

        async def ask() -> bool:
            async with Client(self.api(self.managers[0]), token, give_up_after=0) as client:
                try:
                    await client.status()
                except ApiError as error:
                    assert error.status == 401
                    return False
                return True

        return asyncio.run(ask())

    def docker(self, *arguments: str, on: str | None = None) -> str:
        """Run the Docker client on a manager and return what it prints."""
        places = " ".join(["%s"] * len(arguments))
        return str(self.host(on or self.managers[0]).check_output(f"docker {places}", *arguments))

    def lines(self, *arguments: str, on: str | None = None) -> list[dict[str, Any]]:
        """Run the Docker client and return the JSON object of each line."""
        shown = self.docker(*arguments, "--format", "{{json .}}", on=on)
        return [json.loads(line) for line in shown.splitlines()]

    def swarm_state(self, name: str) -> str:
        """Return what the engine of a node says of its place in the swarm."""
        return self.docker("info", "--format", "{{.Swarm.LocalNodeState}}", on=name).strip()

    def unlock(self, name: str, *, by: str) -> None:
        """Give a manager that was started the key of the swarm, which another one knows.

        An engine may stay without its agent for the network between containers then: it is
        started anew, as docs/cluster.md has it.
        """
        key = self.docker("swarm", "unlock-key", "--quiet", on=by).strip()
        host = self.host(name)
        for _ in range(3):
            wait_until(
                lambda: self.swarm_state(name) == "locked",
                f"the engine of {name} asks for the key",
                seconds=60,
            )
            host.check_output(f"docker swarm unlock <<'KEY'\n{key}\nKEY")
            give_up = time.monotonic() + 20
            while time.monotonic() < give_up:
                if host.check_output("ss --no-header --listening --tcp 'sport = :7946'"):
                    return
                time.sleep(1)
            host.check_output("systemctl restart docker")
        raise AssertionError(f"{name} was unlocked, and its engine has no agent for the network")

    def states(self, *, on: str | None = None) -> dict[str, str]:
        """Return the state of each node, as a manager sees it."""
        return {node["Hostname"]: node["Status"] for node in self.lines("node", "ls", on=on)}

    def tasks(self, service: str, *, on: str | None = None) -> Counter[str]:
        """Return how many tasks of a service run on each node."""
        shown = self.lines(
            "service", "ps", f"{STACK}_{service}", "--filter", "desired-state=running", on=on
        )
        return Counter(task["Node"] for task in shown if task["CurrentState"].startswith("Running"))

    @property
    def replicas(self) -> int:
        """How many replicas are wanted at this moment."""
        spec = json.loads(self.docker("service", "inspect", f"{STACK}_claude-api"))
        return int(spec[0]["Spec"]["Mode"]["Replicated"]["Replicas"])

    async def idle(self, name: str) -> int:
        """Return how many replicas are idle, as the gateway behind a node knows it."""
        async with self.client(name, give_up_after=0) as client:
            try:
                return (await client.status()).replicas.idle
            except ClientError:
                return 0

    def _servers_there(self) -> bool:
        """Tell whether all managers, gateways and broker's servers are there, as a manager sees it.

        After a loss of power a pool has idle replicas sooner than these.
        """
        managers = {node["ManagerStatus"] for node in self.lines("node", "ls")}
        counts = [
            service["Replicas"].split()[0].split("/")
            for service in self.lines("service", "ls")
            if service["Name"] != f"{STACK}_claude-api"
        ]
        return "Unreachable" not in managers and all(there == wanted for there, wanted in counts)

    def _broker_whole(self) -> bool:
        """Tell whether each of the broker's servers has all that is in the streams."""
        node = next(iter(self.tasks("gateway")))
        mine = f"name={STACK}_gateway"
        container = self.docker("ps", "--quiet", "--filter", mine, on=node).split()
        report = ("python3", "-m", "claude_jobs", "report")
        shown = self.host(node).run(f"docker exec {shlex.join([*container[:1], *report])}")
        if shown.rc:
            return False
        streams = json.loads(shown.stdout)["streams"]
        return all(stream["leader"] and not stream["behind"] for stream in streams)

    def wait_whole(self, *, seconds: float = 300) -> None:
        """Wait until nodes, servers and streams are there, and all the replicas idle."""
        wait_until(
            lambda: all(state == "Ready" for state in self.states().values()),
            "all nodes are ready",
            seconds=seconds,
        )
        wait_until(self._servers_there, "managers, gateways and broker are there", seconds=seconds)
        wanted = self.replicas
        wait_until(
            lambda: asyncio.run(self.idle(self.managers[0])) == wanted,
            f"{wanted} idle replicas",
            seconds=seconds,
        )
        if len(self.managers) > 1:
            wait_until(self._broker_whole, "the broker's servers have all streams", seconds=seconds)
