"""Sessions on the bus: what each conversation was (a log) and who used it last (a record).

The log is the Agent SDK's `SessionStore`, so that a session can be resumed on any replica. A
transcript is a subject of its own that carries JSON lines as one stream of bytes, in compressed
pieces. One replica writes at a time: whoever takes a session over shuts the one before out.
"""

import asyncio
import base64
import contextlib
import json
import logging
import uuid
import zlib
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from datetime import datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, cast

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from claude_jobs.bus.bucket_values import bucket_values
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.places import take_place
from claude_jobs.bus.topology import SESSION_RECORDS_BUCKET, SESSIONS_STREAM
from claude_jobs.contract.base import now
from claude_jobs.contract.session import Session

if TYPE_CHECKING:  # An idle replica must not load the SDK: it takes 40 MB.
    from claude_agent_sdk.types import (
        SessionKey,
        SessionListSubkeysKey,
        SessionStoreEntry,
        SessionStoreListEntry,
    )

log = logging.getLogger(__name__)

# The project key and the subpath of a transcript (empty for the main one), and its JSON lines.
Transcripts = dict[tuple[str, str], list[bytes]]
IsOver = Callable[[str], Awaitable[bool]]

_WRONG_LAST_SEQUENCE = {10070, 10071}
# Far below the broker's largest message (bytes), also where nothing can be compressed.
_PIECE_BYTES = 2**20
# How long a piece is tried while the broker is away or full, in seconds.
_PATIENCE = 120.0
# Reading what the log holds takes no longer (seconds).
_READ_TIMEOUT = 30.0
_READ_HEARTBEAT = 1.0
_MAIN = "-"
# What is shorter ago may be a session whose record is only just being written.
_TIME_FOR_THE_RECORD = timedelta(hours=1)
# The share of the log's bound from which on the least recently used sessions are removed.
_FULL = 0.8


class SessionTakenError(Exception):
    """Somebody else writes this session now, or it was removed: nothing of ours is taken."""


class SessionLogError(Exception):
    """The broker did not take or hand out a session; after that it is not written any more."""


