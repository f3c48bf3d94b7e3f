"""A job's record follows its log: who has read the end of a job finds it ended."""

import pytest
from bus_ends import ENDED, Ends, job, pull

from claude_jobs.contract.event import Queued
from claude_jobs.contract.job import JobRecord, JobStatus
from claude_jobs.gateway.settlement import is_over, settled
from claude_jobs.gateway.state import Backend

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def running(backend: Backend) -> JobRecord:
    """Accept a job and begin it as a replica does."""
    accepted = job()
    await backend.events.begin(accepted.id).append(Queued(job_id=accepted.id, position=1))
    await backend.queue.submit(accepted)
    record = JobRecord.queued(accepted).model_copy(
        update={"status": JobStatus.RUNNING, "replica": "r"}
    )
    await backend.records.put(record)
    return record


async def test_a_job_is_over_as_soon_as_its_log_says_so(ends: Ends) -> None:
    """The replica still has to sum the job up, and to take it off the queue."""
    backend = await Backend.open(ends.gateway)
    record = await running(backend)
    assert not await is_over(backend, record.id)
    writer = await ends.log.writer(record.id)
    await writer.append(ENDED)

    assert await is_over(backend, record.id)
    shown = await settled(backend, record)
    assert (shown.status, shown.result) == (JobStatus.COMPLETED, ENDED.result)
    # What it has not finished is left to the replica.
    assert await backend.records.get(record.id) == record


async def test_what_the_replica_summed_up_wins(ends: Ends) -> None:
    """The record may have been read before the replica wrote it."""
    backend = await Backend.open(ends.gateway)
    seen = (await running(backend)).model_copy(update={"status": JobStatus.QUEUED, "replica": None})
    lease = await pull(ends)
    await (await ends.log.writer(seen.id)).append(ENDED)
    summed_up = seen.model_copy(update={"replica": "r"}).ended(ENDED)
    await backend.records.put(summed_up)
    await lease.finish()

    assert await settled(backend, seen) == summed_up
    assert await backend.records.get(seen.id) == summed_up


async def test_what_a_lost_replica_left_is_summed_up(ends: Ends) -> None:
    backend = await Backend.open(ends.gateway)
    record = await running(backend)
    lease = await pull(ends)
    await (await ends.log.writer(record.id)).append(ENDED)
    await lease.finish()

    shown = await settled(backend, record)
    assert (shown.status, shown.replica) == (JobStatus.COMPLETED, "r")
    assert await backend.records.get(record.id) == shown
