"""The forms in which a deployment gives Claude credentials, and how each reaches the CLI.

The agent must not see them: no environment variable, no file that its user can read. The CLI
takes a key from a pipe instead, which is empty once it was read.
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_API_KEY_VARIABLE = "CLAUDE_CODE_API_KEY_FILE_DESCRIPTOR"
_OAUTH_VARIABLE = "CLAUDE_CODE_OAUTH_TOKEN_FILE_DESCRIPTOR"

FORMS = '{"apiKey": "…"}, {"oauthToken": "…"} or {"claudeAiOauth": {"accessToken": "…"}}'


class CredentialsError(ValueError):
    """The credentials cannot be used; the sentence says why and never quotes them."""


@dataclass(frozen=True, repr=False)
class Credentials:
    """A key or token, the CLI's variable that announces it, and when it ends."""

    secret: str
    variable: str
    expires_at: datetime | None = None

    def pipe(self) -> int:
        """Return the reading end of a pipe that holds the secret; the caller closes it."""
        reader, writer = os.pipe()
        with os.fdopen(writer, "w") as file:
            file.write(self.secret)
        return reader


def parse_credentials(text: str) -> Credentials:
    """Read credentials in one of the known forms.

    An access token out of `claudeAiOauth` is used until it ends and never refreshed: the first
    replica to refresh it would log all others out, and a secret cannot take the new one up.
    Raises `CredentialsError`.
    """
    try:
        document = json.loads(text)
    except ValueError:
        raise CredentialsError(f"the Claude credentials are not JSON: give {FORMS}") from None
    if not isinstance(document, dict) or len(document) != 1:
        raise CredentialsError(f"the Claude credentials have an unknown form: give {FORMS}")
    [(form, value)] = document.items()
    match form:
        case "apiKey":
            return Credentials(_text(value, form), _API_KEY_VARIABLE)
        case "oauthToken":
            return Credentials(_text(value, form), _OAUTH_VARIABLE)
        case "claudeAiOauth" if isinstance(value, dict):
            return Credentials(
                _text(value.get("accessToken"), "claudeAiOauth.accessToken"),
                _OAUTH_VARIABLE,
                _expiry(value.get("expiresAt")),
            )
    raise CredentialsError(f"the Claude credentials have an unknown form: give {FORMS}")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise CredentialsError(f"the Claude credentials have an empty {field}")
    return value.strip()


def _expiry(milliseconds: Any) -> datetime | None:
    if milliseconds is None:
        return None
    try:
        return datetime.fromtimestamp(float(milliseconds) / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        raise CredentialsError(
            "the Claude credentials have a claudeAiOauth.expiresAt that is no time in milliseconds"
        ) from None
