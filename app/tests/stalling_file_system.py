"""An empty directory on a file system whose server can go away: a FUSE server of its own process.

Stopped it leaves everybody who asks it waiting in the kernel, as an NFS server does that is away;
continued (SIGCONT) it answers them all. It caches nothing. It stops itself between two requests:
who waits for the answer to one that the server has read cannot even be killed, unlike with NFS.
"""

import ctypes
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_DEVICE = "/dev/fuse"
_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2
_BUFFER = 2**21
# <linux/fuse.h>
_LOOKUP, _GETATTR, _OPEN_LIKE, _NO_ANSWER = 1, 3, {14, 27}, {2, 36, 42}
_STATFS, _INIT, _READDIR, _DONE = 17, 26, 28, {18, 25, 29, 34, 38}
_ENOENT, _ENOSYS = 2, 38
_ATTRIBUTES = struct.pack(
    "<QII 6Q 10I", 0, 0, 0, *(1, 0, 0, 0, 0, 0), *(0, 0, 0, 0o40777, 2, 0, 0, 0, 4096, 0)
)
_HANDLE = struct.pack("<QII", 0, 0, 0)
_STATISTICS = struct.pack("<5Q 4I 24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)


@dataclass(frozen=True)
class StallingDirectory:
    """The mounted directory, and a hand on its server."""

    path: Path
    _server: subprocess.Popen[bytes]

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Let nobody be answered while the block runs."""
        assert self._server.stdin is not None
        self._server.stdin.write(b"stop\n")
        self._server.stdin.flush()
        os.waitid(os.P_PID, self._server.pid, os.WSTOPPED)
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def go_on_in(self, seconds: float) -> None:
        """Have somebody else end the stall, should this process be held by it."""
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {self._server.pid}"])


@contextmanager
def stalling_directory(path: Path) -> Iterator[StallingDirectory]:
    """Mount it; skips the test where this user may not."""
    if os.geteuid() != 0 or not os.access(_DEVICE, os.W_OK):
        pytest.skip("only root mounts a file system, and only where there is /dev/fuse")
    command = [sys.executable, __file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        if not server.stdout.readline():
            pytest.skip("this machine does not let us mount a file system")
        try:
            yield StallingDirectory(path, server)
        finally:
            server.kill()  # who still waits gets an error
            ctypes.CDLL(None).umount2(os.fsencode(path), _MNT_DETACH)


def _serve(path: str) -> None:
    device = os.open(_DEVICE, os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MS_NOSUID | _MS_NODEV
    if libc.mount(b"stalling", os.fsencode(path), b"fuse", flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount")
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([sys.stdin, device], [], [])
        if sys.stdin in ready:
            os.read(sys.stdin.fileno(), _BUFFER)
            os.kill(os.getpid(), signal.SIGSTOP)
            continue
        request = os.read(device, _BUFFER)
        _, kind, unique = struct.unpack_from("<IIQ", request)
        if kind not in _NO_ANSWER:
            error, body = _answer(kind, request[40:])
            os.write(device, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)


def _answer(kind: int, body: bytes) -> tuple[int, bytes]:
    if kind == _INIT:
        (_, _, read_ahead) = struct.unpack_from("<III", body)
        return 0, struct.pack("<4I HH II 36x", 7, 31, read_ahead, 0, 12, 9, 4096, 1)
    if kind == _LOOKUP:
        return _ENOENT, b""
    if kind == _GETATTR:
        return 0, _ATTRIBUTES
    if kind in _OPEN_LIKE:
        return 0, _HANDLE
    if kind == _STATFS:
        return 0, _STATISTICS
    if kind == _READDIR or kind in _DONE:
        return 0, b""
    return _ENOSYS, b""


if __name__ == "__main__":
    _serve(sys.argv[1])
