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
from claude_jobs.gateway import job_directories
from claude_jobs.gateway.settlement import is_over
from claude_jobs.gateway.state import Backend, GatewayState
from claude_jobs.settings import WorkspaceMode
from claude_jobs.workspace_threads import WorkspaceStalledError

log = logging.getLogger(__name__)

# The pause between two times, in seconds.
_SWEEP_EVERY = 60.0
_CLEAR_EVERY = 10.0
_DIRECTORIES_EVERY = 600.0
# So many jobs of a long queue are looked at a time: each is a question to the broker.
_CLEAR_AT_MOST = 100


# What a broker or a file server that is away for a while raises.
_PASSING = (nats.errors.Error, nats.js.errors.Error, TimeoutError, WorkspaceStalledError)


async def keep_up(state: GatewayState, backend: Backend) -> None:
    """Keep the content of broker and workspace as it should be, for ever."""
    async with asyncio.TaskGroup() as care:
        if state.settings.workspace_mode is WorkspaceMode.PER_JOB:
            remove_old = partial(_remove_job_directories, state)
            care.create_task(_repeat(remove_old, backend, every=_DIRECTORIES_EVERY))
        care.create_task(_repeat(_sweep_sessions, backend, every=_SWEEP_EVERY))
        care.create_task(_repeat(clear_queue, backend, every=_CLEAR_EVERY))


async def _repeat(
    what: Callable[[Backend], Awaitable[None]], backend: Backend, *, every: float
) -> None:
    while True:
        await asyncio.sleep(every)
        try:
            await what(backend)
        except _PASSING as error:
            log.warning("some upkeep is left for the next time", extra={"cause": repr(error)})


async def _sweep_sessions(backend: Backend) -> None:
    """Keep the log of sessions within its bounds: the broker alone would cut sessions in two."""
    removed = await sweep(backend.session_log, backend.sessions, partial(is_over, backend))
    if removed:
        log.info("removed sessions", extra={"sessions": removed})


async def _remove_job_directories(state: GatewayState, backend: Backend) -> None:
    age = state.settings.job_directory_age
    if age is not None and state.mount.fault() is None:
        await job_directories.remove_old(backend, state.threads, state.settings.workspace_dir, age)


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
