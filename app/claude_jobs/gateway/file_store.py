"""The files of the workspace on disk. Everything here blocks: call it in a thread.

Agents write in the same directories at the same time and are not trusted. What is raised:
`WorkspaceError` for a path that leads out, `StoreError` for what this module refuses itself, and
the `OSError` of the file system.
"""

import contextlib
import errno
import fcntl
import heapq
import io
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes

from claude_jobs.contract.file import FileEntry, FileListing, FileType
from claude_jobs.gateway.conditions import Conditions, Version
from claude_jobs.workspace import Place, WorkspaceError, locate

log = logging.getLogger(__name__)

# What begins with this is an upload on its way: it is in no listing and no path may name it.
UPLOAD_PREFIX = ".claude-jobs-upload-"
# An upload that nothing was written to for so long (seconds) is one that a crash left.
ABANDONED_AFTER = 6 * 3600

_FILE_MODE = 0o664  # agents, who are in the group, may change it
_LOCK_PATIENCE = 5.0  # seconds
_LOCK_POLL = 0.02
_SWEEP_DEPTH = 64
# Locks are not for every file: one that the gateway cannot write has none on NFS.
_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class StoreError(Exception):
    """What cannot be done with a file; the sentence goes on after its path."""


class ConditionError(StoreError):
    """A condition of the request does not hold."""


class IrregularError(StoreError):
    """A pipe, a socket or a device: nothing that can be read as a file."""


class InTheWayError(StoreError):
    """Something else is there, or somebody else is at work there."""


@dataclass(frozen=True)
class OpenFile:
    """A regular file, open for reading, and its state at that moment."""

    file: io.FileIO
    state: os.stat_result


def open_file(root: Path, parts: Sequence[str]) -> OpenFile:
    """Open a regular file. Raises `IsADirectoryError` for a directory."""
    with locate(root, parts) as place:
        _require_regular(place.stat())
        descriptor = place.open(os.O_RDONLY)
    file = io.FileIO(descriptor)
    state = os.fstat(descriptor)
    try:
        _require_regular(state)  # it was swapped
    except BaseException:
        file.close()
        raise
    return OpenFile(file, state)


