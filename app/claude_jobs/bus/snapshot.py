"""A whole stream with its consumers, as bytes: taken from one broker, restored in another.

Messages keep their sequence numbers, and consumers what was handed out and not confirmed. The
bytes are nats-server's own form. Restoring makes a stream and never touches one that is there.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nats.aio.msg import Msg
from nats.js.errors import APIError

from claude_jobs.bus.connection import REQUEST_TIMEOUT, Bus

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

_CHUNK_BYTES = 2**19
# Seconds without a chunk, or without the broker's word that it has one, after which it failed.
_SILENCE = 20.0
# Seconds that the broker may take to read what it was sent: some gigabytes.
_UNPACKING = 600.0
_DONE_STATUS = "204"


class SnapshotError(Exception):
    """A snapshot could not be taken or restored to its end."""


@dataclass(frozen=True)
class Snapshot:
    """A stream's configuration and state as JetStream's API has them, and its content.

    The chunks can be read once.
    """

    config: dict[str, Any]
    state: dict[str, Any]
    chunks: AsyncGenerator[bytes]

    @property
    def stream(self) -> str:
        """The stream's name."""
        return str(self.config["name"])


@asynccontextmanager
async def take_snapshot(bus: Bus, stream: str) -> AsyncIterator[Snapshot]:
    """Take a snapshot, to be read within the block.

    Reading its chunks raises `SnapshotError` when the broker stops before the end. Raises
    `nats.js.errors.APIError` when it refuses.
    """
    inbox = bus.nats.new_inbox()
    subscription = await bus.nats.subscribe(inbox)
    try:
        wish = {"deliver_subject": inbox, "chunk_size": _CHUNK_BYTES, "jsck": False}
        said = await ask(bus, f"$JS.API.STREAM.SNAPSHOT.{stream}", wish)
        async with aclosing(_chunks(stream, subscription)) as chunks:
            yield Snapshot(said["config"], said["state"], chunks)
    finally:
        await subscription.unsubscribe()


async def restore_snapshot(bus: Bus, snapshot: Snapshot) -> dict[str, Any]:
    """Make a stream from a snapshot and return its state; it must not exist.

    The stream is there only once all of it has come. Raises `SnapshotError` when it is not what
    was taken, `nats.js.errors.APIError` when the broker refuses.
    """
    wish = {"config": snapshot.config, "state": snapshot.state}
    said = await ask(bus, f"$JS.API.STREAM.RESTORE.{snapshot.stream}", wish)
    target = said["deliver_subject"]
    async for chunk in snapshot.chunks:
        answer = await bus.nats.request(target, chunk, timeout=_SILENCE)
        if answer.data:
            raise SnapshotError(f"stream {snapshot.stream}: {_result(answer)}")
    restored = _result(await bus.nats.request(target, b"", timeout=_UNPACKING))
    state: dict[str, Any] = restored["state"]
    if state["last_seq"] != snapshot.state["last_seq"]:
        raise SnapshotError(
            f"stream {snapshot.stream} ends with {state['last_seq']} "
            f"and not with {snapshot.state['last_seq']}"
        )
    return state


async def ask(bus: Bus, subject: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Ask JetStream's API; raises `nats.js.errors.APIError` when it refuses."""
    return _result(
        await bus.nats.request(subject, json.dumps(wish).encode(), timeout=2 * REQUEST_TIMEOUT)
    )


def _result(answer: Msg) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(answer.data)
    if "error" in said:
        raise APIError.from_error(said["error"])
    return said


async def _chunks(stream: str, subscription: "Subscription") -> AsyncGenerator[bytes]:
    """Yield what comes up to its end. The broker goes on as each is confirmed."""
    expected = 1
    while True:
        try:
            message = await subscription.next_msg(timeout=_SILENCE)
        except TimeoutError as error:
            raise SnapshotError(f"the snapshot of stream {stream} stopped") from error
        if not message.data:
            status = (message.headers or {}).get("Status", _DONE_STATUS)
            if status != _DONE_STATUS:
                raise SnapshotError(f"the snapshot of stream {stream} ended with {status}")
            return
        # $JS.SNAPSHOT.ACK.<stream>.<id>.<bytes>.<number>
        number = int(message.reply.rpartition(".")[2])
        if number != expected:
            raise SnapshotError(f"a part of the snapshot of stream {stream} was lost on the way")
        expected += 1
        yield message.data
        await message.respond(b"")
