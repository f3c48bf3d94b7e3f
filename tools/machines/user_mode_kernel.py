"""The kernel that is a process of this host (User Mode Linux): built once from Debian's source.

Debian's own such kernel lacks what the firewall needs, and Debian 12's is too old to be quick.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cache
import host
from errors import MachineError

CONFIG = Path(__file__).resolve().parent / "user_mode.config"
PATCH = CONFIG.with_suffix(".patch")
# From Linux 6.16 on a process of the machine is watched by seccomp, which is ten times as quick.
SUITE = "trixie-backports"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class UserModeKernel:
    """The files of a kernel."""

    directory: Path

    @property
    def program(self) -> Path:
        """What runs as a process of the host."""
        return self.directory / "linux"

    @property
    def modules(self) -> Path:
        """What the machine finds in /lib/modules: the list of what is built in."""
        return self.directory / "lib" / "modules"


def ready() -> UserModeKernel:
    """Return the kernel; it is built when there is none."""
    kernels = cache.directory() / "kernels"
    kernels.mkdir(exist_ok=True)
    content = CONFIG.read_bytes() + PATCH.read_bytes() + SUITE.encode()
    key = hashlib.sha256(content).hexdigest()[:12]
    with (kernels / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel = UserModeKernel(kernels / key)
        if not kernel.directory.exists():
            with tempfile.TemporaryDirectory(dir=kernels) as scratch:
                made = _build(_source(Path(scratch)), Path(scratch) / "made")
                made.rename(kernel.directory)
            for replaced in set(kernels.iterdir()) - {kernel.directory, Path(lock.name)}:
                shutil.rmtree(replaced)
    return kernel


def _source(scratch: Path) -> Path:
    """Fetch the newest source of the suite, past this host's own lists, and unpack it."""
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    sources = scratch / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {host.mirrors().archive} {SUITE} main\n")
    options = [
        f"Dir::Etc::SourceList={sources}",
        "Dir::Etc::SourceParts=-",
        f"Dir::State::Lists={scratch / 'lists'}",
        f"Dir::Cache={scratch / 'cache'}",
        "APT::Sandbox::User=",
    ]
    apt = [argument for option in options for argument in ("-o", option)]
    _run(scratch, "apt-get", *apt, "--quiet=2", "update")
    depends = _run(scratch, "apt-cache", *apt, "depends", "--important", f"linux-source/{SUITE}")
    package = next(word for word in depends.split() if word.startswith("linux-source-"))
    _run(scratch, "apt-get", *apt, "--quiet=2", "download", f"{package}/{SUITE}")
    (archive,) = scratch.glob(f"{package}_*.deb")
    _run(scratch, "dpkg-deb", "--extract", str(archive), "package")
    archive.unlink()
    _run(scratch, "tar", "--extract", "--file", f"package/usr/src/{package}.tar.xz")
    return scratch / package


def _build(source: Path, made: Path) -> Path:
    """Build in the source's tree and take along what a machine needs of it."""
    make = ("make", "ARCH=um", f"--jobs={os.cpu_count()}")
    _run(source, "patch", "--strip=1", f"--input={PATCH}")
    _run(source, *make, "x86_64_defconfig")
    _run(source, "scripts/kconfig/merge_config.sh", "-m", ".config", str(CONFIG))
    _run(source, *make, "olddefconfig")
    wanted = {line for line in CONFIG.read_text().splitlines() if line.endswith("=y")}
    if missing := sorted(wanted - set((source / ".config").read_text().splitlines())):
        raise MachineError(
            f"{source.name} knows nothing of these any more, as {CONFIG.name} has them: "
            f"{', '.join(missing)}."
        )
    _run(source, *make, "linux")
    release = _run(source, *make, "--silent", "kernelrelease").strip()
    # As depmod looks for it.
    modules = UserModeKernel(made).modules / release
    modules.mkdir(parents=True)
    for name in ("modules.builtin", "modules.builtin.modinfo"):
        (source / name).rename(modules / name)
    (modules / "modules.order").touch()
    _run(made, "depmod", "--basedir", str(made), release)
    (source / "linux").rename(UserModeKernel(made).program)
    return made


def _run(directory: Path, *command: str) -> str:
    """Run a command; what it prints is told only when it fails."""
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise MachineError(f"{command[0]} failed with code {done.returncode}:\n{end}")
    return done.stdout