def list_directory(
    root: Path, parts: Sequence[str], *, limit: int, after: str | None
) -> FileListing:
    """Return a page of a directory: the entries after the name `after`.

    Only what is shown is looked at, so that a page of a very large directory costs a scan of
    its names.
    """
    with locate(root, (*parts, ".")) as place:
        descriptor = place.open(os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = _names(descriptor)
            page = heapq.nsmallest(
                limit + 1, names if after is None else (name for name in names if name > after)
            )
            entries = [_entry(name, descriptor) for name in page[:limit]]
        finally:
            os.close(descriptor)
    return FileListing(
        path=_readable("/".join(parts) or "."),
        entries=[entry for entry in entries if entry is not None],
        next_cursor=os.fsencode(page[limit - 1]).hex() if len(page) > limit else None,
    )


class Upload:
    """A file on its way: in a hidden file beside its place until `commit` puts it there whole.

    Steps must not overlap. `discard` must follow in any case, also when `begin` failed.
    """

    def __init__(self, root: Path, parts: Sequence[str], conditions: Conditions) -> None:
        self._root = root
        self._parts = parts
        self._conditions = conditions
        self._held = ExitStack()
        self._committed = False

    def begin(self) -> None:
        """Make missing parents and the hidden file.

        Conditions are checked now, to spare the client the way, and again when it is put in
        its place.
        """
        with _parents_required():
            self._place = self._held.enter_context(
                locate(self._root, self._parts, make_parents=True)
            )
        self._held.callback(self._remove_made)
        _check(self._conditions, _replaceable(self._place))
        self._hidden = f"{UPLOAD_PREFIX}{secrets.token_hex(16)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _parents_required():
            # For the gateway alone until it is whole.
            descriptor = os.open(self._hidden, flags, 0o600, dir_fd=self._place.directory)
        self._file = self._held.enter_context(io.FileIO(descriptor, "w"))
        self._held.callback(self._remove_hidden)

    def write(self, data: bytes | bytearray) -> None:
        """Add bytes."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def commit(self) -> tuple[bool, FileEntry]:
        """Put the file in its place; returns whether it is new there, and what it is."""
        descriptor, directory, name = self._file.fileno(), self._place.directory, self._place.name
        os.fsync(descriptor)
        with _locked(self._place) as existing:
            _check(self._conditions, existing)
            kept = existing.st_mode & 0o111 if existing else 0  # a script stays one
            os.fchmod(descriptor, _FILE_MODE | kept)
            if existing is None and self._conditions.if_none_match is not None:
                try:  # unlike a rename this fails when another gateway was faster
                    os.link(
                        self._hidden,
                        name,
                        src_dir_fd=directory,
                        dst_dir_fd=directory,
                        follow_symlinks=False,  # an agent may have swapped it
                    )
                except FileExistsError:
                    raise ConditionError from None
            else:
                with _parents_required():
                    os.rename(self._hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
        self._committed = True
        _sync_directory(directory)
        return existing is None, _describe(name, os.fstat(descriptor))

    def discard(self) -> None:
        """Remove what was not put in its place, and let go of the directory."""
        try:
            self._held.close()
        except OSError:
            log.exception("an upload could not be cleared away: the next sweep will")

    def _remove_hidden(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._hidden, dir_fd=self._place.directory)

    def _remove_made(self) -> None:
        if not self._committed:
            self._place.remove_made()


def delete(root: Path, parts: Sequence[str], conditions: Conditions, *, recursive: bool) -> None:
    """Delete a file, a link (never what it leads to) or a directory.

    A directory must be empty unless `recursive`. What could not be deleted stays, with what is
    around it.
    """
    with locate(root, parts, follow_last=False) as place:
        state = place.stat()
        if stat.S_ISREG(state.st_mode):
            with _locked(place) as existing:
                _check(conditions, existing)
                os.unlink(place.name, dir_fd=place.directory)
            return
        _check(conditions, state)
        if not stat.S_ISDIR(state.st_mode):
            os.unlink(place.name, dir_fd=place.directory)
        elif recursive:
            _delete_tree(place)
        else:
            _remove_abandoned(place.directory, place.name)
            os.rmdir(place.name, dir_fd=place.directory)


def sweep(root: Path) -> int:
    """Remove the uploads that crashes left anywhere in the workspace; returns how many."""
    removed = 0
    ahead: list[tuple[str, ...]] = [()]
    while ahead:
        parts = ahead.pop()
        # What agents remove or close meanwhile is passed over.
        with contextlib.suppress(OSError, WorkspaceError), locate(root, (*parts, ".")) as place:
            removed += _remove_abandoned(place.directory, ".")
            if len(parts) < _SWEEP_DEPTH:
                ahead += [(*parts, name) for name in _directories(place)]
    return removed


def _require_regular(state: os.stat_result) -> None:
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISLNK(state.st_mode):
        raise InTheWayError("was changed at this moment: try again")
    if not stat.S_ISREG(state.st_mode):
        raise IrregularError("is no regular file")


@contextmanager
def _parents_required() -> Iterator[None]:
    try:
        yield
    except NotADirectoryError:
        raise InTheWayError("lies below a file") from None
    except FileNotFoundError:
        raise InTheWayError("lost its directory meanwhile: try again") from None


def _replaceable(place: Place) -> os.stat_result | None:
    """Return the state of what an upload would replace; None when nothing is there."""
    try:
        state = place.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise InTheWayError("is no regular file: delete it first")
    _require_regular(state)
    return state


def _check(conditions: Conditions, state: os.stat_result | None) -> None:
    if not conditions.hold_for_writing(Version.of(state) if state else None):
        raise ConditionError


@contextmanager
def _locked(place: Place) -> Iterator[os.stat_result | None]:
    """Hold a file against every other gateway's change while the block runs.

    The lock is on the file itself, also across nodes; whoever waited for it finds another file
    under the name, and looks again. Agents know nothing of it. Yields None when there is no file.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        state = _replaceable(place)
        if state is None:
            yield None
            return
        try:
            descriptor = _open_to_lock(place)
        except FileNotFoundError:
            continue
        try:
            if descriptor is not None and not _lock(descriptor, deadline):
                raise InTheWayError("is locked by another request or an agent: try again")
            now = _replaceable(place)
            if now is not None and (now.st_dev, now.st_ino) == (state.st_dev, state.st_ino):
                yield now
                return
        finally:
            if descriptor is not None:
                os.close(descriptor)
        if time.monotonic() > deadline:
            raise InTheWayError("is changed over and over: try again")


def _open_to_lock(place: Place) -> int | None:
    for flags in (os.O_RDWR, os.O_RDONLY):  # NFS locks only what can be written
        try:
            return place.open(flags)
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
    return None


def _lock(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return True
        else:
            return True


def _delete_tree(top: Place) -> None:
    """Delete a directory and all below it, links never followed.

    One descriptor is open at a time, for agents nest as deep as they like. The way back up is
    `..`, which must be the directory that one came from.
    """
    current = _open_directory(top.name, top.directory)
    # For each level its directories that are left, and what the level is.
    levels = [(_delete_files(current), _identity(current))]
    try:
        while True:
            left, _ = levels[-1]
            if left:
                try:
                    below = _open_directory(left[-1], current)
                except FileNotFoundError:  # another deletes here too
                    left.pop()
                    continue
                current = _replaced(current, below)
                levels.append((_delete_files(current), _identity(current)))
                continue
            levels.pop()
            if not levels:
                os.rmdir(top.name, dir_fd=top.directory)
                return
            current = _replaced(current, _open_directory("..", current))
            left, parent = levels[-1]
            if _identity(current) != parent:
                raise InTheWayError("was moved while it was deleted: try again")
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(left.pop(), dir_fd=current)
    finally:
        os.close(current)


def _delete_files(directory: int) -> list[str]:
    """Delete all but directories; returns the names of these."""
    with os.scandir(directory) as scanned:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in scanned]
    for name, is_directory in entries:
        if not is_directory:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
    return [name for name, is_directory in entries if is_directory]


def _open_directory(name: str, parent: int) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=parent)


