"""How long something is tried again, and how long is waited between two tries."""

import asyncio
import secrets
from collections.abc import Callable
from time import monotonic

from claude_jobs.client.errors import ClientError

_LONGEST_WAIT = 15.0
_random = secrets.SystemRandom()

# Told before each wait: what went wrong, and how many seconds are waited.
Notify = Callable[[ClientError, float], None]


class Patience:
    """Waits that grow, within a bound on the whole of an outage; all times are in seconds.

    The clock starts with the first failure and stops with `calm`.
    """

    def __init__(
        self, bound: float, *, first_wait: float = 0.5, notify: Notify | None = None
    ) -> None:
        self.first_wait = first_wait
        self._bound = bound
        self._notify = notify
        self._failures = 0
        self._began: float | None = None

    def calm(self) -> None:
        """Say that all is well again: the next failure begins a new outage."""
        self._failures = 0
        self._began = None

    async def wait(self, cause: ClientError, *, at_least: float = 0) -> None:
        """Wait before the next try; raises `cause` when that would exceed the bound."""
        now = monotonic()
        if self._began is None:
            self._began = now
        growing = min(_LONGEST_WAIT, self.first_wait * 2 ** min(self._failures, 10))
        self._failures += 1
        # Many clients that lost the same server do not come back at the same moment.
        seconds = max(at_least, growing * _random.uniform(0.5, 1))
        seconds += _random.uniform(0, 0.1) * at_least
        if now + seconds > self._began + self._bound:
            raise cause
        if self._notify:
            self._notify(cause, seconds)
        await asyncio.sleep(seconds)
