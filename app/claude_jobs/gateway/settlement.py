"""Brings a job's record in line with its log and the queue, so that no status is ever stuck.

Whoever wrote them may have been lost between two steps: a gateway after the record and before
the place in the queue, a replica after the terminal event and before the record.
"""

import contextlib
import logging
from datetime import timedelta

from claude_jobs.bus.events import FencedError
from claude_jobs.bus.records import accepted_at
from claude_jobs.contract.base import now
from claude_jobs.contract.event import Completed, Failed, FailureCode
from claude_jobs.contract.job import TERMINAL_STATUSES, JobRecord
from claude_jobs.gateway.state import Backend

log = logging.getLogger(__name__)

# A submission is finished long before; a replica sums a job up well within it.
_TIME_FOR_THE_WRITER = timedelta(seconds=30)


async def settled(backend: Backend, record: JobRecord) -> JobRecord:
    """Return the record, brought to its end if the job has ended and the record does not say so."""
    if record.status in TERMINAL_STATUSES or now() - accepted_at(record.id) < _TIME_FOR_THE_WRITER:
        return record
    if await backend.queue.holds(record.client, record.id):
        return record
    writer = await backend.events.writer(record.id)
    if not isinstance(writer.last, Completed | Failed):
        # Not in the queue and without an end: its submission was never finished.
        log.warning("ending a job that never got into the queue", extra={"job": record.id})
        with contextlib.suppress(FencedError):
            await writer.append(
                Failed(
                    code=FailureCode.INTERNAL,
                    error="the gateway was lost while it took this job in: submit it again",
                )
            )
        writer = await backend.events.writer(record.id)
    if isinstance(writer.last, Completed | Failed):
        record = record.ended(writer.last)
        await backend.records.put(record)
    return record


async def is_over(backend: Backend, job_id: str) -> bool:
    """Tell whether nothing more will come of a job; one that is not known any more is over, too."""
    record = await backend.records.get(job_id)
    if record is None:
        # Or not known yet: its submission is on its way.
        return now() - accepted_at(job_id) >= _TIME_FOR_THE_WRITER
    return (await settled(backend, record)).status in TERMINAL_STATUSES