class SessionBusyError(Exception):
    """A job that has not ended uses the session."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} uses this session")
        self.job_id = job_id


class SessionLog:
    """The log of sessions; has the shape of `claude_agent_sdk.types.SessionStore`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._writers: dict[str, _Writer] = {}
        self._deliveries: set[asyncio.Task[None]] = set()

    async def append(self, key: "SessionKey", entries: "list[SessionStoreEntry]") -> None:
        """Append entries to a transcript; returns when the broker has them on disk.

        Goes on in the background when its caller gives up waiting: a hole would make what
        follows worthless. Raises `SessionTakenError`, and `SessionLogError` when the broker
        stayed away or full.
        """
        if not entries:
            return
        writer = self._writer(_subject(key["session_id"], key["project_key"], key.get("subpath")))
        delivery = asyncio.create_task(writer.write(_lines(entries)))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._delivered)
        await asyncio.shield(delivery)

    async def flush(self) -> None:
        """Wait until nothing is on its way any more, taken or not."""
        while self._deliveries:
            await asyncio.wait(self._deliveries)

    async def load(self, key: "SessionKey") -> "list[SessionStoreEntry] | None":
        """Return a transcript's entries, or None when there are none."""
        subject = _subject(key["session_id"], key["project_key"], key.get("subpath"))
        found = await self._read(subject)
        if not found:
            return None
        [lines] = found.values()
        return [cast("SessionStoreEntry", json.loads(line)) for line in lines]

    async def holds_conversation(self, session_id: str) -> bool:
        """Tell whether so much of a session was saved that the user's words are among it."""
        saved = await self._read(f"sessions.{session_id}.*.{_MAIN}")
        return any(
            json.loads(line).get("type") == "user" for lines in saved.values() for line in lines
        )

    async def take_over(self, session_id: str) -> Transcripts:
        """Return all transcripts of a session, and be from now on the one who writes it.

        Empty when nothing was saved. Tries again while the broker is away; raises
        `SessionLogError` when it stayed away.
        """
        transcripts = f"sessions.{session_id}.*"
        give_up = monotonic() + _PATIENCE
        while True:
            try:
                for subject in await self._newest(f"{transcripts}.{_MAIN}"):
                    # It ends a line that was left unfinished, and whoever wrote it names an
                    # outdated place from here on.
                    await self._writer(subject).write(b"\n")
                return await self._read(f"{transcripts}.*")
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                if monotonic() > give_up:
                    raise SessionLogError(f"a session was out of reach: {error!r}") from error
                log.warning("reading a session again", extra={"cause": str(error) or repr(error)})
            await asyncio.sleep(0.25)

    async def delete(self, key: "SessionKey") -> None:
        """Remove a transcript; the main one with all that hang on it."""
        subject = _subject(
            key["session_id"], key["project_key"], key.get("subpath"), everything=True
        )
        await self._bus.jetstream.purge_stream(SESSIONS_STREAM, subject=subject)

    async def remove(self, session_id: str) -> None:
        """Remove everything of a session; who still writes it is shut out."""
        await self._bus.jetstream.purge_stream(
            SESSIONS_STREAM, subject=f"sessions.{session_id}.*.*"
        )

    async def list_sessions(self, project_key: str) -> "list[SessionStoreListEntry]":
        """Return the sessions of a project and when (ms) each was last written."""
        found = await self._newest(f"sessions.*.{_encoded(project_key)}.{_MAIN}")
        return [
            {"session_id": subject.split(".")[1], "mtime": int(time.timestamp() * 1000)}
            for subject, time in found.items()
        ]

    async def list_subkeys(self, key: "SessionListSubkeysKey") -> list[str]:
        """Return the subpaths of a session."""
        found = await self._newest(f"sessions.{key['session_id']}.{_encoded(key['project_key'])}.*")
        return [subpath for _, subpath in map(_transcript, found) if subpath]

    async def last_written(self) -> dict[str, datetime]:
        """Return when each session was last written, the longest ago first."""
        times: dict[str, datetime] = {}
        for subject, time in (await self._newest("sessions.*.*.*")).items():
            session_id = subject.split(".")[1]
            times[session_id] = max(time, times.get(session_id, time))
        return dict(sorted(times.items(), key=lambda item: item[1]))

    async def fullness(self) -> float:
        """Return how full the log is: 1 is its bound."""
        info = await self._bus.jetstream.stream_info(SESSIONS_STREAM)
        bound = info.config.max_bytes or 0
        return info.state.bytes / bound if bound > 0 else 0

    def _writer(self, subject: str) -> "_Writer":
        return self._writers.setdefault(subject, _Writer(self._bus, subject))

    def _delivered(self, delivery: "asyncio.Task[None]") -> None:
        self._deliveries.discard(delivery)
        if not delivery.cancelled() and (fault := delivery.exception()):
            log.error("a part of a session is not saved", extra={"cause": str(fault)})

    async def _read(self, subjects: str) -> Transcripts:
        """Return the lines of each transcript, each entry once."""
        streams: dict[str, bytearray] = defaultdict(bytearray)
        async with (
            asyncio.timeout(_READ_TIMEOUT),
            aclosing(self._messages(subjects, DeliverPolicy.ALL)) as messages,
        ):
            async for message in messages:
                streams[message.subject] += zlib.decompress(message.data)
        found = {
            _transcript(subject): list(_entries(stream)) for subject, stream in streams.items()
        }
        return {transcript: lines for transcript, lines in found.items() if lines}

    async def _newest(self, subjects: str) -> dict[str, datetime]:
        """Return the transcripts that there are and when each was last written."""
        async with (
            asyncio.timeout(_READ_TIMEOUT),
            aclosing(self._messages(subjects, DeliverPolicy.LAST_PER_SUBJECT)) as messages,
        ):
            return {message.subject: message.metadata.timestamp async for message in messages}

    async def _messages(self, subjects: str, policy: DeliverPolicy) -> AsyncGenerator[Msg]:
        """Yield what the log holds at the moment; only headers unless everything is asked for."""
        subscription = await take_place(
            lambda: self._bus.jetstream.subscribe(
                subjects,
                stream=SESSIONS_STREAM,
                ordered_consumer=True,
                config=ConsumerConfig(
                    deliver_policy=policy,
                    headers_only=policy is not DeliverPolicy.ALL,
                    idle_heartbeat=_READ_HEARTBEAT,
                ),
            )
        )
        last = 0
        try:
            info = await subscription.consumer_info()
            if not info.num_pending and not (info.delivered and info.delivered.consumer_seq):
                return
            async for message in subscription.messages:
                place = message.metadata.sequence.stream
                # A reader that was set up anew may be handed what it had.
                if place > last:
                    last = place
                    yield message
                if message.metadata.num_pending == 0:
                    return
        finally:
            await subscription.unsubscribe()


