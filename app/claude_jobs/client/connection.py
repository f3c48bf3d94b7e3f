"""Requests to the API that outlast a lost connection and a server that is busy."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from claude_jobs.client.errors import ApiError, ClientError, UnreachableError
from claude_jobs.client.patience import Notify, Patience
from claude_jobs.contract.base import now

# Nothing was done, and a later try may find it different.
TRANSIENT = frozenset({429, 502, 503, 504})
_MAX_ERROR_BYTES = 65_536
_MAX_SHOWN = 200


def timeouts(*, read: float = 60) -> httpx.Timeout:
    """Return how long is waited for a connection, for a piece of an answer (seconds)."""
    return httpx.Timeout(connect=10, read=read, write=60, pool=None)


class Connection:
    """The HTTP client together with the bound on every outage (`give_up_after`, seconds)."""

    def __init__(
        self, http: httpx.AsyncClient, *, give_up_after: float, notify: Notify | None = None
    ) -> None:
        self.http = http
        self.give_up_after = give_up_after
        self.notify = notify

    def patience(self, give_up_after: float | None = None, *, first_wait: float = 0.5) -> Patience:
        """Return a new bound on one outage."""
        bound = self.give_up_after if give_up_after is None else give_up_after
        return Patience(bound, first_wait=first_wait, notify=self.notify)

    async def send(
        self,
        method: str,
        path: str,
        *,
        give_up_after: float | None = None,
        repeatable: bool = True,
        content: Callable[[], Any] | bytes | None = None,
        params: dict[str, str | int] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request until it is answered, and return an answer below 400.

        Raises `ApiError` when it is refused and `UnreachableError` when nobody answers.
        `repeatable=False` is for what must not be served twice: it is only sent again when it
        cannot have been served. `content` is called anew for each try when it can be.
        """
        patience = self.patience(give_up_after)
        repeated = False
        while True:
            try:
                response = await self.http.request(
                    method,
                    path,
                    content=content() if callable(content) else content,
                    params=params,
                    headers=headers,
                )
            except httpx.LocalProtocolError as error:
                raise ClientError(f"the request cannot be sent: {error}") from error
            except httpx.TransportError as error:
                cause = self.lost(error)
                never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if not (repeatable or never_sent):
                    raise cause from error
                repeated = repeated or not never_sent
                await patience.wait(cause)
                continue
            if response.status_code < 400:
                return response
            refused = refusal(response, repeated=repeated)
            if refused.status not in TRANSIENT:
                raise refused
            await patience.wait(refused, at_least=refused.retry_after or 0)

    @asynccontextmanager
    async def stream(
        self, path: str, *, headers: dict[str, str], read_timeout: float
    ) -> AsyncIterator[httpx.Response]:
        """Open one answer (GET), read piece by piece; raises `ApiError` when it is refused.

        `read_timeout` is the longest silence, in seconds.
        """
        async with self.http.stream(
            "GET", path, headers=headers, timeout=timeouts(read=read_timeout)
        ) as response:
            if response.status_code >= 400:
                body = bytearray()
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > _MAX_ERROR_BYTES:
                        break
                raise refusal(response, bytes(body))
            yield response

    def lost(self, error: httpx.TransportError) -> ClientError:
        """Say in a sentence that the connection failed, and how."""
        return UnreachableError(
            f"{self.http.base_url} cannot be reached: {str(error) or type(error).__name__}"
        )


def refusal(
    response: httpx.Response, body: bytes | None = None, *, repeated: bool = False
) -> ApiError:
    """Read the error form; also what a proxy says in its place."""
    try:
        said = httpx.Response(200, content=response.content if body is None else body).json()
        code, sentence = str(said["code"]), str(said["error"])
    except (ValueError, KeyError, TypeError):
        text = response.reason_phrase or "no reason given"
        code, sentence = "unknown", f"{response.url.host} refused the request: {text[:_MAX_SHOWN]}"
    return ApiError(
        response.status_code,
        code,
        sentence,
        retry_after=_seconds(response.headers.get("Retry-After")),
        repeated=repeated,
    )


def _seconds(retry_after: str | None) -> float | None:
    """Read `Retry-After`: seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - now()).total_seconds())
    except (ValueError, TypeError):
        return None
