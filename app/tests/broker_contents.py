"""What a broker holds, to be compared with what it holds later or elsewhere."""

import asyncio
from typing import Any

from broker_node import BrokerNode
from bus_ends import job, line
from nats.js.api import StreamInfo
from nats.js.errors import NotFoundError

from claude_jobs.broker.users import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.servers import SERVERS_BUCKET
from claude_jobs.bus.topology import EVENTS_STREAM, PRESENCE_BUCKET, Bounds, ensure_topology

BOUNDS = Bounds(event_bytes=2**28, session_bytes=2**28)


# Sequence number, subject and bytes.
Message = tuple[int, str, bytes | None]


async def contents(bus: Bus) -> dict[str, list[Message]]:
    """Return all that a broker holds, stream by stream."""
    found: dict[str, list[Message]] = {}
    for info in await bus.jetstream.streams_info():
        name = str(info.config.name)
        if name not in (f"KV_{PRESENCE_BUCKET}", f"KV_{SERVERS_BUCKET}"):
            found[name] = await contents_of(bus, info)
    return found


async def contents_of(bus: Bus, info: StreamInfo) -> list[Message]:
    """Return all that one stream holds."""
    every = range(max(info.state.first_seq, 1), info.state.last_seq + 1)
    read = (stored(bus, str(info.config.name), sequence) for sequence in every)
    return [message for message in await asyncio.gather(*read) if message]


async def stored(bus: Bus, stream: str, sequence: int) -> Message | None:
    try:
        message = await bus.jetstream.get_msg(stream, sequence)
    except NotFoundError:
        return None
    return sequence, str(message.subject), message.data


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
            *(gateway.jetstream.publish(f"events.big-{n}", big) for n in range(80))
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
