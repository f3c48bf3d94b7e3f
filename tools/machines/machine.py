"""One virtual machine: a directory with its description, disk, console log and QEMU's traces."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import accelerator
import cache
import monitor
import share
from errors import MachineError
from image import Image

USER = "admin"
# One that an emulated CPU encrypts quickly with.
CIPHER = "aes128-gcm@openssh.com"
STOP_SECONDS = 90
# Where a machine finds the files of the shared directory: http://10.0.2.100/
SHARE = "10.0.2.100:80"
# What the pool publishes (app_stack_port).
API_PORT = 3000
# What a kernel does for safety or to watch itself takes seconds on an emulated CPU.
LESS_TO_EMULATE = (
    "loglevel=4",
    "systemd.show_status=auto",
    "mitigations=off",
    "nokaslr",
    "init_on_alloc=0",
    "cryptomgr.notests",
    "nowatchdog",
    "audit=0",
    # Each look at another clock would leave the emulated CPU.
    "tsc=reliable",
)


@dataclass(frozen=True)
class Description:
    """What a machine is like. The ports are on the host's loopback."""

    name: str
    release: str
    address: str
    image: str
    ssh_port: int
    api_port: int
    lan_port: int
    memory_mb: int = 2048
    cpus: int = 2
    disk_gb: int = 16
    share: str = ""


class Machine:
    """A machine in its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._disk = directory / "disk.qcow2"
        self._pid_file = directory / "pid"
        self._monitor = directory / "monitor"
        self.console = directory / "console.log"

    @classmethod
    def create(cls, directory: Path, description: Description) -> "Machine":
        """Make the machine; its description comes last, so that a half is none."""
        machine = cls(directory)
        directory.mkdir(parents=True, exist_ok=True)
        machine._install(description)
        (directory / "machine.json").write_text(json.dumps(asdict(description), indent=2) + "\n")
        return machine

    def reinstall(self) -> None:
        """Pull the plug and put in a disk on which only the image is."""
        self.power_off()
        self._install(self.description)

    def _install(self, description: Description) -> None:
        backing = Image(Path(description.image)).disk
        subprocess.run(
            [
                *("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "raw"),
                *(str(self._disk), f"{description.disk_gb}G"),
            ],
            check=True,
        )

    @property
    def name(self) -> str:
        """The name, which the directory has too."""
        return self.directory.name

    @property
    def exists(self) -> bool:
        """Whether the machine was made to the end."""
        return (self.directory / "machine.json").exists()

    @property
    def description(self) -> Description:
        """What the machine was made with."""
        stored: dict[str, Any] = json.loads((self.directory / "machine.json").read_text())
        known = {field.name for field in fields(Description)}
        return Description(**{name: value for name, value in stored.items() if name in known})

    def pid(self) -> int | None:
        """Return the id of the machine's QEMU, or None when it does not run."""
        try:
            pid = int(self._pid_file.read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        # The number may have passed to another process meanwhile.
        ours = str(self._pid_file.resolve()).encode() in arguments and b"qemu" in arguments[0]
        return pid if ours else None

    def power_on(self) -> None:
        """Start QEMU in the background; the machine then boots."""
        if self.pid() is not None:
            return
        description = self.description
        image = Image(Path(description.image))
        done = subprocess.run(
            [*_command(description, image), *self._traces()],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise MachineError(f"QEMU did not start {self.name}: {done.stdout.strip()}")

    def _traces(self) -> tuple[str, ...]:
        """Return the options for what this machine's QEMU leaves in the directory."""
        disk = f"file={self._disk.name},if=virtio,format=qcow2,cache=unsafe,discard=unmap"
        return (
            *("-daemonize", "-pidfile", str(self._pid_file.resolve())),
            *("-serial", f"file:{self.console.name}"),
            *("-qmp", f"unix:{self._monitor.name},server=on,wait=off"),
            *("-drive", disk),
        )

    def power_off(self) -> None:
        """Pull the plug."""
        pid = self.pid()
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        _wait(lambda: self.pid() is None, 10)

    def stop(self) -> None:
        """Shut the system down; one that does not follow loses its power."""
        if self.pid() is None:
            return
        monitor.execute(self._monitor, "system_powerdown")
        _wait(lambda: self.pid() is None, STOP_SECONDS)
        self.power_off()

    def set_lan(self, *, plugged: bool) -> None:
        """Put the cable of the LAN in or out; SSH goes another way."""
        monitor.execute(self._monitor, "set_link", name="lan-card", up=plugged)

    def answers(self) -> bool:
        """Say whether one can log in."""
        port = self.description.ssh_port
        # QEMU accepts connections before the machine does: only a greeting counts.
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                if not connection.recv(4).startswith(b"SSH-"):
                    return False
        except OSError:
            return False
        done = subprocess.run(
            ["ssh", *self.ssh_options(), "-p", str(port), f"{USER}@127.0.0.1", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def ssh_options(self) -> list[str]:
        """Return what an SSH client needs to get in."""
        known = Image(Path(self.description.image)).known_hosts
        return [
            *("-i", str(cache.ssh_key())),
            *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"),
            *("-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=none"),
            *("-o", f"Ciphers={CIPHER}"),
        ]

    def console_end(self) -> str:
        """Return the last lines of the console."""
        if not self.console.exists():
            return ""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-20:])


def _wait(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def _command(description: Description, image: Image) -> list[str]:
    """Return the QEMU that the description asks for."""
    identity = hashlib.sha256(f"{description.name} {description.address}".encode()).hexdigest()
    mac = ":".join(identity[index : index + 2] for index in (0, 2, 4))
    kernel_line = [
        *("root=/dev/vda", "rw", "console=ttyS0", "net.ifnames=0", *LESS_TO_EMULATE),
        *(f"systemd.hostname={description.name}", f"systemd.machine_id={identity[:32]}"),
        f"machine.lan={description.address}/24",
    ]
    forwards = {description.ssh_port: 22, description.api_port: API_PORT}
    access = ",".join(
        [
            "user,id=access",
            *(f"hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in forwards.items()),
            *(
                [f"guestfwd=tcp:{SHARE}-cmd:{share.command(description.share)}"]
                if description.share
                else []
            ),
        ]
    )
    lan = f"socket,id=lan,mcast=230.0.0.1:{description.lan_port},localaddr=127.0.0.1"
    return [
        *(
            accelerator.QEMU,
            "-name",
            description.name,
            "-machine",
            "q35,i8042=off,hpet=off,vmport=off,smbus=off,sata=off",
        ),
        *accelerator.best(image.kernel).options,
        *("-m", str(description.memory_mb), "-smp", str(description.cpus)),
        *("-nodefaults", "-display", "none", "-rtc", "base=utc"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", " ".join(kernel_line)),
        *("-netdev", access, "-device", f"virtio-net-pci,netdev=access,mac=52:54:00:{mac}"),
        *("-netdev", lan, "-device", f"virtio-net-pci,id=lan-card,netdev=lan,mac=52:54:01:{mac}"),
        *("-device", "virtio-rng-pci"),
    ]
