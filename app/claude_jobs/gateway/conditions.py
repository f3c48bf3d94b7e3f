"""Conditional and partial requests (RFC 9110, sections 13 and 14), for files."""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from aiohttp import ETag, hdrs, web

_ANY = "*"
_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", re.IGNORECASE)
_LAST_SECOND = 253_402_300_799  # of the year 9999: file systems and agents go beyond


@dataclass(frozen=True)
class Version:
    """The state of a file that conditions are about. `modified` is in whole seconds."""

    tag: str
    modified: int

    @classmethod
    def of(cls, state: os.stat_result) -> Self:
        """Return the version of a file in this state; it is the same on every node."""
        return cls(
            tag=f"{state.st_ino:x}-{state.st_mtime_ns:x}-{state.st_size:x}",
            modified=min(max(int(state.st_mtime), 0), _LAST_SECOND),
        )

    @property
    def etag(self) -> str:
        """The tag as a header has it. It is strong."""
        return f'"{self.tag}"'

    @property
    def modified_at(self) -> datetime:
        """When the file was changed last."""
        return datetime.fromtimestamp(self.modified, UTC)


@dataclass(frozen=True)
class Conditions:
    """What a request wants to be true of the file; None where it does not say."""

    if_match: tuple[ETag, ...] | None = None
    if_none_match: tuple[ETag, ...] | None = None
    if_modified_since: datetime | None = None
    if_unmodified_since: datetime | None = None

    @classmethod
    def of(cls, request: web.Request) -> Self:
        """Read the headers of a request."""
        return cls(
            request.if_match,
            request.if_none_match,
            request.if_modified_since,
            request.if_unmodified_since,
        )

    def hold_for_reading(self, version: Version) -> bool:
        """Say whether the file may be answered with at all."""
        if self.if_match is not None:
            return _names(self.if_match, version, strong=True)
        since = self.if_unmodified_since
        return since is None or version.modified_at <= since

    def hold_for_writing(self, version: Version | None) -> bool:
        """Say whether the file, or its absence (None), may be changed."""
        if version is None:
            return self.if_match is None and self.if_unmodified_since is None
        if self.if_none_match is not None and _names(self.if_none_match, version):
            return False
        return self.hold_for_reading(version)

    def already_known(self, version: Version) -> bool:
        """Say whether the client has this version."""
        if self.if_none_match is not None:
            return _names(self.if_none_match, version)
        since = self.if_modified_since
        return since is not None and version.modified_at <= since


class UnsatisfiableRangeError(Exception):
    """A range that begins behind the end."""


def requested_range(request: web.Request, version: Version, size: int) -> range | None:
    """Return which bytes are asked for; None for all of them.

    What is malformed, or asks for several ranges, is answered with the whole, as the RFC allows.
    Raises `UnsatisfiableRangeError`.
    """
    match = _RANGE.fullmatch(request.headers.get(hdrs.RANGE, ""))
    if match is None or not _still_same(request, version):
        return None
    first, last = match.groups()
    if not first:
        if not last:
            return None
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start == stop:
        raise UnsatisfiableRangeError
    return range(start, stop)


def _still_same(request: web.Request, version: Version) -> bool:
    said = request.headers.get(hdrs.IF_RANGE)
    return said is None or said.strip() == version.etag or request.if_range == version.modified_at


def _names(tags: tuple[ETag, ...], version: Version, *, strong: bool = False) -> bool:
    return any(
        tag.value == _ANY or (tag.value == version.tag and not (strong and tag.is_weak))
        for tag in tags
    )
