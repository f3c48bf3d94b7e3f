"""The event log: one subject a job, appended by one writer at a time, read by anyone.

The sequence number that the broker gives an event is its `id` in the event stream. An append
names the sequence number that it follows on, and the broker takes it only when that is still
the job's last one. This one rule makes the guarantees: nothing follows a terminal event, and a
replica whose job went to another can write nothing more.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import monotonic

import nats.errors
import nats.js.errors
from nats.js.api import ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.topology import EVENTS_STREAM, events_subject
from claude_jobs.contract.event import Event, is_terminal, parse_event

log = logging.getLogger(__name__)

_WRONG_LAST_SEQUENCE = {10070, 10071}
# How long an append is tried while the broker is away, in seconds.
_PATIENCE = 120.0
# The broker says every so many seconds that a reader still stands.
_READ_HEARTBEAT = 1.0


class BrokerAwayError(Exception):
    """The broker was out of reach for longer than an append is tried."""


class FencedError(Exception):
    """Somebody else has written to this job's log: it is not ours any more."""


@dataclass(frozen=True)
class LoggedEvent:
    """An event with its sequence number in the log; `data` is its JSON as it was appended."""

    sequence: int
    data: bytes

    @property
    def event(self) -> Event:
        """The parsed event."""
        return parse_event(self.data)


class EventWriter:
    """The one writer of a job's log. Starts from what the log holds at that moment."""

    def __init__(self, bus: Bus, job_id: str, last: LoggedEvent | None) -> None:
        self._bus = bus
        self._subject = events_subject(job_id)
        self._id = uuid.uuid4().hex
        self._sequence = last.sequence if last else 0
        self.last = last.event if last else None

    async def append(self, event: Event) -> int:
        """Append an event and return its sequence number.

        Tries again while the broker is away, without ever appending twice. Raises
        `FencedError` when another writer was here, `BrokerAwayError` when the broker stayed away,
        `ValueError` when the log has already ended.
        """
        if is_terminal(self.last):
            raise ValueError(f"{self._subject} has ended: nothing may follow")
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(self._sequence),
            # The broker recognises a repeated append by this and answers as it did before. The
            # writer's own name is in it: another's append at this place is no repetition.
            "Nats-Msg-Id": f"{self._id}:{self._sequence}",
        }
        data = event.to_json()
        give_up = monotonic() + _PATIENCE
        while True:
            try:
                ack = await self._bus.jetstream.publish(self._subject, data, headers=headers)
            except APIError as error:
                if error.err_code in _WRONG_LAST_SEQUENCE:
                    raise FencedError(self._subject) from error
                if error.code is not None and error.code < 500:
                    raise
                cause: Exception = error
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                cause = error
            else:
                self._sequence = ack.seq
                self.last = event
                return ack.seq
            if monotonic() > give_up:
                raise BrokerAwayError(f"no event was taken for {_PATIENCE:.0f} s") from cause
            log.warning("appending again", extra={"cause": str(cause) or repr(cause)})
            await asyncio.sleep(0.25)


class EventLog:
    """Reads and opens the logs of jobs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

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
        return LoggedEvent(message.seq or 0, message.data or b"")

    async def read(self, job_id: str, *, after: int = 0) -> AsyncGenerator[LoggedEvent]:
        """Yield a job's events with a sequence number above `after`, then those to come.

        Ends after the terminal event. Close the iterator (`contextlib.aclosing`) to stop early.
        """
        subscription = await self._bus.jetstream.subscribe(
            events_subject(job_id),
            stream=EVENTS_STREAM,
            ordered_consumer=True,
            config=ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=after + 1,
                # After two of these (seconds) without a word the reader is set up anew.
                idle_heartbeat=_READ_HEARTBEAT,
            ),
        )
        try:
            async for message in subscription.messages:
                logged = LoggedEvent(message.metadata.sequence.stream, message.data)
                # A reader that was set up anew (a broker that was restarted forgets readers)
                # may be handed what it had.
                if logged.sequence <= after:
                    continue
                after = logged.sequence
                yield logged
                if is_terminal(logged.event):
                    return
        finally:
            await subscription.unsubscribe()

    async def forget(self, job_id: str) -> None:
        """Remove a log that was begun for a job which was then not accepted."""
        await self._bus.jetstream.purge_stream(EVENTS_STREAM, subject=events_subject(job_id))
