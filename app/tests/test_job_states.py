"""However submit, pull, crash, cancel and redelivery fall together, a job ends once and runs once.

Each example lets several jobs go through a pool whose processes fail at the words that the
example names. Some more examples than the few of every day:

    JOB_STATES_PROFILE=thorough python -m pytest tests/test_job_states.py
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import httpx
import nats.errors
import nats.js.errors
import pytest
from faulty_wire import Fault, Kind, Until
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from job_scripts import AgentScript, Cancellation, Fate, JobScript, Submission
from nats.js import JetStreamContext
from nats_server import NatsServer
from scripted_agent import AgentRun
from threaded_pool import BOUNDS, MAX_ATTEMPTS, TOKEN, History, ThreadedPool, fast_times

from claude_jobs.agent.guard import Watchdog
from claude_jobs.bus.events import LoggedEvent
from claude_jobs.bus.topology import EVENTS_STREAM, EVENTS_SUBJECTS, JOBS_STREAM
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Event,
    Failed,
    FailureCode,
    Message,
    Queued,
    Recovering,
    is_terminal,
)
from claude_jobs.contract.job import JobRecord

pytestmark = pytest.mark.timeout(1800)

_COMMON = settings(
    database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
# An example takes seconds: one that fails every day is told as it is, not made smaller.
_EVERY_DAY = settings(
    _COMMON, max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
_THOROUGH = settings(_COMMON, max_examples=300, phases=[Phase.generate, Phase.shrink])
PROFILE = {"": _EVERY_DAY, "thorough": _THOROUGH}[os.environ.get("JOB_STATES_PROFILE", "")]

# Far above what any example takes.
_PATIENCE = 60.0
_ANSWER_WITHIN = 2.0
# Where the event that a cancellation waits for does not come.
_CANCELLED_WITHIN = 6.0
_EMPTIED_WITHIN = 10.0
# Far above what lies between the decision on an attempt and its beginning.
_DECIDED_WITHIN = 0.7
# From its acceptance on, after which a gateway brings a record in line; see `fast_times`.
_SETTLEMENT = 1.5
_AWAY = (nats.errors.Error, nats.js.errors.Error, TimeoutError)


def faults(most: int) -> st.SearchStrategy[Fault]:
    return st.builds(
        Fault,
        kind=st.sampled_from(Kind),
        word=st.integers(1, most),
        heard=st.booleans(),
        until=st.sampled_from(Until),
    )


# From what it is handed a job, a replica says about 13 words until its agent begins.
FAULTS_OF_REPLICAS = st.one_of(st.none(), faults(16), faults(40))
FAULTS_OF_GATEWAYS = st.one_of(st.none(), faults(7))
AGENTS = st.builds(
    AgentScript,
    saved=st.booleans() | st.just(True),
    lines=st.integers(0, 3),
    silent=st.sampled_from([0.0, 0.3, 2.0]),
    fate=st.sampled_from([Fate.WELL, Fate.WELL, Fate.BADLY, Fate.KILLED, Fate.UNWATCHED]),
)
CANCELLATIONS = st.builds(
    Cancellation, events=st.integers(1, 4), again=st.booleans(), fault=FAULTS_OF_GATEWAYS
)
SUBMISSIONS = st.builds(
    Submission, keyed=st.booleans(), again=st.booleans(), fault=FAULTS_OF_GATEWAYS
)


@st.composite
def job_scripts(draw: st.DrawFn) -> JobScript:
    agents = draw(st.lists(AGENTS, max_size=MAX_ATTEMPTS))
    cancellation = draw(st.none() | CANCELLATIONS)
    if cancellation and draw(st.booleans()):
        agents.append(AgentScript(fate=Fate.LASTS))
    return JobScript(
        draw(SUBMISSIONS),
        cancellation,
        tuple(draw(st.lists(FAULTS_OF_REPLICAS, max_size=MAX_ATTEMPTS))),
        tuple(agents),
    )


@pytest.fixture(scope="module", autouse=True)
def _fast_times() -> Iterator[None]:
    with fast_times():
        yield


# Around the word with which a replica says that it begins, until another has the job.
LATE = [
    JobScript(faults=(Fault(kind, word, True, Until.TAKEN),), agents=(AgentScript(silent=1.0),))
    for kind in (Kind.CUT, Kind.STALL, Kind.STOP)
    for word in range(3, 7)
]
UNWATCHED = [
    JobScript(
        faults=(Fault(Kind.CUT, 16, True, Until.ENDED),),
        agents=(AgentScript(silent=0.3, fate=Fate.UNWATCHED), AgentScript(silent=2.0)),
    )
]
# Around the end of a job, and around its first line: cancelled before it is taken over.
CRASHES = [
    JobScript(
        cancellation=cancellation,
        faults=(Fault(Kind.CRASH, word, True, Until.SOON),),
        agents=(AgentScript(silent=silent),),
    )
    for cancellation, silent in ((None, 0.0), (Cancellation(events=3), 2.0))
    for word in range(7, 19)
]
KILLED = [JobScript(agents=(AgentScript(fate=Fate.KILLED),) * (MAX_ATTEMPTS + 2))]
# Some are cancelled while they wait, others wait on.
CANCELLED = [
    JobScript(
        cancellation=Cancellation(events=1) if number % 2 else None,
        agents=(AgentScript(silent=0.3),),
    )
    for number in range(10)
]


@given(scripts=st.lists(job_scripts(), min_size=1, max_size=6))
@example(scripts=[*LATE, *UNWATCHED])
@example(scripts=[*CRASHES, *KILLED])
@example(scripts=CANCELLED)
@PROFILE
def test_every_job_ends_once_and_never_runs_twice_side_by_side(
    nats_server: NatsServer, tmp_path_factory: pytest.TempPathFactory, scripts: list[JobScript]
) -> None:
    workspace = tmp_path_factory.mktemp("workspace")
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(play(nats_server, workspace, scripts))


@dataclass
class Told:
    """What a client was told of its job."""

    job_id: str | None = None
    cancellations: list["Cancelled"] = field(default_factory=list)


@dataclass(frozen=True)
class Cancelled:
    """The answer to a cancellation, when it came, and what the log ended with after it."""

    status: int
    at: float
    last: LoggedEvent


@dataclass
class Scene:
    """A pool, its two lasting gateways, and a client of them."""

    pool: ThreadedPool
    jetstream: JetStreamContext
    http: httpx.AsyncClient
    urls: list[str]

    async def play(self, name: str, script: JobScript) -> Told:
        """Be the client of one job until it has ended."""
        told = Told(await self.submit(name, script.submission))
        if told.job_id is None:
            return told
        history = self.pool.history(told.job_id)
        if script.cancellation:
            told.cancellations = await self.cancel(told.job_id, script.cancellation)
        await history.until(lambda: history.has_ended, at_most=_PATIENCE)
        if script.submission.keyed:
            assert await self.submit(name, Submission()) == told.job_id
        return told

    async def submit(self, name: str, submission: Submission) -> str | None:
        """Hand in a job; returns its id, or None where nobody said that it was accepted."""
        headers = {"Prefer": "respond-async"}
        if submission.keyed:
            headers["Idempotency-Key"] = name
        body = {"prompt": name, "metadata": {"name": name}}
        asked: dict[str, Any] = {"path": "/api/execute", "json": body, "headers": headers}
        if submission.fault:
            answer = await self.ask_failing(submission.fault, **asked)
        elif not submission.keyed:
            answer = await self.ask_once(self.urls[0], **asked)
        if not submission.keyed:
            return None if answer is None else str(answer.json()["id"])
        urls = self.urls if submission.again else self.urls[:1]
        answers = await asyncio.gather(*(self.ask(url, **asked) for url in urls))
        (job_id,) = {str(answer.json()["id"]) for answer in answers}
        return job_id

    async def cancel(self, job_id: str, cancellation: Cancellation) -> list[Cancelled]:
        history = self.pool.history(job_id)
        await history.until(
            lambda: len(history.events) >= cancellation.events, at_most=_CANCELLED_WITHIN
        )
        asked = {"path": f"/api/jobs/{job_id}/cancel"}
        if cancellation.fault:
            await self.ask_failing(cancellation.fault, **asked)

        async def ask(url: str) -> Cancelled:
            answer = await self.ask(url, **asked)
            at = Watchdog.clock()
            last = await self.pool.log.last(job_id)
            assert last
            return Cancelled(answer.status_code, at, last)

        urls = self.urls if cancellation.again else self.urls[:1]
        return list(await asyncio.gather(*map(ask, urls)))

    async def ask_failing(self, fault: Fault, **asked: Any) -> httpx.Response | None:
        """Ask a gateway that a fault strikes meanwhile; returns its answer if it gives one."""
        gateway = await self.pool.gateway()
        url = await gateway.url()
        await self.ready(url)
        gateway.wire.arm(fault)
        return await self.ask_once(url, **asked)

    async def ask(self, url: str, **asked: Any) -> httpx.Response:
        """Ask a gateway that stays whole what may be asked again, until it answers."""
        async with asyncio.timeout(_PATIENCE):
            while (answer := await self.ask_once(url, **asked)) is None:
                await asyncio.sleep(0.1)
        return answer

    async def ask_once(self, url: str, *, path: str, **asked: Any) -> httpx.Response | None:
        """Return what a gateway answers, if it does; 409 is an answer to a cancellation."""
        try:
            answer = await self.http.post(url + path, **asked)
        except httpx.TransportError:
            return None
        assert answer.status_code in {202, 409, 503}, answer.text
        return None if answer.status_code == 503 else answer

    async def ready(self, url: str) -> None:
        async with asyncio.timeout(_PATIENCE):
            while (await self.http.get(f"{url}/ready")).status_code != 200:
                await asyncio.sleep(0.01)

    async def emptied(self) -> None:
        """Wait until no job is in the queue; a lease may have to end before."""
        async with asyncio.timeout(_EMPTIED_WITHIN):
            while (await self.jetstream.stream_info(JOBS_STREAM)).state.messages:
                await asyncio.sleep(0.05)

    async def job_ids(self) -> list[str]:
        """Return the ids of all jobs that have a log, accepted or not."""
        info = await self.jetstream.stream_info(EVENTS_STREAM, subjects_filter=EVENTS_SUBJECTS)
        return [subject.partition(".")[2] for subject in info.state.subjects or {}]

    async def record(self, job_id: str) -> JobRecord | None:
        """Return a job's record as the API shows it."""
        while True:
            answer = await self.http.get(f"{self.urls[0]}/api/jobs/{job_id}", timeout=_PATIENCE)
            if answer.status_code == 404:
                return None
            if answer.status_code == 200:
                return JobRecord.model_validate_json(answer.content)
            assert answer.status_code == 503, answer.text

    async def log(self, job_id: str) -> list[LoggedEvent]:
        async with aclosing(self.pool.log.stored(job_id)) as events:
            return [logged async for logged in events]


