"""What is wrong with one node is said before anything changes, and names the node."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent.parent


def preflight(inventory: Path) -> subprocess.CompletedProcess[str]:
    """Run the checks alone."""
    return subprocess.run(
        ["ansible-playbook", "-i", str(inventory), "playbooks/preflight.yml"],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_FORCE_COLOR": "false"},
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def fault(cluster: Cluster, name: str, make: str, mend: str) -> Iterator[None]:
    """Put something wrong on a node, and right again."""
    host = cluster.host(name)
    host.check_output(make)
    try:
        yield
    finally:
        host.check_output(mend)


FAULTS = {
    "firewall": (
        "nft 'add table inet fault; add chain inet fault in { type filter hook input priority 0; };"
        " add rule inet fault in tcp dport 7946 drop'",
        "nft delete table inet fault",
        "7946",
    ),
    "disk": (
        "free=$(df --output=avail --block-size=1M /var/lib/docker | tail -1);"
        " fallocate --length $((free - 500))M /var/lib/docker/fault",
        "rm /var/lib/docker/fault",
        "disk",
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_one_node_is_said_with_its_name(cluster: Cluster, kind: str) -> None:
    name = cluster.workers[-1]
    make, mend, word = FAULTS[kind]
    with fault(cluster, name, make, mend):
        run = preflight(cluster.inventory)
    assert run.returncode != 0, run.stdout
    said = [line for line in run.stdout.splitlines() if line.strip().startswith("- ")]
    assert any(name in line and word in line for line in said), run.stdout
