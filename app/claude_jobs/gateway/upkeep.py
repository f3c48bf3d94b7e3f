"""What a gateway does by itself, again and again. Every gateway does it: that does no harm."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial

import nats.errors
import nats.js.errors

from claude_jobs.bus.sessions import sweep
from claude_jobs.contract.job import TERMINAL_STATUSES
from claude_jobs.gateway.settlement import is_over
from claude_jobs.gateway.state import Backend

log = logging.getLogger(__name__)

# The pause between two times, in seconds.
_SWEEP_EVERY = 60.0
_CLEAR_EVERY = 10.0
# So many jobs of a long queue are looked at a time: each is a question to the broker.
_CLEAR_AT_MOST = 100


async def keep_up(backend: Backend) -> None:
    """Keep the broker's content as it should be, for ever."""
    async with asyncio.TaskGroup() as care:
        care.create_task(_repeat(_sweep_sessions, backend, every=_SWEEP_EVERY))
        care.create_task(_repeat(clear_queue, backend, every=_CLEAR_EVERY))


async def _repeat(
    what: Callable[[Backend], Awaitable[None]], backend: Backend, *, every: float
) -> None:
    while True:
        await asyncio.sleep(every)
        try:
            await what(backend)
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.warning(
                "some upkeep is left for the next time",
                extra={"what": what.__name__.strip("_"), "cause": repr(error)},
            )


async def _sweep_sessions(backend: Backend) -> None:
    """Keep the log of sessions within its bounds: the broker alone would cut sessions in two."""
    removed = await sweep(backend.session_log, backend.sessions, partial(is_over, backend))
    if removed:
        log.info("removed sessions", extra={"sessions": removed})


async def clear_queue(backend: Backend) -> None:
    """Take jobs off the queue that have ended, and that a broker which was killed has kept.

    One that is killed may forget that it removed a job whose end it heard, and then hands it to
    nobody (nats-server 2.9 and 2.10). It would count as waiting for ever: against the bound of the
    queue, and against what its client may run at a time.
    """
    # The broker's own counts do not tell: a killed one may also count jobs that it has removed.
    unfinished = await backend.queue.unfinished()
    for job_id in random.sample(unfinished, min(len(unfinished), _CLEAR_AT_MOST)):
        record = await backend.records.get(job_id)
        last = await backend.events.last(job_id)
        # Either tells: a killed broker may have lost the record, and the log has its bounds.
        if (record is not None and record.status in TERMINAL_STATUSES) or (
            last is not None and last.is_terminal
        ):
            log.info("a job that has ended was in the queue", extra={"job": job_id})
            await backend.queue.withdraw(record.client if record else "*", job_id)
