"""The shared workspace over HTTP: list, download, upload, delete. It needs no broker."""

import asyncio
import contextlib
import errno
import logging
import mimetypes
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from functools import partial
from urllib.parse import quote, unquote_to_bytes

from aiohttp import HttpVersion11, hdrs, web

from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.contract.file import FileEntry
from claude_jobs.gateway import file_store
from claude_jobs.gateway.conditions import (
    Conditions,
    UnsatisfiableRangeError,
    Version,
    requested_range,
)
from claude_jobs.gateway.state import RETRY_AFTER, STATE
from claude_jobs.workspace import WorkspaceError
from claude_jobs.workspace_threads import Steps, WorkspaceStalledError

log = logging.getLogger(__name__)

ROOT_PATTERN = "/api/files"
# A name may hold a line break, which `.` does not match.
PATH_PATTERN = r"/api/files/{path:[\s\S]*}"

MAX_PATH_BYTES = 4096
MAX_PARTS = 256
MAX_NAME_BYTES = 255
DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000

_CHUNK = 2**18  # bytes that are read or written at a time
_IDLE = 60.0  # seconds that a client may keep a chunk waiting
_SWEEP_EVERY = 24 * 3600.0  # seconds

_MEDIA_TYPES = mimetypes.MimeTypes()
# Agents write these files, and a browser must run nothing of them: what is not one of these is
# only ever saved.
_SHOWN = {"application/json", "text/csv", "text/markdown", "text/plain"}
_SHOWN_KINDS = ("audio/", "image/", "video/")
_NEVER_SHOWN = {"image/svg+xml"}
_GUARDS = {
    hdrs.ACCEPT_RANGES: "bytes",
    hdrs.CACHE_CONTROL: "private, no-cache",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
}


async def sweeping(app: web.Application) -> AsyncIterator[None]:
    """Remove at times what crashes left in the workspace."""
    sweeper = asyncio.create_task(_sweep(app))
    yield
    sweeper.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sweeper


async def read_file(request: web.Request) -> web.StreamResponse:
    """Download a file, or with `?list` show a directory."""
    _only(request, {"list", "limit", "cursor"})
    parts = _parts(request)
    if _flag(request, "list"):
        return await _list(request, parts)
    state = request.app[STATE]
    workspace = state.shared_workspace()
    with _refusals(parts):
        try:
            opened = await workspace.run(file_store.open_file, state.settings.workspace_dir, parts)
        except IsADirectoryError:
            raise _wrong(
                f"{_shown(parts)} is a directory: add ?list to see what it holds"
            ) from None
    async with workspace.holding(opened.file.close) as steps:
        return await _download(request, parts, opened, steps)


async def write_file(request: web.Request) -> web.Response:
    """Put a file in its place as a whole, once it has come as a whole."""
    _only(request, set())
    parts = _parts(request)
    if not parts or request.rel_url.raw_path.endswith("/"):
        raise _wrong("the path must name a file: it ends with '/'")
    for header in (hdrs.CONTENT_RANGE, hdrs.CONTENT_ENCODING):
        if header in request.headers:
            raise _wrong(f"{header}: send the whole file, as it is")
    state = request.app[STATE]
    settings, workspace = state.settings, state.shared_workspace()
    limit = settings.max_upload_bytes
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    upload = file_store.Upload(settings.workspace_dir, parts, Conditions.of(request))
    async with workspace.holding(upload.discard) as steps:
        with _refusals(parts):
            await steps.run(upload.begin)
            await _continue(request)
            async for chunk in _body(request, limit):
                await steps.run(upload.write, chunk)
            made, entry = await steps.run(upload.commit)
    log.info("took a file", extra={"path": _shown(parts), "bytes": entry.size})
    return _stored(entry, parts, made=made)


