"""The API for programs: `Client` and the jobs that it hands out."""

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from claude_jobs.client.access import api_token, api_url
from claude_jobs.client.connection import Connection, timeouts
from claude_jobs.client.errors import ApiError, ClientError, JobFailedError
from claude_jobs.client.event_stream import read_events
from claude_jobs.client.files import Files
from claude_jobs.client.job_event import JobEvent, JobResult
from claude_jobs.client.patience import Notify
from claude_jobs.contract.base import Document
from claude_jobs.contract.event import FailureCode
from claude_jobs.contract.job import TERMINAL_STATUSES, JobRecord, JobStatus, PermissionMode
from claude_jobs.contract.session import Session
from claude_jobs.contract.status import PoolStatus

_PAGE = 100

_Document = TypeVar("_Document", bound=Document)


class Client:
    """The API of one pool.

        async with Client() as client:
            job = await client.submit("Create a file called test.txt")
            async for event in job.events():
                print(event.type, event.text)

    `url` defaults to the variable `CLAUDE_JOBS_URL`, then http://127.0.0.1:3000; the token to
    `token_file`, then `CLAUDE_JOBS_TOKEN`, `CLAUDE_JOBS_TOKEN_FILE` and
    `~/.config/claude-jobs/token`. Whatever fails for a time (a lost connection, 429, 503) is
    tried again; `give_up_after` is the longest that one such outage may last, in seconds.
    `notify` is told before each wait. Raises `ClientError` when it is set up wrongly.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        token_file: Path | None = None,
        give_up_after: float = 120,
        notify: Notify | None = None,
    ) -> None:
        found = api_token(token, token_file)
        http = httpx.AsyncClient(
            base_url=api_url(url),
            headers={"Authorization": f"Bearer {found}"} if found else {},
            timeout=timeouts(),
            # Each stream of events holds a connection: they must not stand in others' way.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=10),
        )
        self._connection = Connection(http, give_up_after=give_up_after, notify=notify)
        self.files = Files(self._connection)

    @property
    def url(self) -> str:
        """The API's address."""
        return str(self._connection.http.base_url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._connection.http.aclose()

    async def submit(
        self,
        prompt: str,
        *,
        workspace: str | None = None,
        resume_session_id: str | uuid.UUID | None = None,
        model: str | None = None,
        max_turns: int | None = None,
        timeout_seconds: int | None = None,
        permission_mode: PermissionMode | str | None = None,
        dangerously_skip_permissions: bool | None = None,
        allowed_tools: list[str] | None = None,
        disallowed_tools: list[str] | None = None,
        append_system_prompt: str | None = None,
        metadata: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
        give_up_after: float | None = None,
    ) -> "Job":
        """Hand in a job and return as soon as it is accepted.

        The request carries a key of its own (or `idempotency_key`), so that it makes one job
        however often it has to be sent. While the queue is full it is tried again for up to
        `give_up_after` seconds (0: refused at once). Raises `ApiError`, `UnreachableError`.
        """
        fields = {
            "prompt": prompt,
            "workspace": workspace,
            "resume_session_id": resume_session_id and str(resume_session_id),
            "model": model,
            "max_turns": max_turns,
            "timeout_seconds": timeout_seconds,
            "permission_mode": permission_mode,
            "dangerously_skip_permissions": dangerously_skip_permissions,
            "allowed_tools": allowed_tools,
            "disallowed_tools": disallowed_tools,
            "append_system_prompt": append_system_prompt,
            "metadata": metadata,
        }
        body = {to_camel(name): value for name, value in fields.items() if value is not None}
        response = await self._connection.send(
            "POST",
            "/api/execute",
            content=json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                "Prefer": "respond-async",
                "Idempotency-Key": idempotency_key or str(uuid.uuid4()),
            },
            give_up_after=give_up_after,
        )
        return Job(self, _read(JobRecord, response))

    def events(
        self, job_id: str, after: int = 0, *, give_up_after: float | None = None
    ) -> AsyncGenerator[JobEvent]:
        """Iterate over a job's events with an id above `after`, to its end.

        Comes back by itself when the connection breaks, without an event missing or twice. Leave
        early with `contextlib.aclosing`, or just stop: the job goes on either way.
        """
        return read_events(self._connection, job_id, after=after, give_up_after=give_up_after)

    async def result(self, job_id: str) -> JobResult:
        """Wait for a job's end; raises `JobFailedError` when it did not end well."""
        async with aclosing(self.events(job_id)) as events:
            async for event in events:
                if event.type == "completed":
                    return _validated(JobResult, event.data)
                if event.is_terminal:
                    raise _failure(job_id, event.data)
        record = await self.job(job_id)  # its events are no longer kept
        if record.status not in TERMINAL_STATUSES:
            raise ClientError(f"the events of job {job_id} ended before the job")
        if record.status is not JobStatus.COMPLETED:
            raise _failure(job_id, record.model_dump())
        return JobResult(
            result=record.result or "",
            session_id=record.session_id,
            usage=record.usage or {},
            cost_usd=record.cost_usd,
        )

    async def job(self, job_id: str) -> JobRecord:
        """Return what is known about a job."""
        return _read(JobRecord, await self._connection.send("GET", _path("jobs", job_id)))

    def jobs(
        self, *, status: JobStatus | str | None = None, limit: int | None = None
    ) -> AsyncGenerator[JobRecord]:
        """Iterate over the jobs, the newest first: all, or at most `limit`."""
        query = {} if status is None else {"status": str(status)}
        return self._pages("/api/jobs", "jobs", JobRecord, query, limit)

    async def cancel(self, job_id: str) -> JobRecord:
        """Ask that a job be ended. It may still end well; its last event says how it ended.

        Raises `ApiError` (409) when it has already ended.
        """
        try:
            response = await self._connection.send("POST", _path("jobs", job_id) + "/cancel")
        except ApiError as refused:
            if refused.status == httpx.codes.CONFLICT and refused.repeated:
                return await self.job(job_id)  # the try whose answer was lost has done it
            raise
        return _read(JobRecord, response)

    def sessions(self, *, limit: int | None = None) -> AsyncGenerator[Session]:
        """Iterate over the sessions that a job can resume."""
        return self._pages("/api/sessions", "sessions", Session, {}, limit)

    async def session(self, session_id: str) -> Session:
        """Return what is known about a session."""
        return _read(Session, await self._connection.send("GET", _path("sessions", session_id)))

    async def delete_session(self, session_id: str) -> None:
        """Delete a session: no job can resume it any more."""
        try:
            await self._connection.send("DELETE", _path("sessions", session_id))
        except ApiError as refused:
            if not (refused.status == httpx.codes.NOT_FOUND and refused.repeated):
                raise

    async def status(self) -> PoolStatus:
        """Return the state of the pool: its replicas and its queue."""
        return _read(PoolStatus, await self._connection.send("GET", "/status"))

    async def _pages(
        self,
        path: str,
        name: str,
        kind: type[_Document],
        query: dict[str, str],
        limit: int | None,
    ) -> AsyncGenerator[_Document]:
        left = float("inf") if limit is None else limit
        cursor: str | None = None
        while left > 0:
            params: dict[str, str | int] = {**query, "limit": int(min(_PAGE, left))}
            if cursor is not None:
                params["cursor"] = cursor
            response = await self._connection.send("GET", path, params=params)
            page = _object(response)
            for each in page.get(name, []):
                if left > 0:
                    yield _validated(kind, each)
                    left -= 1
            cursor = page.get("nextCursor")
            if cursor is None:
                return


