"""What Prometheus reads: this gateway's own counts, and the pool's state as the broker knows it.

Whatever is told of the pool, every gateway tells alike; of the rest, each tells its own.
"""

import asyncio
import importlib.metadata
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import monotonic

import nats.errors
import nats.js.errors
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from claude_jobs import __version__
from claude_jobs.contract.error import HTTP_STATUS, ErrorCode
from claude_jobs.contract.status import ReplicaStatus
from claude_jobs.gateway.positions import waiting_jobs
from claude_jobs.gateway.state import STATE, Backend, GatewayState

# A broker that has not answered by then (seconds) counts as away: Prometheus gives up after 10.
_PATIENCE = 2.0
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# What no route takes, and a method that nobody knows: a label's values must be few.
_OTHER = "other"
_SUBMISSION = ("POST", "/api/execute")
_CODES = {status: code for code, status in HTTP_STATUS.items()}
_ARRIVED: web.RequestKey[float] = web.RequestKey("arrived", float)

# They would double the number of series, and tell what `process_start_time_seconds` tells.
disable_created_metrics()  # type: ignore[no-untyped-call] # prometheus-client


@dataclass(frozen=True)
class _PoolState:
    """What only the broker knows."""

    waiting: int
    unfinished: int
    replicas: Tally[ReplicaStatus]


class Metrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self, state: GatewayState) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._pool = _PoolCollector(state)
        self._requests = Counter(
            "claude_jobs_http_requests",
            "HTTP requests that were answered.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._durations = Histogram(
            "claude_jobs_http_request_duration_seconds",
            "Time from an HTTP request to the head of its answer; an event stream goes on after.",
            ("route", "method"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._accepted = Counter(
            "claude_jobs_submissions_accepted",
            "Requests to run a job that were answered with a job.",
            registry=self.registry,
        )
        self._refused = Counter(
            "claude_jobs_submissions_refused",
            "Requests to run a job that were refused, by the error's code.",
            ("code",),
            registry=self.registry,
        )
        for code in ErrorCode:
            self._refused.labels(code)
        self._events = Counter(
            "claude_jobs_events_sent",
            "Events that were written to event streams, by type.",
            ("type",),
            registry=self.registry,
        )
        Info(
            "claude_jobs_build",
            "The versions that run here.",
            registry=self.registry,
        ).info(
            {
                "version": __version__,
                "claude_agent_sdk": importlib.metadata.version("claude-agent-sdk"),
            }
        )
        self.registry.register(self._pool)
        ProcessCollector(registry=self.registry)

    async def expose(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics and their content type, in a form that the header `Accept` takes."""
        await self._pool.refresh()
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def event_sent(self, kind: str) -> None:
        """Count an event, of the type `kind`, that was written to a stream."""
        self._events.labels(kind).inc()

    @web.middleware
    async def arrival(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note when a request came; comes before every other middleware."""
        request[_ARRIVED] = monotonic()
        return await handler(request)

    async def answered(self, request: web.Request, response: web.StreamResponse) -> None:
        """Count a request whose answer begins."""
        if (arrived := request.get(_ARRIVED)) is None:
            return
        resource = request.match_info.route.resource
        route = resource.canonical if resource else _OTHER
        method = request.method if request.method in hdrs.METH_ALL else _OTHER
        self._requests.labels(route, method, response.status).inc()
        self._durations.labels(route, method).observe(monotonic() - arrived)
        if (method, route) == _SUBMISSION:
            self._submitted(response.status)

    def _submitted(self, status: int) -> None:
        if code := _CODES.get(status):
            self._refused.labels(code).inc()
        else:
            self._accepted.inc()


METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)


def add_metrics(app: web.Application) -> None:
    """Count every request of an application whose `STATE` is set."""
    metrics = app[METRICS] = Metrics(app[STATE])
    app.middlewares.insert(0, metrics.arrival)
    app.on_response_prepare.append(metrics.answered)


async def show_metrics(request: web.Request) -> web.Response:
    """Show the metrics; the broker need not be there."""
    accept = ",".join(request.headers.getall(hdrs.ACCEPT, ()))
    body, content_type = await request.app[METRICS].expose(accept)
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})


class _PoolCollector(Collector):
    """The state of the pool and of this gateway, as it is at the moment of asking."""

    def __init__(self, state: GatewayState) -> None:
        self._state = state
        self._known: _PoolState | None = None

    async def refresh(self) -> None:
        """Ask the broker; what it does not tell in time is not shown."""
        self._known = None
        backend = self._state.backend
        if backend is None or not backend.bus.is_connected:
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                self._known = await _pool_state(backend)
        # A ValueError is what another version of the application wrote.
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError, ValueError):
            return

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges. None has a stale value: one that is not known is left out."""
        yield _gauge(
            "claude_jobs_broker_connected",
            "Whether the job broker answers this gateway (1) or not (0).",
            [((), float(self._known is not None))],
        )
        yield _gauge(
            "claude_jobs_queue_limit",
            "Jobs that may be accepted and not yet ended.",
            [((), self._state.settings.queue_limit)],
        )
        yield _gauge(
            "claude_jobs_event_streams",
            "Event streams that this gateway holds open.",
            [((), len(self._state.streams))],
        )
        if self._known is None:
            return
        yield _gauge(
            "claude_jobs_queue_depth",
            "Jobs that wait for a replica.",
            [((), self._known.waiting)],
        )
        yield _gauge(
            "claude_jobs_unfinished",
            "Jobs that are accepted and not yet ended.",
            [((), self._known.unfinished)],
        )
        yield _gauge(
            "claude_jobs_replicas",
            "Replicas that are alive, by status.",
            [((status,), self._known.replicas[status]) for status in ReplicaStatus],
            labels=("status",),
        )


async def _pool_state(backend: Backend) -> _PoolState:
    replicas = await backend.presence.list()
    unfinished = await backend.queue.unfinished()
    waiting = waiting_jobs(unfinished, replicas)
    return _PoolState(len(waiting), len(unfinished), Tally(replica.status for replica in replicas))


def _gauge(
    name: str,
    meaning: str,
    values: Iterable[tuple[tuple[str, ...], float]],
    labels: tuple[str, ...] = (),
) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family
