"""What a schema cannot say: which sessions there are, and what the agent is to answer."""

import uuid
from typing import Any

import schemathesis
from schemathesis import Case, HookContext

_WELL_ENDED = "two results"  # see fake_claude


@schemathesis.hook
def before_call(_: HookContext, case: Case[Any], __: object) -> None:
    if case.operation.definition.raw.get("operationId") != "execute":
        return
    body = case.body
    if not isinstance(body, dict) or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    # One key for every body would only ever find that it is taken.
    if case.headers.pop("Idempotency-Key", None):
        case.headers["Idempotency-Key"] = uuid.uuid4().hex
        case.headers["Prefer"] = "respond-async"
    # No session has an id that was drawn by lot; tests of sessions resume real ones.
    body.pop("resumeSessionId", None)
    prompt = body["prompt"]
    if isinstance(prompt, str) and len(prompt) < 10_000:
        body["prompt"] = f"{prompt}\n{_WELL_ENDED}"