async def delete_file(request: web.Request) -> web.Response:
    """Delete a file, a link or a directory."""
    _only(request, {"recursive"})
    parts = _parts(request)
    recursive = _flag(request, "recursive")
    if not parts:
        raise RequestRefusedError(ErrorCode.FORBIDDEN, "the workspace itself cannot be deleted")
    state = request.app[STATE]
    workspace, conditions = state.shared_workspace(), Conditions.of(request)
    delete = partial(file_store.delete, recursive=recursive)
    with _refusals(parts):
        await workspace.run(delete, state.settings.workspace_dir, parts, conditions)
    return web.Response(status=204)


async def continue_later(_: web.Request) -> None:
    """Leave `Expect: 100-continue` to the handler: a refusal then spares the client the way."""


async def _list(request: web.Request, parts: tuple[str, ...]) -> web.Response:
    state = request.app[STATE]
    root, workspace = state.settings.workspace_dir, state.shared_workspace()
    limit, after = _limit(request), _cursor(request)

    def answer() -> bytes:
        return file_store.list_directory(root, parts, limit=limit, after=after).to_json()

    with _refusals(parts):
        try:
            body = await workspace.run(answer)
        except NotADirectoryError:
            raise _wrong(f"{_shown(parts)} is no directory: leave ?list out to read it") from None
    return web.Response(
        body=body, content_type="application/json", headers={hdrs.CACHE_CONTROL: "no-store"}
    )


async def _download(
    request: web.Request, parts: tuple[str, ...], opened: file_store.OpenFile, steps: Steps
) -> web.StreamResponse:
    state = opened.state
    version, conditions = Version.of(state), Conditions.of(request)
    if not conditions.hold_for_reading(version):
        raise _condition_failed(parts)
    headers = _GUARDS | {hdrs.ETAG: version.etag, hdrs.LAST_MODIFIED: _http_date(version)}
    if conditions.already_known(version):
        return web.Response(status=304, headers=headers)
    try:
        part = requested_range(request, version, state.st_size) if _is_get(request) else None
    except UnsatisfiableRangeError:
        return _unsatisfiable(parts, state.st_size)
    asked = range(state.st_size) if part is None else part
    media_type, shown = _media_type(parts[-1])
    headers |= {hdrs.CONTENT_TYPE: media_type, hdrs.CONTENT_LENGTH: str(len(asked))}
    if not shown:
        headers[hdrs.CONTENT_DISPOSITION] = "attachment"
    if part is not None:
        headers[hdrs.CONTENT_RANGE] = f"bytes {part.start}-{part.stop - 1}/{state.st_size}"
    response = web.StreamResponse(status=200 if part is None else 206, headers=headers)
    await response.prepare(request)
    if _is_get(request):
        await _send(request, response, opened.file.fileno(), asked, steps)
    return response


async def _send(
    request: web.Request,
    response: web.StreamResponse,
    descriptor: int,
    asked: range,
    steps: Steps,
) -> None:
    """Send these bytes. A file that got shorter or away meanwhile breaks the connection off.

    It is read in threads: sendfile would read from the disk, or the file server, in the event
    loop.
    """
    try:
        for start in range(asked.start, asked.stop, _CHUNK):
            size = min(_CHUNK, asked.stop - start)
            data = await steps.run(os.pread, descriptor, size, start)
            if len(data) < size:
                raise EOFError("the file became shorter while it was sent")
            async with asyncio.timeout(_IDLE):
                await response.write(data)
        await response.write_eof()
    except (OSError, EOFError, TimeoutError, WorkspaceStalledError) as error:
        # The answer has begun: all that is left is not to end it as if it were whole.
        if not isinstance(error, ConnectionError):
            log.warning("broke a download off", extra={"cause": str(error) or repr(error)})
        response.force_close()
        if request.transport is not None:
            request.transport.abort()


