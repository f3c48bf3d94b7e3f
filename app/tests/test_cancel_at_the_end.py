"""A cancel that meets the job's end."""

import pytest
from bus_ends import ENDED, Ends, job

from claude_jobs.contract.error import RequestRefusedError
from claude_jobs.contract.event import Completed, Failed, FailureCode, Queued
from claude_jobs.contract.job import JobRecord, JobStatus
from claude_jobs.gateway.jobs import cancel
from claude_jobs.gateway.state import Backend

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def ended_meanwhile(ends: Ends, backend: Backend, end: Completed | Failed) -> JobRecord:
    """Return the record of a job from before its end came into the log."""
    accepted = job()
    await backend.events.begin(accepted.id).append(Queued(job_id=accepted.id, position=1))
    record = JobRecord.queued(accepted).model_copy(update={"status": JobStatus.RUNNING})
    await backend.records.put(record)
    await (await ends.log.writer(record.id)).append(end)
    return record


async def test_a_replica_that_obeys_at_once_is_no_conflict(ends: Ends) -> None:
    """It may end the job before the gateway, which has just asked for that, looks at the log."""
    backend = await Backend.open(ends.gateway)
    end = Failed(code=FailureCode.CANCELLED, error="the job was cancelled")
    shown = await cancel(backend, await ended_meanwhile(ends, backend, end), "somebody")
    assert shown.status is JobStatus.CANCELLED


async def test_a_job_that_ended_well_meanwhile_is_one(ends: Ends) -> None:
    backend = await Backend.open(ends.gateway)
    record = await ended_meanwhile(ends, backend, ENDED)
    with pytest.raises(RequestRefusedError, match="has already ended: it is completed"):
        await cancel(backend, record, "somebody")
