"""How an agent is started, and what its run is taken for."""

import asyncio
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from agent_runs import Saved
from hypothesis import given
from hypothesis import strategies as st

from claude_jobs.agent.command import AgentUser, as_user, bundled_claude, command_line, environment
from claude_jobs.agent.credentials import FORMS, Credentials, CredentialsError, parse_credentials
from claude_jobs.agent.outcome import outcome, refuses_credentials
from claude_jobs.agent.run import AgentSetup, run_agent
from claude_jobs.agent.transport import _parse
from claude_jobs.contract.event import Completed, Failed, FailureCode, TerminalEvent
from claude_jobs.contract.job import JobRequest

API_KEY = "CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR"
OAUTH = "CLAUDE_CODE_OAUTH_TOKEN_FILE_DESCRIPTOR"
SECRET = "sk-ant-secret"

# Credentials


@pytest.mark.parametrize(
    ("document", "variable", "expires_at"),
    [
        ({"apiKey": SECRET}, API_KEY, None),
        ({"apiKey": f" {SECRET}\n"}, API_KEY, None),
        ({"oauthToken": SECRET}, OAUTH, None),
        ({"claudeAiOauth": {"accessToken": SECRET}}, OAUTH, None),
        (
            {"claudeAiOauth": {"accessToken": SECRET, "expiresAt": 1_000, "refreshToken": "r"}},
            OAUTH,
            datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC),
        ),
    ],
)
def test_credentials_are_taken_in_each_known_form(
    document: dict[str, Any], variable: str, expires_at: datetime | None
) -> None:
    found = parse_credentials(json.dumps(document))
    assert (found.secret, found.variable, found.expires_at) == (SECRET, variable, expires_at)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        (SECRET, "not JSON"),
        (f'{{"apiKey": "{SECRET}"', "not JSON"),
        (f'["{SECRET}"]', "unknown form"),
        (f'"{SECRET}"', "unknown form"),
        ("null", "unknown form"),
        ("{}", "unknown form"),
        (f'{{"key": "{SECRET}"}}', "unknown form"),
        (f'{{"apiKey": "{SECRET}", "oauthToken": "{SECRET}"}}', "unknown form"),
        (f'{{"claudeAiOauth": "{SECRET}"}}', "unknown form"),
        ('{"apiKey": ""}', "empty apiKey"),
        ('{"apiKey": "  "}', "empty apiKey"),
        ('{"apiKey": null}', "empty apiKey"),
        (f'{{"apiKey": ["{SECRET}"]}}', "empty apiKey"),
        ('{"oauthToken": ""}', "empty oauthToken"),
        (f'{{"claudeAiOauth": {{"refreshToken": "{SECRET}"}}}}', "empty claudeAiOauth.accessToken"),
        (
            f'{{"claudeAiOauth": {{"accessToken": "{SECRET}", "expiresAt": "{SECRET}"}}}}',
            "no time in milliseconds",
        ),
        (
            f'{{"claudeAiOauth": {{"accessToken": "{SECRET}", "expiresAt": 1e300}}}}',
            "no time in milliseconds",
        ),
    ],
)
def test_other_credentials_are_refused_without_quoting_them(text: str, said: str) -> None:
    with pytest.raises(CredentialsError) as refused:
        parse_credentials(text)
    assert said in str(refused.value)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None
    if said != "no time in milliseconds" and "empty" not in said:
        assert FORMS in str(refused.value)


def test_credentials_do_not_show_themselves() -> None:
    assert SECRET not in repr(Credentials(SECRET, API_KEY))


def test_a_pipe_holds_the_secret_once() -> None:
    reader = Credentials(SECRET, API_KEY).pipe()
    with os.fdopen(reader) as file:
        assert file.read() == SECRET
        assert file.read() == ""


def no_agent(home: Path) -> AgentSetup:
    return AgentSetup(
        claude=home / "none",
        home=home,
        user=None,
        base_url="",
        max_retries=0,
        max_turns=10,
        idle_timeout=1,
        result_grace=1,
    )


async def test_an_expired_token_ends_the_job_before_it_starts(tmp_path: Path) -> None:
    async def no_line(_: object) -> None:
        pytest.fail("an agent was started")

    ending = await run_agent(
        no_agent(tmp_path),
        Credentials(SECRET, OAUTH, datetime(2020, 1, 1, tzinfo=UTC)),
        JobRequest(prompt="x"),
        session_id="s",
        prompt="x",
        resume=False,
        sessions=Saved(),
        directory=tmp_path,
        time_limit=1,
        on_frame=no_line,
        cancelled=asyncio.Event(),
    )
    assert isinstance(ending, Failed)
    assert ending.code is FailureCode.CREDENTIALS
    assert "2020-01-01" in ending.error


