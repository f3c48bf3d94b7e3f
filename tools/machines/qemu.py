"""A machine in QEMU: with KVM, or with an emulated CPU."""

import os
import signal
import subprocess
from pathlib import Path

import accelerator
import monitor
import recorded
import share
from description import Description
from errors import MachineError
from image import Image

# Where a machine finds the files of the shared directory.
SHARE = "10.0.2.100"
# What a kernel does for safety or to watch itself takes seconds on an emulated CPU.
LESS_TO_EMULATE = (
    "mitigations=off",
    "nokaslr",
    "init_on_alloc=0",
    "cryptomgr.notests",
    "nowatchdog",
    "audit=0",
    # Each look at another clock would leave the emulated CPU.
    "tsc=reliable",
)


class Qemu:
    """The QEMU of a machine, and what it keeps in the machine's directory."""

    share_url = f"http://{SHARE}"

    def __init__(self, directory: Path, description: Description) -> None:
        self._directory = directory
        self._description = description
        self._disk = directory / "disk.qcow2"
        self._pid_file = (directory / "pid").resolve()
        self._monitor = directory / "monitor"

    def make_disk(self) -> None:
        """Make a disk on which only the image is."""
        backing = Image(Path(self._description.image)).disk
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "raw"]
        subprocess.run([*command, str(self._disk)], check=True)

    def pid(self) -> int | None:
        """Return the id of the process, or None when the machine does not run."""
        return recorded.process(self._pid_file, lambda words: str(self._pid_file) in words)

    def start(self) -> None:
        """Start in the background; the machine then boots."""
        done = subprocess.run(
            self._command(),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise MachineError(
                f"QEMU did not start {self._description.name}: {done.stdout.strip()}"
            )

    def kill(self, pid: int) -> None:
        """Pull the plug."""
        os.kill(pid, signal.SIGKILL)

    def set_lan(self, *, plugged: bool) -> None:
        """Put the cable of the LAN in or out; SSH goes another way."""
        monitor.execute(self._monitor, "set_link", name="lan-card", up=plugged)

    def is_reachable(self) -> bool:
        """Say whether the ports of the host lead to the machine; here they do from the start."""
        return True

    def _command(self) -> list[str]:
        description = self._description
        image = Image(Path(description.image))
        kernel_line = ["root=/dev/vda", "console=ttyS0", *LESS_TO_EMULATE, *description.kernel_line]
        access = ["user,id=access"]
        for on_host, on_machine in description.forwards.items():
            access.append(f"hostfwd=tcp:127.0.0.1:{on_host}-:{on_machine}")
        if description.share:
            access.append(f"guestfwd=tcp:{SHARE}:80-cmd:{share.command(description.share)}")
        lan = f"socket,id=lan,mcast=230.0.0.1:{description.lan_port},localaddr=127.0.0.1"
        access_mac, lan_mac = description.hardware_addresses
        chipset = "q35,i8042=off,hpet=off,vmport=off,smbus=off,sata=off"
        disk = f"file={self._disk.name},if=virtio,format=qcow2,cache=unsafe,discard=unmap"
        return [
            *(accelerator.QEMU, "-name", description.name, "-machine", chipset),
            *accelerator.OPTIONS[description.hypervisor],
            *("-m", str(description.memory_mb), "-smp", str(description.cpus)),
            *("-nodefaults", "-display", "none", "-rtc", "base=utc"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", " ".join(kernel_line)),
            *("-netdev", ",".join(access)),
            *("-device", f"virtio-net-pci,netdev=access,mac={access_mac}"),
            *("-netdev", lan, "-device", f"virtio-net-pci,id=lan-card,netdev=lan,mac={lan_mac}"),
            *("-device", "virtio-rng-pci"),
            *("-daemonize", "-pidfile", str(self._pid_file)),
            *("-serial", "file:console.log"),
            *("-qmp", f"unix:{self._monitor.name},server=on,wait=off"),
            *("-drive", disk),
        ]
