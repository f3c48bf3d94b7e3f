"""A wire between one process and the broker that fails at a word of the process's own.

It understands as much of the NATS protocol as it takes to count what the process publishes: its
words. So a fault can strike exactly between two of them, and before or after the broker heard.
"""

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum

_JOB_LEASE = b"$JS.ACK.JOBS."


class Kind(StrEnum):
    """What fails."""

    CRASH = "crash"  # the process dies (SIGKILL)
    STOP = "stop"  # the process stands still (SIGSTOP) and goes on later
    STALL = "stall"  # nothing comes through in either direction, and all of it later
    CUT = "cut"  # the connection breaks, and a new one is refused until later
    REDELIVER = "redeliver"  # the broker hands the job out again, though its replica lives


class Until(StrEnum):
    """When what failed comes back."""

    SOON = "soon"  # after a part of a lease
    TAKEN = "taken"  # once another replica has the job
    ENDED = "ended"  # once the job has ended


@dataclass(frozen=True)
class Fault:
    """Strikes at the word number `word` (from 1); `heard`: the broker gets to hear that one."""

    kind: Kind
    word: int
    heard: bool
    until: Until


@dataclass(frozen=True)
class Delivery:
    """A job that the broker hands to the process; `lease` is where it is answered."""

    job: bytes
    lease: str


@dataclass
class FaultyWire:
    """Forwards to the broker at port `upstream`.

    `delivered` is called for each job that is handed to the process; `struck` when the fault
    strikes that was armed last, after the wire has done its part of it.
    """

    upstream: int
    delivered: Callable[[Delivery], None] = lambda _: None
    struck: Callable[[Fault], None] = lambda _: None
    _fault: Fault | None = None
    _words: int = 0
    _server: asyncio.Server | None = None
    _refuses: bool = False
    _flows: asyncio.Event = field(default_factory=asyncio.Event)
    _open: set[StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        assert self._server
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def up(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._carry, "127.0.0.1")

    def down(self) -> None:
        """Break the connection for good."""
        self._refuses = True
        for writer in self._open:
            writer.transport.abort()
        if self._server:
            self._server.close()

    def arm(self, fault: Fault | None) -> None:
        """Count the words from here on."""
        self._fault, self._words = fault, 0

    def resume(self) -> None:
        """Be whole again."""
        self._refuses = False
        self._flows.set()

    async def _carry(self, reader: StreamReader, writer: StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        broker_reader, broker = await asyncio.open_connection("127.0.0.1", self.upstream)
        self._open |= {writer, broker}
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry_out(reader, broker, writer))
                both.create_task(self._carry_in(broker_reader, writer))
        except* (OSError, EOFError):
            pass
        finally:
            self._open -= {writer, broker}
            writer.transport.abort()
            broker.close()  # what it was sent, it still hears

    async def _carry_out(
        self, reader: StreamReader, broker: StreamWriter, process: StreamWriter
    ) -> None:
        while True:
            words, said = await _read_outgoing(reader)
            await self._flows.wait()
            self._words += words
            fault = self._fault
            if not words or fault is None or self._words < fault.word:
                broker.write(said)
                await broker.drain()
                continue
            self._fault = None
            if fault.heard or fault.kind is Kind.REDELIVER:
                broker.write(said)
                await broker.drain()
            match fault.kind:
                case Kind.CRASH | Kind.CUT:
                    self._refuses = True
                    process.transport.abort()
                    self.struck(fault)
                    raise ConnectionAbortedError("cut")
                case Kind.STALL | Kind.STOP:
                    self._flows.clear()
            self.struck(fault)
            if not fault.heard and fault.kind is not Kind.REDELIVER:
                await self._flows.wait()
                broker.write(said)
                await broker.drain()

    async def _carry_in(self, broker: StreamReader, process: StreamWriter) -> None:
        while True:
            said, delivery = await _read_incoming(broker)
            await self._flows.wait()
            if delivery:
                self.delivered(delivery)
            process.write(said)
            await process.drain()


async def _read_outgoing(reader: StreamReader) -> tuple[bool, bytes]:
    """Read an operation of the process; tell whether it is a word."""
    line = await reader.readuntil(b"\r\n")
    verb, *fields = line.split()
    if verb.upper() not in {b"PUB", b"HPUB"}:
        return False, line
    return True, line + await reader.readexactly(int(fields[-1]) + 2)


async def _read_incoming(broker: StreamReader) -> tuple[bytes, Delivery | None]:
    """Read an operation of the broker, and see whether it hands out a job."""
    line = await broker.readuntil(b"\r\n")
    verb, *fields = line.split()
    if verb.upper() not in {b"MSG", b"HMSG"}:
        return line, None
    payload = await broker.readexactly(int(fields[-1]) + 2)
    lease = next((each for each in fields if each.startswith(_JOB_LEASE)), None)
    if lease is None:
        return line + payload, None
    return line + payload, Delivery(payload[int(fields[-2]) : -2], lease.decode())


@contextlib.asynccontextmanager
async def faulty_wire(upstream: int) -> AsyncIterator[FaultyWire]:
    """Hold a wire until the block ends."""
    wire = FaultyWire(upstream)
    await wire.up()
    try:
        yield wire
    finally:
        wire.down()
