"""A process beside the supervisor: agents run only as long as they are allowed to.

It reads deadlines from standard input, one a line: seconds of `clock`, until which everything
below the supervisor may run. After the deadline all of it is stopped (SIGSTOP), with a later one
it goes on (SIGCONT), and when the input ends it is killed: the supervisor closed it, or is dead.
The supervisor need not be able to do anything for this. Before the first deadline nothing is
touched.

It imports as little as can be, as every replica runs one.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterable

from claude_jobs.agent import process_table
from claude_jobs.agent.process_table import Identity, Process

# Seconds between two looks at the processes, and while some do not obey yet.
_LOOK_EVERY = 0.25
_LOOK_AGAIN = 0.005
# A tree that still runs after so many seconds of being stopped is killed as it runs.
_STOPPING_LIMIT = 1.0


def clock() -> float:
    """Return seconds on a clock that all processes share and that a suspended machine keeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Agents:
    """All processes below the supervisor but this one, also after the supervisor has died.

    Raises `ProcessLookupError` when it has died already.
    """

    def __init__(self, supervisor: int) -> None:
        if os.getppid() != supervisor:
            raise ProcessLookupError(supervisor)
        self._supervisor = process_table.read()[supervisor]
        self._ours = {supervisor, os.getpid()}
        self._known: set[Identity] = set()
        self._sessions: set[int] = set()
        self._stopped: set[Identity] = set()

    @property
    def held(self) -> bool:
        """Whether `stop` stopped any that have not gone on since."""
        return bool(self._stopped)

    def look(self) -> list[Process]:
        """Find those that live, and remember them."""
        table = process_table.read()
        roots = {pid for pid, each in table.items() if each.identity == self._supervisor.identity}
        # Asked after reading: while it dies its children change to another parent one by one.
        if os.getppid() != self._supervisor.pid:
            roots |= {
                pid
                for pid, each in table.items()
                if each.identity in self._known or each.session in self._sessions
            }
        found = [
            each
            for each in process_table.at_or_below(table, roots)
            if each.pid not in self._ours and not each.dead
        ]
        self._known = {each.identity for each in found}
        self._sessions = {each.session for each in found} - {self._supervisor.session}
        return found

    def stop(self) -> bool:
        """Stop each that runs; return whether none was seen running."""
        running = [
            process
            for process in self.look()
            if not process.stopped
            # One that is waiting for a disk obeys before it does anything else.
            and not (process.waits_in_kernel and process.identity in self._stopped)
        ]
        _signal_all(running, signal.SIGSTOP)
        self._stopped.update(process.identity for process in running)
        return not running

    def go_on(self) -> None:
        """Let those go on that `stop` stopped, and not those that stopped each other."""
        _signal_all(
            [process for process in self.look() if process.identity in self._stopped],
            signal.SIGCONT,
        )
        self._stopped.clear()

    def kill(self) -> None:
        """Kill them all. They are stopped first: what stands still cannot fork and hide."""
        until = time.monotonic() + _STOPPING_LIMIT
        while not self.stop() and time.monotonic() < until:
            time.sleep(_LOOK_AGAIN)
        killed: set[Identity] = set()
        while left := [each for each in self.look() if each.identity not in killed]:
            _signal_all(left, signal.SIGKILL)
            killed.update(process.identity for process in left)
            time.sleep(_LOOK_AGAIN)


def watch(supervisor: int, channel: int) -> None:
    """Obey the deadlines that come through `channel` until it ends."""
    agents = Agents(supervisor)
    deadline: float | None = None
    wait: float | None = None
    unread = b""
    try:
        while True:
            if select.select([channel], [], [], wait)[0]:
                received = os.read(channel, 65_536)
                if not received:
                    return
                *lines, unread = (unread + received).split(b"\n")
                if lines:
                    deadline = float(lines[-1])
            if deadline is not None:
                wait = _enforce(agents, deadline)
    finally:
        # Also where this fails: what nobody watches must not run.
        if deadline is not None:
            agents.kill()


def _enforce(agents: Agents, deadline: float) -> float:
    """Let the agents run or stop them; return the seconds until the next look."""
    held = agents.held
    if (left := deadline - clock()) > 0:
        if held:
            agents.go_on()
            _say("the agent goes on: its time was prolonged")
        else:
            agents.look()
        return min(_LOOK_EVERY, left)
    all_stopped = agents.stop()
    if agents.held and not held:
        _say("the agent is stopped: its time was not prolonged")
    return _LOOK_EVERY if all_stopped else _LOOK_AGAIN


def _signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        # One that has ended, or may not be touched, must not keep the others running.
        with contextlib.suppress(OSError):
            os.kill(process.pid, number)


def _say(message: str) -> None:
    """Log like `claude_jobs.log`, unless nobody takes it: then waiting would be the end of us."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    line = (
        f'{{"level": "WARNING", "logger": "{__package__}.watchdog", "message": "{message}", '
        f'"process": "watchdog", "timestamp": "{now}"}}\n'
    )
    if select.select([], [sys.stderr], [], 0)[1]:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), line.encode())


def main() -> int:
    """Watch over what is below the supervisor, whose process id is the argument."""
    # A terminal sends these to all of its processes: here the end of the input counts.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        watch(int(sys.argv[1]), sys.stdin.fileno())
    except ProcessLookupError:
        # The supervisor died while this started: it had no time to start an agent.
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
