"""The machines of one state directory: they share a LAN that no other machine is on."""

import json
import os
import random
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerator
import cache
import image
import user_mode_kernel
from description import Description
from errors import MachineError
from lan import Lan
from machine import USER, Machine

HYPERVISORS = ("kvm", "user-mode", "tcg")
# Says what runs the machines, instead of what is best.
CHOICE = "MACHINES_HYPERVISOR"
# Emulated, on a busy host; an idle one takes half a minute.
START_SECONDS = 600
# Below the ports that the kernel gives to outgoing connections.
PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Request:
    """A machine that is wanted."""

    name: str
    release: str
    address: str
    memory_mb: int = 2048
    cpus: int = 2
    share: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", self.name):
            raise MachineError(
                f"'{self.name}' is not a host name of small letters, digits and dashes."
            )


class Cluster:
    """The machines of a state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state.resolve()

    def machines(self) -> list[Machine]:
        """Return all machines, those included that were made by half."""
        if not self.state.is_dir():
            return []
        return [Machine(path) for path in sorted(self.state.iterdir()) if path.is_dir()]

    def machine(self, name: str) -> Machine:
        """Return one machine by its name."""
        machine = Machine(self.state / name)
        if not machine.exists:
            raise MachineError(f"There is no machine '{name}' in {self.state}.")
        return machine

    def start(self, requests: list[Request]) -> None:
        """Make the machines that are not there yet, start all and wait until they answer."""
        images = {request.release: image.ready(request.release) for request in requests}
        self.state.mkdir(parents=True, exist_ok=True)
        lan_port = self._lan_port()
        hypervisor = _hypervisor(next(iter(images.values())).kernel) if images else ""
        for request in requests:
            directory = self.state / request.name
            if Machine(directory).exists:
                continue
            ports = self._free_ports(3)
            description = Description(
                **vars(request),
                image=str(images[request.release].directory),
                hypervisor=hypervisor,
                ssh_port=ports[0],
                api_port=ports[1],
                share_port=ports[2],
                lan_port=lan_port,
            )
            Machine.create(directory, description)
        self.power_on([request.name for request in requests])

    def power_on(self, names: list[str]) -> None:
        """Start machines and wait until they answer."""
        machines = [self.machine(name) for name in names]
        for machine in machines:
            machine.power_on()
        with ThreadPoolExecutor(max(len(machines), 1)) as executor:
            list(executor.map(_await_answer, machines))

    def destroy(self) -> None:
        """Take away every machine and the directory."""
        for machine in self.machines():
            machine.power_off()
        Lan(self.state).close()
        shutil.rmtree(self.state, ignore_errors=True)

    def status(self) -> dict[str, dict[str, Any]]:
        """Return what each machine is and whether it runs."""
        return {
            machine.name: vars(machine.description) | {"running": machine.pid() is not None}
            for machine in self.machines()
            if machine.exists
        }

    def inventory(self) -> dict[str, Any]:
        """Return how Ansible reaches the machines: an inventory without groups."""
        hosts = {
            machine.name: {
                "ansible_host": "127.0.0.1",
                "ansible_port": machine.description.ssh_port,
                "ansible_user": USER,
                "ansible_ssh_private_key_file": str(cache.ssh_key()),
                "ansible_ssh_common_args": " ".join(machine.ssh_options()),
                # Without Ansible's -C: to compress costs an emulated CPU more than to send.
                "ansible_ssh_args": "-o ControlMaster=auto -o ControlPersist=10m",
                # Also how long sudo may take to begin, which an emulated CPU needs seconds for.
                "ansible_ssh_timeout": 120,
                "ansible_python_interpreter": "/usr/bin/python3",
                "machine_api_port": machine.description.api_port,
                "machine_share": machine.hypervisor.share_url,
            }
            for machine in self.machines()
            if machine.exists
        }
        return {"all": {"hosts": hosts}}

    def _lan_port(self) -> int:
        recorded = self.state / "lan-port"
        if not recorded.exists():
            recorded.write_text(f"{_free_port(socket.SOCK_DGRAM, set())}\n")
        return int(recorded.read_text())

    def _free_ports(self, count: int) -> list[int]:
        described = [machine.description for machine in self.machines() if machine.exists]
        taken = {port for one in described for port in (one.ssh_port, one.api_port, one.share_port)}
        ports: list[int] = []
        for _ in range(count):
            taken.add(port := _free_port(socket.SOCK_STREAM, taken))
            ports.append(port)
        return ports


def prepare() -> None:
    """Make all that machines start from: it takes minutes the first time, and is kept."""
    images = [image.ready(release) for release in sorted(image.RECIPES)]
    _hypervisor(images[0].kernel)


def _hypervisor(kernel: Path) -> str:
    """Return what runs machines best here; prepares it."""
    chosen = os.environ.get(CHOICE) or ("kvm" if accelerator.has_kvm(kernel) else "user-mode")
    if chosen not in HYPERVISORS:
        raise MachineError(f"{CHOICE} is '{chosen}'; it may be {', '.join(HYPERVISORS)}.")
    if chosen == "user-mode":
        user_mode_kernel.ready()
    return chosen


def _free_port(kind: socket.SocketKind, taken: set[int]) -> int:
    """Return a port that nobody holds, outside of those taken by machines that may be off."""
    for port in random.sample(PORTS, 100):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in taken:
            return port
    raise MachineError(f"No port between {PORTS.start} and {PORTS.stop} is free.")


def _await_answer(machine: Machine) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not machine.answers():
        if machine.pid() is None:
            raise MachineError(
                f"The process of {machine.name} has ended. Its console:\n{machine.console_end()}"
            )
        if time.monotonic() > deadline:
            raise MachineError(
                f"{machine.name} does not answer after {START_SECONDS} s. "
                f"Its console:\n{machine.console_end()}"
            )
        time.sleep(0.5)


def requests(text: str) -> list[Request]:
    """Read the wanted machines from a JSON object of names and descriptions."""
    try:
        return [Request(name, **wanted) for name, wanted in json.loads(text).items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise MachineError(f"The machines are not described as they should be: {error}.") from error
