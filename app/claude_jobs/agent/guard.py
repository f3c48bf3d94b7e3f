"""The supervisor's hand on its watchdog, the process that stops agents whose time is over."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import claude_jobs
from claude_jobs.agent import watchdog as program
from claude_jobs.agent.process_tree import spared

# How long the watchdog may take to end what is left and itself, in seconds.
_CLOSING_LIMIT = 10.0


class WatchdogLostError(Exception):
    """The watchdog does not listen any more: nothing would stop the agent in time."""


class Watchdog:
    """A watchdog that runs; everything below this process but itself is in its hand."""

    def __init__(self, pid: int, channel: int) -> None:
        self.pid = pid
        self._channel = channel

    @staticmethod
    def clock() -> float:
        """Return the time in seconds that `allow` counts from."""
        return program.clock()

    def allow(self, seconds: float, *, since: float | None = None) -> None:
        """Let the agent run for so many seconds, `since` a time of `clock` or now.

        The last word counts, also to shorten what was allowed before. Whoever allows what a
        lease covers counts from before it asked for the lease: it may be stopped at any moment
        in between. Does not wait. Raises `WatchdogLostError`.
        """
        deadline = (self.clock() if since is None else since) + seconds
        try:
            os.write(self._channel, b"%.3f\n" % deadline)
        except (BrokenPipeError, BlockingIOError) as error:
            raise WatchdogLostError(
                f"the watchdog (process {self.pid}) does not listen: {error.strerror}"
            ) from error


@asynccontextmanager
async def watchdog() -> AsyncIterator[Watchdog]:
    """Run a watchdog over everything below this process.

    It touches nothing before the first `allow`. From then on it stops what outlasts its time
    and, when this block ends or this process does, kills what is left.
    """
    listening, channel = os.pipe()
    try:
        os.set_blocking(channel, False)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Neither other packages nor what lies in a directory that agents write to.
                "-S",
                "-P",
                "-m",
                program.__name__,
                str(os.getpid()),
                stdin=listening,
                stdout=asyncio.subprocess.DEVNULL,
                env={"PYTHONPATH": str(Path(claude_jobs.__path__[0]).parent)},
                # The keys of a terminal are for the supervisor.
                start_new_session=True,
            )
        finally:
            os.close(listening)
        with spared(process.pid):
            try:
                yield Watchdog(process.pid, channel)
            finally:
                os.close(channel)
                channel = -1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CLOSING_LIMIT):
                        await process.wait()
    finally:
        if channel >= 0:
            os.close(channel)
