"""What `claude-jobs` shows, and how it ends, with a real pool behind it."""

import asyncio
import json
import os
import pty
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pool_client import RunningPool, appears
from scripted_api import refuses, scripted_api

from claude_jobs.development import free_port

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

WAIT_FOR_GO = "run touch started; until [ -e go ]; do sleep 0.05; done"


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str


def environment(pool: RunningPool) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "CLAUDE_JOBS_URL": pool.pool.url,
        "CLAUDE_JOBS_TOKEN": pool.pool.token,
        "XDG_CONFIG_HOME": "/nonexistent",
        "TERM": "xterm-256color",
        "COLUMNS": "100",
    }


@asynccontextmanager
async def started(pool: RunningPool, *arguments: str, **variables: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "claude_jobs.client", *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=environment(pool) | variables,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: Process, text: bytes = b"") -> Ran:
    out, err = await process.communicate(text)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def run(pool: RunningPool, *arguments: str, text: bytes = b"", **variables: str) -> Ran:
    async with started(pool, *arguments, **variables) as process:
        return await ended(process, text)


async def line_with(process: Process, word: str) -> str:
    """Read standard error up to a line that holds a word."""
    assert process.stderr
    while line := await process.stderr.readline():
        if word in line.decode():
            return line.decode()
    raise AssertionError(f"no line with {word!r}")


# Output


async def test_a_pipe_gets_what_the_agent_says_and_progress_goes_beside(pool: RunningPool) -> None:
    ran = await run(pool, "run", "run echo $((40 + 2))", "--workspace", "piped")
    assert ran.code == 0
    assert ran.out.startswith("The demo model is done: 1 tool call.")
    assert "\n42\n" in ran.out
    assert ran.out.count("The demo model is done") == 1  # the result says the same again
    for said in ("queued at position", "running on replica-", "Bash  echo", "completed: "):
        assert said in ran.err
    assert "\x1b" not in ran.out + ran.err


async def test_quiet_prints_the_result_alone(pool: RunningPool) -> None:
    ran = await run(pool, "run", "--quiet", "hello")
    assert ran.out.startswith("You said: hello")
    assert "completed" not in ran.err


async def test_the_prompt_comes_from_standard_input(pool: RunningPool) -> None:
    ran = await run(pool, "run", "-", text=b"what did I say")
    assert ran.code == 0
    assert "You said nothing before" in ran.out


async def test_json_lines_are_the_events(pool: RunningPool) -> None:
    ran = await run(pool, "run", "--json", "say 10 bytes", "--metadata", "ticket=7")
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["event"] for event in events][:2] == ["queued", "connected"]
    assert events[-1]["event"] == "completed"
    assert events[-1]["data"]["result"] == "demo model"
    job_id = events[0]["data"]["jobId"]

    shown = await run(pool, "attach", "--json", job_id)
    assert shown.out == ran.out
    rest = await run(pool, "attach", "--json", job_id, "--after", str(events[-2]["id"]))
    assert rest.out == ran.out.splitlines(keepends=True)[-1]
    seen = await run(pool, "attach", job_id, "--after", str(events[-1]["id"]))
    assert (seen.code, seen.out) == (0, "")
    listed = await run(pool, "jobs", "--json", "--limit", "1")
    assert json.loads(listed.out)["metadata"] == {"ticket": "7"}


async def test_a_session_is_resumed(pool: RunningPool) -> None:
    first = await run(pool, "run", "--json", "remember the sea")
    session = json.loads(first.out.splitlines()[-1])["data"]["sessionId"]
    assert session in (await run(pool, "sessions")).out
    again = await run(pool, "run", "what did I say", "--resume", session)
    assert "the sea" in again.out
    assert (await run(pool, "sessions", "--delete", session)).code == 0
    assert session not in (await run(pool, "sessions")).out


async def test_what_lists_and_files_show(pool: RunningPool, tmp_path: Path) -> None:
    ran = await run(pool, "run", "--detach", "hello \x1b[31mred")
    job_id = ran.out.strip()
    assert (await run(pool, "attach", "--quiet", job_id)).code == 0
    listed = await run(pool, "jobs", "--status", "completed")
    assert f"{job_id}  completed" in listed.out
    assert "\x1b" not in listed.out
    await pool.idle(3)
    assert "3 of 3 replicas idle" in (await run(pool, "status")).out

    (tmp_path / "here").write_text("text")
    assert (await run(pool, "files", "put", str(tmp_path / "here"), "cli/there")).code == 0
    again = await run(pool, "files", "put", "--new", str(tmp_path / "here"), "cli/there")
    assert again.code == 2
    assert "precondition_failed" in again.err
    assert "4  " in (await run(pool, "files", "list", "cli")).out
    assert (await run(pool, "files", "get", "cli/there", str(tmp_path))).code == 0
    assert (tmp_path / "there").read_text() == "text"
    assert (await run(pool, "files", "rm", "--recursive", "cli")).code == 0
    assert (await run(pool, "files", "list", "cli")).code == 2


# Exit codes


async def test_a_failed_job_is_1(pool: RunningPool) -> None:
    ran = await run(pool, "run", "fail with 400")
    assert ran.code == 1
    assert "agent_error: " in ran.err


