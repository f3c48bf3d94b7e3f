"""What a replica answers over HTTP: that it lives, and whether it works. It accepts no job."""

from collections.abc import Callable

from aiohttp import web

from claude_jobs.contract.status import Replica


def create_app(state: Callable[[], Replica]) -> web.Application:
    """Make the application; `state` tells what the replica does at the moment."""

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def status(_: web.Request) -> web.Response:
        # Other jobs' agents reach this address: it names no job.
        shown = state().model_copy(update={"job_id": None})
        return web.Response(body=shown.to_json(), content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/status", status)])
    return app
