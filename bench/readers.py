"""What readers of event streams cost one gateway, and how fast a job's events are read again.

A broker and a gateway run as processes of this machine, without replicas: the logs are written
here. The readers are a process of their own. Live: each reader gets one event a second, of a job
of its own or all of the same job; the delay is from before the append to the client having it. As
a floor, one reader alone, of 20 events a second. Replay: as a floor, the same log is read without
HTTP.
"""

import argparse
import asyncio
import json
import re
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import httpx
import nats.aio.msg
import psutil
from target import show

from claude_jobs.broker import GATEWAY_USER
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.events import EventLog, EventWriter
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.topology import EVENTS_STREAM, events_subject
from claude_jobs.contract.base import now
from claude_jobs.contract.event import Completed, Message, Queued
from claude_jobs.contract.job import Job, JobRecord, JobRequest
from claude_jobs.development import Pool

AT = re.compile(rb'"at":([0-9.]+)')
ENDED = Completed(
    result="done",
    session_id="s",
    usage={},
    cost_usd=0,
    num_turns=1,
    duration_ms=1,
    permission_denials=[],
)
TEXT = "x" * 200


@dataclass(frozen=True)
class Target:
    """The gateway that is measured, and the bus behind it."""

    pool: Pool
    bus: Bus
    records: JobRecords
    http: httpx.AsyncClient

    async def begin(self) -> tuple[str, EventWriter]:
        """Make a job that is accepted and waits in no queue."""
        job = Job.accept(JobRequest(prompt="x"), client="bench")
        await self.records.put(JobRecord.queued(job))
        writer = EventLog(self.bus).begin(job.id)
        await writer.append(Queued(job_id=job.id, position=1))
        # The gateway tells whoever reads a job that waits its position: this one runs.
        await writer.append(Message(content={}, timestamp=now()))
        return job.id, writer

    async def open_streams(self) -> int:
        """Return how many event streams the gateway holds."""
        text = (await self.http.get("/metrics")).text
        found = re.search(r"^claude_jobs_event_streams (\d+)", text, re.MULTILINE)
        assert found, text
        return int(found[1])

    def usage(self) -> tuple[float, float, float]:
        """Return the CPU seconds of gateway and broker so far, and the gateway's bytes."""
        gateway, broker = (
            psutil.Process(self.pool.processes[name].pid) for name in ("gateway", "broker")
        )
        return cpu(gateway), cpu(broker), gateway.memory_info().rss


def cpu(process: psutil.Process) -> float:
    """Return how many seconds of CPU a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def line() -> Message:
    """Return a line as an agent says it, with the time at which it was said."""
    return Message(content={"type": "assistant", "at": time.time(), "text": TEXT}, timestamp=now())


class Reader(asyncio.Protocol):
    """A client that takes the stream as it comes and notes how old each event is."""

    def __init__(self, request: bytes, ages: list[float]) -> None:
        self._request = request
        self._ages = ages
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        read = time.time()
        self._ages += [read - float(at) for at in AT.findall(data)]
        if b"event: completed" in data and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError("the stream ended before the job"))


def read_live(url: str, token: str, job_ids: list[str]) -> list[float]:
    """Read each of these jobs to its end, from its last event on; return the events' ages."""

    async def read() -> list[float]:
        ages: list[float] = []
        place = httpx.URL(url)
        readers = []
        for job_id in job_ids:
            request = (
                f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: {place.host}\r\n"
                f"Authorization: Bearer {token}\r\n\r\n"
            ).encode()
            _, reader = await asyncio.get_running_loop().create_connection(
                lambda request=request: Reader(request, ages),  # type: ignore[misc]
                place.host,
                place.port or 80,
            )
            readers.append(reader)
        await asyncio.gather(*(reader.ended for reader in readers))
        return ages

    return asyncio.run(read())


async def live(
    target: Target,
    executor: ProcessPoolExecutor,
    *,
    readers: int,
    jobs: int,
    seconds: int,
    rate: int = 1,
) -> tuple[list[float], list[float], str]:
    """Let each job say something `rate` times a second.

    Returns what the appends took by themselves, the delays, and what the readers cost.
    """
    appends: list[float] = []
    written = [await target.begin() for _ in range(jobs)]
    ids = [written[number % jobs][0] for number in range(readers)]
    _, _, before = target.usage()
    reading = asyncio.get_running_loop().run_in_executor(
        executor, read_live, target.pool.url, target.pool.token, ids
    )
    while await target.open_streams() < readers:
        if reading.done():
            reading.result()
        await asyncio.sleep(0.1)
    gateway, broker, memory = target.usage()
    started = time.monotonic()

    async def speak(number: int, writer: EventWriter) -> None:
        for turn in range(seconds * rate):
            due = started + (turn + (number + 1) / jobs) / rate
            await asyncio.sleep(due - time.monotonic())
            said = time.monotonic()
            await writer.append(line())
            appends.append(time.monotonic() - said)

    await asyncio.gather(*(speak(number, writer) for number, (_, writer) in enumerate(written)))
    took = time.monotonic() - started
    gateway_after, broker_after, _ = target.usage()
    for _, writer in written:
        await writer.append(ENDED)
    delays = await reading
    share, of_broker = (gateway_after - gateway) / took, (broker_after - broker) / took
    each = (memory - before) / readers / 1024
    cost = (
        f"{readers:5} readers of {jobs:4} jobs: gateway {share:6.1%} of a CPU, "
        f"broker {of_broker:6.1%}, {each:6.1f} KiB of the gateway's memory for each reader"
    )
    return appends, delays, cost


