"""A client reads in one sentence which field is wrong, and how."""

import json

import pytest
from pydantic import ValidationError

from claude_jobs.contract.job import JobRequest
from claude_jobs.gateway.errors import sentence_for


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{}", "prompt: this field is required"),
        ('{"prompt": 1}', "prompt: input should be a valid string"),
        ('{"prompt": ""}', "prompt: must not be empty"),
        ('{"prompt": "x", "y": 1}', "y: there is no such field"),
        ("[]", "the body must be a JSON object"),
        ("1", "the body must be a JSON object"),
        ("null", "the body must be a JSON object"),
        ("", "the body is not JSON: EOF while parsing a value at line 1 column 0"),
        ('{"prompt"}', "the body is not JSON: expected `:` at line 1 column 10"),
        (
            '{"prompt": "x", "allowedTools": ["A", 2]}',
            "allowedTools.1: input should be a valid string",
        ),
        (
            '{"prompt": "x", "permissionMode": "plan", "dangerouslySkipPermissions": true}',
            "dangerouslySkipPermissions and permissionMode contradict each other: give one",
        ),
        ('{"prompt": "x", "metadata": 1}', "metadata: input should be an object"),
    ],
)
def test_the_sentence_names_field_and_fault(body: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        JobRequest.model_validate_json(body)
    assert sentence_for(refused.value) == said


def test_the_sentence_never_quotes_what_was_sent() -> None:
    for field in ("model", "workspace", "permissionMode", "maxTurns", "metadata"):
        with pytest.raises(ValidationError) as refused:
            JobRequest.model_validate_json(json.dumps({"prompt": "x", field: "/%secret%"}))
        assert "secret" not in sentence_for(refused.value)
