"""Takes a job in: from the body of a request to a place in the queue."""

import asyncio
import contextlib
import hashlib
import logging
from dataclasses import dataclass

import nats.errors
import nats.js.errors
from aiohttp import web
from pydantic import ValidationError

from claude_jobs.bus.events import FencedError
from claude_jobs.bus.queue import QueueFullError
from claude_jobs.bus.sessions import SessionBusyError
from claude_jobs.bus.submissions import Submission
from claude_jobs.bus.topology import JOBS_BYTES
from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.contract.event import Queued
from claude_jobs.contract.job import Job, JobRecord, JobRequest, new_job_id
from claude_jobs.contract.session import Session
from claude_jobs.gateway.auth import Client
from claude_jobs.gateway.errors import sentence_for
from claude_jobs.gateway.positions import waiting_jobs
from claude_jobs.gateway.settlement import is_over
from claude_jobs.gateway.state import RETRY_AFTER, Backend
from claude_jobs.settings import GatewaySettings, WorkspaceMode
from claude_jobs.workspace import WorkspaceError, job_directory, resolve
from claude_jobs.workspace_threads import WorkspaceThreads

log = logging.getLogger(__name__)

# Seconds after which a client may try again when the queue is full.
_QUEUE_RETRY_AFTER = 10
_MAX_KEY_CHARACTERS = 255
_AWAY = (nats.errors.Error, nats.js.errors.Error, TimeoutError)


@dataclass(frozen=True)
class Accepted:
    """A job that is in the queue. `first` is the sequence number that its log begins with."""

    job_id: str
    first: int


async def read_job_request(
    request: web.Request, settings: GatewaySettings, workspace: WorkspaceThreads
) -> JobRequest:
    """Read and check the body; raises `RequestRefusedError` with the field that is wrong.

    Raises `WorkspaceStalledError` when nobody can tell whether the job's directory is right.
    """
    try:
        asked = JobRequest.model_validate_json(
            await _body(request, settings.max_request_bytes), by_alias=True, by_name=False
        )
    except ValidationError as error:
        raise RequestRefusedError(ErrorCode.INVALID_REQUEST, sentence_for(error)) from None
    for field, given, limit in (
        ("timeoutSeconds", asked.timeout_seconds, settings.job_timeout_seconds),
        ("maxTurns", asked.max_turns, settings.max_turns),
    ):
        if given is not None and given > limit:
            raise RequestRefusedError(
                ErrorCode.INVALID_REQUEST, f"{field}: must not exceed this server's {limit}"
            )
    try:
        await workspace.run(resolve, settings.workspace_dir, asked.workspace)
    except WorkspaceError as error:
        raise RequestRefusedError(ErrorCode.INVALID_REQUEST, f"workspace: {error}") from None
    except OSError as error:
        log.error("the workspace failed", extra={"cause": str(error) or repr(error)})
        raise RequestRefusedError(
            ErrorCode.UNAVAILABLE,
            "the workspace's disk or file server failed: try again shortly",
            retry_after=RETRY_AFTER,
        ) from None
    return asked


