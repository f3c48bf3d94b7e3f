"""Disk images that machines start from: made once with mmdebstrap, kept for two weeks."""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cache
import host
from errors import MachineError

HERE = Path(__file__).resolve().parent
TREE = HERE / "tree"
CUSTOMIZE = HERE / "customize"
DISK = "16G"
# An image is made anew after this time, so that its packages are not too far behind.
MAX_AGE = 14 * 86400
# An image that has been replaced may still carry machines for this long.
GRACE = 86400

BARE = (
    "apt-utils",
    "ca-certificates",
    "chrony",
    "dbus",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libnss-myhostname",
    "linux-image-amd64",
    "openssh-server",
    "procps",
    "python3",
    "python3-apt",
    "sudo",
    "systemd",
    "systemd-sysv",
    "udev",
    "zstd",
)
# What the roles would install: there, but not started.
PREPARED = (
    "apparmor",
    "curl",
    "docker-cli",
    "docker.io",
    "iptables",
    "nfs-common",
    "nfs-kernel-server",
    "nftables",
    "python3-docker",
    "python3-jsondiff",
    "python3-requests",
    "python3-yaml",
)


@dataclass(frozen=True)
class Recipe:
    """What is in an image."""

    release: str
    packages: tuple[str, ...]
    disabled: tuple[str, ...] = ()


RECIPES = {
    recipe.release: recipe
    for recipe in (
        # Debian 12 as an installer leaves it: the roles bring everything.
        Recipe("bookworm", BARE),
        Recipe(
            "trixie",
            BARE + PREPARED,
            disabled=(
                "containerd.service",
                "docker.service",
                "docker.socket",
                "nfs-server.service",
                "rpcbind.service",
                "rpcbind.socket",
            ),
        ),
    )
}


@dataclass(frozen=True)
class Image:
    """The files of an image."""

    directory: Path

    @property
    def disk(self) -> Path:
        """The root file system, raw."""
        return self.directory / "root.ext4"

    @property
    def kernel(self) -> Path:
        """The kernel, as QEMU boots it."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The first file system of the kernel."""
        return self.directory / "initrd.img"

    @property
    def known_hosts(self) -> Path:
        """What an SSH client must know to trust a machine made from this image."""
        return self.directory / "known_hosts"


def ready(release: str) -> Image:
    """Return the image of a release; it is made when there is none or only an old one."""
    recipe = RECIPES.get(release)
    if recipe is None:
        raise MachineError(f"There is no recipe for '{release}', only for {', '.join(RECIPES)}.")
    images = cache.directory() / "images"
    images.mkdir(exist_ok=True)
    with _lock(images / f"{release}.lock"), tempfile.TemporaryDirectory(dir=images) as scratch:
        layer = Path(scratch) / "layer"
        _write_layer(layer)
        sources = host.mirrors().sources(release)
        prefix = f"{release}-{_key(recipe, layer, sources)}-"
        # The name ends with the time of making: the last one is the newest.
        found = sorted(images.glob(f"{prefix}*"))
        if found and time.time() - int(found[-1].name.removeprefix(prefix)) < MAX_AGE:
            return Image(found[-1])
        made = Path(scratch) / "image"
        made.mkdir()
        _make(recipe, sources, layer, Path(scratch), made)
        _forget_replaced(images, release)
        return Image(made.rename(images / f"{prefix}{int(time.time())}"))


def _forget_replaced(images: Path, release: str) -> None:
    for path in images.glob(f"{release}-*-*"):
        if time.time() - path.stat().st_mtime > GRACE:
            shutil.rmtree(path)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _key(recipe: Recipe, layer: Path, sources: list[str]) -> str:
    """Return a name for all that decides what is in the image, the day aside."""
    content = hashlib.sha256(json.dumps([repr(recipe), DISK, sources]).encode())
    content.update(Path(__file__).read_bytes() + CUSTOMIZE.read_bytes())
    for root in (TREE, layer):
        for path in _files(root):
            content.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return content.hexdigest()[:12]


def _write_layer(layer: Path) -> None:
    """Write the files that every image takes from this host."""
    files = {"etc/ssh/authorized_keys": cache.ssh_key().with_suffix(".pub").read_bytes()}
    settings = host.apt_settings()
    if settings:
        files["etc/apt/apt.conf.d/90host"] = settings.encode()
    for name, content in host.certificates().items():
        files[f"usr/local/share/ca-certificates/{name}"] = content
    for name, content in files.items():
        path = layer / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _as_root(*command: str, log: Path) -> None:
    """Run a command as root; its output is told only when it fails."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "--"]
    with log.open("w") as output:
        done = subprocess.run(
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise MachineError(f"{command[0]} failed with code {done.returncode}:\n{end}")


def _make(recipe: Recipe, sources: list[str], layer: Path, scratch: Path, made: Path) -> None:
    root, log = scratch / "root", scratch / "log"
    image = Image(made)
    copy = " ".join(
        f'cp -R --no-preserve=ownership {shlex.quote(str(source))}/. "$1";'
        for source in (TREE, layer)
    )
    try:
        _as_root(
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(recipe.packages)}",
            # A crash in the middle costs an image, no data. It saves time in the machines, too.
            "--dpkgopt=force-unsafe-io",
            # A machine that has no package lists would first load them in every run.
            "--skip=cleanup/apt/lists",
            # Before the packages: the kernel's comes with the initrd that these files describe.
            f"--essential-hook={copy}",
            f'--customize-hook={shlex.quote(str(CUSTOMIZE))} "$1" {shlex.join(recipe.disabled)}',
            recipe.release,
            str(root),
            *sources,
            log=log,
        )
        _as_root(
            "mke2fs",
            *("-q", "-F", "-t", "ext4", "-L", "root", "-d", str(root)),
            # Else every machine does it again, in its first minutes.
            *("-E", "lazy_itable_init=0,lazy_journal_init=0"),
            *(str(image.disk), DISK),
            log=log,
        )
        # The link in the root of the tree names the newest kernel.
        for name, target in (("vmlinuz", image.kernel), ("initrd.img", image.initrd)):
            _as_root("cp", "--dereference", str(root / name), str(target), log=log)
        key = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
        image.known_hosts.write_text(f"* {key[0]} {key[1]}\n")
        owner = f"{os.getuid()}:{os.getgid()}"
        _as_root("chown", "-R", owner, str(made), log=log)
    finally:
        if root.exists():
            _as_root("rm", "-rf", "--one-file-system", str(root), log=log)
