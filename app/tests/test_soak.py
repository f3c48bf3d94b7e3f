"""300 jobs go through a pool whose processes are killed at random, about one a second.

    SOAK_SEED=7 python -m pytest tests/test_soak.py

repeats the order of kills of an earlier run; the jobs' own course is never the same.
"""

import asyncio
import itertools
import os
import random
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TypeVar

import pytest
from pool_client import RunningPool, program_for_everybody, running_pool
from random_killer import RandomKiller

from claude_jobs.client import ApiError, Client, ClientError, JobEvent
from claude_jobs.contract.event import FailureCode
from claude_jobs.contract.job import TERMINAL_STATUSES

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]

JOBS = 300
REPLICAS = 6
MAX_ATTEMPTS = 3
SETTINGS = {"LEASE_SECONDS": "3", "MAX_ATTEMPTS": str(MAX_ATTEMPTS), "LOG_LEVEL": "error"}
# So many jobs are on their way at a time.
_AT_A_TIME = 24
_STEPS = (2, 12)
_SENT_TWICE = 0.2
_CANCELLED = 0.1
_RETRY = 0.1
# A gateway looks every 10 s for jobs that a killed broker has forgotten to remove.
_EMPTIED_WITHIN = 30.0
_UNHEARD = {"Claude Code takes no more input", "Claude Code closed its input"}

_Answer = TypeVar("_Answer")


@dataclass
class Story:
    """One job as its client asked for it and saw it."""

    directory: str
    steps: int
    sent_twice: bool
    cancelled: bool
    job_id: str = ""
    events: list[JobEvent] = field(default_factory=list)
    came_back: int = 0

    @property
    def begins(self) -> list[JobEvent]:
        return [event for event in self.events if event.type == "connected"]

    @property
    def ending(self) -> JobEvent:
        return self.events[-1]

    @property
    def code(self) -> str:
        return str(self.ending.data.get("code", "completed"))


@dataclass
class Clients:
    """A client of each gateway: where one does not answer, the next is asked."""

    clients: list[Client]

    async def ask(self, what: Callable[[Client], Awaitable[_Answer]]) -> _Answer:
        for client in itertools.cycle(self.clients):
            try:
                return await what(client)
            except ClientError as error:
                if isinstance(error, ApiError) and error.status != 503:
                    raise
            await asyncio.sleep(_RETRY)
        raise AssertionError

    async def follow(self, story: Story) -> None:
        """Read a job to its end, from whichever gateway is there."""
        after = 0
        for client in itertools.cycle(self.clients):
            try:
                async with aclosing(client.events(story.job_id, after, give_up_after=0)) as events:
                    async for event in events:
                        if event.id is not None:
                            after = event.id
                            story.events.append(event)
                            if event.is_terminal:
                                return
            except ClientError as error:
                assert not isinstance(error, ApiError) or error.status == 503, error
            story.came_back += 1
            await asyncio.sleep(_RETRY)

    async def live(self, story: Story, chance: random.Random) -> None:
        """Hand a job in, perhaps cancel it, and see it to its end."""
        key = story.directory

        async def submit(client: Client) -> str:
            job = await client.submit(
                f"take {story.steps} steps", workspace=story.directory, idempotency_key=key
            )
            return job.id

        answers = [self.ask(submit) for _ in range(1 + story.sent_twice)]
        (story.job_id,) = set(await asyncio.gather(*answers))
        async with asyncio.TaskGroup() as both:
            both.create_task(self.follow(story))
            if story.cancelled:
                both.create_task(self.cancel(story, after=chance.uniform(0, 2)))

    async def cancel(self, story: Story, *, after: float) -> None:
        await asyncio.sleep(after)
        try:
            await self.ask(lambda client: client.cancel(story.job_id))
        except ApiError as refused:
            assert refused.status == 409, refused  # it has ended before


@asynccontextmanager
async def clients_of(pool: RunningPool) -> AsyncIterator[Clients]:
    async with AsyncExitStack() as stack:
        opened = [Client(url, pool.pool.token, give_up_after=0) for url in pool.pool.urls]
        for client in opened:
            await stack.enter_async_context(client)
        yield Clients(opened)


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("SOAK_SEED") or secrets.randbelow(10**6))
    sys.stdout.write(f"SOAK_SEED={seed}\n")
    return seed


