"""What a machine takes over from this host: mirrors, proxy, certificate authorities."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from errors import MachineError

# How a machine names this host.
GATEWAY = "10.0.2.2"
CERTIFICATES = Path("/usr/local/share/ca-certificates")


@dataclass(frozen=True)
class Mirrors:
    """Where Debian packages come from; `security` may be empty."""

    archive: str
    security: str

    def sources(self, release: str) -> list[str]:
        """Return the lines of a sources.list."""
        lines = [
            f"deb {self.archive} {release} main",
            f"deb {self.archive} {release}-updates main",
        ]
        return lines + ([f"deb {self.security} {release}-security main"] if self.security else [])


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def mirrors() -> Mirrors:
    """Return the mirrors that this host's apt uses."""
    known = {"Debian": "", "Debian-Security": ""}
    listed = _output(
        "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"
    )
    for line in listed.splitlines():
        label, _, address = line.rpartition(" ")
        if label in known:
            known[label] = address
    if not known["Debian"]:
        raise MachineError("apt knows no Debian mirror here: run apt-get update first.")
    return Mirrors(known["Debian"], known["Debian-Security"])


def apt_settings() -> str:
    """Return this host's apt settings for the way to its mirrors, as a machine sees that way."""
    settings = [
        line
        for line in _output("apt-config", "dump", "--format", '%F "%v";%n').splitlines()
        if re.match(r"Acquire::https?::(Proxy|Verify-Peer|Verify-Host)\b", line)
    ]
    for scheme in ("http", "https"):
        proxy = os.environ.get(f"{scheme}_proxy")
        if proxy and not any(f"Acquire::{scheme}::Proxy " in line for line in settings):
            settings.append(f'Acquire::{scheme}::Proxy "{proxy}";')
    text = "".join(f"{line}\n" for line in settings)
    return re.sub(r"//(localhost|127\.0\.0\.1)\b", f"//{GATEWAY}", text)


def certificates() -> dict[str, bytes]:
    """Return the certificate authorities that this host's administrator has added, by file name."""
    return {path.name: path.read_bytes() for path in sorted(CERTIFICATES.glob("*.crt"))}
