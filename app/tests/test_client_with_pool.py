"""What the Python client promises, with a real pool behind it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from cutting_proxy import cutting_proxy
from pool_client import RunningPool, appears, running_pool

from claude_jobs.client import ApiError, Client, JobEvent, JobFailedError
from claude_jobs.contract.event import Completed
from claude_jobs.contract.job import JobStatus

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"


@pytest_asyncio.fixture(loop_scope="session")
async def client(pool: RunningPool) -> AsyncIterator[Client]:
    async with Client(pool.pool.url, pool.pool.token) as client:
        yield client


async def test_a_job_runs_and_its_result_is_typed(client: Client, pool: RunningPool) -> None:
    job = await client.submit(
        "create a file called made.txt", workspace="client", metadata={"ticket": 7}
    )
    events = [event async for event in job.events()]
    assert [event.type for event in events][:2] == ["queued", "connected"]
    ending = events[-1].parsed()
    assert isinstance(ending, Completed)
    assert (pool.workspace / "client" / "made.txt").exists()
    assert any("done: 1 tool call" in event.text for event in events)
    result = await job.result()
    assert (result.result, result.session_id) == (ending.result, ending.session_id)
    record = await job.refresh()
    assert (record.status, record.metadata) == (JobStatus.COMPLETED, {"ticket": 7})
    assert await client.job(job.id) == record
    assert [event async for event in job.events(events[-1].id or 0)] == []
    assert [event async for event in job.events(events[1].id or 0)] == events[2:]


async def test_a_failed_job_raises_what_it_failed_of(client: Client) -> None:
    job = await client.submit("fail with 400")
    with pytest.raises(JobFailedError) as failed:
        await job.result()
    assert (failed.value.job_id, failed.value.code) == (job.id, "agent_error")
    assert "400" in failed.value.sentence


async def test_a_running_job_is_cancelled(client: Client, pool: RunningPool) -> None:
    job = await client.submit(WAIT_FOR_GO, workspace="cancelled")
    await appears(pool.workspace / "cancelled" / "started")
    await job.cancel()
    with pytest.raises(JobFailedError) as failed:
        await job.result()
    assert failed.value.code == "cancelled"
    with pytest.raises(ApiError) as refused:
        await job.cancel()
    assert refused.value.code == "conflict"


async def test_a_key_that_is_given_makes_one_job(client: Client) -> None:
    key = str(uuid.uuid4())
    jobs = await asyncio.gather(*(client.submit("hello", idempotency_key=key) for _ in range(5)))
    assert len({job.id for job in jobs}) == 1
    with pytest.raises(ApiError) as refused:
        await client.submit("good bye", idempotency_key=key)
    assert refused.value.code == "conflict"
    await jobs[0].result()


async def test_what_is_wrong_with_a_request_is_said(client: Client) -> None:
    with pytest.raises(ApiError, match="maxTurns: input should be greater"):
        await client.submit("hello", max_turns=0)
    with pytest.raises(ApiError, match="there is no job"):
        await client.job(str(uuid.uuid4()))


async def test_jobs_and_sessions_are_listed(client: Client) -> None:
    jobs = [await client.submit("remember the sea") for _ in range(3)]
    results = [await job.result() for job in jobs]
    newest = [job.id async for job in client.jobs(limit=3)]
    assert newest == [job.id for job in reversed(jobs)]
    assert [job.id async for job in client.jobs(status="running")] == []
    session_id = results[0].session_id
    assert session_id
    assert session_id in [session.id async for session in client.sessions()]
    assert (await client.session(session_id)).last_job_id == jobs[0].id

    resumed = await client.submit("what did I say", resume_session_id=session_id)
    assert "the sea" in (await resumed.result()).result
    await client.delete_session(session_id)
    with pytest.raises(ApiError):
        await client.session(session_id)


async def test_the_status_is_typed(client: Client, pool: RunningPool) -> None:
    await pool.idle(3)
    status = await client.status()
    assert (status.status, status.replicas.total, status.demo) == ("idle", 3, True)


async def test_files_go_there_and_back(client: Client, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    (tmp_path / "here").write_bytes(content)
    made = await client.files.upload("files/ä b#?.bin", tmp_path / "here", if_none_match="*")
    assert made.size == len(content)
    with pytest.raises(ApiError) as refused:
        await client.files.upload("files/ä b#?.bin", tmp_path / "here", if_none_match="*")
    assert refused.value.code == "precondition_failed"
    etag = await client.files.download("files/ä b#?.bin", tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == content
    assert etag == made.etag

    (tmp_path / "here").write_bytes(b"new")
    replaced = await client.files.upload("files/ä b#?.bin", tmp_path / "here", if_match=etag)
    with pytest.raises(ApiError) as refused:
        await client.files.delete("files/ä b#?.bin", if_match=etag)
    assert refused.value.status == 412
    assert [(each.name, each.size) async for each in client.files.list("files")] == [
        ("ä b#?.bin", 3)
    ]
    assert "files" in [each.name async for each in client.files.list()]
    await client.files.delete("files/ä b#?.bin", if_match=replaced.etag)
    await client.files.delete("files")
    with pytest.raises(ApiError) as refused:
        await client.files.download("files/ä b#?.bin", tmp_path / "there")
    assert refused.value.code == "not_found"


async def test_a_download_over_a_wire_that_breaks_is_whole(
    pool: RunningPool, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 20_000
    (pool.workspace / "large.bin").write_bytes(content)
    async with cutting_proxy(pool.pool.port) as proxy:
        proxy.limits = [1_000_000, 2_000_000]
        async with Client(proxy.url, pool.pool.token) as client:
            await client.files.download("large.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert proxy.connections == 3


async def test_no_event_is_missing_or_twice_over_a_wire_that_breaks(pool: RunningPool) -> None:
    steps = "\n".join(f"run echo {number}" for number in range(5))
    async with cutting_proxy(pool.pool.port) as proxy:
        async with Client(proxy.url, pool.pool.token) as client:
            job = await client.submit(steps)
            seen: list[JobEvent] = []
            # Each of these cuts somewhere in the middle of an event.
            proxy.limits = [500, 5_000, 9_000]
            async for event in job.events():
                seen.append(event)
                if event.type == "connected":
                    proxy.cut()
        assert proxy.connections > 4
    async with Client(pool.pool.url, pool.pool.token) as direct:
        logged = [event async for event in direct.events(job.id) if event.id]
    assert [event for event in seen if event.id] == logged
    assert seen[-1].type == "completed"


async def test_a_very_long_line_comes_in_one_piece(client: Client) -> None:
    # Larger than what the broker takes in one message.
    job = await client.submit("say 9000000 bytes")
    texts = [len(event.text) async for event in job.events() if event.text]
    assert texts == [9_000_000]


# A gateway that dies, and a queue that is full


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fragile() -> AsyncIterator[RunningPool]:
    async with running_pool(replicas=1, settings={"QUEUE_LIMIT": "1"}) as running:
        yield running


async def test_a_client_outlives_the_gateway(fragile: RunningPool) -> None:
    async with Client(fragile.pool.url, fragile.pool.token) as client:
        job = await client.submit(WAIT_FOR_GO, workspace="outlives")
        seen: list[JobEvent] = []
        async with aclosing(job.events()) as events:
            async for event in events:
                seen.append(event)
                if event.type == "connected":
                    await appears(fragile.workspace / "outlives" / "started")
                    fragile.pool.processes["gateway"].kill()
                    (fragile.workspace / "outlives" / "go").touch()
        logged = [event async for event in job.events() if event.id]
    assert seen[-1].type == "completed"
    assert [event for event in seen if event.id] == logged


async def test_a_full_queue_is_waited_for(fragile: RunningPool) -> None:
    await fragile.idle(1)

    def notify(cause: Exception, _: float) -> None:
        assert isinstance(cause, ApiError)
        refusals.append(cause.code)
        (fragile.workspace / "full" / "go").touch()

    refusals: list[str] = []
    async with Client(fragile.pool.url, fragile.pool.token, notify=notify) as client:
        first = await client.submit(WAIT_FOR_GO, workspace="full")
        await appears(fragile.workspace / "full" / "started")
        with pytest.raises(ApiError, match="queue_full"):
            await client.submit("hello", give_up_after=0)
        second = await client.submit("hello")
        assert refusals == ["queue_full"]
        assert (await first.result()).result
        assert "You said: hello" in (await second.result()).result
