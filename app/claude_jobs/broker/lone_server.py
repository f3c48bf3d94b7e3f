"""A server on a node's store that only this process can reach, and that ends with it."""

import asyncio
import contextlib
import json
import secrets
import socket
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from claude_jobs.broker.configuration import jetstream
from claude_jobs.broker.program import find_server, version_of, write_configuration
from claude_jobs.broker.users import BROKER_USER
from claude_jobs.bus.connection import Bus, connect, login
from claude_jobs.settings import BrokerSettings

_POLL = 0.25


@asynccontextmanager
async def lone_server(settings: BrokerSettings) -> AsyncIterator[Bus]:
    """Run a private server on the store of a lone server, in `broker_data_dir`.

    Raises `OSError` when the server does not take the store.
    """
    password = secrets.token_hex(32)
    port = _free_port()
    server = find_server()
    made = {
        "server_name": "nats",
        "listen": f"127.0.0.1:{port}",
        "jetstream": jetstream(settings, version_of(server), settings.broker_data_dir),
        "authorization": {"user": login(BROKER_USER, password), "password": password},
    }
    settings.broker_config_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.broker_config_dir) as directory:
        path = Path(directory) / "nats.conf"
        write_configuration(path, json.dumps(made))
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", server, "--config", str(path))
        )
        try:
            await _listens(process, port)
            async with connect(
                f"nats://127.0.0.1:{port}", user=BROKER_USER, password=password, name="lone-server"
            ) as bus:
                yield bus
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _listens(process: Process, port: int) -> None:
    """Wait until a server has read its store and listens; raises `OSError` when it has ended."""
    while process.returncode is None:
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(_POLL)
    raise OSError(f"nats-server ended with {process.returncode} on the lone server's store")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
