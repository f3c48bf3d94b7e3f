"""The demo model is only as good as the real Claude Code's work with it."""

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claude_agent_sdk
import pytest
from aiohttp.test_utils import TestServer

from claude_jobs.model_stub import create_app

pytestmark = pytest.mark.asyncio
CLI = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
MODEL = "claude-sonnet-4-5"
LINE_LIMIT = 16 * 1024 * 1024


@dataclass
class Machine:
    """A home and a workspace of their own, and the demo model to talk to."""

    url: str
    home: Path
    workspace: Path

    @asynccontextmanager
    async def start(
        self, prompt: str, *options: str, key: str = "demo", model: str = MODEL
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            CLI,
            *("-p", "--output-format", "stream-json", "--verbose", "--model", model),
            *("--dangerously-skip-permissions", *options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LINE_LIMIT,
            cwd=self.workspace,
            env={
                "HOME": str(self.home),
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "IS_SANDBOX": "1",  # as root the CLI refuses to skip permissions otherwise
                "ANTHROPIC_BASE_URL": self.url,
                "ANTHROPIC_API_KEY": key,
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "CLAUDE_CODE_MAX_RETRIES": "1",
            },
        )
        try:
            async with asyncio.timeout(30):
                assert process.stdin
                process.stdin.write(prompt.encode())
                process.stdin.close()
                yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)  # unlike SIGKILL it ends the Bash tool's child
                await process.communicate()

    async def ask(self, prompt: str, *options: str, key: str = "demo", model: str = MODEL) -> "Run":
        async with self.start(prompt, *options, key=key, model=model) as process:
            lines = [line async for line in read_lines(process)]
            return Run(lines, await process.wait())


@dataclass
class Run:
    lines: list[dict[str, Any]]
    exit_code: int

    @property
    def result(self) -> dict[str, Any]:
        (line,) = (line for line in self.lines if line["type"] == "result")
        return line

    @property
    def tools(self) -> list[str]:
        messages = [line["message"] for line in self.lines if line["type"] == "assistant"]
        blocks = [block for message in messages for block in message["content"]]
        return [block["name"] for block in blocks if block["type"] == "tool_use"]

    @property
    def text(self) -> str:
        assert self.result["is_error"] is False, self.result
        return str(self.result["result"])


async def read_lines(process: asyncio.subprocess.Process) -> AsyncIterator[dict[str, Any]]:
    assert process.stdout
    async for line in process.stdout:
        yield json.loads(line)


@asynccontextmanager
async def machine(directory: Path) -> AsyncIterator[Machine]:
    home, workspace = directory / "home", directory / "workspace"
    home.mkdir()
    workspace.mkdir()
    async with TestServer(create_app()) as server:
        yield Machine(str(server.make_url("/")), home, workspace)


async def test_plain_text_is_echoed(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = await here.ask("hello pool")
    assert run.text.startswith("You said: hello pool")
    assert run.exit_code == 0


@pytest.mark.parametrize("model", [MODEL, "claude-opus-5-5"])  # told their directory differently
async def test_a_file_is_created_in_the_working_directory(tmp_path: Path, model: str) -> None:
    async with machine(tmp_path) as here:
        run = await here.ask("create a file called test.txt with content: a b", model=model)
        assert run.text
        assert run.tools == ["Write"]
        inputs = [line["message"]["content"] for line in run.lines if line["type"] == "assistant"]
        assert inputs[0][0]["input"]["file_path"] == str(here.workspace / "test.txt")
        assert (here.workspace / "test.txt").read_text() == "a b"


async def test_a_file_that_exists_is_overwritten(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        (here.workspace / "test.txt").write_text("old")
        run = await here.ask("create a file called test.txt with content: new")
        assert run.tools == ["Write", "Read", "Write"]
        assert (here.workspace / "test.txt").read_text() == "new"


async def test_steps_run_in_order_and_their_output_is_shown(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = await here.ask(
            "run echo one > a.txt\n"
            "create a file called b.txt\n"
            "read the file a.txt\n"
            "run cat a.txt b.txt; exit 3"
        )
    assert run.tools == ["Bash", "Write", "Read", "Bash"]
    assert "(failed)\nExit code 3\none\nHello from the demo model." in run.text


async def test_a_refused_key_ends_in_a_401(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = await here.ask("hello", key="invalid-key")
    assert run.result["is_error"] is True
    assert run.result["api_error_status"] == 401
    assert run.exit_code == 1


async def test_claude_code_gets_over_a_single_failure(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = await here.ask("fail once with 529\nrun echo after")
    retries = [line for line in run.lines if line.get("subtype") == "api_retry"]
    assert [retry["error_status"] for retry in retries] == [529]
    assert run.tools == ["Bash"]
    assert run.text


async def test_a_resumed_session_remembers(tmp_path: Path) -> None:
    session = str(uuid.uuid4())
    async with machine(tmp_path) as here:
        await here.ask("remember the word apple", "--session-id", session)
        assert (
            "the word apple" in (await here.ask("what did I say before?", "--resume", session)).text
        )
        assert "apple" not in (await here.ask("what did I say before?")).text


async def test_a_session_that_was_cut_off_goes_on_with_its_later_steps(tmp_path: Path) -> None:
    session = str(uuid.uuid4())
    prompt = "run echo 1 >> first\nrun touch started; sleep 60\ncreate a file called last.txt"
    async with machine(tmp_path) as here:
        async with here.start(prompt, "--session-id", session) as process:
            while not (here.workspace / "started").exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
        assert not (here.workspace / "last.txt").exists()
        run = await here.ask("continue", "--resume", session)
        assert run.tools == ["Write"]
        assert (here.workspace / "last.txt").exists()
        assert (here.workspace / "first").read_text() == "1\n"


async def test_a_long_sleep_is_not_refused(tmp_path: Path) -> None:
    async with machine(tmp_path) as here, here.start("run sleep 60") as process:
        async for line in read_lines(process):
            assert line["type"] != "user", "the Bash tool answered instead of sleeping"
            if line.get("subtype") == "task_started":
                return
    pytest.fail("Claude Code ended without starting the command")


async def test_work_forever_goes_on_after_each_command(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = await here.ask("work forever", "--max-turns", "2")
    assert run.result["subtype"] == "error_max_turns"
    assert run.tools[:2] == ["Bash", "Bash"]
