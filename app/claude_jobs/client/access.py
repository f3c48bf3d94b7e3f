"""Where the API is and what lets one in: arguments first, then the environment, then a file."""

import os
from pathlib import Path

import httpx

from claude_jobs.client.errors import ClientError

DEFAULT_URL = "http://127.0.0.1:3000"
URL_VARIABLE = "CLAUDE_JOBS_URL"
TOKEN_VARIABLE = "CLAUDE_JOBS_TOKEN"  # noqa: S105 - the name of a variable
TOKEN_FILE_VARIABLE = "CLAUDE_JOBS_TOKEN_FILE"  # noqa: S105 - the name of a variable


def api_url(given: str | None) -> httpx.URL:
    """Return the API's address; raises `ClientError` when it is none."""
    text = given or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ClientError(f"{text!r} is no address of an API: {error}") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ClientError(
            f"{text!r} is no address of an API: it must begin with http:// or https://"
        )
    return url


def default_token_file() -> Path:
    """Return where a user's token lies unless something else is said."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "claude-jobs" / "token"


def api_token(given: str | None, file: Path | None) -> str | None:
    """Return the token, or None where there is none: an open deployment needs none.

    A file that was named must be there; raises `ClientError` without ever quoting a token.
    """
    if given is not None:
        return _checked(given, "the token")
    if file is not None:
        return _read(file)
    if from_environment := os.environ.get(TOKEN_VARIABLE):
        return _checked(from_environment, TOKEN_VARIABLE)
    if named := os.environ.get(TOKEN_FILE_VARIABLE):
        return _read(Path(named))
    file = default_token_file()
    return _read(file) if file.exists() else None


def _read(file: Path) -> str:
    try:
        return _checked(file.read_text(encoding="utf-8"), f"the token file {file}")
    except OSError as error:
        raise ClientError(f"the token file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClientError(f"the token file {file} holds no token: it is not text") from None


def _checked(token: str, place: str) -> str:
    token = token.strip()
    if not token:
        raise ClientError(f"{place} is empty")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ClientError(f"{place} holds no token: a token is one line of printable ASCII")
    return token
