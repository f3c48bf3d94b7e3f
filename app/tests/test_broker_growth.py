"""One broker becomes three servers and loses nothing; three lose one and go on."""

import asyncio
import contextlib
import signal
import uuid
from pathlib import Path
from time import monotonic

import httpx
import pytest
from broker_contents import BOUNDS, contents, contents_of, fill
from broker_node import BrokerNode, BrokerNodes
from bus_ends import line
from nats.js.api import StreamInfo
from nats.js.errors import APIError
from pool_client import EventStream, RunningPool, pool_in

from claude_jobs.broker.users import GATEWAY_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.servers import SERVERS_BUCKET
from claude_jobs.bus.topology import (
    EVENTS_STREAM,
    EVENTS_SUBJECTS,
    JOBS_CONSUMER,
    JOBS_STREAM,
    PRESENCE_BUCKET,
    Bounds,
    ensure_topology,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]

_PRESENCE = f"KV_{PRESENCE_BUCKET}"
THREE = Bounds(event_bytes=2**28, session_bytes=2**28, copies=3)


async def copies(bus: Bus) -> dict[str, int]:
    """Return how many servers hold each stream, as the broker itself counts them."""
    return {
        str(info.config.name): 1 + len((info.cluster and info.cluster.replicas) or [])
        for info in await bus.jetstream.streams_info()
    }


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


async def submit(pool: RunningPool, prompt: str, key: str) -> str | None:
    """Submit a job; returns its id, or None when it was not accepted."""
    try:
        response = await pool.http.post(
            "/api/execute",
            json={"prompt": prompt},
            headers={"Prefer": "respond-async", "Idempotency-Key": key},
            timeout=40,
        )
    except httpx.TransportError:
        return None
    if response.status_code != 202:
        assert (response.status_code, "Retry-After" in response.headers) == (503, True), response
        return None
    return str(response.json()["id"])


async def events(pool: RunningPool, job_id: str) -> list[tuple[int, str]]:
    """Read a job's events to its end; return their ids and types."""
    async with pool.http.stream("GET", f"/api/jobs/{job_id}/events") as response:
        stream = EventStream(response)
        await stream.ending()
    return [(event.id, event.type) for event in stream.events]


async def appears_in(bus: Bus, stream: str, subject: str | None = None) -> StreamInfo:
    """Wait until a broker has a stream, and it has this subject; returns what the broker says."""
    while True:
        with contextlib.suppress(APIError, TimeoutError):
            info = await bus.jetstream.stream_info(stream)
            if subject is None or info.config.subjects == [subject]:
                return info
        await asyncio.sleep(0.02)


def leader_of(nodes: BrokerNodes, info: StreamInfo) -> BrokerNode:
    """Return the node whose server leads a stream."""
    assert info.cluster
    return nodes.leader(info.cluster.leader)


async def test_a_stream_that_counts_is_on_every_server(nodes: BrokerNodes) -> None:
    await nodes.first.start()
    before = await fill(nodes.first)
    await nodes.first.stop()
    await nodes.start()
    async with nodes.connected() as gateway:
        counts = await appears_in(gateway, EVENTS_STREAM, EVENTS_SUBJECTS)
        await leader_of(nodes, counts).kill()
        # One of the other two leads from then on.
        now = await appears_in(gateway, EVENTS_STREAM)
        assert leader_of(nodes, now) != leader_of(nodes, counts)
        assert await contents_of(gateway, now) == before[EVENTS_STREAM]


