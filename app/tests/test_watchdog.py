"""Agents run only while they are allowed to, whatever becomes of their supervisor."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from claude_jobs.agent.command import AgentUser, as_user

SUPERVISOR = Path(__file__).with_name("watched_supervisor.py")
SUPERVISOR_UID = 10000
AGENT = AgentUser(uid=10001, gid=10001)

# A child, a grandchild in a session of its own and a daemon; each forks all the time.
TREE = """
work() { while sleep 0.02; do echo "$1" >> ticks; done; }
export -f work
work child &
setsid bash -c 'work session' &
(setsid bash -c 'work daemon' &)
wait
"""
KINDS = {"child", "session", "daemon"}

pytestmark = pytest.mark.timeout(30)


@dataclass
class Watched:
    """A supervisor's process with a watchdog, and the directory in which its agents run."""

    process: Process
    watchdog: psutil.Process
    directory: Path
    user: AgentUser | None

    async def say(self, *words: object) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(word) for word in words]).encode() + b"\n")
        return (await self.process.stdout.readline()).decode().strip()

    async def start(self, *program: str) -> psutil.Process:
        arguments = as_user(self.user, [*program]) if self.user else program
        return psutil.Process(int(await self.say("start", self.directory, *arguments)))

    async def start_tree(self) -> None:
        await self.start("bash", "-c", TREE)
        await self.ticks()

    async def allow(self, seconds: float, *, ago: float = 0) -> None:
        assert await self.say("allow", seconds, ago) == "done"

    def agents(self) -> list[psutil.Process]:
        """Find agents by where they run, whoever their parent is; dead ones run nowhere."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, FileNotFoundError):
                if process.cwd() == str(self.directory):
                    found.append(process)
        return found

    def all_stopped(self) -> bool:
        return all(is_stopped(process) for process in self.agents())

    async def ticks(self) -> None:
        """Wait until each kind of process has done something from now on."""
        ticks = self.directory / "ticks"
        ticks.unlink(missing_ok=True)
        await until(lambda: ticks.exists() and set(ticks.read_text().split()) == KINDS)

    async def looked(self) -> None:
        """Wait until the watchdog has slept and woken often enough to have seen all there is."""
        before = self.watchdog.num_ctx_switches().voluntary
        await until(lambda: self.watchdog.num_ctx_switches().voluntary > before + 2)


def is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in {psutil.STATUS_STOPPED, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:
        return True


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ignores(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (ignored,) = (line.split()[1] for line in lines if line.startswith("SigIgn:"))
    return bool(int(ignored, 16) >> (number - 1) & 1)


async def until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="watched-"))
    made.chmod(0o777)
    yield made
    shutil.rmtree(made)


@asynccontextmanager
async def supervisor(directory: Path, *, two_users: bool) -> AsyncIterator[Watched]:
    command = [sys.executable, str(SUPERVISOR)]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SUPERVISOR.parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if two_users:
        command = [
            "setpriv",
            f"--reuid={SUPERVISOR_UID}",
            f"--regid={SUPERVISOR_UID}",
            "--clear-groups",
            "--inh-caps=-all,+setuid,+setgid,+kill",
            "--ambient-caps=+setuid,+setgid,+kill",
            "--",
            # That of the tests may lie in a private home; this one needs no packages.
            "/usr/bin/python3",
            str(SUPERVISOR),
        ]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, env=environment
    )
    assert process.stdout
    pid = int(await process.stdout.readline())
    user = AGENT if two_users else None
    watched = Watched(process, psutil.Process(pid), directory, user)
    try:
        await until(lambda: ignores(pid, signal.SIGTERM))
        yield watched
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        while left := watched.agents():
            for agent in left:
                with suppress(psutil.NoSuchProcess):
                    agent.kill()
        # Only now: an agent holds the other end of the supervisor's output.
        await process.wait()
        await until(lambda: is_gone(watched.watchdog))


@pytest.fixture(
    params=[
        "one user",
        pytest.param(
            "two users",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users"),
        ),
    ]
)
async def watched(directory: Path, request: pytest.FixtureRequest) -> AsyncIterator[Watched]:
    async with supervisor(directory, two_users=request.param == "two users") as running:
        yield running


# The allowance


async def test_the_agent_stops_when_its_time_is_over_although_the_supervisor_hangs(
    watched: Watched,
) -> None:
    await watched.start_tree()
    await watched.allow(1)
    watched.process.send_signal(signal.SIGSTOP)
    await watched.ticks()
    await until(watched.all_stopped)
    assert len(watched.agents()) >= len(KINDS)
    watched.process.send_signal(signal.SIGCONT)
    await watched.allow(60)
    await watched.ticks()


async def test_time_counts_from_when_the_lease_was_asked_for(watched: Watched) -> None:
    await watched.start_tree()
    await watched.allow(20, ago=21)
    await until(watched.all_stopped)


async def test_the_agent_is_not_touched_before_its_time_was_spoken_of(watched: Watched) -> None:
    await watched.start_tree()
    watched.process.kill()
    await until(lambda: is_gone(watched.watchdog))
    await watched.ticks()


async def test_what_starts_while_the_agent_is_stopped_is_stopped_too(watched: Watched) -> None:
    await watched.allow(0)
    # Stopped before it is a program of its own, it keeps the supervisor from an answer.
    starting = asyncio.create_task(watched.start("sleep", "60"))

    def late() -> list[psutil.Process]:
        children = psutil.Process(watched.process.pid).children()
        return [child for child in children if child != watched.watchdog]

    await until(lambda: any(is_stopped(child) for child in late()))
    starting.cancel()


async def test_what_the_agent_stopped_itself_stays_stopped(watched: Watched) -> None:
    own = await watched.start("bash", "-c", "kill -STOP $$; sleep 60")
    await until(lambda: is_stopped(own))
    await watched.start_tree()
    await watched.allow(0)
    await until(watched.all_stopped)
    await watched.allow(60)
    await watched.ticks()
    assert is_stopped(own)


async def test_a_program_whose_first_thread_has_ended_is_stopped_and_killed(
    watched: Watched,
) -> None:
    program = (
        "import ctypes, threading, time\n"
        "def work():\n"
        "    while True: open('ticks', 'a').write('child session daemon\\n'); time.sleep(0.02)\n"
        "threading.Thread(target=work).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit(2) of this thread alone
    )
    hidden = await watched.start("/usr/bin/python3", "-c", program)
    await watched.ticks()
    assert hidden.status() == psutil.STATUS_ZOMBIE

    def states() -> set[str]:
        with suppress(FileNotFoundError):
            tasks = Path(f"/proc/{hidden.pid}/task").glob("*/stat")
            return {task.read_text().rpartition(") ")[2][0] for task in tasks}
        return set()

    await watched.allow(0)
    await until(lambda: states() == {"Z", "T"})
    await watched.allow(60)
    await watched.ticks()
    await watched.say("end", 0.1)
    await until(lambda: not states())


# The end of the supervisor


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
async def test_the_whole_agent_dies_with_its_supervisor(watched: Watched, stopped: bool) -> None:
    await watched.start_tree()
    await watched.allow(0 if stopped else 60)
    if stopped:
        await until(watched.all_stopped)
    else:
        await watched.looked()
    watched.process.kill()
    await until(lambda: not watched.agents())
    await until(lambda: is_gone(watched.watchdog))


async def test_signals_for_the_supervisor_do_not_end_the_watchdog(watched: Watched) -> None:
    await watched.start_tree()
    await watched.allow(60)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        watched.watchdog.send_signal(number)
    assert os.getsid(watched.watchdog.pid) == watched.watchdog.pid
    await watched.allow(0)
    await until(watched.all_stopped)


async def test_a_watchdog_that_is_let_go_ends(watched: Watched) -> None:
    assert await watched.say("close") == "closed"
    assert is_gone(watched.watchdog)


async def test_a_watchdog_that_was_lost_is_noticed(watched: Watched) -> None:
    watched.watchdog.kill()
    await until(lambda: is_gone(watched.watchdog))
    assert "does not listen" in await watched.say("allow", 1, 0)


# The end of the agent


async def test_a_stopped_agent_can_be_ended_and_the_watchdog_is_spared(watched: Watched) -> None:
    await watched.start_tree()
    await watched.allow(0)
    await until(watched.all_stopped)
    await watched.say("end", 0.1)
    assert not watched.agents()
    assert watched.watchdog.is_running()


async def test_a_daemon_that_ended_is_no_process_any_more(watched: Watched) -> None:
    await watched.allow(60)
    await watched.start(
        "bash", "-c", "(setsid bash -c 'echo $$ > daemon; mv daemon pid' &); exec sleep 60"
    )
    pid = watched.directory / "pid"
    await until(pid.exists)
    number = int(pid.read_text())
    # As long as it is a zombie, it is one of the processes that a replica may have.
    await until(lambda: not Path(f"/proc/{number}").exists())
