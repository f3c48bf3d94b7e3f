"""The HTTP side of the demo model: Anthropic's Messages API, streamed or in one piece."""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from aiohttp import web

from claude_jobs.model_stub.rules import ERROR_TYPES, Answer, Say, UseTool, Wait, answer

MAX_BODY_BYTES = 64 * 1024 * 1024
PING_SECONDS = 1
REFUSED_KEY = "invalid-key"
MAX_REMEMBERED_FAILURES = 1024
MAX_REPORTED_INPUT_TOKENS = 100_000
"""A bound that keeps Claude Code from compacting a conversation that never ends."""

logger = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app() -> web.Application:
    """Build the service. It keeps no state but which ``fail once`` has been served."""
    stub = _ModelStub()
    app = web.Application(middlewares=[_errors_in_anthropics_form], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(_one_request_a_connection)
    app.router.add_post("/v1/messages", stub.messages)
    app.router.add_post("/v1/messages/count_tokens", stub.count_tokens)
    app.router.add_get("/api/hello", _ok)
    app.router.add_get("/health", _ok)
    return app


def run(port: int) -> None:
    """Serve on all interfaces until SIGTERM or SIGINT, which end open streams at once."""
    web.run_app(
        create_app(),
        host="0.0.0.0",  # noqa: S104 - other containers call it
        port=port,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.1,
        print=None,
    )


async def _one_request_a_connection(_: web.Request, response: web.StreamResponse) -> None:
    """Let nobody keep a connection: on one to a machine that lost its power a request waits long.

    Claude Code gives such a request up after six minutes; a new one finds the stub's new place.
    """
    response.force_close()
    response.headers["Connection"] = "close"


class _ModelStub:
    def __init__(self) -> None:
        self._failed_once: OrderedDict[str, None] = OrderedDict()

    async def messages(self, request: web.Request) -> web.StreamResponse:
        body, size = await _read(request)
        reply = answer(body)
        failure = reply.failure
        if failure and not (failure.once and self._has_failed(_identity(request, body))):
            return _error(failure.status, f"The prompt asked for a failure with {failure.status}.")
        message = _Message(str(body.get("model") or "demo"), reply, size)
        logger.info("answer", extra={"stop_reason": reply.stop_reason, "request_bytes": size})
        if body.get("stream") is not True:
            return web.json_response(await message.whole())
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        with contextlib.suppress(ConnectionResetError):  # the client went away: nothing to tell
            await response.prepare(request)
            await message.stream(response)
        return response

    async def count_tokens(self, request: web.Request) -> web.Response:
        _, size = await _read(request)
        return web.json_response({"input_tokens": _tokens(size)})

    def _has_failed(self, identity: str) -> bool:
        """Tell whether this request failed before, and note that it has now."""
        if identity in self._failed_once:
            return True
        self._failed_once[identity] = None
        if len(self._failed_once) > MAX_REMEMBERED_FAILURES:
            self._failed_once.popitem(last=False)
        return False


class _Message:
    """One answer on its way out."""

    def __init__(self, model: str, reply: Answer, request_bytes: int) -> None:
        self._steps = reply.steps
        self._stop_reason = reply.stop_reason
        self._usage = {
            "input_tokens": min(_tokens(request_bytes), MAX_REPORTED_INPUT_TOKENS),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": _tokens(sum(_length(step) for step in reply.steps)),
        }
        self._head: dict[str, Any] = {
            "id": f"msg_{uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage | {"output_tokens": 1},
        }

    async def whole(self) -> dict[str, Any]:
        """Give the message in one piece, after all its pauses."""
        content: list[dict[str, Any]] = []
        for step in self._steps:
            match step:
                case Wait():
                    await _sleep(step.seconds)
                case Say():
                    await asyncio.sleep(step.delay * len(step.pieces))
                    content.append({"type": "text", "text": step.text})
                case UseTool():
                    content.append(_tool_use(step) | {"input": step.input})
        return self._head | {
            "content": content,
            "stop_reason": self._stop_reason,
            "usage": self._usage,
        }

    async def stream(self, response: web.StreamResponse) -> None:
        """Send the message as server-sent events. A message that starts with ``stall`` is mute."""
        if self._steps[0] == Wait(None):
            await _sleep(None)
        await _send(response, "message_start", message=self._head)
        await _send(response, "ping")
        index = 0
        for step in self._steps:
            match step:
                case Wait(seconds=None):
                    await _sleep(None)
                case Wait(seconds=int(seconds)):
                    for _ in range(seconds):
                        await asyncio.sleep(PING_SECONDS)
                        await _send(response, "ping")
                case Say():
                    deltas = [{"type": "text_delta", "text": piece} for piece in step.pieces]
                    block: dict[str, Any] = {"type": "text", "text": ""}
                    await _send_block(response, index, block, deltas, step.delay)
                    index += 1
                case UseTool():
                    delta = {"type": "input_json_delta", "partial_json": json.dumps(step.input)}
                    await _send_block(response, index, _tool_use(step), [delta])
                    index += 1
        end = {"stop_reason": self._stop_reason, "stop_sequence": None}
        await _send(response, "message_delta", delta=end, usage=self._usage)
        await _send(response, "message_stop")


async def _send_block(
    response: web.StreamResponse,
    index: int,
    block: dict[str, Any],
    deltas: list[dict[str, str]],
    delay: float = 0,
) -> None:
    await _send(response, "content_block_start", index=index, content_block=block)
    for delta in deltas:
        await asyncio.sleep(delay)
        await _send(response, "content_block_delta", index=index, delta=delta)
    await _send(response, "content_block_stop", index=index)


async def _send(response: web.StreamResponse, event: str, **fields: object) -> None:
    data = json.dumps({"type": event, **fields})
    await response.write(f"event: {event}\ndata: {data}\n\n".encode())


async def _sleep(seconds: int | None) -> None:
    if seconds is None:
        await asyncio.Event().wait()
    else:
        await asyncio.sleep(seconds)


def _tool_use(step: UseTool) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": step.name, "input": {}}


def _length(step: Say | Wait | UseTool) -> int:
    match step:
        case Say():
            return sum(len(piece) for piece in step.pieces)
        case UseTool():
            return len(json.dumps(step.input))
        case Wait():
            return 0


def _tokens(length: int) -> int:
    return max(1, length // 4)


def _identity(request: web.Request, body: dict[str, Any]) -> str:
    """Name a request so that its repetition has the same name, and another session's has not."""
    session = request.headers.get("X-Claude-Code-Session-Id", "")
    conversation = json.dumps([session, body["messages"]])
    return hashlib.sha256(conversation.encode()).hexdigest()


async def _read(request: web.Request) -> tuple[dict[str, Any], int]:
    """Check the key and the body's shape.

    Raises ``web.HTTPException`` (401, 400, 413), which the middleware turns into Anthropic's form.
    """
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    if REFUSED_KEY in (request.headers.get("x-api-key"), bearer):
        raise web.HTTPUnauthorized(text="invalid x-api-key")
    raw = await request.read()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        raise web.HTTPBadRequest(text="The request body is not valid JSON.") from problem
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="The request body must be a JSON object.")
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise web.HTTPBadRequest(text="messages: a list with at least one message is required")
    return body, len(raw)


def _error(status: int, message: str) -> web.Response:
    kind = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    request_id = f"req_{uuid4().hex}"
    return web.json_response(
        {
            "type": "error",
            "error": {"type": kind, "message": message},
            "request_id": request_id,
        },
        status=status,
        reason="Overloaded" if status == 529 else None,
        headers={"request-id": request_id},
    )


@web.middleware
async def _errors_in_anthropics_form(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as problem:
        return _error(problem.status, problem.text or problem.reason)


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})
