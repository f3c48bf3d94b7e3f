"""The shared workspace: where a job may work, and which file a path means.

Agents write in it and may swap any directory for a link at any moment. What the gateway and the
supervisors do there on behalf of a client therefore goes through `locate`.
"""

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from claude_jobs.settings import WorkspaceMode

DIRECTORY_MODE = 0o2775  # what one job's group made, another's may change
JOB_DIRECTORIES = "jobs"

_MAX_DEPTH = 256  # each level holds a descriptor while a path is followed
_MAX_LINKS = 40  # as Linux has it
_HERE = "."
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class WorkspaceError(ValueError):
    """A path that a job may not work in; the sentence says why."""


def job_directory(mode: WorkspaceMode, job_id: str, asked: str) -> str:
    """Return where a job works, below the workspace: `asked`, if need be below its own."""
    match mode:
        case WorkspaceMode.SHARED:
            return asked
        case WorkspaceMode.PER_JOB:
            return str(PurePosixPath(JOB_DIRECTORIES, job_id, asked))


def resolve(root: Path, relative: str) -> Path:
    """Return the real path of `relative` below `root`, links followed.

    It need not exist. Raises `WorkspaceError` when it lies outside or can be no directory.
    """
    real_root = root.resolve()
    try:
        path = (real_root / relative).resolve()
    except (OSError, RuntimeError):  # a loop of links is a RuntimeError before Python 3.13
        raise WorkspaceError(f"{relative!r} cannot be followed") from None
    if not path.is_relative_to(real_root):
        raise WorkspaceError(f"{relative!r} leaves the workspace")
    existing = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not existing.is_dir():
        raise WorkspaceError(f"{relative!r} is no directory")
    return path


def prepare(root: Path, relative: str) -> Path:
    """Resolve a directory and make it, with its parents, so that agents may write there."""
    if PurePosixPath(relative).is_absolute():
        raise WorkspaceError(f"{relative!r} leaves the workspace")
    try:
        with locate(root, (*PurePosixPath(relative).parts, _HERE), make_parents=True) as place:
            return root.resolve() / place.path
    except NotADirectoryError:
        raise WorkspaceError(f"{relative!r} is no directory") from None


@dataclass(frozen=True)
class Place:
    """A name in a directory that is held open, so that nothing can be put in between.

    `directory` is a descriptor for `dir_fd`; `name` may not exist, and is `.` for the directory
    itself; `path` is where that is below the workspace, links followed. `made` are the parents
    that were missing, as the directory that holds each and its name.
    """

    directory: int
    name: str
    path: PurePosixPath
    made: tuple[tuple[int, str], ...] = ()

    def stat(self) -> os.stat_result:
        """Look at what has this name now; a link is not followed."""
        return os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)

    def open(self, flags: int) -> int:
        """Open what has this name now, if it is no link; a pipe does not block."""
        safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(self.name, flags | safe, dir_fd=self.directory)

    def remove_made(self) -> None:
        """Remove the parents that were made, as far as they are empty."""
        with contextlib.suppress(OSError):
            for directory, name in reversed(self.made):
                os.rmdir(name, dir_fd=directory)


@contextmanager
def locate(
    root: Path, parts: Sequence[str], *, follow_last: bool = True, make_parents: bool = False
) -> Iterator[Place]:
    """Follow a path below `root`, and hold its last directory while the block runs.

    Each part is opened relative to the one before and links are followed by hand, so that what
    is reached lies inside however fast somebody swaps links. An absolute link into the workspace
    is one that stays inside. Raises `WorkspaceError` for what leads out, and `OSError`.
    """
    walk = _Walk(root, "/".join(parts))
    try:
        yield walk.follow(parts, follow_last=follow_last, make_parents=make_parents)
    finally:
        walk.close()


class _Walk:
    def __init__(self, root: Path, asked: str) -> None:
        self._roots = (PurePosixPath(root.absolute()), PurePosixPath(root.resolve()))
        self._asked = asked
        self._links = 0
        self._names: list[str] = []  # each lies in the directory of its index, and is the next
        self._made: set[int] = set()
        self._open = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]

    def follow(self, parts: Sequence[str], *, follow_last: bool, make_parents: bool) -> Place:
        ahead = deque(parts)
        while ahead:
            part = ahead.popleft()
            if part == "..":
                self._leave()
                continue
            if part in ("", _HERE):
                continue
            try:
                found = os.open(part, _LOOK, dir_fd=self._open[-1])
            except FileNotFoundError:
                if ahead and make_parents:
                    found = _make_directory(part, self._open[-1])
                    self._made.add(len(self._names))
                elif ahead:
                    raise
                else:
                    return self._place(part)
            self._open.append(found)
            mode = os.fstat(found).st_mode
            if stat.S_ISLNK(mode) and (ahead or follow_last):
                target = os.readlink("", dir_fd=self._open[-1])
                os.close(self._open.pop())
                ahead.extendleft(reversed(self._read_link(target)))
                continue
            if not ahead:
                os.close(self._open.pop())
                return self._place(part)
            if not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._names.append(part)
            if len(self._names) > _MAX_DEPTH:
                raise WorkspaceError(f"{self._asked!r} lies deeper than {_MAX_DEPTH} directories")
        return self._place(_HERE)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def _place(self, name: str) -> Place:
        made = tuple((self._open[depth], self._names[depth]) for depth in sorted(self._made))
        needed = {self._open[-1], *(directory for directory, _ in made)}
        for directory in self._open:
            if directory not in needed:
                os.close(directory)
        self._open = [directory for directory in self._open if directory in needed]
        return Place(self._open[-1], name, PurePosixPath(*self._names, name), made)

    def _leave(self) -> None:
        if not self._names:
            raise WorkspaceError(f"{self._asked!r} leaves the workspace")
        self._names.pop()
        self._made.discard(len(self._names))
        os.close(self._open.pop())

    def _read_link(self, target: str) -> list[str]:
        self._links += 1
        if self._links > _MAX_LINKS:
            raise WorkspaceError(f"{self._asked!r} cannot be followed")
        if not target.startswith("/"):
            return target.split("/")
        for root in self._roots:
            if PurePosixPath(target).is_relative_to(root):
                while self._names:
                    self._leave()
                return list(PurePosixPath(target).relative_to(root).parts)
        raise WorkspaceError(f"{self._asked!r} leaves the workspace")


def _make_directory(name: str, parent: int) -> int:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:  # another was faster
        return os.open(name, _LOOK, dir_fd=parent)
    made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fchmod(made, DIRECTORY_MODE)
    except OSError:
        os.close(made)
        raise
    return made
