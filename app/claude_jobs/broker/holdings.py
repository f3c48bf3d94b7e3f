"""What each server of the broker holds, by its own account.

That a server keeps up with the others, as the broker says of a stream, is about what they agree
on from now on. What was there before comes to a new server, and what was restored on one server
to the others, beside that: for as long as this takes, all of them count as current.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from claude_jobs.bus.connection import Bus

# Seconds for which the next server's answer is waited for.
_ANSWERS = 2.0
# Seconds for which a server is waited for that has not all yet: of what was just stored, it may
# learn with the next heartbeat (1 s).
_SETTLING = 3.0
_POLL = 0.25


@dataclass(frozen=True)
class Copy:
    """What a server holds of a stream: how many messages, and the number of the last."""

    messages: int
    last: int


async def on_every_server(system: Bus, stream: str, last: int, servers: int) -> None:
    """Wait until so many servers hold the same of a stream whose last message has this number.

    `system` is a connection of the user that manages the servers.
    """
    while True:
        copies = [held.get(stream) for held in (await holdings(system, servers)).values()]
        if (
            len(copies) == servers
            and len(set(copies)) == 1
            and copies[0]
            and copies[0].last == last
        ):
            return
        await asyncio.sleep(_POLL)


async def holders(system: Bus, last: Mapping[str, int], servers: int) -> dict[str, set[str]]:
    """Return for each stream which servers hold it up to the message with this number.

    Messages come in their order. A server that does not answer is not among them.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + _SETTLING
    while True:
        held = await holdings(system, servers)
        found = {
            stream: {name for name, copies in held.items() if _reaches(copies.get(stream), number)}
            for stream, number in last.items()
        }
        if clock() >= until or all(names == held.keys() for names in found.values()):
            return found
        await asyncio.sleep(_POLL)


async def holdings(system: Bus, servers: int) -> dict[str, dict[str, Copy]]:
    """Return what each server holds, stream by stream. Of so many, those that answer."""
    inbox = system.nats.new_inbox()
    subscription = await system.nats.subscribe(inbox)
    wish = json.dumps({"accounts": True, "streams": True}).encode()
    await system.nats.publish("$SYS.REQ.SERVER.PING.JSZ", wish, reply=inbox)
    found: dict[str, dict[str, Copy]] = {}
    with contextlib.suppress(TimeoutError):
        while len(found) < servers:
            answer = json.loads((await subscription.next_msg(_ANSWERS)).data)
            found[answer["server"]["name"]] = _held(answer["data"])
    await subscription.unsubscribe()
    return found


def _reaches(copy: Copy | None, number: int) -> bool:
    return copy is not None and copy.last >= number


def _held(data: dict[str, Any]) -> dict[str, Copy]:
    return {
        stream["name"]: Copy(stream["state"]["messages"], stream["state"]["last_seq"])
        for account in data.get("account_details") or []
        for stream in account.get("stream_detail") or []
    }
