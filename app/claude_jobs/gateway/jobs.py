"""Jobs over HTTP: submit one, look at them, cancel one."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta

from aiohttp import web

from claude_jobs.bus.events import FencedError
from claude_jobs.bus.records import is_job_id
from claude_jobs.contract.base import Document
from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.contract.event import Completed, Failed, FailureCode, Queued
from claude_jobs.contract.job import TERMINAL_STATUSES, JobRecord, JobStatus
from claude_jobs.gateway.auth import CLIENT
from claude_jobs.gateway.event_stream import stream_events
from claude_jobs.gateway.paging import read_page
from claude_jobs.gateway.settlement import settled
from claude_jobs.gateway.state import STATE, Backend
from claude_jobs.gateway.submission import read_idempotency_key, read_job_request, submit

log = logging.getLogger(__name__)

# Records that one request for a page looks at: a page of a rare status may come out short.
_LOOKED_AT = 1000


class JobPage(Document):
    """A page of `GET /api/jobs`. While there is a `next_cursor`, more may follow."""

    jobs: list[JobRecord]
    next_cursor: str | None = None


async def execute(request: web.Request) -> web.StreamResponse:
    """Accept a job and stream it from `queued` to its terminal event, or answer with its record."""
    state = request.app[STATE]
    backend = state.ready_backend()
    workspace = state.shared_workspace()
    key = read_idempotency_key(request)
    asked = await read_job_request(request, state.settings, workspace)
    # A client that goes away at this moment leaves no half-made job behind.
    accepted = await asyncio.shield(
        submit(backend, state.settings, request[CLIENT], asked, key=key)
    )
    headers = {"X-Job-Id": accepted.job_id, "Location": f"/api/jobs/{accepted.job_id}"}
    if _prefers_no_stream(request):
        record = await _record(backend, accepted.job_id)
        return _document(record, status=202, headers=headers | _PREFERENCE_APPLIED)
    return await stream_events(
        request, backend, accepted.job_id, after=accepted.first - 1, headers=headers
    )


async def list_jobs(request: web.Request) -> web.Response:
    """Show the job records, the newest first."""
    state = request.app[STATE]
    backend = state.ready_backend()
    page = read_page(request, also={"status"})
    status = _read_status(request)
    if page.cursor is not None and not is_job_id(page.cursor):
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST, "cursor: must be the nextCursor of an earlier answer"
        )
    jobs: list[JobRecord] = []
    looked_at = 0
    async with aclosing(_ids(backend, status, page.cursor, state.settings.event_age)) as batches:
        async for batch in batches:
            for record in await backend.records.get_all(batch):
                if status not in (None, (shown := await settled(backend, record)).status):
                    continue
                if len(jobs) == page.limit:
                    return _document(JobPage(jobs=jobs, next_cursor=jobs[-1].id))
                jobs.append(shown)
            looked_at += len(batch)
            if looked_at >= _LOOKED_AT:
                return _document(JobPage(jobs=jobs, next_cursor=batch[-1]))
    return _document(JobPage(jobs=jobs))


async def show_job(request: web.Request) -> web.Response:
    """Show one job's record."""
    backend = request.app[STATE].ready_backend()
    return _document(await _record(backend, request.match_info["job_id"]))


async def cancel_job(request: web.Request) -> web.Response:
    """Ask that a job be ended: one that waits never starts, one that runs is interrupted."""
    backend = request.app[STATE].ready_backend()
    record = await _record(backend, request.match_info["job_id"])
    return _document(
        await asyncio.shield(cancel(backend, record, request[CLIENT].name)), status=202
    )


_PREFERENCE_APPLIED = {"Preference-Applied": "respond-async"}


async def cancel(backend: Backend, record: JobRecord, client: str) -> JobRecord:
    """Ask that a job be ended and return its record after that.

    Raises `RequestRefusedError` when it has ended otherwise, or had ended before.
    """
    if record.status in TERMINAL_STATUSES:
        raise _has_ended(record)
    # First of all: whichever replica has the job now or gets it later will see it.
    await backend.cancellations.ask(record.id, client)
    log.info("asked to cancel a job", extra={"job": record.id, "client": client})
    ending = Failed(code=FailureCode.CANCELLED, error="the job was cancelled before it started")
    while True:
        writer = await backend.events.writer(record.id)
        if isinstance(writer.last, Completed | Failed):
            ended = record.ended(writer.last)
            # The replica may have obeyed before the log was looked at.
            if ended.status is JobStatus.CANCELLED:
                return await _record(backend, record.id)
            raise _has_ended(ended)
        if not isinstance(writer.last, Queued | None):
            return await _record(backend, record.id)
        # The log decides between this and a replica that takes the job at the same moment.
        with contextlib.suppress(FencedError):
            await writer.append(ending)
            break
    record = record.ended(ending)
    await asyncio.gather(
        backend.records.put(record), backend.queue.withdraw(record.client, record.id)
    )
    return record


def _has_ended(record: JobRecord) -> RequestRefusedError:
    return RequestRefusedError(
        ErrorCode.CONFLICT, f"job {record.id} has already ended: it is {record.status}"
    )


async def _record(backend: Backend, job_id: str) -> JobRecord:
    record = await backend.records.get(job_id)
    if record is None:
        raise RequestRefusedError(
            ErrorCode.NOT_FOUND, f"there is no job {job_id}: it never was, or is no longer kept"
        )
    return await settled(backend, record)


async def _ids(
    backend: Backend, status: JobStatus | None, before: str | None, age: timedelta
) -> AsyncGenerator[list[str]]:
    """Yield the ids of jobs that may have a status, below `before`, the newest first."""
    if status is None or status in TERMINAL_STATUSES:
        async for batch in backend.records.ids(before=before, age=age):
            yield batch
        return
    # The queue knows them all: no record of a job that has ended need be looked at.
    unfinished = [each for each in await backend.queue.unfinished() if not before or each < before]
    yield sorted(unfinished, reverse=True)


def _read_status(request: web.Request) -> JobStatus | None:
    text = request.query.get("status")
    if text is None:
        return None
    try:
        return JobStatus(text)
    except ValueError:
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST, f"status: must be one of {', '.join(JobStatus)}"
        ) from None


def _prefers_no_stream(request: web.Request) -> bool:
    """Tell whether the client asked for an answer at once (RFC 7240)."""
    preferences = ",".join(request.headers.getall("Prefer", [])).split(",")
    return "respond-async" in {each.partition(";")[0].strip().lower() for each in preferences}


def _document(
    document: Document, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=document.to_json(),
        status=status,
        headers=headers,
        content_type="application/json",
    )
