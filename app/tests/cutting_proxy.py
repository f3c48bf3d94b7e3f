"""A wire that a test can cut: a TCP proxy in front of a gateway."""

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from claude_jobs.development import free_port


@dataclass
class CuttingProxy:
    """Forwards to `upstream` (a port of this machine) while it is `up`.

    `limits` are taken by the next connections, one each: so many bytes of the answer, then the
    cut. `connections` counts them all.
    """

    upstream: int
    port: int = field(default_factory=free_port)
    limits: list[int] = field(default_factory=list)
    connections: int = 0
    _server: asyncio.Server | None = None
    _open: set[StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)

    def cut(self) -> None:
        """Break every connection, in the middle of whatever it carries."""
        for writer in self._open:
            writer.transport.abort()

    def down(self) -> None:
        """Break every connection and take no new one."""
        if self._server:
            self._server.close()
        self.cut()

    async def _forward(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.connections += 1
        limit = self.limits.pop(0) if self.limits else None
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, upstream}
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, upstream, None))
                both.create_task(_pump(upstream_reader, writer, limit))
        except* OSError:
            pass
        finally:
            self._open -= {writer, upstream}
            writer.transport.abort()
            upstream.transport.abort()


async def _pump(reader: StreamReader, writer: StreamWriter, limit: int | None) -> None:
    passed = 0
    while data := await reader.read(65_536):
        if limit is not None and passed + len(data) >= limit:
            writer.write(data[: limit - passed])
            with contextlib.suppress(OSError):
                await writer.drain()
            raise ConnectionAbortedError("cut")
        passed += len(data)
        writer.write(data)
        await writer.drain()
    raise ConnectionAbortedError("one side is done")


@asynccontextmanager
async def cutting_proxy(upstream: int) -> AsyncIterator[CuttingProxy]:
    """Run a proxy until the block ends."""
    proxy = CuttingProxy(upstream)
    await proxy.up()
    try:
        yield proxy
    finally:
        proxy.down()
