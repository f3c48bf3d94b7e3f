"""A pool whose processes are threads: each can be stopped, cut off or killed at a chosen word.

Gateways and replicas are the real ones, on a real broker. The times that they wait are about a
twentieth of the real ones, in the same proportions; agents follow scripts.
"""

import asyncio
import contextlib
import json
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from aiohttp import web
from faulty_wire import Delivery, Fault, FaultyWire, Kind, Until
from job_scripts import AgentScript, JobScript
from nats_server import PASSWORDS
from pydantic import SecretStr
from scripted_agent import HOST, AgentRun, Notebook, run_agent

from claude_jobs.agent import run as agent_module
from claude_jobs.agent.guard import Watchdog
from claude_jobs.broker import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus import connection, queue
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog, LoggedEvent
from claude_jobs.bus.topology import Bounds
from claude_jobs.contract.event import Connected
from claude_jobs.contract.status import ReplicaStatus
from claude_jobs.gateway import app as gateway_module
from claude_jobs.gateway import settlement
from claude_jobs.gateway.app import create_app
from claude_jobs.replica import attempt, recovery, supervisor, tenure
from claude_jobs.replica.supervisor import Supervisor
from claude_jobs.settings import GatewaySettings, ReplicaSettings

TOKEN = "token-of-the-state-tests"
MAX_ATTEMPTS = 3
BOUNDS = Bounds(lease=timedelta(seconds=1), presence=timedelta(seconds=1))
LEASE = BOUNDS.lease.total_seconds()
_WHOLE_REPLICAS = 3
# A fault that waits for something that does not come ends after so many seconds.
_LONGEST_FAULT = 5.0
_SHORT_FAULT = 0.2
_ENDED_WITHIN = 10.0


@contextmanager
def fast_times() -> Iterator[None]:
    """Let the processes wait for a twentieth of the time, and agents follow scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "ANNOUNCE_EVERY", 0.1)
        patch.setattr(recovery, "_SIGN_OF_LIFE", 0.15)
        patch.setattr(queue, "REQUEST_TIMEOUT", 0.5)
        patch.setattr(connection, "REQUEST_TIMEOUT", 0.5)
        patch.setattr(connection, "_RECONNECT_WAIT", 0.025)
        patch.setattr(attempt, "_HELD_DELAY", 0.25)
        patch.setattr(tenure, "_RETRY_EVERY", 0.0125)
        patch.setattr(settlement, "_TIME_FOR_THE_WRITER", timedelta(seconds=1.5))
        patch.setattr(gateway_module, "Bounds", partial(Bounds, presence=BOUNDS.presence))
        # The real ones are for all that descends from this process, its broker among it.
        patch.setattr(supervisor, "watchdog", _notebook)
        patch.setattr(supervisor, "orphans_reaped", _nothing)
        patch.setattr(agent_module, "run_agent", run_agent)
        yield


@asynccontextmanager
async def _notebook() -> AsyncIterator[Watchdog]:
    yield HOST.get().notebook


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


class ThreadedProcess:
    """Runs `main` in a thread with an event loop of its own."""

    def __init__(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._main = main
        self._loop = asyncio.new_event_loop()
        self._go_on = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self.fault: Exception | None = None
        self._thread.start()

    @property
    def lives(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stand still between two steps of the loop, as SIGSTOP lets a process do anywhere."""
        self._go_on.clear()
        self._call(self._go_on.wait)

    def go_on(self) -> None:
        self._go_on.set()

    async def kill(self) -> None:
        """End it. Its wire must be down: nobody hears what it does while its tasks end."""
        self.go_on()
        async with asyncio.timeout(_ENDED_WITHIN):
            while self.lives:
                self._call(self._cancel_all)
                await asyncio.sleep(0.01)

    def _call(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(function)

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _live(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except asyncio.CancelledError:
            pass
        except Exception as fault:
            self.fault = fault
        finally:
            while rest := asyncio.all_tasks(self._loop):
                self._cancel_all()
                self._loop.run_until_complete(asyncio.wait(rest, timeout=0.1))
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


class Gateway:
    """One gateway on a wire of its own."""

    def __init__(self, wire: FaultyWire, workspace: Path) -> None:
        self.wire = wire
        self._settings = GatewaySettings(
            broker_url=wire.url,
            broker_gateway_password=PASSWORDS[GATEWAY_USER],
            api_tokens=json.dumps({"tests": TOKEN}),
            workspace_dir=workspace,
            lease_seconds=LEASE,
        )
        self._bound = threading.Event()
        self._port = 0
        self.process = ThreadedProcess(self._live)

    async def url(self) -> str:
        """Its address, once it has one."""
        await asyncio.to_thread(self._bound.wait)
        return f"http://127.0.0.1:{self._port}"

    async def _live(self) -> None:
        app = create_app(self._settings)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
            self._bound.set()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


class Replica:
    """One replica on a wire of its own."""

    def __init__(self, pool: "ThreadedPool", name: str, wire: FaultyWire) -> None:
        self.name = name
        self.wire = wire
        self.notebook = Notebook()
        self.died: float | None = None
        self._pool = pool
        self._supervisor = Supervisor(
            ReplicaSettings(
                broker_url=wire.url,
                broker_replica_password=PASSWORDS[REPLICA_USER],
                claude_code_credentials_json=SecretStr('{"apiKey": "none"}'),
                claude_path=pool.workspace / "no-program",
                agent_home=pool.workspace,
                workspace_dir=pool.workspace,
                replica_name=name,
                node_name="here",
                lease_seconds=LEASE,
                max_attempts=MAX_ATTEMPTS,
            )
        )
        self.process = ThreadedProcess(self._live)

    @property
    def is_idle(self) -> bool:
        return self._supervisor._state.status is ReplicaStatus.IDLE

    def begin_agent(self, job: str) -> tuple[AgentRun, AgentScript]:
        runs, scripts = self._pool.runs[job], self._pool.scripts[job].agents
        run = AgentRun(len(runs) + 1, self.name, Watchdog.clock())
        runs.append(run)
        return run, scripts[len(runs) - 1] if len(runs) <= len(scripts) else AgentScript()

    async def _live(self) -> None:
        HOST.set(self)
        await self._supervisor._take_one_job()


@dataclass
class History:
    """What a job's log has held so far."""

    events: list[LoggedEvent] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)  # when each of them was read
    ended: float | None = None  # when its end was read
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def has_ended(self) -> bool:
        return self.ended is not None

    async def follow(self, log: EventLog, job_id: str) -> None:
        async with aclosing(log.read(job_id)) as events:
            async for logged in events:
                async with self._changed:
                    self.events.append(logged)
                    self.seen.append(Watchdog.clock())
                    if logged.is_terminal:
                        self.ended = Watchdog.clock()
                    self._changed.notify_all()

    async def until(self, condition: Callable[[], bool], *, at_most: float) -> None:
        """Wait for a condition on the events, or for so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most), self._changed:
                await self._changed.wait_for(condition)

    def is_taken_from(self, replica: str) -> bool:
        return self.has_ended or any(
            isinstance(logged.event, Connected) and logged.event.replica != replica
            for logged in self.events
        )


class ThreadedPool:
    """Three whole replicas at any time, beside those that a fault has struck.

    `scripts` says by a job's name (`name` in its metadata) what strikes the replicas that the
    job is handed to and what its agents do; `runs` tells what they did.
    """

    def __init__(self, broker_port: int, workspace: Path, ends: tuple[Bus, Bus]) -> None:
        self.workspace = workspace
        self.scripts: dict[str, JobScript] = {}
        self.runs: dict[str, list[AgentRun]] = defaultdict(list)
        self.replicas: dict[str, Replica] = {}
        self.log = EventLog(ends[0])
        self._broker_port = broker_port
        self._as_replica = ends[1]
        self._deliveries: dict[str, int] = defaultdict(int)
        self._histories: dict[str, History] = {}
        self._gateways: list[Gateway] = []
        self._struck: set[str] = set()
        self._faults: set[asyncio.Task[None]] = set()
        self._for_ever: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._for_ever.append(asyncio.create_task(self._keep_replicas()))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tasks = [*self._for_ever, *self._faults]
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        everybody: list[Gateway | Replica] = [*self._gateways, *self.replicas.values()]
        for each in everybody:
            each.wire.down()
        for each in everybody:
            await each.process.kill()
        for replica in self.replicas.values():
            replica.notebook.close()
        failed = [end for end in ends if isinstance(end, Exception)]
        if failed and error is None:
            raise failed[0]

    async def gateway(self) -> Gateway:
        """Start a gateway; it lives as long as the pool."""
        wire = FaultyWire(self._broker_port)
        await wire.up()
        gateway = Gateway(wire, self.workspace)
        wire.struck = lambda fault: self._do(self._strike_gateway(gateway, fault))
        self._gateways.append(gateway)
        return gateway

    def history(self, job_id: str) -> History:
        """Return what a job's log has held; it grows by itself."""
        if job_id not in self._histories:
            history = self._histories[job_id] = History()
            self._for_ever.append(asyncio.create_task(history.follow(self.log, job_id)))
        return self._histories[job_id]

    def allowed(self, run: AgentRun) -> list[tuple[float, float]]:
        """Return the spans in which an agent ran and was allowed to."""
        replica = self.replicas[run.replica]
        ends = [each for each in (run.ended, replica.died) if each is not None]
        return replica.notebook.allowed(run.began, min(ends, default=float("inf")))

    async def settled(self) -> None:
        """Wait until all faults are over and no replica has work."""
        async with asyncio.timeout(_LONGEST_FAULT + _ENDED_WITHIN):
            await asyncio.gather(*self._faults)
            while any(
                replica.process.lives and not replica.is_idle for replica in self.replicas.values()
            ):
                await asyncio.sleep(0.02)

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        self._faults.add(asyncio.create_task(what))

    async def _keep_replicas(self) -> None:
        while True:
            whole = [
                name
                for name, replica in self.replicas.items()
                if replica.process.lives and name not in self._struck
            ]
            for _ in range(len(whole), _WHOLE_REPLICAS):
                await self._start_replica()
            await asyncio.sleep(0.02)

    async def _start_replica(self) -> None:
        wire = FaultyWire(self._broker_port)
        await wire.up()
        replica = Replica(self, f"replica-{len(self.replicas)}", wire)
        self.replicas[replica.name] = replica
        handed: list[Delivery] = []

        def delivered(delivery: Delivery) -> None:
            handed.append(delivery)
            wire.arm(self._next_fault(delivery))

        wire.delivered = delivered
        wire.struck = lambda fault: self._do(self._strike(replica, handed[-1], fault))

    def _next_fault(self, delivery: Delivery) -> Fault | None:
        name = json.loads(delivery.job)["request"]["metadata"]["name"]
        number = self._deliveries[name]
        self._deliveries[name] += 1
        faults = self.scripts[name].faults
        return faults[number] if number < len(faults) else None

    async def _strike(self, replica: Replica, delivery: Delivery, fault: Fault) -> None:
        match fault.kind:
            case Kind.CRASH:
                replica.died = Watchdog.clock()
                await replica.process.kill()
            case Kind.REDELIVER:
                await self._as_replica.nats.publish(delivery.lease, b"-NAK")
            case _:
                self._struck.add(replica.name)
                history = self.history(json.loads(delivery.job)["id"])
                if fault.kind is Kind.STOP:
                    replica.process.stop()
                await self._wait(fault, history, replica.name)
                replica.wire.resume()
                replica.process.go_on()
                self._struck.discard(replica.name)

    async def _strike_gateway(self, gateway: Gateway, fault: Fault) -> None:
        match fault.kind:
            case Kind.CRASH:
                await gateway.process.kill()
            case Kind.STOP | Kind.STALL | Kind.CUT:
                if fault.kind is Kind.STOP:
                    gateway.process.stop()
                await asyncio.sleep(_SHORT_FAULT if fault.until is Until.SOON else 2.0)
                gateway.wire.resume()
                gateway.process.go_on()

    async def _wait(self, fault: Fault, history: History, replica: str) -> None:
        match fault.until:
            case Until.SOON:
                await asyncio.sleep(_SHORT_FAULT)
            case Until.TAKEN:
                await history.until(lambda: history.is_taken_from(replica), at_most=_LONGEST_FAULT)
            case Until.ENDED:
                await history.until(lambda: history.has_ended, at_most=_LONGEST_FAULT)
