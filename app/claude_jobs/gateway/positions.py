"""Where the waiting jobs stand in the queue, looked up once for all who want to know."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable

import nats.errors
import nats.js.errors

from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.contract.status import Replica

log = logging.getLogger(__name__)

# The queue is looked at this often (seconds), and only while somebody waits.
_LOOK_EVERY = 1.0


def waiting_jobs(unfinished: Iterable[str], replicas: Iterable[Replica]) -> list[str]:
    """Return those of the unfinished jobs that no replica works on, in their order.

    Jobs whose replica was lost are among them: they wait for another one. Ask for the replicas
    first: a job that ends or is taken in between is then where it was before.
    """
    running = {replica.job_id for replica in replicas}
    return [job_id for job_id in unfinished if job_id not in running]


class Positions:
    """One view of the queue for every reader of this gateway whose job waits."""

    def __init__(self, queue: JobQueue, presence: Presence) -> None:
        self._queue = queue
        self._presence = presence
        self._view: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._watchers = 0
        self._looking: asyncio.Task[None] | None = None

    async def advances(self, job_id: str, position: int) -> AsyncGenerator[int]:
        """Yield a waiting job's new position each time it is nearer than the last, `position`.

        Never ends by itself: close the iterator once the job waits no more.
        """
        self._watchers += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            while True:
                async with self._changed:
                    await self._changed.wait()
                # Two looks make a view, and a job may move between them: a queue goes one way.
                if (now := self._view.get(job_id, position)) < position:
                    position = now
                    yield now
        finally:
            self._watchers -= 1
            if not self._watchers and self._looking:
                self._looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        while True:
            try:
                replicas = await self._presence.list()
                waiting = waiting_jobs(await self._queue.unfinished(), replicas)
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.warning(
                    "the queue was not to be seen", extra={"cause": str(error) or repr(error)}
                )
            else:
                self._view = {job_id: index for index, job_id in enumerate(waiting, start=1)}
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(_LOOK_EVERY)
