"""The state of the whole pool as the broker knows it: `python -m claude_jobs report`.

Runs in a gateway's container, so that nobody needs an API token to look after a pool.
"""

import asyncio
import sys

from nats.js.api import StreamInfo

from claude_jobs.broker.configuration import LONE_SERVER
from claude_jobs.broker.holdings import holders
from claude_jobs.broker.users import GATEWAY_USER, connect_as_system
from claude_jobs.bus.connection import connect
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.contract.base import Document
from claude_jobs.contract.status import Replica
from claude_jobs.gateway.positions import waiting_jobs
from claude_jobs.settings import GatewaySettings

# Seconds after which a broker that does not answer counts as away.
_PATIENCE = 15.0


class StreamReport(Document):
    """One stream of the broker; `behind` are servers that have not all of it.

    `leader` is None while none is elected: then nothing can be written.
    """

    name: str
    messages: int
    bytes: int
    copies: int
    leader: str | None
    behind: list[str]


class PoolReport(Document):
    """The replicas that are alive, the jobs that are not ended, the broker's streams."""

    replicas: list[Replica]
    waiting: int
    unfinished: int
    queue_limit: int
    demo: bool
    streams: list[StreamReport]


async def report(settings: GatewaySettings) -> PoolReport:
    """Ask the broker. Raises `TimeoutError` when it does not answer in time."""
    async with (
        asyncio.timeout(_PATIENCE),
        connect(
            settings.broker_url,
            user=GATEWAY_USER,
            password=settings.broker_gateway_password.current,
            name="report",
        ) as bus,
    ):
        replicas = await (await Presence.open(bus)).list()
        unfinished = await JobQueue(bus).unfinished()
        infos = await bus.jetstream.streams_info()
        streams = await _streams(settings, infos)
    return PoolReport(
        replicas=replicas,
        waiting=len(waiting_jobs(unfinished, replicas)),
        unfinished=len(unfinished),
        queue_limit=settings.queue_limit,
        demo=settings.demo_mode,
        streams=sorted(streams, key=lambda stream: stream.name),
    )


async def _streams(settings: GatewaySettings, infos: list[StreamInfo]) -> list[StreamReport]:
    servers = settings.broker_servers
    if servers == 1:
        return [_stream(info, {LONE_SERVER}) for info in infos]
    async with connect_as_system(settings.broker_url, settings, name="report") as system:
        last = {str(info.config.name): info.state.last_seq for info in infos}
        held = await holders(system, last, servers)
    return [_stream(info, held[str(info.config.name)]) for info in infos]


def _stream(info: StreamInfo, holding: set[str]) -> StreamReport:
    group = info.cluster
    # A lone server leads, and does not say so.
    leader = (group.leader if group else LONE_SERVER) or None
    others = (group.replicas if group else None) or []
    up_to_date = {each.name for each in others if each.current and not each.offline} | {leader}
    members = {leader, *(each.name for each in others)} - {None}
    return StreamReport(
        name=str(info.config.name),
        messages=info.state.messages,
        bytes=info.state.bytes,
        copies=1 + len(others),
        leader=leader,
        behind=sorted(str(name) for name in members - (holding & up_to_date)),
    )


async def print_report(settings: GatewaySettings) -> int:
    """Print the report as JSON; returns the exit code: 0, or 69 when the broker is away."""
    try:
        document = await report(settings)
    except TimeoutError:
        sys.stderr.write(f"the job broker does not answer within {_PATIENCE:.0f} seconds\n")
        return 69  # sysexits.h: EX_UNAVAILABLE
    sys.stdout.write(document.to_json().decode() + "\n")
    return 0
