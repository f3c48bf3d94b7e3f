"""Starts nats-server."""

import os

from claude_jobs.broker.configuration import cluster_store, configuration
from claude_jobs.broker.program import find_server, version_of, write_configuration
from claude_jobs.broker.stores import streams_in
from claude_jobs.bus.servers import SERVERS_BUCKET
from claude_jobs.settings import BrokerSettings, SettingsError


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
    server = find_server()
    path = settings.broker_config_dir / "nats.conf"
    write_configuration(path, configuration(settings, version_of(server)))
    os.execv(server, [server, "--config", str(path)])  # noqa: S606 - found above, no shell


def _held_by_several(settings: BrokerSettings) -> set[str]:
    """Return the streams that several servers hold, without their own book of each other."""
    return streams_in(cluster_store(settings)) - {f"KV_{SERVERS_BUCKET}"}
