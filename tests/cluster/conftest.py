"""Tests of a deployed cluster, as its operators and its clients see it.

    CLAUDE_JOBS_TOKEN_FILE=.secrets/api_token PYTHONPATH=app pytest tests/cluster \\
        --ansible-inventory=inventory/cluster

Tests that switch machines off need `--machines=DIR`, the directory of virtual machines that
`tools/machines` made; without it they are left out, as are those that the inventory has too few
managers, too few nodes with agents or no registry for.
"""

import asyncio
import os
import secrets
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cluster import Cluster
from machines import Machines

T = TypeVar("T")

# What the tests do to a cluster grows: those that only look come first.
ORDER = (
    "test_nodes",
    "test_preflight",
    "test_jobs",
    "test_losses",
    "test_managers",
    "test_timers",
    "test_operations",
    "test_restore",
    "test_teardown",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machines", type=Path, help="directory of the virtual machines of the cluster"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; run by `make test-operations`")
    config.addinivalue_line("markers", "machines: switches machines off")
    config.addinivalue_line("markers", "managers: needs three managers")
    config.addinivalue_line("markers", "once: the same on any cluster; the scenario ha has it not")
    config.addinivalue_line("markers", "registry: needs a registry on one of the nodes")
    config.addinivalue_line("markers", "spread: needs several nodes that run agents")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem))
    cluster = _cluster(config)
    lacking = {
        name
        for name, there in {
            "machines": config.getoption("machines") is not None,
            "managers": len(cluster.managers) >= 3,
            "registry": cluster.registry != "",
            "spread": len(cluster.agents) >= 2,
        }.items()
        if not there
    }
    left_out = [item for item in items if lacking & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _cluster(config: pytest.Config) -> Cluster:
    inventory = config.getoption("ansible_inventory")
    return Cluster(Path(inventory), Path(os.environ["CLAUDE_JOBS_TOKEN_FILE"]))


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Cluster:
    """Return the cluster of the inventory."""
    return _cluster(pytestconfig)


@pytest.fixture(scope="session")
def machines(pytestconfig: pytest.Config) -> Machines:
    """Return the machines below the cluster, to switch them off and on."""
    return Machines(pytestconfig.getoption("machines"))


@pytest.fixture
def whole(cluster: Cluster) -> Cluster:
    """Return the cluster once all its nodes are ready and all its replicas idle."""
    cluster.wait_whole()
    return cluster


@pytest.fixture
def directory() -> str:
    """Return the name of a directory of the workspace that one test has for itself."""
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def run() -> Iterator[Any]:
    """Run a coroutine to its end, for tests that are several clients at once."""

    def runner(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    yield runner
