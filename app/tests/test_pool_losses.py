"""A job survives the loss of its replica, its agent, its gateway and its broker.

Real processes are killed or stopped; each test leaves a whole pool behind.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic

import httpx
import psutil
import pytest
import pytest_asyncio
from claude_agent_sdk import SessionKey, project_key_for_directory
from pool_client import (
    EventStream,
    ReceivedEvent,
    RunningPool,
    appears,
    connected_to_broker,
    running_pool,
)

from claude_jobs.broker import REPLICA_USER
from claude_jobs.bus.sessions import SessionLog

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

LEASE = 3.0
SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, *_):
        if name == "claude_jobs.agent.run":
            time.sleep(10)

sys.meta_path.insert(0, Slow())
"""
WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def losing() -> AsyncIterator[RunningPool]:
    """Three replicas and two gateways; a replica is given up after a few seconds."""
    settings = {"LEASE_SECONDS": f"{LEASE:g}", "MAX_ATTEMPTS": "2"}
    async with running_pool(replicas=3, gateways=2, settings=settings) as running:
        yield running


async def begun(
    pool: RunningPool, stream: EventStream, directory: str
) -> tuple[Process, psutil.Process]:
    """Wait until a job's agent works and its session is saved; returns its supervisor and it."""
    connected = await stream.until("connected")
    supervisor = pool.replica(connected)
    await appears(pool.workspace / directory / "started")
    # Claude Code saves what it does a moment after it began to do it.
    transcript: SessionKey = {
        "project_key": project_key_for_directory(pool.workspace / directory),
        "session_id": connected.data["sessionId"],
    }
    async with connected_to_broker(pool.pool, REPLICA_USER) as bus:
        while '"tool_use"' not in json.dumps(await SessionLog(bus).load(transcript)):
            await asyncio.sleep(0.02)
    return supervisor, await pool.agent(supervisor)


def attempts(stream: EventStream) -> list[ReceivedEvent]:
    return [event for event in stream.events if event.type == "connected"]


def outline(stream: EventStream) -> list[str]:
    """The types of the events, without the agent's own."""
    return [event.type for event in stream.events if event.type != "message"]


