"""Goes on with a job whose replica was lost, where that can be done without doing things twice."""

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass

from claude_jobs.bus.events import EventWriter
from claude_jobs.bus.presence import ANNOUNCE_EVERY
from claude_jobs.contract.event import Connected, Failed, FailureCode, Recovering
from claude_jobs.contract.job import Job
from claude_jobs.replica.backend import Backend

log = logging.getLogger(__name__)

# A replica that lives announces itself within this time (seconds), also after the broker was away.
_SIGN_OF_LIFE = ANNOUNCE_EVERY + 1.0

_CONTINUE = (
    "Continue: the machine that you worked on was lost, and you go on on another one. What you did "
    "last may be done, half done or not done: look at its state before you do anything again."
)


class ReplicaLivesError(Exception):
    """The replica that has begun a job is alive: the job is still its own."""


@dataclass(frozen=True)
class Start:
    """How an attempt starts its agent: with which session and prompt, and whether it resumes."""

    attempt: int
    session_id: str
    prompt: str
    resumes: bool


async def take_over(
    backend: Backend, job: Job, writer: EventWriter, *, max_attempts: int
) -> Start | Failed:
    """Claim a job that another replica has begun; returns how it goes on, or its end.

    `recovering` in the job's log is the claim: from then on the other replica can write nothing.
    Raises `ReplicaLivesError`, or `FencedError` when somebody else writes to the log meanwhile.
    """
    begun = await _last_begin(backend, job.id, writer.sequence)
    if begun is None:
        return _lost("nothing is known of how far it was")
    # Otherwise it was claimed already: by one that was lost then, or for whoever comes.
    claims = not (isinstance(writer.last, Recovering) and writer.last.attempt > begun.attempt)
    if claims and await _lives(backend, begun.replica, job.id):
        raise ReplicaLivesError
    if refused := await _refusal(backend, job, begun.attempt, begun.session_id, max_attempts):
        return refused
    number = begun.attempt + 1
    if claims:
        reason = f"replica {begun.replica} was lost"
        log.warning("taking a job over", extra={"job": job.id, "cause": reason})
        await writer.append(Recovering(attempt=number, reason=reason))
    return Start(number, begun.session_id, _CONTINUE, resumes=True)


async def hand_over(
    backend: Backend, job: Job, writer: EventWriter, start: Start, *, max_attempts: int, reason: str
) -> Failed | None:
    """Leave a job to the next replica, after the agent of this one has gone; or return its end.

    Raises `FencedError` when another replica has taken it already.
    """
    if refused := await _refusal(backend, job, start.attempt, start.session_id, max_attempts):
        return refused
    log.warning("handing a job over", extra={"job": job.id, "cause": reason})
    await writer.append(Recovering(attempt=start.attempt + 1, reason=reason))
    return None


async def _refusal(
    backend: Backend, job: Job, attempt: int, session_id: str, max_attempts: int
) -> Failed | None:
    """Return the end of a job that no further attempt can or may go on with."""
    if await backend.cancellations.asked(job.id):
        return Failed(
            code=FailureCode.CANCELLED, error="the job was cancelled", session_id=session_id
        )
    if attempt >= max_attempts:
        return _lost(f"it was attempt {attempt}, and no further one is made", session_id)
    if not await backend.session_log.holds_conversation(session_id):
        return _lost("nothing of its session had been saved")
    return None


async def _last_begin(backend: Backend, job_id: str, until: int) -> Connected | None:
    """Return the last `connected` of a log up to the sequence number `until`."""
    found = None
    async with aclosing(backend.events.stored(job_id)) as events:
        async for logged in events:
            if isinstance(logged.event, Connected):
                found = logged.event
            if logged.sequence >= until:
                break
    return found


async def _lives(backend: Backend, replica: str, job_id: str) -> bool:
    """Tell whether a replica says that it works on this job; gives it time to say so."""
    deadline = asyncio.get_running_loop().time() + _SIGN_OF_LIFE
    while True:
        seen = await backend.presence.get(replica)
        if seen is not None:
            # Alive, and on this job, or it has given the job up.
            return seen.job_id == job_id
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.25)


def _lost(why: str, session_id: str | None = None) -> Failed:
    return Failed(
        code=FailureCode.WORKER_LOST,
        session_id=session_id,
        error=f"the replica that ran this job was lost and the job cannot be continued: {why}; "
        "what its agent did until then is in the workspace and in these events",
    )
