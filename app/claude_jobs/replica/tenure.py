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

    `regain` raises `FencedError` when the job has gone to another replica.
    """

    lease: Lease
    lease_seconds: float
    watchdog: Watchdog
    regain: Callable[[], Awaitable[None]]
    _confirmed: float = field(default_factory=Watchdog.clock)
    _holds: asyncio.Event = field(default_factory=asyncio.Event)

    async def holds(self) -> None:
        """Wait until the job is ours for certain and the watchdog has a time to enforce.

        No agent may start before: the lease may have run out since the job was claimed.
        """
        while True:
            await self._holds.wait()
            if not self._is_over(self._confirmed):
                return
            self._holds.clear()

    async def keep(self) -> None:
        """Renew for ever. Raises what `regain` raises, or `WatchdogLostError`: the job is lost."""
        while True:
            asked = Watchdog.clock()
            try:
                await self.lease.extend()
            except (nats.errors.Error, TimeoutError) as error:
                log.warning("the lease could not be renewed", extra={"cause": repr(error)})
                if self._holds.is_set():
                    # Nothing new, but that nobody listens must be known now above all.
                    self.watchdog.allow(self._safe, since=self._confirmed)
                await asyncio.sleep(_RETRY_EVERY)
                continue
            if self._is_over(asked):
                continue  # the broker was away, or this process stopped, in between
            if self._is_over(self._confirmed):
                log.warning("the lease had run out: claiming the job anew")
                await self.regain()
                if self._is_over(asked):
                    continue
            self._confirmed = asked
            self.watchdog.allow(self._safe, since=asked)
            self._holds.set()
            # From when it was asked for, like the agent's time: a late answer left little of that.
            next_at = asked + self.lease_seconds / _RENEWALS_PER_LEASE
            await asyncio.sleep(max(0.0, next_at - Watchdog.clock()))

    @property
    def _safe(self) -> float:
        return self.lease_seconds * _SAFE_PART

    def _is_over(self, asked: float) -> bool:
        """Tell whether what was asked for then may have run out: another may have the job."""
        return Watchdog.clock() - asked >= self._safe
