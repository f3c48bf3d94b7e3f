"""The broker's parts that a replica uses."""

from dataclasses import dataclass

from claude_jobs.bus.cancellations import Cancellations
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.sessions import SessionLog, SessionRecords


@dataclass(frozen=True)
class Backend:
    """What the gateway has made on the broker, opened with a replica's rights."""

    queue: JobQueue
    events: EventLog
    records: JobRecords
    cancellations: Cancellations
    session_log: SessionLog
    sessions: SessionRecords
    presence: Presence

    @classmethod
    async def open(cls, bus: Bus) -> "Backend":
        """Open every part; raises `nats.js.errors.NotFoundError` until a gateway made them."""
        return cls(
            JobQueue(bus),
            EventLog(bus),
            await JobRecords.open(bus),
            await Cancellations.open(bus),
            SessionLog(bus),
            await SessionRecords.open(bus),
            await Presence.open(bus),
        )
