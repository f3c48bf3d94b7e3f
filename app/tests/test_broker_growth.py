"""One broker becomes three servers and loses nothing; three lose one and go on."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import nats.errors
import pytest
import pytest_asyncio
from broker_node import ROOM, BrokerNode, BrokerNodes, broker_nodes
from bus_ends import job, line
from pool_client import RunningPool, directory_for_everybody, pool_in

from claude_jobs.broker.users import BROKER_USER, GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.servers import SERVERS_BUCKET, ServersMissingError
from claude_jobs.bus.topology import (
    EVENTS_STREAM,
    JOBS_CONSUMER,
    JOBS_STREAM,
    PRESENCE_BUCKET,
    Bounds,
    ensure_topology,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

_PRESENCE = f"KV_{PRESENCE_BUCKET}"
BOUNDS = Bounds(event_bytes=2**28, session_bytes=2**28)
THREE = Bounds(event_bytes=2**28, session_bytes=2**28, copies=3)


@pytest_asyncio.fixture(loop_scope="session")
async def directory() -> AsyncIterator[Path]:
    with directory_for_everybody() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def nodes(directory: Path) -> AsyncIterator[BrokerNodes]:
    async with broker_nodes(directory) as made:
        yield made


async def contents(bus: Bus) -> dict[str, list[tuple[int, str, bytes | None]]]:
    """Return all that a broker holds: sequence number, subject and bytes of every message."""
    found: dict[str, list[tuple[int, str, bytes | None]]] = {}
    for info in await bus.jetstream.streams_info():
        name = str(info.config.name)
        if name in (_PRESENCE, f"KV_{SERVERS_BUCKET}"):
            continue
        found[name] = []
        for sequence in range(max(info.state.first_seq, 1), info.state.last_seq + 1):
            with contextlib.suppress(nats.js.errors.NotFoundError):
                message = await bus.jetstream.get_msg(name, sequence)
                found[name].append((sequence, str(message.subject), message.data))
    return found


async def copies(bus: Bus) -> dict[str, int]:
    """Return how many servers hold each stream, as the broker itself counts them."""
    return {
        str(info.config.name): 1 + len((info.cluster and info.cluster.replicas) or [])
        for info in await bus.jetstream.streams_info()
    }


async def fill(node: BrokerNode) -> dict[str, Any]:
    """Let a lone server take in jobs, one of which a replica has, and events; return them."""
    async with node.connected(GATEWAY_USER) as gateway, node.connected(REPLICA_USER) as replica:
        await ensure_topology(gateway, BOUNDS)
        queue, log = JobQueue(gateway), EventLog(gateway)
        for number in range(20):
            await queue.submit(job(f"job {number}"))
        # So much that it takes its time, and with gaps: an ended job's events may be removed.
        big = b"x" * 2**18
        await asyncio.gather(
            *(gateway.jetstream.publish(f"events.big-{n}", big) for n in range(160))
        )
        for n in (3, 70):
            await gateway.jetstream.delete_msg(EVENTS_STREAM, n)
        writer = await log.writer("j")
        for number in range(50):
            await writer.append(line(number))
        done = await JobQueue(replica).pull()
        await done.finish()
        await JobQueue(replica).pull()
        return await contents(gateway)


async def test_a_lone_brokers_streams_are_on_three_servers_as_they_were(
    nodes: BrokerNodes,
) -> None:
    await nodes.first.start()
    before = await fill(nodes.first)
    await nodes.first.stop()
    await nodes.start()
    await nodes.joined()
    async with nodes.connected() as gateway:
        assert await contents(gateway) == before
        await ensure_topology(gateway, THREE)
        assert await contents(gateway) == before
        counted = await copies(gateway)
        assert counted.keys() == before.keys() | {_PRESENCE, f"KV_{SERVERS_BUCKET}"}
        assert set(counted.values()) == {3}
        info = await gateway.jetstream.consumer_info(JOBS_STREAM, JOBS_CONSUMER)
        assert (info.num_ack_pending, info.num_pending) == (1, 18)
        assert info.cluster
        assert len(info.cluster.replicas or []) == 2
        # The next event of a job follows on its last one.
        writer = await EventLog(gateway).writer("j")
        last = before[EVENTS_STREAM][-1][0]
        assert await writer.append(line(51)) == last + 1
    assert not (nodes.first.data / "jetstream").exists()
    assert {each.name for each in nodes.first.data.iterdir()} == {"cluster"}
    # And it does not go back unnoticed.
    await nodes.first.kill()
    await nodes.first.start()
    assert nodes.first.server
    assert await nodes.first.server.wait() == 78
