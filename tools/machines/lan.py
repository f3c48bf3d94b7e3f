"""The LAN of machines that run as processes: a bridge in a network namespace of their own.

The namespace belongs to a user namespace, so no right of the host is needed or touched.
"""

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import recorded
from errors import MachineError

BRIDGE = "lan"
HOLDER = ["sleep", "infinity"]


class Lan:
    """The LAN of a state directory; it is there while a process holds the namespace."""

    def __init__(self, state: Path) -> None:
        self._pid_file = state / "lan-holder"

    def open(self) -> None:
        """Make the bridge, unless it is there."""
        if self._holder() is not None:
            return
        holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--net", *HOLDER],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._pid_file.write_text(f"{holder.pid}\n")
        deadline = time.monotonic() + 10
        while self._holder() is None:
            if holder.poll() is not None or time.monotonic() > deadline:
                raise MachineError(
                    "This host gives no network namespace to machines (unshare --user --net): "
                    "allow it, or have them emulated (MACHINES_HYPERVISOR=tcg)."
                )
            time.sleep(0.05)
        self._ip("link", "add", BRIDGE, "type", "bridge")
        self._ip("link", "set", BRIDGE, "up")

    def close(self) -> None:
        """Take the LAN away."""
        holder = self._holder()
        if holder is not None:
            os.kill(holder, signal.SIGKILL)

    def card(self, machine: str) -> str:
        """Return the end of a cable into the bridge that a machine takes for its card."""
        port = _port(machine)
        card = f"card-{port}"
        if self._run("ip", "link", "show", port).returncode != 0:
            self._ip("link", "add", port, "type", "veth", "peer", "name", card)
            for end, settings in ((port, ("master", BRIDGE)), (card, ())):
                self._ip("link", "set", end, *settings, "up")
        return card

    def plug(self, machine: str, *, plugged: bool) -> None:
        """Put a machine's cable in or out."""
        self._ip("link", "set", _port(machine), "up" if plugged else "down")

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs another one inside the namespace."""
        target = f"--target={self._holder()}"
        return ["nsenter", target, "--user", "--net", "--preserve-credentials", "--", *command]

    def _holder(self) -> int | None:
        """Return the process that holds the namespace, once it does."""
        # Before, it is unshare itself.
        return recorded.process(self._pid_file, lambda words: words == HOLDER)

    def _ip(self, *arguments: str) -> None:
        done = self._run("ip", *arguments)
        if done.returncode != 0:
            raise MachineError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.inside(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def _port(machine: str) -> str:
    """Return the name of a machine's port of the bridge; such a name has 15 characters at most."""
    return hashlib.sha256(machine.encode()).hexdigest()[:8]
