"""Whether the workspace is the one that all nodes share, or a directory of this machine alone.

Where a node has not mounted the file server, its mount point is an empty local directory, and work
would go on there as if nothing were wrong. The kernel's list of mounts tells the difference, and
reading it asks no file server.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from claude_jobs.settings import BusSettings

log = logging.getLogger(__name__)

MOUNTINFO = Path("/proc/self/mountinfo")

_NFS = {"nfs", "nfs4"}
# The kernel writes white space, backslashes and `#` like this.
_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo (proc(5)): what is mounted where.

    `root` is the directory of the file system that lies at `point`. NFS always says `/` there
    and names the directory in `source`, as it is on the server.
    """

    root: str
    point: PurePosixPath
    kind: str
    source: str

    def __str__(self) -> str:
        """Describe it for people."""
        shown = self.source if self.kind in _NFS else f"{self.root} of {self.source}"
        return f"{shown} ({self.kind})"


def mounts(text: bytes) -> Iterator[Mount]:
    """Read the lines of a mountinfo; one that is none is passed over."""
    for line in text.splitlines():
        # The number of fields before the hyphen varies, and there may be none of them.
        place, hyphen, file_system = line.partition(b" - ")
        before, after = place.split(b" "), file_system.split(b" ")
        if hyphen and len(before) >= 6 and len(after) >= 2:
            root, point, kind, source = map(_plain, (before[3], before[4], after[0], after[1]))
            yield Mount(root, PurePosixPath(point), kind, source)


def mount_of(directory: Path, text: bytes) -> Mount | None:
    """Return the mount that a directory lies in. Of several on one point the last hides the others.

    `directory` is absolute and, as links would have to be looked up, means what it says.
    """
    found: Mount | None = None
    for mount in mounts(text):
        if directory.is_relative_to(mount.point) and (
            found is None or mount.point.is_relative_to(found.point)
        ):
            found = mount
    return found


class WorkspaceMount:
    """Looks at the mount of one process's workspace, and logs when that changes."""

    def __init__(self, settings: BusSettings, *, mountinfo: Path = MOUNTINFO) -> None:
        self._directory = Path(os.path.abspath(settings.workspace_dir))  # noqa: PTH100 - no look-up
        self._expected = settings.workspace_source
        self._is_here = settings.workspace_host == settings.node_name
        self._node = settings.node_name
        self._mountinfo = mountinfo
        self._said: str | None = None

    def fault(self) -> str | None:
        """Say in a sentence why the workspace is not the shared one; None when it is.

        Does not wait for the file server, also while that is away.
        """
        fault = self._fault()
        if fault != self._said:
            if fault is not None:
                log.error("the workspace is not the shared one", extra={"cause": fault})
            else:
                log.info("the workspace is the shared one again")
            self._said = fault
        return fault

    def _fault(self) -> str | None:
        if not self._expected or self._is_here:
            return None
        try:
            mount = mount_of(self._directory, self._mountinfo.read_bytes())
        except OSError as error:
            found = f"nothing, as the mounts cannot be read ({error.strerror})"
        else:
            if mount is not None and self._is_expected(mount):
                return None
            found = str(mount or "no mount")
        return (
            f"the workspace of node {self._node} is not the shared one: "
            f"{self._directory} must be {self._expected} (nfs) and is {found}"
        )

    def _is_expected(self, mount: Mount) -> bool:
        below = self._directory.relative_to(mount.point)
        found = "/".join((mount.source, *below.parts))
        return mount.kind in _NFS and mount.root == "/" and _same(found) == _same(self._expected)


def _plain(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda octal: bytes([int(octal[1], 8) & 0xFF]), field))


def _same(source: str) -> str:
    """Return a source so that those of one directory are equal, however many slashes they have."""
    return re.sub("/+", "/", f"{source}/")
