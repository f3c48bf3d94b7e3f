"""An API that says what a test wrote down: for what a real gateway says only in rare moments."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.test_utils import TestServer

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class ScriptedApi:
    """Gives the `answers` one after the other, the last one again and again."""

    answers: list[Answer]
    requests: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""
    port: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await answer(request)


@asynccontextmanager
async def scripted_api(*answers: Answer) -> AsyncIterator[ScriptedApi]:
    """Run such an API until the block ends."""
    api = ScriptedApi(list(answers))
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", api.answer)
    async with TestServer(app) as server:
        api.url, api.port = str(server.make_url("")).rstrip("/"), server.port or 0
        yield api


def says(status: int, body: object = None, **headers: str) -> Answer:
    """Answer with JSON."""

    async def answer(_: web.Request) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response(body, status=status, headers=named)

    return answer


def refuses(status: int, code: str, **headers: str) -> Answer:
    """Answer with the error form."""
    return says(status, {"error": "it is so", "code": code}, **headers)


def hangs_up() -> Answer:
    """Break the connection without an answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.abort()
        return web.Response()

    return answer


def streams(text: str, *, breaks: bool = False) -> Answer:
    """Send this as an event stream; with `breaks` the connection is cut behind it."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(text.encode())
        if breaks:
            assert request.transport
            request.transport.abort()
        return response

    return answer
