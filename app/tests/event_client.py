"""A pool without replicas, whose logs the tests write, and its event streams as bytes come."""

import asyncio
import contextlib
import os
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pool_client import connected_to_broker

from claude_jobs.broker import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog, EventWriter
from claude_jobs.bus.records import JobRecords
from claude_jobs.contract.event import Queued
from claude_jobs.contract.job import Job, JobRecord, JobRequest
from claude_jobs.development import Pool, free_port


@dataclass(frozen=True)
class SentEvent:
    """An event as it stands in the stream; without an `id:` line its id is None."""

    id: int | None
    type: str
    data: str


@dataclass
class WrittenPool:
    """A broker and gateways; the jobs in it are what a test writes."""

    pool: Pool
    bus: Bus
    log: EventLog
    records: JobRecords
    http: httpx.AsyncClient

    async def job(self) -> tuple[Job, EventWriter]:
        """Make a job with its record and its `queued` event, and place it in no queue."""
        job = Job.accept(JobRequest(prompt="x"), client="test")
        writer = self.log.begin(job.id)
        await self.records.put(JobRecord.queued(job))
        await writer.append(Queued(job_id=job.id, position=1))
        return job, writer

    @asynccontextmanager
    async def stream(
        self, job_id: str, *, url: str = "", **asked: Any
    ) -> AsyncIterator[AsyncIterator[SentEvent]]:
        """Open a job's event stream."""
        path = f"{url}/api/jobs/{job_id}/events"
        async with self.http.stream("GET", path, **asked) as response:
            if response.status_code != 200:
                await response.aread()
            assert response.status_code == 200, response.text
            yield sent_events(response)

    async def all(self, job_id: str, **asked: Any) -> list[SentEvent]:
        """Read a job's stream to its end."""
        async with self.stream(job_id, **asked) as events:
            return [event async for event in events]

    async def answer(self, job_id: str, **asked: Any) -> httpx.Response:
        """Ask for a job's events where no stream is the answer."""
        return await self.http.get(f"/api/jobs/{job_id}/events", **asked)

    @asynccontextmanager
    async def as_replica(self) -> AsyncIterator[Bus]:
        async with connected_to_broker(self.pool, REPLICA_USER) as bus:
            yield bus


@dataclass
class OtherGateway:
    """A second gateway of a pool: a process that may be killed."""

    pool: Pool
    port: int = field(default_factory=free_port)
    process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        environment = self.pool._environment("gateway") | {"PORT": str(self.port)}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "claude_jobs", "gateway", env=environment
        )

    async def kill(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


async def sent_events(response: httpx.Response) -> AsyncIterator[SentEvent]:
    """Take a stream apart by its letter; comments and `retry` are left out."""
    text = ""
    async for piece in response.aiter_text():
        *frames, text = (text + piece).split("\n\n")
        for frame in frames:
            fields: dict[str, str] = {}
            for line in frame.split("\n"):
                name, _, value = line.partition(": ")
                assert name in {"", "id", "event", "data", "retry"}, frame
                assert name not in fields, frame
                fields[name] = value
            if "data" in fields:
                number = int(fields["id"]) if "id" in fields else None
                yield SentEvent(number, fields["event"], fields["data"])
    assert text == ""


async def ready(http: httpx.AsyncClient, url: str = "") -> None:
    """Wait until a gateway takes jobs."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def written_pool(**settings: str) -> AsyncIterator[WrittenPool]:
    """Run a broker and a gateway in a directory of their own."""
    with tempfile.TemporaryDirectory(prefix="pool-") as directory:
        root = Path(directory)
        pool = Pool(root=root / "pool", workspace=root / "workspace", replicas=0, settings=settings)
        async with (
            pool.running(),
            httpx.AsyncClient(
                base_url=pool.url,
                headers={"Authorization": f"Bearer {pool.token}"},
                timeout=30,
                trust_env=False,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            ) as http,
            connected_to_broker(pool, GATEWAY_USER) as bus,
        ):
            await ready(http)
            yield WrittenPool(pool, bus, EventLog(bus), await JobRecords.open(bus), http)


@asynccontextmanager
async def other_gateway(pool: WrittenPool) -> AsyncIterator[OtherGateway]:
    """Run a second gateway beside a pool's own."""
    other = OtherGateway(pool.pool)
    await other.start()
    try:
        await ready(pool.http, other.url)
        yield other
    finally:
        await other.kill()


def memory_of(process: Process) -> int:
    """Return the bytes that a process has in memory."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
