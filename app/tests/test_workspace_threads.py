"""A file server that is away holds up what needs its files, and nothing else."""

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from pool_client import EventStream, RunningPool, running_pool
from stalling_file_system import StallingDirectory, stalling_directory

from claude_jobs.agent.command import in_directory
from claude_jobs.agent.transport import AgentProcess
from claude_jobs.workspace_threads import PATIENCE, WorkspaceStalledError, WorkspaceThreads

pytestmark = pytest.mark.timeout(90)

# Far above what answers at once take on a busy machine, far below what is waited for a file server.
AT_ONCE = PATIENCE / 2
LEASE = 4


@pytest.fixture
def stalling() -> Iterator[StallingDirectory]:
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o711)
        directory = Path(base) / "workspace"
        directory.mkdir()
        with stalling_directory(directory) as mounted:
            yield mounted


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    async with asyncio.timeout(seconds):
        yield


# Threads


async def test_a_step_returns_what_it_returns_and_raises_what_it_raises(tmp_path: Path) -> None:
    threads = WorkspaceThreads(tmp_path)
    assert await threads.run(os.path.join, "a", "b") == "a/b"
    with pytest.raises(FileNotFoundError):
        await threads.run(os.stat, tmp_path / "nothing")


async def test_a_step_that_waits_for_the_file_server_is_given_up_and_the_next_at_once(
    stalling: StallingDirectory,
) -> None:
    threads = WorkspaceThreads(stalling.path, count=2)
    with stalling.stalled():
        async with within(PATIENCE + AT_ONCE):
            # More than there are threads for: some never begin.
            ended = await asyncio.gather(
                *(threads.run(os.listdir, stalling.path) for _ in range(8)), return_exceptions=True
            )
        assert [type(each) for each in ended] == [WorkspaceStalledError] * 8
        begun = threading.active_count()
        async with within(AT_ONCE):
            for _ in range(8):
                with pytest.raises(WorkspaceStalledError, match="does not answer"):
                    await threads.run(os.listdir, stalling.path)
        assert threading.active_count() == begun
    async with within(PATIENCE):
        while threads.stalled:
            await asyncio.sleep(0.01)
        assert await threads.run(os.listdir, stalling.path) == []


async def test_a_step_that_takes_long_is_waited_for_while_the_file_server_answers(
    tmp_path: Path,
) -> None:
    def delete_a_large_tree() -> str:
        time.sleep(PATIENCE + 1)
        return "deleted"

    assert await WorkspaceThreads(tmp_path).run(delete_a_large_tree) == "deleted"


async def test_a_step_that_gets_no_thread_is_given_up_and_never_done(tmp_path: Path) -> None:
    threads, done = WorkspaceThreads(tmp_path, count=1), threading.Event()
    first = asyncio.create_task(threads.run(done.wait))
    await asyncio.sleep(0)
    marks: list[int] = []
    with pytest.raises(WorkspaceStalledError, match="too much"):
        await threads.run(marks.append, 1)
    done.set()
    await first
    await threads.run(marks.append, 2)
    assert marks == [2]


@pytest.mark.parametrize("gives_up", ["the gateway", "the client"])
async def test_what_is_held_is_released_only_after_the_step_that_uses_it(
    stalling: StallingDirectory, gives_up: str
) -> None:
    threads, marks = WorkspaceThreads(stalling.path), list[str]()

    def use() -> None:
        os.statvfs(stalling.path)
        marks.append("used")

    async def hold() -> None:
        async with threads.holding(lambda: marks.append("released")) as steps:
            await steps.run(use)

    with stalling.stalled():
        holding = asyncio.create_task(hold())
        if gives_up == "the client":
            await asyncio.sleep(0.1)
            holding.cancel()
        with pytest.raises((WorkspaceStalledError, asyncio.CancelledError)):
            await holding
        assert not marks
    async with within(PATIENCE):
        while len(marks) < 2:
            await asyncio.sleep(0.01)
    assert marks == ["used", "released"]


async def test_what_is_held_is_released_before_anybody_goes_on(tmp_path: Path) -> None:
    threads, marks = WorkspaceThreads(tmp_path), list[str]()
    with pytest.raises(FileNotFoundError):
        async with threads.holding(lambda: marks.append("released")) as steps:
            await steps.run(os.stat, tmp_path / "nothing")
    assert marks == ["released"]


async def test_nothing_waits_for_an_agent_that_waits_for_its_directory(
    stalling: StallingDirectory,
) -> None:
    process = AgentProcess(in_directory(stalling.path, ["pwd"]), env={"PATH": os.defpath})
    with stalling.stalled():
        # Were it us who are held, nobody else would end it.
        stalling.go_on_in(AT_ONCE * 2)
        async with within(AT_ONCE):
            await process.connect()
            await asyncio.sleep(0.5)
        assert process.is_ready()
    assert await process.wait() == 0
    await process.close()


# A pool whose workspace stalls


