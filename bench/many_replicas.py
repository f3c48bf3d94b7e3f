"""Where a pool of many replicas bends on one machine, and whether it is the queue that bends.

The pool runs at each size in turn, as processes of this machine. `stub_claude` stands in for
Claude Code and does nothing, so that what is left is the pool's own cost. A replica is used up by
one job: the floor is how fast this machine starts such processes at all.

At first the queue alone is measured. Clients in one process take jobs and end them with the
replica's own classes, and no process is started.
"""

import argparse
import asyncio
import contextlib
import os
import random
import resource
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import psutil
from httpx_sse import EventSource
from readers import ENDED
from stub_pool import Target, Watch, running
from target import show

from claude_jobs.broker import REPLICA_USER
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.queue import JobQueue, Lease
from claude_jobs.contract.event import Connected, Queued
from claude_jobs.contract.job import Job, JobRequest

CORES = os.cpu_count() or 1
MIB = 2**20
# What a replica loads, and a moment later for its agent.
LOAD = (
    "import os, claude_jobs.replica.supervisor; from claude_jobs.agent.sdk import load_sdk;"
    "load_sdk(); import claude_jobs.agent.run; os._exit(0)"
)
# How long an idle pool is watched, in seconds: five announcements of each replica.
IDLE_SECONDS = 10
# A replica that is idle loads the agent's modules. When all of them together take less than this
# share of a CPU, they have.
LOADED = 0.3
# Jobs that are counted at least, where the pool is smaller than that.
SHORT_JOBS = 40
LONG_JOBS = 20
# Processes that are started for the floor, as many at a time as there are cores.
STARTS = 20
# The queue alone: jobs that are handed out one at a time, and jobs that wait all at once.
SINGLE_JOBS = 200
WAITING_JOBS = 900


@dataclass
class Summary:
    """Figures of each size of the pool, in the order in which the sizes are measured."""

    sizes: list[int]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Add a figure of the size at hand."""
        self.figures.setdefault(name, []).append(value)

    def show(self) -> None:
        """Print each figure, and how many times the first size's it is."""
        width = max(len(name) for name in self.figures)
        print(f"{'':{width}}  " + "".join(f"{size:9}        " for size in self.sizes))
        for name, values in self.figures.items():
            cells = (
                f"{value:9.2f} {f'x{value / values[0]:.2f}' if values[0] else '':7}"
                for value in values
            )
            print(f"{name:{width}}  " + "".join(cells))


@dataclass(frozen=True)
class Usage:
    """Seconds of CPU so far: the whole machine's, the gateway's, the broker's, this process's."""

    at: float
    machine: float
    gateway: float
    broker: float
    own: float

    @classmethod
    def of(cls, target: Target) -> "Usage":
        """Read them."""
        times = psutil.cpu_times()
        return cls(
            time.time(),
            times.user + times.nice + times.system + times.irq + times.softirq,
            cpu(target.server("gateway")),
            cpu(target.server("broker")),
            time.process_time(),
        )

    def __sub__(self, before: "Usage") -> "Usage":
        return Usage(
            self.at - before.at,
            self.machine - before.machine,
            self.gateway - before.gateway,
            self.broker - before.broker,
            self.own - before.own,
        )


def cpu(process: psutil.Process) -> float:
    """Return how many seconds of CPU a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def note(what: str) -> None:
    """Say how far the measuring is, beside the figures."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")