async def _body(request: web.Request, limit: int) -> AsyncIterator[bytearray]:
    """Yield the body in chunks worth a write. The application's own bound is for JSON."""
    chunk, total = bytearray(), 0
    pieces = aiter(request.content.iter_any())
    while True:
        try:
            async with asyncio.timeout(_IDLE):
                piece = await anext(pieces, b"")
        except TimeoutError:
            raise _wrong(f"the body stopped: no byte came for {_IDLE:g} s") from None
        except (web.RequestPayloadError, ConnectionError):
            raise _wrong("the body ended early") from None
        total += len(piece)
        if total > limit:
            raise _too_large(limit)
        chunk += piece
        if chunk and (not piece or len(chunk) >= _CHUNK):
            yield chunk
            chunk = bytearray()
        if not piece:
            return


async def _continue(request: web.Request) -> None:
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return
    if request.version == HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _sweep(app: web.Application) -> None:
    state = app[STATE]
    while True:
        try:
            # It may take hours, and then as long as the file server is away: nobody waits for it.
            removed = await asyncio.wrap_future(
                state.threads.submit(file_store.sweep, state.settings.workspace_dir)
            )
        except OSError:
            log.exception("could not look for abandoned uploads")
        else:
            if removed:
                log.info("removed abandoned uploads", extra={"count": removed})
        await asyncio.sleep(_SWEEP_EVERY)


def _parts(request: web.Request) -> tuple[str, ...]:
    """Read the path; raises `RequestRefusedError`. The workspace itself has no parts.

    Bytes that are no UTF-8 come as surrogates, as `os.fsdecode` has it.
    """
    # The route has matched, so that the first three parts are its own.
    _, _, _, *raw = request.rel_url.raw_path.split("/", 3)
    path = unquote_to_bytes((raw[0] if raw else "").encode(errors="surrogateescape"))
    if path.startswith(b"/"):
        raise _wrong("the path must be relative: it begins with '/'")
    if b"\0" in path:
        raise _wrong("the path must not hold a NUL character")
    if len(path) > MAX_PATH_BYTES:
        raise _wrong(f"the path must not have over {MAX_PATH_BYTES} bytes")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise _wrong("the path must not hold '..'")
    if len(parts) > MAX_PARTS:
        raise _wrong(f"the path must not have over {MAX_PARTS} parts")
    for part in parts:
        if len(part) > MAX_NAME_BYTES:
            raise _wrong(f"the path must not have a part of over {MAX_NAME_BYTES} bytes")
        if part.startswith(file_store.UPLOAD_PREFIX.encode()):
            raise _wrong(f"names that begin with {file_store.UPLOAD_PREFIX} are for uploads")
    return tuple(os.fsdecode(part) for part in parts)


def _only(request: web.Request, known: set[str]) -> None:
    for name in request.query:
        if name not in known:
            raise _wrong(f"{name}: there is no such parameter")
        if len(request.query.getall(name)) > 1:
            raise _wrong(f"{name}: give it once")


def _flag(request: web.Request, name: str) -> bool:
    match request.query.get(name):
        case "" | "true" | "1":
            return True
        case None | "false" | "0":
            return False
        case _:
            raise _wrong(f"{name}: must be true or false")


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_LIMIT))
    if text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MAX_LIMIT:
        return int(text)
    raise _wrong(f"limit: must be a number from 1 to {MAX_LIMIT}")


def _cursor(request: web.Request) -> str | None:
    cursor = request.query.get("cursor")
    try:
        return None if cursor is None else os.fsdecode(bytes.fromhex(cursor))
    except ValueError:
        raise _wrong("cursor: must be the nextCursor of another page") from None


@contextmanager
def _refusals(parts: tuple[str, ...]) -> Iterator[None]:
    """Say to the client what the disk says."""
    path = _shown(parts)
    try:
        yield
    except WorkspaceError as error:
        raise RequestRefusedError(ErrorCode.FORBIDDEN, str(error)) from None
    except file_store.ConditionError:
        raise _condition_failed(parts) from None
    except file_store.IrregularError as error:
        raise RequestRefusedError(ErrorCode.FORBIDDEN, f"{path} {error}") from None
    except file_store.InTheWayError as error:
        raise RequestRefusedError(ErrorCode.CONFLICT, f"{path} {error}") from None
    except OSError as error:
        raise _refusal(error, path) from None