async def raw_rate(target: Target, job_id: str, count: int) -> float:
    """Read a log as fast as the broker's client can, without HTTP; return events per second."""
    read = 0
    done = asyncio.Event()

    async def receive(_: nats.aio.msg.Msg) -> None:
        nonlocal read
        read += 1
        if read == count:
            done.set()

    client = target.bus.nats
    inbox = client.new_inbox()
    subscription = await client.subscribe(
        inbox, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0
    )
    config = {
        "filter_subject": events_subject(job_id),
        "deliver_policy": "all",
        "deliver_subject": inbox,
        "ack_policy": "none",
        "mem_storage": True,
    }
    wish = json.dumps({"stream_name": EVENTS_STREAM, "config": config}).encode()
    started = time.monotonic()
    await client.request(f"$JS.API.CONSUMER.CREATE.{EVENTS_STREAM}", wish)
    await done.wait()
    took = time.monotonic() - started
    await subscription.unsubscribe()
    return count / took


async def http_rate(target: Target, job_id: str, count: int) -> float:
    """Read a job's event stream from the first event to the last; return events per second."""
    text = bytearray()
    started = time.monotonic()
    async with target.http.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        answer.raise_for_status()
        async for piece in answer.aiter_raw():
            text += piece
    took = time.monotonic() - started
    assert len(re.findall(rb"^id: ", text, re.MULTILINE)) == count
    return count / took


@asynccontextmanager
async def target() -> AsyncIterator[Target]:
    """Run a broker and a gateway in a directory of their own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        root = Path(directory)
        pool = Pool(root=root / "pool", workspace=root / "workspace", replicas=0)
        async with (
            pool.running(),
            httpx.AsyncClient(
                base_url=pool.url,
                headers={"Authorization": f"Bearer {pool.token}"},
                timeout=60,
                trust_env=False,
            ) as http,
        ):
            password = (pool.root / "secrets" / "broker_gateway_password").read_text().strip()
            async with connect(
                pool.broker_url, user=GATEWAY_USER, password=password, name="bench"
            ) as bus:
                while True:
                    try:
                        if (await http.get("/ready")).status_code == httpx.codes.OK:
                            break
                    except httpx.TransportError:
                        pass
                    await asyncio.sleep(0.1)
                yield Target(pool, bus, await JobRecords.open(bus), http)


async def measure(given: argparse.Namespace) -> None:
    """Print all figures."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        async with target() as pool:
            rates: dict[str, list[float]] = {"floor: read without HTTP": [], "replay over HTTP": []}
            job_id, writer = await pool.begin()
            for _ in range(given.events - 3):
                await writer.append(line())
            await writer.append(ENDED)
            for _ in range(given.rounds):
                for name, read in zip(rates, (raw_rate, http_rate), strict=True):
                    rates[name].append(await read(pool, job_id, given.events))
            show(rates, unit="events/s")
            p50 = statistics.median(rates["replay over HTTP"])
            print(f"target: 20000 events/s, p50: {'met' if p50 >= 20_000 else 'MISSED'}\n")

            delays: dict[str, list[float]] = {}
            costs = []
            for name, readers, jobs, rate in (
                ("floor: one reader", 1, 1, 20),
                (f"{given.readers} readers, each of its job", given.readers, given.readers, 1),
                (f"{given.readers} readers of one job", given.readers, 1, 1),
            ):
                appends, delays[name], cost = await live(
                    pool, executor, readers=readers, jobs=jobs, seconds=given.seconds, rate=rate
                )
                # The broker hands out what it has written to its disk.
                delays[f"{name}: the append alone"] = appends
                costs.append(cost)
            show(delays, unit="ms", scale=1000)
            print("\n".join(costs))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--events", type=int, default=10_000, help="events of the replayed job")
    options.add_argument("--rounds", type=int, default=7, help="times that it is replayed")
    options.add_argument("--readers", type=int, default=1000, help="live readers")
    options.add_argument("--seconds", type=int, default=20, help="length of each live run")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(measure(options.parse_args()))


if __name__ == "__main__":
    main()