def p99(samples: Iterable[float]) -> float:
    """Return the value that one in a hundred exceeds."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


async def idle_cost(target: Target, summary: Summary) -> None:
    """Measure what the pool takes while it has nothing to do."""
    replicas = target.replicas()
    share = 1.0
    while share > LOADED:
        before, of_replicas = Usage.of(target), sum(map(cpu, replicas))
        await asyncio.sleep(2)
        share = (sum(map(cpu, replicas)) - of_replicas) / (Usage.of(target) - before).at
    before, of_replicas = Usage.of(target), sum(map(cpu, replicas))
    await asyncio.sleep(IDLE_SECONDS)
    used = Usage.of(target) - before
    of_replicas = sum(map(cpu, replicas)) - of_replicas
    memory = sum(each.memory_full_info().pss for each in replicas)
    count = target.pool.replicas
    summary.add("idle: MiB of each replica and its watchdog", memory / count / MIB)
    summary.add("idle: MiB of the pool", memory / MIB)
    for name in ("gateway", "broker"):
        summary.add(f"idle: MiB of the {name}", target.server(name).memory_full_info().pss / MIB)
    summary.add("idle: replicas, % of a CPU", of_replicas / used.at * 100)
    summary.add("idle: broker, % of a CPU", used.broker / used.at * 100)
    summary.add("idle: gateway, % of a CPU", used.gateway / used.at * 100)


async def dispatch(target: Target, jobs: int) -> list[float]:
    """Send one job at a time to an idle pool; return the times until `connected` was read."""
    delays = []
    for _ in range(jobs):
        await target.idle()
        await asyncio.sleep(0.7)  # the newest replica loads the agent's modules
        sent = time.monotonic()
        async with target.http.stream(
            "POST", "/api/execute", json={"prompt": "sleep 0 s"}
        ) as answer:
            answer.raise_for_status()
            async for event in EventSource(answer).aiter_sse():
                if event.event == "connected":
                    delays.append(time.monotonic() - sent)
        assert event.event == "completed", event
    return delays


async def submit(target: Target, seconds: list[float]) -> None:
    """Queue one job of each length, a few at a time."""
    left = deque(seconds)

    async def send() -> None:
        while left:
            answer = await target.http.post(
                "/api/execute",
                json={"prompt": f"sleep {left.popleft():.3g} s"},
                headers={"Prefer": "respond-async"},
            )
            answer.raise_for_status()

    await asyncio.gather(*(send() for _ in range(8)))


async def throughput(
    target: Target, summary: Summary, *, work: float, floor: float
) -> dict[str, list[float]]:
    """Let the pool work a full queue off; return where each counted job's time went.

    The jobs take `work` seconds on average, half more or less. As many as there are replicas
    come first and are not counted: those replicas waited, loaded, for this moment.
    """
    count, watch = target.pool.replicas, target.watch
    counted = max(LONG_JOBS if work else SHORT_JOBS, count)
    dice = random.Random(1)
    seconds = [dice.uniform(0.5, 1.5) * work for _ in range(count + counted)]
    done, faults = len(watch.ended), faults_of(watch)

    def started() -> int:
        return len(watch.connected) - done

    await asyncio.gather(submit(target, seconds), watch.until(lambda: started() >= count))
    before = Usage.of(target)
    await watch.until(lambda: started() == len(seconds))
    used = Usage.of(target) - before
    await watch.until(lambda: len(watch.ended) - done == len(seconds))
    order = sorted(watch.connected, key=watch.connected.__getitem__)[-counted - 1 :]
    rate = counted / (watch.connected[order[-1]] - watch.connected[order[0]])
    await watch.until(lambda: all(watch.replica[job] in target.pool.gone for job in order))
    best = min(floor, count / work) if work else floor
    name = f"jobs of {work:g} s"
    summary.add(f"{name}: jobs/s", rate)
    summary.add(f"{name}: of what processes and slots allow", rate / best)
    summary.add(f"{name}: machine, CPU seconds a job", used.machine / used.at / rate)
    summary.add(f"{name}: broker, CPU ms a job", used.broker / used.at / rate * 1000)
    summary.add(f"{name}: gateway, CPU ms a job", used.gateway / used.at / rate * 1000)
    for fault, number in faults_of(watch).items():
        summary.add(f"{name}: {fault}", number - faults[fault])
    return times_of(target, order[1:])


def faults_of(watch: Watch) -> dict[str, int]:
    """Return how often a job has not gone its straight way so far."""
    return {
        "failed": watch.failed,
        "went on elsewhere": watch.recovered,
        "handed out once more": watch.twice,
    }


def times_of(target: Target, jobs: Iterable[str]) -> dict[str, list[float]]:
    """Follow each of these jobs through its replica's life."""
    watch, pool = target.watch, target.pool
    times: dict[str, list[float]] = {}
    for job in jobs:
        replica = watch.replica[job]
        moments = {
            "begin": pool.began[replica],
            "idle": watch.idle[replica],
            "has the job": watch.pulled[job, replica],
            "connected": watch.connected[job],
            "end of job": watch.ended[job],
            "gone": pool.gone[replica],
        }
        names = list(moments)
        for earlier, later in pairwise(names):
            times.setdefault(f"{earlier} -> {later}", []).append(moments[later] - moments[earlier])
    return times


