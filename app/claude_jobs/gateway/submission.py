"""Takes a job in: from the body of a request to a place in the queue."""

import asyncio
import contextlib
import logging

import nats.errors
import nats.js.errors
from aiohttp import web
from pydantic import ValidationError

from claude_jobs.bus.queue import QueueFullError
from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.contract.event import Queued
from claude_jobs.contract.job import Job, JobRecord, JobRequest
from claude_jobs.gateway.errors import sentence_for
from claude_jobs.gateway.state import Backend
from claude_jobs.settings import GatewaySettings
from claude_jobs.workspace import WorkspaceError, resolve

log = logging.getLogger(__name__)

# Seconds after which a client may try again when the queue is full.
_QUEUE_RETRY_AFTER = 10


async def read_job_request(request: web.Request, settings: GatewaySettings) -> JobRequest:
    """Read and check the body; raises `RequestRefusedError` with the field that is wrong."""
    try:
        asked = JobRequest.model_validate_json(
            await _body(request, settings.max_request_bytes), by_alias=True, by_name=False
        )
    except ValidationError as error:
        raise RequestRefusedError(ErrorCode.INVALID_REQUEST, sentence_for(error)) from None
    limit = settings.job_timeout_seconds
    if asked.timeout_seconds is not None and asked.timeout_seconds > limit:
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST, f"timeoutSeconds: must not exceed this server's {limit}"
        )
    try:
        await asyncio.to_thread(resolve, settings.workspace_dir, asked.workspace)
    except WorkspaceError as error:
        raise RequestRefusedError(ErrorCode.INVALID_REQUEST, f"workspace: {error}") from None
    return asked


async def submit(job: Job, backend: Backend) -> int:
    """Accept a job and return the sequence number of its `queued` event.

    The place in the queue comes last: it is what makes the job accepted. A crash before it
    leaves a log and a record that nobody was promised. Raises `RequestRefusedError` (429).
    """
    position = await backend.queue.depth() + 1
    first, _ = await asyncio.gather(
        backend.events.begin(job.id).append(Queued(job_id=job.id, position=position)),
        backend.records.put(JobRecord.queued(job)),
    )
    try:
        await backend.queue.submit(job)
    except QueueFullError:
        with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
            await backend.events.forget(job.id)
            await backend.records.forget(job.id)
        raise RequestRefusedError(
            ErrorCode.QUEUE_FULL,
            "the queue is full: try again later",
            retry_after=_QUEUE_RETRY_AFTER,
        ) from None
    log.info("accepted a job", extra={"job": job.id, "client": job.client, "position": position})
    return first


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
