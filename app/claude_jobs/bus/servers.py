"""The book in which the servers of one broker say that they are there.

Several servers are one broker only once all have met. Until then nobody makes a stream: one of
them may bring the streams that it held when it was alone.
"""

import json
from dataclasses import dataclass

from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import (
    BucketNotFoundError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NotFoundError,
)
from nats.js.kv import KeyValue

from claude_jobs.bus.connection import Bus

SERVERS_BUCKET = "broker_servers"

_ARRIVED = "arrived"
_JOINED = "joined"


class ServersMissingError(Exception):
    """Not all servers of the broker have joined yet."""

    def __init__(self, joined: int, expected: int) -> None:
        super().__init__(f"{joined} of the broker's {expected} servers have joined so far")


@dataclass(frozen=True)
class Arrival:
    """A server that has come. `newest` is the time of the last message that it brings.

    In seconds since 1970; None: it brings nothing.
    """

    server: str
    newest: float | None


class BrokerServers:
    """The bucket with the servers, which every one of them holds a copy of."""

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self._bus = bus
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus, *, copies: int) -> "BrokerServers":
        """Open the bucket, or make it: that takes as many servers as copies."""
        try:
            return cls(bus, await bus.jetstream.key_value(SERVERS_BUCKET))
        except BucketNotFoundError:
            config = KeyValueConfig(
                bucket=SERVERS_BUCKET, history=1, storage=StorageType.FILE, replicas=copies
            )
            return cls(bus, await bus.jetstream.create_key_value(config))

    async def arrive(self, arrival: Arrival) -> None:
        """Say that a server has come; what it said the first time stands."""
        said = json.dumps({"newest": arrival.newest}).encode()
        try:
            await self._bucket.create(f"{_ARRIVED}.{arrival.server}", said)
        except KeyWrongLastSequenceError:
            return

    async def arrivals(self) -> list[Arrival]:
        """Return the servers that have come."""
        found = []
        for server in await _names(self._bus, _ARRIVED):
            entry = await self._bucket.get(f"{_ARRIVED}.{server}")
            found.append(Arrival(server, json.loads(entry.value or b"")["newest"]))
        return found

    async def join(self, server: str, *, brought: bool) -> None:
        """Say that a server has joined, and whether what it had is in the broker now."""
        said = json.dumps({"brought": brought}).encode()
        await self._bucket.put(f"{_JOINED}.{server}", said)

    async def has_brought(self, server: str) -> bool | None:
        """Tell whether a server has brought what it had; None: it has not joined."""
        try:
            entry = await self._bucket.get(f"{_JOINED}.{server}")
        except KeyNotFoundError:
            return None
        return bool(json.loads(entry.value or b"")["brought"])


async def ensure_all_joined(bus: Bus, expected: int) -> None:
    """Raise `ServersMissingError` unless so many servers have joined at some time."""
    joined = len(await _names(bus, _JOINED))
    if joined < expected:
        raise ServersMissingError(joined, expected)


async def _names(bus: Bus, state: str) -> list[str]:
    """Return the names of the servers that have come so far; none where there is no bucket."""
    prefix = f"$KV.{SERVERS_BUCKET}.{state}."
    try:
        info = await bus.jetstream.stream_info(f"KV_{SERVERS_BUCKET}", subjects_filter=f"{prefix}>")
    except NotFoundError:
        return []
    return sorted(subject.removeprefix(prefix) for subject in info.state.subjects or {})
