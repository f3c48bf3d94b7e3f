"""Starts nats-server."""

import asyncio
import logging
import os
import shutil

from claude_jobs.broker.configuration import cluster_store, configuration, count_replaced
from claude_jobs.broker.program import find_server, version_of, write_configuration
from claude_jobs.broker.stores import streams_in
from claude_jobs.broker.succession import was_replaced
from claude_jobs.bus.servers import SERVERS_BUCKET
from claude_jobs.settings import BrokerSettings, SettingsError

log = logging.getLogger(__name__)

# What a server had whose place another one has taken, until the next time.
_REPLACED = "replaced-by-another"


def run(settings: BrokerSettings) -> None:
    """Become nats-server.

    Raises `SettingsError` where a lone server would leave aside what several have taken in.
    """
    if settings.broker_servers == 1 and (held := _held_by_several(settings)):
        raise SettingsError(
            f"broker_servers: is 1, but this node holds streams of several servers "
            f"({', '.join(sorted(held))}): set it back to what it was, "
            f"or remove {cluster_store(settings)} to start without them"
        )
    if settings.broker_servers > 1:
        _leave_behind_what_was_replaced(settings)
    server = find_server()
    path = settings.broker_config_dir / "nats.conf"
    write_configuration(path, configuration(settings, version_of(server)))
    os.execv(server, [server, "--config", str(path)])  # noqa: S606 - found above, no shell


def _leave_behind_what_was_replaced(settings: BrokerSettings) -> None:
    """Start empty where another server has taken this one's place: with all that it had."""
    store = cluster_store(settings)
    if not store.exists() or not asyncio.run(was_replaced(settings)):
        return
    kept = settings.broker_data_dir / _REPLACED
    shutil.rmtree(kept, ignore_errors=True)
    store.rename(kept)
    count_replaced(settings)
    log.warning(
        "another server has taken this one's place: it starts empty, and its data is kept apart",
        extra={"directory": str(kept)},
    )


def _held_by_several(settings: BrokerSettings) -> set[str]:
    """Return the streams that several servers hold, without their own book of each other."""
    return streams_in(cluster_store(settings)) - {f"KV_{SERVERS_BUCKET}"}
