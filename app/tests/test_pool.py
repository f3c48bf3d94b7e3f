"""What a client is promised, by real processes: broker, gateway, replicas, Claude Code."""

import asyncio
import json
import os
import signal
from collections import Counter

import psutil
import pytest
from pool_client import RunningPool, appears

from claude_jobs.development import Pool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

# Runs until the test says so: the file named `go` in the job's directory.
WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: two users")


async def test_a_job_streams_from_queued_to_its_one_terminal_event(pool: RunningPool) -> None:
    async with pool.job("create a file called made.txt with content: a b") as stream:
        assert stream.response.headers["Content-Type"] == "text/event-stream"
        ending = await stream.ending()
    assert stream.retry == 2000
    types = [event.type for event in stream.events]
    assert types[:3] == ["queued", "connected", "message"]
    assert set(types[2:-1]) == {"message"}
    assert ending.type == "completed"
    ids = [event.id for event in stream.events]
    assert ids == sorted(set(ids))
    assert all(event.data["type"] == event.type for event in stream.events)

    job_id = stream.response.headers["X-Job-Id"]
    assert stream.response.headers["Location"] == f"/api/jobs/{job_id}"
    queued, connected = stream.events[0].data, stream.events[1].data
    assert (queued["jobId"], queued["position"]) == (job_id, 1)
    assert (connected["jobId"], connected["attempt"]) == (job_id, 1)
    assert connected["resuming"] is False
    assert connected["sessionId"] == ending.data["sessionId"]
    lines = [event.data["content"] for event in stream.events if event.type == "message"]
    assert lines[0]["subtype"] == "init"
    assert lines[-1]["type"] == "result"
    assert ending.data["result"] == lines[-1]["result"]
    assert ending.data["numTurns"] == 2
    assert (pool.workspace / "made.txt").read_text() == "a b"


@as_root
async def test_the_agent_is_another_user_than_its_supervisor(pool: RunningPool) -> None:
    await pool.output("create a file called new/owned.txt", workspace="a/b")
    made = pool.workspace / "a" / "b" / "new" / "owned.txt"
    assert made.stat().st_uid == 10001
    assert made.stat().st_gid == pool.workspace.stat().st_gid
    # What one job made, the next may change, and so may the gateway.
    assert made.stat().st_mode & 0o060 == 0o060
    assert made.parent.stat().st_mode & 0o2070 == 0o2070


async def test_each_replica_runs_one_job_and_exits_well(pool: RunningPool) -> None:
    replicas = []
    for _ in range(2):
        async with pool.job("hello") as stream:
            connected = await stream.until("connected")
            process = pool.replica(connected)
            assert (await stream.ending()).type == "completed"
        assert await process.wait() == 0
        replicas.append(connected.data["replica"])
    assert replicas[0] != replicas[1]
    await pool.idle(3)


async def test_status_shows_who_works_on_what(pool: RunningPool) -> None:
    await pool.idle(3)
    status = await pool.status()
    assert status["status"] == "idle"
    assert status["queue"] == {"depth": 0, "limit": 1000}
    assert status["demo"] is True
    assert status["notice"].startswith("DEMO MODE")
    async with pool.job(WAIT_FOR_GO, workspace="shown") as stream:
        connected = await stream.until("connected")
        status = await pool.status()
        (busy,) = (each for each in status["replicas"]["list"] if each["status"] == "busy")
        assert busy["replica"] == connected.data["replica"]
        assert busy["jobId"] == stream.response.headers["X-Job-Id"]
        assert (status["replicas"]["idle"], status["status"]) == (2, "idle")
        await appears(pool.workspace / "shown/started")
        (pool.workspace / "shown/go").touch()
        await stream.ending()


async def test_jobs_run_at_once_and_those_beyond_the_replicas_wait_in_order(
    pool: RunningPool,
) -> None:
    await pool.idle(3)
    async with asyncio.TaskGroup() as clients:
        connected: list[int] = []
        endings: list[str] = []

        async def client(number: int) -> None:
            async with pool.job(WAIT_FOR_GO, workspace=f"queue/{number}") as stream:
                queued = await stream.until("queued")
                assert queued.data["position"] == max(1, number - 2)
                submitted.set()
                await stream.until("connected")
                connected.append(number)
                endings.append((await stream.ending()).type)

        for number in range(5):
            submitted = asyncio.Event()
            clients.create_task(client(number))
            await submitted.wait()
            if number < 3:
                await appears(pool.workspace / "queue" / str(number) / "started")
        assert sorted(connected) == [0, 1, 2]
        status = await pool.status()
        assert (status["status"], status["queue"]["depth"]) == ("busy", 2)
        (pool.workspace / "queue/0/go").touch()
        await appears(pool.workspace / "queue/3/started")
        assert sorted(connected) == [0, 1, 2, 3]
        for number in range(1, 5):
            await appears(pool.workspace / f"queue/{number}/started")
            (pool.workspace / f"queue/{number}/go").touch()
    assert endings == ["completed"] * 5


@pytest.mark.timeout(120)
async def test_twenty_jobs_of_ten_clients_run_exactly_once_each(pool: RunningPool) -> None:
    replicas: list[str] = []

    async def client(name: int) -> None:
        for number in range(2):
            async with pool.job(f"run echo {name}.{number} >> runs.txt") as stream:
                replicas.append((await stream.until("connected")).data["replica"])
                ending = await stream.ending()
                assert ending.type == "completed", ending

    async with asyncio.TaskGroup() as clients:
        for name in range(10):
            clients.create_task(client(name))
    runs = Counter((pool.workspace / "runs.txt").read_text().split())
    assert runs == Counter(f"{name}.{number}" for name in range(10) for number in range(2))
    assert len(set(replicas)) == 20


