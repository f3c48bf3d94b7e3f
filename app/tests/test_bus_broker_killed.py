"""What outlives the kill of a real nats-server."""

import asyncio

import nats.errors
import nats.js.errors
import pytest
from bus_ends import ENDED, Ends, job, line, present, pull, take
from nats_server import NatsServer

from claude_jobs.bus.presence import Presence
from claude_jobs.bus.topology import (
    JOBS_STREAM,
    events_subject,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


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
