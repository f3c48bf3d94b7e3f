"""The job queue, against a real nats-server."""

import asyncio
import random
from datetime import timedelta
from time import monotonic

import pytest
from bus_ends import SHORT_LEASE, Ends, job, pull
from nats_server import NatsServer

from claude_jobs.bus.queue import JobQueue, QueueFullError
from claude_jobs.bus.topology import (
    JOBS_STREAM,
    Bounds,
)
from claude_jobs.contract.job import Job

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


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
