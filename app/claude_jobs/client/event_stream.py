"""Reads a job's events and comes back whenever the connection breaks."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import monotonic
from typing import Any
from urllib.parse import quote

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from claude_jobs.client.connection import TRANSIENT, Connection
from claude_jobs.client.errors import ApiError, ClientError, UnreachableError
from claude_jobs.client.job_event import JobEvent, LineJoiner

# The server sends a comment every 15 s: after three of them without a word the line is dead.
_SILENCE = 45.0
# What is waited before coming back until the server says something else (`retry:`), in seconds.
_RETRY = 2.0
_LONGEST_RETRY = 30.0
# A connection that stood so long (seconds) ends an outage, even if the job was silent.
_STABLE = 30.0
_UNLOGGED = frozenset({"queued", "completed", "error"})


async def read_events(
    connection: Connection, job_id: str, *, after: int = 0, give_up_after: float | None = None
) -> AsyncGenerator[JobEvent]:
    """Yield the events above `after` and those to come; ends after the terminal one.

    No event comes twice. An outage may last `give_up_after` seconds, then `UnreachableError`
    (nobody answers) or `ApiError` (the server keeps saying that it cannot) is raised.
    """
    patience = connection.patience(give_up_after, first_wait=_RETRY)
    reader = _Reader(after)
    path = f"/api/jobs/{quote(job_id, safe='')}/events"
    while True:
        opened, at_least = monotonic(), 0.0
        cause: ClientError = UnreachableError(
            f"the event stream of job {job_id} ended before the job, at id {reader.position}"
        )
        try:
            async with connection.stream(
                path,
                headers={
                    "Accept": "text/event-stream",
                    "Cache-Control": "no-store",
                    "Last-Event-ID": str(reader.position),
                },
                read_timeout=_SILENCE,
            ) as response:
                if response.status_code == httpx.codes.NO_CONTENT:
                    return  # the end was seen before
                sse = EventSource(response).aiter_sse()
                async with aclosing(sse):
                    async for sent in sse:
                        if sent.retry is not None:
                            patience.first_wait = min(sent.retry / 1000, _LONGEST_RETRY)
                        for event in reader.take(sent):
                            patience.calm()
                            yield event
                            if event.is_terminal:
                                return
        except SSEError as error:  # before the next: it is one of them
            raise ClientError(
                f"{connection.http.base_url} sends no event stream: {error}"
            ) from None
        except httpx.TransportError as error:
            cause = connection.lost(error)
        except ApiError as refused:
            if refused.status not in TRANSIENT:
                raise
            cause, at_least = refused, refused.retry_after or 0
        if monotonic() - opened > _STABLE:
            patience.calm()
        await patience.wait(cause, at_least=at_least)


class _Reader:
    """Knows what has been received: skips what comes again, joins what comes in parts."""

    def __init__(self, after: int) -> None:
        self.position = after
        self._lines = LineJoiner()
        self._gap: dict[str, Any] | None = None

    def take(self, sent: ServerSentEvent) -> list[JobEvent]:
        """Return the events that this one completes: none, it, or also those held back."""
        if not sent.data:
            return []
        data = _object(sent.data)
        kind = sent.event or str(data.get("type", "message"))
        # By the rules of SSE an event without an id carries the one before it.
        number = int(sent.id) if sent.id.isdecimal() else None
        if kind == "gap":
            if data == self._gap:
                return []
            self._gap = data
            self.position = max(self.position, _number(data.get("to")))
            number = None
        if number is not None and number <= self.position:
            # Told but not logged: a change of position, an end that only the record holds.
            if kind not in _UNLOGGED:
                return []
            number = None
        if number is not None:
            self.position = number
        return list(self._lines.feed(JobEvent(number, kind, data)))


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ClientError("the event stream holds data that is no JSON object")
    return data


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
