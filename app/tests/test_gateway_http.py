"""Who may come in, and what the gateway says to what it cannot serve."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from pool_client import RunningPool

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(30)]


async def refused(pool: RunningPool, **body: Any) -> str:
    """Post what is no request and return the sentence that comes back."""
    code, said, _ = await pool.refusal(method="POST", url="/api/execute", **body)
    assert (code, said["code"]) == (400, "invalid_request")
    return str(said["error"])


@pytest.mark.parametrize("body", [b"", b"   ", b"hello", b'{"prompt": "x"', b"\xff\xfe", b"{}x"])
async def test_a_body_that_is_no_json_is_refused(pool: RunningPool, body: bytes) -> None:
    assert "the body is not JSON" in await refused(pool, content=body)


@pytest.mark.parametrize("body", [[], [{"prompt": "x"}], "x", 1, None])
async def test_json_that_is_no_object_is_refused(pool: RunningPool, body: object) -> None:
    said = await refused(pool, content=json.dumps(body).encode())
    assert said == "the body must be a JSON object"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt: this field is required"),
        ({"prompt": ""}, "prompt: must not be empty"),
        ({"prompt": " \n"}, "prompt: must not be empty"),
        ({"prompt": 5}, "prompt: input should be a valid string"),
        ({"prompt": None}, "prompt: input should be a valid string"),
        ({"prompt": "x", "maxTurns": "3"}, "maxTurns: input should be a valid integer"),
        ({"prompt": "x", "maxTurns": 0}, "maxTurns: input should be greater than or equal to 1"),
        ({"prompt": "x", "timeoutSeconds": 3601}, "timeoutSeconds: must not exceed this server's"),
        ({"prompt": "x", "promt": "y"}, "promt: there is no such field"),
        ({"prompt": "x", "max_turns": 3}, "max_turns: there is no such field"),
        ({"prompt": "x", "model": "--help"}, "model: string should match pattern"),
        ({"prompt": "x", "allowedTools": ["--x"]}, "allowedTools.0: string should match pattern"),
        (
            {"prompt": "x", "permissionMode": "sudo"},
            "permissionMode: input should be 'accept",
        ),
        ({"prompt": "x", "workspace": "../x"}, "workspace: must be a relative path inside"),
        ({"prompt": "x", "workspace": "a/../../x"}, "workspace: must be a relative path inside"),
        ({"prompt": "x", "workspace": "/etc"}, "workspace: must be a relative path inside"),
        ({"prompt": "x", "workspace": "a\0b"}, "workspace: must be a relative path inside"),
        ({"prompt": "x", "workspace": "a" * 300}, "workspace: must not have a part of over"),
    ],
)
async def test_a_wrong_field_is_named(
    pool: RunningPool, body: dict[str, object], said: str
) -> None:
    assert (await refused(pool, json=body)).startswith(said)


async def test_a_workspace_that_leaves_by_a_link_is_refused(pool: RunningPool) -> None:
    (pool.workspace / "way-out").symlink_to("/etc")
    (pool.workspace / "loop").symlink_to("loop")
    (pool.workspace / "file").touch()
    for workspace, said in (
        ("way-out", "leaves the workspace"),
        ("way-out/ssh", "leaves the workspace"),
        ("file", "is no directory"),
        ("file/below", "is no directory"),
        ("loop", "'loop' "),
    ):
        sentence = await refused(pool, json={"prompt": "x", "workspace": workspace})
        assert sentence.startswith("workspace: ")
        assert said in sentence
        assert str(pool.workspace) not in sentence


async def test_ten_megabytes_are_too_large(pool: RunningPool) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()

    async def in_pieces() -> Any:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    for content in (body, in_pieces()):
        code, said, _ = await pool.refusal(method="POST", url="/api/execute", content=content)
        assert (code, said["code"]) == (413, "too_large")
        assert "bytes" in said["error"]


async def test_nothing_of_a_refused_request_is_left(pool: RunningPool) -> None:
    await refused(pool, json={"prompt": "create a file called half-done.txt", "extra": 1})
    status = await pool.status()
    assert status["queue"]["depth"] == 0
    assert not (pool.workspace / "half-done.txt").exists()


@pytest.fixture
def tokens(pool: RunningPool) -> Iterator[dict[str, str]]:
    token = pool.pool.token
    yield {
        "none": "",
        "empty": "Bearer",
        "another": "Bearer " + "x" * len(token),
        "a part": f"Bearer {token[:-1]}",
        "more": f"Bearer {token}x",
        "another scheme": f"Basic {token}",
        "no scheme": token,
        "no text": "Bearer \udcff\udcfe",
    }


async def test_nobody_comes_in_without_a_known_token(
    pool: RunningPool, tokens: dict[str, str]
) -> None:
    async with httpx.AsyncClient(base_url=pool.pool.url, trust_env=False) as stranger:
        for kind, header in tokens.items():
            sent = {"Authorization": header.encode(errors="surrogateescape")} if header else {}
            for method, path in (
                ("GET", "/status"),
                ("POST", "/api/execute"),
                ("GET", "/nothing"),
            ):
                response = await stranger.request(method, path, headers=sent)  # type: ignore[arg-type] # bytes are taken
                assert response.status_code == 401, (kind, path)
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert response.json()["code"] == "unauthorized"
                assert pool.pool.token not in response.text


async def test_the_scheme_may_be_written_in_any_case(pool: RunningPool) -> None:
    headers = {"Authorization": f"bEARER  {pool.pool.token}"}
    assert (await pool.http.get("/status", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_health_and_readiness_are_open(pool: RunningPool, path: str) -> None:
    async with httpx.AsyncClient(base_url=pool.pool.url, trust_env=False) as stranger:
        assert (await stranger.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/", "/nothing", "/api/execute/", "/{curly}", "/%ff"])
async def test_an_unknown_path_is_not_found(pool: RunningPool, path: str) -> None:
    code, said, _ = await pool.refusal(method="GET", url=path)
    assert (code, said["code"]) == (404, "not_found")
    assert said["error"].startswith("there is nothing at ")


async def test_a_wrong_method_is_told_the_right_one(pool: RunningPool) -> None:
    code, said, headers = await pool.refusal(method="GET", url="/api/execute")
    assert (code, said["code"]) == (405, "method_not_allowed")
    assert headers["Allow"] == "POST"
    code, said, headers = await pool.refusal(method="DELETE", url="/status")
    assert (code, said["code"]) == (405, "method_not_allowed")


async def test_a_replica_takes_no_job_and_names_none(pool: RunningPool) -> None:
    await pool.idle(3)
    environment = psutil.Process(pool.pool.processes["replica-2"].pid).environ()
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{environment['PORT']}", trust_env=False
    ) as neighbour:
        assert (await neighbour.get("/health")).json() == {"status": "ok"}
        assert "jobId" not in (await neighbour.get("/status")).json()
        answer = await neighbour.post("/api/execute", json={"prompt": "x"})
        assert answer.status_code == 404