async def test_jobs_that_wait_run_once_after_a_move_that_was_killed_again_and_again(
    nodes: BrokerNodes, public_directory: Path
) -> None:
    await nodes.first.start()
    async with pool_in(public_directory, replicas=0, broker_url=nodes.first.url) as pool:
        await pool.ready()
        ids = [await submit(pool, f"run echo x >> ran-{n}", f"key-{n}") for n in range(3)]
        assert all(ids)
        async with nodes.first.connected(GATEWAY_USER) as gateway:
            big = b"x" * 2**18
            await asyncio.gather(
                *(gateway.jetstream.publish(f"events.big-{n}", big) for n in range(80))
            )
            begins = [await EventLog(gateway).last(str(job_id)) for job_id in ids]
    await nodes.first.kill()
    for node in nodes.nodes[1:]:
        await nodes.start_one(node)
    settings = {"BROKER_SERVERS": "3"}
    async with pool_in(
        public_directory, replicas=2, broker_url=nodes.urls, settings=settings
    ) as pool:
        # No gateway makes empty streams in the place of those that are to come.
        await pool.says("0 of the broker's 3 servers have joined")
        await nodes.start_one(nodes.first)
        async with nodes.nodes[1].connected(GATEWAY_USER) as gateway:
            await appears_in(gateway, EVENTS_STREAM)
            await nodes.first.kill()
            await nodes.start_one(nodes.first)
            await appears_in(gateway, "KV_submissions")
            for node in nodes.nodes:
                await node.kill()
            await nodes.start()
            await nodes.joined()
        await pool.ready()
        for number, (job_id, begin) in enumerate(zip(ids, begins, strict=True)):
            assert begin
            seen = await events(pool, str(job_id))
            assert seen[0] == (begin.sequence, "queued")
            assert seen[-1][1] == "completed"
            assert [kind for _, kind in seen].count("connected") == 1
            assert (pool.workspace / f"ran-{number}").read_text() == "x\n"
        # The same key is the same job, as before.
        assert [await submit(pool, f"run echo x >> ran-{n}", f"key-{n}") for n in range(3)] == ids


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_jobs_go_on_within_half_a_minute_when_the_server_that_leads_is_lost(
    nodes: BrokerNodes, public_directory: Path, blow: signal.Signals
) -> None:
    """Killed, its connections close at once. Stopped, they stay open, as after a power failure."""
    await nodes.start()
    settings = {"BROKER_SERVERS": "3"}
    accepted: dict[str, str] = {}
    async with pool_in(
        public_directory, replicas=2, broker_url=nodes.urls, settings=settings
    ) as pool:
        await pool.ready()
        stop = asyncio.Event()
        answers = [monotonic()]

        async def keep_submitting() -> None:
            while not stop.is_set():
                key = uuid.uuid4().hex
                while (job_id := await submit(pool, f"run echo x >> {key}", key)) is None:
                    await asyncio.sleep(0.2)
                answers.append(monotonic())
                accepted[key] = job_id
                await asyncio.sleep(2)

        async with asyncio.TaskGroup() as clients:
            clients.create_task(keep_submitting())
            while len(accepted) < 2:
                await asyncio.sleep(0.1)
            async with nodes.connected() as gateway:
                leader = leader_of(nodes, await gateway.jetstream.stream_info(JOBS_STREAM))
            assert leader.server
            leader.server.send_signal(blow)
            lost = monotonic()
            async with asyncio.timeout(30):
                while answers[-1] < lost + 0.5:
                    await asyncio.sleep(0.1)
            # A gateway starts without that server, too.
            pool.pool.processes["gateway"].kill()
            await pool.pool.processes["gateway"].wait()
            await pool.ready()
            stop.set()
        await pool.ready()
        for key, job_id in accepted.items():
            seen = await events(pool, job_id)
            assert seen[-1][1] == "completed", seen
            assert (pool.workspace / key).read_text() == "x\n", seen


async def test_of_two_old_stores_the_newer_is_brought_and_a_used_stream_is_not_replaced(
    nodes: BrokerNodes,
) -> None:
    for node, name in ((nodes.nodes[1], "old"), (nodes.first, "new")):
        await node.start()
        async with node.connected(GATEWAY_USER) as gateway:
            await ensure_topology(gateway, BOUNDS)
            for subject in ("events.a", "$KV.submissions.a"):
                await gateway.jetstream.publish(subject, name.encode())
        await node.stop()
    for node in nodes.nodes[1:]:
        await nodes.start_one(node)
    # As a gateway of before the move would, that is started in the middle of it.
    async with nodes.nodes[1].connected(GATEWAY_USER) as gateway:
        while True:
            with contextlib.suppress(APIError, TimeoutError):
                await ensure_topology(gateway, BOUNDS)
                break
        await gateway.jetstream.publish("events.b", b"between")
        await nodes.start_one(nodes.first)
        await nodes.joined()
        found = await contents(gateway)
    assert [data for _, _, data in found[EVENTS_STREAM]] == [b"between"]
    assert [data for _, _, data in found["KV_submissions"]] == [b"new"]
    # Nothing is thrown away that is not there.
    for node in nodes.nodes[:2]:
        (kept,) = node.data.glob("left-out-of-cluster-*")
        assert (kept / "$G" / "streams" / EVENTS_STREAM).is_dir()
