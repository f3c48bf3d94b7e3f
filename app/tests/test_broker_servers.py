"""Three servers of the broker and their nodes: one moves, comes late, or is gone for good."""

import asyncio
import contextlib

import pytest
from broker_contents import contents
from broker_node import BrokerNode, BrokerNodes
from nats.js.api import StreamInfo
from nats.js.errors import APIError, NoStreamResponseError

from claude_jobs.broker.users import GATEWAY_USER
from claude_jobs.bus.connection import connect
from claude_jobs.bus.topology import EVENTS_STREAM, Bounds, ensure_topology
from claude_jobs.operator.report import report

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]

THREE = Bounds(event_bytes=2**28, session_bytes=2**28, copies=3)


async def with_streams(nodes: BrokerNodes) -> None:
    """Start three servers, with the pool's streams on each of them."""
    await nodes.start()
    await nodes.joined()
    async with nodes.connected() as gateway:
        await ensure_topology(gateway, THREE)


async def test_a_server_that_moves_to_another_node_and_back_has_everything_again(
    nodes: BrokerNodes,
) -> None:
    """What it left on the first node is of no use: the others have gone on without it."""
    await with_streams(nodes)
    async with nodes.connected() as gateway:
        await gateway.jetstream.publish("events.first", b"first")
    here = nodes.nodes[1]
    there = BrokerNode("other-node", here.directory.parent / "other-node", here.secrets)
    for old, new in ((here, there), (there, here)):
        await nodes.move(old, new)
        await nodes.joined()
        names = {f"nats-{node.name}" for node in nodes.nodes}
        if new is here:
            names = names - {f"nats-{here.name}"} | {f"nats-{here.name}_2"}
        async with nodes.connected() as gateway, asyncio.timeout(60):
            await whole_on(names, nodes)
            await gateway.jetstream.publish(f"events.{new.name}", b"more")
    assert (here.data / "replaced-by-another").is_dir()
    async with nodes.connected() as gateway:
        subjects = [subject for _, subject, _ in (await contents(gateway))[EVENTS_STREAM]]
    assert subjects == [f"events.{word}" for word in ("first", "other-node", here.name)]
    # Two of three are a majority: what came back counts.
    await there.kill()
    await nodes.first.kill()
    async with here.connected(GATEWAY_USER) as bus, asyncio.timeout(30):
        while True:
            with contextlib.suppress(APIError, TimeoutError, NoStreamResponseError):
                await bus.jetstream.publish("events.after", b"after")
                break
            await asyncio.sleep(0.2)


async def test_a_server_that_starts_after_the_others_keeps_what_it_has(nodes: BrokerNodes) -> None:
    """As after a power failure: those two have not met it since they started, and know no name."""
    await with_streams(nodes)
    async with nodes.connected() as gateway:
        await gateway.jetstream.publish("events.before", b"before")
        before = await contents(gateway)
    late = nodes.nodes[1]
    for node in nodes.nodes:
        await node.kill()
    await asyncio.gather(*(nodes.start_one(node) for node in nodes.nodes if node is not late))
    async with nodes.first.connected(GATEWAY_USER) as bus, asyncio.timeout(90):
        while True:
            with contextlib.suppress(APIError, TimeoutError, NoStreamResponseError):
                await bus.jetstream.publish("events.meanwhile", b"meanwhile")
                break
            await asyncio.sleep(0.2)
    await nodes.start_one(late)
    await nodes.joined()
    assert not (late.data / "replaced-by-another").exists()
    async with nodes.connected() as gateway, asyncio.timeout(60):
        await whole_on({f"nats-{node.name}" for node in nodes.nodes}, nodes)
        after = await contents(gateway)
    assert after[EVENTS_STREAM][:-1] == before[EVENTS_STREAM]


# A server that was killed counts as there for two and a half minutes.
@pytest.mark.timeout(400)
async def test_a_server_on_a_new_node_takes_the_place_of_one_that_is_gone_for_good(
    nodes: BrokerNodes,
) -> None:
    await with_streams(nodes)
    async with nodes.connected() as gateway:
        # So much that it takes its time to come to the new one.
        big = b"x" * 2**18
        await asyncio.gather(
            *(gateway.jetstream.publish(f"events.job-{n}", big) for n in range(200))
        )
        before = await contents(gateway)
    new = await nodes.replace(nodes.nodes[1], "new-node")
    await nodes.joined()
    async with asyncio.timeout(60):
        await whole_on({f"nats-{node.name}" for node in nodes.nodes}, nodes)
    # With it, two of three are a majority: the new one has a copy, and counts.
    await nodes.first.kill()
    rest = ",".join((new.url, nodes.nodes[-1].url))
    async with connect(
        rest, user=GATEWAY_USER, password=new.password(GATEWAY_USER), name="t"
    ) as bus:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(APIError, TimeoutError, NoStreamResponseError):
                    await bus.jetstream.publish("events.after", b"after")
                    break
                await asyncio.sleep(0.2)
        # Streams are listed by a server that may not have been elected yet.
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(APIError, TimeoutError):
                    after = await contents(bus)
                    break
                await asyncio.sleep(0.2)
    old = before[EVENTS_STREAM]
    assert after[EVENTS_STREAM][: len(old)] == old
    # Once more for each answer that did not come.
    assert {subject for _, subject, _ in after[EVENTS_STREAM][len(old) :]} == {"events.after"}


async def whole_on(names: set[str], nodes: BrokerNodes) -> None:
    """Wait until these servers hold all of every stream; one without a leader gives no answer."""
    while True:
        with contextlib.suppress(APIError, TimeoutError):
            seen = await report(nodes.gateway_settings())
            if not any(stream.behind for stream in seen.streams):
                async with nodes.connected() as gateway:
                    infos = await gateway.jetstream.streams_info()
                if all(members(info) == names for info in infos):
                    return
        await asyncio.sleep(0.1)


def members(info: StreamInfo) -> set[str]:
    """Return the servers that the broker counts on for a stream."""
    assert info.cluster
    return {str(info.cluster.leader), *(str(each.name) for each in info.cluster.replicas or [])}
