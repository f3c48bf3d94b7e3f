"""What a machine is like, as it is written down in its directory."""

import hashlib
from dataclasses import dataclass

# What the pool publishes (app_stack_port).
API_PORT = 3000


@dataclass(frozen=True)
class Description:
    """What a machine is like. The ports are on the host's loopback; `share_port` only there."""

    name: str
    release: str
    address: str
    image: str
    hypervisor: str
    ssh_port: int
    api_port: int
    lan_port: int
    share_port: int
    memory_mb: int = 2048
    cpus: int = 2
    share: str = ""

    @property
    def identity(self) -> str:
        """What no other machine of the LAN has: 64 hexadecimal digits."""
        return hashlib.sha256(f"{self.name} {self.address}".encode()).hexdigest()

    @property
    def hardware_addresses(self) -> tuple[str, str]:
        """The addresses of the cards for the way out and for the LAN."""
        end = ":".join(self.identity[index : index + 2] for index in (0, 2, 4))
        return f"52:54:00:{end}", f"52:54:01:{end}"

    @property
    def forwards(self) -> dict[int, int]:
        """The machine's ports by the ports of the host that lead to them."""
        return {self.ssh_port: 22, self.api_port: API_PORT}

    @property
    def kernel_line(self) -> tuple[str, ...]:
        """What the kernel, the system and its generators are told, however they run."""
        return (
            "rw",
            "net.ifnames=0",
            "loglevel=4",
            "systemd.show_status=auto",
            f"systemd.hostname={self.name}",
            f"systemd.machine_id={self.identity[:32]}",
            f"machine.lan={self.address}/24",
        )
