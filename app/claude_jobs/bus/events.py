"""The event log: one subject a job, appended by one writer at a time, read by anyone.

The sequence number that the broker gives an event is its `id` in the event stream. An append
names the sequence number that it follows on, and the broker takes it only when that is still
the job's last one. This one rule makes the guarantees: nothing follows a terminal event, and a
replica whose job went to another can write nothing more.
"""

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic

import nats.errors
import nats.js.errors
from nats.js.errors import APIError, NotFoundError

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.event_cursor import (
    EXPECTED_LAST,
    PREVIOUS,
    CursorLostError,
    EventCursor,
    LoggedEvent,
    previous_of,
)
from claude_jobs.bus.event_tail import EventTail
from claude_jobs.bus.topology import EVENTS_STREAM, events_subject
from claude_jobs.contract.event import Event, is_terminal

__all__ = [
    "BrokerAwayError",
    "CaughtUp",
    "EventLog",
    "EventWriter",
    "FencedError",
    "LoggedEvent",
]

log = logging.getLogger(__name__)

_WRONG_LAST_SEQUENCE = {10070, 10071}
_MESSAGE_ID = "Nats-Msg-Id"
_AWAY = (nats.errors.Error, nats.js.errors.Error, TimeoutError)
# How the broker says that it holds no event of the job.
_HOLDS_NONE = re.compile(r"wrong last sequence: 0$")
# How long an append is tried while the broker is away, in seconds. The agent goes on meanwhile.
_PATIENCE = 600.0
# The pause before a reader asks a broker that was away again, in seconds.
_RETRY = 0.25


class BrokerAwayError(Exception):
    """The broker was out of reach for longer than an append is tried."""


class FencedError(Exception):
    """Somebody else has written to this job's log: it is not ours any more."""


@dataclass(frozen=True)
class CaughtUp:
    """All that is stored has been read; `last` is the job's last event (None: none is left)."""

    last: LoggedEvent | None


class EventWriter:
    """The one writer of a job's log. Starts from what the log holds at that moment."""

    def __init__(self, bus: Bus, job_id: str, last: LoggedEvent | None) -> None:
        self._bus = bus
        self._subject = events_subject(job_id)
        self._id = uuid.uuid4().hex
        self._sequence = last.sequence if last else 0
        self.last = last.event if last else None
        self._turn = asyncio.Lock()

    @property
    def sequence(self) -> int:
        """The sequence number of the job's last event, as far as this writer knows; 0: none."""
        return self._sequence

    async def append(self, event: Event) -> int:
        """Append an event and return its sequence number.

        Tries again while the broker is away, without ever appending twice. Goes on when its
        caller is cancelled, and the next append waits for it: whether the broker has taken it
        must be known. Raises `FencedError` when another writer was here, `BrokerAwayError` when
        the broker stayed away, `ValueError` when the log has already ended.
        """
        appending = asyncio.create_task(self._append_in_turn(event))
        try:
            return await asyncio.shield(appending)
        except asyncio.CancelledError:
            appending.add_done_callback(_note_failure)
            raise

    async def _append_in_turn(self, event: Event) -> int:
        async with self._turn:
            if is_terminal(self.last):
                raise ValueError(f"{self._subject} has ended: nothing may follow")
            self._sequence = await self._append(event.to_json())
            self.last = event
            return self._sequence

    async def _append(self, data: bytes) -> int:
        # The broker recognises a repeated append by this and answers as it did before. The
        # writer's own name is in it: another's append at this place is no repetition.
        own_id = f"{self._id}:{self._sequence}"
        headers = {EXPECTED_LAST: str(self._sequence), _MESSAGE_ID: own_id}
        give_up = monotonic() + _PATIENCE
        while True:
            try:
                ack = await self._bus.jetstream.publish(self._subject, data, headers=headers)
            except APIError as error:
                if error.err_code in _WRONG_LAST_SEQUENCE:
                    if headers[EXPECTED_LAST] != "0" and _HOLDS_NONE.search(
                        error.description or ""
                    ):
                        # Nobody wrote: the log's bounds have dropped all that the job had.
                        headers |= {EXPECTED_LAST: "0", PREVIOUS: str(self._sequence)}
                        continue
                    # The broker may be away again when it is asked.
                    with contextlib.suppress(*_AWAY):
                        if own := await self._taken_before(own_id):
                            return own
                        raise FencedError(self._subject) from error
                elif error.code is not None and error.code < 500:
                    raise
                cause: Exception = error
            except _AWAY as error:
                cause = error
            else:
                return ack.seq
            if monotonic() > give_up:
                raise BrokerAwayError(f"no event was taken for {_PATIENCE:.0f} s") from cause
            log.warning("appending again", extra={"cause": str(cause) or repr(cause)})
            await asyncio.sleep(0.25)

    async def _taken_before(self, own_id: str) -> int | None:
        """Return where the broker has put an append whose answer was lost long ago, if it has.

        The broker itself recognises a repetition for two minutes.
        """
        try:
            message = await self._bus.jetstream.get_last_msg(EVENTS_STREAM, self._subject)
        except NotFoundError:
            return None
        return message.seq if (message.headers or {}).get(_MESSAGE_ID) == own_id else None


