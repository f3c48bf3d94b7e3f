"""A connection to NATS that is opened with patience and always closed."""

import asyncio
import hashlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

log = logging.getLogger(__name__)

# A request that the broker has not answered by then (seconds) failed.
REQUEST_TIMEOUT = 5.0
# The pause between two tries to reach a broker that was lost, in seconds.
_RECONNECT_WAIT = 0.5
# Seconds between two questions whether the broker is there. The third that stays open ends the
# connection: a machine that lost its power closes none.
_PING_EVERY = 3
# The port of a URL without one, and how long (seconds) the addresses of a name are waited for.
_PORT = 4222
_RESOLVE_TIMEOUT = 2.0


class _Client(Client):
    """A client whose requests can be cancelled at any moment.

    Before Python 3.12, `asyncio.wait_for` forgets that its task was cancelled when what it waits
    for comes at that very moment. Then the task goes on, and whoever ends it waits for ever.
    """

    async def request(self, *what: Any, **how: Any) -> Msg:
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            return await super().request(*what, **how)
        finally:
            if task and task.cancelling() > before:
                raise asyncio.CancelledError


@dataclass(frozen=True)
class Bus:
    """An open connection: plain NATS and its JetStream."""

    nats: Client
    jetstream: JetStreamContext

    @property
    def is_connected(self) -> bool:
        """Tell whether the broker is in reach at this moment."""
        return self.nats.is_connected


def login(user: str, password: str) -> str:
    """Return the name that the broker knows a user by, which tells his passwords apart.

    So an old and a new one are both good while a password is changed. From the name nobody
    learns the password.
    """
    return f"{user}-{hashlib.sha256(password.encode()).hexdigest()[:12]}"


@asynccontextmanager
async def connect(url: str, *, user: str, password: str, name: str) -> AsyncIterator[Bus]:
    """Connect to the broker at `url` as `user`; waits until it is there.

    Several servers of one broker have commas between them, or one name that stands for them all.

    Once open, the connection repairs itself for ever. The inbox carries the user's name, so
    that the broker can keep one role from listening to another's replies. Each try to reach a
    broker that is away is logged as a warning.
    """
    opener = asyncio.current_task()
    cancelled_before = opener.cancelling() if opener else 0

    def raise_what_was_forgotten() -> None:
        """End the task when it was cancelled and `asyncio.wait_for` forgot it (see `_Client`)."""
        task = asyncio.current_task()
        before = cancelled_before if task is opener else 0
        if task and task.cancelling() > before:
            raise asyncio.CancelledError

    async def on_error(error: Exception) -> None:
        log.warning(
            "the broker's connection reports a fault",
            extra={"url": url, "cause": str(error) or repr(error)},
        )
        # Each failed try comes by here, in the task that tries; it would go on for ever.
        raise_what_was_forgotten()

    closing = False

    async def on_disconnect() -> None:
        if not closing:
            log.warning("the broker is out of reach")
            # A server that was started elsewhere has another address.
            client.set_server_pool(await _servers(url))

    async def on_reconnect() -> None:
        log.info("the broker is in reach again")

    client = _Client()
    await client.connect(
        await _servers(url),
        user=login(user, password),
        password=password,
        name=name,
        inbox_prefix=f"_INBOX_{user}".encode(),
        error_cb=on_error,
        disconnected_cb=on_disconnect,
        reconnected_cb=on_reconnect,
        # So it tries for ever, from the first connection on.
        allow_reconnect=True,
        max_reconnect_attempts=-1,
        reconnect_time_wait=_RECONNECT_WAIT,  # type: ignore[arg-type] # nats-py
        connect_timeout=2,
        ping_interval=_PING_EVERY,
        max_outstanding_pings=2,
    )
    try:
        raise_what_was_forgotten()
        yield Bus(client, client.jetstream(timeout=REQUEST_TIMEOUT))
    finally:
        closing = True
        await client.close()


async def _servers(url: str) -> list[str]:
    """Return the URLs in a list, and those of each address of a name that stands for several.

    By the name alone, a try to connect reaches only the first of them when that one is silent.
    """
    given = [each.strip() for each in url.split(",") if each.strip()]
    found = dict.fromkeys(given)
    for each in given:
        parts = urlsplit(each if "://" in each else f"nats://{each}")
        addresses = await _addresses(parts.hostname or "", parts.port or _PORT)
        for address in addresses if len(addresses) > 1 else ():
            place = f"[{address}]" if ":" in address else address
            found[f"{parts.scheme}://{place}:{parts.port or _PORT}"] = None
    return list(found)


async def _addresses(host: str, port: int) -> list[str]:
    """Return the addresses of a name at this moment; none while nobody knows it."""
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError):
        return []
    return list(dict.fromkeys(str(place[0]) for *_, place in found))
