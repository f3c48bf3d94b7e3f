"""Long lists come in pages: `?limit=` and `?cursor=`, the `nextCursor` of the page before."""

import re
from dataclasses import dataclass

from aiohttp import web

from claude_jobs.contract.error import ErrorCode, RequestRefusedError

DEFAULT_LIMIT = 50
MAX_LIMIT = 200


@dataclass(frozen=True)
class Page:
    """What a client asks for: at most `limit` entries, those that come after `cursor`."""

    limit: int
    cursor: str | None


def read_page(request: web.Request, *, also: frozenset[str] | set[str] = frozenset()) -> Page:
    """Read the query; raises `RequestRefusedError` with the parameter that is wrong.

    `also` names the parameters that are read elsewhere: any other is refused, for a filter
    with a mistake in its name would show everything.
    """
    for name in request.query:
        if name not in {"limit", "cursor"} | also:
            raise RequestRefusedError(
                ErrorCode.INVALID_REQUEST, f"{name}: there is no such parameter"
            )
        if len(request.query.getall(name)) > 1:
            raise RequestRefusedError(ErrorCode.INVALID_REQUEST, f"{name}: give it once")
    text = request.query.get("limit", str(DEFAULT_LIMIT))
    if not (re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= MAX_LIMIT):
        raise RequestRefusedError(
            ErrorCode.INVALID_REQUEST, f"limit: must be a number from 1 to {MAX_LIMIT}"
        )
    return Page(int(text), request.query.get("cursor"))