async def test_a_claude_that_is_not_there_ends_the_job(tmp_path: Path) -> None:
    async def no_line(_: object) -> None:
        pytest.fail("an agent was started")

    ending = await run_agent(
        no_agent(tmp_path),
        Credentials(SECRET, OAUTH),
        JobRequest(prompt="x"),
        session_id="s",
        prompt="x",
        resume=False,
        sessions=Saved(),
        directory=tmp_path,
        time_limit=5,
        on_frame=no_line,
        cancelled=asyncio.Event(),
    )
    assert isinstance(ending, Failed)
    assert ending.code is FailureCode.AGENT_ERROR
    assert "No such file" in ending.error


# Command line and environment


def arguments(*, resume: bool = False, trusted: bool = False, **fields: Any) -> list[str]:
    return command_line(
        Path("/bin/claude"),
        JobRequest(prompt="the prompt", **fields),
        "session",
        resume=resume,
        max_turns=10,
        trust_workspace_settings=trusted,
    )


def test_the_prompt_is_no_argument() -> None:
    assert not any("the prompt" in argument for argument in arguments())


def test_settings_and_servers_in_the_workspace_are_obeyed_only_where_trusted() -> None:
    assert {"--setting-sources=user", "--strict-mcp-config"} <= set(arguments())
    trusting = arguments(trusted=True)
    assert "--setting-sources=user,project,local" in trusting
    assert "--strict-mcp-config" not in trusting


def test_a_session_is_begun_or_gone_on_with() -> None:
    assert "--session-id=session" in arguments()
    assert not any(argument.startswith("--resume") for argument in arguments())
    assert "--resume=session" in arguments(resume=True)
    assert not any(argument.startswith("--session-id") for argument in arguments(resume=True))


@pytest.mark.parametrize(("asked", "given"), [(None, 10), (1, 1), (10, 10), (11, 10)])
def test_turns_are_bounded(asked: int | None, given: int) -> None:
    assert f"--max-turns={given}" in arguments(max_turns=asked)


def test_permissions_are_skipped_only_where_asked() -> None:
    skip = "--dangerously-skip-permissions"
    assert skip in arguments()
    assert skip not in arguments(permission_mode="plan")
    assert "--permission-mode=plan" in arguments(permission_mode="plan")
    assert "--permission-mode=default" in arguments(dangerously_skip_permissions=False)


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(
    st.dictionaries(st.sampled_from(sorted(JobRequest.model_fields)), anything | st.lists(anything))
)
def test_no_field_of_a_request_becomes_an_option_of_its_own(fields: dict[str, Any]) -> None:
    known = set(arguments(model="m", append_system_prompt="p", max_turns=1, permission_mode="plan"))
    names = {argument.partition("=")[0] for argument in known} | {
        "--dangerously-skip-permissions",
        "--allowedTools",
        "--disallowedTools",
    }
    try:
        request = JobRequest.model_validate({"prompt": "x", **fields})
    except ValueError:
        return
    started = command_line(
        Path("/bin/claude"),
        request,
        "session",
        resume=False,
        max_turns=10,
        trust_workspace_settings=False,
    )
    assert started[0] == "/bin/claude"
    options = {argument.partition("=")[0] for argument in started if argument.startswith("-")}
    assert options <= names
    values = [argument for argument in started[1:] if not argument.startswith("--")]
    assert len(values) == bool(request.allowed_tools) + bool(request.disallowed_tools)


def test_another_user_gets_no_capability() -> None:
    wrapped = as_user(AgentUser(7, 8), ["claude", "--x"])
    assert wrapped[0] == "setpriv"
    assert wrapped[-3:] == ["--", "claude", "--x"]
    assert {"--reuid=7", "--regid=8", "--clear-groups", "--no-new-privs"} <= set(wrapped)


def test_the_environment_is_made_from_nothing() -> None:
    supervisors = {
        "ANTHROPIC_API_KEY": SECRET,
        "CLAUDE_CODE_CREDENTIALS_JSON": SECRET,
        "BROKER_URL": "nats://x",
        "PYTHONPATH": "/x",
        "HTTPS_PROXY": "http://proxy",
        "TZ": "Europe/Berlin",
    }
    made = environment(
        home=Path("/home/agent"),
        base_url="",
        credentials=(API_KEY, 5),
        max_retries=3,
        inherited=supervisors,
    )
    assert SECRET not in str(made)
    assert supervisors.keys() & made.keys() == {"HTTPS_PROXY", "TZ"}
    assert made[API_KEY] == "5"
    assert made["CLAUDE_CODE_MAX_RETRIES"] == "3"
    assert made["CLAUDE_CONFIG_DIR"].startswith("/home/agent/")
    assert "ANTHROPIC_BASE_URL" not in made


