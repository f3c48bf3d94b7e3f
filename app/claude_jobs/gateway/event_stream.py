"""Sends a job's events to one client as Server-Sent Events."""

import contextlib
import json
from contextlib import aclosing

from aiohttp import web
from aiohttp_sse import EventSourceResponse

from claude_jobs.bus.events import EventLog

# A comment this often (seconds) keeps proxies and IPVS from dropping a quiet connection.
_PING_EVERY = 15
# What a browser waits before it comes back, in milliseconds.
_RETRY = 2000


async def stream_events(
    request: web.Request,
    events: EventLog,
    job_id: str,
    *,
    after: int = 0,
    headers: dict[str, str] | None = None,
) -> web.StreamResponse:
    """Send the events above `after`, then those to come, until the terminal one.

    A client that goes away cancels nothing: the job goes on and its events are kept.
    """
    response = EventSourceResponse(
        headers=headers, sep="\n", ping_interval=_PING_EVERY, allow_all_methods=True
    )
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):
        async with response, aclosing(events.read(job_id, after=after)) as log:
            await response.write(f"retry: {_RETRY}\n\n".encode())
            async for logged in log:
                await response.send(
                    logged.data.decode(), id=str(logged.sequence), event=_type(logged.data)
                )
    return response


def _type(data: bytes) -> str:
    return str(json.loads(data)["type"])
