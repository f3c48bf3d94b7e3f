"""A client of the pool, and jobs whose end the tests decide."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from engine import docker
from httpx_sse import EventSource

TERMINAL = ("completed", "error")
T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], what: str, *, seconds: float) -> T:
    """Ask until the answer is true and return it; fail with `what` after `seconds`."""
    give_up = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < give_up, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return answer


@dataclass(frozen=True)
class Event:
    """One event as the client read it."""

    id: int
    type: str
    data: dict[str, Any]


@dataclass
class Job:
    """A job whose events a thread reads, until its terminal event or the loss of the stream."""

    events: list[Event] = field(default_factory=list)
    lost: Exception | None = None
    thread: threading.Thread | None = None

    def event(self, type_: str) -> Event | None:
        """Return the first event of that type, or None so far."""
        return next((event for event in self.events if event.type == type_), None)

    @property
    def end(self) -> Event | None:
        """The terminal event, or None so far."""
        return next((event for event in self.events if event.type in TERMINAL), None)

    def wait_for(self, type_: str, *, seconds: float = 30) -> Event:
        """Wait until the client has read an event of that type and return it."""
        return wait_until(lambda: self.event(type_), f"the event {type_}", seconds=seconds)

    def replica(self) -> str:
        """Wait until an agent runs this job and return the id of its container."""
        return str(self.wait_for("connected").data["replica"])

    def wait(self, *, seconds: float = 60) -> Event:
        """Wait for the terminal event and return it."""
        assert self.thread is not None
        self.thread.join(seconds)
        assert self.end, f"no end within {seconds:.0f} s; lost: {self.lost!r}; {self.events}"
        return self.end


class Pool:
    """A deployed pool as its clients see it."""

    def __init__(self, url: str, token: str, workspace: Path, *, replicas: int) -> None:
        self.url = url
        self.token = token
        self.workspace = workspace
        self.replicas = replicas

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Open a client with the token of the pool."""
        with httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.token}"},
            # A comment comes every 15 s: a longer silence means that the stream is dead.
            timeout=httpx.Timeout(10, read=40),
        ) as client:
            yield client

    def status(self) -> dict[str, Any]:
        """Return the answer of /status."""
        with self.client() as client:
            answer = client.get("/status").raise_for_status().json()
        assert isinstance(answer, dict)
        return answer

    def idle(self) -> set[str]:
        """Return the idle replicas; empty while the gateway cannot say."""
        try:
            shown = self.status()
        except httpx.HTTPError:
            return set()
        replicas = shown["replicas"]["list"]
        return {replica["replica"] for replica in replicas if replica["status"] == "idle"}

    def wait_idle(self, *, seconds: float = 60) -> set[str]:
        """Wait until the pool is complete: as many replicas as it should have, all idle."""

        def complete() -> set[str]:
            idle = self.idle()
            with self.client() as client:
                try:
                    total = client.get("/status").raise_for_status().json()["replicas"]["total"]
                except httpx.HTTPError:
                    return set()
            return idle if len(idle) == total == self.replicas else set()

        return wait_until(complete, f"{self.replicas} idle replicas", seconds=seconds)

    def run(self, prompt: str) -> list[Event]:
        """Submit a job and return all its events."""
        job = Job()
        self._read(job, prompt)
        if job.lost:
            raise job.lost
        return job.events

    def start(self, prompt: str) -> Job:
        """Submit a job and read its events in the background."""
        job = Job()
        job.thread = threading.Thread(target=self._read, args=(job, prompt), daemon=True)
        job.thread.start()
        return job

    def _read(self, job: Job, prompt: str) -> None:
        try:
            with (
                self.client() as client,
                client.stream("POST", "/api/execute", json={"prompt": prompt}) as answer,
            ):
                answer.raise_for_status()
                for event in EventSource(answer).iter_sse():
                    # `retry:` alone makes an event without data, and a waiting job's moves are
                    # in no log: they have no id of their own.
                    if event.data and not (event.event == "queued" and job.events):
                        job.events.append(Event(int(event.id), event.event, event.json()))
        except httpx.HTTPError as error:
            job.lost = error

    def ledger(self, name: str) -> list[str]:
        """Return the lines that jobs appended to a file of the workspace."""
        file = self.workspace / name
        return file.read_text().splitlines() if file.exists() else []


@dataclass(frozen=True)
class Gate:
    """Jobs that run until the gate is opened, and then sign a ledger once."""

    pool: Pool
    name: str

    @property
    def ledger(self) -> str:
        """The name of the ledger."""
        return f"{self.name}.ledger"

    @property
    def is_open(self) -> bool:
        """Say whether the jobs may go on."""
        return (self.pool.workspace / f"{self.name}.open").exists()

    def prompt(self, job: str) -> str:
        """Return the prompt of a job that signs as `job`."""
        wait = f"while [ ! -e {self.name}.open ]; do sleep 0.1; done"
        return f"run echo {job} began >> {self.ledger}; {wait}; echo {job} >> {self.ledger}"

    def began(self, job: str) -> bool:
        """Say whether an agent is at work on the job."""
        return f"{job} began" in self.pool.ledger(self.ledger)

    def wait_began(self, job: str, *, seconds: float = 30) -> None:
        """Wait until an agent is at work on the job."""
        wait_until(lambda: self.began(job), f"an agent works on {job}", seconds=seconds)
        # Claude Code saves what it does a moment (0.1 s) after it began; before, a lost job ends.
        time.sleep(1)

    def open(self, container: str) -> None:
        """Let the jobs go on; done in a container, as only the pool's users may write there."""
        docker("exec", "--user", "10000:10002", container, "touch", f"/workspace/{self.name}.open")

    def signed(self) -> list[str]:
        """Return the jobs that went through the gate, in that order."""
        lines = self.pool.ledger(self.ledger)
        return [line for line in lines if not line.endswith(" began")]
