"""Brings what a lone server holds into the broker of several servers that takes its place.

nats-server does not do that by itself: what it stored alone, it never shows to others. So each
server of several keeps its data in a directory of its own, and this runs beside it. Where the
node has the store of a lone server, a private server that only this process can reach is started
on it, and its streams are carried over, one after the other. The old store is removed once all
of it is there, with a copy on every server, and not before: whenever this is ended, it begins
again.

A stream that has just come has a subject that nobody uses, and gets its own once it is whole on
every server. So nobody writes to half a stream, and by its subject it is told whether one that
is there is whole.
"""

import asyncio
import logging
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any

import nats.errors
from nats.js.api import StreamInfo
from nats.js.errors import NotFoundError

from claude_jobs.broker.configuration import server_name
from claude_jobs.broker.holdings import on_every_server
from claude_jobs.broker.lone_server import lone_server
from claude_jobs.broker.stores import STORE_NAME, streams_in
from claude_jobs.broker.succession import succeed
from claude_jobs.broker.users import BROKER_USER, broker_password, connect_as_system
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.servers import Arrival, BrokerServers
from claude_jobs.bus.snapshot import SnapshotError, ask, restore_snapshot, take_snapshot
from claude_jobs.bus.topology import JOBS_STREAM, PRESENCE_BUCKET
from claude_jobs.settings import BrokerSettings

log = logging.getLogger(__name__)

# A lone server's store whose streams are in the broker, or that was left out for a newer one.
_MOVED = "moved-into-cluster"
_LEFT_OUT = "left-out-of-cluster"
# How a stream is described that has come, until a gateway describes it as one of its own.
_CARRIED = "carried over from a lone server"
_RETRY = 1.0
# Seconds after which no server tries any longer to restore what was removed. One that was started
# anew takes up a restoring that was interrupted, once it is elected (9 s), gets nothing, gives up
# (5 s), and removes the stream of that name: a new one, too.
_GIVEN_UP = 16.0
# Replicas say every few seconds that they are there: nothing of it is worth carrying over.
_NOT_CARRIED = {f"KV_{PRESENCE_BUCKET}"}


async def join(settings: BrokerSettings) -> None:
    """Make this node's server one of its broker's, perhaps in the place of another.

    Returns once it is.

    Tries for ever, as it waits for the other servers.
    """
    if settings.broker_servers == 1:
        return
    while True:
        try:
            await _join(settings)
        except (nats.errors.Error, SnapshotError, OSError, TimeoutError) as error:
            log.warning("not joined yet", extra={"cause": str(error) or repr(error)})
            await asyncio.sleep(_RETRY)
        else:
            break
    await succeed(settings)


async def _join(settings: BrokerSettings) -> None:
    _remove(settings.broker_data_dir / _MOVED)
    async with connect(
        settings.own_url,
        user=BROKER_USER,
        password=broker_password(settings),
        name="broker-join",
    ) as cluster:
        # Known once the server runs.
        name = server_name(settings)
        servers = await BrokerServers.open(cluster, copies=settings.broker_servers)
        brought = await servers.has_brought(name)
        if brought is None:
            async with _lone_store(settings) as lone:
                await servers.arrive(Arrival(name, await _newest(lone) if lone else None))
                brought = await _is_chosen(servers, settings)
                if lone and brought:
                    brought = await _carry_over(lone, cluster, settings)
            await servers.join(name, brought=brought)
    _put_away(settings, brought=brought)
    log.info("the server has joined its broker", extra={"server": name})


async def _is_chosen(servers: BrokerServers, settings: BrokerSettings) -> bool:
    """Wait until all servers have come; tell whether this one has the newest of what they bring.

    A lone server that has moved to another node has left an old store on the first one.
    """
    while len(arrivals := await servers.arrivals()) < settings.broker_servers:
        log.info(
            "waiting for the other servers",
            extra={"arrived": len(arrivals), "servers": settings.broker_servers},
        )
        await asyncio.sleep(_RETRY)
    bringing = [(each.newest, each.server) for each in arrivals if each.newest is not None]
    return bool(bringing) and max(bringing)[1] == server_name(settings)


async def _newest(lone: Bus) -> float | None:
    """Return when the last message of a server was stored; None where it holds nothing of use."""
    found = []
    for stream in await _carried(lone):
        state = (await ask(lone, f"$JS.API.STREAM.INFO.{stream}", {}))["state"]
        found.append(datetime.fromisoformat(state["last_ts"]).timestamp())
    return max(found, default=None)


