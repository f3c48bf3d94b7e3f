"""One attempt at a job: from the lease to the one terminal event."""

import asyncio
import contextlib
import importlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats.errors
from nats.js.errors import APIError

from claude_jobs.agent.command import AgentUser, bundled_claude, read_ahead
from claude_jobs.agent.credentials import CredentialsError, parse_credentials
from claude_jobs.agent.guard import Watchdog, WatchdogLostError
from claude_jobs.agent.outcome import AgentKilledError
from claude_jobs.agent.sdk import load_sdk
from claude_jobs.agent.session_files import NoSavedSessionError
from claude_jobs.bus.events import EventWriter, FencedError
from claude_jobs.bus.queue import Lease, UnreadableJobError
from claude_jobs.contract.base import now
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Failed,
    FailureCode,
    Queued,
    Recovering,
    TerminalEvent,
)
from claude_jobs.contract.job import TERMINAL_STATUSES, Job, JobRecord, JobStatus
from claude_jobs.contract.session import Session
from claude_jobs.replica.backend import Backend
from claude_jobs.replica.lines import Line, messages
from claude_jobs.replica.recovery import ReplicaLivesError, Start, hand_over, take_over
from claude_jobs.replica.tenure import Tenure
from claude_jobs.settings import ReplicaSettings
from claude_jobs.workspace import WorkspaceError, prepare
from claude_jobs.workspace_threads import WorkspaceThreads

if TYPE_CHECKING:
    from claude_jobs.agent.run import AgentSetup

log = logging.getLogger(__name__)

# A job that cannot be read is offered this often, with so many seconds in between: during an
# update of the pool a replica of the other version may take it.
_UNREADABLE_TRIES = 30
_UNREADABLE_DELAY = 2.0
# A job whose replica lives after all is offered again after so many seconds.
_HELD_DELAY = 5.0
# The pause before a broker that was away is asked again, in seconds.
_RETRY_EVERY = 0.25