@asynccontextmanager
async def scene(server: NatsServer, workspace: Path) -> AsyncIterator[Scene]:
    async with (
        server.both_ends(BOUNDS) as ends,
        ThreadedPool(server.port, workspace, ends) as pool,
        httpx.AsyncClient(
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=_ANSWER_WITHIN,
            trust_env=False,
            verify=False,
        ) as http,
    ):
        gateways = [await pool.gateway() for _ in range(2)]
        patient = ends[0].nats.jetstream(timeout=_PATIENCE)
        opened = Scene(pool, patient, http, [await each.url() for each in gateways])
        for url in opened.urls:
            await opened.ready(url)
        yield opened


async def play(server: NatsServer, workspace: Path, scripts: list[JobScript]) -> None:
    """Let each job go through, and everything that a fault held up; then see what came of it."""
    async with scene(server, workspace) as opened:
        pool = opened.pool
        pool.scripts = {f"job-{number}": script for number, script in enumerate(scripts)}
        stories = await asyncio.gather(*itertools.starmap(opened.play, pool.scripts.items()))
        told = dict(zip(pool.scripts, stories, strict=True))
        await pool.settled()
        await opened.emptied()
        await asyncio.sleep(_SETTLEMENT)
        job_ids = await opened.job_ids()
        assert {each.job_id for each in stories} - {None} <= set(job_ids)
        seen = []
        for job_id in job_ids:
            record = await opened.record(job_id)
            if record is None:  # its gateway was lost at once
                assert job_id not in {each.job_id for each in stories}
                continue
            log = await opened.log(job_id)
            name = record.metadata["name"]
            seen.append(name)
            try:
                check(pool, name, told[name], log, record)
            except AssertionError as broken:
                broken.add_note(describe(pool, name, told[name], log, record))
                raise
        assert len(set(seen)) == len(seen), "one submission became two jobs"
        for replica in pool.replicas.values():
            fault = replica.process.fault
            if replica.died is None and not isinstance(fault, (*_AWAY, NoneType)):
                raise AssertionError("a replica failed otherwise than for want of it") from fault


