"""Takes servers off the broker whose place another one has taken, and keeps them off.

A server's name is its node's. Where a node has made way for another, the new one's server comes
in addition, empty, and every stream still counts on a copy that nobody will bring back. Swarm
never runs more servers than the broker is to have; so once as many as that are there, one that
is not there is one of before. Without it, the streams get their copies on the new server.

One that comes back to its node after that still has its data, and with it the belief that it is
one of those that hold each stream; the others would wait for each other's votes for ever. So a
server with data asks them first whether they count on it.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.js.errors import APIError

from claude_jobs.broker.configuration import server_name
from claude_jobs.broker.users import connect_as_system
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.snapshot import ask
from claude_jobs.settings import BrokerSettings

log = logging.getLogger(__name__)

_POLL = 1.0
# Seconds for which the others must be there, so that one that has only just gone is not taken
# for one that was replaced.
_SETTLE = 5.0
# Seconds for which a server that starts waits for word of the others.
_ASKING = 8.0
# What nats-server makes of a name for the servers among themselves (server/events.go, getHash).
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PEER_LENGTH = 8


@dataclass(frozen=True)
class Member:
    """A server that the broker counts on. `peer` is its name among the servers themselves.

    A server that was started anew knows only the `peer` of one that it has not met since; it has
    a sentence for a `name` then.
    """

    name: str
    peer: str
    present: bool


def is_counted(name: str, members: list[Member]) -> bool:
    """Say whether the server `name` is one of those that the broker counts on."""
    peer = peer_of(name)
    return any(name == member.name or peer == member.peer for member in members)


def peer_of(name: str) -> str:
    """Return what the servers call the one of this name among themselves."""
    digest = hashlib.sha256(name.encode()).digest()
    return "".join(_DIGITS[byte % len(_DIGITS)] for byte in digest[:_PEER_LENGTH])


async def was_replaced(settings: BrokerSettings) -> bool:
    """Ask the others, before this server starts, whether they do without it now.

    False where nobody answers that knows: all of them may be starting.
    """
    try:
        async with (
            asyncio.timeout(_ASKING),
            connect_as_system(settings.broker_url, settings, name="broker-start") as bus,
        ):
            while True:
                with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
                    return not is_counted(server_name(settings), await _members(bus))
                await asyncio.sleep(_POLL)
    except TimeoutError:
        return False


async def succeed(settings: BrokerSettings) -> None:
    """Wait until the broker counts on no more servers than it is to have; sees to that."""
    async with connect_as_system(settings.own_url, settings, name="broker-succession") as bus:
        own = server_name(settings)
        since: float | None = None
        clock = asyncio.get_running_loop().time
        while True:
            try:
                members = await _members(bus)
                if is_settled(members, own, settings.broker_servers):
                    return
                gone = [member for member in members if not member.present]
                there = len(members) - len(gone)
                whole = bool(gone) and there == settings.broker_servers
                since = (since or clock()) if whole else None
                if since and clock() - since >= _SETTLE:
                    await _remove(bus, gone)
            except (nats.errors.Error, APIError, TimeoutError) as error:
                log.warning("no word of the servers", extra={"cause": str(error) or repr(error)})
                since = None
            await asyncio.sleep(_POLL)


def is_settled(members: list[Member], own: str, servers: int) -> bool:
    """Say whether the broker counts on the server `own`, and on no more than it is to have.

    As many as it is to have may still be those of before: a server that has just come is not
    among them at once.
    """
    return len(members) == servers and is_counted(own, members)


async def _remove(bus: Bus, gone: list[Member]) -> None:
    for member in gone:
        await ask(bus, "$JS.API.SERVER.REMOVE", {"peer": member.name, "peer_id": member.peer})
        log.info("another server took this one's place", extra={"server": member.name})


async def _members(bus: Bus) -> list[Member]:
    """Return the servers that the broker counts on, as the one that leads them has them."""
    wish = json.dumps({"leader_only": True}).encode()
    answer = await bus.nats.request("$SYS.REQ.SERVER.PING.JSZ", wish, timeout=2)
    group: dict[str, Any] = json.loads(answer.data)["data"]["meta_cluster"]
    others = [
        Member(each["name"], each["peer"], not each.get("offline", False))
        for each in group.get("replicas") or []
    ]
    return [Member(group["leader"], group["peer"], present=True), *others]
