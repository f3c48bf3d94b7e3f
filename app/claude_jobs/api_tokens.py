"""The API's tokens: their form in the secret `api_tokens`, and whose they are.

A deployment refuses the same entries with the same sentences before it changes anything (role
`docker_secrets`); a test holds the two together. No sentence quotes a token.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime

from pydantic import SecretStr

FORM = (
    '{"<name>": "<token>"} or '
    '{"<name>": {"token": "<token>", "maxRunning": <number>, "maxQueued": <number>}}'
)
MIN_TOKEN_LENGTH = 16
# While a token is changed: the one before, and until when it is taken.
_PREVIOUS, _UNTIL = "previousToken", "previousUntil"

_LIMITS = {"maxRunning": 1, "maxQueued": 1}  # field: the least that makes sense
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VISIBLE_ASCII = re.compile(r"[!-~]*")


@dataclass(frozen=True)
class Client:
    """Who uses the API: the name of a token, which its jobs carry, and its limits.

    `max_running` and `max_queued` count its jobs that run and that wait; None is no limit but
    the deployment's. The name is a word of the broker's subjects.
    """

    name: str
    max_running: int | None = None
    max_queued: int | None = None


@dataclass(frozen=True)
class ApiToken:
    """A token and the client that it stands for; with `until` it is taken before that moment."""

    client: Client
    secret: SecretStr
    until: datetime | None = None


def parse_api_tokens(text: str) -> tuple[ApiToken, ...]:
    """Read the content of the secret; empty is no token.

    Raises `ValueError` with a sentence that names the entry.
    """
    if not text.strip():
        return ()
    try:
        entries = json.loads(text, object_pairs_hook=_without_repetition)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"is no JSON; give {FORM}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"is no JSON object; give {FORM}")
    names: dict[str, str] = {}
    tokens = []
    for name, value in entries.items():
        for token in _tokens(name, value):
            other = names.setdefault(token.secret.get_secret_value(), name)
            if other != name:
                raise ValueError(
                    f"the entries {other!r} and {name!r} have the same token; give each its own"
                )
            tokens.append(token)
    return tuple(tokens)


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name or a field occurs twice in one object; remove one of them")
    return found


def _tokens(name: str, value: object) -> list[ApiToken]:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name {name!r} is not allowed; use 1 to 64 letters, digits, '-' and '_'"
        )
    entry = value if isinstance(value, dict) else {"token": value}
    if not entry.keys() <= {"token", *_LIMITS, _PREVIOUS, _UNTIL}:
        raise ValueError(
            f"the entry {name!r} has an unknown field; it may have token, maxRunning, maxQueued, "
            f"{_PREVIOUS} and {_UNTIL}"
        )
    secret = _secret(name, "token", entry.get("token"))
    running, queued = (_limit(name, entry, field) for field in _LIMITS)
    client = Client(name, running, queued)
    found = [ApiToken(client, secret)]
    if _PREVIOUS in entry or _UNTIL in entry:
        previous = _secret(name, _PREVIOUS, entry.get(_PREVIOUS))
        found.append(ApiToken(client, previous, _moment(name, entry.get(_UNTIL))))
    return found


def _secret(name: str, field: str, value: object) -> SecretStr:
    if not isinstance(value, str):
        raise ValueError(f"the entry {name!r} has no {field} that is a string; give {FORM}")
    if len(value) < MIN_TOKEN_LENGTH:
        raise ValueError(
            f"the {field} of the entry {name!r} has fewer than {MIN_TOKEN_LENGTH} characters; "
            "give a longer one"
        )
    if not _VISIBLE_ASCII.fullmatch(value):
        raise ValueError(
            f"the {field} of the entry {name!r} has white space or a character that is not ASCII; "
            "a header cannot carry it"
        )
    return SecretStr(value)


def _moment(name: str, value: object) -> datetime:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(
            f"{_UNTIL} of the entry {name!r} is no time with its zone, "
            "such as 2026-12-01T12:00:00+00:00"
        )
    return moment


def _limit(name: str, entry: dict[str, object], field: str) -> int | None:
    limit = entry.get(field)
    if limit is None:
        return None
    # A bool is an int, but no number that somebody meant.
    if type(limit) is not int or limit < _LIMITS[field]:
        raise ValueError(
            f"{field} of the entry {name!r} is not a whole number of {_LIMITS[field]} or more"
        )
    return limit
