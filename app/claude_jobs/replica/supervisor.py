"""The life of a replica: announce, pull one job, run it, say good-bye, exit."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors
from aiohttp import web

from claude_jobs.agent.guard import watchdog
from claude_jobs.agent.process_tree import adopt_orphans, orphans_reaped
from claude_jobs.broker import REPLICA_USER
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.presence import ANNOUNCE_EVERY, Presence
from claude_jobs.bus.queue import Lease, UnreadableJobError
from claude_jobs.contract.base import now
from claude_jobs.contract.status import Replica, ReplicaStatus
from claude_jobs.replica.attempt import Attempt, prepare_agent
from claude_jobs.replica.backend import Backend
from claude_jobs.replica.server import create_app
from claude_jobs.settings import ReplicaSettings
from claude_jobs.workspace_mount import WorkspaceMount

log = logging.getLogger(__name__)

# A job that must wait for others of its client is offered again after so many seconds for each
# place that it is away from running.
_LIMITED_DELAY = 0.5
_LONGEST_LIMITED_DELAY = 10.0
# Seconds between two looks at the workspace's mount, while no job is there.
_LOOK_EVERY = 2.0


class Supervisor:
    """Runs one replica. `SIGTERM` lets a running job finish and takes no new one.

    While the workspace is not the one that all share, it takes no job and is not healthy: a
    container never sees what is mounted after its start, so Swarm must start another.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._preparation: asyncio.Task[None] | None = None
        self._mount = WorkspaceMount(settings)
        self._state = Replica(
            replica=settings.replica_name,
            node=settings.node_name,
            status=ReplicaStatus.IDLE,
            since=now(),
        )
        self._rest()

    async def run(self) -> None:
        """Live until one job was run or a stop was asked for."""
        adopt_orphans()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with self._serving():
            life = asyncio.create_task(self._take_one_job())
            stop = asyncio.create_task(self._stop.wait())
            await asyncio.wait({life, stop}, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if self._state.job_id is None:
                life.cancel()
            elif not life.done():
                log.info("asked to stop: the running job is finished first")
            with contextlib.suppress(asyncio.CancelledError):
                await life

    async def _take_one_job(self) -> None:
        settings = self._settings
        async with (
            connect(
                settings.broker_url,
                user=REPLICA_USER,
                password=settings.broker_replica_password.current,
                name=f"replica {settings.replica_name}",
            ) as bus,
            orphans_reaped(),
            watchdog() as guard,
        ):
            backend = await _open_backend(bus)
            async with self._announced(backend.presence):
                log.info("idle")
                # An attempt waits for this itself, once it keeps its lease.
                self._preparation = asyncio.create_task(prepare_agent(settings))
                while not self._stop.is_set():
                    await self._workspace_is_shared(backend.presence)
                    try:
                        async with self._while_workspace_is_shared():
                            lease = await backend.queue.pull()
                            # From here on a stop lets the job finish: nothing is awaited in
                            # between.
                            self._set(ReplicaStatus.BUSY, lease.job_id)
                    except TimeoutError:
                        continue
                    if await self._must_wait(backend, lease):
                        self._rest()
                        continue
                    await self._announce(backend.presence)
                    if await Attempt(settings, backend, guard, lease).run():
                        return
                    self._rest()
                    await self._announce(backend.presence)

    async def _workspace_is_shared(self, presence: Presence) -> None:
        """Wait until the workspace is the shared one, and say meanwhile why no job is taken."""
        if self._mount.fault() is None:
            return
        self._rest()
        await self._announce(presence)
        while self._mount.fault() is not None:
            await asyncio.sleep(_LOOK_EVERY)
        self._rest()
        await self._announce(presence)

    @asynccontextmanager
    async def _while_workspace_is_shared(self) -> AsyncIterator[None]:
        """Break the block off with `TimeoutError` when the workspace is the shared one no more."""
        async with asyncio.timeout(None) as limit:

            async def watch() -> None:
                while self._mount.fault() is None:
                    await asyncio.sleep(_LOOK_EVERY)
                limit.reschedule(asyncio.get_running_loop().time())

            watching = asyncio.create_task(watch())
            try:
                yield
            finally:
                watching.cancel()

    async def _must_wait(self, backend: Backend, lease: Lease) -> bool:
        """Give a job back whose client has as many running jobs as it may.

        Or any job, when the workspace was lost at this moment.

        Only the oldest `max_running` unfinished jobs of a client may run: whoever asks comes to
        the same answer, and they start in the order of acceptance.
        """
        if self._mount.fault() is not None:
            await lease.give_back()
            return True
        try:
            job = lease.job
        except UnreadableJobError:
            return False
        if job.max_running is None:
            return False
        unfinished = await backend.queue.unfinished(job.client)
        ahead = unfinished.index(job.id) if job.id in unfinished else 0
        if ahead < job.max_running:
            return False
        delay = min(_LIMITED_DELAY * (1 + ahead - job.max_running), _LONGEST_LIMITED_DELAY)
        await lease.give_back(delay=delay)
        return True

    def _rest(self) -> None:
        """Have no job; be idle only where one could be taken."""
        fault = self._mount.fault()
        self._set(ReplicaStatus.IDLE if fault is None else ReplicaStatus.BUSY, None, fault)

    def _set(self, status: ReplicaStatus, job_id: str | None, fault: str | None = None) -> None:
        self._state = self._state.model_copy(
            update={"status": status, "job_id": job_id, "fault": fault, "since": now()}
        )

    async def _announce(self, presence: Presence) -> None:
        with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
            await presence.announce(self._state)

    @asynccontextmanager
    async def _announced(self, presence: Presence) -> AsyncIterator[None]:
        """Be present for as long as the block runs."""

        async def announce() -> None:
            while True:
                await self._announce(presence)
                await asyncio.sleep(ANNOUNCE_EVERY)

        announcements = asyncio.create_task(announce())
        try:
            yield
        finally:
            announcements.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await announcements
            with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
                await presence.withdraw(self._settings.replica_name)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        runner = web.AppRunner(create_app(lambda: self._state, self._mount.fault), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=self._settings.port).start()
            yield
        finally:
            await runner.cleanup()


async def _open_backend(bus: Bus) -> Backend:
    """Open what the gateway makes; on a cold start the replicas may be there before it."""
    while True:
        try:
            return await Backend.open(bus)
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.info(
                "waiting for the gateway's set-up of the broker",
                extra={"cause": str(error) or repr(error)},
            )
            await asyncio.sleep(0.25)
