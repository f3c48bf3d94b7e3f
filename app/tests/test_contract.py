"""What crosses the boundaries: requests, jobs, events, records."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from claude_jobs.contract.base import now
from claude_jobs.contract.error import HTTP_STATUS, ErrorCode, RequestRefusedError
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Event,
    Failed,
    FailureCode,
    Message,
    Queued,
    is_terminal,
    parse_event,
)
from claude_jobs.contract.job import (
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    TERMINAL_STATUSES,
    Job,
    JobRecord,
    JobRequest,
    JobStatus,
    PermissionMode,
)

COMPLETED = Completed(
    result="done",
    session_id="s",
    usage={"input_tokens": None},
    cost_usd=0.5,
    num_turns=2,
    duration_ms=7,
    permission_denials=[],
)
FAILED = Failed(code=FailureCode.TIMEOUT, error="too long")


def request(**fields: Any) -> JobRequest:
    return JobRequest.model_validate_json(json.dumps({"prompt": "x", **fields}))


def nested(depth: int) -> dict[str, Any]:
    return {"in": nested(depth - 1)} if depth > 1 else {}


def test_a_prompt_is_all_that_a_request_needs() -> None:
    asked = request()
    assert asked.workspace == "."
    assert asked.effective_permission_mode is PermissionMode.BYPASS
    assert asked.metadata == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "\n\t "},
        {"prompt": "x" * 1_000_001},
        {"prompt": ["x"]},
        {"unknown": 1},
        {"workspace": "../x"},
        {"workspace": "x/../../y"},
        {"workspace": "/"},
        {"workspace": "x\0"},
        {"workspace": "x" * 256},
        {"workspace": "x/" * 600},
        {"model": "-x"},
        {"model": "x y"},
        {"model": "x\n"},
        {"model": ""},
        {"maxTurns": 0},
        {"maxTurns": True},
        {"maxTurns": 1.5},
        {"maxTurns": "1"},
        {"timeoutSeconds": 0},
        {"timeoutSeconds": -1},
        {"timeoutSeconds": 604_801},
        {"permissionMode": "root"},
        {"dangerouslySkipPermissions": "yes"},
        {"allowedTools": "Bash"},
        {"allowedTools": ["--dangerously-skip-permissions"]},
        {"allowedTools": ["Bash\n"]},
        {"disallowedTools": ["\0"]},
        {"disallowedTools": [""]},
        {"appendSystemPrompt": "a\0b"},
        {"appendSystemPrompt": "x" * 32_001},
        {"metadata": []},
        {"metadata": {"x": "y" * MAX_METADATA_BYTES}},
        {"metadata": nested(MAX_METADATA_DEPTH + 1)},
    ],
)
def test_what_is_no_request_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**fields)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValidationError):
        JobRequest.model_validate_json(b'{"prompt": "\\ud800"}')


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, PermissionMode.BYPASS),
        ({"dangerouslySkipPermissions": True}, PermissionMode.BYPASS),
        ({"dangerouslySkipPermissions": False}, PermissionMode.DEFAULT),
        ({"permissionMode": "plan"}, PermissionMode.PLAN),
        ({"permissionMode": "plan", "dangerouslySkipPermissions": False}, PermissionMode.PLAN),
        ({"permissionMode": "bypassPermissions"}, PermissionMode.BYPASS),
        (
            {"permissionMode": "bypassPermissions", "dangerouslySkipPermissions": True},
            PermissionMode.BYPASS,
        ),
    ],
)
def test_permission_options_that_agree_give_one_mode(
    fields: dict[str, Any], mode: PermissionMode
) -> None:
    asked = request(**fields)
    assert asked.effective_permission_mode is mode
    taken = Job.model_validate_json(Job.accept(asked, client="c").to_json())
    assert taken.request.effective_permission_mode is mode


@pytest.mark.parametrize(
    "fields",
    [
        {"permissionMode": "plan", "dangerouslySkipPermissions": True},
        {"permissionMode": "default", "dangerouslySkipPermissions": True},
        {"permissionMode": "bypassPermissions", "dangerouslySkipPermissions": False},
    ],
)
def test_permission_options_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="contradict"):
        request(**fields)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
requests = st.fixed_dictionaries(
    {"prompt": text.filter(lambda prompt: prompt.strip())},
    optional={
        "workspace": st.sampled_from([".", "a", "a/b", "./a//b/", "-x", "ä ö"]),
        "model": st.sampled_from(["opus", "claude-x[1m]", "a:b/c@d.e_f"]),
        "maxTurns": st.integers(1, 10_000),
        "timeoutSeconds": st.integers(1, 604_800),
        "permissionMode": st.sampled_from(list(PermissionMode)),
        "allowedTools": st.lists(st.sampled_from(["Bash", "Bash(git log:*)", "mcp__x"])),
        "disallowedTools": st.lists(st.sampled_from(["Write", "Edit"])),
        "appendSystemPrompt": text.filter(lambda prompt: "\0" not in prompt),
        "metadata": st.dictionaries(text, json_values, max_size=3),
    },
)


@given(requests)
def test_every_accepted_request_reaches_a_replica_as_it_was(fields: dict[str, Any]) -> None:
    job = Job.accept(request(**fields), client="c")
    assert Job.model_validate_json(job.to_json()) == job
    assert job.request.metadata == fields.get("metadata", {})


def test_the_deepest_metadata_reaches_a_replica() -> None:
    job = Job.accept(request(metadata=nested(MAX_METADATA_DEPTH)), client="c")
    assert Job.model_validate_json(job.to_json()) == job


def test_ids_sort_by_time_of_acceptance() -> None:
    jobs = [Job.accept(request(), client="c") for _ in range(100)]
    assert [job.id for job in jobs] == sorted({job.id for job in jobs})


@given(st.dictionaries(text, json_values))
def test_a_line_is_passed_on_untouched(content: dict[str, Any]) -> None:
    message = Message(content=content, timestamp=now())
    assert json.loads(message.to_json())["content"] == content
    assert parse_event(message.to_json()) == message


@pytest.mark.parametrize(
    "event",
    [
        Queued(job_id="j", position=1),
        Connected(job_id="j", session_id="s", replica="r", node="n", attempt=2),
        Message(content={"type": "x", "nothing": None}, timestamp=now()),
        COMPLETED,
        FAILED,
    ],
)
def test_an_event_is_read_as_it_was_written(event: Event) -> None:
    written = json.loads(event.to_json())
    assert written["type"] == event.type
    assert not any("_" in name for name in written)
    assert parse_event(event.to_json()) == event
    assert is_terminal(event) is (event.type in {"completed", "error"})


def test_what_is_not_set_is_left_out() -> None:
    assert "sessionId" not in json.loads(FAILED.to_json())


def test_an_unknown_event_is_no_event() -> None:
    with pytest.raises(ValidationError):
        parse_event(b'{"type": "surprise"}')


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (COMPLETED, JobStatus.COMPLETED),
        (FAILED, JobStatus.FAILED),
        (Failed(code=FailureCode.CANCELLED, error="stopped"), JobStatus.CANCELLED),
    ],
)
def test_a_record_sums_up_how_its_job_ended(ending: Completed | Failed, status: JobStatus) -> None:
    record = JobRecord.queued(Job.accept(request(), client="c"))
    assert record.status is JobStatus.QUEUED
    ended = record.ended(ending)
    assert ended.status is status
    assert status in TERMINAL_STATUSES
    assert ended.ended_at is not None
    assert (ended.result, ended.error) == (
        ("done", None) if isinstance(ending, Completed) else (None, ending.error)
    )
    assert JobRecord.model_validate_json(ended.to_json()) == ended


def test_every_error_code_has_its_status() -> None:
    assert HTTP_STATUS.keys() == set(ErrorCode)
    refusal = RequestRefusedError(ErrorCode.QUEUE_FULL, "full", retry_after=3)
    assert (refusal.status, refusal.retry_after) == (429, 3)
    assert json.loads(refusal.body.to_json()) == {"error": "full", "code": "queue_full"}
