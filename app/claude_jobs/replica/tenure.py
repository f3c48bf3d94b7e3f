"""The time for which a replica holds a job: it renews the lease, and the agent runs only meanwhile.

The broker hands a job to another replica when its lease was not renewed. An agent must not run
on then, whatever keeps the replica from the broker. So the watchdog lets it run for a part of
the lease at a time, counted from the last renewal that the broker confirmed, and holds it after
that. It goes on once the job's log says that the job is still ours.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import nats.errors

from claude_jobs.agent.guard import Watchdog
from claude_jobs.bus.queue import Lease

log = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 4
# The part of a lease that an agent may run without a renewal. The rest is for holding it.
_SAFE_PART = 0.75
_RETRY_EVERY = 0.25


@dataclass
class Tenure:
    """Keeps a lease of `lease_seconds`. `regain` claims the job anew after the agent was held.

    `regain` raises `FencedError` when the job has gone to another replica. `begun` is set once
    the watchdog has its first time to enforce: no agent may start before.
    """

    lease: Lease
    lease_seconds: float
    watchdog: Watchdog
    regain: Callable[[], Awaitable[None]]
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    _confirmed: float = field(default_factory=Watchdog.clock)

    async def keep(self) -> None:
        """Renew for ever. Raises what `regain` raises, or `WatchdogLostError`: the job is lost."""
        while True:
            asked = Watchdog.clock()
            try:
                await self.lease.extend()
            except (nats.errors.Error, TimeoutError) as error:
                log.warning("the lease could not be renewed", extra={"cause": repr(error)})
                await asyncio.sleep(_RETRY_EVERY)
                continue
            safe = self.lease_seconds * _SAFE_PART
            if asked - self._confirmed >= safe:
                log.warning("the lease had run out: claiming the job anew")
                await self.regain()
            if Watchdog.clock() - asked >= safe:
                continue  # this process was stopped in between: what was confirmed is outdated
            self._confirmed = asked
            self.watchdog.allow(safe, since=asked)
            self.begun.set()
            await asyncio.sleep(self.lease_seconds / _RENEWALS_PER_LEASE)
