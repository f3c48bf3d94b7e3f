"""From `POST` to the agent: its process, and its first line. What does the wait before a job save?

A pool of one replica runs as processes of this machine, without Docker, with the demo model. A
replica that waits has loaded the Agent SDK and has had Claude Code read from the disk. Beside it
stands what a job would meet otherwise: the time that the SDK takes to load, and the start of a
Claude Code that has to come from the disk. As a floor, Claude Code with nothing to do.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from httpx_sse import EventSource
from target import show

from claude_jobs.agent.command import bundled_claude
from claude_jobs.development import Pool

# Notes in the job's directory when the agent's process began, then becomes Claude Code.
NOTING = """#!/bin/sh
date +%s.%N >began
exec {claude} "$@"
"""
# A replica has prepared all long before.
REST = 3.0


@dataclass(frozen=True)
class Start:
    """When (seconds since 1970) a job was sent and what followed on it."""

    sent: float
    connected: float
    began: float
    first_line: float


@dataclass(frozen=True)
class OneReplica:
    """A pool of one replica, and the program that it takes for Claude Code."""

    pool: Pool
    http: httpx.AsyncClient
    claude: Path

    async def idle(self) -> None:
        """Wait until the replica waits."""
        while True:
            try:
                answer = await self.http.get("/status")
                if answer.is_success and answer.json()["replicas"]["idle"] == 1:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)

    async def start(self, directory: str) -> Start:
        """Run a job and return how it started."""
        sent, connected, first = time.time(), 0.0, 0.0
        body = {"prompt": "hello", "workspace": directory}
        async with self.http.stream("POST", "/api/execute", json=body) as answer:
            answer.raise_for_status()
            async for event in EventSource(answer).aiter_sse():
                if event.event == "connected":
                    connected = time.time()
                elif event.event == "message" and event.data and not first:
                    first = time.time()
        assert event.event == "completed", event.data
        began = float((self.pool.workspace / directory / "began").read_text())
        return Start(sent, connected, began, first)

    def evict(self) -> None:
        """Drop Claude Code from the page cache, as a machine does that was started anew."""
        with self.claude.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@asynccontextmanager
async def one_replica() -> AsyncIterator[OneReplica]:
    """Run the pool in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        root = Path(directory)
        claude, noting = programs(root)
        pool = Pool(
            root=root / "pool",
            workspace=root / "workspace",
            replicas=1,
            settings={"CLAUDE_PATH": str(noting), "LOG_LEVEL": "error"},
        )
        headers = {"Authorization": f"Bearer {pool.token}"}
        async with (
            pool.running(),
            httpx.AsyncClient(
                base_url=pool.url, headers=headers, timeout=60, trust_env=False
            ) as http,
        ):
            yield OneReplica(pool, http, claude)


def programs(root: Path) -> tuple[Path, Path]:
    """Put Claude Code where the agent's user can run it, and the program that notes its start."""
    root.chmod(0o711)
    claude, noting = root / "claude", root / "noting_claude"
    shutil.copy(bundled_claude(), claude)
    noting.write_text(NOTING.format(claude=claude))
    for program in (claude, noting):
        program.chmod(0o755)
    os.sync()  # what is not on the disk yet cannot be dropped from memory
    return claude, noting


def took(*command: str | Path) -> float:
    """Return how long (seconds) a program runs."""
    started = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def sdk_load(how: str) -> float:
    """Return how long (seconds) a process that is a replica already takes to load the SDK."""
    replica = "import claude_jobs.replica.supervisor"
    whole = took(sys.executable, "-c", f"{replica}; {how}; import claude_jobs.agent.run")
    return whole - took(sys.executable, "-c", replica)


async def measure(rounds: int) -> None:
    """Print all figures."""
    floors, loads, plain_loads = [], [], []
    starts: dict[str, list[Start]] = {"in memory": [], "on the disk alone": []}
    async with one_replica() as replica:
        for number in range(rounds):
            for where, found in starts.items():
                await replica.idle()
                await asyncio.sleep(REST)
                floors.append(took(replica.claude, "--version"))
                loads.append(sdk_load("from claude_jobs.agent.sdk import load_sdk; load_sdk()"))
                plain_loads.append(sdk_load("pass"))
                if where != "in memory":
                    replica.evict()
                found.append(await replica.start(f"{where}-{number}"))
    prepared, evicted = starts.values()
    rows = {
        "floor: claude --version": floors,
        "POST -> connected": [each.connected - each.sent for each in prepared],
        "POST -> the agent's process": [each.began - each.sent for each in prepared],
        "POST -> its first line": [each.first_line - each.sent for each in prepared],
        "saved: loading the SDK": loads,
        "  were `mcp` loaded with it": plain_loads,
        "process -> first line": [each.first_line - each.began for each in prepared],
        "  from the disk": [each.first_line - each.began for each in evicted],
    }
    show(rows, unit="ms", scale=1000)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=30)
    asyncio.run(measure(options.parse_args().rounds))


if __name__ == "__main__":
    main()
