"""What a gateway does by itself keeps the queue true."""

import pytest
from bus_ends import ENDED, Ends, job, pull

from claude_jobs.contract.job import JobRecord
from claude_jobs.gateway.state import Backend
from claude_jobs.gateway.upkeep import clear_queue

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_job_that_has_ended_leaves_the_queue_though_the_broker_thinks_it_is_leased(
    ends: Ends,
) -> None:
    """A broker that is killed may keep both: the job, and that a replica holds it."""
    backend = await Backend.open(ends.gateway)
    ended, running, waiting = job("ended"), job("running"), job("waiting")
    for each in (ended, running, waiting):
        await backend.queue.submit(each)
        await backend.records.put(JobRecord.queued(each))
    assert [(await pull(ends)).job_id, (await pull(ends)).job_id] == [ended.id, running.id]
    await clear_queue(backend)
    assert await backend.queue.unfinished() == [ended.id, running.id, waiting.id]

    await backend.records.put(JobRecord.queued(ended).ended(ENDED))
    await clear_queue(backend)
    assert await backend.queue.unfinished() == [running.id, waiting.id]
    assert (await pull(ends)).job_id == waiting.id


@pytest.mark.parametrize("known", [True, False], ids=["as running", "not at all"])
async def test_a_job_whose_log_has_ended_leaves_the_queue_though_its_record_does_not_say_so(
    ends: Ends, known: bool
) -> None:
    """A broker that is killed may have lost the record's last state, or all of it."""
    backend = await Backend.open(ends.gateway)
    ended, waiting = job("ended"), job("waiting")
    for each in (ended, waiting):
        await backend.queue.submit(each)
        if known:
            await backend.records.put(JobRecord.queued(each))
    lease = await pull(ends)
    await (await ends.log.writer(ended.id)).append(ENDED)

    await clear_queue(backend)
    assert await backend.queue.unfinished() == [waiting.id]
    await lease.finish()  # by a replica that was just about to
    assert (await pull(ends)).job_id == waiting.id
