"""The shared workspace's files, for programs: list, download, upload, delete."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from claude_jobs.client.connection import TRANSIENT, Connection
from claude_jobs.client.errors import ApiError, ClientError
from claude_jobs.contract.file import FileEntry, FileListing

_CHUNK = 2**18
_PAGE = 1000
# The longest silence within a download, in seconds.
_SILENCE = 60.0


class Files:
    """The files below the shared workspace; paths are relative to it.

    Every method raises `ApiError`: 404 `not_found`, 412 `precondition_failed`, 413 `too_large`, …
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def list(self, path: str = "") -> AsyncGenerator[FileEntry]:
        """Iterate over the entries of a directory, by name."""
        cursor: str | None = None
        while True:
            params: dict[str, str | int] = {"list": "true", "limit": _PAGE}
            if cursor is not None:
                params["cursor"] = cursor
            response = await self._connection.send("GET", _url(path), params=params)
            try:
                page = FileListing.model_validate_json(response.content)
            except ValidationError:
                raise ClientError(f"{response.url} answered with no listing") from None
            for entry in page.entries:
                yield entry
            cursor = page.next_cursor
            if cursor is None:
                return

    async def download(self, path: str, to: Path) -> str | None:
        """Copy a file to `to` and return its ETag.

        A broken connection is taken up where it broke, unless the file has changed meanwhile:
        then it is read from the start. `to` appears at the end, whole; what was there before is
        replaced.
        """
        part = to.with_name(f".{to.name}.{uuid.uuid4().hex}.part")
        try:
            with await asyncio.to_thread(part.open, "xb") as file:
                etag = await self._receive(_url(path), file)
            await asyncio.to_thread(part.replace, to)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)
        return etag

    async def upload(
        self,
        path: str,
        source: Path,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> FileEntry:
        """Write a file of the workspace from a local one, in one step; missing parents are made.

        `if_match`: only when the file there still has this ETag. `if_none_match="*"`: only when
        there is none. With a condition a lost connection is not tried again, as the first try may
        have been served and the second would be refused for it: `UnreachableError` is raised.
        """
        size = (await asyncio.to_thread(source.stat)).st_size
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        if if_match is not None:
            headers["If-Match"] = if_match
        if if_none_match is not None:
            headers["If-None-Match"] = if_none_match
        response = await self._connection.send(
            "PUT",
            _url(path),
            content=lambda: _pieces(source),
            headers=headers,
            repeatable=if_match is None and if_none_match is None,
        )
        try:
            return FileEntry.model_validate_json(response.content)
        except ValidationError:
            raise ClientError(f"{response.url} answered with no file entry") from None

    async def delete(
        self, path: str, *, recursive: bool = False, if_match: str | None = None
    ) -> None:
        """Delete a file, a link, or an empty directory; `recursive`: a directory with its content.

        `if_match`: only when it still has this ETag.
        """
        try:
            await self._connection.send(
                "DELETE",
                _url(path),
                params={"recursive": "true"} if recursive else None,
                headers={} if if_match is None else {"If-Match": if_match},
            )
        except ApiError as refused:
            # The try whose answer was lost has done it.
            if not (refused.status == httpx.codes.NOT_FOUND and refused.repeated):
                raise

    async def _receive(self, url: str, file: BinaryIO) -> str | None:
        """Write what is at `url` into an empty file, with as many requests as it takes."""
        patience = self._connection.patience()
        etag: str | None = None
        while True:
            position, at_least = file.tell(), 0.0
            headers = {"Accept-Encoding": "identity"}  # ranges count the file's own bytes
            if position and etag:
                headers |= {"Range": f"bytes={position}-", "If-Range": etag}
            try:
                async with self._connection.stream(
                    url, headers=headers, read_timeout=_SILENCE
                ) as response:
                    whole = response.status_code != httpx.codes.PARTIAL_CONTENT
                    rest = not whole and _is_rest(response, position, etag)
                    if not rest:
                        file.seek(0)
                        file.truncate()
                        etag = response.headers.get("ETag")
                    if whole or rest:
                        async for piece in response.aiter_raw():
                            await asyncio.to_thread(file.write, piece)
                            patience.calm()
                        return etag
                    cause: ClientError = ClientError(f"{url} changed while it was read")
            except httpx.TransportError as error:
                cause = self._connection.lost(error)
            except ApiError as refused:
                if refused.status not in TRANSIENT:
                    raise
                cause, at_least = refused, refused.retry_after or 0
            await patience.wait(cause, at_least=at_least)


def _is_rest(response: httpx.Response, position: int, etag: str | None) -> bool:
    """Tell whether a part of a file is the rest from `position`, and still of the same file."""
    span = str(response.headers.get("Content-Range", ""))
    same = str(response.headers.get("ETag", etag)) == etag
    return same and span.startswith(f"bytes {position}-")


async def _pieces(source: Path) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(source.open, "rb") as file:
        while piece := await asyncio.to_thread(file.read, _CHUNK):
            yield piece


def _url(path: str) -> str:
    """Return the address of a path; names that are no UTF-8 hold surrogates, as Python has them."""
    relative = quote(path.removeprefix("/"), safe="/", errors="surrogateescape")
    return f"/api/files/{relative}" if relative else "/api/files"
