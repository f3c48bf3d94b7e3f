"""Job records and the presence of replicas, against a real nats-server."""

import asyncio
from datetime import timedelta

import pytest
from bus_ends import ENDED, Ends, job, present
from nats_server import NatsServer

from claude_jobs.bus.presence import Presence
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.topology import (
    Bounds,
)
from claude_jobs.contract.job import JobRecord, JobStatus

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


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


async def test_a_listing_under_news_shows_everybody_once(ends: Ends) -> None:
    shown, announced = await Presence.open(ends.gateway), await Presence.open(ends.replica)
    names = [f"replica-{number}" for number in range(8)]

    async def announce() -> None:
        for name in names:
            await announced.announce(present(name))

    async def announce_always() -> None:
        while True:
            await announce()

    await announce()
    async with asyncio.timeout(60):
        for _ in range(100):
            assert [each.replica for each in await shown.list()] == names
        announcing = asyncio.create_task(announce_always())
        try:
            for _ in range(200):
                assert [each.replica for each in await shown.list()] == names
        finally:
            announcing.cancel()
            await asyncio.wait([announcing])
