"""Fixtures that several kinds of tests share."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from broker_node import BrokerNodes, broker_nodes
from bus_ends import SHORT_LEASE, Ends
from nats_server import NatsServer
from pool_client import RunningPool, directory_for_everybody, running_pool

from claude_jobs.bus.topology import Bounds


@pytest.fixture(scope="session")
def samples() -> Path:
    """Lines that a real Claude Code printed (2.1.330)."""
    return Path(__file__).parent / "samples"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def nats_server() -> AsyncIterator[NatsServer]:
    """A broker for the tests of one module; each makes its streams anew."""
    server = NatsServer(Path(tempfile.mkdtemp(prefix="nats-")))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pool() -> AsyncIterator[RunningPool]:
    """Three replicas with the model stub, for every test that leaves them as they were."""
    async with running_pool(replicas=3, settings={"CLAUDE_MAX_RETRIES": "1"}) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def ends(nats_server: NatsServer) -> AsyncIterator[Ends]:
    """A gateway's and a replica's end of an empty bus."""
    async with nats_server.both_ends(Bounds()) as (gateway, replica):
        yield Ends(gateway, replica)


@pytest_asyncio.fixture(loop_scope="session")
async def short_lease(nats_server: NatsServer) -> AsyncIterator[Ends]:
    """Both ends of an empty bus whose leases end early."""
    async with nats_server.both_ends(Bounds(lease=SHORT_LEASE)) as (gateway, replica):
        yield Ends(gateway, replica)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory for the parts of a pool that a test starts one by one."""
    with directory_for_everybody() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def nodes(public_directory: Path) -> AsyncIterator[BrokerNodes]:
    """Three nodes for servers of the broker, none of which is started yet."""
    async with broker_nodes(public_directory) as made:
        yield made
