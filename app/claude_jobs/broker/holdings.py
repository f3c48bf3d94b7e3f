"""What each server of the broker holds, by its own account.

That a server keeps up with the others, as the broker says of a stream, is about what they agree
on from now on. A stream that was restored on one of them comes to the others beside that: for as
long as this takes, all of them count as current.
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import Any

from claude_jobs.bus.connection import Bus

# Seconds for which the next server's answer is waited for.
_ANSWERS = 2.0
_POLL = 0.25


@dataclass(frozen=True)
class Copy:
    """What a server holds of a stream: how many messages, and the number of the last."""

    messages: int
    last: int


async def on_every_server(system: Bus, stream: str, last: int, servers: int) -> None:
    """Wait until so many servers hold all of a stream whose last message has this number.

    `system` is a connection of the user that manages the servers.
    """
    while True:
        copies = [held.get(stream) for held in await holdings(system, servers)]
        if (
            len(copies) == servers
            and len(set(copies)) == 1
            and copies[0]
            and copies[0].last == last
        ):
            return
        await asyncio.sleep(_POLL)


async def holdings(system: Bus, servers: int) -> list[dict[str, Copy]]:
    """Return what each server that answers holds, by the names of the streams."""
    inbox = system.nats.new_inbox()
    subscription = await system.nats.subscribe(inbox)
    wish = json.dumps({"accounts": True, "streams": True}).encode()
    await system.nats.publish("$SYS.REQ.SERVER.PING.JSZ", wish, reply=inbox)
    found: list[dict[str, Copy]] = []
    with contextlib.suppress(TimeoutError):
        while len(found) < servers:
            found.append(_held(json.loads((await subscription.next_msg(_ANSWERS)).data)))
    await subscription.unsubscribe()
    return found


def _held(answer: dict[str, Any]) -> dict[str, Copy]:
    return {
        stream["name"]: Copy(stream["state"]["messages"], stream["state"]["last_seq"])
        for account in answer["data"].get("account_details") or []
        for stream in account.get("stream_detail") or []
    }
