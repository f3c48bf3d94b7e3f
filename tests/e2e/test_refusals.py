"""Bad input of a deployment: one clear sentence, and nothing half done."""

import os
import re

import pytest
from deployment import Deployment, Run
from engine import is_manager

SENTENCES = {
    "not JSON": "CLAUDE_CODE_CREDENTIALS_JSON are not JSON. Give",
    "unknown form": "CLAUDE_CODE_CREDENTIALS_JSON have an unknown form. Give exactly one of",
    "empty key": "CLAUDE_CODE_CREDENTIALS_JSON hold an empty apiKey.",
}


@pytest.mark.parametrize("case", SENTENCES)
def test_credentials_that_cannot_work_are_refused_in_words(
    refusals: dict[str, Run], case: str
) -> None:
    run = refusals[case]
    assert run.code != 0
    assert SENTENCES[case] in run.text
    assert run.failed == 1


@pytest.mark.parametrize("case", SENTENCES)
def test_a_refusal_does_not_show_what_was_given(refusals: dict[str, Run], case: str) -> None:
    assert "very-secret" not in refusals[case].output


def test_a_taken_port_is_refused_with_the_name_of_its_holder(refusals: dict[str, Run]) -> None:
    run = refusals["taken port"]
    assert run.code != 0
    assert re.search(rf"is taken by \S+ \(process {os.getpid()}\)", run.text)


def test_a_refusal_leaves_nothing_behind(refusals: dict[str, Run], deployment: Deployment) -> None:
    assert [run.changed for run in refusals.values()] == [0] * len(refusals)
    # A fresh machine has no engine yet, and a refusal brings none.
    if is_manager():
        assert not any(deployment.stack.everything().values())
    assert not deployment.workspace.exists()
    assert not deployment.secrets.exists()
