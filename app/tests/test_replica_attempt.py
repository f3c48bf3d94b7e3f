"""A job that a lost replica left behind is brought to its end, without a second agent."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from nats_server import PASSWORDS, NatsServer
from pydantic import SecretStr

from claude_jobs.broker import REPLICA_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.topology import JOBS_STREAM, JOBS_SUBJECT, Bounds
from claude_jobs.contract.event import Connected, Event, Failed, FailureCode, Queued
from claude_jobs.contract.job import Job, JobRecord, JobRequest, JobStatus
from claude_jobs.replica import attempt as attempt_module
from claude_jobs.replica.attempt import Attempt
from claude_jobs.settings import ReplicaSettings

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(30)]

CONNECTED = Connected(job_id="j", session_id="s", replica="lost", node="n", attempt=1)


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(nats_server: NatsServer) -> AsyncIterator[Bus]:
    async with nats_server.both_ends(Bounds()) as (gateway, _):
        yield gateway


async def attempt_after(
    events: list[Event], nats_server: NatsServer, gateway: Bus, directory: Path
) -> tuple[Job, bool]:
    """Let a replica pull a job whose log holds these events already."""
    job = Job.accept(JobRequest(prompt="x"), client="test")
    writer = await EventLog(gateway).writer(job.id)
    for event in [Queued(job_id=job.id, position=1), *events]:
        await writer.append(event)
    await (await JobRecords.open(gateway)).put(JobRecord.queued(job))
    await JobQueue(gateway).submit(job)
    settings = ReplicaSettings(
        broker_replica_password=SecretStr(PASSWORDS[REPLICA_USER]),
        workspace_dir=directory,
        claude_path=directory / "must-not-be-started",
    )
    async with nats_server.connected(REPLICA_USER) as bus:
        lease = await JobQueue(bus).pull()
        started = await Attempt(settings, EventLog(bus), await JobRecords.open(bus), lease).run()
    assert (await gateway.jetstream.stream_info(JOBS_STREAM)).state.messages == 0
    return job, started


async def logged(gateway: Bus, job: Job) -> list[Event]:
    async with aclosing(EventLog(gateway).read(job.id)) as events:
        return [each.event async for each in events]


async def test_a_job_whose_agent_was_started_elsewhere_ends_as_lost(
    nats_server: NatsServer, gateway: Bus, tmp_path: Path
) -> None:
    job, started = await attempt_after([CONNECTED], nats_server, gateway, tmp_path)
    assert not started
    events = await logged(gateway, job)
    assert [event.type for event in events] == ["queued", "connected", "error"]
    assert isinstance(events[-1], Failed)
    assert events[-1].code is FailureCode.WORKER_LOST
    record = await (await JobRecords.open(gateway)).get(job.id)
    assert record is not None
    assert (record.status, record.error_code) == (JobStatus.FAILED, FailureCode.WORKER_LOST)


async def test_a_job_that_had_ended_is_summed_up_and_taken_off_the_queue(
    nats_server: NatsServer, gateway: Bus, tmp_path: Path
) -> None:
    ending = Failed(code=FailureCode.TIMEOUT, error="too long")
    job, started = await attempt_after([CONNECTED, ending], nats_server, gateway, tmp_path)
    assert not started
    assert (await logged(gateway, job))[-1] == ending
    record = await (await JobRecords.open(gateway)).get(job.id)
    assert record is not None
    assert (record.status, record.error) == (JobStatus.FAILED, "too long")


async def test_a_job_that_never_started_is_run_by_the_next_replica(
    nats_server: NatsServer, gateway: Bus, tmp_path: Path
) -> None:
    job, started = await attempt_after([], nats_server, gateway, tmp_path)
    assert started
    ending = (await logged(gateway, job))[-1]
    assert isinstance(ending, Failed)  # it has no credentials
    assert ending.code is FailureCode.CREDENTIALS


async def test_a_job_that_no_version_can_read_is_offered_again_and_then_ends(
    nats_server: NatsServer, gateway: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "_UNREADABLE_DELAY", 0.0)
    monkeypatch.setattr(attempt_module, "_UNREADABLE_TRIES", 3)
    job = Job.accept(JobRequest(prompt="x"), client="test")
    writer = await EventLog(gateway).writer(job.id)
    await writer.append(Queued(job_id=job.id, position=1))
    await (await JobRecords.open(gateway)).put(JobRecord.queued(job))
    await gateway.jetstream.publish(
        JOBS_SUBJECT, b'{"of": "another version"}', headers={"Nats-Msg-Id": job.id}
    )
    settings = ReplicaSettings(
        broker_replica_password=SecretStr(PASSWORDS[REPLICA_USER]), workspace_dir=tmp_path
    )
    async with nats_server.connected(REPLICA_USER) as bus:
        records = await JobRecords.open(bus)
        for number in (1, 2, 3):
            lease = await JobQueue(bus).pull()
            assert (lease.job_id, lease.attempt) == (job.id, number)
            assert not await Attempt(settings, EventLog(bus), records, lease).run()
    ending = (await logged(gateway, job))[-1]
    assert isinstance(ending, Failed)
    assert ending.code is FailureCode.INTERNAL
    record = await (await JobRecords.open(gateway)).get(job.id)
    assert record is not None
    assert record.status is JobStatus.FAILED
    assert (await gateway.jetstream.stream_info(JOBS_STREAM)).state.messages == 0
