"""A job's events over HTTP: nothing lost, nothing twice, from anywhere, and nobody held up."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from time import monotonic
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
from aiohttp import web
from bus_ends import ENDED, SOON, connected, line, present
from event_client import (
    SentEvent,
    WrittenPool,
    memory_of,
    other_gateway,
    ready,
    sent_events,
    written_pool,
)

from claude_jobs.bus.events import EventWriter
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue, Lease
from claude_jobs.bus.topology import EVENTS_STREAM
from claude_jobs.contract.base import now
from claude_jobs.contract.event import Failed, FailureCode, Message
from claude_jobs.contract.job import JobRecord
from claude_jobs.contract.status import Replica
from claude_jobs.gateway import event_stream
from claude_jobs.gateway.app import create_app
from claude_jobs.gateway.state import STATE
from claude_jobs.settings import GatewaySettings, load

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def written() -> AsyncIterator[WrittenPool]:
    async with written_pool() as pool:
        yield pool


async def a_job(written: WrittenPool, lines: int) -> tuple[str, list[int], EventWriter]:
    """Make a job that runs and has said so much; returns its id and its events' ids."""
    made, writer = await written.job()
    ids = [writer.sequence]
    ids += [await writer.append(line(number)) for number in range(lines)]
    return made.id, ids, writer


async def test_events_are_replayed_after_any_id_and_then_followed(written: WrittenPool) -> None:
    job_id, ids, writer = await a_job(written, 5)
    for start in (0, *ids[:-1]):
        async with written.stream(job_id, params={"after": start}) as events:
            left = [number for number in ids if number > start]
            assert [(await anext(events)).id for _ in left] == left
    async with written.stream(job_id, params={"after": ids[-1]}) as events:
        following = asyncio.ensure_future(anext(events))
        ids.append(await writer.append(line(5)))
        event = await asyncio.wait_for(following, SOON)
        ids.append(await writer.append(ENDED))
        rest = [each async for each in events]
    assert (event.id, event.type) == (ids[-2], "message")
    assert json.loads(event.data)["content"] == {"type": "line", "number": 5}
    assert [(each.id, each.type) for each in rest] == [(ids[-1], "completed")]
    assert rest[0].data.encode() == ENDED.to_json()
    every = await written.all(job_id)
    assert [each.id for each in every] == ids
    assert every[0].type == "queued"


async def test_the_header_wins_over_the_address(written: WrittenPool) -> None:
    job_id, ids, writer = await a_job(written, 3)
    await writer.append(ENDED)
    events = await written.all(
        job_id, params={"after": ids[0]}, headers={"Last-Event-ID": str(ids[2])}
    )
    assert events[0].id == ids[3]
    events = await written.all(job_id, params={"after": ids[0]}, headers={"Last-Event-ID": ""})
    assert events[0].id == ids[1]


async def test_a_client_that_has_seen_the_end_gets_204(written: WrittenPool) -> None:
    job_id, _, writer = await a_job(written, 3)
    last = await writer.append(ENDED)
    for after in (last, last + 1, last + 1000):
        answer = await written.answer(job_id, headers={"Last-Event-ID": str(after)})
        assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "0x1", "٣", "1 2", "9" * 19])
@pytest.mark.parametrize("field", ["after", "Last-Event-ID"])
async def test_an_id_that_is_no_number_is_refused(
    written: WrittenPool, field: str, given: str
) -> None:
    job_id, _, _ = await a_job(written, 1)
    asked = {"params": {field: given}} if field == "after" else {"headers": {field: given.encode()}}
    answer = await written.answer(job_id, **asked)
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_request"
    assert answer.json()["error"].startswith(f"{field}: must be the id of an event")


async def test_a_parameter_that_is_not_known_is_refused(written: WrittenPool) -> None:
    job_id, ids, _ = await a_job(written, 1)
    answer = await written.answer(job_id, params={"afer": ids[0]})
    assert (answer.status_code, answer.json()["error"]) == (400, "afer: there is no such parameter")


async def test_an_id_that_a_running_job_has_not_reached_is_refused(written: WrittenPool) -> None:
    """Its events might never come: the client is of another deployment."""
    job_id, ids, _ = await a_job(written, 1)
    answer = await written.answer(job_id, params={"after": ids[-1] + 1000})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"after: this job has no event {ids[-1] + 1000} yet")


@pytest.mark.parametrize(
    "job_id", ["01a223ab-fdd8-74d0-94ef-e950bdf254d3", "no-id", "*", "%3E", "a.b", "a%20b"]
)
async def test_a_job_that_is_not_known_is_not_found(written: WrittenPool, job_id: str) -> None:
    answer = await written.answer(job_id)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_events_have_no_head(written: WrittenPool) -> None:
    job_id, _, _ = await a_job(written, 1)
    answer = await written.http.head(f"/api/jobs/{job_id}/events")
    assert answer.status_code == 405


async def drop_below(written: WrittenPool, sequence: int) -> None:
    """Let the log drop its oldest events, as its bounds do."""
    await written.bus.jetstream.purge_stream(EVENTS_STREAM, seq=sequence)