@asynccontextmanager
async def stalling_pool(stalling: StallingDirectory, lease: int = 20) -> AsyncIterator[RunningPool]:
    settings = {"WORKSPACE_DIR": str(stalling.path), "LEASE_SECONDS": str(lease)}
    async with running_pool(replicas=1, settings=settings) as pool:
        yield pool


async def test_a_gateway_answers_while_the_file_server_is_away(
    stalling: StallingDirectory,
) -> None:
    async with stalling_pool(stalling) as pool:
        async with pool.job("say 10 bytes") as stream:
            await stream.ending()
            events = f"{stream.response.headers['Location']}/events"
        with stalling.stalled():

            async def refused(method: str, path: str) -> None:
                code, said, headers = await pool.refusal(
                    method=method, url=path, json={"prompt": "x"}
                )
                assert (code, said["code"]) == (503, "unavailable")
                assert "the workspace's file server does not answer" in said["error"]
                assert headers["Retry-After"] == "2"

            requests = [
                ("GET", "/api/files?list"),
                ("GET", "/api/files/x"),
                ("PUT", "/api/files/x"),
                ("DELETE", "/api/files/x"),
                ("POST", "/api/execute"),
            ]
            async with within(PATIENCE + AT_ONCE):
                await asyncio.gather(*(refused(*request) for request in requests * 10))
            async with within(AT_ONCE):
                for request in requests:
                    await refused(*request)
                for path in ("/health", "/ready", "/status", "/metrics", events):
                    assert (await pool.http.get(path)).status_code == 200, path
        async with within(PATIENCE):
            while (await pool.http.get("/api/files?list")).status_code != 200:
                await asyncio.sleep(0.05)
        assert (await pool.run("say 10 bytes")).type == "completed"


async def test_a_gateway_stops_though_the_file_server_is_away(
    stalling: StallingDirectory,
) -> None:
    async with stalling_pool(stalling) as pool:
        with stalling.stalled():
            assert (await pool.http.get("/api/files?list")).status_code == 503
            gateway = pool.pool.processes["gateway"]
            gateway.terminate()
            async with within(PATIENCE):
                await gateway.wait()


async def stay_alive(pool: RunningPool) -> None:
    """See the replica live for twice the time after which another one would have its job."""
    process = psutil.Process(pool.pool.processes["replica-0"].pid)
    address = f"http://127.0.0.1:{process.environ()['PORT']}"
    until = time.monotonic() + 2 * LEASE
    async with httpx.AsyncClient(trust_env=False, timeout=AT_ONCE) as http:
        while time.monotonic() < until:
            assert (await http.get(f"{address}/health")).status_code == 200
            assert (await http.get(f"{address}/status")).json()["status"] == "busy"
            await asyncio.sleep(0.5)


@asynccontextmanager
async def job_that_begins_in_a_stall(
    pool: RunningPool, stalling: StallingDirectory
) -> AsyncIterator[EventStream]:
    """Submit a job to a replica that comes to see it only when the file server is away."""
    replica = pool.pool.processes["replica-0"]
    replica.send_signal(signal.SIGSTOP)
    try:
        async with pool.job("say 10 bytes") as stream:
            await stream.until("queued")
            with stalling.stalled():
                replica.send_signal(signal.SIGCONT)
                await stream.until("connected")
                yield stream
    finally:
        # It ends after its job.
        with suppress(ProcessLookupError):
            replica.send_signal(signal.SIGCONT)


async def test_a_job_that_begins_while_the_file_server_is_away_waits_for_it(
    stalling: StallingDirectory,
) -> None:
    async with (
        stalling_pool(stalling, lease=LEASE) as pool,
        job_that_begins_in_a_stall(pool, stalling) as stream,
    ):
        await stay_alive(pool)
        stalling.go_on()
        assert (await stream.ending()).type == "completed"
        assert [event.type for event in stream.events].count("connected") == 1


async def test_a_job_that_waits_for_the_file_server_can_be_cancelled(
    stalling: StallingDirectory,
) -> None:
    async with (
        stalling_pool(stalling) as pool,
        job_that_begins_in_a_stall(pool, stalling) as stream,
    ):
        location = stream.response.headers["Location"]
        assert (await pool.http.post(f"{location}/cancel")).status_code == 202
        async with within(PATIENCE):
            assert (await stream.ending()).data["code"] == "cancelled"


async def test_a_job_under_which_the_file_server_goes_away_goes_on_with_it(
    stalling: StallingDirectory,
) -> None:
    async with (
        stalling_pool(stalling, lease=LEASE) as pool,
        # The agent comes to its directory within the stall, and far from its beginning: a busy
        # machine tells of a message late.
        pool.job("run sleep 6; ls") as stream,
    ):
        await stream.until("message")
        with stalling.stalled():
            await stay_alive(pool)
        assert (await stream.ending()).type == "completed"
        assert [event.type for event in stream.events].count("connected") == 1