async def load_rate(target: Target) -> float:
    """Start processes that only load what a replica and its agent need. Starts per second."""
    left = STARTS
    command = (*target.pool.wrapper, sys.executable, "-c", LOAD)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONSAFEPATH": "1",
    }

    async def slot() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            try:
                assert await process.wait() == 0
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    began = time.monotonic()
    await asyncio.gather(*(slot() for _ in range(CORES)))
    return STARTS / (time.monotonic() - began)


async def measure_pool(given: argparse.Namespace, summary: Summary, replicas: int) -> None:
    """Print where the time of jobs goes in a pool of this size; the rest is for the summary."""
    async with running(replicas=replicas, own_tables=not given.one_table) as target:
        await target.idle()
        note(f"{replicas} replicas are idle")
        took = max(target.watch.idle.values()) - min(target.pool.began.values())
        summary.add("cold start: replicas that become idle, per s", replicas / took)
        await idle_cost(target, summary)
        note("one job at a time")
        delays = await dispatch(target, given.jobs)
        summary.add("POST -> connected, p50 ms", statistics.median(delays) * 1000)
        summary.add("POST -> connected, p99 ms", p99(delays) * 1000)
        await target.idle()
        note("how fast processes start")
        # Beside an idle pool, whose share of the machine is small.
        floor = await load_rate(target)
        summary.add("floor: processes that load the same, starts/s", floor)
        rows = {"POST -> connected": delays}
        for work in given.work:
            note(f"a full queue of jobs of {work:g} s")
            for name, samples in (
                await throughput(target, summary, work=work, floor=floor)
            ).items():
                rows[f"jobs of {work:g} s: {name}"] = samples
    print(f"\n{replicas} replicas")
    show(rows, unit="ms", scale=1000)


@dataclass(frozen=True)
class Client:
    """What a replica does with the broker for one job, and nothing else."""

    number: int
    queue: JobQueue
    events: EventLog

    async def run(self, lease: Lease) -> None:
        """Begin a job, end it, and take it off the queue."""
        job_id = lease.job.id
        writer = await self.events.writer(job_id)
        name = f"client-{self.number}"
        await writer.append(
            Connected(job_id=job_id, session_id="s", replica=name, node="bench", attempt=1)
        )
        await writer.append(ENDED)
        await lease.finish()


async def accept(bus: Bus) -> str:
    """Put a job into the queue as the gateway does, and return its id."""
    job = Job.accept(JobRequest(prompt="x"), client="bench")
    await EventLog(bus).begin(job.id).append(Queued(job_id=job.id, position=1))
    await JobQueue(bus).submit(job)
    return job.id


