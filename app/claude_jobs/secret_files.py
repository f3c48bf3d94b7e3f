"""Makes the secrets of a development pool: `python -m claude_jobs.secret_files DIRECTORY`.

A deployment by Ansible makes Docker secrets instead (role `docker_secrets`).
"""

import argparse
import json
import os
import secrets
from pathlib import Path

DEMO_CREDENTIALS = '{"apiKey": "demo"}'


def make_secret_files(
    directory: Path, *, credentials: str | None = None, owner: int | None = None
) -> str:
    """Write every secret below `directory`, each readable for its owner alone.

    Random ones are kept when they are there. Returns the API token.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("broker_gateway_password", "broker_replica_password", "api_token"):
        if not (directory / name).exists():
            _write(directory / name, secrets.token_urlsafe(32), owner)
    token = (directory / "api_token").read_text()
    _write(directory / "api_tokens", json.dumps({"development": token}), owner)
    _write(directory / "claude_credentials", credentials or DEMO_CREDENTIALS, owner)
    if owner is not None:
        os.chown(directory, owner, -1)
    return token


def _write(path: Path, text: str, owner: int | None) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        if owner is not None:
            os.fchown(file.fileno(), owner, -1)


def main() -> None:
    """Make the files; credentials come from `CLAUDE_CODE_CREDENTIALS_JSON`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--owner", type=int, help="uid that gets the files")
    arguments = parser.parse_args()
    make_secret_files(
        arguments.directory,
        credentials=os.environ.get("CLAUDE_CODE_CREDENTIALS_JSON") or None,
        owner=arguments.owner,
    )


if __name__ == "__main__":
    main()
