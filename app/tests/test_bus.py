"""What the broker is relied upon for, against a real nats-server."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic

import nats.errors
import nats.js.errors
import pytest
import pytest_asyncio
from nats_server import NatsServer

from claude_jobs.broker import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog, FencedError, LoggedEvent
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue, Lease, QueueFullError
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.topology import (
    EVENTS_STREAM,
    JOBS_CONSUMER,
    JOBS_STREAM,
    JOBS_SUBJECT,
    Bounds,
    events_subject,
)
from claude_jobs.contract.base import now
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Failed,
    FailureCode,
    Message,
    Queued,
)
from claude_jobs.contract.job import Job, JobRecord, JobRequest, JobStatus
from claude_jobs.contract.status import Replica, ReplicaStatus

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

# Far above what a job takes from the queue to a replica that waits, far below a lease.
SOON = 5.0
SHORT_LEASE = timedelta(seconds=2)
ENDED = Completed(
    result="done",
    session_id="s",
    usage={},
    cost_usd=0,
    num_turns=1,
    duration_ms=1,
    permission_denials=[],
)


def job(prompt: str = "hello") -> Job:
    return Job.accept(JobRequest(prompt=prompt), client="test")


def line(number: int) -> Message:
    return Message(content={"type": "line", "number": number}, timestamp=now())


def connected(replica: str) -> Connected:
    return Connected(job_id="j", session_id="s", replica=replica, node="n", attempt=1)


@dataclass
class Ends:
    """The two ends of the bus: what a gateway holds, and what a replica holds."""

    gateway: Bus
    replica: Bus

    @property
    def inbound(self) -> JobQueue:
        return JobQueue(self.gateway)

    @property
    def outbound(self) -> JobQueue:
        return JobQueue(self.replica)

    @property
    def log(self) -> EventLog:
        return EventLog(self.replica)

    @property
    def reader(self) -> EventLog:
        return EventLog(self.gateway)


@pytest_asyncio.fixture(loop_scope="session")
async def ends(nats_server: NatsServer) -> AsyncIterator[Ends]:
    async with nats_server.both_ends(Bounds()) as (gateway, replica):
        yield Ends(gateway, replica)


@pytest_asyncio.fixture(loop_scope="session")
async def short_lease(nats_server: NatsServer) -> AsyncIterator[Ends]:
    async with nats_server.both_ends(Bounds(lease=SHORT_LEASE)) as (gateway, replica):
        yield Ends(gateway, replica)


async def pull(ends: Ends) -> Lease:
    async with asyncio.timeout(SOON):
        return await ends.outbound.pull()


async def take(log: EventLog, job_id: str, *, after: int = 0) -> list[LoggedEvent]:
    async with aclosing(log.read(job_id, after=after)) as events:
        return [event async for event in events]


# The queue


async def test_jobs_are_handed_out_in_order_of_acceptance_each_once(ends: Ends) -> None:
    accepted = [job(str(number)) for number in range(50)]
    for each in accepted:
        await ends.inbound.submit(each)
    assert await ends.inbound.depth() == 50
    handed_out = []
    for _ in accepted:
        lease = await pull(ends)
        assert lease.attempt == 1
        handed_out.append(lease.job)
        await lease.finish()
    assert handed_out == accepted
    assert await ends.inbound.depth() == 0


async def test_a_waiting_pull_gets_the_job_that_comes(ends: Ends) -> None:
    waiting = asyncio.create_task(pull(ends))
    await asyncio.sleep(0)
    accepted = job()
    await ends.inbound.submit(accepted)
    assert (await waiting).job == accepted


async def test_a_job_that_is_submitted_twice_is_queued_once(ends: Ends) -> None:
    accepted = job()
    await ends.inbound.submit(accepted)
    await ends.inbound.submit(accepted)
    assert await ends.inbound.depth() == 1


async def test_a_pull_that_is_cancelled_loses_no_job(nats_server: NatsServer) -> None:
    """Pulls are cancelled at any moment while jobs come.

    A job that arrives too late is given back at once. Only one that the broker sends at the very
    moment in which the pull closes reaches nobody, and comes again when its lease ends.
    """
    lease = timedelta(seconds=5)
    async with nats_server.both_ends(Bounds(lease=lease)) as (gateway, replica):
        await _cancel_pulls(Ends(gateway, replica))


async def _cancel_pulls(ends: Ends) -> None:
    moment = random.Random(2)
    accepted = [job(str(number)) for number in range(60)]
    handed_out: list[Job] = []

    async def submit() -> None:
        for each in accepted:
            await ends.inbound.submit(each)
            await asyncio.sleep(moment.uniform(0, 0.01))

    async def pull_impatiently() -> None:
        while len(handed_out) < len(accepted):
            pulling = asyncio.create_task(ends.outbound.pull())
            await asyncio.wait({pulling}, timeout=moment.uniform(0, 0.02))
            pulling.cancel()
            try:
                lease = await pulling
            except asyncio.CancelledError:
                continue
            handed_out.append(lease.job)
            await lease.finish()

    async with asyncio.timeout(30):
        await asyncio.gather(submit(), *(pull_impatiently() for _ in range(3)))
    assert sorted(each.id for each in handed_out) == [each.id for each in accepted]
    assert (await ends.gateway.jetstream.stream_info(JOBS_STREAM)).state.messages == 0


async def test_a_job_that_is_given_back_is_handed_out_again_at_once(ends: Ends) -> None:
    first, second = job("first"), job("second")
    await ends.inbound.submit(first)
    await ends.inbound.submit(second)
    await (await pull(ends)).give_back()
    handed_out = [await pull(ends), await pull(ends)]
    assert {(lease.job.id, lease.attempt) for lease in handed_out} == {
        (first.id, 2),
        (second.id, 1),
    }


async def test_a_lease_that_is_not_extended_goes_to_another(short_lease: Ends) -> None:
    await short_lease.inbound.submit(job())
    lost = await pull(short_lease)
    started = monotonic()
    taken_over = await pull(short_lease)
    assert taken_over.job == lost.job
    assert taken_over.attempt == 2
    assert monotonic() - started > SHORT_LEASE.total_seconds() / 2


async def test_a_lease_that_is_extended_is_kept(short_lease: Ends) -> None:
    await short_lease.inbound.submit(job())
    lease = await pull(short_lease)
    other = asyncio.create_task(short_lease.outbound.pull())
    for _ in range(8):
        await asyncio.wait({other}, timeout=SHORT_LEASE.total_seconds() / 4)
        assert not other.done(), "the job was handed out twice"
        await lease.extend()
    await lease.finish()
    other.cancel()
    assert (await short_lease.gateway.jetstream.stream_info(JOBS_STREAM)).state.messages == 0


async def test_a_full_queue_refuses_and_keeps_what_it_has(nats_server: NatsServer) -> None:
    async with nats_server.both_ends(Bounds(queue_limit=2)) as (gateway, replica):
        queue = JobQueue(gateway)
        first, second = job("1"), job("2")
        await queue.submit(first)
        await queue.submit(second)
        with pytest.raises(QueueFullError):
            await queue.submit(job("3"))
        lease = await pull(Ends(gateway, replica))
        assert lease.job == first
        with pytest.raises(QueueFullError):  # a job that runs counts until it has ended
            await queue.submit(job("4"))
        await lease.finish()
        await queue.submit(job("5"))


# The event log


async def test_events_are_replayed_from_any_id_in_order_and_then_follow_live(ends: Ends) -> None:
    writer = await ends.log.writer("j")
    other = await ends.log.writer("other")
    ids = []
    for number in range(10):
        ids.append(await writer.append(line(number)))
        await other.append(line(number))
    for start in (0, ids[0], ids[4], ids[9]):
        left = [number for number in ids if number > start]
        async with aclosing(ends.reader.read("j", after=start)) as events, asyncio.timeout(SOON):
            assert [(await anext(events)).sequence for _ in left] == left

    live = asyncio.create_task(take(ends.reader, "j", after=ids[7]))
    ids += [await writer.append(line(number)) for number in range(10, 15)]
    ids.append(await writer.append(ENDED))
    async with asyncio.timeout(SOON):
        received = await live
    assert [logged.sequence for logged in received] == ids[8:]
    numbers = [each.event.content["number"] for each in received if isinstance(each.event, Message)]
    assert numbers == list(range(8, 15))
    assert received[-1].event == ENDED
    assert ids == sorted(set(ids))


async def test_nothing_follows_a_terminal_event(ends: Ends) -> None:
    writer = await ends.log.writer("j")
    await writer.append(line(1))
    last = await writer.append(ENDED)
    with pytest.raises(ValueError, match="nothing may follow"):
        await writer.append(line(2))
    late = await ends.log.writer("j")
    assert late.last == ENDED
    with pytest.raises(ValueError, match="nothing may follow"):
        await late.append(Failed(code=FailureCode.TIMEOUT, error="late"))
    assert (await take(ends.reader, "j"))[-1].sequence == last


@pytest.mark.parametrize("kind", ["the same event", "another event"])
async def test_of_two_writers_at_one_place_the_second_is_fenced(ends: Ends, kind: str) -> None:
    await (await ends.log.writer("j")).append(Queued(job_id="j", position=1))
    first, second = await ends.log.writer("j"), await ends.log.writer("j")
    await first.append(connected("a"))
    with pytest.raises(FencedError):
        await second.append(connected("a") if kind == "the same event" else line(1))
    await first.append(line(2))
    with pytest.raises(FencedError):
        await second.append(line(3))
    await first.append(ENDED)
    types = [logged.event.type for logged in await take(ends.reader, "j")]
    assert types == ["queued", "connected", "message", "completed"]


async def test_a_writer_that_was_overtaken_is_fenced(ends: Ends) -> None:
    slow = await ends.log.writer("j")
    await slow.append(connected("slow"))
    successor = await ends.log.writer("j")
    await successor.append(Failed(code=FailureCode.WORKER_LOST, error="lost"))
    with pytest.raises(FencedError):
        await slow.append(line(1))


async def test_an_append_whose_answer_was_lost_is_stored_once(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await ends.log.writer("j")
    await writer.append(line(1))
    publish = ends.replica.jetstream.publish
    lost = 0

    async def lose_the_answer(*arguments: object, **options: object) -> object:
        nonlocal lost
        answer = await publish(*arguments, **options)  # type: ignore[arg-type] # passed through
        if lost < 2:
            lost += 1
            raise nats.errors.TimeoutError
        return answer

    monkeypatch.setattr(ends.replica.jetstream, "publish", lose_the_answer)
    await writer.append(line(2))
    await writer.append(ENDED)
    assert lost == 2
    assert [logged.event.type for logged in await take(ends.reader, "j")] == [
        "message",
        "message",
        "completed",
    ]


async def test_a_log_that_is_forgotten_is_empty(ends: Ends) -> None:
    await (await ends.reader.writer("j")).append(Queued(job_id="j", position=1))
    await ends.reader.forget("j")
    assert await ends.reader.last("j") is None


# Records and presence


async def test_a_record_is_what_was_put_last(ends: Ends) -> None:
    gateway, replica = await JobRecords.open(ends.gateway), await JobRecords.open(ends.replica)
    record = JobRecord.queued(job())
    assert await gateway.get(record.id) is None
    await gateway.put(record)
    await replica.put(record.ended(ENDED))
    found = await gateway.get(record.id)
    assert found is not None
    assert (found.status, found.result) == (JobStatus.COMPLETED, "done")
    assert await replica.get(record.id) == found
    await gateway.forget(record.id)
    assert await gateway.get(record.id) is None


def present(name: str) -> Replica:
    return Replica(replica=name, node="n", status=ReplicaStatus.IDLE, since=now())


async def test_presence_ends_with_a_good_bye_or_with_silence(nats_server: NatsServer) -> None:
    async with nats_server.both_ends(Bounds(presence=timedelta(seconds=2))) as (gateway, replica):
        shown = await Presence.open(gateway)
        announced = await Presence.open(replica)
        assert await shown.list() == []
        await announced.announce(present("polite"))
        await announced.announce(present("silent"))
        assert [each.replica for each in await shown.list()] == ["polite", "silent"]
        await announced.withdraw("polite")
        assert [each.replica for each in await shown.list()] == ["silent"]
        async with asyncio.timeout(10):
            while await shown.list():
                await asyncio.sleep(0.1)


# A broker that is killed


async def test_a_broker_that_is_killed_loses_no_job_and_no_event(
    nats_server: NatsServer, ends: Ends
) -> None:
    accepted = [job(str(number)) for number in range(20)]
    for each in accepted:
        await ends.inbound.submit(each)
    running = await pull(ends)
    writer = await ends.log.writer(running.job.id)
    ids = [await writer.append(line(number)) for number in range(20)]

    await nats_server.restart()

    ids.append(await writer.append(ENDED))  # by itself, without a new connection
    assert [logged.sequence for logged in await take(ends.reader, running.job.id)] == ids
    await running.finish()
    for each in accepted[1:]:
        async with asyncio.timeout(15):
            lease = await ends.outbound.pull()
        assert lease.job == each
        await lease.finish()
    assert (await ends.gateway.jetstream.stream_info(JOBS_STREAM)).state.messages == 0


async def test_an_append_is_stored_once_though_the_broker_was_killed_after_it(
    nats_server: NatsServer, ends: Ends
) -> None:
    headers = {"Nats-Expected-Last-Subject-Sequence": "0", "Nats-Msg-Id": "writer:0"}
    data = line(1).to_json()
    answer = await ends.replica.jetstream.publish(events_subject("j"), data, headers=headers)
    await nats_server.restart()
    while True:
        try:
            again = await ends.replica.jetstream.publish(events_subject("j"), data, headers=headers)
            break
        except (nats.errors.Error, nats.js.errors.NoStreamResponseError):
            await asyncio.sleep(0.1)
    assert again.duplicate
    assert again.seq == answer.seq


async def test_a_waiting_pull_and_a_waiting_reader_outlive_the_broker(
    nats_server: NatsServer, ends: Ends
) -> None:
    writer = await ends.log.writer("j")
    seen = await writer.append(line(1))
    pulling = asyncio.create_task(ends.outbound.pull())
    reading = asyncio.create_task(take(ends.reader, "j", after=seen))
    await ends.gateway.nats.flush()
    await ends.replica.nats.flush()

    await nats_server.restart()

    last = await writer.append(ENDED)
    accepted = job()
    while True:
        try:
            await ends.inbound.submit(accepted)
            break
        except (nats.errors.Error, nats.js.errors.NoStreamResponseError):
            await asyncio.sleep(0.1)
    async with asyncio.timeout(15):
        assert (await pulling).job == accepted
        assert [logged.sequence for logged in await reading] == [last]


async def test_presence_comes_back_after_the_broker_was_killed(
    nats_server: NatsServer, ends: Ends
) -> None:
    announced, shown = await Presence.open(ends.replica), await Presence.open(ends.gateway)
    await announced.announce(present("a"))
    await nats_server.restart()
    async with asyncio.timeout(15):
        while True:
            try:
                await announced.announce(present("b"))
                break
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.1)
    assert "b" in [each.replica for each in await shown.list()]


# Rights


async def refused(bus: Bus, subject: str, payload: bytes = b"{}") -> bool:
    """Tell whether a request is not answered: the broker passes on nothing that is forbidden."""
    try:
        await bus.nats.request(subject, payload, timeout=0.5)
    except (nats.errors.TimeoutError, nats.errors.NoRespondersError):
        return True
    return False


async def test_a_replica_cannot_submit_a_job(ends: Ends) -> None:
    with pytest.raises((nats.errors.Error, nats.js.errors.Error)):
        await ends.replica.jetstream.publish(JOBS_SUBJECT, job().to_json(), timeout=0.5)
    assert await ends.inbound.depth() == 0


async def test_a_replica_can_neither_make_nor_change_nor_empty_a_stream(ends: Ends) -> None:
    for name in ("NEW", EVENTS_STREAM):
        config = json.dumps({"name": name, "subjects": [f"{name}.>"]}).encode()
        assert await refused(ends.replica, f"$JS.API.STREAM.CREATE.{name}", config)
        assert await refused(ends.replica, f"$JS.API.STREAM.UPDATE.{name}", config)
    assert await refused(ends.replica, f"$JS.API.STREAM.PURGE.{EVENTS_STREAM}")
    assert await refused(ends.replica, f"$JS.API.STREAM.DELETE.{EVENTS_STREAM}")
    assert await refused(ends.replica, f"$JS.API.STREAM.MSG.GET.{JOBS_STREAM}", b'{"seq":1}')
    names = [stream.config.name for stream in await ends.gateway.jetstream.streams_info()]
    assert "NEW" not in names
    assert EVENTS_STREAM in names


@pytest.mark.parametrize("subject", [f"_INBOX_{GATEWAY_USER}.>", ">", "events.*", JOBS_SUBJECT])
async def test_a_replica_hears_nothing_that_is_not_for_it(ends: Ends, subject: str) -> None:
    heard: list[object] = []

    async def hear(message: object) -> None:
        heard.append(message)

    await ends.replica.nats.subscribe(subject, cb=hear)
    await ends.replica.nats.flush()
    await ends.inbound.submit(job())
    await (await ends.reader.writer("j")).append(line(1))
    await ends.replica.nats.flush()
    assert heard == []


async def test_a_gateway_cannot_pull(ends: Ends) -> None:
    await ends.inbound.submit(job())
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{JOBS_CONSUMER}"
    assert await refused(ends.gateway, subject, b'{"batch":1,"no_wait":true}')
    assert await ends.inbound.depth() == 1


async def test_nobody_comes_in_with_a_wrong_password(nats_server: NatsServer, ends: Ends) -> None:
    assert ends.replica.is_connected
    for user, password in ((REPLICA_USER, "wrong"), ("", "")):
        with pytest.raises(nats.errors.Error):
            await nats.connect(nats_server.url, user=user, password=password, allow_reconnect=False)
