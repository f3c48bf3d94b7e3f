"""How long a slot of the pool is without a replica between two jobs.

The queue is kept full. For each pair of jobs in one slot the time from the end of the first to the
second's start is split at the container's exit and the next one's start: what lies between these
two is what Swarm itself needs. Beside it, as a floor, a service of the same image that only sleeps.
"""

import contextlib
import itertools
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
from target import Event, Target, docker, parser, run_job, show, target


@dataclass
class Slots:
    """When containers of a service started and exited, by the slot that they filled."""

    started: dict[str, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))
    exited: dict[str, float] = field(default_factory=dict)

    def note_start(self, container: dict[str, Any]) -> None:
        """Take in a container that runs."""
        # SERVICE.SLOT.TASK
        slot = container["Config"]["Labels"]["com.docker.swarm.task.name"].split(".")[1]
        at = seconds(container["State"]["StartedAt"])
        self.started[slot].append((at, container["Id"][:12]))

    def note_exit(self, container: dict[str, Any]) -> None:
        """Take in a container that has ended."""
        self.exited[container["Id"][:12]] = seconds(container["State"]["FinishedAt"])

    def turns(self) -> Iterator[tuple[str, float, str]]:
        """Yield each container that ended, when the next in its slot started, and that one."""
        for starts in self.started.values():
            for (_, before), (started, after) in itertools.pairwise(starts):
                if before in self.exited:
                    yield before, started, after

    def gaps(self) -> list[float]:
        """Return the time from each exit to the next start in the same slot, in seconds."""
        return [started - self.exited[before] for before, started, _ in self.turns()]


def seconds(moment: str) -> float:
    """Read a time of the engine, which has nanoseconds, as seconds since 1970."""
    return datetime.fromisoformat(f"{moment[:26].rstrip('Z')}+00:00").timestamp()


@contextmanager
def watched(service: str) -> Iterator[Slots]:
    """Watch the containers of a service; those that run already count as started.

    The times are the engine's own notes of when the process began and ended. It reports an exit
    only after it has cleaned up, which is a part of what Swarm needs.
    """
    slots = Slots()
    socket = httpx.HTTPTransport(uds="/var/run/docker.sock")
    label = f"com.docker.swarm.service.name={service}"
    with httpx.Client(transport=socket, base_url="http://docker", timeout=None) as engine:

        def read(events: httpx.Response) -> None:
            with contextlib.suppress(httpx.HTTPError):
                for line in events.iter_lines():
                    event = json.loads(line)
                    found = engine.get(f"/containers/{event['id']}/json")
                    if found.status_code == httpx.codes.OK:
                        note = slots.note_start if event["Action"] == "start" else slots.note_exit
                        note(found.json())

        filters = {"type": ["container"], "label": [label], "event": ["start", "die"]}
        with engine.stream("GET", "/events", params={"filters": json.dumps(filters)}) as events:
            running = engine.get(
                "/containers/json", params={"filters": json.dumps({"label": [label]})}
            )
            for container in running.json():
                slots.note_start(engine.get(f"/containers/{container['Id']}/json").json())
            reader = threading.Thread(target=read, args=(events,), daemon=True)
            reader.start()
            yield slots


def pool_phases(pool: Target, *, jobs: int, work: float) -> dict[str, list[float]]:
    """Run so many jobs of `work` seconds, all queued at once; return the phases in seconds."""
    ends: dict[str, float] = {}
    begins: dict[str, float] = {}

    def job(number: int) -> None:
        # The first jobs differ in length, so that afterwards the slots do not all turn at once.
        length = work * (1 + number / replicas) if number < replicas else work
        replica = ""
        last: Event | None = None
        with pool.client() as client:
            for event in run_job(client, f"run sleep {length:g}"):
                if event.type == "connected":
                    replica = event.data["replica"]
                    begins[replica] = event.at
                last = event
        assert last, "the stream was empty"
        assert last.type == "completed", last.data
        ends[replica] = last.at

    with pool.client() as client:
        replicas = pool.wait_idle(client)
        with watched(pool.service("claude-api")) as slots, ThreadPoolExecutor(jobs) as executor:
            list(executor.map(job, range(jobs)))
            pool.wait_idle(client)

    phases: dict[str, list[float]] = defaultdict(list)
    for before, started, after in slots.turns():
        if before in ends and after in begins:
            exited = slots.exited[before]
            phases["end of job -> exit of container"].append(exited - ends[before])
            phases["exit -> next start (Swarm's own)"].append(started - exited)
            phases["start -> next job pulled"].append(begins[after] - started)
            total = begins[after] - ends[before]
            phases["end of job -> next job pulled"].append(total)
            phases["  of which on top of Swarm's own"].append(total - (started - exited))
    print(f"{jobs} jobs of {work:g} s over {replicas} replicas")
    return phases


def floor(pool: Target, *, rounds: int, work: float) -> list[float]:
    """Let a service of the pool's image sleep and be started again; return exit -> start."""
    spec = json.loads(docker("service", "inspect", pool.service("claude-api")))[0]["Spec"]
    replicas = spec["Mode"]["Replicated"]["Replicas"]
    name = f"{pool.stack}-bench-sleep"
    with watched(name) as slots:
        docker(
            *("service", "create", "--detach", "--quiet", "--name", name),
            *("--replicas", str(replicas), "--restart-condition", "any", "--restart-delay", "0s"),
            *("--network", f"{pool.stack}_backend", "--endpoint-mode", "dnsrr"),
            *("--no-resolve-image", "--no-healthcheck", "--entrypoint", "sleep"),
            # Swarm counts a task that ends well before this as it counts the pool's own.
            *(spec["TaskTemplate"]["ContainerSpec"]["Image"], str(work)),
        )
        try:
            while len(slots.gaps()) < rounds:
                time.sleep(0.5)
        finally:
            docker("service", "rm", name)
    return slots.gaps()[:rounds]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=40, help="jobs in the queue")
    options.add_argument("--work", type=float, default=10, help="seconds that each job sleeps")
    given = options.parse_args()
    pool = target(given)
    phases = pool_phases(pool, jobs=given.jobs, work=given.work)
    samples = len(phases["end of job -> next job pulled"])
    rows = {
        "floor: exit -> next start of `sleep`": floor(pool, rounds=samples, work=given.work),
        **phases,
    }
    show(rows, unit="s")
    p50 = statistics.median(rows["  of which on top of Swarm's own"])
    print(f"target: at most 0.50 s on top of Swarm's own, p50: {'met' if p50 <= 0.5 else 'MISSED'}")


if __name__ == "__main__":
    main()
