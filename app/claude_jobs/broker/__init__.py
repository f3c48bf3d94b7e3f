"""The broker as we run it: nats-server, alone or as one of several that hold the same."""

from claude_jobs.broker.users import GATEWAY_USER, REPLICA_USER

__all__ = ["GATEWAY_USER", "REPLICA_USER"]
