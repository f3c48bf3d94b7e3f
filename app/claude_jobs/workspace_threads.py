"""Threads for what is done in the workspace: a file server that is away holds up these alone.

Whoever asks an NFS server that is away waits until it is back, and nothing but SIGKILL ends that.
So no event loop touches the workspace, nor do the threads that other things are done in.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

log = logging.getLogger(__name__)

# Seconds after which a request that waits for the workspace is answered that it is away.
PATIENCE = 5.0
_THREADS = 16

_Result = TypeVar("_Result")


class WorkspaceStalledError(Exception):
    """The workspace does not answer in time; the sentence says so to a client."""


class WorkspaceThreads:
    """At most `count` threads for the workspace at `root`.

    A step may take long, as deleting a large tree does. It is given up only when the file server
    does not answer another question either.
    """

    def __init__(self, root: Path, *, count: int = _THREADS) -> None:
        self._root = root
        self._steps = _Threads(count)
        self._questions = _Threads(1)
        self._question: Future[None] | None = None
        self._asked_at = 0.0

    @property
    def stalled(self) -> bool:
        """Whether the file server owes an answer for longer than it may."""
        return (
            self._question is not None
            and not self._question.done()
            and time.monotonic() - self._asked_at >= PATIENCE / 2
        )

    def submit(self, step: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        """Have a step done, whenever that may be."""
        return self._steps.submit(partial(step, *arguments))

    async def run(self, step: Callable[..., _Result], *arguments: object) -> _Result:
        """Do a step and return its result.

        Raises `WorkspaceStalledError`, within `PATIENCE` or at once where it is known already. A
        step that has begun then may still be done later.
        """
        self.require_answers()
        return await self.result(self.submit(step, *arguments))

    def require_answers(self) -> None:
        """Raise `WorkspaceStalledError` when the file server is known to be away."""
        if self.stalled:
            raise _stalled()

    async def result(self, pending: "Future[_Result]", *, cancel: bool = True) -> _Result:
        """Wait for a step that was submitted. One not yet begun is dropped when it is given up.

        Unless it must be done: then `cancel` is false.
        """
        begun_by = time.monotonic() + PATIENCE
        running = asyncio.wrap_future(pending)
        try:
            while not (await asyncio.wait({running}, timeout=PATIENCE / 2))[0]:
                if not await self._answers():
                    log.warning("the workspace's file server does not answer")
                    raise _stalled()
                if time.monotonic() >= begun_by and not (pending.running() or pending.done()):
                    raise WorkspaceStalledError(
                        "too much is being done in the workspace: try again shortly"
                    )
            return running.result()
        finally:
            if cancel:
                pending.cancel()
                running.cancel()

    @asynccontextmanager
    async def holding(self, release: Callable[[], object]) -> AsyncIterator["Steps"]:
        """Do steps on one thing and at the end `release` it, after the last of them is done.

        It is not waited for where a step was given up.
        """
        steps = Steps(self)
        try:
            yield steps
        finally:
            await steps.end(release)

    async def _answers(self) -> bool:
        """Ask the file server something that no cache can answer, and wait a while."""
        if self.stalled:
            return False
        question = self._question
        if question is None or question.done():
            self._asked_at = time.monotonic()
            question = self._question = self._questions.submit(partial(_ask, self._root))
        await asyncio.wait({asyncio.wrap_future(question)}, timeout=PATIENCE / 2)
        return question.done()  # whoever asks next may have replaced it already


class Steps:
    """Steps on one thing, one after the other."""

    def __init__(self, threads: WorkspaceThreads) -> None:
        self._threads = threads
        self._last: Future[object] | None = None

    async def run(self, step: Callable[..., _Result], *arguments: object) -> _Result:
        """Do a step like `WorkspaceThreads.run`. None may follow on one that was given up."""
        self._threads.require_answers()
        pending = self._threads.submit(step, *arguments)
        self._last = pending  # type: ignore[assignment] # a future is not covariant
        return await self._threads.result(pending)

    async def end(self, release: Callable[[], object]) -> None:
        """Do the last step, which is done in any case."""
        if self._last is not None and not self._last.done():
            self._last.add_done_callback(lambda _: self._threads.submit(release))
            return
        releasing = self._threads.submit(release)
        if not self._threads.stalled:
            with contextlib.suppress(WorkspaceStalledError):
                await self._threads.result(releasing, cancel=False)


class _Threads:
    """A bounded number of threads that a process may end without: the executor's would hold it."""

    def __init__(self, count: int) -> None:
        self._free = count  # threads that may still be started
        self._work: SimpleQueue[tuple[Future[object], Callable[[], object]]] = SimpleQueue()

    def submit(self, step: Callable[[], _Result]) -> Future[_Result]:
        future: Future[_Result] = Future()
        self._work.put((future, step))  # type: ignore[arg-type] # a future is not covariant
        if self._free:
            self._free -= 1
            threading.Thread(target=self._do, name="workspace", daemon=True).start()
        return future

    def _do(self) -> None:
        while True:
            future, step = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    result = step()
                except BaseException as error:  # whoever waits gets it
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # Nothing of it is held until the next one comes: a file would stay open.
            del future, step


def _ask(root: Path) -> None:
    with contextlib.suppress(OSError):  # an error is an answer
        os.statvfs(root)


def _stalled() -> WorkspaceStalledError:
    return WorkspaceStalledError("the workspace's file server does not answer: try again shortly")
