"""What a client is promised of its jobs: found again, submitted once, cancelled for good."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pool_client import RunningPool, appears, running_pool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"
ASYNC = {"Prefer": "respond-async"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one() -> AsyncIterator[RunningPool]:
    """One replica: what is submitted while it works waits."""
    async with running_pool(replicas=1) as running:
        yield running


async def submit(pool: RunningPool, prompt: str, **fields: object) -> dict[str, Any]:
    response = await pool.http.post(
        "/api/execute", json={"prompt": prompt, **fields}, headers=ASYNC
    )
    assert response.status_code == 202, response.text
    assert response.headers["Preference-Applied"] == "respond-async"
    record = response.json()
    assert response.headers["Location"] == f"/api/jobs/{record['id']}"
    assert response.headers["X-Job-Id"] == record["id"]
    return dict(record)


async def record(pool: RunningPool, job_id: str) -> dict[str, Any]:
    response = await pool.http.get(f"/api/jobs/{job_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


async def ended(pool: RunningPool, job_id: str) -> dict[str, Any]:
    while (found := await record(pool, job_id))["status"] in ("queued", "running"):
        await asyncio.sleep(0.05)
    return found


async def ids(pool: RunningPool, **query: str) -> list[str]:
    response = await pool.http.get("/api/jobs", params=query)
    assert response.status_code == 200, response.text
    return [each["id"] for each in response.json()["jobs"]]


# Submit and find again


async def test_a_job_can_be_submitted_without_waiting_and_is_found_again(pool: RunningPool) -> None:
    accepted = await submit(pool, "run echo found again", metadata={"team": "a"})
    # A replica that is idle may have begun before the answer is written.
    assert accepted["status"] in ("queued", "running")
    assert accepted["client"] == "development"
    found = await ended(pool, accepted["id"])
    assert found["status"] == "completed"
    assert "found again" in found["result"]
    assert found["metadata"] == {"team": "a"}
    assert found["attempt"] == 1
    assert found["createdAt"] <= found["startedAt"] <= found["endedAt"]


@pytest.mark.parametrize(
    "job_id",
    ["x", "18468663-a1b8-4902-9b2c-3c588651fac0", "ffffffff-ffff-7fff-bfff-ffffffffffff"],
)
async def test_an_unknown_job_is_not_found(pool: RunningPool, job_id: str) -> None:
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events")):
        code, body, _ = await pool.refusal(method=method, url=f"/api/jobs/{job_id}{path}")
        assert (code, body["code"]) == (404, "not_found")


async def test_jobs_are_listed_newest_first_in_pages(pool: RunningPool) -> None:
    mine = [(await submit(pool, f"say {number}"))["id"] for number in range(5)]
    for job_id in mine:
        await ended(pool, job_id)
    assert (await ids(pool))[:5] == mine[::-1]
    pages: list[list[str]] = []
    query = {"limit": "2", "status": "completed"}
    while len(pages) < 3:
        response = (await pool.http.get("/api/jobs", params=query)).json()
        pages.append([each["id"] for each in response["jobs"]])
        query["cursor"] = response["nextCursor"] if len(pages) < 3 else ""
    assert [job_id for page in pages for job_id in page][:5] == mine[::-1]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("status=done", "status"),
        ("limit=0", "limit"),
        ("limit=1000000", "limit"),
        ("limit=ten", "limit"),
        ("cursor=here", "cursor"),
        ("state=queued", "state"),
        ("limit=1&limit=2", "limit"),
    ],
)
async def test_a_wrong_query_is_refused(pool: RunningPool, query: str, field: str) -> None:
    code, body, _ = await pool.refusal(method="GET", url=f"/api/jobs?{query}")
    assert (code, body["code"]) == (400, "invalid_request")
    assert body["error"].startswith(f"{field}:")


# Once


async def test_the_same_key_is_the_same_job_also_when_retries_race(pool: RunningPool) -> None:
    key = {"Idempotency-Key": f"race {uuid.uuid4()}", **ASYNC}
    body = {"prompt": "run echo once >> once", "workspace": "once"}
    answers = await asyncio.gather(
        *(pool.http.post("/api/execute", json=body, headers=key) for _ in range(10))
    )
    assert {answer.status_code for answer in answers} == {202}
    (job_id,) = {answer.json()["id"] for answer in answers}
    await ended(pool, job_id)
    again = await pool.http.post("/api/execute", json=body, headers=key)
    assert (again.json()["id"], again.json()["status"]) == (job_id, "completed")
    assert (pool.workspace / "once" / "once").read_text() == "once\n"


async def test_a_retry_with_the_same_key_gets_the_whole_stream(pool: RunningPool) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    streams = []
    for _ in range(2):
        async with pool.http.stream(
            "POST", "/api/execute", json={"prompt": "say hello"}, headers=key
        ) as response:
            streams.append((await response.aread()).decode())
    assert streams[0] == streams[1]


async def test_the_same_key_with_another_body_is_refused(pool: RunningPool) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = await pool.http.post("/api/execute", json={"prompt": "a"}, headers=key | ASYNC)
    code, body, _ = await pool.refusal(
        method="POST", url="/api/execute", json={"prompt": "b"}, headers=key
    )
    assert (code, body["code"]) == (409, "conflict")
    assert first.json()["id"] in body["error"]


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_that_cannot_be_one_is_refused(pool: RunningPool, key: str) -> None:
    code, body, _ = await pool.refusal(
        method="POST", url="/api/execute", json={"prompt": "a"}, headers={"Idempotency-Key": key}
    )
    assert (code, body["code"]) == (400, "invalid_request")


# Cancel


async def test_a_waiting_job_that_is_cancelled_never_starts(one: RunningPool) -> None:
    async with one.job(WAIT_FOR_GO, workspace="first") as first:
        await first.until("connected")
        waiting = await submit(one, "run touch never", workspace="second")
        assert (waiting["status"], waiting["attempt"]) == ("queued", 0)
        assert await ids(one, status="queued") == [waiting["id"]]
        answer = await one.http.post(f"/api/jobs/{waiting['id']}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
        assert await ids(one, status="queued") == []
        assert (await one.status())["queue"]["depth"] == 0
        await appears(one.workspace / "first" / "started")
        (one.workspace / "first" / "go").touch()
        await first.ending()
    await one.output("say hello")  # whatever was in the queue was taken before this
    assert not (one.workspace / "second").exists()
    events = (await one.http.get(f"/api/jobs/{waiting['id']}/events")).text
    assert events.count("event: ") == 2
    assert events.count("event: error") == 1


async def test_a_running_job_is_cancelled_and_its_session_goes_on(one: RunningPool) -> None:
    prompt = "run touch started; sleep 300 & wait"
    async with one.job(prompt, workspace="cancel") as stream:
        connected = await stream.until("connected")
        job_id, session = connected.data["jobId"], connected.data["sessionId"]
        await appears(one.workspace / "cancel" / "started")
        started = asyncio.get_running_loop().time()
        answer = await one.http.post(f"/api/jobs/{job_id}/cancel")
        assert answer.status_code == 202
        ending = await stream.ending()
        assert asyncio.get_running_loop().time() - started < 5
    assert (ending.type, ending.data["code"]) == ("error", "cancelled")
    assert ending.data["sessionId"] == session
    assert (await ended(one, job_id))["status"] == "cancelled"
    code, body, _ = await one.refusal(method="POST", url=f"/api/jobs/{job_id}/cancel")
    assert (code, body["code"]) == (409, "conflict")
    assert "cancelled" in body["error"]
    resumed = await one.run("run echo still here", resumeSessionId=session)
    assert (resumed.type, resumed.data["sessionId"]) == ("completed", session)


# Sessions


async def test_a_session_goes_on_where_it_was_also_on_another_replica(pool: RunningPool) -> None:
    async with pool.job("run echo first turn", workspace="talk") as stream:
        session = (await stream.until("connected")).data["sessionId"]
        first = (await stream.ending()).data
    assert first["sessionId"] == session
    async with pool.job("say second turn", resumeSessionId=session) as stream:
        connected = await stream.until("connected")
        assert connected.data["resuming"] is True
        assert connected.data["sessionId"] == session
        assert (await stream.ending()).type == "completed"
        job_id = connected.data["jobId"]
    assert (await record(pool, job_id))["workspace"] == "talk"
    listed = (await pool.http.get("/api/sessions")).json()["sessions"]
    assert listed[0]["id"] == session
    assert listed[0]["lastJobId"] == job_id
    shown = await pool.http.get(f"/api/sessions/{session}")
    assert shown.json() == listed[0]


async def test_a_session_is_used_by_one_job_at_a_time(pool: RunningPool) -> None:
    async with pool.job(WAIT_FOR_GO, workspace="busy") as stream:
        connected = (await stream.until("connected")).data
        session, job_id = connected["sessionId"], connected["jobId"]
        for request in (
            {"method": "POST", "url": "/api/execute"},
            {"method": "DELETE", "url": f"/api/sessions/{session}"},
        ):
            body = {"prompt": "x", "resumeSessionId": session}
            code, said, _ = await pool.refusal(**request, json=body)
            assert (code, said["code"]) == (409, "conflict")
            assert job_id in said["error"]
        await appears(pool.workspace / "busy" / "started")
        (pool.workspace / "busy" / "go").touch()
        await stream.ending()

    async def resume() -> httpx.Response:
        body = {"prompt": "run sleep 1", "resumeSessionId": session}
        return await pool.http.post("/api/execute", json=body, headers=ASYNC)

    codes = [answer.status_code for answer in await asyncio.gather(*(resume() for _ in range(10)))]
    assert sorted(codes) == [202] + 9 * [409]


async def test_a_session_that_was_deleted_is_gone(pool: RunningPool) -> None:
    session = (await pool.run("say hello")).data["sessionId"]
    assert (await pool.http.delete(f"/api/sessions/{session}")).status_code == 204
    for request in (
        {"method": "GET", "url": f"/api/sessions/{session}"},
        {"method": "DELETE", "url": f"/api/sessions/{session}"},
        {"method": "GET", "url": "/api/sessions/x.y"},
    ):
        code, body, _ = await pool.refusal(**request)
        assert (code, body["code"]) == (404, "not_found")
    code, body, _ = await pool.refusal(
        method="POST", url="/api/execute", json={"prompt": "x", "resumeSessionId": session}
    )
    assert (code, body["code"]) == (400, "invalid_request")
    assert body["error"].startswith("resumeSessionId:")
