"""The event log, against a real nats-server."""

import asyncio
from contextlib import aclosing

import nats.errors
import nats.js.errors
import pytest
from bus_ends import ENDED, SOON, Ends, connected, line, take

from claude_jobs.bus.events import CaughtUp, FencedError
from claude_jobs.bus.topology import EVENTS_STREAM
from claude_jobs.contract.base import now
from claude_jobs.contract.event import (
    Failed,
    FailureCode,
    Message,
    Queued,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


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


async def test_what_is_stored_is_read_to_its_end_and_no_further(ends: Ends) -> None:
    writer = await ends.log.writer("j")
    ids = [await writer.append(line(number)) for number in range(1200)]
    for log in (ends.log, ends.reader):  # a replica may do this, too
        async with asyncio.timeout(SOON):
            assert [logged.sequence async for logged in log.stored("j")] == ids
            assert [logged.sequence async for logged in log.stored("j", after=ids[-2])] == ids[-1:]
            assert [logged async for logged in log.stored("j", after=ids[-1])] == []
            assert [logged async for logged in log.stored("other")] == []


async def test_events_as_large_as_may_be_are_read_with_others_between_them(ends: Ends) -> None:
    writer = await ends.log.writer("j")
    sizes = [10, 7 * 2**20, 10, 7 * 2**20, 2**20, 2**20, 10]
    for size in sizes:
        await writer.append(Message(content={"text": "x" * size}, timestamp=now()))
    async with asyncio.timeout(SOON):
        read = [logged.event async for logged in ends.reader.stored("j")]
    assert [len(event.content["text"]) for event in read if isinstance(event, Message)] == sizes


async def test_a_follower_who_takes_nothing_is_held_nothing_for_and_misses_nothing(
    ends: Ends,
) -> None:
    writer = await ends.log.writer("j")
    ids = [await writer.append(line(0))]
    async with aclosing(ends.reader.read_batches("j")) as batches:
        first = await anext(batches)
        assert not isinstance(first, CaughtUp)
        assert isinstance(await anext(batches), CaughtUp)
        big = Message(content={"text": "x" * 100_000}, timestamp=now())
        ids += [await writer.append(big) for _ in range(20)]
        ids.append(await writer.append(ENDED))
        quick = await take(ends.reader, "j")
        assert [logged.sequence for logged in quick] == ids
        seen = list(first)
        async with asyncio.timeout(SOON):
            async for batch in batches:
                if not isinstance(batch, CaughtUp):
                    # What had to be held for it is bounded.
                    assert sum(len(logged.data) for logged in batch) < 2**21
                    seen += batch
    assert [logged.sequence for logged in seen] == ids


async def test_each_event_says_which_one_came_before_it(ends: Ends) -> None:
    writer, other = await ends.log.writer("j"), await ends.log.writer("other")
    ids = []
    for number in range(3):
        await other.append(line(number))
        ids.append(await writer.append(line(number)))
    ids.append(await writer.append(ENDED))
    read = await take(ends.reader, "j")
    assert [logged.previous for logged in read] == [0, *ids[:-1]]


async def test_a_writer_goes_on_after_the_log_has_dropped_what_it_wrote(ends: Ends) -> None:
    writer = await ends.log.writer("j")
    dropped = await writer.append(line(1))
    await ends.gateway.jetstream.purge_stream(EVENTS_STREAM)
    await writer.append(line(2))
    await writer.append(ENDED)
    read = await take(ends.reader, "j")
    assert [logged.event.type for logged in read] == ["message", "completed"]
    assert read[0].previous == dropped  # a reader who has that one knows that nothing is missing


async def test_a_new_writer_is_fenced_though_the_log_is_empty(ends: Ends) -> None:
    await (await ends.log.writer("j")).append(line(1))
    with pytest.raises(FencedError):
        await ends.log.begin("j").append(line(2))


async def test_a_log_that_is_forgotten_is_empty(ends: Ends) -> None:
    await (await ends.reader.writer("j")).append(Queued(job_id="j", position=1))
    await ends.reader.forget("j")
    assert await ends.reader.last("j") is None