class _Writer:
    """Appends to one transcript, in order, and only on what it appended itself."""

    def __init__(self, bus: Bus, subject: str) -> None:
        self._bus = bus
        self._subject = subject
        self._id = uuid.uuid4().hex
        self._pieces = 0
        self._last: int | None = None
        self._order = asyncio.Lock()
        self._fault: SessionTakenError | SessionLogError | None = None

    async def write(self, data: bytes) -> None:
        """Append bytes in pieces. After the first failure every later write fails."""
        async with self._order:
            if self._fault is not None:
                raise type(self._fault)(str(self._fault))
            try:
                for start in range(0, len(data), _PIECE_BYTES):
                    await self._publish(zlib.compress(data[start : start + _PIECE_BYTES], level=1))
            except (SessionTakenError, SessionLogError) as fault:
                self._fault = fault
                raise

    async def _publish(self, piece: bytes) -> None:
        self._pieces += 1
        # The broker recognises a repeated piece by this and answers as it did before.
        headers = {"Nats-Msg-Id": f"{self._id}:{self._pieces}"}
        if self._last is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(self._last)
        give_up = monotonic() + _PATIENCE
        while True:
            try:
                ack = await self._bus.jetstream.publish(self._subject, piece, headers=headers)
            except APIError as error:
                if error.err_code in _WRONG_LAST_SEQUENCE:
                    raise SessionTakenError(self._subject) from error
                if error.code is not None and error.code < 500:
                    raise SessionLogError(str(error)) from error
                cause: Exception = error
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                cause = error
            else:
                self._last = ack.seq
                return
            if monotonic() > give_up:
                raise SessionLogError(
                    f"no part of a session was taken for {_PATIENCE:.0f} s"
                ) from cause
            log.warning("saving a session again", extra={"cause": str(cause) or repr(cause)})
            await asyncio.sleep(0.25)


class SessionRecords:
    """The bucket of session records. A record is also the lock: one job at a time."""

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self._bus = bus
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> "SessionRecords":
        """Open the bucket; raises `nats.js.errors.NotFoundError` until a gateway made it."""
        return cls(bus, await bus.jetstream.key_value(SESSION_RECORDS_BUCKET))

    async def get(self, session_id: str) -> Session | None:
        """Return a session's record, or None when it is not known (any more)."""
        found = await self._entry(session_id)
        return found[0] if found else None

    async def put(self, session: Session) -> None:
        """Store a record, in place of the one before."""
        await self._bucket.put(session.id, session.to_json())

    async def claim(self, session_id: str, job_id: str, is_over: IsOver) -> Session | None:
        """Make `job_id` the session's last job; returns the record before. None: no such session.

        Of two jobs that claim at the same time one gets it. Raises `SessionBusyError` while the
        last job is not over.
        """
        while (found := await self._entry(session_id)) is not None:
            session, revision = found
            if session.last_job_id != job_id and not await is_over(session.last_job_id):
                raise SessionBusyError(session.last_job_id)
            claimed = session.model_copy(update={"last_job_id": job_id, "updated_at": now()})
            try:
                await self._bucket.update(session_id, claimed.to_json(), last=revision)
            except KeyWrongLastSequenceError:
                continue
            return session
        return None

    async def unclaim(self, before: Session, job_id: str) -> None:
        """Put back the record from before a claim of `job_id`, if nobody has changed it since."""
        found = await self._entry(before.id)
        if found and found[0].last_job_id == job_id:
            with contextlib.suppress(KeyWrongLastSequenceError):
                await self._bucket.update(before.id, before.to_json(), last=found[1])

    async def release(self, session_id: str, is_over: IsOver) -> bool:
        """Remove a record that no job uses; False: no such session. Raises `SessionBusyError`."""
        while (found := await self._entry(session_id)) is not None:
            session, revision = found
            if not await is_over(session.last_job_id):
                raise SessionBusyError(session.last_job_id)
            try:
                await self._bucket.delete(session_id, last=revision)
            except APIError as error:
                if error.err_code not in _WRONG_LAST_SEQUENCE:
                    raise
                continue
            return True
        return False

    async def remove(self, session_id: str) -> None:
        """Remove a record, whoever uses it."""
        await self._bucket.purge(session_id)

    async def list(self) -> list[Session]:
        """Return all records, the last used first."""
        values = await bucket_values(self._bus.jetstream, SESSION_RECORDS_BUCKET)
        sessions = map(Session.model_validate_json, values)
        return sorted(sessions, key=lambda session: session.updated_at, reverse=True)

    async def _entry(self, session_id: str) -> tuple[Session, int] | None:
        try:
            entry = await self._bucket.get(session_id)
        except KeyNotFoundError:
            return None
        return Session.model_validate_json(entry.value or b""), entry.revision or 0


