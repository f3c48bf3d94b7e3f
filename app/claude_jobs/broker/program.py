"""The program nats-server of this machine."""

import os
import re
import shutil
import subprocess
from pathlib import Path


def find_server() -> str:
    """Return the path of nats-server; raises `FileNotFoundError` where there is none."""
    server = shutil.which("nats-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")
    if server is None:
        raise FileNotFoundError("nats-server is not installed (Debian: apt install nats-server)")
    return server


def version_of(server: str) -> tuple[int, int]:
    """Return the first two numbers of the version of the program at this path."""
    shown = subprocess.run(  # noqa: S603 - found above, no shell
        [server, "--version"], check=True, capture_output=True, text=True
    ).stdout
    match = re.search(r"v(\d+)\.(\d+)", shown)
    if match is None:
        raise ValueError(f"cannot read the version of nats-server from {shown!r}")
    return int(match[1]), int(match[2])


def write_configuration(path: Path, text: str) -> None:
    """Write a configuration, which holds passwords: readable for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
