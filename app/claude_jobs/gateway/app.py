"""The gateway's application: its routes and its connection to the broker."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import timedelta

import nats.errors
import nats.js.errors
from aiohttp import web

from claude_jobs.broker import GATEWAY_USER
from claude_jobs.bus.connection import connect
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.topology import Bounds, ensure_topology
from claude_jobs.contract.job import Job
from claude_jobs.gateway.auth import CLIENT, bearer_auth
from claude_jobs.gateway.errors import error_form
from claude_jobs.gateway.event_stream import stream_events
from claude_jobs.gateway.pool import pool_status
from claude_jobs.gateway.state import STATE, Backend, GatewayState
from claude_jobs.gateway.submission import read_job_request, submit
from claude_jobs.settings import GatewaySettings

log = logging.getLogger(__name__)


def create_app(settings: GatewaySettings) -> web.Application:
    """Make the application. It answers at once; what needs the broker says 503 until it is there.

    Each route is a row of the HTTP contract.
    """
    app = web.Application(
        middlewares=[error_form, bearer_auth(settings.api_tokens or None)],
        client_max_size=settings.max_request_bytes,
    )
    app[STATE] = GatewayState(settings)
    app.cleanup_ctx.append(_connected)
    app.add_routes(
        [
            web.post("/api/execute", execute),
            web.get("/status", status),
            web.get("/health", health),
            web.get("/ready", ready),
        ]
    )
    return app


async def execute(request: web.Request) -> web.StreamResponse:
    """Accept a job and stream it from `queued` to its terminal event."""
    state = request.app[STATE]
    backend = state.ready_backend()
    job = Job.accept(await read_job_request(request, state.settings), client=request[CLIENT])
    # A client that goes away at this moment leaves no half-made job behind.
    first = await asyncio.shield(submit(job, backend))
    return await stream_events(
        request,
        backend.events,
        job.id,
        after=first - 1,
        headers={"X-Job-Id": job.id, "Location": f"/api/jobs/{job.id}"},
    )


async def status(request: web.Request) -> web.Response:
    """Show the replicas and the queue."""
    state = request.app[STATE]
    shown = await pool_status(state.ready_backend(), state.settings)
    return web.Response(body=shown.to_json(), content_type="application/json")


async def health(_: web.Request) -> web.Response:
    """Say that this process lives."""
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Say whether jobs can be taken: the broker is in reach."""
    await request.app[STATE].ready_backend().queue.depth()
    return web.json_response({"status": "ready"})


async def _connected(app: web.Application) -> AsyncIterator[None]:
    """Hold the broker's connection for as long as the application runs."""
    connection = asyncio.create_task(_hold_connection(app[STATE]))
    yield
    connection.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await connection


async def _hold_connection(state: GatewayState) -> None:
    settings = state.settings
    bounds = Bounds(
        queue_limit=settings.queue_limit,
        lease=timedelta(seconds=settings.lease_seconds),
        event_age=settings.event_age,
        event_bytes=settings.event_bytes,
    )
    async with connect(
        settings.broker_url,
        user=GATEWAY_USER,
        password=settings.broker_gateway_password.get_secret_value(),
        name="gateway",
    ) as bus:
        while state.backend is None:
            try:
                await ensure_topology(bus, bounds)
                state.backend = Backend(
                    bus,
                    JobQueue(bus),
                    EventLog(bus),
                    await JobRecords.open(bus),
                    await Presence.open(bus),
                )
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.warning("the broker is not ready", extra={"cause": str(error) or repr(error)})
                await asyncio.sleep(0.5)
        log.info("ready")
        await asyncio.Event().wait()