def check(
    pool: ThreadedPool, name: str, told: Told, log: list[LoggedEvent], record: JobRecord
) -> None:
    runs = pool.runs[name]
    events = [logged.event for logged in log]
    ending = events[-1]
    # It ends once, and that is the last of it.
    assert [is_terminal(event) for event in events] == [False] * (len(events) - 1) + [True]
    assert isinstance(ending, Completed | Failed)
    assert record.status is JobRecord.ended(record, ending).status
    code = ending.code if isinstance(ending, Failed) else None
    if told.job_id is not None:
        assert isinstance(events[0], Queued)
        assert code is not FailureCode.INTERNAL
    # It begins as often as it may, and never twice side by side.
    begins = [event for event in events if isinstance(event, Connected)]
    assert [event.attempt for event in begins] == list(range(1, len(begins) + 1))
    assert len(begins) <= MAX_ATTEMPTS
    assert len(runs) <= len(begins)
    spans = sorted((*span, run.number) for run in runs for span in pool.allowed(run))
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        assert one == other or end <= begin, "two agents run side by side"
    if told.job_id is not None:
        ended = pool.history(told.job_id).ended
        assert ended
        assert all(end <= ended for _, end, _ in spans), "an agent outlives its job"
    if costs_nothing(pool.scripts[name]):
        assert code is not FailureCode.WORKER_LOST
    check_speakers(events, runs)
    if told.job_id is not None:
        check_cancellations(log, told.cancellations, pool.history(told.job_id), pool.scripts[name])
    if isinstance(ending, Completed):
        assert ending.result == f"of agent {runs[-1].number}"


