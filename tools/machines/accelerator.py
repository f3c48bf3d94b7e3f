"""How QEMU runs a CPU, and whether this host can do it by KVM: a device file alone says little."""

import os
import subprocess
import tempfile
from pathlib import Path

import cache

QEMU = "qemu-system-x86_64"
PROBE_SECONDS = 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The end of a kernel that found no root file system, so one that ran until there.
_KERNEL_RAN = "Unable to mount root"


OPTIONS = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    # A newer model of CPU has instructions that cost more to emulate than they save. These of its
    # instructions halve the time of a checksum.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "Haswell-v4,+sha-ni"),
}


def has_kvm(kernel: Path) -> bool:
    """Say whether KVM runs the kernel; tried once in each boot of the host."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = _BOOT_ID.read_text().strip()
    known = cache.directory() / f"kvm-{boot}"
    if not known.exists():
        found = "yes" if _runs(kernel) else "no"
        for old in known.parent.glob("kvm-*"):
            old.unlink()
        new = known.with_suffix(f".{os.getpid()}")
        new.write_text(found)
        new.rename(known)
    return known.read_text() == "yes"


def _runs(kernel: Path) -> bool:
    """Boot the kernel under KVM without a disk, and see whether it gets far enough to miss it."""
    with tempfile.TemporaryDirectory() as directory:
        serial = Path(directory) / "serial"
        command = [
            *(QEMU, "-machine", "q35", *OPTIONS["kvm"], "-m", "512"),
            *("-nodefaults", "-display", "none"),
            *("-no-reboot", "-serial", f"file:{serial}", "-kernel", str(kernel)),
            *("-append", "console=ttyS0 panic=-1"),
        ]
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PROBE_SECONDS,
                check=True,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
            return False
        return _KERNEL_RAN in serial.read_text(errors="replace")
