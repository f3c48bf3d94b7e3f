"""What a token's own limits promise, and a directory of its own for each job."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pool_client import RunningPool, appears, running_pool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

LIMITED = "a-token-with-limits"
WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_pool() -> AsyncIterator[RunningPool]:
    """Three replicas, a token without limits and one for two running and three waiting jobs."""
    async with running_pool(replicas=3) as pool:
        secret = pool.pool.root / "secrets" / "api_tokens"
        entries = json.loads(secret.read_text())
        entries["limited"] = {"token": LIMITED, "maxRunning": 2, "maxQueued": 3}
        secret.write_text(json.dumps(entries))
        gateway = pool.pool.processes["gateway"]
        gateway.terminate()
        await gateway.wait()
        await pool.idle(3)
        yield pool


@pytest_asyncio.fixture(loop_scope="session")
async def limited(shared_pool: RunningPool) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=shared_pool.pool.url,
        headers={"Authorization": f"Bearer {LIMITED}", "Prefer": "respond-async"},
        trust_env=False,
    ) as http:
        yield http


async def submit(http: httpx.AsyncClient, workspace: str) -> httpx.Response:
    return await http.post("/api/execute", json={"prompt": WAIT_FOR_GO, "workspace": workspace})


async def statuses(http: httpx.AsyncClient, job_ids: list[str]) -> list[str]:
    return [(await http.get(f"/api/jobs/{job_id}")).json()["status"] for job_id in job_ids]


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    while (record := (await http.get(f"/api/jobs/{job_id}")).json())["status"] in {
        "queued",
        "running",
    }:
        await asyncio.sleep(0.05)
    return dict(record)


async def test_a_token_runs_as_many_jobs_as_it_may_and_leaves_the_rest_to_others(
    shared_pool: RunningPool, limited: httpx.AsyncClient
) -> None:
    workspace = shared_pool.workspace / "share"
    jobs = [(await submit(limited, f"share/{number}")).json()["id"] for number in range(4)]
    for number in (0, 1):
        await appears(workspace / str(number) / "started")
    # A replica is idle, and not for this token.
    assert "other" in await shared_pool.output("run echo other")
    await asyncio.sleep(1)
    assert await statuses(limited, jobs) == ["running", "running", "queued", "queued"]
    assert (await shared_pool.status())["queue"]["depth"] == 2
    (workspace / "1" / "go").touch()
    await appears(workspace / "2" / "started")
    assert await statuses(limited, jobs) == ["running", "completed", "running", "queued"]
    for number in (0, 2, 3):
        (workspace / str(number)).mkdir(exist_ok=True)
        (workspace / str(number) / "go").touch()
    for job_id in jobs:
        record = await ended(limited, job_id)
        assert (record["status"], record["client"], record["attempt"]) == (
            "completed",
            "limited",
            1,
        )
    await shared_pool.idle(3)


async def test_a_token_has_as_many_waiting_jobs_as_it_may_even_at_once(
    shared_pool: RunningPool, limited: httpx.AsyncClient
) -> None:
    answers = await asyncio.gather(*(submit(limited, "many") for _ in range(12)))
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    # Those that began to run meanwhile made room for others.
    assert 3 <= len(accepted) <= 5
    for answer in answers:
        if answer.status_code != 202:
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
            assert "3 jobs of the token 'limited' wait" in answer.json()["error"]
            assert int(answer.headers["Retry-After"]) > 0
    assert "other" in await shared_pool.output("run echo other")
    (shared_pool.workspace / "many").mkdir(exist_ok=True)
    (shared_pool.workspace / "many" / "go").touch()
    for job_id in accepted:
        await ended(limited, job_id)
    await shared_pool.idle(3)


async def test_each_job_has_a_directory_of_its_own_where_the_deployment_says_so() -> None:
    async with running_pool(replicas=2, settings={"WORKSPACE_MODE": "per-job"}) as pool:
        for request, below in (({}, ""), ({"workspace": "sub/dir"}, "sub/dir")):
            async with pool.job("create a file called made.txt", **request) as stream:
                ending = await stream.ending()
            assert ending.type == "completed"
            job_id = stream.response.headers["X-Job-Id"]
            directory = pool.workspace / "jobs" / job_id / below
            assert [path.name for path in directory.iterdir()] == ["made.txt"]
            record = (await pool.http.get(f"/api/jobs/{job_id}")).json()
            assert record["workspace"] == str(directory.relative_to(pool.workspace))
            # Whoever goes on with its session goes on where it worked.
            async with pool.job(
                "create a file called more.txt", resumeSessionId=ending.data["sessionId"]
            ) as stream:
                await stream.ending()
            assert {path.name for path in directory.iterdir()} == {"made.txt", "more.txt"}
            await pool.idle(2)
