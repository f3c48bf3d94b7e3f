"""A running pool as its client sees it, and a hand on its processes."""

import asyncio
import atexit
import contextlib
import json
import os
import shutil
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
from httpx_sse import EventSource

from claude_jobs.agent.command import bundled_claude
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.development import Pool

TERMINAL = {"completed", "error"}


@dataclass(frozen=True)
class ReceivedEvent:
    """One event as it came over the wire."""

    id: int
    type: str
    data: dict[str, Any]


@dataclass
class EventStream:
    """The answer to a job: its headers, and its events as they come."""

    response: httpx.Response
    events: list[ReceivedEvent] = field(default_factory=list)
    retry: int | None = None
    _source: AsyncIterator[ReceivedEvent] | None = None

    def __aiter__(self) -> AsyncIterator[ReceivedEvent]:
        if self._source is None:
            self._source = self._received()
        return self._source

    async def _received(self) -> AsyncIterator[ReceivedEvent]:
        async for sent in EventSource(self.response).aiter_sse():
            if sent.retry is not None:
                assert not self.events, "`retry` comes first"
                self.retry = sent.retry
            if sent.data:
                received = ReceivedEvent(int(sent.id), sent.event, json.loads(sent.data))
                self.events.append(received)
                yield received

    async def until(self, kind: str) -> ReceivedEvent:
        """Read on to the next event of this type."""
        async for received in self:
            if received.type == kind:
                return received
        raise AssertionError(f"the stream ended without {kind}: {self.events}")

    async def ending(self) -> ReceivedEvent:
        """Read to the end and return the one terminal event, which is the last."""
        async for _ in self:
            pass
        assert [each.type in TERMINAL for each in self.events] == [False] * (
            len(self.events) - 1
        ) + [True], self.events
        return self.events[-1]


@dataclass
class RunningPool:
    """The processes of a pool and a client with a token."""

    pool: Pool
    http: httpx.AsyncClient

    @property
    def workspace(self) -> Path:
        return self.pool.workspace

    @asynccontextmanager
    async def job(self, prompt: str, **fields: object) -> AsyncIterator[EventStream]:
        """Submit a job and hold its stream; leaving early drops the connection."""
        body = {"prompt": prompt, **fields}
        async with self.http.stream("POST", "/api/execute", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            assert response.status_code == 200, response.text
            yield EventStream(response)

    async def run(self, prompt: str, **fields: object) -> ReceivedEvent:
        """Run a job and return its terminal event."""
        async with self.job(prompt, **fields) as stream:
            return await stream.ending()

    async def output(self, prompt: str, **fields: object) -> str:
        """Run a job that ends well and return its result."""
        ending = await self.run(prompt, **fields)
        assert ending.type == "completed", ending
        return str(ending.data["result"])

    async def refusal(self, **request: Any) -> tuple[int, dict[str, Any], httpx.Headers]:
        """Send what is refused; returns status, body and headers."""
        response = await self.http.request(**request)
        assert response.headers["Content-Type"].startswith("application/json"), response.text
        body = response.json()
        assert body.keys() == {"error", "code"}
        return response.status_code, body, response.headers

    async def status(self) -> dict[str, Any]:
        response = await self.http.get("/status")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def ready(self, url: str = "") -> None:
        """Wait until a gateway takes jobs."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await self.http.get(f"{url}/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.1)

    async def says(self, sentence: str) -> None:
        """Wait until the gateway says why it does not take jobs."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await self.http.get("/ready")
                assert response.status_code == 503, response.text
                if sentence in response.json()["error"]:
                    return
            await asyncio.sleep(0.1)

    async def idle(self, replicas: int) -> None:
        """Wait until so many replicas are idle and none is busy."""
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    response = await self.http.get("/status")
                    if response.status_code == 200:
                        counts = response.json()["replicas"]
                        if (counts["idle"], counts["busy"]) == (replicas, 0):
                            return
                await asyncio.sleep(0.05)

    def replica(self, event: ReceivedEvent) -> Process:
        """Return the process that a `connected` event names."""
        return self.pool.processes[event.data["replica"].rpartition("-")[0]]

    async def agent(self, supervisor: Process) -> psutil.Process:
        """Return the process of Claude Code below this supervisor."""
        while not (
            children := [
                child
                for child in psutil.Process(supervisor.pid).children()
                if "claude_jobs.agent.watchdog" not in child.cmdline()
            ]
        ):
            await asyncio.sleep(0.01)
        (child,) = children
        return child


@asynccontextmanager
async def connected_to_broker(pool: Pool, user: str) -> AsyncIterator[Bus]:
    """Connect to a pool's broker as one of its users."""
    password = (pool.root / "secrets" / f"broker_{user}_password").read_text().strip()
    async with connect(pool.broker_url, user=user, password=password, name=f"test {user}") as bus:
        yield bus


async def appears(path: Path) -> None:
    """Wait for a file."""
    while not path.exists():  # noqa: ASYNC240 - the local disk
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running_pool(
    *,
    replicas: int,
    gateways: int = 1,
    settings: Mapping[str, str] | None = None,
    credentials: str | None = None,
) -> AsyncIterator[RunningPool]:
    """Run a pool of real processes in a directory of its own, and wait until it is idle."""
    with directory_for_everybody() as directory:
        async with pool_in(
            directory,
            replicas=replicas,
            gateways=gateways,
            settings=settings,
            credentials=credentials,
        ) as running:
            await running.idle(replicas)
            yield running


@asynccontextmanager
async def pool_in(
    directory: Path,
    *,
    replicas: int,
    gateways: int = 1,
    settings: Mapping[str, str] | None = None,
    credentials: str | None = None,
    broker_url: str = "",
) -> AsyncIterator[RunningPool]:
    """Run a pool of real processes in a directory, which keeps what it knows.

    Waits for nothing. With a `broker_url` it runs no broker.
    """
    pool = Pool(
        root=directory / "pool",
        workspace=directory / "workspace",
        replicas=replicas,
        gateways=gateways,
        credentials=credentials,
        settings=settings or {},
        broker_url=broker_url,
    )
    headers = {"Authorization": f"Bearer {pool.token}"}
    async with (
        pool.running(),
        httpx.AsyncClient(
            base_url=pool.url,
            headers=headers,
            timeout=60,
            trust_env=False,
            # A test that waits for one job must not hold up another's.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        ) as http,
    ):
        yield RunningPool(pool, http)


@contextmanager
def program_for_everybody(program: Path) -> Iterator[Path]:
    """Copy a program to where the agent, another user when root runs the tests, can run it."""
    directory = Path(tempfile.mkdtemp(prefix="program-"))
    try:
        directory.chmod(0o755)
        copy = directory / program.name
        shutil.copy(program, copy)
        copy.chmod(0o755)
        yield copy
    finally:
        shutil.rmtree(directory)


@contextmanager
def directory_for_everybody() -> Iterator[Path]:
    """Make a directory below which the agent's user has its home and reaches the CLI."""
    directory = Path(tempfile.mkdtemp(prefix="pool-"))
    try:
        directory.chmod(0o711)
        (directory / "pool").mkdir()
        # Without this the pool makes a copy of its own where the CLI lies in a private home.
        (directory / "pool" / "claude").symlink_to(_claude_for_everybody())
        yield directory
    finally:
        shutil.rmtree(directory)


@cache
def _claude_for_everybody() -> Path:
    bundled = bundled_claude()
    if os.geteuid() != 0 or all(path.stat().st_mode & 0o001 for path in bundled.parents):
        return bundled
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    return until_the_end.enter_context(program_for_everybody(bundled))
