import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request

from claude_jobs.model_stub import create_app

pytestmark = pytest.mark.asyncio
APP = Path(__file__).parents[1]
Client = TestClient[Request, Application]


@asynccontextmanager
async def stub() -> AsyncIterator[Client]:
    async with TestClient(TestServer(create_app())) as client:
        yield client


def body(prompt: str, *, stream: bool = True) -> dict[str, Any]:
    message = {"role": "user", "content": prompt}
    return {"model": "some-model", "max_tokens": 9, "stream": stream, "messages": [message]}


async def events(client: Client, prompt: str) -> list[dict[str, Any]]:
    async with client.post("/v1/messages", json=body(prompt)) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        found = []
        for block in (await response.text()).removesuffix("\n\n").split("\n\n"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
        return found


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str]:
    problem = await response.json()
    assert problem["type"] == "error"
    assert problem["error"]["message"]
    return response.status, problem["error"]["type"]


async def test_a_text_is_streamed_as_anthropic_streams_it() -> None:
    async with stub() as client:
        got = await events(client, "hello there")
    kinds = [event["type"] for event in got]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds.count("content_block_delta") > 1
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert got[0]["message"]["model"] == "some-model"
    text = "".join(event["delta"]["text"] for event in got if "text" in event.get("delta", {}))
    assert text.startswith("You said: hello there")
    assert got[-2]["delta"]["stop_reason"] == "end_turn"
    assert got[-2]["usage"]["output_tokens"] == len(text) // 4


async def test_a_tool_call_follows_the_text_before_it() -> None:
    async with stub() as client:
        got = await events(client, "say 4 bytes\nrun ls")
    starts = [event for event in got if event["type"] == "content_block_start"]
    assert [(start["index"], start["content_block"]["type"]) for start in starts] == [
        (0, "text"),
        (1, "tool_use"),
    ]
    parts = [e["delta"]["partial_json"] for e in got if "partial_json" in e.get("delta", {})]
    assert json.loads("".join(parts))["command"] == "ls"
    assert got[-2]["delta"]["stop_reason"] == "tool_use"


async def test_without_streaming_the_message_comes_in_one_piece() -> None:
    async with stub() as client:
        response = await client.post("/v1/messages", json=body("say 4 bytes\nrun ls", stream=False))
        message = await response.json()
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["content"][1]["input"]["command"] == "ls"
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("stream", [True, False])
async def test_no_connection_outlives_its_answer(stream: bool) -> None:
    async with (
        stub() as client,
        client.post("/v1/messages", json=body("hi", stream=stream)) as response,
    ):
        assert response.headers["Connection"] == "close"


async def test_waiting_sends_pings() -> None:
    async with stub() as client:
        kinds = [event["type"] for event in await events(client, "wait 1 second")]
    assert kinds[:4] == ["message_start", "ping", "ping", "content_block_start"]


async def test_a_stalled_answer_opens_and_then_says_nothing() -> None:
    async with stub() as client, client.post("/v1/messages", json=body("stall")) as response:
        assert response.status == 200
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.3)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (403, "permission_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (529, "overloaded_error"),
    ],
)
async def test_a_failure_comes_every_time(status: int, kind: str) -> None:
    async with stub() as client:
        for _ in range(2):
            response = await client.post("/v1/messages", json=body(f"fail with {status}"))
            assert await error_of(response) == (status, kind)


async def test_a_failure_comes_once_for_each_session() -> None:
    async with stub() as client:
        statuses = []
        for session in ("a", "a", "b", "a", "b"):
            headers = {"X-Claude-Code-Session-Id": session}
            async with client.post(
                "/v1/messages", json=body("fail once with 529"), headers=headers
            ) as response:
                statuses.append(response.status)
        assert statuses == [529, 200, 529, 200, 200]


@pytest.mark.parametrize(
    "headers", [{"x-api-key": "invalid-key"}, {"Authorization": "Bearer invalid-key"}]
)
async def test_one_key_is_always_refused(headers: dict[str, str]) -> None:
    async with stub() as client:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = await client.post(path, json=body("hi"), headers=headers)
            assert await error_of(response) == (401, "authentication_error")
        accepted = await client.post("/v1/messages", json=body("hi"), headers={"x-api-key": "any"})
        assert accepted.status == 200


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe\xff", b"[]", b"null", b"{}", b'{"messages": []}', b"[" * 200_000],
)
async def test_a_malformed_body_is_refused_in_anthropics_form(raw: bytes) -> None:
    async with stub() as client:
        response = await client.post("/v1/messages", data=raw)
        assert await error_of(response) == (400, "invalid_request_error")


async def test_an_unknown_path_is_refused_in_anthropics_form() -> None:
    async with stub() as client:
        assert await error_of(await client.get("/v1/nothing")) == (404, "not_found_error")
        assert (await error_of(await client.get("/v1/messages")))[0] == 405


async def test_a_body_of_many_megabytes_is_taken() -> None:
    async with stub() as client:
        response = await client.post("/v1/messages", json=body("x" * 20_000_000, stream=False))
        assert response.status == 200
        assert "20000000 characters" in (await response.json())["content"][0]["text"]


async def test_the_small_endpoints_answer() -> None:
    async with stub() as client:
        assert (await client.get("/health")).status == 200
        assert (await client.get("/api/hello")).status == 200
        assert (await client.head("/api/hello")).status == 200
        counted = await client.post("/v1/messages/count_tokens", json=body("x" * 4000))
        assert 1000 <= (await counted.json())["input_tokens"] <= 1100


async def test_sigterm_ends_the_service_at_once_while_a_stream_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"from claude_jobs.model_stub import run; run({port})",
        cwd=APP,
    )
    try:
        async with asyncio.timeout(20), aiohttp.ClientSession() as session:
            response = await _post_when_up(session, f"http://127.0.0.1:{port}/v1/messages")
            assert response.status == 200
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(2):
                assert await process.wait() == 0
            response.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _post_when_up(session: aiohttp.ClientSession, url: str) -> aiohttp.ClientResponse:
    while True:
        try:
            return await session.post(url, json=body("stall"))
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.05)
