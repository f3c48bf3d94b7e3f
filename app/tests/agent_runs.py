"""Runs of the real Claude Code against the model stub, each on a home of its own."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestServer
from claude_agent_sdk import SessionKey, SessionStoreEntry

from claude_jobs.agent.command import bundled_claude
from claude_jobs.agent.credentials import parse_credentials
from claude_jobs.agent.run import AgentSetup, run_agent
from claude_jobs.contract.event import TerminalEvent
from claude_jobs.contract.job import JobRequest, PermissionMode
from claude_jobs.model_stub import create_app


class Saved:
    """Sessions that are kept in memory."""

    def __init__(self) -> None:
        self.transcripts: dict[str, dict[tuple[str, str], list[bytes]]] = {}
        self.flushed = False

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        session = self.transcripts.setdefault(key["session_id"], {})
        lines = session.setdefault((key["project_key"], key.get("subpath", "")), [])
        lines += [json.dumps(entry, separators=(",", ":")).encode() for entry in entries]
        self.flushed = False

    async def take_over(self, session_id: str) -> Mapping[tuple[str, str], Sequence[bytes]]:
        return self.transcripts.get(session_id, {})

    async def flush(self) -> None:
        self.flushed = True


@dataclass
class Machine:
    """A workspace, and the demo model to talk to. Every run has a home that no other had."""

    url: str
    root: Path
    claude: Path
    sessions: Saved = field(default_factory=Saved)

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    def setup(self, home: Path, **changes: Any) -> AgentSetup:
        return AgentSetup(
            **{
                "claude": self.claude,
                "home": home,
                "user": None,
                "base_url": self.url,
                "max_retries": 1,
                "max_turns": 100,
                "idle_timeout": 30,
                "result_grace": 5,
                **changes,
            }
        )

    def begin(self, prompt: str, *, session_id: str | None = None, **changes: Any) -> "Run":
        """Start a run; with a `session_id` it resumes that session."""
        home = self.root / f"home-{uuid.uuid4()}"
        home.mkdir()
        return Run(self, home, prompt, session_id or str(uuid.uuid4()), bool(session_id), changes)

    async def run(self, prompt: str, **more: Any) -> "Run":
        run = self.begin(prompt, **more)
        await run.ending
        return run


class Run:
    """One call of `run_agent`."""

    def __init__(
        self,
        machine: Machine,
        home: Path,
        prompt: str,
        session_id: str,
        resume: bool,
        changes: Mapping[str, Any],
    ) -> None:
        self.home = home
        self.session_id = session_id
        self.lines: list[dict[str, Any]] = []
        self.cancelled = asyncio.Event()
        self.pid: int | None = None
        self.spoke = asyncio.Event()

        async def keep(line: dict[str, Any]) -> None:
            self.lines.append(line)
            self.spoke.set()

        self.ending: asyncio.Task[TerminalEvent] = asyncio.create_task(
            run_agent(
                **{
                    "setup": machine.setup(home),
                    "credentials": parse_credentials('{"apiKey": "demo"}'),
                    # As root, which tests may be, the CLI does not skip permissions.
                    "request": JobRequest(
                        prompt="not sent",
                        permission_mode=PermissionMode.DONT_ASK,
                        allowed_tools=["Bash", "Write", "Read"],
                    ),
                    "session_id": session_id,
                    "prompt": prompt,
                    "resume": resume,
                    "sessions": machine.sessions,
                    "directory": machine.workspace,
                    "time_limit": 40,
                    "on_frame": keep,
                    "cancelled": self.cancelled,
                    "on_started": self._started,
                    **changes,
                }
            )
        )

    def _started(self, pid: int) -> None:
        self.pid = pid


@asynccontextmanager
async def machine(root: Path, claude: Path | None = None) -> AsyncIterator[Machine]:
    async with TestServer(create_app()) as server:
        made = Machine(str(server.make_url("/")), root, claude or bundled_claude())
        made.workspace.mkdir()
        yield made
