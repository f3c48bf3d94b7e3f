"""Bearer tokens: who may use the API, and under which name."""

import hmac
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from claude_jobs.api_tokens import ApiToken, Client
from claude_jobs.contract.base import now
from claude_jobs.contract.error import ErrorCode, RequestRefusedError

__all__ = ["ANONYMOUS", "CLIENT", "Client", "bearer_auth"]

ANONYMOUS = Client("anonymous")
CLIENT: web.RequestKey[Client] = web.RequestKey("client", Client)
# A load balancer asks these without a token; they tell nothing but alive or not.
_OPEN_PATHS = {"/health", "/ready"}


def bearer_auth(tokens: Sequence[ApiToken], *, allow_anonymous: bool = False) -> Middleware:
    """Make the middleware that lets nobody in without one of `tokens`, and says who comes.

    `allow_anonymous` lets those in, too, who offer no token at all. A wrong one is refused even
    then: whoever sends a token means to be known by it.
    """

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN_PATHS or (
            allow_anonymous and "Authorization" not in request.headers
        ):
            request[CLIENT] = ANONYMOUS
        else:
            request[CLIENT] = _client(request, tokens)
        return await handler(request)

    return authenticate


def _client(request: web.Request, tokens: Sequence[ApiToken]) -> Client:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise RequestRefusedError(
            ErrorCode.UNAUTHORIZED, "send the header 'Authorization: Bearer <token>'"
        )
    # Bytes that are no UTF-8 come as surrogates.
    offered = given.strip().encode(errors="surrogateescape")
    found = None
    # Every token is compared, each in constant time: the time taken tells nothing.
    for token in tokens:
        same = hmac.compare_digest(offered, token.secret.get_secret_value().encode())
        if same and (token.until is None or now() < token.until):
            found = token.client
    if found is None:
        raise RequestRefusedError(ErrorCode.UNAUTHORIZED, "this token is not known here")
    return found
