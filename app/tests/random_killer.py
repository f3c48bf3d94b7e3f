"""Kills processes of a pool at random, again and again; who was killed is noted."""

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field

import psutil
from pool_client import RunningPool

# Seconds between two kills.
_PAUSE = (0.5, 1.5)
_WEIGHTS = {"replica": 4, "agent": 3, "gateway": 1, "broker": 1}


@dataclass
class RandomKiller:
    """Kills in an order that `seed` gives; `agent` is a word of the agents' command line.

    `replicas` are the names, as events tell them, of those who were killed or whose agent was;
    `kills` counts by kind.
    """

    pool: RunningPool
    seed: int
    agent: str
    replicas: set[str] = field(default_factory=set)
    kills: Counter[str] = field(default_factory=Counter)

    async def kill_on(self) -> None:
        """Kill (SIGKILL) until cancelled. What is killed is started again by the pool."""
        chance = random.Random(self.seed)
        while True:
            await asyncio.sleep(chance.uniform(*_PAUSE))
            (kind,) = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
            victims = self._agents() if kind == "agent" else self._processes(kind)
            if not victims:
                continue
            victim = chance.choice(victims)
            with contextlib.suppress(psutil.NoSuchProcess):  # it may just have ended by itself
                if kind in {"replica", "agent"}:
                    self.replicas.add(_replica(victim))
                victim.kill()
                self.kills[kind] += 1

    def _processes(self, kind: str) -> list[psutil.Process]:
        found = []
        for name, process in sorted(self.pool.pool.processes.items()):
            if name.startswith(kind) and process.returncode is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(process.pid))
        return found

    def _agents(self) -> list[psutil.Process]:
        found = []
        for supervisor in self._processes("replica"):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [
                    child
                    for child in supervisor.children()
                    if any(self.agent in word for word in child.cmdline())
                ]
        return found


def _replica(process: psutil.Process) -> str:
    """Return the name under which events tell of a supervisor, or of an agent's."""
    variables = process.environ()
    if "REPLICA_NAME" not in variables:
        variables = psutil.Process(process.ppid()).environ()
    return str(variables["REPLICA_NAME"])
