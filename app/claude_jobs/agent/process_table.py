"""The processes of this machine or container, as /proc shows them, and who descends from whom.

The standard library alone: the watchdog, which every replica runs, reads it several times a second.
"""

from collections.abc import Collection, Iterator, Mapping
from os import listdir  # not pathlib: it is a third of the watchdog's start-up time
from typing import NamedTuple

# States of proc(5): T and t are stopped, Z and X dead, D does not come back to its program now.
_STOPPED = frozenset("Tt")
_DEAD = frozenset("ZXx")
_WAITS_IN_KERNEL = "D"


class Identity(NamedTuple):
    """A process beyond the reuse of its number; `started` counts clock ticks since the boot."""

    pid: int
    started: int


class Process(NamedTuple):
    """One process at the moment of reading."""

    identity: Identity
    parent: int
    session: int
    state: str

    @property
    def pid(self) -> int:
        """The number to send signals to."""
        return self.identity.pid

    @property
    def dead(self) -> bool:
        """Whether it has ended and only waits for its parent to notice."""
        return self.state in _DEAD

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped it."""
        return self.state in _STOPPED

    @property
    def waits_in_kernel(self) -> bool:
        """Whether it can take no signal now, and obeys a stop that waits for it when it can."""
        return self.state == _WAITS_IN_KERNEL


Table = Mapping[int, Process]


def read() -> Table:
    """Read every process. Those that begin or end meanwhile may be in it or not."""
    return {process.pid: process for process in _read_all()}


def at_or_below(table: Table, roots: Collection[int]) -> list[Process]:
    """Return `roots` and all that descend from them, as far as they are in the table."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found = {pid: table[pid] for pid in roots if pid in table}
    following = list(found)
    while following:
        for child in children.get(following.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                following.append(child.pid)
    return list(found.values())


def _read_all() -> Iterator[Process]:
    for name in listdir("/proc"):  # noqa: PTH208 - see the import
        if name.isdecimal() and (fields := _stat(f"/proc/{name}/stat")):
            state = fields[0]
            if state in _DEAD and int(fields[17]) > 1:
                # A first thread that ended alone looks like a zombie, and the others go on.
                state = _state_of_threads(name)
            yield Process(
                Identity(int(name), int(fields[19])), int(fields[1]), int(fields[3]), state
            )


def _state_of_threads(pid: str) -> str:
    """Return one state for all: that of a thread which runs, if one does."""
    try:
        threads = listdir(f"/proc/{pid}/task")  # noqa: PTH208 - see the import
    except OSError:
        return "X"
    states = {
        fields[0] for thread in threads if (fields := _stat(f"/proc/{pid}/task/{thread}/stat"))
    } - _DEAD
    running = states - _STOPPED
    return next(iter(running or states), "X")


def _stat(path: str) -> list[str] | None:
    """Return the fields of a stat file from the state on (proc(5): the third), or None."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - see the import
            content = file.read()
    except OSError:
        return None
    # The name before it is the program's choice and may hold anything.
    return content[content.rindex(b")") + 2 :].decode().split()
