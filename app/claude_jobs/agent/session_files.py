"""The files of a saved session, put where Claude Code looks for them.

The supervisor may neither write into the agent's home nor give a file away. A process of the
agent's user writes what it reads from standard input.
"""

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from claude_jobs.agent.command import AgentUser, as_user

if TYPE_CHECKING:
    from claude_agent_sdk import SessionKey, SessionStoreEntry

log = logging.getLogger(__name__)

# Private to the agent's user, as the CLI itself makes them.
_WRITE = 'umask 077 && mkdir -p -- "$1" && exec cat >"$1/$2"'
_AGENT_METADATA = b"agent_metadata"


class NoSavedSessionError(Exception):
    """Nothing of the session was saved: it cannot be resumed."""


class SavedSessions(Protocol):
    """Where sessions are kept; beside it stands what the Agent SDK asks of a session store."""

    async def append(self, key: "SessionKey", entries: "list[SessionStoreEntry]") -> None:
        """Append entries to a transcript."""

    async def take_over(self, session_id: str) -> Mapping[tuple[str, str], Sequence[bytes]]:
        """Return each transcript's JSON lines by project key and subpath; shut others out.

        The subpath of the main transcript is empty.
        """

    async def flush(self) -> None:
        """Wait until nothing is on its way any more."""


async def restore_session(
    sessions: SavedSessions, session_id: str, *, projects: Path, user: AgentUser | None
) -> None:
    """Write a session's files below `projects`; raises `NoSavedSessionError`."""
    transcripts = await sessions.take_over(session_id)
    if not any(not subpath for _, subpath in transcripts):
        raise NoSavedSessionError(f"nothing of session {session_id} was saved")
    for (project, subpath), lines in transcripts.items():
        path = _file(session_id, project, subpath)
        if path is None:
            log.warning("a transcript has an impossible name", extra={"session": session_id})
            continue
        # What describes a subagent comes between its lines and has a file of its own.
        about: bytes | None = None
        rest: list[bytes] = []
        for line in lines:
            if subpath and _describes_agent(line):
                about = line
            else:
                rest.append(line)
        if rest:
            await _write(projects / path, b"\n".join([*rest, b""]), user)
        if about is not None:
            metadata = {name: value for name, value in json.loads(about).items() if name != "type"}
            file = projects / path.with_suffix(".meta.json")
            await _write(file, json.dumps(metadata).encode(), user)


def _file(session_id: str, project: str, subpath: str) -> PurePosixPath | None:
    """Return a transcript's place below the directory of projects, if it can have one there."""
    parts = [project, session_id, *(subpath.split("/") if subpath else ())]
    if any(part in {"", ".", ".."} or "/" in part or "\0" in part for part in parts):
        return None
    path = PurePosixPath(*parts)
    return path.with_name(f"{path.name}.jsonl")


def _describes_agent(line: bytes) -> bool:
    return _AGENT_METADATA in line and json.loads(line).get("type") == _AGENT_METADATA.decode()


async def _write(path: Path, content: bytes, user: AgentUser | None) -> None:
    command = ["sh", "-c", _WRITE, "sh", str(path.parent), path.name]
    process = await asyncio.create_subprocess_exec(
        *(as_user(user, command) if user else command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.defpath},
    )
    _, said = await process.communicate(content)
    if process.returncode != 0:
        raise OSError(f"cannot write {path}: {said.decode(errors='replace').strip()}")
