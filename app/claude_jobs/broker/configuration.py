"""The configuration of nats-server, made from the settings and the secrets."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from claude_jobs.broker.users import (
    ROUTE_USER,
    SYSTEM_ACCOUNT,
    route_password,
    system_users,
    users,
)
from claude_jobs.bus.topology import JOBS_BYTES
from claude_jobs.settings import BrokerSettings

CLUSTER_NAME = "claude-jobs"
# The name of a server that is the only one.
LONE_SERVER = "nats"
# The largest message. A line of Claude Code is one message; tool results can be several MB.
MAX_PAYLOAD_BYTES = 8 * 2**20
# Room for the buckets, which have no bound of their own but the age of what is in them.
BUCKETS_BYTES = 2**30


def configuration(settings: BrokerSettings, version: tuple[int, int]) -> str:
    """Return the server's configuration; NATS reads JSON as it is.

    Every accepted message is on disk before it is acknowledged, where the server can do that
    (`sync_interval: always`, nats-server 2.10).
    """
    made: dict[str, Any] = {
        "server_name": server_name(settings),
        "listen": f"0.0.0.0:{settings.broker_port}",
        # For the health check alone: not reachable from outside the container.
        "http": f"127.0.0.1:{settings.broker_monitor_port}",
        "max_payload": MAX_PAYLOAD_BYTES,
        "ping_interval": "5s",
        "ping_max": 2,
        "jetstream": jetstream(settings, version, store_directory(settings)),
        "authorization": {"users": users(settings)},
    }
    if settings.broker_servers > 1:
        made["cluster"] = _cluster(settings, version)
        made["accounts"] = {SYSTEM_ACCOUNT: {"users": system_users(settings)}}
        made["system_account"] = SYSTEM_ACCOUNT
    return json.dumps(made, indent=2)


def jetstream(settings: BrokerSettings, version: tuple[int, int], store: Path) -> dict[str, Any]:
    """Return how a server keeps what is in the directory `store`."""
    made: dict[str, Any] = {
        "store_dir": str(store),
        "max_memory_store": 64 * 2**20,
        # A stream reserves its bound: less than all together, and one could not be made.
        "max_file_store": (
            JOBS_BYTES + settings.event_bytes + settings.session_bytes + BUCKETS_BYTES
        ),
    }
    if version >= (2, 10):
        made["sync_interval"] = "always"
    return made


def server_name(settings: BrokerSettings) -> str:
    """Return the server's name: among several, the same for each start on the same node.

    Once another has taken its place it is a new one: a name that was taken off the broker is not
    taken in again for minutes.
    """
    if settings.broker_servers == 1:
        return LONE_SERVER
    times = times_replaced(settings)
    return f"nats-{settings.node_name}" + (f"_{times + 1}" if times else "")


def times_replaced(settings: BrokerSettings) -> int:
    """Return how often another server has taken the place of this node's."""
    file = _times_replaced(settings)
    return int(file.read_text()) if file.exists() else 0


def count_replaced(settings: BrokerSettings) -> None:
    """Make this node's server a new one."""
    times = times_replaced(settings) + 1
    _times_replaced(settings).write_text(str(times))


def _times_replaced(settings: BrokerSettings) -> Path:
    return settings.broker_data_dir / "times-replaced"


def store_directory(settings: BrokerSettings) -> Path:
    """Return where the server keeps its data: one of several does not take up a lone one's."""
    return settings.broker_data_dir if settings.broker_servers == 1 else cluster_store(settings)


def cluster_store(settings: BrokerSettings) -> Path:
    """Return where a server keeps its data that is one of several."""
    return settings.broker_data_dir / "cluster"


def _cluster(settings: BrokerSettings, version: tuple[int, int]) -> dict[str, Any]:
    password = route_password(settings)
    given = [route.strip() for route in settings.broker_routes.split(",")]
    # The servers found their group once a majority is there, and take the number of routes for
    # that of the servers. A name that stands for all of them is one route, and two servers would
    # do; so it is listed once for each. A server takes two equal routes for one: the path, which
    # means nothing, keeps them apart.
    times = -(-settings.broker_servers // len(given))
    made: dict[str, Any] = {
        "name": CLUSTER_NAME,
        "listen": f"0.0.0.0:{settings.broker_cluster_port}",
        "authorization": {"user": ROUTE_USER, "password": password, "timeout": 5},
        # Clients find all servers by name. Told by a server, they would learn its addresses in
        # every network, and try each in vain when it is gone: nobody takes one back.
        "no_advertise": True,
        "routes": [
            f"nats-route://{ROUTE_USER}:{quote(password)}@{route.removeprefix('nats://')}/{number}"
            for number in range(times)
            for route in given
        ],
    }
    if version >= (2, 10):
        # One connection between two servers, not a pool of them. Servers that start together
        # connect to each other at once, and of doubled connections one is closed; with a pool, a
        # server may then never learn what another one answers to (one start in ten, 2.10.27).
        made["pool_size"] = -1
    return made
