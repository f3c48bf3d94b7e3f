"""What `/metrics` promises to Prometheus, and that it answers whatever befalls the broker."""

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer
from nats_server import PASSWORDS, NatsServer
from pool_client import RunningPool, appears
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from claude_jobs import __version__
from claude_jobs.broker import GATEWAY_USER
from claude_jobs.gateway.app import create_app
from claude_jobs.settings import GatewaySettings

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

# Prometheus' base units, and what counts without a unit may end in.
UNITS = re.compile(r"_(seconds|bytes|total|info)$")
COUNTED_THINGS = re.compile(r"_(connected|depth|limit|unfinished|replicas|event_streams|fds)$")


class Scrape:
    """One answer of `/metrics`, by sample."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples[(name, *sorted(labels.items()))]

    def names(self) -> set[str]:
        return {str(name) for name, *_ in self.samples}


async def scrape(pool: RunningPool) -> Scrape:
    response = await pool.http.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(response.text)


async def test_every_metric_is_named_as_prometheus_wants_it(pool: RunningPool) -> None:
    shown = await scrape(pool)
    names = [family.name for family in shown.families]
    assert len(names) == len(set(names)), "each family comes once"
    for family in shown.families:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        assert family.name.startswith(("claude_jobs_", "process_"))
        for sample in family.samples:
            assert sample.value == sample.value, f"{sample.name} is no number"
            bare = re.sub(r"_(bucket|count|sum)$", "", sample.name)
            assert UNITS.search(bare) or COUNTED_THINGS.search(bare), sample.name
            assert (family.type == "counter") is sample.name.endswith("_total")
            assert not {"le", "quantile"} & sample.labels.keys() or family.type == "histogram"


async def test_openmetrics_is_spoken_on_request(pool: RunningPool) -> None:
    response = await pool.http.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1")
    families = openmetrics(response.text)  # type: ignore[no-untyped-call] # prometheus-client
    assert {"claude_jobs_build", "claude_jobs_http_requests"} <= {each.name for each in families}


async def test_the_pool_is_shown_as_it_is(pool: RunningPool) -> None:
    await pool.idle(3)
    shown = await scrape(pool)
    assert shown.value("claude_jobs_broker_connected") == 1
    assert shown.value("claude_jobs_queue_limit") == 1000
    assert shown.value("claude_jobs_queue_depth") == 0
    assert shown.value("claude_jobs_unfinished") == 0
    assert shown.value("claude_jobs_replicas", status="idle") == 3
    assert shown.value("claude_jobs_replicas", status="busy") == 0
    assert f'version="{__version__}"' in shown.text


async def test_a_job_and_a_refusal_are_counted(pool: RunningPool) -> None:
    before = await scrape(pool)
    waiting = "run until [ -e go ]; do sleep 0.05; done"
    async with pool.job(waiting, workspace="counted") as stream:
        await stream.until("connected")
        during = await scrape(pool)
        await appears(pool.workspace / "counted")
        (pool.workspace / "counted" / "go").touch()
        await stream.ending()
    await pool.refusal(method="POST", url="/api/execute", json={"prompt": ""})
    after = await scrape(pool)

    assert during.value("claude_jobs_event_streams") == 1
    assert during.value("claude_jobs_unfinished") == 1
    assert during.value("claude_jobs_replicas", status="busy") == 1

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.samples.get((name, *sorted(labels.items())), 0)

    route = {"route": "/api/execute", "method": "POST"}
    assert grown("claude_jobs_submissions_accepted_total") == 1
    assert grown("claude_jobs_submissions_refused_total", code="invalid_request") == 1
    assert grown("claude_jobs_submissions_refused_total", code="queue_full") == 0
    assert grown("claude_jobs_http_requests_total", status="200", **route) == 1
    assert grown("claude_jobs_http_requests_total", status="400", **route) == 1
    assert grown("claude_jobs_http_request_duration_seconds_count", **route) == 2
    for kind in ("queued", "connected", "completed"):
        assert grown("claude_jobs_events_sent_total", type=kind) == 1
    sent = len([event for event in stream.events if event.type == "message"])
    assert grown("claude_jobs_events_sent_total", type="message") == sent


async def test_strangers_paths_and_methods_make_no_series_of_their_own(
    pool: RunningPool,
) -> None:
    for number in range(3):
        await pool.http.request("PROPFIND", f"/no-such-path-{number}")
    shown = await scrape(pool)
    assert "no-such-path" not in shown.text
    assert "PROPFIND" not in shown.text
    assert (
        shown.value(
            "claude_jobs_http_requests_total",
            route="other",
            method="other",
            status="404",
        )
        >= 3
    )


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(nats_server: NatsServer) -> AsyncIterator[TestClient]:  # type: ignore[type-arg]
    """A gateway in this process, whose broker the test can take away."""
    settings = GatewaySettings(
        broker_url=nats_server.url,
        broker_gateway_password=PASSWORDS[GATEWAY_USER],
        allow_anonymous=True,
        event_bytes=2**28,
        session_bytes=2**28,
    )
    async with TestClient(TestServer(create_app(settings))) as client:
        yield client


async def test_without_a_broker_the_rest_is_shown_at_once(
    gateway: "TestClient",  # type: ignore[type-arg]
    nats_server: NatsServer,
) -> None:
    async def shown_when(connected: int) -> Scrape:
        async with asyncio.timeout(30):
            while True:
                async with asyncio.timeout(5), gateway.get("/metrics") as response:
                    assert response.status == 200
                    shown = Scrape(await response.text())
                if shown.value("claude_jobs_broker_connected") == connected:
                    return shown
                await asyncio.sleep(0.05)

    pool_state = {
        "claude_jobs_queue_depth",
        "claude_jobs_unfinished",
        "claude_jobs_replicas",
    }
    assert pool_state <= (await shown_when(1)).names()
    await nats_server.kill()
    away = await shown_when(0)
    assert not pool_state & away.names(), "what is not known is not shown"
    assert away.value("claude_jobs_queue_limit") == 1000
    assert away.value(
        "claude_jobs_http_requests_total", route="/metrics", method="GET", status="200"
    )
    await nats_server.start()
    assert pool_state <= (await shown_when(1)).names()


async def test_the_version_is_told_the_same_everywhere() -> None:
    declared = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(declared.read_text())
    assert project["project"]["version"] == __version__
