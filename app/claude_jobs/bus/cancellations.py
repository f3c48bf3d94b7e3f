"""Cancellations: who asked that a job be ended. The replica that runs it is told at once."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import nats.errors
import nats.js.errors
from nats.js.errors import KeyNotFoundError
from nats.js.kv import KeyValue

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.places import take_place
from claude_jobs.bus.topology import CANCELLATIONS_BUCKET

log = logging.getLogger(__name__)


class Cancellations:
    """The bucket of cancellations, by job id. One stays there: whoever has the job sees it."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> "Cancellations":
        """Open the bucket; raises `nats.js.errors.NotFoundError` until a gateway made it."""
        return cls(await bus.jetstream.key_value(CANCELLATIONS_BUCKET))

    async def ask(self, job_id: str, client: str) -> None:
        """Ask that a job be ended, in the name of `client`."""
        await self._bucket.put(job_id, client.encode())

    async def asked(self, job_id: str) -> bool:
        """Tell whether somebody has asked."""
        try:
            await self._bucket.get(job_id)
        except KeyNotFoundError:
            return False
        return True

    async def wait(self, job_id: str) -> None:
        """Return as soon as somebody asks; at once when somebody has. Outlives the broker."""
        while True:
            try:
                async with aclosing(self._changes(job_id)) as changes:
                    async for _ in changes:
                        return
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.warning("listening for a cancel again", extra={"cause": repr(error)})
            await asyncio.sleep(0.5)

    async def _changes(self, job_id: str) -> AsyncGenerator[None]:
        watcher = await take_place(partial(self._bucket.watch, job_id, ignore_deletes=True))
        try:
            async for entry in watcher:
                # None marks the end of what the bucket held when the watch began.
                if entry is not None:
                    yield
        finally:
            await watcher.stop()  # type: ignore[no-untyped-call] # nats-py