async def test_a_client_that_disconnects_cancels_nothing(pool: RunningPool) -> None:
    async with pool.job(f"{WAIT_FOR_GO}\nrun touch finished", workspace="left") as stream:
        await stream.until("connected")
        await appears(pool.workspace / "left" / "started")
    async with pool.job("run touch ../unread/made", workspace="unread"):
        pass
    (pool.workspace / "left" / "go").touch()
    await appears(pool.workspace / "left" / "finished")
    await appears(pool.workspace / "unread" / "made")


# How jobs end


async def test_a_job_ends_at_its_time_limit(pool: RunningPool) -> None:
    ending = await pool.run("work forever", timeoutSeconds=3)
    assert (ending.type, ending.data["code"]) == ("error", "timeout")
    assert "3 s" in ending.data["error"]


async def test_a_model_that_stays_overloaded_ends_the_job(pool: RunningPool) -> None:
    ending = await pool.run("fail with 529")
    assert (ending.type, ending.data["code"]) == ("error", "agent_error")
    assert "529" in ending.data["error"]


async def test_a_job_ends_at_its_number_of_turns(pool: RunningPool) -> None:
    ending = await pool.run("run true\nrun true\nrun true", maxTurns=1)
    assert (ending.type, ending.data["code"]) == ("error", "agent_error")
    assert "maximum number of turns (1)" in ending.data["error"]


async def test_a_tool_that_is_not_permitted_is_reported(pool: RunningPool) -> None:
    ending = await pool.run("create a file called denied.txt", permissionMode="default")
    assert ending.type == "completed"
    assert [denial["tool_name"] for denial in ending.data["permissionDenials"]] == ["Write"]
    assert not (pool.workspace / "denied.txt").exists()


async def test_a_line_that_is_too_large_for_the_broker_comes_in_parts(pool: RunningPool) -> None:
    async with pool.job("say 9000000 bytes") as stream:
        ending = await stream.ending()
    assert ending.type == "completed"
    lines, pending = [], ""
    for event in stream.events:
        if event.type != "message" or event.data["content"]["type"] != "line_part":
            continue
        part = event.data["content"]
        pending += part["text"]
        if part["index"] == part["count"] - 1:
            lines.append(json.loads(pending))
            pending = ""
    assert {line["type"] for line in lines} == {"assistant", "result"}
    assert {len(line["result"]) for line in lines if line["type"] == "result"} == {9_000_000}
    assert ending.data["result"].endswith("characters in all]")


async def test_a_job_leaves_no_process_behind(pool: RunningPool) -> None:
    stubborn = "trap '' TERM HUP; while :; do sleep 0.7654321; done"
    async with pool.job(
        f'run setsid sleep 7654321 >/dev/null 2>&1 & (setsid sh -c "{stubborn}" '
        ">/dev/null 2>&1 &) ; sleep 0.3; pgrep -fc 7654321"
    ) as stream:
        supervisor = pool.replica(await stream.until("connected"))
        ending = await stream.ending()
    assert ending.type == "completed", ending
    assert await supervisor.wait() == 0
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if "7654321" in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []


# What an agent is kept from


async def test_the_agent_has_no_secret_and_nothing_of_its_supervisor(pool: RunningPool) -> None:
    shown = await pool.output("run env")
    names = {line.partition("=")[0] for line in shown.splitlines()}
    assert "HOME" in names
    for name in Pool._environment(pool.pool, "replica-0"):
        assert name in {"PATH", "ANTHROPIC_BASE_URL"} or name not in names
    secrets = pool.pool.root / "secrets"
    for secret in ("api_token", "broker_gateway_password", "broker_replica_password"):
        assert (secrets / secret).read_text() not in shown
    assert "ANTHROPIC_API_KEY" not in names
    assert '"demo"' not in shown


@as_root
async def test_the_agent_has_no_rights_and_cannot_read_secrets(pool: RunningPool) -> None:
    supervisor = pool.pool.root
    shown = await pool.output(
        "run id; cat /proc/self/status\n"
        f"run cat {supervisor}/secrets/broker_replica_password; ls {supervisor}/secrets\n"
        f"run ls {supervisor}/broker-config {supervisor}/broker\n"
        "run cat /proc/$(pgrep -o -f 'claude_jobs replica')/environ"
    )
    assert "uid=10001" in shown
    assert "gid=10002" in shown
    fields = dict(line.split(":", 1) for line in shown.splitlines() if line.count(":") == 1)
    assert fields["NoNewPrivs"].strip() == "1"
    assert {fields[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert fields["Groups"].strip() == ""
    assert shown.count("Permission denied") >= 4
    assert (supervisor / "secrets/broker_replica_password").read_text() not in shown


# Orders to stop


async def test_a_replica_that_is_asked_to_stop_finishes_its_job_first(pool: RunningPool) -> None:
    async with pool.job(WAIT_FOR_GO, workspace="stopped") as stream:
        supervisor = pool.replica(await stream.until("connected"))
        await appears(pool.workspace / "stopped" / "started")
        supervisor.send_signal(signal.SIGTERM)
        supervisor.send_signal(signal.SIGTERM)
        await asyncio.wait({asyncio.ensure_future(supervisor.wait())}, timeout=0.5)
        assert supervisor.returncode is None
        (pool.workspace / "stopped" / "go").touch()
        assert (await stream.ending()).type == "completed"
    assert await supervisor.wait() == 0


async def test_a_replica_that_is_idle_stops_at_once(pool: RunningPool) -> None:
    await pool.idle(3)
    supervisor = pool.pool.processes["replica-1"]
    supervisor.send_signal(signal.SIGTERM)
    async with asyncio.timeout(3):
        assert await supervisor.wait() == 0
    await pool.idle(3)
