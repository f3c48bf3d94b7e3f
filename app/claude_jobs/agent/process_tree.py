"""The processes of an agent: all of them end with the job, wherever they hid."""

import asyncio
import contextlib
import ctypes
from collections.abc import Callable

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def adopt_orphans() -> None:
    """Make orphaned descendants our children, so that none escapes (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


async def end_descendants(*, grace: float) -> None:
    """End every process below this one: SIGTERM, `grace` seconds, SIGKILL until none is left."""
    processes = _descendants()
    _signal_all(processes, psutil.Process.terminate)
    deadline = asyncio.get_running_loop().time() + grace
    while _descendants() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
    # A process that forks while it is killed needs another round.
    while processes := _descendants():
        _signal_all(processes, psutil.Process.kill)
        await asyncio.sleep(0.02)


def _descendants() -> list[psutil.Process]:
    alive = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _signal_all(processes: list[psutil.Process], signal: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            signal(process)
