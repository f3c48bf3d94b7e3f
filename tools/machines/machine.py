"""One machine: a directory with its description, disk and console log, and what runs it."""

import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import cache
from description import Description
from image import Image
from qemu import Qemu
from user_mode import UserMode

USER = "admin"
# One that an emulated CPU encrypts quickly with.
CIPHER = "aes128-gcm@openssh.com"
STOP_SECONDS = 90


class Hypervisor(Protocol):
    """What runs a machine."""

    @property
    def share_url(self) -> str:
        """Where the machine finds the files of the shared directory."""

    def make_disk(self) -> None:
        """Make a disk on which only the image is."""

    def pid(self) -> int | None:
        """Return the id of the process, or None when the machine does not run."""

    def start(self) -> None:
        """Start in the background; the machine then boots."""

    def kill(self, pid: int) -> None:
        """Pull the plug."""

    def set_lan(self, *, plugged: bool) -> None:
        """Put the cable of the LAN in or out; SSH goes another way."""

    def is_reachable(self) -> bool:
        """Say whether the ports of the host lead to the machine."""


class Machine:
    """A machine in its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.console = directory / "console.log"

    @classmethod
    def create(cls, directory: Path, description: Description) -> "Machine":
        """Make the machine; its description comes last, so that a half is none."""
        machine = cls(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _hypervisor(directory, description).make_disk()
        (directory / "machine.json").write_text(json.dumps(asdict(description), indent=2) + "\n")
        return machine

    def reinstall(self) -> None:
        """Pull the plug and put in a disk on which only the image is."""
        self.power_off()
        self.hypervisor.make_disk()

    @property
    def name(self) -> str:
        """The name, which the directory has too."""
        return self.directory.name

    @property
    def exists(self) -> bool:
        """Whether the machine was made to the end."""
        return (self.directory / "machine.json").exists()

    @property
    def description(self) -> Description:
        """What the machine was made with."""
        stored: dict[str, Any] = json.loads((self.directory / "machine.json").read_text())
        return Description(**stored)

    @property
    def hypervisor(self) -> Hypervisor:
        """What runs it."""
        return _hypervisor(self.directory, self.description)

    def pid(self) -> int | None:
        """Return the id of the machine's process, or None when it does not run."""
        return self.hypervisor.pid() if self.exists else None

    def power_on(self) -> None:
        """Start in the background; the machine then boots."""
        if self.pid() is None:
            self.hypervisor.start()

    def power_off(self) -> None:
        """Pull the plug."""
        pid = self.pid()
        if pid is None:
            return
        self.hypervisor.kill(pid)
        _wait(lambda: self.pid() is None, 10)

    def stop(self) -> None:
        """Shut the system down; one that does not follow loses its power."""
        if self.pid() is None:
            return
        self._ssh("sudo", "systemctl", "poweroff")
        _wait(lambda: self.pid() is None, STOP_SECONDS)
        self.power_off()

    def set_lan(self, *, plugged: bool) -> None:
        """Put the cable of the LAN in or out; SSH goes another way."""
        self.hypervisor.set_lan(plugged=plugged)

    def answers(self) -> bool:
        """Say whether one can log in."""
        if not self.hypervisor.is_reachable():
            return False
        # The host accepts connections before the machine does: only a greeting counts.
        try:
            port = self.description.ssh_port
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                if not connection.recv(4).startswith(b"SSH-"):
                    return False
        except OSError:
            return False
        return self._ssh("true")

    def _ssh(self, *command: str) -> bool:
        target = ("-p", str(self.description.ssh_port), f"{USER}@127.0.0.1")
        done = subprocess.run(
            ["ssh", *self.ssh_options(), *target, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def ssh_options(self) -> list[str]:
        """Return what an SSH client needs to get in."""
        known = Image(Path(self.description.image)).known_hosts
        return [
            *("-i", str(cache.ssh_key())),
            *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"),
            *("-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=none"),
            *("-o", f"Ciphers={CIPHER}"),
        ]

    def console_end(self) -> str:
        """Return the last lines of the console."""
        if not self.console.exists():
            return ""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-20:])


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def _hypervisor(directory: Path, description: Description) -> Hypervisor:
    if description.hypervisor == "user-mode":
        return UserMode(directory, description)
    return Qemu(directory, description)
