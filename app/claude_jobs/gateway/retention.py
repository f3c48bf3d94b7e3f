"""Keeps the log of sessions within its bounds, as the broker alone would cut sessions in two."""

import asyncio
import logging
from functools import partial

import nats.errors
import nats.js.errors

from claude_jobs.bus.sessions import sweep
from claude_jobs.gateway.settlement import is_over
from claude_jobs.gateway.state import Backend

log = logging.getLogger(__name__)

# Seconds between two sweeps. Every gateway sweeps: that does no harm.
_SWEEP_EVERY = 60.0


async def keep_swept(backend: Backend) -> None:
    """Remove outdated sessions, for ever."""
    while True:
        await asyncio.sleep(_SWEEP_EVERY)
        try:
            removed = await sweep(backend.session_log, backend.sessions, partial(is_over, backend))
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.warning("sessions were not swept", extra={"cause": repr(error)})
        else:
            if removed:
                log.info("removed sessions", extra={"sessions": removed})
