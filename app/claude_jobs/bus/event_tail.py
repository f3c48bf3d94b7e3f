"""The end of the event log as it grows, read once for all who follow a job in this process."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.event_cursor import CursorLostError, EventCursor, LoggedEvent
from claude_jobs.bus.topology import EVENTS_STREAM, EVENTS_SUBJECTS

log = logging.getLogger(__name__)

# What is held for a follower who does not take it (bytes). One who has fallen behind reads on
# from the log, at their own pace.
_HELD_BYTES = 2**18
# The pause before the tail is taken up anew, in seconds.
_RETRY = 0.25


class Follower:
    """What has happened in one job since its follower took it last."""

    def __init__(self) -> None:
        self._held: list[LoggedEvent] = []
        self._bytes = 0
        self._behind = False
        self._news = asyncio.Event()

    async def take(self) -> list[LoggedEvent] | None:
        """Wait for events; None says that some were let go: the log has them."""
        await self._news.wait()
        self._news.clear()
        held, self._held, self._bytes = self._held, [], 0
        if self._behind:
            self._behind = False
            return None
        return held

    def put(self, logged: LoggedEvent) -> None:
        """Hold an event, or none at all when there are too many."""
        if self._behind:
            return
        if self._held and self._bytes + len(logged.data) > _HELD_BYTES:
            self.fall_behind()
            return
        self._held.append(logged)
        self._bytes += len(logged.data)
        self._news.set()

    def fall_behind(self) -> None:
        """Let go of everything: the follower must read on from the log."""
        self._held.clear()
        self._bytes = 0
        self._behind = True
        self._news.set()


class EventTail:
    """Reads the events of all jobs while somebody follows one, and hands out each job's."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._followers: dict[str, set[Follower]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._standing = asyncio.Event()

    @asynccontextmanager
    async def follow(self, subject: str) -> AsyncIterator[Follower]:
        """Follow a job: whatever is appended from now on reaches the follower."""
        follower = Follower()
        self._followers.setdefault(subject, set()).add(follower)
        try:
            if self._reading is None:
                self._standing = asyncio.Event()
                self._reading = asyncio.create_task(self._read(self._standing))
            await self._standing.wait()
            yield follower
        finally:
            followers = self._followers[subject]
            followers.discard(follower)
            if not followers:
                del self._followers[subject]
            if not self._followers:
                await self._stop()

    async def _stop(self) -> None:
        reading, self._reading = self._reading, None
        if reading:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def _read(self, standing: asyncio.Event) -> None:
        after: int | None = None
        while True:
            try:
                async with EventCursor(self._bus, EVENTS_SUBJECTS, after=after) as cursor:
                    if after is not None and await self._has_lost(after):
                        self._let_all_fall_behind()
                    after = cursor.start
                    standing.set()
                    while True:
                        for subject, logged in await cursor.take():
                            after = logged.sequence
                            for follower in self._followers.get(subject, ()):
                                follower.put(logged)
            except (
                CursorLostError,
                nats.errors.Error,
                nats.js.errors.Error,
                TimeoutError,
            ) as error:
                log.warning(
                    "taking up the end of the event log anew",
                    extra={"cause": str(error) or repr(error)},
                )
            except Exception:
                # All followers would wait for ever.
                log.exception("the end of the event log could not be read")
            await asyncio.sleep(_RETRY)

    async def _has_lost(self, after: int) -> bool:
        """Tell whether the log dropped events that nobody here has seen."""
        info = await self._bus.jetstream.stream_info(EVENTS_STREAM)
        return info.state.first_seq > after + 1

    def _let_all_fall_behind(self) -> None:
        for followers in self._followers.values():
            for follower in followers:
                follower.fall_behind()
