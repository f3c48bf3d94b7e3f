"""Processes of earlier calls, found again by the id that was written down."""

import time
from collections.abc import Callable
from pathlib import Path

# Seconds for which a process that is just becoming another program (exec) has no command line.
BECOMING = 1.0


def process(pid_file: Path, is_ours: Callable[[list[str]], bool]) -> int | None:
    """Return the id in a file while a process with it runs, and its command line is ours.

    The number may have passed to another process meanwhile.
    """
    give_up = time.monotonic() + BECOMING
    while True:
        try:
            pid = int(pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        if command or time.monotonic() > give_up:
            break
        time.sleep(0.01)
    return pid if is_ours(command.decode(errors="replace").split("\0")[:-1]) else None
