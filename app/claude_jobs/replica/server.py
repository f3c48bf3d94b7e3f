"""What a replica answers over HTTP: that it is well, and whether it works. It accepts no job."""

from collections.abc import Callable

from aiohttp import web

from claude_jobs.contract.error import HTTP_STATUS, ErrorBody, ErrorCode
from claude_jobs.contract.status import Replica


def create_app(state: Callable[[], Replica], fault: Callable[[], str | None]) -> web.Application:
    """Make the application; `state` tells what the replica does at the moment.

    `fault` tells why Swarm should start another container in place of this one, if it should.
    """

    async def health(_: web.Request) -> web.Response:
        if (sentence := fault()) is not None:
            body = ErrorBody(error=sentence, code=ErrorCode.UNAVAILABLE)
            return web.Response(
                status=HTTP_STATUS[body.code], body=body.to_json(), content_type="application/json"
            )
        return web.json_response({"status": "ok"})

    async def status(_: web.Request) -> web.Response:
        # Other jobs' agents reach this address: it names no job.
        shown = state().model_copy(update={"job_id": None})
        return web.Response(body=shown.to_json(), content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/status", status)])
    return app
