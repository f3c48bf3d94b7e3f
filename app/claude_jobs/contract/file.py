"""A file of the shared workspace as the API shows it."""

from datetime import datetime
from enum import StrEnum

from claude_jobs.contract.base import Document


class FileType(StrEnum):
    """What a directory's entry is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"  # symbolic; it may lead anywhere
    OTHER = "other"  # a pipe, a socket, a device


class FileEntry(Document):
    """One entry of a directory.

    A name that is no UTF-8 has its wrong bytes replaced, and `encoded_name` is what a path must
    hold instead. Files alone have `size`, in bytes, and `etag`, as `If-Match` takes it.
    """

    name: str
    encoded_name: str | None = None
    type: FileType
    size: int | None = None
    modified_at: datetime
    etag: str | None = None


class FileListing(Document):
    """A page of a directory, by name. `path` is below the workspace, which is `.` itself."""

    path: str
    entries: list[FileEntry]
    next_cursor: str | None = None
