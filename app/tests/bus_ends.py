"""The two ends of a bus on a real nats-server, and what the tests send through it."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog, LoggedEvent
from claude_jobs.bus.queue import JobQueue, Lease
from claude_jobs.contract.base import now
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Message,
)
from claude_jobs.contract.job import Job, JobRequest
from claude_jobs.contract.status import Replica, ReplicaStatus

# Far above what a job takes from the queue to a replica that waits, far below a lease.
SOON = 5.0
SHORT_LEASE = timedelta(seconds=2)
ENDED = Completed(
    result="done",
    session_id="s",
    usage={},
    cost_usd=0,
    num_turns=1,
    duration_ms=1,
    permission_denials=[],
)


def job(prompt: str = "hello") -> Job:
    return Job.accept(JobRequest(prompt=prompt), client="test")


def line(number: int) -> Message:
    return Message(content={"type": "line", "number": number}, timestamp=now())


def connected(replica: str) -> Connected:
    return Connected(job_id="j", session_id="s", replica=replica, node="n", attempt=1)


@dataclass
class Ends:
    """The two ends of the bus: what a gateway holds, and what a replica holds."""

    gateway: Bus
    replica: Bus

    @property
    def inbound(self) -> JobQueue:
        return JobQueue(self.gateway)

    @property
    def outbound(self) -> JobQueue:
        return JobQueue(self.replica)

    @property
    def log(self) -> EventLog:
        return EventLog(self.replica)

    @property
    def reader(self) -> EventLog:
        return EventLog(self.gateway)


async def pull(ends: Ends) -> Lease:
    async with asyncio.timeout(SOON):
        return await ends.outbound.pull()


async def take(log: EventLog, job_id: str, *, after: int = 0) -> list[LoggedEvent]:
    async with aclosing(log.read(job_id, after=after)) as events:
        return [event async for event in events]


def present(name: str) -> Replica:
    return Replica(replica=name, node="n", status=ReplicaStatus.IDLE, since=now())