async def measure_queue(summary: Summary, clients: int) -> dict[str, list[float]]:
    """Let clients of one process take jobs: one at a time, then a full queue."""
    async with running(replicas=0) as target, AsyncExitStack() as stack:
        secret = target.pool.root / "secrets" / "broker_replica_password"
        password = secret.read_text().strip()
        takers = []
        for number in range(clients):
            bus = await stack.enter_async_context(
                connect(
                    target.pool.broker_url,
                    user=REPLICA_USER,
                    password=password,
                    name=f"client {number}",
                )
            )
            takers.append(Client(number, JobQueue(bus), EventLog(bus)))
        singles: list[float] = []
        turns: list[float] = []
        sent = 0.0
        over = asyncio.Event()

        async def take_singles(taker: Client) -> None:
            while True:
                lease = await taker.queue.pull()
                singles.append(time.monotonic() - sent)
                await taker.run(lease)
                over.set()

        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(take_singles(taker)) for taker in takers]
            await asyncio.sleep(0.5)
            for _ in range(SINGLE_JOBS):
                over.clear()
                sent = time.monotonic()
                await accept(target.bus)
                await over.wait()
            for task in waiting:
                task.cancel()

        for _ in range(WAITING_JOBS):
            await accept(target.bus)
        left = WAITING_JOBS

        async def take_all(taker: Client) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                asked = time.monotonic()
                lease = await taker.queue.pull()
                turns.append(time.monotonic() - asked)
                await taker.run(lease)

        before = Usage.of(target)
        await asyncio.gather(*map(take_all, takers))
        used = Usage.of(target) - before
        summary.add("a full queue: jobs/s", WAITING_JOBS / used.at)
        summary.add("a full queue: broker, CPU ms a job", used.broker / WAITING_JOBS * 1000)
        summary.add("a full queue: clients, CPU ms a job", used.own / WAITING_JOBS * 1000)
        summary.add("a full queue: clients, % of a CPU", used.own / used.at * 100)
        summary.add("submit -> pulled, p50 ms", statistics.median(singles) * 1000)
        summary.add("submit -> pulled, p99 ms", p99(singles) * 1000)
        return {
            f"{clients} clients: submit -> pulled, one job at a time": singles,
            f"{clients} clients: pull of a full queue": turns,
        }


async def measure(given: argparse.Namespace) -> None:
    """Print all figures."""
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    foreign = await asyncio.to_thread(psutil.cpu_percent, 2)
    print(f"{CORES} cores, of which others use {foreign:.0f} % at the start", flush=True)
    if given.one_table or os.geteuid() != 0:
        print("All replicas share one process table, as they never do in containers.")
    pools, queues = Summary(given.replicas), Summary(given.replicas)
    try:
        if not given.no_queue:
            rows: dict[str, list[float]] = {}
            for clients in given.replicas:
                note(f"the queue alone, {clients} clients")
                rows |= await measure_queue(queues, clients)
            print("\nThe queue alone")
            show(rows, unit="ms", scale=1000)
            queues.show()
        for replicas in given.replicas if not given.no_pool else ():
            await measure_pool(given, pools, replicas)
    finally:
        # Also of a run that was cut short.
        if pools.figures:
            print("\nThe pool, with figures against those of the first size")
            pools.show()
            print()
            read(pools, queues, given)


def read(pools: Summary, queues: Summary, given: argparse.Namespace) -> None:
    """Say in words what the figures say."""
    floors = pools.figures.get("floor: processes that load the same, starts/s", [])
    for replicas, floor in zip(given.replicas, floors, strict=False):
        print(
            f"{replicas:4} replicas: this machine starts {floor:.1f} such processes a second, "
            f"so jobs must last {replicas / floor:.0f} s on average for all to be busy."
        )
    if queues.figures and floors:
        broker = queues.figures["a full queue: broker, CPU ms a job"][-1] / 1000
        print(
            f"The queue with {given.replicas[-1]} clients takes {broker * 1000:.1f} ms of the "
            f"broker's CPU for a job: {1 / broker / floors[-1]:.0f} times what one CPU must do "
            "for the processes to be the limit."
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--replicas", type=int, nargs="+", default=[5, 25, 50, 100])
    options.add_argument(
        "--work", type=float, nargs="+", default=[0, 5], help="lengths of the jobs, in seconds"
    )
    options.add_argument("--jobs", type=int, default=20, help="jobs that are sent one at a time")
    options.add_argument(
        "--one-table",
        action="store_true",
        help="let replicas see all processes of the machine, as without Docker",
    )
    options.add_argument("--no-queue", action="store_true", help="leave out the queue alone")
    options.add_argument("--no-pool", action="store_true", help="measure the queue alone")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(measure(options.parse_args()))


if __name__ == "__main__":
    main()
