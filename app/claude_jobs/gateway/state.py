"""What a gateway's handlers share. It holds no job: any gateway can answer any request."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from aiohttp import web

from claude_jobs.bus.cancellations import Cancellations
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.events import EventLog
from claude_jobs.bus.presence import Presence
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.records import JobRecords
from claude_jobs.bus.sessions import SessionLog, SessionRecords
from claude_jobs.bus.submissions import Submissions
from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.gateway.positions import Positions
from claude_jobs.settings import GatewaySettings
from claude_jobs.workspace_mount import WorkspaceMount
from claude_jobs.workspace_threads import WorkspaceThreads

# Seconds after which a client may try again when the broker or the workspace is away.
RETRY_AFTER = 2


@dataclass(frozen=True)
class Backend:
    """The broker's parts that the handlers use."""

    bus: Bus
    queue: JobQueue
    events: EventLog
    records: JobRecords
    cancellations: Cancellations
    submissions: Submissions
    session_log: SessionLog
    sessions: SessionRecords
    presence: Presence
    positions: Positions
    # A client's submissions are counted one after the other where they are limited.
    turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    @classmethod
    async def open(cls, bus: Bus) -> "Backend":
        """Open every part; the broker's streams and buckets are there."""
        queue, presence = JobQueue(bus), await Presence.open(bus)
        return cls(
            bus,
            queue,
            EventLog(bus),
            await JobRecords.open(bus),
            await Cancellations.open(bus),
            await Submissions.open(bus),
            SessionLog(bus),
            await SessionRecords.open(bus),
            presence,
            Positions(queue, presence),
        )


@dataclass
class GatewayState:
    """The settings, the workspace, and the broker once it has been reached."""

    settings: GatewaySettings
    backend: Backend | None = None
    # Why there is none yet, in words for a client.
    absence: str = "the job broker is out of reach"
    streams: set[web.StreamResponse] = field(default_factory=set)
    mount: WorkspaceMount = field(init=False)
    threads: WorkspaceThreads = field(init=False)

    def __post_init__(self) -> None:
        self.mount = WorkspaceMount(self.settings)
        self.threads = WorkspaceThreads(self.settings.workspace_dir)

    def ready_backend(self) -> Backend:
        """Return the broker's parts; raises `RequestRefusedError` (503) while it is away."""
        if self.backend is None or not self.backend.bus.is_connected:
            raise RequestRefusedError(
                ErrorCode.UNAVAILABLE,
                f"{self.absence}: try again shortly",
                retry_after=RETRY_AFTER,
            )
        return self.backend

    def shared_workspace(self) -> WorkspaceThreads:
        """Return what may touch the workspace; raises `RequestRefusedError` (503) for a wrong one.

        The sentence is for anybody: addresses of the file server are for the log alone.
        """
        if self.mount.fault() is not None:
            raise RequestRefusedError(
                ErrorCode.UNAVAILABLE,
                f"the workspace of node {self.settings.node_name} is not the shared one: "
                "the gateway's log says what is mounted there",
                retry_after=RETRY_AFTER,
            )
        return self.threads


STATE: web.AppKey[GatewayState] = web.AppKey("state", GatewayState)