class Attempt:
    """What a replica does with a job that it was handed."""

    def __init__(
        self, settings: ReplicaSettings, backend: Backend, watchdog: Watchdog, lease: Lease
    ) -> None:
        self._settings = settings
        self._backend = backend
        self._watchdog = watchdog
        self._lease = lease
        self._started: Start | None = None  # from when on the log may say that it begins

    async def run(self) -> bool:
        """Bring the leased job to its end and take it off the queue.

        Returns whether an agent was started: then this replica is used up. Returns False when
        there was nothing to run: the job has ended, cannot be continued, or is another's.
        """
        try:
            job = self._lease.job
        except UnreadableJobError:
            await self._pass_on()
            return False
        writer = await self._backend.events.writer(job.id)
        tenure = self._tenure(writer)
        keeping = asyncio.create_task(tenure.keep())
        attempt = asyncio.create_task(self._attempt(job, writer, tenure))
        try:
            await asyncio.wait({keeping, attempt}, return_when=asyncio.FIRST_COMPLETED)
            if attempt.done():
                return await attempt
            # The agent is killed before anything else is done.
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)
            await self._give_up(job, writer, keeping.exception())
            return True
        finally:
            for task in (attempt, keeping):
                task.cancel()
            await asyncio.gather(attempt, keeping, return_exceptions=True)

    async def _attempt(self, job: Job, writer: EventWriter, tenure: Tenure) -> bool:
        if isinstance(writer.last, Completed | Failed):
            log.info("the job had already ended", extra={"job": job.id})
            await self._close(await self._record(job), writer.last)
            return False
        # Where many replicas start at once this takes longer than a lease: it is kept meanwhile.
        await _load_sdk()
        try:
            start = await self._start(job, writer)
            if isinstance(start, Failed):
                log.warning("the job cannot go on", extra={"job": job.id, "cause": start.error})
                await self._end(writer, await self._record(job), start)
                return False
            # Who reads of the session in the log finds it.
            if not start.resumes:
                session = _new_session(job, start.session_id)
                await _outlasting_the_broker(partial(self._backend.sessions.put, session))
            # Must be in the log before the agent is: from here on the job may have had effects.
            self._started = start
            await writer.append(
                Connected(
                    job_id=job.id,
                    session_id=start.session_id,
                    replica=self._settings.replica_name,
                    node=self._settings.node_name,
                    attempt=start.attempt,
                    resuming=start.resumes,
                    resumed_from=start.session_id if start.resumes else None,
                )
            )
        except ReplicaLivesError:
            log.info("the job's replica lives: giving it back", extra={"job": job.id})
            await self._lease.give_back(delay=_HELD_DELAY)
            return False
        except FencedError:
            # It was cancelled in this moment, or its replica came back: whoever gets it next sees.
            log.info("the job is not ours: giving it back", extra={"job": job.id})
            if self._started and not self._started.resumes:
                forget = partial(self._backend.sessions.remove, self._started.session_id)
                await _outlasting_the_broker(forget)
            await self._lease.give_back()
            return False
        await tenure.holds()
        await self._run_agent(job, writer, start)
        return True

    async def _start(self, job: Job, writer: EventWriter) -> Start | Failed:
        if not isinstance(writer.last, Queued | None):
            return await take_over(
                self._backend, job, writer, max_attempts=self._settings.max_attempts
            )
        resumed = job.request.resume_session_id
        return Start(
            attempt=1,
            session_id=str(resumed or uuid.uuid4()),
            prompt=job.request.prompt,
            resumes=resumed is not None,
        )

    async def _run_agent(self, job: Job, writer: EventWriter, start: Start) -> None:
        started_at = now()
        record = JobRecord.queued(job).model_copy(
            update={
                "status": JobStatus.RUNNING,
                "attempt": start.attempt,
                "session_id": start.session_id,
                "replica": self._settings.replica_name,
                "node": self._settings.node_name,
                "started_at": started_at,
            }
        )
        await _outlasting_the_broker(partial(self._backend.records.put, record))
        log.info("the agent starts", extra={"job": job.id, "attempt": start.attempt})
        try:
            ending = await self._agent(job, writer, start)
        except FencedError:
            log.error(
                "the job went to another replica: its agent was stopped", extra={"job": job.id}
            )
            return
        except AgentKilledError:
            await self._leave(job, writer, record, start, "the agent was killed")
            return
        except Exception:
            log.exception("the attempt failed", extra={"job": job.id})
            ending = Failed(
                code=FailureCode.INTERNAL,
                error="the replica could not run this job; its log says why",
                session_id=start.session_id,
            )
        with contextlib.suppress(FencedError):
            await self._end(writer, record, ending)

    async def _agent(self, job: Job, writer: EventWriter, start: Start) -> TerminalEvent:
        settings = self._settings
        try:
            credentials = parse_credentials(_credentials_text(settings))
        except CredentialsError as error:
            return Failed(code=FailureCode.CREDENTIALS, error=str(error))
        from claude_jobs.agent.run import run_agent  # noqa: PLC0415 - see _load_sdk

        async def publish(line: Line) -> None:
            for message in messages(line):
                await writer.append(message)

        cancelled = asyncio.Event()
        cancellation = asyncio.create_task(self._set_when_cancelled(job.id, cancelled))
        try:
            directory = await self._directory(job, cancelled)
            if directory is None:
                return Failed(
                    code=FailureCode.CANCELLED,
                    error="the job was cancelled",
                    session_id=start.session_id,
                )
            return await run_agent(
                _setup(settings),
                credentials,
                job.request,
                session_id=start.session_id,
                prompt=start.prompt,
                resume=start.resumes,
                sessions=self._backend.session_log,
                directory=directory,
                time_limit=min(
                    job.request.timeout_seconds or settings.job_timeout_seconds,
                    settings.job_timeout_seconds,
                ),
                on_frame=publish,
                cancelled=cancelled,
            )
        except WorkspaceError as error:
            return Failed(code=FailureCode.AGENT_ERROR, error=f"the workspace is unusable: {error}")
        except NoSavedSessionError:
            return Failed(
                code=FailureCode.AGENT_ERROR,
                error=f"nothing was saved of session {start.session_id}: it cannot be resumed",
                session_id=start.session_id,
            )
        finally:
            cancellation.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cancellation

    async def _directory(self, job: Job, cancelled: asyncio.Event) -> Path | None:
        """Make the job's directory, however long the file server takes; None when cancelled.

        The lease is kept meanwhile. The thread ends with this process at the latest.
        """
        threads = WorkspaceThreads(self._settings.workspace_dir, count=1)
        making = asyncio.wrap_future(
            threads.submit(prepare, self._settings.workspace_dir, job.workspace)
        )
        waiting = asyncio.create_task(cancelled.wait())
        try:
            either: set[asyncio.Future[Any]] = {making, waiting}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                return None
        finally:
            waiting.cancel()
            making.cancel()
        try:
            return making.result()
        except OSError as error:
            raise WorkspaceError(str(error)) from error

    async def _give_up(self, job: Job, writer: EventWriter, cause: BaseException | None) -> None:
        """Do what is left to do for a job that this replica holds no longer."""
        log.error("the job is given up, its agent was killed", extra={"cause": repr(cause)})
        if isinstance(cause, WatchdogLostError) and self._started:
            record = await self._record(job)
            await self._leave(job, writer, record, self._started, "the watchdog was killed")

    async def _leave(
        self, job: Job, writer: EventWriter, record: JobRecord, start: Start, reason: str
    ) -> None:
        """Leave a job whose agent has gone to the next replica, or bring it to its end."""
        with contextlib.suppress(FencedError):
            ending = await hand_over(
                self._backend,
                job,
                writer,
                start,
                max_attempts=self._settings.max_attempts,
                reason=f"{reason} on replica {self._settings.replica_name}",
            )
            if ending is not None:
                await self._end(writer, record, ending)
            else:
                await self._lease.give_back()

    async def _set_when_cancelled(self, job_id: str, cancelled: asyncio.Event) -> None:
        await self._backend.cancellations.wait(job_id)
        log.info("the job is cancelled", extra={"job": job_id})
        cancelled.set()

    async def _end(self, writer: EventWriter, record: JobRecord, ending: TerminalEvent) -> None:
        """Write the terminal event, then sum it up, then take the job off the queue.

        Whoever finds the job again after a crash in between sees the terminal event.
        """
        await writer.append(ending)
        await self._close(record, ending)
        log.info(
            "the job has ended",
            extra={"job": record.id, "code": getattr(ending, "code", JobStatus.COMPLETED)},
        )

    async def _close(self, record: JobRecord, ending: TerminalEvent) -> None:
        if record.status not in TERMINAL_STATUSES:
            await self._backend.records.put(record.ended(ending))
        await self._lease.finish()

    async def _record(self, job: Job) -> JobRecord:
        return await self._backend.records.get(job.id) or JobRecord.queued(job)

    def _tenure(self, writer: EventWriter) -> Tenure:
        async def regain() -> None:
            """Let the log decide whose the job is: only one of two claims can follow on its end."""
            if self._started is None or isinstance(writer.last, Completed | Failed):
                return  # no agent of this replica can run: what it writes next decides
            reason = "the replica had lost the broker and held its agent meanwhile"
            await writer.append(Recovering(attempt=self._started.attempt, reason=reason))

        return Tenure(self._lease, self._settings.lease_seconds, self._watchdog, regain)

    async def _pass_on(self) -> None:
        """Leave a job that this version cannot read to another one; end it when none can.

        Seen from a replica, a gateway that is newer than itself writes such jobs.
        """
        job_id = self._lease.job_id
        log.error("this version cannot read a job", extra={"job": job_id})
        if self._lease.attempt < _UNREADABLE_TRIES:
            await self._lease.give_back(delay=_UNREADABLE_DELAY)
            return
        writer = await self._backend.events.writer(job_id)
        if not isinstance(writer.last, Completed | Failed):
            ending = Failed(
                code=FailureCode.INTERNAL,
                error="no replica could read this job: gateway and replicas are of other versions",
            )
            await writer.append(ending)
            if record := await self._backend.records.get(job_id):
                await self._backend.records.put(record.ended(ending))
        await self._lease.finish()


