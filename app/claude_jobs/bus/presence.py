"""Presence: each replica says regularly that it is there; who falls silent is gone."""

from nats.js.errors import KeyNotFoundError
from nats.js.kv import KeyValue

from claude_jobs.bus.bucket_values import bucket_values
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.topology import PRESENCE_BUCKET
from claude_jobs.contract.status import Replica

# Seconds between two announcements; the bucket forgets a key after `Bounds.presence`.
ANNOUNCE_EVERY = 2.0


class Presence:
    """The bucket of replicas that are alive. A key lives for `Bounds.presence` without news."""

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self._bus = bus
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> "Presence":
        """Open the bucket; raises `nats.js.errors.NotFoundError` until a gateway made it."""
        return cls(bus, await bus.jetstream.key_value(PRESENCE_BUCKET))

    async def announce(self, replica: Replica) -> None:
        """Say what the replica does now."""
        await self._bucket.put(replica.replica, replica.to_json())

    async def withdraw(self, replica: str) -> None:
        """Say good-bye."""
        await self._bucket.delete(replica)

    async def get(self, replica: str) -> Replica | None:
        """Return what a replica announced last, or None when it is gone."""
        try:
            entry = await self._bucket.get(replica)
        except KeyNotFoundError:
            return None
        return Replica.model_validate_json(entry.value or b"")

    async def list(self) -> list[Replica]:
        """Return the replicas that are alive, by node and name."""
        values = await bucket_values(self._bus.jetstream, PRESENCE_BUCKET)
        replicas = map(Replica.model_validate_json, values)
        return sorted(replicas, key=lambda replica: (replica.node, replica.replica))
