"""A connection to NATS that is opened with patience and always closed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import nats
from nats.aio.client import Client
from nats.errors import NoServersError
from nats.js import JetStreamContext

log = logging.getLogger(__name__)

# A request that the broker has not answered by then (seconds) failed.
REQUEST_TIMEOUT = 5.0


@dataclass(frozen=True)
class Bus:
    """An open connection: plain NATS and its JetStream."""

    nats: Client
    jetstream: JetStreamContext

    @property
    def is_connected(self) -> bool:
        """Tell whether the broker is in reach at this moment."""
        return self.nats.is_connected


@asynccontextmanager
async def connect(url: str, *, user: str, password: str, name: str) -> AsyncIterator[Bus]:
    """Connect to the broker at `url` as `user`; waits until it is there.

    Once open, the connection repairs itself for ever. The inbox carries the user's name, so
    that the broker can keep one role from listening to another's replies. Each try to reach a
    broker that is away is logged as a warning.
    """

    async def on_error(error: Exception) -> None:
        log.warning(
            "the broker's connection reports a fault", extra={"cause": str(error) or repr(error)}
        )

    closing = False

    async def on_disconnect() -> None:
        if not closing:
            log.warning("the broker is out of reach")

    async def on_reconnect() -> None:
        log.info("the broker is in reach again")

    while True:
        try:
            client = await nats.connect(
                url,
                user=user,
                password=password,
                name=name,
                inbox_prefix=f"_INBOX_{user}".encode(),
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                # The first connection fails fast and is tried again here, so that each failure
                # is seen; after it, the client tries for ever by itself.
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.5,
                connect_timeout=2,
                ping_interval=10,
                max_outstanding_pings=2,
            )
            break
        except (OSError, TimeoutError, NoServersError, nats.errors.Error) as error:
            log.warning(
                "waiting for the broker", extra={"url": url, "cause": str(error) or repr(error)}
            )
            await asyncio.sleep(0.25)
    try:
        yield Bus(client, client.jetstream(timeout=REQUEST_TIMEOUT))
    finally:
        closing = True
        await client.close()
