"""The API's tokens: many, each with a name and limits of its own, and changed without a gap."""

import asyncio
import contextlib
import json
import re
from collections.abc import Mapping
from datetime import timedelta

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pool_client import appears, running_pool

from claude_jobs.api_tokens import Client, parse_api_tokens
from claude_jobs.contract.base import now
from claude_jobs.gateway.auth import CLIENT, bearer_auth
from claude_jobs.gateway.errors import error_form

TOKEN, OTHER = "a-token-of-a-client", "another-token-of-a-client"
CHANGING = {
    "token": TOKEN,
    "previousToken": "the-token-of-before",
    "previousUntil": "2026-12-01T12:00:00+00:00",
}


def parsed(**entries: object) -> list[Client]:
    return [token.client for token in parse_api_tokens(json.dumps(entries))]


def test_a_token_is_a_string_or_an_object_with_limits() -> None:
    assert parsed(
        me=TOKEN,
        team_1={"token": OTHER, "maxRunning": 2, "maxQueued": 1},
        CI={"token": "a-third-token-of-a-client", "maxRunning": None},
    ) == [Client("me"), Client("team_1", 2, 1), Client("CI")]


def test_no_token_at_all_is_no_error_of_form() -> None:
    assert parse_api_tokens("") == parse_api_tokens(" \n") == parse_api_tokens("{}") == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TOKEN, "is no JSON; give {"),
        (f'{{"me": "{TOKEN}"', "is no JSON; give {"),
        ("[" * 100_000, "is no JSON; give {"),
        (f'["{TOKEN}"]', "is no JSON object; give {"),
        ("null", "is no JSON object; give {"),
        (f'{{"me": "{TOKEN}", "me": "{OTHER}"}}', "a name or a field occurs twice"),
        *(
            (json.dumps({name: TOKEN}), f"the name {name!r} is not allowed; use 1 to 64")
            for name in ("", "a b", "a.b", "a*", "a>", "é", "a\n", "x" * 65)
        ),
        *(
            (json.dumps({"ci": value}), "the entry 'ci' has no token that is a string")
            for value in (None, 5, [TOKEN], {}, {"maxRunning": 1}, {"token": [TOKEN]})
        ),
        (json.dumps({"ci": {"token": TOKEN, TOKEN: 1}}), "the entry 'ci' has an unknown field"),
        (json.dumps({"ci": TOKEN[:15]}), "the token of the entry 'ci' has fewer than 16"),
        *(
            (json.dumps({"ci": token}), "the token of the entry 'ci' has white space or a")
            for token in (f"{TOKEN} ", f"{TOKEN}\n", f"{TOKEN}é", f"{TOKEN}\ud800", "\0" * 16)
        ),
        *(
            (
                json.dumps({"ci": {"token": TOKEN, "maxRunning": limit}}),
                "maxRunning of the entry 'ci' is not a whole number of 1 or more",
            )
            for limit in (0, -1, 1.5, 2.0, True, "2", [2])
        ),
        (
            json.dumps({"ci": {"token": TOKEN, "maxQueued": 0}}),
            "maxQueued of the entry 'ci' is not a whole number of 1 or more",
        ),
        (json.dumps({"a": TOKEN, "b": OTHER, "c": TOKEN}), "the entries 'a' and 'c' have the same"),
        (
            json.dumps({"a": {**CHANGING, "previousToken": OTHER}, "b": OTHER}),
            "the entries 'a' and 'b' have the same",
        ),
        *(
            (
                json.dumps({"ci": {**CHANGING, "previousUntil": until}}),
                "previousUntil of the entry 'ci' is no time with its zone",
            )
            for until in (None, "", "tomorrow", 5, "2026-12-01T12:00:00")
        ),
        (
            json.dumps({"ci": {"token": TOKEN, "previousUntil": "2026-12-01T12:00:00+00:00"}}),
            "the entry 'ci' has no previousToken that is a string",
        ),
        (
            json.dumps({"ci": {"token": TOKEN, "previousToken": OTHER}}),
            "previousUntil of the entry 'ci' is no time with its zone",
        ),
        (
            json.dumps({"ci": {**CHANGING, "previousToken": OTHER[:15]}}),
            "the previousToken of the entry 'ci' has fewer than 16",
        ),
    ],
)
def test_a_wrong_entry_is_named_and_no_token_is_shown(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as refused:
        parse_api_tokens(text)
    assert TOKEN[:15] not in str(refused.value)
    assert OTHER not in str(refused.value)


async def shown(
    entries: Mapping[str, object], token: str | None, *, allow_anonymous: bool = False
) -> tuple[int, str]:
    """Ask a server with these tokens who we are; returns the status and the answer."""

    async def who(request: web.Request) -> web.Response:
        return web.Response(text=repr(request[CLIENT]))

    tokens = parse_api_tokens(json.dumps(entries))
    auth = bearer_auth(tokens, allow_anonymous=allow_anonymous)
    app = web.Application(middlewares=[error_form, auth])
    app.add_routes([web.get("/", who)])
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with TestClient(TestServer(app)) as client, client.get("/", headers=headers) as answer:
        return answer.status, await answer.text()


@pytest.mark.asyncio(loop_scope="session")
async def test_a_client_is_known_by_its_token_with_its_limits() -> None:
    entries = {"me": TOKEN, "team": {"token": OTHER, "maxRunning": 2, "maxQueued": 10}}
    assert await shown(entries, TOKEN) == (200, repr(Client("me")))
    assert await shown(entries, OTHER) == (200, repr(Client("team", 2, 10)))


@pytest.mark.asyncio(loop_scope="session")
async def test_an_old_and_a_new_token_are_both_good_until_the_old_one_is_taken_away() -> None:
    entries = {"team": TOKEN, "team-2": OTHER}
    assert [(await shown(entries, token))[0] for token in (TOKEN, OTHER)] == [200, 200]
    del entries["team"]
    assert [(await shown(entries, token))[0] for token in (TOKEN, OTHER)] == [401, 200]


@pytest.mark.asyncio(loop_scope="session")
async def test_the_token_of_before_is_the_same_client_until_its_time_is_over() -> None:
    soon = (now() + timedelta(minutes=1)).isoformat()
    entry = {"token": TOKEN, "previousToken": OTHER, "previousUntil": soon, "maxRunning": 2}
    for token in (TOKEN, OTHER):
        assert await shown({"team": entry}, token) == (200, repr(Client("team", 2)))
    entry["previousUntil"] = (now() - timedelta(seconds=1)).isoformat()
    assert [(await shown({"team": entry}, token))[0] for token in (TOKEN, OTHER)] == [200, 401]


@pytest.mark.asyncio(loop_scope="session")
async def test_where_everybody_may_come_in_a_token_still_says_who_comes() -> None:
    entries = {"team": {"token": TOKEN, "maxRunning": 2}}
    assert await shown({}, None, allow_anonymous=True) == (200, repr(Client("anonymous")))
    assert await shown(entries, None, allow_anonymous=True) == (200, repr(Client("anonymous")))
    assert await shown(entries, TOKEN, allow_anonymous=True) == (200, repr(Client("team", 2)))
    assert (await shown(entries, OTHER, allow_anonymous=True))[0] == 401
    assert (await shown(entries, None))[0] == 401


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.timeout(90)
async def test_a_job_runs_on_while_its_token_is_replaced() -> None:
    async with running_pool(replicas=1) as pool:
        prompt = "run touch started; until [ -e go ]; do sleep 0.05; done; touch finished"
        async with pool.job(prompt) as stream:
            connected = await stream.until("connected")
        await appears(pool.workspace / "started")
        supervisor = pool.replica(connected)

        # As a new version of the secret does: the gateway starts anew with it, and nothing else.
        secret = pool.pool.root / "secrets" / "api_tokens"
        secret.write_text(json.dumps({"new": {"token": OTHER, "maxRunning": 1}}))
        pool.pool.processes["gateway"].terminate()
        await pool.pool.processes["gateway"].wait()

        job = stream.response.headers["Location"]
        async with httpx.AsyncClient(
            base_url=pool.pool.url, headers={"Authorization": f"Bearer {OTHER}"}, trust_env=False
        ) as http:
            record = await answered(http, job)
            assert record["status"] == "running"
            (pool.workspace / "go").touch()
            while (record := await answered(http, job))["status"] == "running":
                await asyncio.sleep(0.05)
        assert record["status"] == "completed", record
        # The name on a job is that of the token that it was submitted with.
        assert (record["client"], record["attempt"]) == ("development", 1)
        assert (pool.workspace / "finished").exists()
        await asyncio.wait_for(supervisor.wait(), 10)
        assert supervisor.returncode == 0
        assert (await pool.http.get(job)).status_code == 401


async def answered(http: httpx.AsyncClient, path: str) -> dict[str, object]:
    """Get `path` from a gateway that may just be starting."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            response = await http.get(path)
            if response.status_code != 503:
                assert response.status_code == 200, response.text
                return dict(response.json())
        await asyncio.sleep(0.05)