def costs_nothing(script: JobScript) -> bool:
    """Tell whether all that happens to a job is over long before a lease is."""
    return all(
        fault is None
        or fault.kind is Kind.REDELIVER
        or (fault.kind is not Kind.CRASH and fault.until is Until.SOON)
        for fault in script.faults
    ) and all(agent.fate not in {Fate.KILLED, Fate.UNWATCHED} for agent in script.agents)


def check_speakers(events: list[Event], runs: list[AgentRun]) -> None:
    """Each further attempt is announced, and only the agent of the one that has begun is heard."""
    begun: Connected | None = None
    announced = 1
    for event in events:
        match event:
            case Connected():
                assert event.attempt == announced
                begun = event
            case Recovering():
                announced = event.attempt
                if begun and event.attempt > begun.attempt:
                    begun = None
            case Message():
                assert begun
                assert runs[event.content["agent"] - 1].replica == begun.replica


def check_cancellations(
    log: list[LoggedEvent], cancellations: list[Cancelled], history: History, script: JobScript
) -> None:
    ending = log[-1].event
    if isinstance(ending, Failed) and ending.code is FailureCode.CANCELLED:
        assert cancellations
        if "before it started" in ending.error:
            assert len(log) == 2
    held_up = any(
        fault and fault.kind not in {Kind.CRASH, Kind.REDELIVER} for fault in script.faults
    )
    for each in cancellations:
        if each.status == 409:
            assert each.last.is_terminal
            continue
        later = [
            seen
            for logged, seen in zip(history.events, history.seen, strict=True)
            if logged.sequence > each.last.sequence and isinstance(logged.event, Connected)
        ]
        # One attempt may have been decided on, and be told at once.
        assert len(later) <= 1
        assert held_up or all(seen < each.at + _DECIDED_WITHIN for seen in later)


def describe(
    pool: ThreadedPool, name: str, told: Told, log: list[LoggedEvent], record: JobRecord
) -> str:
    """Tell all that is known of a job that went wrong."""
    lines = [f"{name}: {pool.scripts[name]}", f"{told.cancellations}"]
    lines += [f"  {logged.sequence} {logged.event!r}" for logged in log]
    for run in pool.runs[name]:
        lines.append(f"  {run} allowed: {pool.allowed(run)}")
    return "\n".join([*lines, f"  {record!r}"])
