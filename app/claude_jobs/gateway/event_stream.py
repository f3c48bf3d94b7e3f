"""Sends a job's events to one client as Server-Sent Events.

Nothing is kept for a client: what it has not taken, it reads from the log later. So a slow one
delays nobody and costs little, and any gateway can go on where another stopped.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta

from aiohttp import web
from aiohttp_sse import EventSourceResponse

from claude_jobs.bus.events import CaughtUp, LoggedEvent
from claude_jobs.bus.records import is_job_id
from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.contract.event import Completed, Failed, FailureCode, Gap, Queued, TerminalEvent
from claude_jobs.contract.job import TERMINAL_STATUSES, JobRecord, JobStatus
from claude_jobs.gateway.metrics import METRICS
from claude_jobs.gateway.positions import Positions
from claude_jobs.gateway.settlement import settled
from claude_jobs.gateway.state import STATE, Backend

log = logging.getLogger(__name__)

# A comment this often (seconds) keeps proxies and IPVS from dropping a quiet connection.
_PING_EVERY = 15
# What a browser waits before it comes back, in milliseconds.
_RETRY = 2000
# A client that takes nothing for so long (seconds) is cut; it may come back.
SEND_TIMEOUT = 30
# Events are written together, up to this many bytes: what is held for a client that does not
# read.
_WRITE_BYTES = 2**16
_LAST_EVENT_ID = "Last-Event-ID"
_AFTER = "after"
_QUEUED = "queued"


async def job_events(request: web.Request) -> web.StreamResponse:
    """Replay a job's events after the client's last one, then follow it to its end.

    204 when the client has seen the end. An id that the job has not reached yet is refused: it
    is of another job or another deployment, and what follows it may never come.
    """
    backend = request.app[STATE].ready_backend()
    field, after = _asked_after(request)
    job_id = request.match_info["job_id"]
    last = await backend.events.last(job_id) if is_job_id(job_id) else None
    if last is not None and last.is_terminal:
        if after >= last.sequence:
            return web.Response(status=204)
        return await stream_events(request, backend, job_id, after=after)
    record = await backend.records.get(job_id)
    if record is not None:
        # Whatever has become of the job, it comes to an end.
        record = await settled(backend, record)
    elif last is None:
        raise RequestRefusedError(
            ErrorCode.NOT_FOUND, f"there is no job {job_id}: it never was, or is no longer kept"
        )
    if last is None and record is not None and record.status in TERMINAL_STATUSES:
        first_kept, _ = await backend.events.span()
        if after and after >= first_kept - 1:
            # None of the job's events can come after it: it was the last.
            return web.Response(status=204)
    if last is not None and after > last.sequence:
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST,
            f"{field}: this job has no event {after} yet, the last one is {last.sequence}",
        )
    return await stream_events(request, backend, job_id, after=after)


async def stream_events(
    request: web.Request,
    backend: Backend,
    job_id: str,
    *,
    after: int = 0,
    headers: dict[str, str] | None = None,
) -> web.StreamResponse:
    """Send the events above `after`, then those to come, until the terminal one.

    While the job waits, its position is sent whenever it changes, in `queued` events without an
    id, which no log holds. A client that goes away cancels nothing: the job goes on and its
    events are kept.
    """
    client = _Client(request, headers)
    async with client.connected():
        await _send_events(client, backend, job_id, after)
    return client.response


class _Client:
    """The client at the other end of a stream; takes frames and sends them together."""

    def __init__(self, request: web.Request, headers: dict[str, str] | None) -> None:
        self.response = EventSourceResponse(
            headers=headers,
            sep="\n",
            ping_interval=_PING_EVERY,
            send_timeout=SEND_TIMEOUT,
            allow_all_methods=True,
        )
        self._request = request
        self._count = request.app[METRICS].event_sent
        self._frames = bytearray(f"retry: {_RETRY}\n\n".encode())

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Hold the stream open. Leaves the block when the client goes away or takes nothing."""
        streams = self._request.app[STATE].streams
        await self.response.prepare(self._request)
        streams.add(self.response)
        try:
            with contextlib.suppress(ConnectionResetError):
                async with self.response:
                    await self.flush()
                    yield
        except Exception:
            # Too late for another answer: the client finds no terminal event and comes back.
            log.exception("an event stream broke", extra={"path": self._request.path})
        finally:
            streams.discard(self.response)

    async def send(self, kind: str, data: bytes, *, sequence: int | None = None) -> None:
        """Send an event, soon; `flush` sends it at once."""
        if b"\n" in data or b"\r" in data:
            data = b"\ndata: ".join(data.splitlines())
        if sequence is not None:
            self._frames += b"id: %d\n" % sequence
        self._frames += b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
        self._count(kind)
        if len(self._frames) >= _WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Send what is there; raises `ConnectionResetError` when the client does not take it."""
        frames, self._frames = self._frames, bytearray()
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                await self.response.write(frames)
        except TimeoutError:
            log.info("cut a client that takes no events", extra={"path": self._request.path})
            if self._request.transport:
                self._request.transport.abort()
            raise ConnectionResetError from None


async def _send_events(client: _Client, backend: Backend, job_id: str, after: int) -> None:
    telling: asyncio.Task[None] | None = None
    async with aclosing(backend.events.read_batches(job_id, after=after)) as batches:
        try:
            async for batch in batches:
                if isinstance(batch, CaughtUp):
                    if batch.last is None:
                        if await _send_kept_end(client, backend, job_id, after):
                            return
                    elif batch.last.type == _QUEUED and telling is None:
                        telling = asyncio.create_task(
                            _tell_position(client, backend.positions, batch.last)
                        )
                    continue
                await _stop(telling)
                telling = None
                for logged in batch:
                    if logged.previous is not None and logged.previous > after:
                        await _send_gap(client, after + 1, logged.previous)
                    await client.send(logged.type, logged.data, sequence=logged.sequence)
                    after = logged.sequence
                await client.flush()
        finally:
            await _stop(telling)


async def _send_gap(client: _Client, first: int, last: int) -> None:
    """Say that the log has dropped events. A client that comes back then asks for later ones."""
    await client.send("gap", Gap(from_=first, to=last).to_json(), sequence=last)


async def _send_kept_end(client: _Client, backend: Backend, job_id: str, after: int) -> bool:
    """Send the end of a job whose log is no longer kept, from its record; False: it has none.

    The event has no id, as nobody knows it any more.
    """
    record = await backend.records.get(job_id)
    if record is None or record.status not in TERMINAL_STATUSES:
        return False
    _, newest = await backend.events.span()
    if newest > after:
        await _send_gap(client, after + 1, newest)
    ending = _ending(record)
    await client.send(ending.type, ending.to_json())
    await client.flush()
    return True


def _ending(record: JobRecord) -> TerminalEvent:
    """Return a job's terminal event, as far as its record tells it."""
    if record.status is not JobStatus.COMPLETED:
        code = FailureCode(record.error_code or FailureCode.INTERNAL)
        return Failed(code=code, error=record.error or "", session_id=record.session_id)
    took = timedelta()
    if record.started_at and record.ended_at:
        took = record.ended_at - record.started_at
    return Completed(
        result=record.result or "",
        session_id=record.session_id or "",
        usage=record.usage or {},
        cost_usd=record.cost_usd or 0,
        num_turns=0,
        duration_ms=took // timedelta(milliseconds=1),
        permission_denials=[],
    )


