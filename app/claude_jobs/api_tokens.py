"""The API's tokens: their form in the secret `api_tokens`, and whose they are.

A deployment refuses the same entries with the same sentences before it changes anything (role
`docker_secrets`); a test holds the two together. No sentence quotes a token.
"""

import json
import re
from dataclasses import dataclass

from pydantic import SecretStr

FORM = (
    '{"<name>": "<token>"} or '
    '{"<name>": {"token": "<token>", "maxRunning": <number>, "maxQueued": <number>}}'
)
MIN_TOKEN_LENGTH = 16

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
    """A token and the client that it stands for."""

    client: Client
    secret: SecretStr


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
        token = _token(name, value)
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


def _token(name: str, value: object) -> ApiToken:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name {name!r} is not allowed; use 1 to 64 letters, digits, '-' and '_'"
        )
    entry = value if isinstance(value, dict) else {"token": value}
    if not entry.keys() <= {"token", *_LIMITS}:
        raise ValueError(
            f"the entry {name!r} has an unknown field; it may have token, maxRunning and maxQueued"
        )
    secret = entry.get("token")
    if not isinstance(secret, str):
        raise ValueError(f"the entry {name!r} has no token that is a string; give {FORM}")
    if len(secret) < MIN_TOKEN_LENGTH:
        raise ValueError(
            f"the token of the entry {name!r} has fewer than {MIN_TOKEN_LENGTH} characters; "
            "give a longer one"
        )
    if not _VISIBLE_ASCII.fullmatch(secret):
        raise ValueError(
            f"the token of the entry {name!r} has white space or a character that is not ASCII; "
            "a header cannot carry it"
        )
    running, queued = (_limit(name, entry, field) for field in _LIMITS)
    return ApiToken(Client(name, running, queued), SecretStr(secret))


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
