"""One attempt at a job: from the lease to the one terminal event."""

import asyncio
import contextlib
import importlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import nats.errors

from claude_jobs.agent.command import AgentUser, bundled_claude
from claude_jobs.agent.credentials import CredentialsError, parse_credentials
from claude_jobs.bus.events import EventLog, EventWriter, FencedError
from claude_jobs.bus.queue import Lease, UnreadableJobError
from claude_jobs.bus.records import JobRecords
from claude_jobs.contract.base import now
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Failed,
    FailureCode,
    Message,
    Queued,
    TerminalEvent,
)
from claude_jobs.contract.job import TERMINAL_STATUSES, Job, JobRecord, JobStatus
from claude_jobs.settings import ReplicaSettings
from claude_jobs.workspace import WorkspaceError, prepare

log = logging.getLogger(__name__)

# A lease is renewed this many times before it would end.
RENEWALS_PER_LEASE = 4
# A job that cannot be read is offered this often, with so many seconds in between: during an
# update of the pool a replica of the other version may take it.
_UNREADABLE_TRIES = 30
_UNREADABLE_DELAY = 2.0
# A line that the broker cannot take is replaced by a note of its size (bytes of JSON).
MAX_LINE_BYTES = 7 * 2**20


@dataclass(frozen=True)
class Attempt:
    """What an attempt works with."""

    settings: ReplicaSettings
    events: EventLog
    records: JobRecords
    lease: Lease

    async def run(self) -> bool:
        """Bring the leased job to its end and take it off the queue.

        Returns whether an agent was started: then this replica is used up. Returns False when
        there was nothing to run: the job had ended already, or had been started by a replica
        that is gone, which ends it here.
        """
        try:
            job = self.lease.job
        except UnreadableJobError:
            await self._pass_on()
            return False
        writer = await self.events.writer(job.id)
        if isinstance(writer.last, Completed | Failed):
            log.info("the job had already ended", extra={"job": job.id})
            record = await self.records.get(job.id) or JobRecord.queued(job)
            if record.status not in TERMINAL_STATUSES:
                # The replica that ended it was lost before it could sum it up.
                await self.records.put(record.ended(writer.last))
            await self.lease.finish()
            return False
        if not isinstance(writer.last, Queued | None):
            # An agent ran and its work is not known: running it again could do things twice.
            await self._end(
                writer,
                await self.records.get(job.id) or JobRecord.queued(job),
                Failed(
                    code=FailureCode.WORKER_LOST,
                    error="the replica that ran this job was lost; its agent's work until then "
                    "is in the workspace and in these events",
                ),
            )
            return False
        async with _renewed(self.lease, self.settings.lease_seconds / RENEWALS_PER_LEASE):
            await self._run_agent(job, writer)
        return True

    async def _pass_on(self) -> None:
        """Leave a job that this version cannot read to another one; end it when none can.

        Seen from a replica, a gateway that is newer than itself writes such jobs.
        """
        job_id = self.lease.job_id
        log.error("this version cannot read a job", extra={"job": job_id})
        if self.lease.attempt < _UNREADABLE_TRIES:
            await self.lease.give_back(delay=_UNREADABLE_DELAY)
            return
        writer = await self.events.writer(job_id)
        if not isinstance(writer.last, Completed | Failed):
            ending = Failed(
                code=FailureCode.INTERNAL,
                error="no replica could read this job: gateway and replicas are of other versions",
            )
            await writer.append(ending)
            if record := await self.records.get(job_id):
                await self.records.put(record.ended(ending))
        await self.lease.finish()

    async def _run_agent(self, job: Job, writer: EventWriter) -> None:
        session_id = str(uuid.uuid4())
        # Must be in the log before the agent is: from here on the job may have had effects.
        await writer.append(
            Connected(
                job_id=job.id,
                session_id=session_id,
                replica=self.settings.replica_name,
                node=self.settings.node_name,
                attempt=self.lease.attempt,
            )
        )
        record = JobRecord.queued(job).model_copy(
            update={
                "status": JobStatus.RUNNING,
                "attempt": self.lease.attempt,
                "session_id": session_id,
                "replica": self.settings.replica_name,
                "node": self.settings.node_name,
                "started_at": now(),
            }
        )
        await self.records.put(record)
        log.info("the agent starts", extra={"job": job.id, "attempt": self.lease.attempt})

        async def publish(line: dict[str, Any]) -> None:
            await writer.append(_message(line))

        try:
            ending = await self._agent(job, session_id, publish)
        except FencedError:
            log.error(
                "the job went to another replica: its agent was stopped", extra={"job": job.id}
            )
            return
        except Exception:
            log.exception("the attempt failed", extra={"job": job.id})
            ending = Failed(
                code=FailureCode.INTERNAL,
                error="the replica could not run this job; its log says why",
                session_id=session_id,
            )
        with contextlib.suppress(FencedError):
            await self._end(writer, record, ending)

    async def _agent(
        self, job: Job, session_id: str, publish: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> TerminalEvent:
        settings = self.settings
        try:
            credentials = parse_credentials(_credentials_text(settings))
            directory = await asyncio.to_thread(
                prepare, settings.workspace_dir, job.request.workspace
            )
        except CredentialsError as error:
            return Failed(code=FailureCode.CREDENTIALS, error=str(error))
        except (WorkspaceError, OSError) as error:
            return Failed(code=FailureCode.AGENT_ERROR, error=f"the workspace is unusable: {error}")
        # Only now: the Agent SDK takes 40 MB, which an idle replica does not need. In a thread,
        # as it also takes half a second in which the lease and the health check go on.
        await asyncio.to_thread(importlib.import_module, "claude_jobs.agent.run")
        from claude_jobs.agent.run import AgentSetup, run_agent  # noqa: PLC0415 - see above

        return await run_agent(
            AgentSetup(
                claude=settings.claude_path or bundled_claude(),
                home=settings.agent_home,
                user=_agent_user(settings),
                base_url=settings.anthropic_base_url,
                max_retries=settings.claude_max_retries,
                idle_timeout=settings.idle_timeout_seconds,
                result_grace=settings.result_grace_seconds,
            ),
            credentials,
            job.request,
            session_id=session_id,
            directory=directory,
            time_limit=min(
                job.request.timeout_seconds or settings.job_timeout_seconds,
                settings.job_timeout_seconds,
            ),
            on_frame=publish,
        )

    async def _end(self, writer: EventWriter, record: JobRecord, ending: TerminalEvent) -> None:
        """Write the terminal event, then sum it up, then take the job off the queue.

        Whoever finds the job again after a crash in between sees the terminal event.
        """
        await writer.append(ending)
        await self.records.put(record.ended(ending))
        await self.lease.finish()
        log.info(
            "the job has ended",
            extra={"job": record.id, "code": getattr(ending, "code", JobStatus.COMPLETED)},
        )


def _message(line: dict[str, Any]) -> Message:
    message = Message(content=line, timestamp=now())
    size = len(message.to_json())
    if size <= MAX_LINE_BYTES:
        return message
    note = {"type": line.get("type"), "omitted": True, "bytes": size}
    return Message(content=note, timestamp=now())


def _credentials_text(settings: ReplicaSettings) -> str:
    secret = settings.claude_code_credentials_json or settings.claude_credentials
    if secret is None:
        raise CredentialsError(
            "there are no Claude credentials: deploy with CLAUDE_CODE_CREDENTIALS_JSON set"
        )
    return secret.get_secret_value()


def _agent_user(settings: ReplicaSettings) -> AgentUser | None:
    if settings.agent_uid is None or settings.agent_gid is None:
        return None
    return AgentUser(settings.agent_uid, settings.agent_gid)


@asynccontextmanager
async def _renewed(lease: Lease, every: float) -> AsyncIterator[None]:
    """Keep a lease for as long as the block runs."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(every)
            # While the broker is away the client holds this back and sends it on its return.
            with contextlib.suppress(nats.errors.Error):
                await lease.extend()

    renewal = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewal.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewal
