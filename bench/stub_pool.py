"""A pool of processes whose agents are stubs, and what its broker hears of it.

`many_replicas.py` measures it. It needs no Docker; its replicas are started again as Swarm would.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from nats.aio.msg import Msg

from claude_jobs.broker import GATEWAY_USER
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.topology import EVENTS_STREAM, EVENTS_SUBJECTS, PRESENCE_BUCKET
from claude_jobs.contract.status import Replica
from claude_jobs.development import Pool

# Makes a process the first of a process table of its own, as the first of a container is.
OWN_TABLE = ("unshare", "--pid", "--mount-proc", "--fork", "--kill-child")
# An empty slot is filled after so many seconds, as `development.Pool` does.
RESTART_DELAY = 0.05


@dataclass
class Slots(Pool):
    """A pool that notes when each replica began and was gone.

    With `own_tables` a replica sees its own processes alone, as in a container. It reads the
    whole table again and again, so that without it all replicas pay for all others.
    """

    own_tables: bool = True
    began: dict[str, float] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)
    current: dict[str, str] = field(default_factory=dict)  # slot -> replica

    @property
    def wrapper(self) -> tuple[str, ...]:
        """What a replica's command is preceded by."""
        return OWN_TABLE if self.own_tables else ()

    async def _keep_running(self, name: str) -> None:
        if not name.startswith("replica-"):
            await super()._keep_running(name)
        while True:
            environment = self._environment(name)
            replica = environment["REPLICA_NAME"]
            self.began[replica] = time.time()
            with (self.root / "replicas.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *self.wrapper,
                    *(sys.executable, "-m", "claude_jobs", "replica"),
                    env=environment,
                    stderr=log,
                )
            self.processes[name], self.current[name] = process, replica
            try:
                await process.wait()
            except asyncio.CancelledError:
                self._kill(process)
                await process.wait()
                raise
            self.gone[replica] = time.time()
            await asyncio.sleep(RESTART_DELAY)

    def _kill(self, process: Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            # With the first process of a table go all others, and it goes last.
            below = psutil.Process(process.pid).children() if self.own_tables else []
            (below[0] if below else process).kill()


@dataclass
class Watch:
    """What the broker heard and when, by its clock: of a replica by its name, of a job by its id.

    `pulled` is when the replica itself says that it got the job.
    """

    idle: dict[str, float] = field(default_factory=dict)
    pulled: dict[tuple[str, str], float] = field(default_factory=dict)  # job, replica
    connected: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    replica: dict[str, str] = field(default_factory=dict)  # of a job
    busy: dict[str, str] = field(default_factory=dict)  # replica -> job
    handed_out: set[str] = field(default_factory=set)
    failed: int = 0
    recovered: int = 0
    twice: int = 0  # how often a job was handed to one more replica
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def event(self, message: Msg) -> None:
        """Take an event of a job."""
        at, job_id = message.metadata.timestamp.timestamp(), message.subject.rpartition(".")[2]
        event = json.loads(message.data)
        match event["type"]:
            case "connected":
                self.connected[job_id], self.replica[job_id] = at, event["replica"]
            case "completed":
                self.ended[job_id] = at
            case "error":
                self.ended[job_id] = at
                self.failed += 1
            case "recovering":
                self.recovered += 1
        self._news.set()

    async def announcement(self, message: Msg) -> None:
        """Take what a replica says of itself; a good-bye says nothing."""
        if not message.data:
            return
        said = Replica.model_validate_json(message.data)
        if said.job_id is not None:
            # The broker keeps the last word alone: who gets a job at once is not seen idle.
            self.idle.setdefault(said.replica, said.since.timestamp())
            if self.busy.get(said.replica) != said.job_id:
                self.twice += said.job_id in self.handed_out
                self.handed_out.add(said.job_id)
                self.pulled[said.job_id, said.replica] = said.since.timestamp()
            self.busy[said.replica] = said.job_id
        else:
            self.busy.pop(said.replica, None)  # it has given the job back
            self.idle.setdefault(said.replica, message.metadata.timestamp.timestamp())
        self._news.set()

    async def until(self, reached: Callable[[], bool], *, seconds: float = 900) -> None:
        """Wait until something is so that the broker hears of."""
        async with asyncio.timeout(seconds):
            while not reached():
                self._news.clear()
                # Some of what is waited for, such as a process that ends, is no news here.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), 0.5)


@dataclass(frozen=True)
class Target:
    """The pool that is measured, the bus behind it, and what is heard there."""

    pool: Slots
    bus: Bus
    http: httpx.AsyncClient
    watch: Watch

    async def idle(self) -> None:
        """Wait until every slot holds an idle replica."""

        def all_idle() -> bool:
            now = self.pool.current.values()
            return len(now) == self.pool.replicas and all(
                each in self.watch.idle and each not in self.watch.busy for each in now
            )

        await self.watch.until(all_idle)

    def server(self, name: str) -> psutil.Process:
        """Return the process of the gateway or of the broker."""
        return psutil.Process(self.pool.processes[name].pid)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of all replicas, their watchdogs among them."""
        found: list[psutil.Process] = []
        for slot in self.pool.current:
            top = psutil.Process(self.pool.processes[slot].pid)
            found += [*([] if self.pool.own_tables else [top]), *top.children(recursive=True)]
        return found


async def _listen(
    bus: Bus, stream: str, subject: str, take: Callable[[Msg], Awaitable[None]]
) -> None:
    """Let the broker send each new message of a stream."""
    inbox = bus.nats.new_inbox()
    await bus.nats.subscribe(inbox, cb=take, pending_msgs_limit=0, pending_bytes_limit=0)
    config = {
        "filter_subject": subject,
        "deliver_policy": "new",
        "deliver_subject": inbox,
        "ack_policy": "none",
        "mem_storage": True,
    }
    wish = json.dumps({"stream_name": stream, "config": config}).encode()
    answer = await bus.nats.request(f"$JS.API.CONSUMER.CREATE.{stream}", wish)
    assert "error" not in json.loads(answer.data), answer.data


@contextmanager
def _directory() -> Iterator[Path]:
    """Make a pool's directory with the stub where the pool itself would put Claude Code."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        root.chmod(0o711)  # agents, another user when this is root, reach what lies below it
        (root / "pool").mkdir()
        stub = root / "pool" / "claude"
        shutil.copy(Path(__file__).with_name("stub_claude"), stub)
        stub.chmod(0o755)
        yield root


@asynccontextmanager
async def running(*, replicas: int, own_tables: bool = True) -> AsyncIterator[Target]:
    """Run a pool in a directory of its own, and end it. It need not be idle yet."""
    with _directory() as root:
        stub = root / "pool" / "claude"
        pool = Slots(
            root=root / "pool",
            workspace=root / "workspace",
            replicas=replicas,
            credentials='{"apiKey": "the stub needs none"}',
            settings={"CLAUDE_PATH": str(stub), "LOG_LEVEL": "error"},
            own_tables=own_tables and os.geteuid() == 0,
        )
        headers = {"Authorization": f"Bearer {pool.token}"}
        async with (
            pool.running(),
            httpx.AsyncClient(
                base_url=pool.url, headers=headers, timeout=60, trust_env=False
            ) as http,
        ):
            password = (pool.root / "secrets" / "broker_gateway_password").read_text().strip()
            async with connect(
                pool.broker_url, user=GATEWAY_USER, password=password, name="bench"
            ) as bus:
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if (await http.get("/ready")).status_code == httpx.codes.OK:
                            break
                    await asyncio.sleep(0.1)
                watch = Watch()
                await _listen(bus, EVENTS_STREAM, EVENTS_SUBJECTS, watch.event)
                await _listen(
                    bus,
                    f"KV_{PRESENCE_BUCKET}",
                    f"$KV.{PRESENCE_BUCKET}.>",
                    watch.announcement,
                )
                try:
                    yield Target(pool, bus, http, watch)
                except TimeoutError:
                    sys.stderr.write((pool.root / "replicas.log").read_text()[-4000:])
                    raise
