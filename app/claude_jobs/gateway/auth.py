"""Bearer tokens: who may use the API, and under which name."""

import hmac
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import SecretStr

from claude_jobs.contract.error import ErrorCode, RequestRefusedError

ANONYMOUS = "anonymous"
CLIENT: web.RequestKey[str] = web.RequestKey("client", str)
# A load balancer asks these without a token; they tell nothing but alive or not.
_OPEN_PATHS = {"/health", "/ready"}


def bearer_auth(tokens: Mapping[str, SecretStr] | None) -> Middleware:
    """Make the middleware that lets nobody in without one of `tokens` (name to token).

    None lets everybody in: a deployment must ask for that by `ALLOW_ANONYMOUS`.
    """

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if tokens is None or request.path in _OPEN_PATHS:
            request[CLIENT] = ANONYMOUS
        else:
            request[CLIENT] = _client(request, tokens)
        return await handler(request)

    return authenticate


def _client(request: web.Request, tokens: Mapping[str, SecretStr]) -> str:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise RequestRefusedError(
            ErrorCode.UNAUTHORIZED, "send the header 'Authorization: Bearer <token>'"
        )
    # Bytes that are no UTF-8 come as surrogates.
    offered = given.strip().encode(errors="surrogateescape")
    found = None
    # Every token is compared, each in constant time: the time taken tells nothing.
    for name, token in tokens.items():
        if hmac.compare_digest(offered, token.get_secret_value().encode()):
            found = name
    if found is None:
        raise RequestRefusedError(ErrorCode.UNAUTHORIZED, "this token is not known here")
    return found
