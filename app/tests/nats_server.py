"""A real nats-server, started as the deployment starts it, with data that outlives it."""

import asyncio
import os
import shutil
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from claude_jobs.broker import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.bus.topology import Bounds, ensure_topology
from claude_jobs.development import free_port

PASSWORDS = {
    GATEWAY_USER: "password-of-the-gateway",
    REPLICA_USER: "password-of-the-replica",
}


class NatsServer:
    """One broker: it can be killed and started again on the same data and the same port."""

    def __init__(self, directory: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self._settings = settings or {}
        self.port = free_port()
        self._monitor_port = free_port()
        self._process: Process | None = None
        secrets = directory / "secrets"
        secrets.mkdir(parents=True)
        for user, password in PASSWORDS.items():
            (secrets / f"broker_{user}_password").write_text(password)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "claude_jobs", "broker"),
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "SECRETS_DIR": str(self.directory / "secrets"),
                "BROKER_PORT": str(self.port),
                "BROKER_MONITOR_PORT": str(self._monitor_port),
                "BROKER_DATA_DIR": str(self.directory / "data"),
                "BROKER_CONFIG_DIR": str(self.directory / "config"),
                **self._settings,
            },
        )

    async def kill(self) -> None:
        """End it as a power failure would."""
        assert self._process
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> None:
        if self._process and self._process.returncode is None:
            await self.kill()
        shutil.rmtree(self.directory)

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    def connected(self, user: str, password: str | None = None) -> AbstractAsyncContextManager[Bus]:
        given = password or PASSWORDS[user]
        return connect(self.url, user=user, password=given, name=f"test {user}")

    @asynccontextmanager
    async def both_ends(self, bounds: Bounds) -> AsyncIterator[tuple[Bus, Bus]]:
        """Connect as gateway and as replica, to empty streams with these bounds."""
        async with self.connected(GATEWAY_USER) as gateway, self.connected(REPLICA_USER) as replica:
            for stream in await gateway.jetstream.streams_info():
                assert stream.config.name
                await gateway.jetstream.delete_stream(stream.config.name)
            await ensure_topology(gateway, bounds)
            yield gateway, replica
