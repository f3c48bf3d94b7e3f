"""The process of Claude Code, as a transport of the Agent SDK.

The SDK speaks the control protocol over it. Every line that the CLI prints is also handed on as
it came: the SDK's message classes know only the fields of their own version.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from claude_agent_sdk import CLIConnectionError, Transport

log = logging.getLogger(__name__)

# A line longer than this (bytes) is a fault of the CLI; tool results can be several MB.
MAX_LINE_BYTES = 64 * 2**20
_CHUNK_BYTES = 65_536
_STDERR_KEPT = 4_000
_FRAMES_AHEAD = 256

Frame = dict[str, Any]


class AgentProcess(Transport):
    """Starts the CLI and carries its lines, to the SDK and to whoever iterates `frames()`."""

    def __init__(
        self,
        arguments: list[str],
        *,
        env: dict[str, str],
        pass_fds: tuple[int, ...] = (),
        on_started: Callable[[int], None] | None = None,
    ) -> None:
        self._arguments = arguments
        self._env = env
        self._pass_fds = pass_fds
        self._on_started = on_started
        self._process: asyncio.subprocess.Process | None = None
        self._stderr = bytearray()
        self._stderr_reader: asyncio.Task[None] | None = None
        self._printed: asyncio.Queue[Frame | None] = asyncio.Queue()
        # An agent that prints faster than its events can be stored is slowed down.
        self._room = asyncio.Semaphore(_FRAMES_AHEAD)
        self._dismissed = False
        self._read = asyncio.Event()

    @property
    def stderr(self) -> str:
        """The end of what the CLI wrote to standard error."""
        return self._stderr.decode(errors="replace").strip()

    @property
    def pid(self) -> int | None:
        """The process id once it was started."""
        return self._process.pid if self._process else None

    async def connect(self) -> None:
        """Start the CLI in a session of its own, with files that the whole group may write."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._env,
                pass_fds=self._pass_fds,
                start_new_session=True,
                umask=0o002,
            )
        except OSError as error:
            raise CLIConnectionError(f"cannot start Claude Code: {error.strerror}") from error
        self._stderr_reader = asyncio.create_task(self._keep_stderr())
        if self._on_started:
            self._on_started(self._process.pid)

    async def write(self, data: str) -> None:
        """Write to standard input; raises `CLIConnectionError` when the CLI has gone."""
        stdin = self._process.stdin if self._process else None
        if stdin is None or stdin.is_closing():
            raise CLIConnectionError("Claude Code takes no more input")
        try:
            stdin.write(data.encode())
            await stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise CLIConnectionError("Claude Code closed its input") from error

    async def end_input(self) -> None:
        """Close standard input: no further turn will come."""
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def is_ready(self) -> bool:
        """Tell whether the CLI runs."""
        return self._process is not None and self._process.returncode is None

    async def read_messages(self) -> AsyncIterator[Frame]:
        """Yield each line's object to the SDK, after it was put before the reader of `frames`."""
        try:
            async for line in self._lines():
                frame = _parse(line)
                if frame is None:
                    continue
                if not self._dismissed:
                    await self._room.acquire()
                    self._printed.put_nowait(frame)
                yield frame
        finally:
            self._read.set()
            self.end_frames()

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield what was printed, in order, until standard output ended."""
        while (frame := await self._printed.get()) is not None:
            self._room.release()
            yield frame

    def end_frames(self) -> None:
        """Let `frames` end after what it already holds."""
        self._printed.put_nowait(None)

    async def was_read(self) -> None:
        """Wait until the SDK has taken everything that was printed."""
        await self._read.wait()

    def dismiss_frames(self) -> None:
        """Say that nobody takes `frames` any more: what is still printed is for the SDK alone."""
        self._dismissed = True
        self._room.release()

    async def close(self) -> None:
        """Close the streams. The processes are ended by their owner, who knows the whole tree."""
        await self.end_input()
        if self._stderr_reader:
            self._stderr_reader.cancel()

    async def wait(self) -> int:
        """Wait for the CLI's exit and return its code (negative: the signal)."""
        if self._process is None:
            raise CLIConnectionError("Claude Code was not started")
        return await self._process.wait()

    async def _lines(self) -> AsyncIterator[bytes]:
        stdout = self._process.stdout if self._process else None
        if stdout is None:
            raise CLIConnectionError("Claude Code was not started")
        pending = bytearray()
        while chunk := await stdout.read(_CHUNK_BYTES):
            pending += chunk
            if b"\n" not in chunk:
                if len(pending) > MAX_LINE_BYTES:
                    raise CLIConnectionError(f"a line of over {MAX_LINE_BYTES} bytes was printed")
                continue
            *lines, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            for line in lines:
                yield line
        if pending:
            yield bytes(pending)

    async def _keep_stderr(self) -> None:
        stderr = self._process.stderr if self._process else None
        while stderr and (chunk := await stderr.read(_CHUNK_BYTES)):
            self._stderr += chunk
            del self._stderr[:-_STDERR_KEPT]


def _parse(line: bytes) -> Frame | None:
    """Return a line's object; what is none (some builds print notes) is passed over."""
    try:
        frame = json.loads(line)
    except ValueError:
        if line.strip():
            log.warning("a line of Claude Code is no JSON", extra={"bytes": len(line)})
        return None
    if b"\\ud" in line.lower():
        # Half of a surrogate pair, cut off somewhere, has no form in UTF-8.
        frame = json.loads(json.dumps(frame, ensure_ascii=False).encode(errors="replace"))
    return frame if isinstance(frame, dict) else None