async def test_what_the_log_has_dropped_is_told_as_a_gap_once(written: WrittenPool) -> None:
    _, _, other = await a_job(written, 3)
    job_id, ids, writer = await a_job(written, 6)
    await other.append(line(9))
    ids.append(await writer.append(ENDED))
    await drop_below(written, ids[3])

    gap, *rest = await written.all(job_id)
    assert (gap.type, json.loads(gap.data)) == (
        "gap",
        {"type": "gap", "from": 1, "to": ids[2]},
    )
    assert [event.id for event in rest] == ids[3:]
    # A client that lost the connection right after it is not told again.
    again = await written.all(job_id, headers={"Last-Event-ID": str(gap.id)})
    assert again == rest
    gap, *rest = await written.all(job_id, params={"after": ids[1]})
    assert json.loads(gap.data) == {"type": "gap", "from": ids[1] + 1, "to": ids[2]}
    # Who has all that was dropped misses nothing.
    assert (await written.all(job_id, params={"after": ids[2]}))[0].id == ids[3]


async def test_a_whole_job_in_a_log_that_dropped_others_has_no_gap(written: WrittenPool) -> None:
    _, dropped, _ = await a_job(written, 3)
    job_id, ids, writer = await a_job(written, 1)
    ids.append(await writer.append(ENDED))
    await drop_below(written, dropped[-1] + 1)
    assert [event.id for event in await written.all(job_id)] == ids


async def test_a_job_goes_on_after_a_gap_at_its_end(written: WrittenPool) -> None:
    job_id, ids, writer = await a_job(written, 3)
    await drop_below(written, ids[-1] + 1)
    async with written.stream(job_id, params={"after": ids[0]}) as events:
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        last = await writer.append(ENDED)
        gap = await asyncio.wait_for(first, SOON)
        assert json.loads(gap.data) == {"type": "gap", "from": ids[0] + 1, "to": ids[-1]}
        assert [(event.id, event.type) async for event in events] == [(last, "completed")]


@pytest.mark.parametrize(
    "ending",
    [ENDED, Failed(code=FailureCode.TIMEOUT, error="too long"), None],
    ids=["completed", "failed", "cancelled"],
)
async def test_the_end_of_a_job_whose_log_is_gone_comes_from_its_record(
    written: WrittenPool, ending: Failed | None
) -> None:
    ending = ending or Failed(code=FailureCode.CANCELLED, error="the job was cancelled")
    made, writer = await written.job()
    seen = writer.sequence
    await writer.append(ending)
    await written.records.put(JobRecord.queued(made).ended(ending))
    _, ids, _ = await a_job(written, 1)
    await drop_below(written, ids[0])

    async with asyncio.timeout(SOON):
        gap, end = await written.all(made.id, params={"after": seen})
    assert (gap.type, json.loads(gap.data)["from"]) == ("gap", seen + 1)
    assert end.id is None
    told, logged = json.loads(end.data), json.loads(ending.to_json())
    assert {name: told[name] for name in ("type", "result", "code", "error") if name in told} == {
        name: logged[name] for name in ("type", "result", "code", "error") if name in logged
    }
    assert (await written.answer(made.id, params={"after": gap.id})).status_code == 204


async def test_no_event_is_lost_or_sent_twice_when_the_broker_is_killed(
    written: WrittenPool,
) -> None:
    job_id, ids, writer = await a_job(written, 20)
    received: list[SentEvent] = []

    async def read() -> None:
        async with written.stream(job_id) as events:
            async for event in events:
                received.append(event)  # noqa: PERF401 - seen while it grows

    async def all_have_come() -> None:
        async with asyncio.timeout(20):
            while not reading.done() and len(received) < len(ids):
                await asyncio.sleep(0.02)

    reading = asyncio.create_task(read())
    for _ in range(2):
        await all_have_come()
        written.pool.processes["broker"].kill()
        ids += [await writer.append(line(number)) for number in range(50)]
    await all_have_come()
    ids.append(await writer.append(ENDED))
    await asyncio.wait_for(reading, 20)
    assert [event.id for event in received] == ids


async def test_a_replay_outlives_the_broker(written: WrittenPool) -> None:
    job_id, ids, writer = await a_job(written, 1)
    big = Message(content={"text": "x" * 100_000}, timestamp=now())
    ids += [await writer.append(big) for _ in range(200)]
    ids.append(await writer.append(ENDED))
    async with written.stream(job_id) as events:
        received = [(await anext(events)).id]
        # Far more is left than the buffers on the way to this client hold.
        written.pool.processes["broker"].kill()
        received += [event.id async for event in events]
    assert received == ids


