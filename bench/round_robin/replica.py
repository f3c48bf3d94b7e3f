"""A one-shot replica of the design without a queue: jobs are sent to it over HTTP.

It answers 429 while it works and exits after its job, so that Swarm starts the next one. It runs
the same Claude Code in the same way as a replica of the pool, and leaves out what costs the pool
time: no session is saved, no event is stored, no watchdog and no Agent SDK are loaded.
"""

import asyncio
import json
import os
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from claude_jobs.agent.command import bundled_claude, command_line, environment
from claude_jobs.agent.credentials import parse_credentials
from claude_jobs.contract.job import JobRequest

HOME = Path("/home/agent")
MAX_LINE_BYTES = 2**26


async def agent(prompt: str) -> AsyncIterator[dict[str, Any]]:
    """Run Claude Code against the demo model and yield each line that it prints."""
    key = parse_credentials('{"apiKey": "demo"}')
    descriptor = key.pipe()
    process = await asyncio.create_subprocess_exec(
        *command_line(
            bundled_claude(),
            JobRequest(prompt=prompt),
            str(uuid.uuid4()),
            resume=False,
            max_turns=1000,
            trust_workspace_settings=False,
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=HOME,
        env=environment(
            home=HOME,
            base_url=os.environ["ANTHROPIC_BASE_URL"],
            credentials=(key.variable, descriptor),
            max_retries=3,
        ),
        pass_fds=(descriptor,),
        limit=MAX_LINE_BYTES,
    )
    os.close(descriptor)
    assert process.stdin, "asked for above"
    assert process.stdout, "asked for above"
    message = {"type": "user", "message": {"role": "user", "content": prompt}}
    process.stdin.write(json.dumps(message).encode() + b"\n")
    async for line in process.stdout:
        frame = json.loads(line)
        yield frame
        if frame.get("type") == "result":
            process.stdin.close()  # no further prompt will come: it exits
    await process.wait()


class Replica:
    """Takes one job and is over then."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self._busy = False

    async def health(self, _: web.Request) -> web.Response:
        """Say that the process lives."""
        return web.Response()

    async def execute(self, request: web.Request) -> web.StreamResponse:
        """Run the job and stream what its agent prints, or refuse it."""
        if self._busy:
            return web.Response(status=429, headers={"Retry-After": "1"})
        self._busy = True
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

        async def send(kind: str, data: dict[str, Any]) -> None:
            await answer.write(f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode())

        try:
            prompt = (await request.json())["prompt"]
            await answer.prepare(request)
            await send("connected", {"replica": socket.gethostname()})
            result: dict[str, Any] = {}
            async for frame in agent(prompt):
                if frame.get("type") == "result":
                    result = frame
                await send("message", {"content": frame})
            await send("completed" if result.get("is_error") is False else "error", result)
            await answer.write_eof()
        finally:
            self.over.set()
        return answer


async def main() -> None:
    replica = Replica()
    app = web.Application()
    app.add_routes([web.get("/health", replica.health), web.post("/api/execute", replica.execute)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=3000).start()
    await replica.over.wait()
    await runner.cleanup()
    # As the pool's replicas do: taking a Python apart takes time that nobody needs.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
