"""Judge API tokens by their form, before anything is deployed.

The gateway refuses the same entries with the same sentences when it starts (app/claude_jobs/api_tokens.py);
a test holds the two together. No sentence that comes out of here quotes a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

_FORM = '{"<name>": "<token>"} or {"<name>": {"token": "<token>", "maxRunning": <number>, "maxQueued": <number>}}'
_MIN_TOKEN_LENGTH = 16
# While a token is changed: the one before, and until when it is taken.
_PREVIOUS, _UNTIL = "previousToken", "previousUntil"
_LIMITS = {"maxRunning": 1, "maxQueued": 1}  # field: the least that makes sense
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VISIBLE_ASCII = re.compile(r"[!-~]*")


class _RefusedError(Exception):
    """The sentence that says what is wrong."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RefusedError("a name or a field occurs twice in one object; remove one of them")
    return found


def _limit(name: str, entry: dict[str, Any], field: str) -> int | None:
    limit = entry.get(field)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < _LIMITS[field]:
        raise _RefusedError(f"{field} of the entry {name!r} is not a whole number of {_LIMITS[field]} or more")
    return int(limit)


def _entry(name: object, value: object) -> tuple[str, dict[str, Any]]:
    """Return the name and an object, as plain Python: Ansible's own text is not quite that."""
    if not isinstance(name, str):
        raise _RefusedError(f"the name {name!r} is no text; put it into quotes")
    name = str(name)
    if not _NAME.fullmatch(name):
        raise _RefusedError(f"the name {name!r} is not allowed; use 1 to 64 letters, digits, '-' and '_'")
    entry = dict(value.items()) if isinstance(value, dict) else {"token": value}
    if not entry.keys() <= {"token", *_LIMITS, _PREVIOUS, _UNTIL}:
        raise _RefusedError(
            f"the entry {name!r} has an unknown field; it may have token, maxRunning, maxQueued, "
            f"{_PREVIOUS} and {_UNTIL}"
        )
    secret = _secret(name, "token", entry.get("token"))
    limits = {field: limit for field in _LIMITS if (limit := _limit(name, entry, field)) is not None}
    previous = {}
    if _PREVIOUS in entry or _UNTIL in entry:
        previous = {
            _PREVIOUS: _secret(name, _PREVIOUS, entry.get(_PREVIOUS)),
            _UNTIL: _moment(name, entry.get(_UNTIL)),
        }
    return name, {"token": secret, **limits, **previous}


def _secret(name: str, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _RefusedError(f"the entry {name!r} has no {field} that is a string; give {_FORM}")
    if len(value) < _MIN_TOKEN_LENGTH:
        raise _RefusedError(
            f"the {field} of the entry {name!r} has fewer than {_MIN_TOKEN_LENGTH} characters; give a longer one"
        )
    if not _VISIBLE_ASCII.fullmatch(value):
        raise _RefusedError(
            f"the {field} of the entry {name!r} has white space or a character that is not ASCII; "
            "a header cannot carry it"
        )
    return str(value)


def _moment(name: str, value: object) -> str:
    try:
        # YAML reads a time that stands without quotes as one.
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise _RefusedError(
            f"{_UNTIL} of the entry {name!r} is no time with its zone, such as 2026-12-01T12:00:00+00:00"
        )
    return moment.isoformat()


def _entries(value: Any) -> dict[str, dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError):
            raise _RefusedError(f"is no JSON; give {_FORM}") from None
    if not isinstance(value, dict):
        raise _RefusedError(f"is no JSON object; give {_FORM}")
    if not value:
        raise _RefusedError(f"is empty; give {_FORM}")
    names: dict[str, str] = {}
    entries = {}
    for given, one in value.items():
        name, entry = _entry(given, one)
        for token in (entry["token"], entry.get(_PREVIOUS, entry["token"])):
            other = names.setdefault(token, name)
            if other != name:
                raise _RefusedError(f"the entries {other!r} and {name!r} have the same token; give each its own")
        entries[name] = entry
    return entries


def api_tokens(value: Any) -> dict[str, str]:
    """Return ``problem`` and ``content`` of the tokens ``value``, which is JSON text or an object.

    ``problem`` follows the name of where they came from and a colon; it is empty when there is nothing to say.
    ``content`` is the text for the secret, the same for the same tokens; empty with a problem.
    """
    try:
        entries = _entries(value)
    except _RefusedError as refused:
        return {"problem": str(refused), "content": ""}
    # A token without limits is written as it always was: nothing changes for who has no limits.
    plain = {name: entry if len(entry) > 1 else entry["token"] for name, entry in entries.items()}
    return {"problem": "", "content": json.dumps(plain, sort_keys=True)}


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"api_tokens": api_tokens}
