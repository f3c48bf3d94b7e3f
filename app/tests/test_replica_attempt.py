"""A job that a lost replica left behind is gone on with or brought to its end, never run twice."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from bus_ends import present
from nats_server import PASSWORDS, NatsServer

from claude_jobs.agent.guard import Watchdog
from claude_jobs.broker import REPLICA_USER
from claude_jobs.bus.cancellations import Cancellations
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog, EventWriter, FencedError
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.sessions import SessionLog, SessionRecords
from claude_jobs.bus.topology import JOBS_STREAM, Bounds, job_subject
from claude_jobs.contract.base import now
from claude_jobs.contract.event import (
    Connected,
    Event,
    Failed,
    FailureCode,
    Message,
    Queued,
    Recovering,
)
from claude_jobs.contract.job import Job, JobRecord, JobRequest, JobStatus
from claude_jobs.contract.session import Session
from claude_jobs.replica import attempt as attempt_module
from claude_jobs.replica import recovery
from claude_jobs.replica.attempt import Attempt
from claude_jobs.replica.backend import Backend
from claude_jobs.settings import ReplicaSettings

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(30)]

SESSION = "5b3c9a2e-0000-4000-8000-000000000001"


def began(number: int) -> Connected:
    return Connected(
        job_id="j",
        session_id=SESSION,
        replica="lost",
        node="n",
        attempt=number,
        resuming=number > 1,
    )


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(nats_server: NatsServer) -> AsyncIterator[Bus]:
    async with nats_server.both_ends(Bounds()) as (gateway, _):
        yield gateway


@pytest.fixture
def unheard() -> Iterator[Watchdog]:
    """A watchdog's channel with nobody behind it: a real one would end this test's broker, too."""
    reading, writing = os.pipe()
    yield Watchdog(os.getpid(), writing)
    os.close(reading)
    os.close(writing)


@dataclass
class Scene:
    """What a lost replica has left, and a replica that finds it."""

    nats_server: NatsServer
    gateway: Bus
    directory: Path
    watchdog: Watchdog

    async def leave(self, *events: Event, saved: bool) -> Job:
        """Put a job into the queue whose log and session hold this already."""
        job = Job.accept(JobRequest(prompt="x"), client="test")
        writer = await EventLog(self.gateway).writer(job.id)
        for event in [Queued(job_id=job.id, position=1), *events]:
            await writer.append(event)
        await (await JobRecords.open(self.gateway)).put(JobRecord.queued(job))
        await JobQueue(self.gateway).submit(job)
        if saved:
            async with self.nats_server.connected(REPLICA_USER) as bus:
                await SessionLog(bus).append(
                    {"project_key": "p", "session_id": SESSION}, [{"type": "user", "uuid": "1"}]
                )
        return job

    def settings(self) -> ReplicaSettings:
        # It has no credentials: an attempt ends where the agent would be started.
        return ReplicaSettings(
            broker_replica_password=PASSWORDS[REPLICA_USER],
            workspace_dir=self.directory,
            claude_path=self.directory / "must-not-be-started",
        )

    async def find(self) -> bool:
        """Let a replica pull the job; returns whether it would have started an agent."""
        async with self.nats_server.connected(REPLICA_USER) as bus:
            lease = await JobQueue(bus).pull()
            backend = await Backend.open(bus)
            return await Attempt(self.settings(), backend, self.watchdog, lease).run()

    async def unfinished(self) -> int:
        return (await self.gateway.jetstream.stream_info(JOBS_STREAM)).state.messages

    async def log(self, job: Job) -> list[Event]:
        async with aclosing(EventLog(self.gateway).stored(job.id)) as events:
            return [each.event async for each in events]

    async def record(self, job: Job) -> JobRecord:
        record = await (await JobRecords.open(self.gateway)).get(job.id)
        assert record is not None
        return record


@pytest.fixture
def scene(
    nats_server: NatsServer,
    gateway: Bus,
    tmp_path: Path,
    unheard: Watchdog,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    monkeypatch.setattr(recovery, "_SIGN_OF_LIFE", 0.0)
    return Scene(nats_server, gateway, tmp_path, unheard)


async def test_a_job_that_was_begun_is_continued_from_its_session(scene: Scene) -> None:
    job = await scene.leave(began(1), saved=True)
    assert await scene.find()
    queued, first, recovering, second, ending = await scene.log(job)
    assert isinstance(queued, Queued)
    assert first == began(1)
    assert isinstance(recovering, Recovering)
    assert (recovering.attempt, recovering.reason) == (2, "replica lost was lost")
    assert isinstance(second, Connected)
    assert (second.attempt, second.resuming, second.resumed_from) == (2, True, SESSION)
    assert isinstance(ending, Failed)
    assert (await scene.record(job)).attempt == 2
    assert await scene.unfinished() == 0


@pytest.mark.parametrize(
    ("attempt", "saved", "said"),
    [(1, False, "nothing of its session had been saved"), (3, True, "it was attempt 3")],
)
async def test_a_job_that_cannot_be_continued_ends_as_lost(
    scene: Scene, attempt: int, saved: bool, said: str
) -> None:
    job = await scene.leave(began(attempt), saved=saved)
    assert not await scene.find()
    *_, last, ending = await scene.log(job)
    assert last == began(attempt)
    assert isinstance(ending, Failed)
    assert ending.code is FailureCode.WORKER_LOST
    assert said in ending.error
    record = await scene.record(job)
    assert (record.status, record.error_code) == (JobStatus.FAILED, FailureCode.WORKER_LOST)
    assert await scene.unfinished() == 0


async def test_a_job_that_was_cancelled_meanwhile_is_not_continued(scene: Scene) -> None:
    job = await scene.leave(began(1), saved=True)
    await (await Cancellations.open(scene.gateway)).ask(job.id, "test")
    assert not await scene.find()
    ending = (await scene.log(job))[-1]
    assert isinstance(ending, Failed)
    assert ending.code is FailureCode.CANCELLED
    assert (await scene.record(job)).status is JobStatus.CANCELLED


async def test_a_job_whose_replica_lives_stays_its_own(scene: Scene) -> None:
    job = await scene.leave(began(1), saved=True)
    async with scene.nats_server.connected(REPLICA_USER) as bus:
        announced = present("lost").model_copy(update={"job_id": job.id})
        await (await Presence.open(bus)).announce(announced)
    assert not await scene.find()
    assert (await scene.log(job))[-1] == began(1)
    assert await scene.unfinished() == 1


async def test_a_job_that_was_handed_over_is_begun_without_a_second_claim(scene: Scene) -> None:
    # Whether by a replica that had to give it up, or claimed by one that was lost then.
    claim = Recovering(attempt=2, reason="x")
    job = await scene.leave(began(1), claim, saved=True)
    assert await scene.find()
    _, first, recovering, second, _ = await scene.log(job)
    assert (first, recovering) == (began(1), claim)
    assert isinstance(second, Connected)
    assert second.attempt == 2


async def test_a_replica_that_went_on_by_itself_and_was_lost_then_is_followed(scene: Scene) -> None:
    job = await scene.leave(began(1), Recovering(attempt=1, reason="held"), saved=True)
    assert await scene.find()
    _, _, _, claim, second, _ = await scene.log(job)
    assert isinstance(claim, Recovering)
    assert isinstance(second, Connected)
    assert (claim.attempt, second.attempt) == (2, 2)


async def test_a_replica_that_comes_back_can_write_nothing_more(scene: Scene) -> None:
    job = await scene.leave(began(1), saved=True)
    async with scene.nats_server.connected(REPLICA_USER) as bus:
        old = await EventLog(bus).writer(job.id)
        assert await scene.find()
        before = await scene.log(job)
        with pytest.raises(FencedError):
            await old.append(Message(content={"type": "late"}, timestamp=now()))
    assert await scene.log(job) == before


async def test_a_job_that_had_ended_is_summed_up_and_taken_off_the_queue(scene: Scene) -> None:
    ending = Failed(code=FailureCode.TIMEOUT, error="too long")
    job = await scene.leave(began(1), ending, saved=True)
    assert not await scene.find()
    assert (await scene.log(job))[-1] == ending
    record = await scene.record(job)
    assert (record.status, record.error) == (JobStatus.FAILED, "too long")
    assert await scene.unfinished() == 0


async def test_a_job_that_never_started_is_run_by_the_next_replica(scene: Scene) -> None:
    job = await scene.leave(saved=False)
    assert await scene.find()
    _, connected, ending = await scene.log(job)
    assert isinstance(connected, Connected)
    assert (connected.attempt, connected.resuming) == (1, False)
    assert isinstance(ending, Failed)  # it has no credentials
    assert ending.code is FailureCode.CREDENTIALS


async def test_a_session_is_known_before_the_log_names_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads its id there may resume it, or be told at once who uses it."""
    sessions = await SessionRecords.open(scene.gateway)
    append = EventWriter.append
    found: list[Session | None] = []

    async def look_first(writer: EventWriter, event: Event) -> int:
        if isinstance(event, Connected):
            found.append(await sessions.get(event.session_id))
        return await append(writer, event)

    monkeypatch.setattr(EventWriter, "append", look_first)
    job = await scene.leave(saved=False)
    assert await scene.find()
    (session,) = found
    assert session is not None
    assert session.last_job_id == job.id


