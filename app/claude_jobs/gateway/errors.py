"""Every failure becomes the one error form; no stack trace ever reaches a client."""

import logging
from http import HTTPStatus

import nats.errors
import nats.js.errors
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from claude_jobs.contract.error import ErrorCode, RequestRefusedError
from claude_jobs.gateway.state import RETRY_AFTER
from claude_jobs.workspace_threads import WorkspaceStalledError

log = logging.getLogger(__name__)

_BY_STATUS = {
    HTTPStatus.NOT_FOUND: (ErrorCode.NOT_FOUND, "there is nothing at {path}"),
    HTTPStatus.METHOD_NOT_ALLOWED: (
        ErrorCode.METHOD_NOT_ALLOWED,
        "{path} does not answer {method}",
    ),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (ErrorCode.TOO_LARGE, "the request is too large"),
}
_AWAY = (nats.errors.Error, nats.js.errors.Error, TimeoutError)


@web.middleware
async def error_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every refusal, mistake and fault in the error form."""
    try:
        return await handler(request)
    except RequestRefusedError as refusal:
        return _response(refusal)
    except web.HTTPException as error:
        code, sentence = _BY_STATUS.get(
            HTTPStatus(error.status), (ErrorCode.INVALID_REQUEST, error.reason)
        )
        said = RequestRefusedError(code, sentence.format(path=request.path, method=request.method))
        return _response(
            said, {name: error.headers[name] for name in ("Allow",) if name in error.headers}
        )
    except WorkspaceStalledError as stalled:
        return _response(
            RequestRefusedError(ErrorCode.UNAVAILABLE, str(stalled), retry_after=RETRY_AFTER)
        )
    except _AWAY:
        log.exception("the broker did not answer", extra={"path": request.path})
        return _response(
            RequestRefusedError(
                ErrorCode.UNAVAILABLE,
                "the job broker did not answer: try again shortly",
                retry_after=RETRY_AFTER,
            )
        )
    except Exception:
        log.exception("a request failed", extra={"path": request.path})
        return _response(
            RequestRefusedError(
                ErrorCode.INTERNAL, "the gateway failed to answer; its log says why"
            )
        )


def sentence_for(error: ValidationError) -> str:
    """Say in one sentence which field of a request is wrong, and how."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "extra_forbidden":
            return f"{place}: there is no such field"
        case "missing":
            return f"{place}: this field is required"
        case "json_invalid":
            return f"the body is not JSON: {first.get('ctx', {}).get('error', said)}"
        case "model_type" | "dict_type" if not place:
            return "the body must be a JSON object"
    return f"{place}: {said[0].lower()}{said[1:]}" if place else said


def _response(refusal: RequestRefusedError, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(
        status=refusal.status, body=refusal.body.to_json(), content_type="application/json"
    )
    response.headers.update(headers or {})
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = str(refusal.retry_after)
    if refusal.body.code is ErrorCode.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
