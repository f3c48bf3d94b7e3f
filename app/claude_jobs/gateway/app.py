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
from claude_jobs.bus.servers import ServersMissingError
from claude_jobs.bus.topology import Bounds, ensure_topology
from claude_jobs.gateway.auth import bearer_auth
from claude_jobs.gateway.docs import show_docs
from claude_jobs.gateway.errors import error_form
from claude_jobs.gateway.event_stream import job_events
from claude_jobs.gateway.files import (
    PATH_PATTERN,
    continue_later,
    delete_file,
    read_file,
    sweeping,
    write_file,
)
from claude_jobs.gateway.jobs import cancel_job, execute, list_jobs, show_job
from claude_jobs.gateway.metrics import add_metrics, show_metrics
from claude_jobs.gateway.openapi import add_description, show_openapi
from claude_jobs.gateway.pool import pool_status
from claude_jobs.gateway.sessions import delete_session, list_sessions, show_session
from claude_jobs.gateway.state import STATE, Backend, GatewayState
from claude_jobs.gateway.upkeep import keep_up
from claude_jobs.settings import GatewaySettings

log = logging.getLogger(__name__)


def create_app(settings: GatewaySettings) -> web.Application:
    """Make the application. It answers at once; what needs the broker says 503 until it is there.

    Each route is a row of the HTTP contract.
    """
    app = web.Application(
        middlewares=[
            error_form,
            bearer_auth(settings.api_tokens, allow_anonymous=settings.allow_anonymous),
        ],
        client_max_size=settings.max_request_bytes,
    )
    app[STATE] = GatewayState(settings)
    add_metrics(app)
    add_description(app, settings)
    app.cleanup_ctx.append(_connected)
    app.cleanup_ctx.append(sweeping)
    app.add_routes(
        [
            web.post("/api/execute", execute),
            web.get("/api/jobs", list_jobs),
            web.get("/api/jobs/{job_id}", show_job),
            web.get("/api/jobs/{job_id}/events", job_events, allow_head=False),
            web.post("/api/jobs/{job_id}/cancel", cancel_job),
            web.get("/api/sessions", list_sessions),
            web.get("/api/sessions/{session_id}", show_session),
            web.delete("/api/sessions/{session_id}", delete_session),
            web.get("/api/files", read_file),
            web.get(PATH_PATTERN, read_file),
            web.put(PATH_PATTERN, write_file, expect_handler=continue_later),
            web.delete(PATH_PATTERN, delete_file),
            web.get("/status", status),
            web.get("/health", health),
            web.get("/ready", ready),
            web.get("/metrics", show_metrics),
            web.get("/openapi.json", show_openapi),
            web.get("/docs", show_docs),
        ]
    )
    return app


async def status(request: web.Request) -> web.Response:
    """Show the replicas and the queue."""
    state = request.app[STATE]
    shown = await pool_status(state.ready_backend(), state.settings)
    return web.Response(body=shown.to_json(), content_type="application/json")


async def health(request: web.Request) -> web.Response:
    """Say that this process lives and has the workspace that all share.

    Where that was mounted too late, only a new container sees it: Swarm starts one. A file server
    that is away for a while is no reason for one.
    """
    request.app[STATE].shared_workspace()
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Say whether jobs can be taken: the broker is in reach, the workspace the shared one."""
    state = request.app[STATE]
    state.shared_workspace()
    await state.ready_backend().queue.depth()
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
        session_age=settings.session_age,
        session_bytes=settings.session_bytes,
        copies=settings.broker_servers,
    )
    away = state.absence
    async with connect(
        settings.broker_url,
        user=GATEWAY_USER,
        password=settings.broker_gateway_password.current,
        name="gateway",
    ) as bus:
        while state.backend is None:
            try:
                await ensure_topology(bus, bounds)
                state.backend = await Backend.open(bus)
            except ServersMissingError as missing:
                log.warning("the broker is not complete", extra={"cause": str(missing)})
                state.absence = f"the job broker is not complete yet: {missing}"
                await asyncio.sleep(0.5)
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.warning("the broker is not ready", extra={"cause": str(error) or repr(error)})
                await asyncio.sleep(0.5)
        state.absence = away
        log.info("ready")
        await keep_up(state, state.backend)
