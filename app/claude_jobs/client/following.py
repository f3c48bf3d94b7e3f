"""Watches a job to its end on the command line, and knows what Ctrl-C means meanwhile."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

from claude_jobs.client.client import Client
from claude_jobs.client.errors import ApiError, ClientError
from claude_jobs.client.rendering import View
from claude_jobs.contract.event import FailureCode
from claude_jobs.contract.job import JobStatus

_Value = TypeVar("_Value")


class ExitCode(IntEnum):
    """How the command ends; for a job, by the job's outcome."""

    COMPLETED = 0  # the job ended well, or what was asked for is done
    FAILED = 1  # the job ended with an error that has no code below
    USAGE = 2  # wrong arguments, or the API refused the request as wrong
    UNAVAILABLE = 3  # the API is out of reach, busy, or lets this token not in
    CANCELLED = 4  # the job was cancelled
    TIMEOUT = 5  # the job's time, or the silence that it may keep, was over
    WORKER_LOST = 6  # the job's replica was lost and it could not be gone on with
    LEFT = 130  # Ctrl-C: the job goes on


_BY_FAILURE: dict[str, ExitCode] = {
    FailureCode.CANCELLED: ExitCode.CANCELLED,
    FailureCode.TIMEOUT: ExitCode.TIMEOUT,
    FailureCode.WORKER_LOST: ExitCode.WORKER_LOST,
}


def exit_code(failure: str | None) -> ExitCode:
    """Return the exit code for a job's `error` code; None is a job that ended well."""
    return ExitCode.COMPLETED if failure is None else _BY_FAILURE.get(failure, ExitCode.FAILED)


async def interruptible(work: Coroutine[Any, Any, _Value]) -> _Value | None:
    """Await something; Ctrl-C ends it, which returns None."""
    task = asyncio.create_task(work)
    with _on_interrupt(task.cancel), contextlib.suppress(asyncio.CancelledError):
        return await task
    return None


@dataclass
class Following:
    """One job on the screen.

    With `cancels` the first Ctrl-C asks that the job be cancelled, and its end is awaited; the
    second leaves it. Without, the first one leaves it. `come_back` is the command that follows
    the job again.
    """

    client: Client
    view: View
    job_id: str
    cancels: bool
    come_back: str
    after: int = 0
    _cancellation: asyncio.Task[None] | None = field(default=None, init=False)

    async def to_its_end(self) -> ExitCode:
        """Show every event; returns the exit code that its end stands for."""
        watching = asyncio.create_task(self._watch())
        try:
            with _on_interrupt(lambda: self._interrupted(watching)):
                return await watching
        except asyncio.CancelledError:
            if not watching.cancelled():
                raise
            self._say_how_to_come_back()
            return ExitCode.LEFT
        except ClientError:
            self._say_how_to_come_back()
            raise
        finally:
            if self._cancellation is not None:
                self._cancellation.cancel()
                await asyncio.gather(self._cancellation, return_exceptions=True)

    async def _watch(self) -> ExitCode:
        async with aclosing(self.client.events(self.job_id, self.after)) as events:
            async for event in events:
                self.view.event(event)
                if event.id is not None:
                    self.after = event.id
                if event.is_terminal:
                    ended_well = event.type == "completed"
                    return exit_code(None if ended_well else str(event.data.get("code")))
        # Its end was seen before, or is no longer kept.
        record = await self.client.job(self.job_id)
        self.view.note(f"job {self.job_id} is {record.status}: {record.error or 'it has ended'}")
        return exit_code(
            None if record.status is JobStatus.COMPLETED else record.error_code or record.status
        )

    def _interrupted(self, watching: "asyncio.Task[ExitCode]") -> None:
        if not self.cancels or self._cancellation is not None:
            watching.cancel()
            return
        self.view.note("cancelling the job; Ctrl-C again leaves without waiting for its end")
        self._cancellation = asyncio.create_task(self._cancel())

    async def _cancel(self) -> None:
        try:
            await self.client.cancel(self.job_id)
        except ApiError as refused:
            if refused.code != "conflict":  # it has ended: the last event is on its way
                self.view.note(f"the job cannot be cancelled: {refused}")
        except ClientError as error:
            self.view.note(f"the job cannot be cancelled: {error}")

    def _say_how_to_come_back(self) -> None:
        goes_on = "was asked to end" if self._cancellation is not None else "goes on"
        self.view.note(f"job {self.job_id} {goes_on}; to see more of it: {self.come_back}")
        if self.after:
            self.view.note(f"(with --after {self.after} only what was not shown yet)")


@contextmanager
def _on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    # Where loops know no signals (Windows), an interrupt leaves: it is a KeyboardInterrupt.
    with contextlib.suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, act)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGINT)