def _refusal(error: OSError, path: str) -> RequestRefusedError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            code, sentence = ErrorCode.NOT_FOUND, f"there is no {path} in the workspace"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            code = ErrorCode.FORBIDDEN
            sentence = f"the file system does not let the gateway do this to {path}"
        case errno.EISDIR:
            code, sentence = ErrorCode.CONFLICT, f"{path} is a directory"
        case errno.ENOTEMPTY | errno.EEXIST:
            code = ErrorCode.CONFLICT
            sentence = (
                f"{path} is a directory that is not empty: add ?recursive to delete all of it"
            )
        case errno.ELOOP:
            code, sentence = ErrorCode.CONFLICT, f"{path} was changed at this moment: try again"
        case errno.ENOSPC | errno.EDQUOT:
            return _unavailable("the workspace is full: delete files that nobody needs")
        case _:
            cause = str(error) or repr(error)
            log.error("the workspace failed", extra={"path": path, "cause": cause})
            return _unavailable("the workspace's disk or file server failed: try again shortly")
    return RequestRefusedError(code, sentence)


def _unavailable(sentence: str) -> RequestRefusedError:
    return RequestRefusedError(ErrorCode.UNAVAILABLE, sentence, retry_after=RETRY_AFTER)


def _wrong(sentence: str) -> RequestRefusedError:
    return RequestRefusedError(ErrorCode.INVALID_REQUEST, sentence)


def _too_large(limit: int) -> RequestRefusedError:
    return RequestRefusedError(ErrorCode.TOO_LARGE, f"the file exceeds {limit} bytes")


def _condition_failed(parts: tuple[str, ...]) -> RequestRefusedError:
    return RequestRefusedError(
        ErrorCode.PRECONDITION_FAILED,
        f"{_shown(parts)} is not as the request's condition wants it: look at it again",
    )


def _unsatisfiable(parts: tuple[str, ...], size: int) -> web.Response:
    refusal = RequestRefusedError(
        ErrorCode.RANGE_NOT_SATISFIABLE, f"{_shown(parts)} has only {size} bytes"
    )
    return web.Response(
        status=refusal.status,
        body=refusal.body.to_json(),
        content_type="application/json",
        headers={hdrs.CONTENT_RANGE: f"bytes */{size}"},
    )


def _stored(entry: FileEntry, parts: tuple[str, ...], *, made: bool) -> web.Response:
    headers = {hdrs.ETAG: entry.etag or ""}
    if made:
        headers[hdrs.LOCATION] = f"{ROOT_PATTERN}/{quote(os.fsencode('/'.join(parts)))}"
    return web.Response(
        status=201 if made else 200,
        body=entry.to_json(),
        content_type="application/json",
        headers=headers,
    )


def _media_type(name: str) -> tuple[str, bool]:
    """Return the content type, and whether a browser may show it."""
    found, encoding = _MEDIA_TYPES.guess_type(name, strict=False)
    if found is None or encoding is not None:  # a .tar.gz is sent as what it is
        return "application/octet-stream", False
    shown = found in _SHOWN or (found.startswith(_SHOWN_KINDS) and found not in _NEVER_SHOWN)
    return f"{found}; charset=utf-8" if found.startswith("text/") else found, shown


def _http_date(version: Version) -> str:
    return format_datetime(version.modified_at, usegmt=True)


def _is_get(request: web.Request) -> bool:
    return request.method == hdrs.METH_GET


def _shown(parts: tuple[str, ...]) -> str:
    """Return the path as a sentence can hold it."""
    if not parts:
        return "the workspace"
    return repr(os.fsencode("/".join(parts)).decode(errors="replace"))