def is_over(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


CONTINUED = ["queued", "connected", "recovering", "connected", "completed"]


async def test_a_job_whose_replica_is_killed_is_continued_by_another(losing: RunningPool) -> None:
    async with losing.job(f"{WAIT_FOR_GO}\nrun touch second", workspace="lost") as stream:
        supervisor, agent = await begun(losing, stream, "lost")
        supervisor.kill()
        killed = monotonic()
        recovering = await stream.until("recovering")
        assert monotonic() - killed < LEASE + 15
        # Nothing runs side by side: the agent that was left behind is gone before.
        assert is_over(agent)
        ending = await stream.ending()
    assert outline(stream) == CONTINUED
    assert recovering.data["attempt"] == 2
    first, second = attempts(stream)
    assert first.data["replica"] in recovering.data["reason"]
    assert second.data["replica"] != first.data["replica"]
    assert (second.data["attempt"], second.data["resuming"]) == (2, True)
    assert second.data["sessionId"] == second.data["resumedFrom"] == first.data["sessionId"]
    assert ending.data["sessionId"] == first.data["sessionId"]
    assert (losing.workspace / "lost" / "second").exists()
    record = (await losing.http.get(stream.response.headers["Location"])).json()
    assert (record["status"], record["attempt"]) == ("completed", 2)
    assert record["replica"] == second.data["replica"]
    await losing.idle(3)


async def test_a_job_whose_agent_is_killed_is_continued_by_another(losing: RunningPool) -> None:
    async with losing.job(f"{WAIT_FOR_GO}\nrun touch second", workspace="killed") as stream:
        supervisor, agent = await begun(losing, stream, "killed")
        agent.kill()
        recovering = await stream.until("recovering")
        assert "the agent was killed" in recovering.data["reason"]
        assert await supervisor.wait() == 0
        await stream.ending()
    assert outline(stream) == CONTINUED
    assert (losing.workspace / "killed" / "second").exists()
    await losing.idle(3)


async def test_an_agent_whose_watchdog_is_killed_is_ended_and_the_job_continued(
    losing: RunningPool,
) -> None:
    async with losing.job(f"{WAIT_FOR_GO}\nrun touch second", workspace="unwatched") as stream:
        supervisor, agent = await begun(losing, stream, "unwatched")
        for child in psutil.Process(supervisor.pid).children():
            if child != agent:
                child.kill()
        assert "the watchdog was killed" in (await stream.until("recovering")).data["reason"]
        assert is_over(agent)
        await stream.ending()
    assert outline(stream) == CONTINUED
    await losing.idle(3)


async def test_a_job_is_not_begun_more_often_than_it_may_be(losing: RunningPool) -> None:
    async with losing.job(WAIT_FOR_GO, workspace="again") as stream:
        supervisor, _ = await begun(losing, stream, "again")
        supervisor.kill()
        losing.replica(await stream.until("connected")).kill()
        ending = await stream.ending()
    assert (ending.type, ending.data["code"]) == ("error", "worker_lost")
    assert "attempt 2" in ending.data["error"]
    assert outline(stream) == [*CONTINUED[:-1], "error"]
    await losing.idle(3)


async def test_a_replica_that_is_stopped_for_too_long_is_fenced(losing: RunningPool) -> None:
    prompt = f"run while :; do date +%s.%N >> ticks; sleep 0.02; done & {WAIT_FOR_GO[4:]}"
    async with losing.job(f"{prompt}\nrun touch second", workspace="stopped") as stream:
        supervisor, agent = await begun(losing, stream, "stopped")
        tool = agent.children(recursive=True)
        supervisor.send_signal(signal.SIGSTOP)
        recovering = await stream.until("recovering")
        # Nobody of the old attempt runs any more, though its supervisor could not do anything.
        assert {each.status() for each in (agent, *tool) if each.is_running()} == {
            psutil.STATUS_STOPPED
        }
        ticks = losing.workspace / "stopped" / "ticks"
        before = ticks.read_bytes()
        supervisor.send_signal(signal.SIGCONT)
        assert await supervisor.wait() == 0
        assert all(is_over(each) for each in (agent, *tool))
        assert ticks.read_bytes() == before
        (losing.workspace / "stopped" / "go").touch()
        await stream.ending()
    assert outline(stream) == CONTINUED
    first, second = attempts(stream)
    assert second.data["replica"] != first.data["replica"]
    assert recovering.data["attempt"] == 2
    await losing.idle(3)


async def test_a_replica_that_lost_the_broker_for_long_holds_its_agent_and_goes_on(
    losing: RunningPool,
) -> None:
    async with losing.job(f"{WAIT_FOR_GO}\nrun touch second", workspace="cut") as stream:
        supervisor, agent = await begun(losing, stream, "cut")
        broker = losing.pool.processes["broker"]
        password = losing.pool.root / "secrets" / "broker_replica_password"
        password.rename(password.with_suffix(".away"))  # the broker does not start without
        broker.kill()
        await broker.wait()
        async with asyncio.timeout(LEASE + 5):
            while agent.status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(0.05)
        await asyncio.sleep(LEASE)
        password.with_suffix(".away").rename(password)
        recovering = await stream.until("recovering")
        (losing.workspace / "cut" / "go").touch()
        ending = await stream.ending()
    assert ending.type == "completed"
    assert outline(stream) == ["queued", "connected", "recovering", "completed"]
    assert recovering.data["attempt"] == 1
    assert (losing.workspace / "cut" / "second").exists()
    assert await supervisor.wait() == 0
    await losing.idle(3)


async def test_a_job_that_is_cancelled_while_its_replica_is_lost_ends_so(
    losing: RunningPool,
) -> None:
    async with losing.job(WAIT_FOR_GO, workspace="unwanted") as stream:
        supervisor, _ = await begun(losing, stream, "unwanted")
        supervisor.kill()
        answer = await losing.http.post(f"{stream.response.headers['Location']}/cancel")
        assert answer.status_code == 202
        ending = await stream.ending()
    assert (ending.type, ending.data["code"]) == ("error", "cancelled")
    assert outline(stream) == ["queued", "connected", "error"]
    await losing.idle(3)


async def test_a_job_and_its_readers_outlive_the_gateway_that_took_it(losing: RunningPool) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        async with losing.job(f"{WAIT_FOR_GO}\nrun touch second", workspace="gone") as stream:
            await begun(losing, stream, "gone")
            losing.pool.processes["gateway"].kill()
            await stream.ending()
    (losing.workspace / "gone" / "go").touch()
    url = f"{losing.pool.urls[1]}{stream.response.headers['Location']}/events"
    last = stream.events[-1].id
    async with losing.http.stream("GET", url, headers={"Last-Event-ID": str(last)}) as response:
        rest = EventStream(response)
        ending = await rest.ending()
    assert ending.type == "completed"
    async with losing.http.stream("GET", url) as response:
        whole = EventStream(response)
        await whole.ending()
    assert [*stream.events, *rest.events] == whole.events
    await losing.idle(3)


async def test_a_job_stays_with_a_replica_that_takes_long_to_load_the_agent(tmp_path: Path) -> None:
    # As where many replicas start at once: it loads for longer than a lease without news.
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    settings = {"PYTHONPATH": path, "LEASE_SECONDS": "4"}
    async with running_pool(replicas=2, settings=settings) as pool, pool.job("hello") as stream:
        started = asyncio.create_task(stream.until("connected"))
        while not started.done():
            assert (await pool.status())["replicas"]["busy"] <= 1
            await asyncio.sleep(0.05)
        await started
        await stream.ending()
