"""Switches the virtual machines below a cluster off and on."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "machines"


class Machines:
    """The machines that `tools/machines` keeps in one directory."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def power_off(self, name: str) -> None:
        """Pull the plug: nothing on the machine has a chance to say goodbye."""
        self._do("power-off", name)

    def power_on(self, name: str) -> None:
        """Start the machine again, with the disk as it was."""
        self._do("power-on", name)

    def reinstall(self, *names: str) -> None:
        """Put a fresh disk into machines and start them."""
        self._do("reinstall", *names)

    def _do(self, command: str, *names: str) -> None:
        subprocess.run(
            [sys.executable, str(TOOL), command, "--state", str(self._state), *names], check=True
        )