async def test_a_client_goes_on_at_another_gateway_when_its_own_is_killed(
    written: WrittenPool,
) -> None:
    job_id, ids, writer = await a_job(written, 20)
    received: list[SentEvent] = []
    async with other_gateway(written) as other:
        with pytest.raises(httpx.TransportError):
            async with written.stream(job_id, url=other.url) as events:
                async for event in events:
                    received.append(event)
                    if event.id == ids[-1]:
                        await other.kill()
        ids += [await writer.append(line(number)) for number in range(20)]
        ids.append(await writer.append(ENDED))
        last = {"Last-Event-ID": str(received[-1].id)}
        received += await written.all(job_id, headers=last)
        await other.start()
        await ready(written.http, other.url)
        # The one that was killed serves it just as well when it is back.
        assert [each.id for each in await written.all(job_id, url=other.url)] == ids
    assert [event.id for event in received] == ids


def unread_stream(url: str, token: str, job_id: str) -> socket.socket:
    """Ask for a job's events over a connection that takes hardly anything."""
    place = urlsplit(url)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((place.hostname, place.port))
    reader.sendall(
        f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {token}\r\n\r\n".encode()
    )
    return reader


async def test_a_client_that_does_not_read_delays_nobody_and_fills_no_memory(
    written: WrittenPool,
) -> None:
    job_id, ids, writer = await a_job(written, 1)
    big = Message(content={"text": "x" * 200_000}, timestamp=now())
    gateway = written.pool.processes["gateway"]
    # A part is stored when the streams begin, the rest comes while they are open.
    ids += [await writer.append(big) for _ in range(50)]
    stuck = [unread_stream(written.pool.url, written.pool.token, job_id) for _ in range(10)]
    try:
        async with written.stream(job_id) as events:
            assert (await anext(events)).id == ids[0]
            before = memory_of(gateway)
            started = monotonic()
            ids += [await writer.append(big) for _ in range(400)]
            ids.append(await writer.append(ENDED))
            assert [event.id async for event in events] == ids[1:]
            assert monotonic() - started < 10
        # 90 MB are to be sent to each of them.
        assert memory_of(gateway) - before < 40 * 2**20
    finally:
        for each in stuck:
            each.close()


async def test_a_client_that_takes_nothing_is_cut_and_can_resume(
    written: WrittenPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "SEND_TIMEOUT", 0.5)
    for name, value in written.pool._environment("gateway").items():
        monkeypatch.setenv(name, value)
    app = create_app(load(GatewaySettings, secrets_dir=written.pool.root / "secrets"))
    job_id, ids, writer = await a_job(written, 1)
    big = Message(content={"text": "x" * 200_000}, timestamp=now())
    ids += [await writer.append(big) for _ in range(60)]
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        await ready(written.http, url)
        async with written.http.stream("GET", f"{url}/api/jobs/{job_id}/events") as response:
            events = sent_events(response)
            last = (await anext(events)).id
            async with asyncio.timeout(10):
                while app[STATE].streams:
                    await asyncio.sleep(0.05)
            # What was under way still comes, then the connection is gone.
            with pytest.raises((httpx.TransportError, AssertionError)):
                async for event in events:
                    last = event.id
    finally:
        await runner.cleanup()
    assert last is not None
    assert last < ids[-1]
    ids.append(await writer.append(ENDED))
    rest = await written.all(job_id, headers={"Last-Event-ID": str(last)})
    assert [event.id for event in rest] == ids[ids.index(last) + 1 :]


def works(replica: str, lease: Lease) -> Replica:
    return present(replica).model_copy(update={"job_id": lease.job_id})


async def test_a_waiting_job_tells_its_position_until_it_starts() -> None:
    async with written_pool() as pool, pool.as_replica() as replica:
        queue, presence = JobQueue(replica), await Presence.open(replica)
        async with (
            pool.http.stream("POST", "/api/execute", json={"prompt": "1"}),
            pool.http.stream("POST", "/api/execute", json={"prompt": "2"}) as second,
            pool.http.stream("POST", "/api/execute", json={"prompt": "3"}) as third,
        ):
            events = sent_events(third)
            queued = await anext(events)
            assert queued.id is not None
            assert json.loads(queued.data)["position"] == 3
            lease = await queue.pull()
            await presence.announce(works("r", lease))
            moved = await asyncio.wait_for(anext(events), SOON)
            assert (moved.id, moved.type) == (None, "queued")
            assert json.loads(moved.data) == {**json.loads(queued.data), "position": 2}
            # One who comes back while the job waits is told, too, and from the first event on.
            job_id = third.headers["X-Job-Id"]
            async with pool.stream(job_id, params={"after": queued.id}) as again:
                assert await asyncio.wait_for(anext(again), SOON) == moved
            await presence.announce(works("s", await queue.pull()))
            moved = await asyncio.wait_for(anext(events), SOON)
            assert json.loads(moved.data)["position"] == 1

            writer = await pool.log.writer(job_id)
            begun = await writer.append(connected("r"))
            assert (await asyncio.wait_for(anext(events), SOON)).id == begun
            # From here on it waits no more, whatever the queue says.
            await lease.finish()
            await asyncio.sleep(1.5)
            end = await writer.append(ENDED)
            assert [event.id async for event in events] == [end]
            positions = []
            async for event in sent_events(second):
                positions.append(json.loads(event.data)["position"])
                if positions[-1] == 1:
                    break
            assert positions == [2, 1]