async def prepare_agent(settings: ReplicaSettings) -> None:
    """Do what can be done for an agent's start before its job is known."""
    with contextlib.suppress(OSError):  # a job says what is wrong with it, and to whom it matters
        await asyncio.to_thread(read_ahead, _claude(settings))
    await _load_sdk()


async def _load_sdk() -> None:
    """Load the Agent SDK in a thread: the lease and `/health` go on."""
    await asyncio.to_thread(load_sdk)
    await asyncio.to_thread(importlib.import_module, "claude_jobs.agent.run")


async def _outlasting_the_broker(put: Callable[[], Awaitable[None]]) -> None:
    """Do what a job must not be given up for, only because the broker is away at that moment."""
    while True:
        try:
            return await put()
        except (nats.errors.Error, TimeoutError) as error:
            if isinstance(error, APIError) and error.code is not None and error.code < 500:
                raise
            log.warning("trying again", extra={"cause": str(error) or repr(error)})
        await asyncio.sleep(_RETRY_EVERY)


def _new_session(job: Job, session_id: str) -> Session:
    begun = now()
    return Session(
        id=session_id,
        last_job_id=job.id,
        client=job.client,
        workspace=job.workspace,
        created_at=begun,
        updated_at=begun,
    )


def _setup(settings: ReplicaSettings) -> "AgentSetup":
    from claude_jobs.agent.run import AgentSetup  # noqa: PLC0415 - see _load_sdk

    return AgentSetup(
        claude=_claude(settings),
        home=settings.agent_home,
        user=_agent_user(settings),
        base_url=settings.anthropic_base_url,
        max_retries=settings.claude_max_retries,
        max_turns=settings.max_turns,
        trust_workspace_settings=settings.trust_workspace_settings,
        idle_timeout=settings.idle_timeout_seconds,
        result_grace=settings.result_grace_seconds,
    )


def _claude(settings: ReplicaSettings) -> Path:
    return settings.claude_path or bundled_claude()


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