def read_idempotency_key(request: web.Request) -> str | None:
    """Return the header `Idempotency-Key`; raises `RequestRefusedError` when it cannot be one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= _MAX_KEY_CHARACTERS and key.isprintable()):
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST,
            f"Idempotency-Key: must be 1 to {_MAX_KEY_CHARACTERS} printable characters",
        )
    return key


async def submit(
    backend: Backend,
    settings: GatewaySettings,
    client: Client,
    asked: JobRequest,
    *,
    key: str | None = None,
) -> Accepted:
    """Accept a job. With a key that was used before, the job is the one that it was used for.

    Raises `RequestRefusedError`: 429 when the queue or the client's share of it is full, 409 when
    the key stands for another request or the session is in use.
    """
    job_id = new_job_id()
    if key is None:
        return await _accept(backend, settings, client, asked, job_id)
    submission = await backend.submissions.claim(
        client.name, key, Submission(job_id=job_id, request_digest=_digest(asked))
    )
    if submission.request_digest != _digest(asked):
        raise RequestRefusedError(
            ErrorCode.CONFLICT,
            "Idempotency-Key: this key was used for another request, "
            f"which became job {submission.job_id}",
        )
    repeated = submission.job_id != job_id
    if repeated and await _is_accepted(backend, client, submission.job_id):
        return Accepted(submission.job_id, 1)
    # New, or its first submission is still on its way, or was lost on it: every step of a
    # submission can be taken twice.
    try:
        return await _accept(backend, settings, client, asked, submission.job_id)
    except RequestRefusedError:
        if repeated and await _is_accepted(backend, client, submission.job_id):
            return Accepted(submission.job_id, 1)
        with contextlib.suppress(*_AWAY):
            await backend.submissions.forget(client.name, key)
        raise


async def _is_accepted(backend: Backend, client: Client, job_id: str) -> bool:
    """Tell whether a job has a place in the queue, or has had one."""
    if await backend.queue.holds(client.name, job_id):
        return True
    last = await backend.events.last(job_id)
    return last is not None and not isinstance(last.event, Queued)


async def _accept(
    backend: Backend, settings: GatewaySettings, client: Client, asked: JobRequest, job_id: str
) -> Accepted:
    """Take the steps of a submission; the place in the queue comes last.

    It is what makes the job accepted: a crash before it leaves a log and a record that nobody
    was promised.
    """
    if client.max_queued is None:
        return await _take_in(backend, settings, client, asked, job_id)
    async with backend.turns[client.name]:
        await _within_share(backend, client.name, client.max_queued)
        return await _take_in(backend, settings, client, asked, job_id)


async def _take_in(
    backend: Backend, settings: GatewaySettings, client: Client, asked: JobRequest, job_id: str
) -> Accepted:
    session = await _claim_session(backend, asked, job_id)
    job = Job.accept(
        asked,
        client=client.name,
        workspace=_workspace(settings.workspace_mode, job_id, asked, session),
        max_running=client.max_running,
        job_id=job_id,
    )
    position = await backend.queue.depth() + 1
    first, _ = await asyncio.gather(
        _begin_log(backend, job, position), backend.records.add(JobRecord.queued(job))
    )
    try:
        await backend.queue.submit(job)
    except QueueFullError:
        with contextlib.suppress(*_AWAY):
            if session is not None:
                await backend.sessions.unclaim(session, job.id)
            await backend.events.forget(job.id)
            await backend.records.forget(job.id)
        raise RequestRefusedError(
            ErrorCode.QUEUE_FULL,
            f"the queue is full, it takes {settings.queue_limit} jobs "
            f"and {JOBS_BYTES // 2**20} MiB of requests: try again later",
            retry_after=_QUEUE_RETRY_AFTER,
        ) from None
    log.info("accepted a job", extra={"job": job.id, "client": job.client, "position": position})
    return Accepted(job.id, first)


async def _within_share(backend: Backend, client: str, most: int) -> None:
    """Refuse a client whose token has as many waiting jobs as it may."""
    replicas = await backend.presence.list()
    if len(waiting_jobs(await backend.queue.unfinished(client), replicas)) >= most:
        raise RequestRefusedError(
            ErrorCode.QUEUE_FULL,
            f"{most} jobs of the token {client!r} wait, as many as may: try again later",
            retry_after=_QUEUE_RETRY_AFTER,
        )


async def _claim_session(backend: Backend, asked: JobRequest, job_id: str) -> Session | None:
    """Make this job the one that uses the session which it resumes; returns it as it was."""
    if asked.resume_session_id is None:
        return None
    session_id = str(asked.resume_session_id)

    async def over(holder: str) -> bool:
        return holder == job_id or await is_over(backend, holder)

    try:
        session = await backend.sessions.claim(session_id, job_id, over)
    except SessionBusyError as busy:
        raise RequestRefusedError(
            ErrorCode.CONFLICT,
            f"resumeSessionId: job {busy.job_id} uses this session: wait for its end, or cancel it",
        ) from None
    if session is None:
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST,
            f"resumeSessionId: there is no session {session_id} (any more)",
        )
    return session


def _workspace(mode: WorkspaceMode, job_id: str, asked: JobRequest, session: Session | None) -> str:
    """Return where the job works: a resumed session goes on where it began."""
    if session is not None and "workspace" not in asked.model_fields_set:
        return session.workspace
    return job_directory(mode, job_id, asked.workspace)


async def _begin_log(backend: Backend, job: Job, position: int) -> int:
    try:
        return await backend.events.begin(job.id).append(Queued(job_id=job.id, position=position))
    except FencedError:
        return 1  # begun by another try of the same submission: its log is read from the start


def _digest(asked: JobRequest) -> str:
    return hashlib.sha256(asked.to_json()).hexdigest()


async def _body(request: web.Request, limit: int) -> bytes:
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> RequestRefusedError:
    return RequestRefusedError(
        ErrorCode.TOO_LARGE, f"the body exceeds {limit} bytes: put large input into the workspace"
    )
