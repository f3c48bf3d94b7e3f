"""What a run of Claude Code came to.

Success is a `result` line with `is_error: false`: neither the exit code nor `subtype` tells
(a refused key ends with `subtype: success`).
"""

import signal
from typing import Any

from claude_jobs.contract.event import Completed, Failed, FailureCode, TerminalEvent

# Tries after which a refused key is taken for refused. The CLI alone would go on for minutes.
_REFUSALS_BELIEVED = 3
_REFUSED_STATUSES = {401, 403}
# The broker takes messages of 8 MB; the `message` events before hold the text as it was.
_MAX_RESULT_CHARACTERS = 1_000_000


class AgentKilledError(Exception):
    """Somebody killed the agent (SIGKILL): the kernel for want of memory, or an operator."""


def outcome(
    result: dict[str, Any] | None, *, session_id: str, exit_code: int | None, stderr: str
) -> TerminalEvent:
    """Turn the last `result` line, or its absence, into the job's terminal event.

    Raises `AgentKilledError` where the job did not come to any end.
    """
    if result is None:
        if exit_code == -signal.SIGKILL:
            raise AgentKilledError
        how = "by itself" if exit_code is None else f"with exit code {exit_code}"
        said = f": {stderr}" if stderr else ""
        return Failed(
            code=FailureCode.AGENT_ERROR,
            error=f"Claude Code ended {how} and without a result{said}",
            session_id=session_id,
        )
    session_id = result.get("session_id") or session_id
    if result.get("is_error") is False:
        return Completed(
            result=_bounded(str(result.get("result") or "")),
            session_id=session_id,
            usage=result.get("usage") or {},
            cost_usd=float(result.get("total_cost_usd") or 0),
            num_turns=int(result.get("num_turns") or 0),
            duration_ms=int(result.get("duration_ms") or 0),
            permission_denials=result.get("permission_denials") or [],
        )
    text = _reason(result)
    refused = result.get("api_error_status") in _REFUSED_STATUSES or text.startswith(
        "Not logged in"
    )
    return Failed(
        code=FailureCode.CREDENTIALS if refused else FailureCode.AGENT_ERROR,
        error=text,
        session_id=session_id,
    )


def refuses_credentials(frame: dict[str, Any]) -> bool:
    """Tell whether this line says that the credentials were refused again and again."""
    return (
        frame.get("subtype") == "api_retry"
        and frame.get("error_status") in _REFUSED_STATUSES
        and int(frame.get("attempt") or 0) >= _REFUSALS_BELIEVED
    )


def _bounded(text: str) -> str:
    if len(text) <= _MAX_RESULT_CHARACTERS:
        return text
    return f"{text[:_MAX_RESULT_CHARACTERS]}… [cut: {len(text)} characters in all]"


def _reason(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    if isinstance(errors, list) and errors:
        return _bounded("; ".join(str(error) for error in errors))
    text = result.get("result")
    if isinstance(text, str) and text.strip():
        return _bounded(text.strip())
    return f"Claude Code reports {result.get('subtype') or 'an error'}"
