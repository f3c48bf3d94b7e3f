"""The machines of a scenario, by the groups of its inventory.

Molecule runs these tests; by hand:

    pytest tests/cluster --ansible-inventory=molecule/default/inventory
"""

from dataclasses import dataclass

import pytest
import testinfra
from testinfra.host import Host


@dataclass(frozen=True)
class Node:
    """A machine: its name in the inventory, and what testinfra knows of it, as root."""

    name: str
    host: Host

    def output(self, command: str, *arguments: str) -> str:
        """Run a command and return what it prints; each `%s` in it is an argument, quoted."""
        printed: str = self.host.check_output(command, *arguments)
        return printed


def _group(config: pytest.Config, pattern: str) -> list[Node]:
    hosts = testinfra.get_hosts(
        [f"ansible://{pattern}"],
        ansible_inventory=config.getoption("--ansible-inventory"),
        sudo=True,
    )
    return [Node(host.backend.host, host) for host in hosts]


@pytest.fixture(scope="session")
def managers(pytestconfig: pytest.Config) -> list[Node]:
    """Return the managers; the first one has formed the swarm."""
    return _group(pytestconfig, "swarm_managers")


@pytest.fixture(scope="session")
def workers(pytestconfig: pytest.Config) -> list[Node]:
    """Return the workers."""
    return _group(pytestconfig, "swarm_workers")


@pytest.fixture(scope="session")
def nodes(managers: list[Node], workers: list[Node]) -> list[Node]:
    """Return all machines."""
    return managers + workers
