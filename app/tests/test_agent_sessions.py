"""Sessions outlive the container: the real Claude Code goes on with what was saved of them."""

import asyncio
import os
import signal
import stat
import tempfile
from pathlib import Path

import pytest
from agent_runs import Machine, Run, Saved, machine
from nats_server import NatsServer
from pool_client import appears

from claude_jobs.agent.command import AgentUser
from claude_jobs.agent.outcome import AgentKilledError
from claude_jobs.agent.process_tree import spared
from claude_jobs.agent.session_files import NoSavedSessionError, restore_session
from claude_jobs.bus.sessions import SessionLog
from claude_jobs.bus.topology import Bounds
from claude_jobs.contract.event import Completed

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]


def answer(run: Run) -> str:
    ending = run.ending.result()
    assert isinstance(ending, Completed), ending
    assert ending.session_id == run.session_id
    return ending.result


async def test_a_session_is_gone_on_with_on_another_machine(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        first = await here.run("remember apple\nrun echo one")
        assert here.sessions.flushed
        second = await here.run("remember pear", session_id=first.session_id)
        asked = await here.run("what did I say before?", session_id=first.session_id)
        assert "apple" in answer(asked)
        assert "pear" in answer(asked)
        assert len({first.home, second.home, asked.home}) == 3
        assert list(here.sessions.transcripts) == [first.session_id]
        # What the store is told is not the agent's word.
        kinds = {line["type"] for run in (first, asked) for line in run.lines}
        assert "transcript_mirror" not in kinds
        assert "result" in kinds


async def test_a_session_is_gone_on_with_in_another_directory(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        first = await here.run("remember apple")
        (tmp_path / "elsewhere").mkdir()
        asked = await here.run(
            "what did I say before?",
            session_id=first.session_id,
            directory=tmp_path / "elsewhere",
        )
        assert "apple" in answer(asked)
        again = await here.run("what did I say before?", session_id=first.session_id)
        assert "apple" in answer(again)
        assert len(here.sessions.transcripts[first.session_id]) == 1


async def test_a_session_is_gone_on_with_after_its_agent_was_killed(tmp_path: Path) -> None:
    prompt = "run echo 1 >> first\nrun touch started; sleep 60\ncreate a file called last.txt"
    async with machine(tmp_path) as here:
        lost = here.begin(prompt)
        await appears(here.workspace / "started")
        await saved(here, lost, b"touch started", b"tool_use")
        assert lost.pid is not None
        os.kill(lost.pid, signal.SIGKILL)
        with pytest.raises(AgentKilledError):
            await lost.ending
        resumed = await here.run("continue", session_id=lost.session_id)
        assert answer(resumed)
        assert (here.workspace / "last.txt").exists()
        assert (here.workspace / "first").read_text() == "1\n"


async def saved(here: Machine, run: Run, *words: bytes) -> None:
    """Wait until an entry with these words is saved, though the turn has not ended."""
    async with asyncio.timeout(10):
        while not any(
            all(word in line for word in words)
            for lines in here.sessions.transcripts.get(run.session_id, {}).values()
            for line in lines
        ):
            await asyncio.sleep(0.02)


async def test_a_session_of_which_nothing_was_saved_cannot_be_resumed(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = here.begin("hello", session_id="7d3b7a3e-0000-4000-8000-000000000000")
        with pytest.raises(NoSavedSessionError):
            await run.ending
        assert run.pid is None


async def test_an_agent_saves_no_session_but_its_own(tmp_path: Path, samples: Path) -> None:
    async with machine(tmp_path, samples.parent / "fake_claude") as here:
        run = await here.run("save another session")
        assert isinstance(run.ending.result(), Completed)
        assert here.sessions.transcripts == {}
        own = await here.run("save a session")
        assert list(here.sessions.transcripts) == [own.session_id]


async def test_a_session_that_cannot_be_saved_does_not_end_the_job(tmp_path: Path) -> None:
    class Full(Saved):
        async def append(self, *_: object) -> None:
            raise OSError("full")

    async with machine(tmp_path) as here:
        run = await here.run("hello", sessions=Full())
        assert answer(run).startswith("You said: hello")
        assert not any(line.get("subtype") == "mirror_error" for line in run.lines)


async def test_a_session_is_carried_by_the_broker(tmp_path: Path, nats_server: NatsServer) -> None:
    with spared(nats_server.pid):
        async with (
            nats_server.both_ends(Bounds()) as (_, replica),
            machine(tmp_path) as here,
        ):
            first = await here.run("remember apple", sessions=SessionLog(replica))
            asked = await here.run(
                "what did I say before?",
                session_id=first.session_id,
                sessions=SessionLog(replica),
            )
            assert "apple" in answer(asked)


# The files


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def test_files_are_private_and_lie_where_they_lay(tmp_path: Path) -> None:
    sessions = Saved()
    sessions.transcripts["s"] = {
        ("-a", ""): [b'{"n":1}', b'{"n":2}'],
        ("-a", "subagents/agent-1"): [
            b'{"type":"agent_metadata","name":"old"}',
            b'{"n":3}',
            b'{"type":"agent_metadata","name":"new"}',
        ],
    }
    await restore_session(sessions, "s", projects=tmp_path / "projects", user=None)
    assert {path: (tmp_path / path).read_text() for path in files(tmp_path)} == {
        "projects/-a/s.jsonl": '{"n":1}\n{"n":2}\n',
        "projects/-a/s/subagents/agent-1.jsonl": '{"n":3}\n',
        "projects/-a/s/subagents/agent-1.meta.json": '{"name": "new"}',
    }
    for path in ("projects", "projects/-a", *files(tmp_path)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize(
    ("project", "subpath"),
    [
        ("..", ""),
        ("a/b", ""),
        ("", ""),
        ("-a", "../../x"),
        ("-a", "/etc/x"),
        ("-a", "x//y"),
        ("-a", "x/./y"),
        ("-a", "x\0"),
    ],
)
async def test_no_file_is_written_elsewhere(tmp_path: Path, project: str, subpath: str) -> None:
    sessions = Saved()
    sessions.transcripts["s"] = {("-a", ""): [b"{}"], (project, subpath): [b'{"bad":1}']}
    await restore_session(sessions, "s", projects=tmp_path / "projects", user=None)
    assert files(tmp_path) == ["projects/-a/s.jsonl"]


async def test_a_subagent_alone_is_no_saved_session(tmp_path: Path) -> None:
    sessions = Saved()
    sessions.transcripts["s"] = {("-a", "subagents/agent-1"): [b"{}"]}
    with pytest.raises(NoSavedSessionError):
        await restore_session(sessions, "s", projects=tmp_path, user=None)


async def test_a_home_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    sessions = Saved()
    sessions.transcripts["s"] = {("-a", ""): [b"{}"]}
    (tmp_path / "projects").write_text("no directory")
    with pytest.raises(OSError, match="cannot write"):
        await restore_session(sessions, "s", projects=tmp_path / "projects", user=None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
async def test_files_belong_to_the_agent() -> None:
    user = AgentUser(10001, 10001)
    # Not below pytest's own directory, which no other user may enter.
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        os.chown(home, user.uid, user.gid)
        sessions = Saved()
        sessions.transcripts["s"] = {("-a", ""): [b"{}"]}
        await restore_session(sessions, "s", projects=home / "projects", user=user)
        made = (home / "projects" / "-a" / "s.jsonl").stat()
        assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (10001, 10001, 0o600)