async def test_a_job_that_ends_before_it_begins_leaves_no_session(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await scene.leave(saved=False)

    async def cancel_meanwhile() -> None:
        ending = Failed(code=FailureCode.CANCELLED, error="x")
        await (await EventLog(scene.gateway).writer(job.id)).append(ending)

    monkeypatch.setattr(attempt_module, "_load_sdk", cancel_meanwhile)
    assert not await scene.find()
    assert await (await SessionRecords.open(scene.gateway)).list() == []


async def test_a_job_that_no_version_can_read_is_offered_again_and_then_ends(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_module, "_UNREADABLE_DELAY", 0.0)
    monkeypatch.setattr(attempt_module, "_UNREADABLE_TRIES", 3)
    job = Job.accept(JobRequest(prompt="x"), client="test")
    writer = await EventLog(scene.gateway).writer(job.id)
    await writer.append(Queued(job_id=job.id, position=1))
    await (await JobRecords.open(scene.gateway)).put(JobRecord.queued(job))
    await scene.gateway.jetstream.publish(
        job_subject("test", job.id), b'{"of": "another version"}', headers={"Nats-Msg-Id": job.id}
    )
    for offered in (True, True, False):
        assert not await scene.find()
        assert await scene.unfinished() == offered
    ending = (await scene.log(job))[-1]
    assert isinstance(ending, Failed)
    assert ending.code is FailureCode.INTERNAL
    assert (await scene.record(job)).status is JobStatus.FAILED
