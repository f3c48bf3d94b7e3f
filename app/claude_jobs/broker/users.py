"""Who may come in to the broker, and what each may do there.

The gateway submits jobs and reads events but cannot pull; a replica pulls jobs and writes events
but can neither submit nor manage a stream. Whole streams are carried from one server to another
by the broker itself, and by nobody else.
"""

import hashlib
import hmac
from contextlib import AbstractAsyncContextManager
from typing import Any

from claude_jobs.bus.connection import Bus, connect, login
from claude_jobs.bus.servers import SERVERS_BUCKET
from claude_jobs.bus.topology import (
    CANCELLATIONS_BUCKET,
    EVENTS_STREAM,
    EVENTS_SUBJECTS,
    JOBS_CONSUMER,
    JOBS_STREAM,
    JOBS_SUBJECTS,
    PRESENCE_BUCKET,
    RECORDS_BUCKET,
    SESSION_RECORDS_BUCKET,
    SESSIONS_STREAM,
    SESSIONS_SUBJECTS,
)
from claude_jobs.settings import BrokerSettings, GatewaySettings

GATEWAY_USER = "gateway"
REPLICA_USER = "replica"
BROKER_USER = "broker"
# Who may take a server off the broker. In an account of its own, which has no stream.
SYSTEM_USER = "system"
SYSTEM_ACCOUNT = "SYS"
# The user as which one server comes in to another.
ROUTE_USER = "route"

_WRITTEN_BY_REPLICAS = (RECORDS_BUCKET, SESSION_RECORDS_BUCKET, PRESENCE_BUCKET)
_READ_BY_REPLICAS = (*_WRITTEN_BY_REPLICAS, CANCELLATIONS_BUCKET)
_FOLLOWED_BY_REPLICAS = (EVENTS_STREAM, SESSIONS_STREAM, f"KV_{CANCELLATIONS_BUCKET}")

_PERMISSIONS = {
    GATEWAY_USER: {
        "publish": {
            "allow": [JOBS_SUBJECTS, EVENTS_SUBJECTS, "$KV.>", "$JS.API.>", "$JS.FC.>"],
            "deny": [
                f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.>",
                "$JS.API.STREAM.SNAPSHOT.>",
                "$JS.API.STREAM.RESTORE.>",
            ],
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
    BROKER_USER: {
        "publish": {"allow": ["$JS.API.>", "$JS.SNAPSHOT.>", f"$KV.{SERVERS_BUCKET}.>"]},
        "subscribe": {"allow": [f"_INBOX_{BROKER_USER}.>"]},
    },
}


def users(settings: BrokerSettings) -> list[dict[str, Any]]:
    """Return the users with their passwords and rights, as the configuration has them.

    One whose password is being changed is there twice.
    """
    passwords = {
        GATEWAY_USER: settings.broker_gateway_password.accepted,
        REPLICA_USER: settings.broker_replica_password.accepted,
        BROKER_USER: (broker_password(settings),),
    }
    return [
        {
            "user": login(user, password),
            "password": password,
            "permissions": _PERMISSIONS[user],
        }
        for user, accepted in passwords.items()
        for password in accepted
    ]


def system_users(settings: BrokerSettings) -> list[dict[str, Any]]:
    """Return the user of the account that manages the servers; two while its password changes."""
    passwords = map(_system_password, settings.broker_gateway_password.accepted)
    return [{"user": login(SYSTEM_USER, each), "password": each} for each in passwords]


def connect_as_system(
    url: str, settings: BrokerSettings | GatewaySettings, *, name: str
) -> AbstractAsyncContextManager[Bus]:
    """Connect as the user that manages the servers; see `connect`."""
    password = _system_password(settings.broker_gateway_password.current)
    return connect(url, user=SYSTEM_USER, password=password, name=name)


def _system_password(gateway_password: str) -> str:
    return _derived(gateway_password, "user system")


def broker_password(settings: BrokerSettings) -> str:
    """Return the password of the broker's own user, which only who has the secrets can tell."""
    return _derived(settings.broker_gateway_password.current, "user broker")


def route_password(settings: BrokerSettings) -> str:
    """Return the password with which one server comes in to another."""
    return _derived(settings.broker_gateway_password.current, "route")


def _derived(password: str, purpose: str) -> str:
    """Make a password out of another, for one purpose: from it nobody learns the other."""
    made_for = f"claude-jobs {purpose}".encode()
    return hmac.new(password.encode(), made_for, hashlib.sha256).hexdigest()
