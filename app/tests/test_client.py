"""What the Python client promises when things go wrong, against an API that fails on purpose.

What it does with a real pool is in `test_client_with_pool.py`.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from aiohttp import web
from cutting_proxy import cutting_proxy
from scripted_api import hangs_up, refuses, says, scripted_api, streams

from claude_jobs.client import ApiError, Client, ClientError, JobEvent, JobFailedError
from claude_jobs.client import UnreachableError as Unreachable
from claude_jobs.contract.event import Connected
from claude_jobs.development import free_port

pytestmark = pytest.mark.timeout(30)

TOKEN = "a-token-of-a-test"
RECORD = {
    "id": "j",
    "status": "queued",
    "prompt": "hello",
    "workspace": ".",
    "client": "test",
    "createdAt": "2026-01-01T00:00:00Z",
    "aFieldOfTheFuture": {"x": 1},
}
RETRY = "retry: 10\n\n"


def sent(number: int | None, kind: str, **data: Any) -> str:
    """Write an event as it stands in a stream."""
    place = "" if number is None else f"id: {number}\n"
    return f"{place}event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def said(number: int, text: str) -> str:
    message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return sent(number, "message", content={"type": "assistant", "message": message})


END = sent(9, "completed", result="well", sessionId="s", numTurns=2, costUsd=0.5)


async def received(url: str, after: int = 0, **options: Any) -> list[JobEvent]:
    async with Client(url, TOKEN, **options) as client:
        return [event async for event in client.events("j", after)]


# Submission


async def test_a_job_is_submitted_once_although_the_answer_was_lost() -> None:
    async with (
        scripted_api(hangs_up(), hangs_up(), says(202, RECORD)) as api,
        Client(api.url, TOKEN) as client,
    ):
        job = await client.submit("hello", max_turns=3, allowed_tools=["Read"])
    assert job.id == "j"
    keys = {request.headers["Idempotency-Key"] for request in api.requests}
    assert len(api.requests) == 3
    assert len(keys) == 1
    assert len(set(api.bodies)) == 1
    assert json.loads(api.bodies[0]) == {
        "prompt": "hello",
        "maxTurns": 3,
        "allowedTools": ["Read"],
    }
    assert api.requests[0].headers["Prefer"] == "respond-async"
    assert api.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


async def test_each_submission_has_a_key_of_its_own() -> None:
    async with scripted_api(says(202, RECORD)) as api, Client(api.url, TOKEN) as client:
        await client.submit("hello")
        await client.submit("hello")
    assert len({request.headers["Idempotency-Key"] for request in api.requests}) == 2


async def test_a_full_queue_is_waited_for_as_long_as_it_asks() -> None:
    started = monotonic()
    waits: list[float] = []
    async with (
        scripted_api(refuses(429, "queue_full", Retry_After="1"), says(202, RECORD)) as api,
        Client(api.url, TOKEN, notify=lambda _, seconds: waits.append(seconds)) as client,
    ):
        await client.submit("hello")
    assert monotonic() - started >= 1
    assert len(waits) == 1


async def test_a_wait_beyond_the_callers_patience_is_not_begun() -> None:
    started = monotonic()
    async with (
        scripted_api(refuses(429, "queue_full", Retry_After="60")) as api,
        Client(api.url, TOKEN) as client,
    ):
        with pytest.raises(ApiError) as refused:
            await client.submit("hello", give_up_after=5)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert refused.value.sentence == "it is so"
    assert refused.value.retry_after == 60
    assert monotonic() - started < 5
    assert len(api.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 500])
async def test_what_no_wait_can_change_is_raised_at_once(status: int) -> None:
    async with scripted_api(refuses(status, "x")) as api, Client(api.url, TOKEN) as client:
        with pytest.raises(ApiError, match="it is so"):
            await client.submit("hello")
    assert len(api.requests) == 1


async def test_an_api_that_is_away_at_first_is_waited_for() -> None:
    waits: list[float] = []
    returns: list[asyncio.Task[None]] = []
    async with scripted_api(says(202, RECORD)) as api, cutting_proxy(api.port) as proxy:

        def notify(_: ClientError, seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                returns.append(asyncio.create_task(proxy.up()))

        proxy.down()
        async with Client(proxy.url, TOKEN, notify=notify) as client:
            assert (await client.submit("hello")).id == "j"
    assert len(waits) == 2


async def test_an_api_that_stays_away_is_given_up() -> None:
    started = monotonic()
    async with Client(f"http://127.0.0.1:{free_port()}", TOKEN, give_up_after=1) as client:
        with pytest.raises(Unreachable, match="cannot be reached"):
            await client.submit("hello")
        with pytest.raises(Unreachable):
            _ = [event async for event in client.events("j")]
    assert monotonic() - started < 10


async def test_what_is_no_api_is_told_in_a_sentence() -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>", content_type="text/html")

    async with scripted_api(page) as api, Client(api.url, TOKEN) as client:
        with pytest.raises(ClientError, match="something else than a JSON object"):
            await client.submit("hello")
        with pytest.raises(ClientError, match="sends no event stream"):
            _ = [event async for event in client.events("j")]


# Cancellation


async def test_a_cancel_whose_answer_was_lost_is_no_conflict() -> None:
    async with (
        scripted_api(hangs_up(), refuses(409, "conflict"), says(200, RECORD)) as api,
        Client(api.url, TOKEN) as client,
    ):
        assert (await client.cancel("j")).id == "j"
    assert [request.method for request in api.requests] == ["POST", "POST", "GET"]


async def test_a_job_that_has_ended_cannot_be_cancelled() -> None:
    async with scripted_api(refuses(409, "conflict")) as api, Client(api.url, TOKEN) as client:
        with pytest.raises(ApiError) as refused:
            await client.cancel("j")
    assert refused.value.code == "conflict"


# Events


async def test_a_broken_stream_is_taken_up_after_the_last_event() -> None:
    async with scripted_api(
        streams(RETRY + said(1, "a") + said(3, "b")[:-1], breaks=True),  # the second is not whole
        streams(RETRY, breaks=True),
        refuses(503, "unavailable", Retry_After="0"),
        streams(said(1, "a") + said(3, "b") + END),
    ) as api:
        events = await received(api.url)
    assert [(event.id, event.type) for event in events] == [
        (1, "message"),
        (3, "message"),
        (9, "completed"),
    ]
    assert [event.text for event in events] == ["a", "b", ""]
    asked = [request.headers["Last-Event-ID"] for request in api.requests]
    assert asked == ["0", "1", "1", "1"]


async def test_a_stream_that_ends_before_the_job_is_taken_up() -> None:
    async with scripted_api(streams(RETRY + said(4, "a")), streams(END)) as api:
        assert [event.id for event in await received(api.url, after=3)] == [4, 9]
    assert [request.headers["Last-Event-ID"] for request in api.requests] == ["3", "4"]


async def test_an_outage_of_the_stream_is_bounded() -> None:
    started = monotonic()
    async with scripted_api(streams(RETRY + said(1, "a")), streams(RETRY)) as api:
        with pytest.raises(Unreachable, match="ended before the job, at id 1"):
            await received(api.url, give_up_after=1)
    assert monotonic() - started < 5
    assert len(api.requests) > 2


async def test_nothing_is_read_after_the_end() -> None:
    async with scripted_api(streams(END + said(10, "more"))) as api:
        assert [event.id for event in await received(api.url)] == [9]


async def test_a_client_that_has_seen_the_end_gets_nothing() -> None:
    async with scripted_api(says(204)) as api:
        assert await received(api.url, after=9) == []


async def test_a_job_that_is_not_known_is_an_error() -> None:
    async with scripted_api(refuses(404, "not_found")) as api:
        with pytest.raises(ApiError, match="not_found"):
            await received(api.url)


async def test_changes_of_position_and_a_gap_are_passed_on() -> None:
    async with scripted_api(
        streams(
            RETRY
            + sent(2, "queued", jobId="j", position=3)
            + sent(None, "queued", jobId="j", position=2)
            + sent(None, "gap", **{"from": 3, "to": 6}),
            breaks=True,
        ),
        streams(sent(None, "gap", **{"from": 3, "to": 6}) + said(7, "a") + END),
    ) as api:
        events = await received(api.url)
    assert [(event.id, event.type) for event in events] == [
        (2, "queued"),
        (None, "queued"),
        (None, "gap"),
        (7, "message"),
        (9, "completed"),
    ]
    assert events[1].data["position"] == 2
    assert api.requests[1].headers["Last-Event-ID"] == "6"


def parts(first: int, content: dict[str, Any], count: int) -> list[str]:
    text = json.dumps(content)
    size = -(-len(text) // count)
    return [
        sent(
            first + index,
            "message",
            timestamp="t",
            content={
                "type": "line_part",
                "index": index,
                "count": count,
                "text": text[index * size : (index + 1) * size],
            },
        )
        for index in range(count)
    ]


async def test_a_line_in_parts_is_joined_even_over_a_broken_connection() -> None:
    content = {"type": "assistant", "message": {"content": [{"type": "text", "text": "é" * 99}]}}
    first, second, third = parts(2, content, 3)
    async with scripted_api(
        streams(RETRY + said(1, "a") + first + second, breaks=True), streams(third + END)
    ) as api:
        events = await received(api.url)
    assert [event.id for event in events] == [1, 4, 9]
    assert events[1].content == content
    assert events[1].text == "é" * 99
    assert api.requests[1].headers["Last-Event-ID"] == "3"


async def test_parts_that_make_no_line_are_passed_on_as_they_came() -> None:
    first, second, third = parts(2, {"type": "x", "y": "z"}, 3)
    async with scripted_api(
        # Its writer died after the second; another goes on. Then the end of a line.
        streams(first + second + sent(5, "recovering", attempt=2, reason="lost") + third + END)
    ) as api:
        events = await received(api.url)
    # The third has an id that was passed already in this made-up log.
    assert [event.id for event in events] == [2, 3, 5, 9]
    assert events[0].content["type"] == "line_part"


async def test_what_this_client_does_not_know_is_passed_on() -> None:
    async with scripted_api(
        streams(
            sent(1, "from_the_future", x=[1])
            + sent(2, "connected", jobId="j", sessionId="s", replica="r", node="n", attempt=1, x=1)
            + sent(3, "error", code="a_new_code", error="so it is")
        )
    ) as api:
        events = await received(api.url)
        assert [event.type for event in events] == ["from_the_future", "connected", "error"]
        assert events[0].parsed() is None
        assert events[0].data["x"] == [1]
        connected = events[1].parsed()
        assert isinstance(connected, Connected)
        assert connected.replica == "r"
        async with Client(api.url, TOKEN) as client:
            with pytest.raises(JobFailedError) as failed:
                await client.result("j")
    assert (failed.value.code, failed.value.sentence) == ("a_new_code", "so it is")


async def test_the_result_is_read_from_the_last_event() -> None:
    async with scripted_api(streams(said(1, "a") + END)) as api, Client(api.url, TOKEN) as client:
        result = await client.result("j")
    assert (result.result, result.session_id, result.num_turns) == ("well", "s", 2)
    assert result.cost_usd == 0.5


async def test_the_result_of_an_old_job_is_read_from_its_record() -> None:
    ended = {"status": "completed", "result": "well", "costUsd": 0.5}
    async with (
        scripted_api(says(204), says(200, {**RECORD, **ended})) as api,
        Client(api.url, TOKEN) as client,
    ):
        result = await client.result("j")
    assert (result.result, result.cost_usd, result.num_turns) == ("well", 0.5, None)


# Lists


async def test_a_list_is_read_page_by_page() -> None:
    pages = [
        {"jobs": [{**RECORD, "id": "3"}, {**RECORD, "id": "2"}], "nextCursor": "2"},
        {"jobs": [{**RECORD, "id": "1"}]},
    ]
    async with (
        scripted_api(*(says(200, page) for page in pages)) as api,
        Client(api.url, TOKEN) as client,
    ):
        assert [job.id async for job in client.jobs(status="queued")] == ["3", "2", "1"]
    assert [request.query.get("cursor") for request in api.requests] == [None, "2"]
    assert {request.query["status"] for request in api.requests} == {"queued"}


async def test_a_limit_ends_a_list() -> None:
    page = {"jobs": [{**RECORD, "id": "2"}, {**RECORD, "id": "1"}], "nextCursor": "1"}
    async with scripted_api(says(200, page)) as api, Client(api.url, TOKEN) as client:
        assert [job.id async for job in client.jobs(limit=3)] == ["2", "1", "2"]
    assert [request.query["limit"] for request in api.requests] == ["3", "1"]


# Files


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_a_download_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192
    source = tmp_path / "source"
    source.write_bytes(content)

    async def file(_: web.Request) -> web.FileResponse:
        return web.FileResponse(source, chunk_size=4096)

    async with scripted_api(file) as api, cutting_proxy(api.port) as proxy:
        proxy.limits = [300_000, 700_000]
        async with Client(proxy.url, TOKEN) as client:
            etag = await client.files.download("a b/c.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert etag
    assert [request.path for request in api.requests] == ["/api/files/a b/c.bin"] * 3
    assert [request.headers.get("If-Range") for request in api.requests] == [None, etag, etag]
    assert names(tmp_path) == ["copy", "source"]


async def test_a_download_of_a_file_that_changed_begins_anew(tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    source.write_bytes(b"a" * 1_000_000)
    other.write_bytes(b"b" * 900_000)

    async def file(_: web.Request) -> web.FileResponse:
        return web.FileResponse(source)

    async def changed(_: web.Request) -> web.FileResponse:
        return web.FileResponse(other)

    async with scripted_api(file, changed) as api, cutting_proxy(api.port) as proxy:
        proxy.limits = [300_000]
        async with Client(proxy.url, TOKEN) as client:
            await client.files.download("f", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == other.read_bytes()


async def test_a_download_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "copy").write_text("before")
    async with scripted_api(refuses(404, "not_found")) as api, Client(api.url, TOKEN) as client:
        with pytest.raises(ApiError):
            await client.files.download("f", tmp_path / "copy")
    assert names(tmp_path) == ["copy"]
    assert (tmp_path / "copy").read_text() == "before"


async def test_a_conditional_upload_is_not_sent_twice(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    entry = {"name": "f", "type": "file", "modifiedAt": "2026-01-01T00:00:00Z"}
    async with scripted_api(hangs_up(), says(201, entry)) as api, Client(api.url, TOKEN) as client:
        with pytest.raises(Unreachable):
            await client.files.upload("f", tmp_path / "f", if_none_match="*")
        assert len(api.requests) == 1
        assert (await client.files.upload("f", tmp_path / "f")).name == "f"
    assert api.bodies[-1] == b"x" * 100


# Access


def test_the_client_loads_no_server() -> None:
    code = (
        "import sys, claude_jobs.client.command_line; "
        "print({m.split('.')[0] for m in sys.modules} & {'aiohttp', 'nats', 'claude_agent_sdk'})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


async def test_the_token_is_found_in_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("CLAUDE_JOBS_TOKEN", "CLAUDE_JOBS_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "claude-jobs").mkdir()
    async with scripted_api(says(200, RECORD)) as api:
        monkeypatch.setenv("CLAUDE_JOBS_URL", api.url)

        async def token_used(**given: Any) -> str | None:
            async with Client(**given) as client:
                await client.job("j")
            return api.requests[-1].headers.get("Authorization")

        assert await token_used() is None
        (tmp_path / "claude-jobs" / "token").write_text("of-the-user\n")
        assert await token_used() == "Bearer of-the-user"
        (tmp_path / "named").write_text("of-the-named-file")
        monkeypatch.setenv("CLAUDE_JOBS_TOKEN_FILE", str(tmp_path / "named"))
        assert await token_used() == "Bearer of-the-named-file"
        monkeypatch.setenv("CLAUDE_JOBS_TOKEN", "of-the-variable")
        assert await token_used() == "Bearer of-the-variable"
        assert await token_used(token_file=tmp_path / "named") == "Bearer of-the-named-file"
        assert await token_used(token="given") == "Bearer given"


@pytest.mark.parametrize(
    ("url", "token", "said"),
    [
        ("localhost:3000", None, "is no address of an API"),
        ("ftp://x", None, "is no address of an API"),
        ("http://x", "two\nlines", "a token is one line"),
        ("http://x", " ", "is empty"),
    ],
)
def test_a_client_that_is_set_up_wrongly_says_so(url: str, token: str | None, said: str) -> None:
    with pytest.raises(ClientError, match=said) as refused:
        Client(url, token)
    assert token is None or token == " " or token not in str(refused.value)
