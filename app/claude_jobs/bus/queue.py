"""The job queue: first in, first out, each job on lease to one replica at a time."""

import asyncio
import contextlib
import json
import logging
from functools import cached_property
from typing import TYPE_CHECKING

import nats.errors
from nats.aio.msg import Msg
from nats.js.errors import APIError
from pydantic import ValidationError

from claude_jobs.bus.connection import REQUEST_TIMEOUT, Bus
from claude_jobs.bus.topology import JOBS_CONSUMER, JOBS_STREAM, job_subject
from claude_jobs.contract.job import Job

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

log = logging.getLogger(__name__)

# JetStream's error codes for a stream that refuses because it is full.
_FULL = {10077, 10054}
_WRONG_LAST_SEQUENCE = {10070, 10071}
# The broker says every so many seconds that a pull still stands; a pull about which nothing was
# heard for two and a half of them is gone (a broker that was restarted forgets pulls).
_PULL_HEARTBEAT = 2.0
_PULL_EXPIRES = 60.0
_HEARTBEAT_STATUS = "100"
_MESSAGE_ID = "Nats-Msg-Id"


class QueueFullError(Exception):
    """The queue holds as many jobs as it may."""


class UnreadableJobError(Exception):
    """A job in the queue is not what this version of the application writes."""


class Lease:
    """A job that was handed to this replica, until it is done, given back or not extended."""

    def __init__(self, message: Msg) -> None:
        self._message = message

    @property
    def job_id(self) -> str:
        """The job's id, which can be told even of a job that cannot be read."""
        return str((self._message.headers or {}).get(_MESSAGE_ID, ""))

    @cached_property
    def job(self) -> Job:
        """The job; raises `UnreadableJobError` when it was written by another version."""
        try:
            return Job.model_validate_json(self._message.data)
        except ValidationError as error:
            raise UnreadableJobError(self.job_id) from error

    @property
    def attempt(self) -> int:
        """How often the job has been handed out, this time included (1 = the first)."""
        return self._message.metadata.num_delivered

    async def extend(self) -> None:
        """Say that the work goes on: the lease starts anew. Returns when the broker has heard it.

        Raises `nats.errors.Error` when the broker does not answer.
        """
        await self._message._client.request(
            self._message.reply, Msg.Ack.Progress, timeout=REQUEST_TIMEOUT
        )

    async def finish(self) -> None:
        """Take the job off the queue for good; returns when the broker has it on disk."""
        await self._message.ack_sync()

    async def give_back(self, *, delay: float = 0) -> None:
        """Return the job to the queue, to be taken after `delay` seconds: no agent was started."""
        await self._message.nak(delay=delay)


class JobQueue:
    """Both ends of the queue; what a process may do is up to its broker user."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def submit(self, job: Job) -> None:
        """Put a job at the end; returns when the broker has it on disk.

        A job that is there already stays where it is. Raises `QueueFullError` when the queue
        refuses, `nats.errors.Error` when it is away.
        """
        try:
            await self._bus.jetstream.publish(
                job_subject(job.client, job.id),
                job.to_json(),
                headers={_MESSAGE_ID: job.id, "Nats-Expected-Last-Subject-Sequence": "0"},
            )
        except APIError as error:
            if error.err_code in _FULL:
                raise QueueFullError from error
            if error.err_code not in _WRONG_LAST_SEQUENCE:
                raise

    async def withdraw(self, client: str, job_id: str) -> None:
        """Take a job off the queue that has ended without a replica that could do it.

        Where its client is not known any more, `*` stands for it.
        A replica that takes it at the same moment sees that it has ended, and takes it off.
        """
        # Not by a purge of its subject: after that, nats-server 2.9 hands out no other job either.
        # Nor by `delete_msg`, which has the job overwritten in its file, beside those that wait:
        # a server that is killed meanwhile must find the file whole.
        with contextlib.suppress(APIError):
            found = await self._bus.jetstream.get_last_msg(JOBS_STREAM, job_subject(client, job_id))
            await self._bus.nats.request(
                f"$JS.API.STREAM.MSG.DELETE.{JOBS_STREAM}",
                json.dumps({"seq": found.seq, "no_erase": True}).encode(),
                timeout=REQUEST_TIMEOUT,
            )

    async def holds(self, client: str, job_id: str) -> bool:
        """Tell whether a job waits or runs, as far as the queue knows."""
        subject = job_subject(client, job_id)
        info = await self._bus.jetstream.stream_info(JOBS_STREAM, subjects_filter=subject)
        return subject in (info.state.subjects or {})

    async def unfinished(self, client: str = "*") -> list[str]:
        """Return the ids of the jobs, all or one client's, that wait or run: the oldest first."""
        info = await self._bus.jetstream.stream_info(
            JOBS_STREAM, subjects_filter=job_subject(client, "*")
        )
        return sorted(subject.rpartition(".")[2] for subject in info.state.subjects or {})

    async def depth(self) -> int:
        """Return how many jobs wait for a replica."""
        info = await self._bus.jetstream.consumer_info(JOBS_STREAM, JOBS_CONSUMER)
        return info.num_pending or 0

    async def pull(self) -> Lease:
        """Wait for the next job, for as long as it takes.

        Cancelling is safe: a job that arrives at that very moment goes straight back. One that
        the broker sends while the pull closes reaches nobody and comes again after its lease.
        """
        while True:
            lease = await self._pull_once()
            if lease is not None:
                return lease

    async def _pull_once(self) -> Lease | None:
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        client = self._bus.nats
        # Every pull has an inbox of its own. Closing it withdraws the pull, so that this
        # replica never has two of them open and is never handed two jobs.
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, cb=arrived.put)
        taken = False
        try:
            await client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{JOBS_CONSUMER}",
                json.dumps(
                    {
                        "batch": 1,
                        "expires": int(_PULL_EXPIRES * 1e9),
                        "idle_heartbeat": int(_PULL_HEARTBEAT * 1e9),
                    }
                ).encode(),
                reply=inbox,
            )
            while True:
                async with asyncio.timeout(_PULL_HEARTBEAT * 2.5):
                    message = await arrived.get()
                if not _is_status(message):
                    taken = True
                    return Lease(message)
                if message.headers and message.headers.get("Status") != _HEARTBEAT_STATUS:
                    # Expired, or the consumer is not there yet: a moment, then a new pull.
                    await asyncio.sleep(0 if _has_expired(message) else 0.1)
                    return None
        except TimeoutError:
            return None
        finally:
            if taken:
                await subscription.unsubscribe()
            else:
                await _withdraw(subscription, arrived)


def _is_status(message: Msg) -> bool:
    return not message.data and bool(message.headers) and "Status" in (message.headers or {})


def _has_expired(message: Msg) -> bool:
    return (message.headers or {}).get("Status") == "408"


async def _withdraw(subscription: "Subscription", arrived: asyncio.Queue[Msg]) -> None:
    """Close a pull; what was already on its way to this replica is given back."""
    with contextlib.suppress(nats.errors.Error, asyncio.CancelledError):
        await subscription.drain()  # type: ignore[no-untyped-call] # nats-py
    while not arrived.empty():
        message = arrived.get_nowait()
        if not _is_status(message):
            log.info("gave back a job that arrived too late")
            with contextlib.suppress(nats.errors.Error):
                await message.nak()
