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
from claude_jobs.contract.event import Completed, Event, Failed, FailureCode
from claude_jobs.contract.job import TERMINAL_STATUSES, JobRecord
from claude_jobs.gateway.state import Backend

log = logging.getLogger(__name__)

# A submission is finished long before.
_TIME_FOR_THE_WRITER = timedelta(seconds=30)


async def settled(backend: Backend, record: JobRecord) -> JobRecord:
    """Return the record as the job's log has it: ended, once the log says that it has.

    A client that has read the end of a job reads it here, too, although whoever wrote it is only
    just summing it up. The record is written only when nobody else will.
    """
    if record.status in TERMINAL_STATUSES:
        return record
    last = await backend.events.last(record.id)
    ending = last.event if last is not None and last.is_terminal else None
    writer_may_live = await backend.queue.holds(record.client, record.id)
    if ending is None:
        if writer_may_live or now() - accepted_at(record.id) < _TIME_FOR_THE_WRITER:
            return record
        ending = await _ended_by_us(backend, record.id)
    # Meanwhile it may have been summed up, by one who knows more than this record.
    record = await backend.records.get(record.id) or record
    if record.status in TERMINAL_STATUSES or not isinstance(ending, Completed | Failed):
        return record
    record = record.ended(ending)
    if not writer_may_live:
        await backend.records.put(record)
    return record


async def _ended_by_us(backend: Backend, job_id: str) -> Event | None:
    """End a job that is neither in the queue nor has an end: its submission was never finished.

    Returns its end, which in the same moment may have become another one.
    """
    writer = await backend.events.writer(job_id)
    if not isinstance(writer.last, Completed | Failed):
        log.warning("ending a job that never got into the queue", extra={"job": job_id})
        with contextlib.suppress(FencedError):
            await writer.append(
                Failed(
                    code=FailureCode.INTERNAL,
                    error="the gateway was lost while it took this job in: submit it again",
                )
            )
        writer = await backend.events.writer(job_id)
    return writer.last


async def is_over(backend: Backend, job_id: str) -> bool:
    """Tell whether nothing more will come of a job; one that is not known any more is over, too."""
    record = await backend.records.get(job_id)
    if record is None:
        # Or not known yet: its submission is on its way.
        return now() - accepted_at(job_id) >= _TIME_FOR_THE_WRITER
    return (await settled(backend, record)).status in TERMINAL_STATUSES