async def _tell_position(client: _Client, positions: Positions, logged: LoggedEvent) -> None:
    queued = Queued.model_validate_json(logged.data)
    async with aclosing(positions.advances(queued.job_id, queued.position)) as advances:
        async for position in advances:
            moved = queued.model_copy(update={"position": position})
            await client.send(moved.type, moved.to_json())
            await client.flush()


async def _stop(task: asyncio.Task[None] | None) -> None:
    if task:
        task.cancel()
        # A client that is gone is noticed by the next event, too.
        with contextlib.suppress(asyncio.CancelledError, ConnectionResetError):
            await task


def _asked_after(request: web.Request) -> tuple[str, int]:
    """Return the id that the client saw last (0: none) and where it says so.

    A browser that comes back by itself repeats the address and adds the header: so the header,
    which is the newer of the two, wins.
    """
    for name in request.query:
        if name != _AFTER or len(request.query.getall(name)) > 1:
            raise RequestRefusedError(
                ErrorCode.INVALID_REQUEST,
                f"{name}: give it once"
                if name == _AFTER
                else f"{name}: there is no such parameter",
            )
    field, after = _AFTER, _event_id(_AFTER, request.query.get(_AFTER, "0"))
    if text := request.headers.get(_LAST_EVENT_ID):
        field, after = _LAST_EVENT_ID, _event_id(_LAST_EVENT_ID, text)
    return field, after


def _event_id(field: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST, f"{field}: must be the id of an event, a whole number"
        )
    return int(text)
