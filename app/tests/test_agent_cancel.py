"""A cancelled agent stops at once, whatever it does, and its session can be gone on with."""

import asyncio
import contextlib
from pathlib import Path
from time import monotonic

import psutil
import pytest
from agent_runs import Machine, Run, machine
from pool_client import appears

from claude_jobs.bus.events import FencedError
from claude_jobs.contract.event import Completed, Failed, FailureCode

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]


async def cancel(run: Run) -> float:
    """Cancel a run, check how it ended, and return how long that took (seconds)."""
    children = psutil.Process().children(recursive=True)
    started = monotonic()
    run.cancelled.set()
    ending = await run.ending
    took = monotonic() - started
    assert ending == Failed(
        code=FailureCode.CANCELLED, error="the job was cancelled", session_id=run.session_id
    )
    assert not [child for child in children if alive(child)]
    return took


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def until(run: Run, kind: str) -> None:
    async with asyncio.timeout(20):
        while not any(line["type"] == kind for line in run.lines):
            run.spoke.clear()
            await run.spoke.wait()


async def recalled(here: Machine, run: Run) -> str:
    asked = await here.run("what did I say before?", session_id=run.session_id)
    ending = asked.ending.result()
    assert isinstance(ending, Completed), ending
    return ending.result


async def test_an_agent_at_work_with_a_tool_is_cancelled(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = here.begin("remember apple\nrun touch started; sleep 60")
        await appears(here.workspace / "started")
        assert await cancel(run) < 2
        # It was asked first: that stands in its events, and its session is whole.
        assert run.lines[-1]["type"] == "result"
        assert run.lines[-1]["is_error"] is True
        assert "apple" in await recalled(here, run)


async def test_an_agent_that_waits_for_the_model_is_cancelled(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = here.begin("remember apple\nstall")
        await until(run, "system")
        assert await cancel(run) < 2


async def test_an_agent_in_the_middle_of_its_words_is_cancelled(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = here.begin("run echo pear\ncount to 60 slowly")
        await until(run, "user")
        assert await cancel(run) < 2
        assert "pear" in await recalled(here, run)


async def test_a_resumed_agent_is_cancelled_and_resumed_again(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        first = await here.run("remember apple")
        second = here.begin("run touch started; sleep 60", session_id=first.session_id)
        await appears(here.workspace / "started")
        assert await cancel(second) < 2
        assert "apple" in await recalled(here, second)


@pytest.mark.parametrize("prompt", ["ignore everything", "ignore an interruption", "be no use"])
async def test_an_agent_that_ignores_it_is_cancelled(
    tmp_path: Path, samples: Path, prompt: str
) -> None:
    async with machine(tmp_path, samples.parent / "fake_claude") as here:
        run = here.begin(prompt)
        await until(run, "system")
        assert await cancel(run) < 2


async def test_an_agent_that_has_not_greeted_is_cancelled(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\ntrap '' TERM INT\ntouch started\nwhile :; do sleep 0.1; done\n")
    mute.chmod(0o755)
    async with machine(tmp_path, mute) as here:
        run = here.begin("hello")
        await appears(here.workspace / "started")
        assert await cancel(run) < 2


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
async def test_an_agent_that_starts_is_cancelled(tmp_path: Path, delay: float) -> None:
    async with machine(tmp_path) as here:
        run = here.begin("run sleep 60")
        while run.pid is None:
            await asyncio.sleep(0)
        await asyncio.sleep(delay)  # no condition: any moment of its start will do
        assert await cancel(run) < 2


async def test_what_was_cancelled_before_is_not_started(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        run = here.begin("hello")
        await cancel(run)
        assert run.pid is None
        assert run.lines == []


async def test_who_is_told_of_a_line_is_not_cut_off(tmp_path: Path) -> None:
    begun: list[object] = []
    told: list[object] = []
    telling = asyncio.Event()

    async def slowly(line: dict[str, object]) -> None:
        begun.append(line["type"])
        telling.set()
        await asyncio.sleep(1.5)  # longer than an interruption is waited for
        told.append(line["type"])

    async with machine(tmp_path) as here:
        run = here.begin("hello", on_frame=slowly)
        await telling.wait()
        await cancel(run)
        assert told == begun != []


async def test_who_tells_of_a_line_is_heard_after_a_cancellation(tmp_path: Path) -> None:
    telling = asyncio.Event()

    async def refuse(_: object) -> None:
        telling.set()
        await asyncio.sleep(1.5)  # longer than an interruption is waited for
        raise FencedError

    async with machine(tmp_path) as here:
        run = here.begin("hello", on_frame=refuse)
        await telling.wait()
        run.cancelled.set()
        with pytest.raises(FencedError):
            await run.ending


async def test_a_run_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    telling = asyncio.Event()

    async def never(_: object) -> None:
        telling.set()
        await asyncio.Event().wait()

    async with machine(tmp_path) as here:
        run = here.begin("run sleep 60", on_frame=never)
        await telling.wait()
        children = psutil.Process().children(recursive=True)
        started = monotonic()
        run.ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run.ending
        assert monotonic() - started < 5
        assert not [child for child in children if alive(child)]