def _replaced(old: int, new: int) -> int:
    os.close(old)
    return new


def _identity(descriptor: int) -> tuple[int, int]:
    state = os.fstat(descriptor)
    return state.st_dev, state.st_ino


def _remove_abandoned(parent: int, name: str) -> int:
    removed = 0
    directory = _open_directory(name, parent)
    try:
        with os.scandir(directory) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(UPLOAD_PREFIX)]
        for hidden in found:
            with contextlib.suppress(FileNotFoundError):
                state = os.stat(hidden, dir_fd=directory, follow_symlinks=False)
                if time.time() - state.st_mtime > ABANDONED_AFTER:
                    os.unlink(hidden, dir_fd=directory)
                    removed += 1
    finally:
        os.close(directory)
    return removed


def _directories(place: Place) -> list[str]:
    directory = _open_directory(".", place.directory)
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    finally:
        os.close(directory)


def _names(directory: int) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith(UPLOAD_PREFIX):
                yield entry.name


def _entry(name: str, directory: int) -> FileEntry | None:
    try:
        return _describe(name, os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:  # it is gone meanwhile
        return None


def _describe(name: str, state: os.stat_result) -> FileEntry:
    version = Version.of(state)
    readable = _readable(name)
    regular = stat.S_ISREG(state.st_mode)
    return FileEntry(
        name=readable,
        encoded_name=quote_from_bytes(os.fsencode(name), safe="") if readable != name else None,
        type=_type(state.st_mode),
        size=state.st_size if regular else None,
        modified_at=version.modified_at,
        etag=version.etag if regular else None,
    )


def _type(mode: int) -> FileType:
    if stat.S_ISREG(mode):
        return FileType.FILE
    if stat.S_ISDIR(mode):
        return FileType.DIRECTORY
    return FileType.LINK if stat.S_ISLNK(mode) else FileType.OTHER


def _readable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")


def _sync_directory(descriptor: int) -> None:
    directory = _open_directory(".", descriptor)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
