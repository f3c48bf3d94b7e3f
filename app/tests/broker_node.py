"""A node of the deployment as the broker sees it: a directory, and what runs there."""

import asyncio
import contextlib
import os
import shutil
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx

from claude_jobs.broker.users import BROKER_USER, GATEWAY_USER, REPLICA_USER, broker_password
from claude_jobs.bus.connection import Bus, connect
from claude_jobs.development import free_port
from claude_jobs.secret_files import make_secret_files
from claude_jobs.settings import BrokerSettings, GatewaySettings, load

# What the development's pool gives its broker, too.
ROOM = {"EVENT_BYTES": str(2**28), "SESSION_BYTES": str(2**28)}


class BrokerNode:
    """One node of several: its server can be killed, and be started as one of so many."""

    def __init__(self, name: str, directory: Path, secrets: Path) -> None:
        self.name = name
        self.directory = directory
        self.secrets = secrets
        self.port = self.cluster_port = self._monitor_port = 0
        self.server: Process | None = None
        self.join: Process | None = None
        self._servers = 1
        self._routes: Sequence[str] = ()
        self._others = ""
        make_secret_files(secrets)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.directory / "data"

    async def start(
        self, *, servers: int = 1, routes: Sequence[str] = (), others: str = ""
    ) -> None:
        """Start what the entrypoint of the image starts."""
        self.take_ports()
        self._servers, self._routes, self._others = servers, routes, others
        if servers == 1:
            self.cluster_port = 0
        self.server = await self._process("broker")
        if servers > 1:
            await self.start_join()

    def environment(self) -> dict[str, str]:
        """What a process of the node is started with."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "SECRETS_DIR": str(self.secrets),
            "BROKER_PORT": str(self.port),
            "BROKER_MONITOR_PORT": str(self._monitor_port),
            "BROKER_CLUSTER_PORT": str(self.cluster_port),
            "BROKER_DATA_DIR": str(self.data),
            "BROKER_CONFIG_DIR": str(self.directory / "config"),
            "BROKER_SERVERS": str(self._servers),
            "BROKER_ROUTES": ",".join(self._routes),
            "BROKER_URL": self._others or self.url,
            "NODE_NAME": self.name,
            **ROOM,
        }

    def forget(self) -> None:
        """Take the data away, as a new machine has none."""
        shutil.rmtree(self.data)

    def take_ports(self) -> None:
        """Take the node's ports, no earlier than they are used: others might use them before."""
        self.port = self.port or free_port()
        self._monitor_port = self._monitor_port or free_port()
        self.cluster_port = self.cluster_port or free_port()

    async def start_join(self) -> None:
        self.join = await self._process("broker-join")

    async def _process(self, name: str) -> Process:
        command = (sys.executable, "-m", "claude_jobs", name)
        return await asyncio.create_subprocess_exec(*command, env=self.environment())

    async def healthy(self) -> bool:
        """Ask what the health check of the stack asks."""
        url = f"http://127.0.0.1:{self._monitor_port}/healthz?js-enabled-only=true"
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=1) as http:
                return (await http.get(url)).status_code == 200
        except httpx.HTTPError:
            return False

    async def kill(self) -> None:
        """End everything at once, as a power failure would."""
        for process in (self.join, self.server):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def stop(self) -> None:
        """End the server as Swarm does."""
        assert self.server
        self.server.terminate()
        await self.server.wait()

    def connected(self, user: str) -> AbstractAsyncContextManager[Bus]:
        return connect(self.url, user=user, password=self.password(user), name=f"test {user}")

    def password(self, user: str) -> str:
        if user == BROKER_USER:
            return broker_password(load(BrokerSettings, secrets_dir=self.secrets))
        assert user in (GATEWAY_USER, REPLICA_USER)
        return (self.secrets / f"broker_{user}_password").read_text()


class BrokerNodes:
    """Three nodes, of which the first has run alone."""

    def __init__(self, directory: Path) -> None:
        secrets = directory / "pool" / "secrets"
        self.nodes = [BrokerNode(f"node-{n}", directory / f"node-{n}", secrets) for n in range(3)]
        self.first = self.nodes[0]

    @property
    def urls(self) -> str:
        return ",".join(node.url for node in self.nodes)

    async def start(self) -> None:
        await asyncio.gather(*map(self.start_one, self.nodes))

    async def start_one(self, node: BrokerNode) -> None:
        # The others learn of each other from the last.
        last = self.nodes[-1]
        last.take_ports()
        routes = [f"127.0.0.1:{last.cluster_port}"]
        others = ",".join(each.url for each in self.nodes if each.port and each is not node)
        await node.start(servers=len(self.nodes), routes=routes, others=others)

    async def replace(self, node: BrokerNode, name: str) -> BrokerNode:
        """Start a server on a new node, in the place of one whose power is gone."""
        await node.kill()
        new = BrokerNode(name, node.directory.parent / name, node.secrets)
        await self._put(new, in_place_of=node)
        return new

    async def move(self, node: BrokerNode, to: BrokerNode) -> None:
        """End a server and start the one of another node, as Swarm does."""
        await node.stop()
        await self._put(to, in_place_of=node)

    async def _put(self, node: BrokerNode, *, in_place_of: BrokerNode) -> None:
        self.nodes[self.nodes.index(in_place_of)] = node
        await self.start_one(node)

    async def joined(self) -> None:
        """Wait until every server has joined."""
        for node in self.nodes:
            assert node.join
            assert await node.join.wait() == 0

    def connected(self, user: str = GATEWAY_USER) -> AbstractAsyncContextManager[Bus]:
        return connect(self.urls, user=user, password=self.first.password(user), name="test")

    def gateway_settings(self, servers: int = 3) -> GatewaySettings:
        """What a gateway of these servers has."""
        return GatewaySettings(
            _secrets_dir=self.first.secrets,
            allow_anonymous=True,
            broker_url=self.urls if servers > 1 else self.first.url,
            broker_servers=servers,
        )

    def leader(self, name: str | None) -> BrokerNode:
        """Return the node whose server has this name."""
        (found,) = [node for node in self.nodes if f"nats-{node.name}" == name]
        return found


@asynccontextmanager
async def broker_nodes(directory: Path) -> AsyncIterator[BrokerNodes]:
    """Have three nodes for as long as the block runs."""
    nodes = BrokerNodes(directory)
    try:
        yield nodes
    finally:
        for node in nodes.nodes:
            await node.kill()