def test_the_pinned_package_brings_the_cli() -> None:
    assert os.access(bundled_claude(), os.X_OK)


# Outcomes


def of(line: dict[str, Any] | None, exit_code: int | None = 0, stderr: str = "") -> TerminalEvent:
    return outcome(line, session_id="ours", exit_code=exit_code, stderr=stderr)


@pytest.mark.parametrize(
    ("sample", "code", "said"),
    [
        ("not_logged_in", FailureCode.CREDENTIALS, "Not logged in"),
        ("invalid_api_key", FailureCode.CREDENTIALS, "Invalid API key"),
        ("overloaded", FailureCode.AGENT_ERROR, "529 Overloaded"),
        ("max_turns", FailureCode.AGENT_ERROR, "Reached maximum number of turns (1)"),
        ("unknown_session", FailureCode.AGENT_ERROR, "No conversation found"),
        ("aborted", FailureCode.AGENT_ERROR, "ede_diagnostic"),
    ],
)
def test_a_recorded_failure_is_known(
    samples: Path, sample: str, code: FailureCode, said: str
) -> None:
    line = json.loads((samples / f"{sample}.json").read_text())
    ending = of(line)
    assert isinstance(ending, Failed)
    assert ending.code is code
    assert said in ending.error
    assert ending.session_id == line["session_id"]


@pytest.mark.parametrize(("sample", "denials"), [("text_result", 0), ("permission_denied", 1)])
def test_a_recorded_success_is_known(samples: Path, sample: str, denials: int) -> None:
    line = json.loads((samples / f"{sample}.json").read_text())
    ending = of(line)
    assert isinstance(ending, Completed)
    assert ending.result == line["result"]
    assert ending.cost_usd == line["total_cost_usd"] > 0
    assert ending.num_turns == line["num_turns"]
    assert ending.duration_ms == line["duration_ms"]
    assert ending.usage == line["usage"]
    assert len(ending.permission_denials) == denials


@pytest.mark.parametrize("is_error", [True, None, 0, "false"])
def test_only_a_clear_success_is_one(is_error: object) -> None:
    assert isinstance(of({"type": "result", "subtype": "success", "is_error": is_error}), Failed)
    assert isinstance(of({"type": "result", "subtype": "success"}), Failed)


def test_a_bare_success_is_enough() -> None:
    ending = of({"is_error": False})
    assert isinstance(ending, Completed)
    assert (ending.result, ending.session_id, ending.num_turns) == ("", "ours", 0)


@pytest.mark.parametrize(
    ("exit_code", "stderr", "said"),
    [
        (137, "", "Claude Code ended with exit code 137 and without a result"),
        (1, "oops", "Claude Code ended with exit code 1 and without a result: oops"),
        (None, "", "Claude Code ended by itself and without a result"),
    ],
)
def test_an_end_without_a_result_is_a_failure(
    exit_code: int | None, stderr: str, said: str
) -> None:
    assert of(None, exit_code, stderr) == Failed(
        code=FailureCode.AGENT_ERROR, error=said, session_id="ours"
    )


def test_a_huge_result_is_cut() -> None:
    ending = of({"is_error": False, "result": "x" * 1_000_001})
    assert isinstance(ending, Completed)
    assert ending.result.endswith("… [cut: 1000001 characters in all]")


@pytest.mark.parametrize(("attempt", "believed"), [(1, False), (2, False), (3, True), (9, True)])
def test_a_refusal_is_believed_at_the_third_time(
    samples: Path, attempt: int, believed: bool
) -> None:
    retry = json.loads((samples / "api_retry_401.json").read_text())
    assert refuses_credentials(retry | {"attempt": attempt}) is believed
    assert not refuses_credentials(retry | {"attempt": attempt, "error_status": 529})
    assert not refuses_credentials({"type": "assistant"})


# Lines


@pytest.mark.parametrize("line", [b"", b"a note", b"[1]", b"1", b'{"half', b"\xff", b"null"])
def test_a_line_that_is_no_object_is_passed_over(line: bytes) -> None:
    assert _parse(line) is None


@given(st.dictionaries(anything, st.none() | anything | st.floats(allow_nan=False)))
def test_a_line_is_read_as_it_was_printed(frame: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        assert _parse(json.dumps(frame, ensure_ascii=ascii_only).encode()) == frame


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert _parse(rb'{"a": "\ud83d\ude00\uD83D", "b": "\\ud83d"}') == {"a": "😀?", "b": "\\ud83d"}