def stories(chance: random.Random) -> Iterator[Story]:
    for number in range(JOBS):
        yield Story(
            directory=f"soak-{number}",
            steps=chance.randint(*_STEPS),
            sent_twice=chance.random() < _SENT_TWICE,
            cancelled=chance.random() < _CANCELLED,
        )


async def test_jobs_survive_whatever_is_killed(samples: Path, seed: int) -> None:
    chance = random.Random(seed)
    told = list(stories(chance))
    with program_for_everybody(samples.parent / "soaking_claude") as program:
        settings = SETTINGS | {"CLAUDE_PATH": str(program)}
        async with (
            running_pool(replicas=REPLICAS, gateways=2, settings=settings) as pool,
            clients_of(pool) as clients,
        ):
            killer = RandomKiller(pool, seed, program.name)
            began = monotonic()
            killing = asyncio.create_task(killer.kill_on())
            at_a_time = asyncio.Semaphore(_AT_A_TIME)

            async def live(story: Story) -> None:
                async with at_a_time:
                    await clients.live(story, chance)

            try:
                async with asyncio.TaskGroup() as all_of_them:
                    for story in told:
                        all_of_them.create_task(live(story))
            finally:
                killing.cancel()
                sys.stdout.write(summary(told, killer, monotonic() - began))
            await asyncio.gather(killing, return_exceptions=True)
            await pool.idle(REPLICAS)
            async with asyncio.timeout(_EMPTIED_WITHIN):
                while (await pool.status())["queue"]["depth"]:
                    await asyncio.sleep(0.5)
            for story in told:
                await check(story, clients, pool.workspace, killer)


async def check(story: Story, clients: Clients, workspace: Path, killer: RandomKiller) -> None:
    ids = [event.id or 0 for event in story.events]
    assert ids == sorted(set(ids))
    again = Story(story.directory, 0, False, False, job_id=story.job_id)
    await clients.follow(again)
    assert again.events == story.events
    types = [event.type for event in story.events]
    assert types[0] == "queued"
    assert [event.is_terminal for event in story.events] == [False] * (len(types) - 1) + [True]
    record = await clients.ask(lambda client: client.job(story.job_id))
    assert record.status in TERMINAL_STATUSES
    assert (record.error_code or "completed") == story.code
    check_code(story, killer)
    check_agents(story, workspace / story.directory / "steps")


def check_code(story: Story, killer: RandomKiller) -> None:
    """It ended well, or as somebody wanted it, or because it was hit at the wrong moments."""
    begins = story.begins
    assert [event.data["attempt"] for event in begins] == list(range(1, len(begins) + 1))
    assert len(begins) <= MAX_ATTEMPTS
    match story.code:
        case "completed":
            pass
        case FailureCode.CANCELLED:
            assert story.cancelled
        case FailureCode.WORKER_LOST:
            assert begins[-1].data["replica"] in killer.replicas, story
        case FailureCode.AGENT_ERROR:  # killed before it had answered the first word
            assert story.ending.data["error"] in _UNHEARD, story
            assert begins[-1].data["replica"] in killer.replicas, story
        case _:
            raise AssertionError(story)


def check_agents(story: Story, notes: Path) -> None:
    """One agent after the other worked, and all that was printed was told."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    worked = [line.split(" ", 1) for line in lines]
    assert not [what for _, what in worked if what == "beside"], lines
    agents = [agent for agent, _ in itertools.groupby(worked, lambda each: each[0])]
    assert len(set(agents)) == len(agents), lines
    assert len(agents) <= len(story.begins)
    told = defaultdict(list)
    for event in story.events:
        if event.content.get("type") == "step":
            told[event.content["agent"]].append(event.content["number"])
    assert list(told) == [agent for agent in agents if agent in told]
    for numbers in told.values():
        assert numbers == list(range(1, len(numbers) + 1))
    if story.code == "completed":
        assert story.ending.data["result"] == agents[-1]
        assert len(told[agents[-1]]) == story.steps


def summary(told: list[Story], killer: RandomKiller, took: float) -> str:
    ended = [story for story in told if story.events and story.ending.is_terminal]
    return "\n".join(
        [
            f"{len(ended)} of {len(told)} jobs ended within {took:.0f} s",
            f"killed: {dict(killer.kills)}",
            f"ended: {dict(Counter(story.code for story in ended))}",
            f"attempts: {dict(sorted(Counter(len(story.begins) for story in ended).items()))}",
            f"clients came back {sum(story.came_back for story in told)} times\n",
        ]
    )