async def _carried(lone: Bus) -> list[str]:
    """Return the streams to carry over. The jobs come last: what they need is there then."""
    held = {str(info.config.name) for info in await lone.jetstream.streams_info()}
    return sorted(held - _NOT_CARRIED, key=lambda stream: (stream == JOBS_STREAM, stream))


async def _carry_over(lone: Bus, cluster: Bus, settings: BrokerSettings) -> bool:
    """Carry every stream over; tell whether the broker has them all now."""
    complete = True
    async with connect_as_system(settings.own_url, settings, name="broker-join") as system:
        for stream in await _carried(lone):
            there = await _what_is_there(cluster, stream)
            if there is _There.OTHER:
                log.error(
                    "a stream was made and used before the one of the lone server came: "
                    "the old one is left out",
                    extra={"stream": stream},
                )
                complete = False
            if there is _There.NOTHING:
                await _carry(stream, lone, cluster, system, settings.broker_servers)
    return complete


async def _carry(stream: str, lone: Bus, cluster: Bus, system: Bus, copies: int) -> None:
    async with take_snapshot(lone, stream) as snapshot:
        own = {**snapshot.config, "num_replicas": copies, "description": _CARRIED}
        # Without a bound no room is set aside: while it comes, that would be twice as much.
        apart = {**own, "subjects": [_subject_apart(stream)], "max_bytes": -1}
        state = await restore_snapshot(cluster, replace(snapshot, config=apart))
    await on_every_server(system, stream, state["last_seq"], copies)
    await ask(cluster, f"$JS.API.STREAM.UPDATE.{stream}", own)
    log.info(
        "carried a stream over",
        extra={"stream": stream, "messages": state["messages"], "last": state["last_seq"]},
    )


class _There(Enum):
    """What the broker has in the place of a stream that is to come."""

    NOTHING = auto()
    CARRIED = auto()  # the stream, which came before
    OTHER = auto()  # one that was used already


async def _what_is_there(cluster: Bus, stream: str) -> _There:
    """Look at what is in the place of a stream; what nobody has used is removed."""
    try:
        info = await cluster.jetstream.stream_info(stream)
    except NotFoundError:
        # One in whose coming a server was ended is not told of, and would be in the way.
        await _remove_half(cluster, stream)
        return _There.NOTHING
    if info.config.subjects == [_subject_apart(stream)]:
        await _remove_half(cluster, stream)
        return _There.NOTHING
    if info.config.description == _CARRIED:
        return _There.CARRIED
    if info.state.last_seq:
        return _There.OTHER
    # A gateway made it that knew of one server only. From here on nobody can use it.
    await ask(cluster, f"$JS.API.STREAM.UPDATE.{stream}", _apart(info))
    if (await cluster.jetstream.stream_info(stream)).state.last_seq:
        await ask(cluster, f"$JS.API.STREAM.UPDATE.{stream}", info.config.as_dict())
        return _There.OTHER
    await cluster.jetstream.delete_stream(stream)
    return _There.NOTHING


async def _remove_half(cluster: Bus, stream: str) -> None:
    """Remove a stream in whose coming a server was ended, if there is one."""
    try:
        await cluster.jetstream.delete_stream(stream)
    except NotFoundError:
        return
    except TimeoutError:
        log.info("perhaps removed half a stream", extra={"stream": stream})
    else:
        log.info("removed half a stream", extra={"stream": stream})
    await asyncio.sleep(_GIVEN_UP)


def _apart(info: StreamInfo) -> dict[str, Any]:
    return {**info.config.as_dict(), "subjects": [_subject_apart(str(info.config.name))]}


def _subject_apart(stream: str) -> str:
    """Return a subject on which nobody publishes, and that nobody but the broker could."""
    return f"carried-over.{stream}"


@asynccontextmanager
async def _lone_store(settings: BrokerSettings) -> AsyncIterator[Bus | None]:
    """Open what this node's server stored when it was alone, if there is anything."""
    if not streams_in(settings.broker_data_dir):
        yield None
        return
    async with lone_server(settings) as bus:
        yield bus


def _put_away(settings: BrokerSettings, *, brought: bool) -> None:
    """Put the lone server's store where no server looks for it, and remove what has come over."""
    store = settings.broker_data_dir / STORE_NAME
    if not streams_in(settings.broker_data_dir):
        return
    if brought:
        store.rename(settings.broker_data_dir / _MOVED)
        _remove(settings.broker_data_dir / _MOVED)
        return
    kept = settings.broker_data_dir / f"{_LEFT_OUT}-{secrets.token_hex(4)}"
    log.warning(
        "what this node's server held when it was alone is not in the broker: it is kept apart",
        extra={"directory": str(kept)},
    )
    store.rename(kept)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
