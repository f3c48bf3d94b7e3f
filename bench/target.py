"""The deployed pool that is measured, and how figures are shown."""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import EventSource


def docker(*arguments: str) -> str:
    """Run a docker command and return what it prints."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


@dataclass(frozen=True)
class Event:
    """An event of a job and when this client had read it (seconds since 1970)."""

    at: float
    type: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A pool: its stack on this machine and its address."""

    stack: str
    url: str
    token: str

    def service(self, name: str) -> str:
        """Return the full name of one of the stack's services."""
        return f"{self.stack}_{name}"

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Open a client of the pool."""
        headers = {"Authorization": f"Bearer {self.token}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=3600) as client:
            yield client

    def wait_idle(self, client: httpx.Client, *, seconds: float = 120) -> int:
        """Wait until every slot of the pool holds an idle replica; return how many these are."""
        service = json.loads(docker("service", "inspect", self.service("claude-api")))[0]
        wanted = int(service["Spec"]["Mode"]["Replicated"]["Replicas"])
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            counts = client.get("/status").raise_for_status().json()["replicas"]
            if counts["idle"] == counts["total"] == wanted:
                return wanted
            time.sleep(0.1)
        raise TimeoutError(f"the pool was not idle within {seconds:.0f} s: {counts}")


def run_job(client: httpx.Client, prompt: str) -> Iterator[Event]:
    """Submit a job and yield its events as they come."""
    with client.stream("POST", "/api/execute", json={"prompt": prompt}) as answer:
        answer.raise_for_status()
        for event in EventSource(answer).iter_sse():
            if event.data:
                yield Event(time.time(), event.event, event.json())


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that name the pool."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--stack", default="claude-code-stack", help="name of the stack")
    options.add_argument("--url", default="http://127.0.0.1:3000", help="address of the gateway")
    options.add_argument(
        "--token-file",
        type=Path,
        default=Path(__file__).parents[1] / ".secrets" / "api_token",
        help="file that holds the API token",
    )
    return options


def target(options: argparse.Namespace) -> Target:
    """Return the pool that the options name."""
    return Target(options.stack, options.url, options.token_file.read_text().strip())


def show(rows: dict[str, list[float]], *, unit: str, scale: float = 1) -> None:
    """Print one line of figures for each list of samples, side by side."""
    width = max(len(name) for name in rows)
    print(f"{'':{width}}  {'n':>5} {'min':>9} {'p50':>9} {'p99':>9} {'max':>9}  {unit}")
    for name, samples in rows.items():
        if not samples:
            print(f"{name:{width}}  {0:5}")
            continue
        ordered = sorted(value * scale for value in samples)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        figures = (ordered[0], statistics.median(ordered), p99, ordered[-1])
        print(f"{name:{width}}  {len(ordered):5} " + " ".join(f"{one:9.2f}" for one in figures))
