"""An agent that follows a script, in place of Claude Code, and a notebook in place of a watchdog.

Together they tell of every moment whether the agent was allowed to run.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from claude_agent_sdk import SessionKey, SessionStoreEntry
from job_scripts import AgentScript, Fate

from claude_jobs.agent.guard import Watchdog, WatchdogLostError
from claude_jobs.agent.outcome import AgentKilledError
from claude_jobs.agent.session_files import NoSavedSessionError, SavedSessions
from claude_jobs.contract.event import Completed, Failed, FailureCode, TerminalEvent
from claude_jobs.contract.job import JobRequest


class Notebook(Watchdog):
    """Notes what a watchdog is told."""

    def __init__(self) -> None:
        super().__init__(os.getpid(), os.open(os.devnull, os.O_WRONLY))
        self._told: list[tuple[float, float]] = []  # when, and until when an agent may run
        self._lost_at: float | None = None

    def allow(self, seconds: float, *, since: float | None = None) -> None:
        if self._lost_at is not None:
            raise WatchdogLostError("the watchdog does not listen")
        super().allow(seconds, since=since)
        at = self.clock()
        self._told.append((at, (at if since is None else since) + seconds))

    def lose(self) -> None:
        """Be a watchdog that was killed."""
        self._lost_at = self.clock()

    def close(self) -> None:
        os.close(self._channel)

    def allowed(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Return the spans between two times in which a watchdog lets an agent run."""
        # Before the first word nobody touches the agent, and nobody holds it any more when the
        # watchdog is dead.
        words = [(begin, end), *self._told]
        if self._lost_at is not None and self._lost_at < words[-1][1]:
            words.append((self._lost_at, end))
        following = [at for at, _ in words[1:]] + [end]
        spans = [
            (max(at, begin), min(deadline, until, end))
            for (at, deadline), until in zip(words, following, strict=True)
        ]
        return [(start, stop) for start, stop in spans if start < stop]


class Host(Protocol):
    """The replica that an agent runs on."""

    notebook: Notebook

    def begin_agent(self, job: str) -> tuple["AgentRun", AgentScript]:
        """Say that an agent of a job begins; `job` is the job's name in its metadata."""


HOST: ContextVar[Host] = ContextVar("HOST")


@dataclass
class AgentRun:
    """One agent of a job, the `number`th, from its start to the moment when it was gone."""

    number: int
    replica: str
    began: float
    ended: float | None = None


async def run_agent(
    _setup: object,
    _credentials: object,
    request: JobRequest,
    *,
    session_id: str,
    resume: bool,
    sessions: SavedSessions,
    on_frame: Callable[[dict[str, Any]], Awaitable[None]],
    cancelled: asyncio.Event,
    **_: object,
) -> TerminalEvent:
    """Keep the promises of `claude_jobs.agent.run.run_agent`."""
    cancellation = Failed(code=FailureCode.CANCELLED, error="cancelled", session_id=session_id)
    if cancelled.is_set():
        return cancellation
    if resume and not await sessions.take_over(session_id):
        raise NoSavedSessionError
    if cancelled.is_set():
        return cancellation
    host = HOST.get()
    run, script = host.begin_agent(str(request.metadata["name"]))
    key = SessionKey(project_key="p", session_id=session_id)

    async def live() -> TerminalEvent:
        if script.saved:
            entry: SessionStoreEntry = {"type": "user", "uuid": f"{session_id}-{run.number}"}
            await sessions.append(key, [entry])
        for line in range(script.lines):
            await on_frame({"type": "line", "number": line, "agent": run.number})
            await asyncio.sleep(0.01)
        await asyncio.sleep(script.silent)
        match script.fate:
            case Fate.BADLY:
                return Failed(code=FailureCode.AGENT_ERROR, error="bad", session_id=session_id)
            case Fate.KILLED:
                raise AgentKilledError
            case Fate.UNWATCHED:
                host.notebook.lose()
                await asyncio.Event().wait()
            case Fate.LASTS:
                await asyncio.Event().wait()
        return Completed(
            result=f"of agent {run.number}",
            session_id=session_id,
            usage={},
            cost_usd=0,
            num_turns=1,
            duration_ms=1,
            permission_denials=[],
        )

    living = asyncio.create_task(live())
    told = asyncio.create_task(cancelled.wait())
    try:
        await asyncio.wait({living, told}, return_when=asyncio.FIRST_COMPLETED)
        return living.result() if living.done() else cancellation
    finally:
        living.cancel()
        told.cancel()
        await asyncio.gather(living, told, return_exceptions=True)
        run.ended = Watchdog.clock()
        await sessions.flush()
