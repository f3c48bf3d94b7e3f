"""All that the broker keeps, as one tar archive: `python -m claude_jobs broker-backup`.

The archive has for each stream `<stream>/stream.json` (its configuration and state) and its
content in numbered parts, in nats-server's own form, and ends with `complete.json`; one without
that was broken off. A pool that works meanwhile is not held up.

The streams are taken one after the other, the jobs first and the events last. So a job that ended
meanwhile has its end in the log and is not begun again, and one that came meanwhile is told, when
somebody asks, that it was not taken in.
"""

import asyncio
import io
import json
import shutil
import tarfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import IO, Any

from claude_jobs.broker.lone_server import lone_server
from claude_jobs.broker.stores import STORE_NAME, streams_in
from claude_jobs.broker.users import BROKER_USER, broker_password
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.servers import SERVERS_BUCKET
from claude_jobs.bus.snapshot import Snapshot, restore_snapshot, take_snapshot
from claude_jobs.bus.topology import EVENTS_STREAM, JOBS_STREAM, PRESENCE_BUCKET
from claude_jobs.settings import BrokerSettings

FORMAT = 1
# Seconds for which a server that does not answer is waited for.
_PATIENCE = 15.0
_STREAM = "stream.json"
_COMPLETE = "complete.json"
# Who is there at this moment, and which servers there are, is of no use elsewhere.
_NOT_KEPT = {f"KV_{PRESENCE_BUCKET}", f"KV_{SERVERS_BUCKET}"}


class ArchiveError(Exception):
    """An archive cannot be made or used; the sentence says why."""


@dataclass(frozen=True)
class Kept:
    """What an archive has of one stream."""

    messages: int
    last: int
    parts: int


async def back_up(settings: BrokerSettings, output: IO[bytes]) -> dict[str, Kept]:
    """Write everything that the broker keeps to `output`, beside a server that runs.

    Raises `TimeoutError` when it is not there, and `SnapshotError` or `nats.errors.Error` when it
    goes away meanwhile.
    """
    url = settings.own_url
    kept: dict[str, Kept] = {}
    async with AsyncExitStack() as stack:
        async with asyncio.timeout(_PATIENCE):
            bus = await stack.enter_async_context(
                connect(url, user=BROKER_USER, password=broker_password(settings), name="backup")
            )
        with tarfile.open(fileobj=output, mode="w|") as archive:
            for stream in await _streams(bus):
                async with take_snapshot(bus, stream) as snapshot:
                    described = {"config": snapshot.config, "state": snapshot.state}
                    _add(archive, f"{stream}/{_STREAM}", json.dumps(described).encode())
                    parts = 0
                    async for chunk in snapshot.chunks:
                        parts += 1
                        _add(archive, f"{stream}/{parts:08}", chunk)
                state = snapshot.state
                kept[stream] = Kept(state["messages"], state["last_seq"], parts)
            _add(archive, _COMPLETE, json.dumps(_summary(kept)).encode())
    return kept


async def restore(settings: BrokerSettings, given: IO[bytes]) -> dict[str, Kept]:
    """Make the store of a lone server out of an archive; there must be none.

    A broker of several servers takes that store up as it does when a pool grows. Raises
    `ArchiveError` for an archive that is not whole or of another form, and for a node that has a
    store.
    """
    if held := streams_in(settings.broker_data_dir) | streams_in(
        settings.broker_data_dir / "cluster"
    ):
        raise ArchiveError(f"this node has streams of a broker already: {', '.join(sorted(held))}")
    try:
        return await _restore(settings, given)
    except BaseException:
        # Nothing half done: a server that found it would take it for its own.
        shutil.rmtree(settings.broker_data_dir / STORE_NAME, ignore_errors=True)
        raise


async def _restore(settings: BrokerSettings, given: IO[bytes]) -> dict[str, Kept]:
    kept: dict[str, Kept] = {}
    complete: dict[str, Any] | None = None
    async with lone_server(settings) as bus:
        try:
            with tarfile.open(fileobj=given, mode="r|") as archive:
                entries = _Entries(archive)
                while (entry := entries.next()) is not None:
                    name, content = entry
                    if name == _COMPLETE:
                        complete = json.loads(content)
                        break
                    stream = name.partition("/")[0]
                    kept[stream] = await _restore_stream(bus, json.loads(content), entries)
        except (tarfile.TarError, ValueError, KeyError) as error:
            raise ArchiveError(f"the archive cannot be read: {error}") from error
        if complete is None:
            raise ArchiveError("the archive was broken off: it has no end")
        if complete != _summary(kept):
            raise ArchiveError("the archive is not what was written: its parts do not add up")
    return kept


class _Entries:
    """The entries of an archive, in their order; one can be given back."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._returned: tuple[str, bytes] | None = None
        self._ended = False

    def next(self) -> tuple[str, bytes] | None:
        if self._returned is not None:
            entry, self._returned = self._returned, None
            return entry
        # Asked again after the end, tarfile would seek, which a pipe cannot.
        info = None if self._ended else self._archive.next()
        if info is None:
            self._ended = True
            return None
        content = self._archive.extractfile(info)
        if content is None:
            raise ArchiveError(f"the archive has something that is no file: {info.name}")
        return info.name, content.read()

    def parts(self, stream: str) -> Iterator[bytes]:
        """Yield the parts of a stream, up to what is none."""
        while (entry := self.next()) is not None:
            if not entry[0].startswith(f"{stream}/"):
                self._returned = entry
                return
            yield entry[1]


async def _restore_stream(bus: Bus, described: dict[str, Any], entries: _Entries) -> Kept:
    config = {**described["config"], "num_replicas": 1}
    state = described["state"]
    parts = 0

    async def chunks() -> AsyncGenerator[bytes]:
        nonlocal parts
        for chunk in entries.parts(str(config["name"])):
            parts += 1
            yield chunk

    await restore_snapshot(bus, Snapshot(config, state, chunks()))
    return Kept(state["messages"], state["last_seq"], parts)


async def _streams(bus: Bus) -> list[str]:
    """Return the streams to keep: the jobs first and the events last."""
    held = {str(info.config.name) for info in await bus.jetstream.streams_info()}
    order = {JOBS_STREAM: 0, EVENTS_STREAM: 2}
    return sorted(held - _NOT_KEPT, key=lambda stream: (order.get(stream, 1), stream))


def _summary(kept: dict[str, Kept]) -> dict[str, Any]:
    return {"format": FORMAT, "streams": {name: vars(each) for name, each in kept.items()}}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
