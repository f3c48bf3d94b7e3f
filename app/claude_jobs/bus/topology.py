"""The broker's streams and buckets: their names, their bounds, and how they come to be.

The gateway creates them when it starts; a replica only uses them.
"""

import logging
from dataclasses import dataclass
from datetime import timedelta

from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import NotFoundError

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.servers import ensure_all_joined

log = logging.getLogger(__name__)

JOBS_STREAM = "JOBS"
JOBS_SUBJECTS = "jobs.*.*"
JOBS_CONSUMER = "replicas"
EVENTS_STREAM = "EVENTS"
EVENTS_SUBJECTS = "events.*"
SESSIONS_STREAM = "SESSIONS"
SESSIONS_SUBJECTS = "sessions.*.*.*"
RECORDS_BUCKET = "job_records"
SESSION_RECORDS_BUCKET = "session_records"
CANCELLATIONS_BUCKET = "cancellations"
SUBMISSIONS_BUCKET = "submissions"
PRESENCE_BUCKET = "replicas"

GIB = 2**30
# What the waiting jobs may take on disk, whatever `queue_limit` is.
JOBS_BYTES = GIB


@dataclass(frozen=True)
class Bounds:
    """How much the broker keeps, and for how long.

    `queue_limit` counts the jobs that are accepted and not yet ended. A replica that has not
    been heard of for `lease` has lost its job; one that was not heard of for `presence` is gone.
    `submission_age` is how long an `Idempotency-Key` is remembered. Each of the broker's servers
    holds one of the `copies`.
    """

    queue_limit: int = 1000
    lease: timedelta = timedelta(seconds=20)
    presence: timedelta = timedelta(seconds=10)
    event_age: timedelta = timedelta(days=7)
    event_bytes: int = 4 * GIB
    session_age: timedelta = timedelta(days=30)
    session_bytes: int = 2 * GIB
    submission_age: timedelta = timedelta(days=1)
    copies: int = 1


def job_subject(client: str, job_id: str) -> str:
    """Return the subject that carries a job: by it the queue can be asked for one client's."""
    return f"jobs.{client}.{job_id}"


def events_subject(job_id: str) -> str:
    """Return the subject that carries the events of one job."""
    return f"events.{job_id}"


async def ensure_topology(bus: Bus, bounds: Bounds) -> None:
    """Create what is missing and bring what exists in line with `bounds`.

    Raises `ServersMissingError` where something is missing and not all of several servers have
    joined: one of them may yet bring it. What exists is used with those that are there.
    """
    await _ensure_stream(
        bus,
        StreamConfig(
            name=JOBS_STREAM,
            subjects=[JOBS_SUBJECTS],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            # A full queue refuses: nothing that was accepted is ever pushed out.
            discard=DiscardPolicy.NEW,
            max_msgs=bounds.queue_limit,
            max_bytes=JOBS_BYTES,
            duplicate_window=120,
            num_replicas=bounds.copies,
        ),
    )
    await bus.jetstream.add_consumer(
        JOBS_STREAM,
        ConsumerConfig(
            durable_name=JOBS_CONSUMER,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=bounds.lease.total_seconds(),
            max_deliver=-1,
            max_ack_pending=10_000,
            max_waiting=10_000,
        ),
    )
    await _ensure_stream(
        bus,
        StreamConfig(
            name=EVENTS_STREAM,
            subjects=[EVENTS_SUBJECTS],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_age=bounds.event_age.total_seconds(),
            max_bytes=bounds.event_bytes,
            duplicate_window=120,
            num_replicas=bounds.copies,
        ),
    )
    await _ensure_stream(
        bus,
        StreamConfig(
            name=SESSIONS_STREAM,
            subjects=[SESSIONS_SUBJECTS],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            # A session that lost its beginning is worth nothing: whole ones are removed instead.
            discard=DiscardPolicy.NEW,
            max_bytes=bounds.session_bytes,
            duplicate_window=120,
            num_replicas=bounds.copies,
        ),
    )
    for bucket, ttl in {
        RECORDS_BUCKET: bounds.event_age,
        SESSION_RECORDS_BUCKET: bounds.session_age,
        CANCELLATIONS_BUCKET: bounds.event_age,
        SUBMISSIONS_BUCKET: bounds.submission_age,
        PRESENCE_BUCKET: bounds.presence,
    }.items():
        await _ensure_bucket(
            bus,
            KeyValueConfig(
                bucket=bucket,
                history=1,
                ttl=ttl.total_seconds(),
                # None in memory: a broker that was restarted would not know it any more.
                storage=StorageType.FILE,
                replicas=bounds.copies,
            ),
        )


async def _ensure_stream(bus: Bus, config: StreamConfig) -> None:
    try:
        await bus.jetstream.update_stream(config)
    except NotFoundError:
        await _may_create(bus, config.num_replicas)
        await bus.jetstream.add_stream(config)
        log.info("created a stream", extra={"stream": config.name})


async def _ensure_bucket(bus: Bus, config: KeyValueConfig) -> None:
    try:
        stream = (await bus.jetstream.stream_info(f"KV_{config.bucket}")).config
    except NotFoundError:
        await _may_create(bus, config.replicas)
        await bus.jetstream.create_key_value(config)
        log.info("created a bucket", extra={"bucket": config.bucket})
        return
    if (stream.max_age, stream.num_replicas) != (config.ttl, config.replicas):
        stream.num_replicas = config.replicas
        if config.ttl is not None:
            stream.max_age = config.ttl
            # The server refuses one that is longer than the age.
            stream.duplicate_window = min(config.ttl, 120)
        await bus.jetstream.update_stream(stream)


async def _may_create(bus: Bus, copies: int | None) -> None:
    if copies is not None and copies > 1:
        await ensure_all_joined(bus, copies)
