"""The state of the pool: `GET /status`."""

from claude_jobs.contract.base import now
from claude_jobs.contract.status import PoolStatus, QueueStatus, ReplicaCounts, ReplicaStatus
from claude_jobs.gateway.positions import waiting_jobs
from claude_jobs.gateway.state import Backend
from claude_jobs.settings import GatewaySettings

DEMO_NOTICE = (
    "DEMO MODE: no Claude credentials were deployed, so a stub answers in place of the model. "
    "Deploy again with CLAUDE_CODE_CREDENTIALS_JSON set to do real work."
)


async def pool_status(backend: Backend, settings: GatewaySettings) -> PoolStatus:
    """Collect what the replicas announce and what waits."""
    replicas = await backend.presence.list()
    waiting = waiting_jobs(await backend.queue.unfinished(), replicas)
    idle = sum(replica.status is ReplicaStatus.IDLE for replica in replicas)
    return PoolStatus(
        status=ReplicaStatus.IDLE if idle else ReplicaStatus.BUSY,
        replicas=ReplicaCounts(
            total=len(replicas), idle=idle, busy=len(replicas) - idle, list=replicas
        ),
        queue=QueueStatus(depth=len(waiting), limit=settings.queue_limit),
        timestamp=now(),
        demo=settings.demo_mode,
        notice=DEMO_NOTICE if settings.demo_mode else None,
    )