def _note_failure(appending: asyncio.Task[int]) -> None:
    if not appending.cancelled() and (error := appending.exception()):
        log.warning("an append came to nothing", extra={"cause": repr(error)})


class EventLog:
    """Reads and opens the logs of jobs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._tail = EventTail(bus)

    async def writer(self, job_id: str) -> EventWriter:
        """Open a job's log for appending, after whatever it holds."""
        return EventWriter(self._bus, job_id, await self.last(job_id))

    def begin(self, job_id: str) -> EventWriter:
        """Open the log of a job that is new: nothing is asked, it holds nothing yet."""
        return EventWriter(self._bus, job_id, None)

    async def last(self, job_id: str) -> LoggedEvent | None:
        """Return the last event of a job, or None when there is none."""
        try:
            message = await self._bus.jetstream.get_last_msg(EVENTS_STREAM, events_subject(job_id))
        except NotFoundError:
            return None
        return LoggedEvent(message.seq or 0, message.data or b"", previous_of(message.headers))

    async def read(self, job_id: str, *, after: int = 0) -> AsyncGenerator[LoggedEvent]:
        """Yield a job's events with a sequence number above `after`, then those to come.

        Ends after the terminal event. Close the iterator (`contextlib.aclosing`) to stop early.
        """
        async with aclosing(self.read_batches(job_id, after=after)) as batches:
            async for batch in batches:
                if not isinstance(batch, CaughtUp):
                    for logged in batch:
                        yield logged

    async def read_batches(
        self, job_id: str, *, after: int = 0
    ) -> AsyncGenerator[list[LoggedEvent] | CaughtUp]:
        """Yield the same in batches, as many events as there are at a time.

        Outlives every absence of the broker. Where an event's `previous` is not the one that was
        read before it, the log has dropped what was in between.
        """
        async with self._tail.follow(events_subject(job_id)) as live:
            while True:
                async with aclosing(self._stored(job_id, after)) as stored:
                    async for batch in stored:
                        yield batch
                        if not isinstance(batch, CaughtUp):
                            after = batch[-1].sequence
                            if batch[-1].is_terminal:
                                return
                while (fresh := _following(after, await live.take())) is not None:
                    if fresh:
                        yield fresh
                        after = fresh[-1].sequence
                        if fresh[-1].is_terminal:
                            return

    async def stored(self, job_id: str, *, after: int = 0) -> AsyncGenerator[LoggedEvent]:
        """Yield what a job's log holds above `after`, and end there."""
        async with aclosing(self._stored(job_id, after)) as batches:
            async for batch in batches:
                if not isinstance(batch, CaughtUp):
                    for logged in batch:
                        yield logged

    async def span(self) -> tuple[int, int]:
        """Return the first sequence number that the log still holds, and the last ever given."""
        state = (await self._bus.jetstream.stream_info(EVENTS_STREAM)).state
        return state.first_seq, state.last_seq

    async def forget(self, job_id: str) -> None:
        """Remove a log that was begun for a job which was then not accepted."""
        # Not by a purge of its subject: with nats-server 2.9 readers then miss other jobs' events.
        while last := await self.last(job_id):
            await self._bus.jetstream.delete_msg(EVENTS_STREAM, last.sequence)

    async def _stored(
        self, job_id: str, after: int
    ) -> AsyncGenerator[list[LoggedEvent] | CaughtUp]:
        while True:
            try:
                last = await self.last(job_id)
                if last and last.previous is not None and last.previous <= after < last.sequence:
                    yield [last]
                    after = last.sequence
                if last is None or last.sequence <= after:
                    yield CaughtUp(last)
                    return
                async with EventCursor(self._bus, events_subject(job_id), after=after) as cursor:
                    # Nothing comes where the log has dropped the rest meanwhile: it is asked again.
                    while batch := [logged for _, logged in await cursor.take()]:
                        yield batch
                        after = batch[-1].sequence
                        if after >= last.sequence:
                            yield CaughtUp(batch[-1])
                            return
            except (CursorLostError, *_AWAY) as error:
                log.warning(
                    "reading a job's events again", extra={"cause": str(error) or repr(error)}
                )
                await asyncio.sleep(_RETRY)


def _following(after: int, batch: list[LoggedEvent] | None) -> list[LoggedEvent] | None:
    """Return those of a batch that come after an event, or None when some are missing between."""
    if batch is None:
        return None
    fresh = []
    for logged in batch:
        if logged.sequence > after:
            if logged.previous is not None and logged.previous > after:
                return None
            fresh.append(logged)
            after = logged.sequence
    return fresh