async def remove_session(
    log_: SessionLog, records: SessionRecords, session_id: str, is_over: IsOver
) -> bool:
    """Remove a session for good, its record and its log; False: there was no record.

    No job can begin to use it in between. Raises `SessionBusyError` when one uses it.
    """
    known = await records.release(session_id, is_over)
    await log_.remove(session_id)
    return known


async def sweep(log_: SessionLog, records: SessionRecords, is_over: IsOver) -> list[str]:
    """Remove what no record names any more, and the least recently used while the log is full.

    Returns the ids that were removed. Several gateways may do it at the same time.
    """
    removed: list[str] = []
    kept: list[str] = []
    # In this order: a session that begins in between is in neither.
    written = await log_.last_written()
    known = {session.id for session in await records.list()}
    for session_id, time in written.items():
        if session_id in known:
            kept.append(session_id)
        elif now() - time > _TIME_FOR_THE_RECORD:
            await log_.remove(session_id)
            removed.append(session_id)
    for session_id in kept:
        if await log_.fullness() < _FULL:
            break
        try:
            await remove_session(log_, records, session_id, is_over)
        except SessionBusyError:
            continue
        removed.append(session_id)
        log.warning("a session was removed to make room", extra={"session": session_id})
    return removed


def _subject(
    session_id: str, project_key: str, subpath: str | None, *, everything: bool = False
) -> str:
    """Return a transcript's subject; `everything`: with those that hang on the main one."""
    last = _encoded(subpath) if subpath else "*" if everything else _MAIN
    return f"sessions.{session_id}.{_encoded(project_key)}.{last}"


def _transcript(subject: str) -> tuple[str, str]:
    _, _, project_key, subpath = subject.split(".")
    return _decoded(project_key), "" if subpath == _MAIN else _decoded(subpath)


def _encoded(text: str) -> str:
    # The marker of the main transcript can never come out: four characters stand for three bytes.
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(text: str) -> str:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()


def _lines(entries: "Iterable[SessionStoreEntry]") -> bytes:
    # Compact, as the CLI writes them: it looks for words of them in the text.
    text = "\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    return f"{text}\n".encode()


def _entries(stream: bytes | bytearray) -> Iterator[bytes]:
    """Yield the lines that are whole; one with the `uuid` of an earlier one is a repetition."""
    seen: set[str] = set()
    for line in stream.split(b"\n"):
        if not line:
            continue
        try:
            identity = json.loads(line).get("uuid")
        except (ValueError, AttributeError):
            log.warning("an entry of a session was never finished", extra={"bytes": len(line)})
            continue
        if identity is not None:
            if identity in seen:
                continue
            seen.add(identity)
        yield bytes(line)
