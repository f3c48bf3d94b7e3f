"""A machine whose kernel is a process of this host (User Mode Linux), for where KVM does not run.

Its CPU, one, is the host's own; QEMU's emulated one is some twenty times slower. The way out and
the host's ports that lead in are slirp4netns', which is what QEMU has built in. It can be switched
off and on, but not rebooted from within: slirp4netns takes one connection.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import recorded
import share
import user_mode_kernel
from description import Description
from errors import MachineError
from image import Image
from lan import Lan

# How the machine names the host's loopback.
HOST = "10.0.2.2"
# How the way out names the machine.
MACHINE = "10.0.2.15"
# The kernel's own name for the machine, and the directory where it puts its control socket.
KERNEL = "kernel"
# How long slirp4netns may take to begin or to answer, in seconds.
PATIENCE = 10.0


class UserMode:
    """The processes of a machine, and what they keep in the machine's directory."""

    def __init__(self, directory: Path, description: Description) -> None:
        self._directory = directory
        self._description = description
        self._disk = directory / "disk.cow"
        self._pid_file = directory / "pid"
        self._lan = Lan(directory.parent)

    @property
    def share_url(self) -> str:
        """Where the machine finds the files of the shared directory."""
        return f"http://{HOST}:{self._description.share_port}"

    def make_disk(self) -> None:
        """Make room for a disk on which only the image is; the kernel makes it, as a difference."""
        self._disk.unlink(missing_ok=True)

    def pid(self) -> int | None:
        """Return the id of the kernel's process, or None when the machine does not run."""
        told = set(self._description.kernel_line)
        return recorded.process(self._pid_file, told.issubset)

    def start(self) -> None:
        """Start in the background; the machine then boots."""
        self._lan.open()
        card = self._lan.card(self._description.name)
        for left in ("access", "access-control"):
            (self._directory / left).unlink(missing_ok=True)
        # What an earlier kernel that was killed has left would be taken for a running one's.
        shutil.rmtree(self._directory / KERNEL, ignore_errors=True)
        # Whoever waits for the pipe's end sees it when the kernel's process has ended.
        alive, held = os.pipe()
        try:
            self._background(
                "slirp4netns",
                *("--target-type=bess", "--api-socket=access-control", f"--exit-fd={alive}"),
                "access",
                log="access.log",
                pass_fds=(alive,),
            )
            if self._description.share:
                self._background(
                    *(sys.executable, share.__file__, self._description.share),
                    *(str(self._description.share_port), str(alive)),
                    log="share.log",
                    pass_fds=(alive,),
                )
            _wait_for(self._directory / "access")
            kernel = self._background(
                *self._lan.inside(*self._command(card)), log="console.log", pass_fds=(held,)
            )
        finally:
            os.close(alive)
            os.close(held)
        self._pid_file.write_text(f"{kernel}\n")

    def kill(self, pid: int) -> None:
        """Pull the plug."""
        os.killpg(pid, signal.SIGKILL)
        # While nobody has come to it yet, slirp4netns does not see that nobody will.
        with (
            contextlib.suppress(OSError),
            _beside(self._directory / "access") as path,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        ):
            connection.connect(path)

    def set_lan(self, *, plugged: bool) -> None:
        """Put the cable of the LAN in or out; SSH goes another way."""
        self._lan.plug(self._description.name, plugged=plugged)

    def is_reachable(self) -> bool:
        """Say whether the ports of the host lead to the machine; made so once it has a network."""
        control = self._directory / "access-control"
        if not control.exists():
            return False
        known = {each["host_port"] for each in _ask(control, "list_hostfwd")["entries"]}
        for on_host, on_machine in self._description.forwards.items():
            if on_host not in known:
                _ask(
                    control,
                    "add_hostfwd",
                    proto="tcp",
                    host_addr="127.0.0.1",
                    host_port=on_host,
                    guest_addr=MACHINE,
                    guest_port=on_machine,
                )
        return True

    def _command(self, card: str) -> list[str]:
        description = self._description
        kernel = user_mode_kernel.ready()
        access_mac, lan_mac = description.hardware_addresses
        return [
            *("taskset", "--cpu-list", str(_cpu(description))),
            str(kernel.program),
            *(f"umid={KERNEL}", "uml_dir=.", "seccomp=on"),
            f"mem={description.memory_mb}M",
            *(f"ubd0={self._disk.name},{Image(Path(description.image)).disk}", "root=/dev/ubda"),
            f"vec0:transport=bess,dst=access,mac={access_mac}",
            f"vec1:transport=raw,ifname={card},mac={lan_mac}",
            *("con=null", "con0=null,fd:1", "ssl=null"),
            # All of the host that the machine can mount.
            f"hostfs={kernel.modules}",
            *description.kernel_line,
        ]

    def _background(self, *command: str, log: str, pass_fds: tuple[int, ...]) -> int:
        with (self._directory / log).open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        return process.pid


def _cpu(description: Description) -> int:
    """Return the CPU of the host that a machine has, the next one for the next address.

    Every system call goes from the machine's process to its kernel's and back. To wake another CPU
    each time costs ten times as much.
    """
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[int(description.address.rpartition(".")[2]) % len(cpus)]


def _ask(control: Path, command: str, **arguments: object) -> dict[str, Any]:
    """Ask slirp4netns one thing and return its answer."""
    try:
        with _beside(control) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(path)
            connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
            connection.shutdown(socket.SHUT_WR)
            answer: dict[str, Any] = json.loads(connection.makefile("rb").read())
    except (OSError, ValueError) as error:
        raise MachineError(f"{control} does not answer: {error}.") from error
    if "error" in answer:
        raise MachineError(f"The way into the machine is refused: {answer['error']['desc']}.")
    # A list comes as it is, all else as a "return".
    return dict(answer.get("return", answer))


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[str]:
    """Have a short name for a socket: its path holds 107 bytes, and a directory may lie deeper."""
    directory = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _wait_for(path: Path) -> None:
    give_up = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > give_up:
            said = path.with_suffix(".log").read_text(errors="replace")
            raise MachineError(f"slirp4netns did not start: {said.strip()}")
        time.sleep(0.05)
