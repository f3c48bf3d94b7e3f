"""Where images, keys and what was learnt about this host are kept between runs."""

import os
import subprocess
from pathlib import Path


def directory() -> Path:
    """Return the cache directory; it is made when it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "claude-code-sse-api" / "machines"
    path.mkdir(parents=True, exist_ok=True)
    return path


def ssh_key() -> Path:
    """Return the private key that opens every machine; it is made once."""
    key = directory() / "id_ed25519"
    if not key.exists():
        new = key.with_name(f"{key.name}.{os.getpid()}")
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "machines", "-f", str(new)]
        subprocess.run(command, check=True)
        new.with_suffix(f"{new.suffix}.pub").rename(key.with_suffix(".pub"))
        new.rename(key)
    return key
