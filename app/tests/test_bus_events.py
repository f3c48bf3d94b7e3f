"""The event log, against a real nats-server."""

import asyncio
from contextlib import aclosing

import nats.errors
import nats.js.errors
import pytest
from bus_ends import ENDED, SOON, Ends, connected, line, take

from claude_jobs.bus.events import FencedError
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


async def test_a_log_that_is_forgotten_is_empty(ends: Ends) -> None:
    await (await ends.reader.writer("j")).append(Queued(job_id="j", position=1))
    await ends.reader.forget("j")
    assert await ends.reader.last("j") is None