class Job:
    """A job that was accepted; `record` is what was known about it at that moment."""

    def __init__(self, client: Client, record: JobRecord) -> None:
        self._client = client
        self.record = record
        self.id = record.id

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def events(self, after: int = 0) -> AsyncGenerator[JobEvent]:
        """Iterate over its events; see `Client.events`."""
        return self._client.events(self.id, after)

    async def result(self) -> JobResult:
        """Wait for its end; see `Client.result`."""
        return await self._client.result(self.id)

    async def cancel(self) -> JobRecord:
        """Ask that it be ended; see `Client.cancel`."""
        return await self._client.cancel(self.id)

    async def refresh(self) -> JobRecord:
        """Look up what is known about it now; `record` becomes that."""
        self.record = await self._client.job(self.id)
        return self.record


def _failure(job_id: str, data: dict[str, Any]) -> JobFailedError:
    """Read an `error` event, or the record that is left of a job which did not end well."""
    return JobFailedError(
        job_id,
        str(data.get("code") or data.get("errorCode") or FailureCode.INTERNAL),
        str(data.get("error") or "no reason was given"),
        data.get("sessionId"),
    )


def _path(kind: str, name: str) -> str:
    return f"/api/{kind}/{quote(name, safe='')}"


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        said = response.json()
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise ClientError(f"{response.url} answered with something else than a JSON object")
    return said


def _read(kind: type[_Document], response: httpx.Response) -> _Document:
    return _validated(kind, _object(response))


def _validated(kind: type[_Document], data: dict[str, Any]) -> _Document:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the answer"
        raise ClientError(
            f"the API sent a {kind.__name__} that this client cannot read "
            f"({place}: {first['msg']}): is the client older than the server?"
        ) from None
