"""The processes of an agent: all of them end with the job, wherever they hid."""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from claude_jobs.agent import process_table
from claude_jobs.agent.process_table import Identity, Process

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
# A dead child that nobody asked for during so many seconds was adopted.
_REAP_EVERY = 5.0

_spared: set[int] = set()


def adopt_orphans() -> None:
    """Make orphaned descendants our children, so that none escapes (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


@asynccontextmanager
async def orphans_reaped(*, every: float = _REAP_EVERY) -> AsyncIterator[None]:
    """Let adopted orphans go when they have ended: as zombies they count as processes.

    `every` is in seconds. Whoever starts a child waits for it in less time than that.
    """

    async def reap() -> None:
        before: set[Identity] = set()
        while True:
            dead = _dead_children()
            for orphan in dead & before:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(orphan.pid, os.WNOHANG)  # noqa: ASYNC222 - does not wait
            before = dead - before
            await asyncio.sleep(every)

    reaping = asyncio.create_task(reap())
    try:
        yield
    finally:
        reaping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reaping


@contextmanager
def spared(pid: int) -> Iterator[None]:
    """Except one child, which is no agent's, from `end_descendants`."""
    _spared.add(pid)
    try:
        yield
    finally:
        _spared.discard(pid)


async def end_descendants(*, grace: float) -> None:
    """End every process below this one: SIGTERM, `grace` seconds, SIGKILL until none is left.

    Stopped ones go on for it, as they could not obey SIGTERM otherwise; where a watchdog stops
    them again, SIGKILL ends them. Without a grace they are killed as they are.
    """
    if grace > 0:
        processes = _descendants()
        _signal_all(processes, signal.SIGTERM)
        _signal_all(processes, signal.SIGCONT)
    deadline = asyncio.get_running_loop().time() + grace
    while _descendants() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
    # A process that forks while it is killed needs another round.
    while processes := _descendants():
        _signal_all(processes, signal.SIGKILL)
        await asyncio.sleep(0.02)


def _descendants() -> list[Process]:
    ours = os.getpid()
    return [
        process
        for process in process_table.at_or_below(process_table.read(), {ours})
        if process.pid != ours and process.pid not in _spared and not process.dead
    ]


def _signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _dead_children() -> set[Identity]:
    ours = os.getpid()
    return {
        process.identity
        for process in process_table.read().values()
        if process.parent == ours and process.dead
    }
