"""Sessions over HTTP: which there are, and away with one."""

import uuid
from functools import partial

from aiohttp import web

from claude_jobs.bus.sessions import SessionBusyError, remove_session
from claude_jobs.contract.base import Document
from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.contract.session import Session
from claude_jobs.gateway.paging import read_page
from claude_jobs.gateway.settlement import is_over
from claude_jobs.gateway.state import STATE


class SessionPage(Document):
    """A page of `GET /api/sessions`. While there is a `next_cursor`, more may follow."""

    sessions: list[Session]
    next_cursor: str | None = None


async def list_sessions(request: web.Request) -> web.Response:
    """Show the sessions, the last used first."""
    backend = request.app[STATE].ready_backend()
    page = read_page(request)
    sessions = await backend.sessions.list()
    start = 0
    if page.cursor is not None:
        start = next(
            (place + 1 for place, each in enumerate(sessions) if each.id == page.cursor), -1
        )
        if start < 0:
            raise RequestRefusedError(
                ErrorCode.INVALID_REQUEST,
                "cursor: must be the nextCursor of an earlier answer, whose session still is",
            )
    shown = sessions[start : start + page.limit]
    more = len(sessions) > start + page.limit
    return web.Response(
        body=SessionPage(sessions=shown, next_cursor=shown[-1].id if more else None).to_json(),
        content_type="application/json",
    )


async def show_session(request: web.Request) -> web.Response:
    """Show one session."""
    session_id = request.match_info["session_id"]
    session = None
    if _can_be_one(session_id):
        session = await request.app[STATE].ready_backend().sessions.get(session_id)
    if session is None:
        raise _unknown(session_id)
    return web.Response(body=session.to_json(), content_type="application/json")


async def delete_session(request: web.Request) -> web.Response:
    """Remove a session for good. One that a job uses stays."""
    backend = request.app[STATE].ready_backend()
    session_id = request.match_info["session_id"]
    if not _can_be_one(session_id):
        raise _unknown(session_id)
    try:
        known = await remove_session(
            backend.session_log, backend.sessions, session_id, partial(is_over, backend)
        )
    except SessionBusyError as busy:
        raise RequestRefusedError(
            ErrorCode.CONFLICT, f"{busy}: wait for its end, or cancel it"
        ) from None
    if not known:
        raise _unknown(session_id)
    return web.Response(status=204)


def _unknown(session_id: str) -> RequestRefusedError:
    return RequestRefusedError(ErrorCode.NOT_FOUND, f"there is no session {session_id!r}")


def _can_be_one(session_id: str) -> bool:
    """Tell whether a text can be a session's id: a UUID in its usual form."""
    try:
        return str(uuid.UUID(session_id)) == session_id
    except ValueError:
        return False
