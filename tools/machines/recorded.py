"""Processes of earlier calls, found again by the id that was written down."""

from collections.abc import Callable
from pathlib import Path


def process(pid_file: Path, is_ours: Callable[[list[str]], bool]) -> int | None:
    """Return the id in a file while a process with it runs, and its command line is ours.

    The number may have passed to another process meanwhile.
    """
    try:
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if is_ours(command.decode(errors="replace").split("\0")[:-1]) else None
