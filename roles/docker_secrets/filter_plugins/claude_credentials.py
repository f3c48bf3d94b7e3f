"""Judge Claude credentials by their form, before anything is deployed.

No sentence that comes out of here contains anything of what went in: it ends up on screens and in logs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

_FORMS = (
    '{"apiKey": "..."}, {"oauthToken": "..."} or {"claudeAiOauth": {"accessToken": "...", "expiresAt": <milliseconds>}}'
)
_HOUR = 3600.0


def _problem_of_key(form: str, value: object) -> str:
    if not isinstance(value, str):
        return f"do not have a string as their {form}."
    if not value.strip():
        return f"hold an empty {form}."
    if any(character.isspace() for character in value):
        return f"have white space in their {form}; it was probably not copied whole."
    return ""


def _problem_of_expiry(value: object, now: float) -> str:
    # The comparison is false for NaN, too, and takes an int of any size.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        return "hold a claudeAiOauth.expiresAt that is not a number of milliseconds since 1970."
    if value / 1000 <= now:
        return "have expired (claudeAiOauth.expiresAt is in the past). Log in again and use the new ones."
    return ""


def _problem_of_oauth(value: object, now: float) -> str:
    if not isinstance(value, dict):
        return "hold a claudeAiOauth that is not an object."
    if "accessToken" not in value:
        return "hold a claudeAiOauth without an accessToken."
    if problem := _problem_of_key("claudeAiOauth.accessToken", value["accessToken"]):
        return problem
    return _problem_of_expiry(value["expiresAt"], now) if value.get("expiresAt") is not None else ""


def claude_credentials(value: Any, now: float, warn_hours: float = 24) -> dict[str, str]:
    """Return ``problem``, ``warning`` and ``content`` of the credentials ``value``.

    ``value`` is JSON text or an object, ``now`` is in seconds since 1970. ``problem`` and ``warning``
    continue the words "The Claude credentials ..."; they are empty when there is nothing to say.
    ``content`` is the text for the secret, the same for the same credentials; empty with a problem.
    """

    def refused(problem: str) -> dict[str, str]:
        return {"problem": problem, "warning": "", "content": ""}

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return refused(f"are not JSON. Give {_FORMS}.")
    if not isinstance(value, dict):
        return refused(f"are JSON, but not an object. Give {_FORMS}.")
    forms = [form for form in ("apiKey", "oauthToken", "claudeAiOauth") if form in value]
    if len(value) != 1 or len(forms) != 1:
        return refused(f"have an unknown form. Give exactly one of {_FORMS}.")

    form = forms[0]
    warning = ""
    if form == "claudeAiOauth":
        problem = _problem_of_oauth(value[form], now)
        expires = None if problem else value[form].get("expiresAt")
        if expires is not None and (hours := (expires / 1000 - now) / _HOUR) < warn_hours:
            warning = (
                f"expire in {hours:.1f} hours; jobs will then fail with the code credentials, "
                "as replicas cannot renew them. An API key does not expire."
            )
    else:
        problem = _problem_of_key(form, value[form])
    if problem:
        return refused(problem)
    return {"problem": "", "warning": warning, "content": json.dumps(value, sort_keys=True)}


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"claude_credentials": claude_credentials}
