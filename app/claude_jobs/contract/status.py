"""The state of the pool: what a replica announces and what `GET /status` shows."""

from datetime import datetime
from enum import StrEnum

from claude_jobs.contract.base import Document


class ReplicaStatus(StrEnum):
    """Whether a replica would take a job now."""

    IDLE = "idle"
    BUSY = "busy"


class Replica(Document):
    """What a replica announces about itself; `replica` is its container's host name.

    `fault` says why it takes no job, though it has none.
    """

    replica: str
    node: str
    status: ReplicaStatus
    since: datetime
    job_id: str | None = None
    fault: str | None = None


class ReplicaCounts(Document):
    """The replicas that are alive, by state."""

    total: int
    idle: int
    busy: int
    list: list[Replica]


class QueueStatus(Document):
    """`depth` jobs wait; at most `limit` may be accepted and not yet ended."""

    depth: int
    limit: int


class PoolStatus(Document):
    """The answer of `GET /status`; `idle` while at least one replica is idle."""

    status: ReplicaStatus
    replicas: ReplicaCounts
    queue: QueueStatus
    timestamp: datetime
    demo: bool
    notice: str | None = None
