"""Starts nats-server with a configuration that is made from the secrets.

Two users with different rights: the gateway submits jobs and reads events but cannot pull;
a replica pulls jobs and writes events but can neither submit nor manage a stream.
"""

import json
import os
import re
import shutil
import subprocess

from claude_jobs.bus.topology import (
    CANCELLATIONS_BUCKET,
    EVENTS_STREAM,
    EVENTS_SUBJECTS,
    JOBS_BYTES,
    JOBS_CONSUMER,
    JOBS_STREAM,
    JOBS_SUBJECTS,
    PRESENCE_BUCKET,
    RECORDS_BUCKET,
    SESSION_RECORDS_BUCKET,
    SESSIONS_STREAM,
    SESSIONS_SUBJECTS,
)
from claude_jobs.settings import BrokerSettings

GATEWAY_USER = "gateway"
REPLICA_USER = "replica"
# The largest message. A line of Claude Code is one message; tool results can be several MB.
MAX_PAYLOAD_BYTES = 8 * 2**20
# Room for the buckets, which have no bound of their own but the age of what is in them.
BUCKETS_BYTES = 2**30

_WRITTEN_BY_REPLICAS = (RECORDS_BUCKET, SESSION_RECORDS_BUCKET, PRESENCE_BUCKET)
_READ_BY_REPLICAS = (*_WRITTEN_BY_REPLICAS, CANCELLATIONS_BUCKET)
_FOLLOWED_BY_REPLICAS = (EVENTS_STREAM, SESSIONS_STREAM, f"KV_{CANCELLATIONS_BUCKET}")

_PERMISSIONS = {
    GATEWAY_USER: {
        "publish": {
            "allow": [JOBS_SUBJECTS, EVENTS_SUBJECTS, "$KV.>", "$JS.API.>", "$JS.FC.>"],
            "deny": [f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.>"],
        },
        "subscribe": {"allow": [f"_INBOX_{GATEWAY_USER}.>"]},
    },
    REPLICA_USER: {
        "publish": {
            "allow": [
                EVENTS_SUBJECTS,
                SESSIONS_SUBJECTS,
                *(f"$KV.{bucket}.>" for bucket in _WRITTEN_BY_REPLICAS),
                *(f"$JS.API.STREAM.INFO.KV_{bucket}" for bucket in _READ_BY_REPLICAS),
                *(f"$JS.API.STREAM.MSG.GET.KV_{bucket}" for bucket in _READ_BY_REPLICAS),
                f"$JS.API.STREAM.MSG.GET.{EVENTS_STREAM}",
                # Who else of a client has unfinished jobs; what they are, only a pull tells.
                f"$JS.API.STREAM.INFO.{JOBS_STREAM}",
                f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{JOBS_CONSUMER}",
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.>",
                f"$JS.ACK.{JOBS_STREAM}.{JOBS_CONSUMER}.>",
                # To read a log from its start, a saved session, and cancellations as they come.
                *(
                    f"$JS.API.CONSUMER.{verb}.{stream}{rest}"
                    for stream in _FOLLOWED_BY_REPLICAS
                    for verb in ("CREATE", "DELETE", "INFO")
                    for rest in ("", ".>")
                ),
                "$JS.FC.>",
            ]
        },
        "subscribe": {"allow": [f"_INBOX_{REPLICA_USER}.>"]},
    },
}


def configuration(settings: BrokerSettings, version: tuple[int, int]) -> str:
    """Return the server's configuration; NATS reads JSON as it is.

    Every accepted message is on disk before it is acknowledged, where the server can do that
    (`sync_interval: always`, nats-server 2.10).
    """
    jetstream: dict[str, object] = {
        "store_dir": str(settings.broker_data_dir),
        "max_memory_store": 64 * 2**20,
        # A stream reserves its bound: less than all together, and one could not be made.
        "max_file_store": (
            JOBS_BYTES + settings.event_bytes + settings.session_bytes + BUCKETS_BYTES
        ),
    }
    if version >= (2, 10):
        jetstream["sync_interval"] = "always"
    passwords = {
        GATEWAY_USER: settings.broker_gateway_password,
        REPLICA_USER: settings.broker_replica_password,
    }
    return json.dumps(
        {
            "server_name": "nats",
            "listen": f"0.0.0.0:{settings.broker_port}",
            # For the health check alone: not reachable from outside the container.
            "http": f"127.0.0.1:{settings.broker_monitor_port}",
            "max_payload": MAX_PAYLOAD_BYTES,
            "ping_interval": "10s",
            "ping_max": 2,
            "jetstream": jetstream,
            "authorization": {
                "users": [
                    {
                        "user": user,
                        "password": password.get_secret_value(),
                        "permissions": _PERMISSIONS[user],
                    }
                    for user, password in passwords.items()
                ]
            },
        },
        indent=2,
    )


def run(settings: BrokerSettings) -> None:
    """Become nats-server. The configuration is readable for this user alone."""
    server = shutil.which("nats-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")
    if server is None:
        raise FileNotFoundError("nats-server is not installed (Debian: apt install nats-server)")
    text = configuration(settings, _version(server))
    settings.broker_config_dir.mkdir(parents=True, exist_ok=True)
    path = settings.broker_config_dir / "nats.conf"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.execv(server, [server, "--config", str(path)])  # noqa: S606 - found above, no shell


def _version(server: str) -> tuple[int, int]:
    shown = subprocess.run(  # noqa: S603 - found above, no shell
        [server, "--version"], check=True, capture_output=True, text=True
    ).stdout
    match = re.search(r"v(\d+)\.(\d+)", shown)
    if match is None:
        raise ValueError(f"cannot read the version of nats-server from {shown!r}")
    return int(match[1]), int(match[2])
