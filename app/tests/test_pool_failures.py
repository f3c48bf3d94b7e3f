"""What a client is promised when something fails; each test has a pool of its own to break."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic

import pytest
import pytest_asyncio
from pool_client import RunningPool, appears, program_for_everybody, running_pool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def impatient() -> AsyncIterator[RunningPool]:
    """Two replicas with short limits."""
    settings = {"IDLE_TIMEOUT_SECONDS": "3", "LEASE_SECONDS": "3"}
    async with running_pool(replicas=2, settings=settings) as running:
        yield running


async def test_a_job_keeps_its_lease_for_as_long_as_it_runs(impatient: RunningPool) -> None:
    async with impatient.job("run sleep 2.5\nrun sleep 2.5", workspace="long") as stream:
        ending = await stream.ending()
    assert ending.type == "completed"
    assert [event.type for event in stream.events].count("connected") == 1


async def test_a_silent_agent_is_ended(impatient: RunningPool) -> None:
    ending = await impatient.run("stall")
    assert (ending.type, ending.data["code"]) == ("error", "timeout")
    assert "silent for 3 s" in ending.data["error"]


@pytest.mark.parametrize(
    ("credentials", "said"),
    [
        ({"apiKey": "invalid-key"}, "401"),
        ({"oauthToken": "invalid-key"}, "Not logged in"),
        ({"apiKeys": "x"}, "unknown form"),
    ],
    ids=["key", "token", "form"],
)
async def test_refused_credentials_end_the_job_quickly(
    pool: RunningPool, credentials: dict[str, object], said: str
) -> None:
    async with running_pool(
        replicas=1,
        credentials=json.dumps(credentials),
        settings={"ANTHROPIC_BASE_URL": pool.pool.stub_url},
    ) as refused:
        started = monotonic()
        ending = await refused.run("hello")
        assert (ending.type, ending.data["code"]) == ("error", "credentials")
        assert said in ending.data["error"]
        assert "invalid-key" not in json.dumps(ending.data)
        assert monotonic() - started < 10
        status = await refused.status()
        assert status["demo"] is False
        assert "notice" not in status


async def test_an_oauth_token_is_used(pool: RunningPool) -> None:
    async with running_pool(
        replicas=1,
        credentials='{"claudeAiOauth": {"accessToken": "sk-ant-oat01-good"}}',
        settings={"ANTHROPIC_BASE_URL": pool.pool.stub_url},
    ) as with_token:
        async with with_token.job("run env") as stream:
            ending = await stream.ending()
        assert ending.type == "completed", ending
        assert "sk-ant-oat01-good" not in str(stream.events)


# An agent that misbehaves: a program in place of Claude Code that speaks enough of its language.


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fake(samples: Path) -> AsyncIterator[RunningPool]:
    with program_for_everybody(samples.parent / "fake_claude") as program:
        settings = {"RESULT_GRACE_SECONDS": "1", "CLAUDE_PATH": str(program)}
        async with running_pool(replicas=1, settings=settings) as running:
            yield running


async def test_an_agent_that_hangs_after_its_result_is_ended(fake: RunningPool) -> None:
    started = monotonic()
    async with fake.job("hang after the result") as stream:
        supervisor = fake.replica(await stream.until("connected"))
        ending = await stream.ending()
    assert (ending.type, ending.data["result"]) == ("completed", "good")
    assert await supervisor.wait() == 0
    assert monotonic() - started < 10


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("say nothing more", "exit code 7 and without a result: out of ideas"),
        ("exit well without a result", "exit code 0 and without a result"),
        ("end while speaking", "exit code 0 and without a result"),
    ],
)
async def test_an_agent_without_a_result_ends_its_job(
    fake: RunningPool, prompt: str, said: str
) -> None:
    ending = await fake.run(prompt)
    assert (ending.type, ending.data["code"]) == ("error", "agent_error")
    assert said in ending.data["error"]


async def test_lines_of_an_unknown_kind_are_passed_on_untouched(fake: RunningPool) -> None:
    async with fake.job("speak of the future") as stream:
        ending = await stream.ending()
    assert ending.type == "completed"
    contents = [event.data["content"] for event in stream.events if event.type == "message"]
    assert [content["type"] for content in contents] == ["system", "from_the_future", "result"]
    assert contents[1] == {
        "type": "from_the_future",
        "nothing": None,
        "list": [None, 1.5],
        "text": "é 😀 | ?",  # half a character has no form in UTF-8
    }


async def test_the_last_of_several_results_counts(fake: RunningPool) -> None:
    async with fake.job("two results") as stream:
        ending = await stream.ending()
    assert (ending.type, ending.data["result"]) == ("completed", "last")
    assert [event.type for event in stream.events].count("message") == 4


# The broker, and the gateway


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile() -> AsyncIterator[RunningPool]:
    async with running_pool(replicas=1, settings={"QUEUE_LIMIT": "1"}) as running:
        yield running


async def test_a_full_queue_refuses_with_the_time_to_come_back(fragile: RunningPool) -> None:
    session = (await fragile.run("hello")).data["sessionId"]
    await fragile.idle(1)
    async with fragile.job(WAIT_FOR_GO, workspace="full") as stream:
        await stream.until("connected")
        code, body, headers = await fragile.refusal(
            method="POST",
            url="/api/execute",
            json={"prompt": "one too many", "resumeSessionId": session},
        )
        assert (code, body["code"]) == (429, "queue_full")
        assert int(headers["Retry-After"]) > 0
        await appears(fragile.workspace / "full" / "started")
        (fragile.workspace / "full" / "go").touch()
        assert (await stream.ending()).type == "completed"
    await fragile.idle(1)
    # What was refused has changed nothing: the session is still free.
    await fragile.output("hello", resumeSessionId=session)


async def test_a_running_job_and_its_stream_outlive_the_broker(fragile: RunningPool) -> None:
    await fragile.idle(1)
    async with fragile.job(f"{WAIT_FOR_GO}\nrun echo after", workspace="outlive") as stream:
        await stream.until("connected")
        await appears(fragile.workspace / "outlive" / "started")
        broker = fragile.pool.processes["broker"]
        broker.kill()
        await broker.wait()
        (fragile.workspace / "outlive" / "go").touch()
        ending = await stream.ending()
    assert ending.type == "completed", ending
    ids = [event.id for event in stream.events]
    assert ids == sorted(set(ids))
    await fragile.idle(1)


async def test_without_its_broker_the_gateway_says_so_and_comes_back(fragile: RunningPool) -> None:
    await fragile.idle(1)
    password = fragile.pool.root / "secrets" / "broker_replica_password"
    password.rename(password.with_suffix(".away"))  # the broker does not start without
    fragile.pool.processes["broker"].kill()
    async with asyncio.timeout(10):
        while (await fragile.http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.05)
    for request in (
        {"method": "GET", "url": "/ready"},
        {"method": "GET", "url": "/status"},
        {"method": "POST", "url": "/api/execute", "json": {"prompt": "hello"}},
    ):
        code, body, headers = await fragile.refusal(**request)
        assert (code, body["code"]) == (503, "unavailable")
        assert int(headers["Retry-After"]) > 0
    assert (await fragile.http.get("/health")).status_code == 200
    password.with_suffix(".away").rename(password)
    await fragile.idle(1)
    assert (await fragile.http.get("/ready")).status_code == 200
    await fragile.output("hello")