async def test_a_job_that_takes_too_long_is_5(pool: RunningPool) -> None:
    ran = await run(pool, "run", "work forever", "--timeout", "2")
    assert (ran.code, "timeout: " in ran.err) == (5, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "required"),
        (["run", "hello", "--token", "secret"], "unrecognized arguments"),
        (["run", "hello", "--metadata", "x"], "must be NAME=TEXT"),
        (["run", "hello", "--max-turns", "0"], "maxTurns: input should be greater"),
        (["run", "hello", "--workspace", "../x"], "workspace: must be a relative path"),
        (["attach", "01a20bd4-0f05-71f1-a384-d35d7cbff432"], "there is no job"),
    ],
)
async def test_a_mistake_is_2(pool: RunningPool, arguments: list[str], said: str) -> None:
    ran = await run(pool, *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


async def test_no_api_and_no_leave_are_3(pool: RunningPool, tmp_path: Path) -> None:
    away = await run(
        pool, "run", "hello", "--give-up-after", "1", "--url", f"http://127.0.0.1:{free_port()}"
    )
    assert (away.code, "cannot be reached" in away.err) == (3, True)
    (tmp_path / "token").write_text("not-the-right-token")
    refused = await run(pool, "run", "hello", "--token-file", str(tmp_path / "token"))
    assert (refused.code, "unauthorized" in refused.err) == (3, True)
    assert "not-the-right-token" not in refused.err
    missing = await run(pool, "run", "hello", "--token-file", str(tmp_path / "missing"))
    assert (missing.code, "cannot be read" in missing.err) == (3, True)


async def test_a_full_queue_is_3_after_the_patience_is_over(pool: RunningPool) -> None:
    async with scripted_api(refuses(429, "queue_full", Retry_After="30")) as api:
        ran = await run(pool, "run", "hello", "--give-up-after", "1", CLAUDE_JOBS_URL=api.url)
    assert (ran.code, "queue_full" in ran.err) == (3, True)


async def test_a_reader_that_has_enough_ends_the_command_and_not_the_job(
    pool: RunningPool,
) -> None:
    prompt = "say 1000000 bytes\n" + WAIT_FOR_GO
    async with started(pool, "run", prompt, "--workspace", "enough") as process:
        job_id = (await line_with(process, "job ")).split()[1]
        assert process.stdout
        await process.stdout.readexactly(10)
        process.stdout._transport.close()  # type: ignore[attr-defined] # there is no other way
        code = await process.wait()
        assert process.stderr
        assert "Traceback" not in (await process.stderr.read()).decode()
    assert code == 141
    await appears(pool.workspace / "enough" / "started")
    (pool.workspace / "enough" / "go").touch()
    assert (await run(pool, "attach", "--quiet", job_id)).code == 0


# Ctrl-C


async def test_the_first_interrupt_cancels_the_job(pool: RunningPool) -> None:
    async with started(pool, "run", WAIT_FOR_GO, "--workspace", "interrupted") as process:
        await appears(pool.workspace / "interrupted" / "started")
        await line_with(process, "Bash")
        process.send_signal(signal.SIGINT)
        ran = await ended(process)
    assert ran.code == 4
    assert "cancelling the job" in ran.err
    assert "cancelled: " in ran.err


async def test_the_second_interrupt_leaves_and_says_how_to_come_back(pool: RunningPool) -> None:
    # An API that never answers the cancellation: the job's end does not come.
    async with started(pool, "run", WAIT_FOR_GO, "--workspace", "left") as process:
        job_id = (await line_with(process, "job ")).split()[1]
        await appears(pool.workspace / "left" / "started")
        await line_with(process, "Bash")
        gateway = pool.pool.processes["gateway"]
        gateway.send_signal(signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGINT)
            await line_with(process, "cancelling")
            process.send_signal(signal.SIGINT)
            ran = await ended(process)
        finally:
            gateway.send_signal(signal.SIGCONT)
    assert ran.code == 130
    assert f"claude-jobs attach {job_id}" in ran.err
    (pool.workspace / "left" / "go").touch()
    shown = await run(pool, "attach", job_id)
    assert shown.code in (0, 4)  # whether the cancellation was sent before the end


async def test_an_interrupt_of_attach_leaves_the_job_alone(pool: RunningPool) -> None:
    job_id = (await run(pool, "run", "--detach", WAIT_FOR_GO, "--workspace", "alone")).out.strip()
    async with started(pool, "attach", job_id) as process:
        await line_with(process, "Bash")
        process.send_signal(signal.SIGINT)
        ran = await ended(process)
    assert ran.code == 130
    assert f"job {job_id} goes on" in ran.err
    (pool.workspace / "alone" / "go").touch()
    assert (await run(pool, "attach", job_id)).code == 0


async def test_cancel_ends_a_job(pool: RunningPool) -> None:
    job_id = (await run(pool, "run", "--detach", "work forever")).out.strip()
    assert (await run(pool, "cancel", job_id)).code == 0
    assert (await run(pool, "attach", job_id)).code == 4
    again = await run(pool, "cancel", job_id)
    assert (again.code, "already ended" in again.err) == (2, True)


# In a terminal


async def test_a_terminal_shows_the_job_live(pool: RunningPool) -> None:
    controller, terminal = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "claude_jobs.client", "run", "run echo hello"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment(pool),
    )
    os.close(terminal)
    shown = await asyncio.to_thread(_read_all, controller)
    os.close(controller)
    assert await process.wait() == 0
    for said in ("running on replica-", "● Bash", "The demo model is done", "completed: "):
        assert said in shown
    assert "\x1b[?25l" in shown  # a live display hides the cursor
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # and gives it back


def _read_all(terminal: int) -> str:
    shown = b""
    try:
        while piece := os.read(terminal, 65_536):
            shown += piece
    except OSError:  # its other side was closed
        pass
    return shown.decode()
