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

from claude_jobs.agent.process_tree import adopt_orphans
from claude_jobs.broker import REPLICA_USER
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.presence import ANNOUNCE_EVERY, Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.records import JobRecords
from claude_jobs.contract.base import now
from claude_jobs.contract.status import Replica, ReplicaStatus
from claude_jobs.replica.attempt import Attempt
from claude_jobs.replica.server import create_app
from claude_jobs.settings import ReplicaSettings

log = logging.getLogger(__name__)


class Supervisor:
    """Runs one replica. `SIGTERM` lets a running job finish and takes no new one."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._state = Replica(
            replica=settings.replica_name,
            node=settings.node_name,
            status=ReplicaStatus.IDLE,
            since=now(),
        )

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
            if self._state.status is ReplicaStatus.IDLE:
                life.cancel()
            elif not life.done():
                log.info("asked to stop: the running job is finished first")
            with contextlib.suppress(asyncio.CancelledError):
                await life

    async def _take_one_job(self) -> None:
        settings = self._settings
        async with connect(
            settings.broker_url,
            user=REPLICA_USER,
            password=settings.broker_replica_password.get_secret_value(),
            name=f"replica {settings.replica_name}",
        ) as bus:
            records, presence = await _open_buckets(bus)
            async with self._announced(presence):
                queue = JobQueue(bus)
                log.info("idle")
                while not self._stop.is_set():
                    lease = await queue.pull()
                    # From here on a stop lets the job finish: nothing is awaited in between.
                    await self._become(presence, ReplicaStatus.BUSY, lease.job_id)
                    if await Attempt(settings, EventLog(bus), records, lease).run():
                        return
                    await self._become(presence, ReplicaStatus.IDLE, None)

    async def _become(self, presence: Presence, status: ReplicaStatus, job_id: str | None) -> None:
        self._state = self._state.model_copy(
            update={"status": status, "job_id": job_id, "since": now()}
        )
        with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
            await presence.announce(self._state)

    @asynccontextmanager
    async def _announced(self, presence: Presence) -> AsyncIterator[None]:
        """Be present for as long as the block runs."""

        async def announce() -> None:
            while True:
                with contextlib.suppress(nats.errors.Error, nats.js.errors.Error, TimeoutError):
                    await presence.announce(self._state)
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
        runner = web.AppRunner(create_app(lambda: self._state), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=self._settings.port).start()
            yield
        finally:
            await runner.cleanup()


async def _open_buckets(bus: Bus) -> tuple[JobRecords, Presence]:
    """Open what the gateway makes; on a cold start the replicas may be there before it."""
    while True:
        try:
            return await JobRecords.open(bus), await Presence.open(bus)
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.info(
                "waiting for the gateway's set-up of the broker",
                extra={"cause": str(error) or repr(error)},
            )
            await asyncio.sleep(0.25)
