"""How long many short jobs of many clients take, and whether any of them is refused.

Each client submits its next job when the one before has ended. The wall time stands beside the
ideal: every slot works from the first second to the last, and between two jobs it loses only the
time that Swarm itself needs to start the next container. Then the same clients do the same with
the design without a queue: round robin over replicas that refuse a job while they work.
"""

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import httpx
import psutil
from containers import Slots, Turn, watched
from peer import round_robin
from target import Event, Target, parser, run_job, show, target

# What the target allows on top of the ideal.
ALLOWED = 1.15
# A proxy says with these that it has reached no replica.
UNREACHABLE = {httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE}


@dataclass
class Job:
    """What its client has seen of one job."""

    submitted: float = 0
    tries: int = 0
    refused: int = 0
    unreachable: int = 0
    id: str = ""
    replica: str = ""
    began: float = 0
    ended: float = 0
    end: str = ""

    def note(self, event: Event) -> None:
        """Take in an event of the job."""
        self.id = event.data.get("jobId", self.id)
        match event.type:
            case "connected":
                self.replica, self.began = event.data["replica"], event.at
            case "completed" | "error":
                self.end, self.ended = event.type, event.at

    @property
    def accepted(self) -> bool:
        """Whether anything was said about it but a refusal."""
        return bool(self.id or self.began or self.ended)

    def run(self, client: httpx.Client, prompt: str, *, tries: int, pause: float) -> None:
        """Submit it until it is accepted, at most so many times, and read it to its end."""
        self.submitted = time.time()
        while self.tries < tries and not self.accepted:
            if self.tries:
                # Clients that were refused together should not come back together.
                time.sleep(pause * random.uniform(0.5, 1.5))
            self.tries += 1
            try:
                for event in run_job(client, prompt):
                    self.note(event)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == httpx.codes.TOO_MANY_REQUESTS:
                    self.refused += 1
                elif status in UNREACHABLE:
                    self.unreachable += 1
                else:
                    raise
            except httpx.TransportError:
                self.unreachable += 1


@dataclass
class Load:
    """All jobs of a run, and the slots that they ran in."""

    jobs: list[Job]
    wall: float = 0
    cpu: float = 0
    slots: Slots = field(default_factory=Slots)

    def count(self, chosen: Callable[[Job], bool]) -> int:
        """Return how many jobs are such."""
        return sum(map(chosen, self.jobs))

    def works(self) -> list[float]:
        """Return how long each job worked, in seconds."""
        return [job.ended - job.began for job in self.jobs if job.end == "completed"]

    def waits(self) -> list[float]:
        """Return how long each job waited from its first submission until an agent started."""
        return [job.began - job.submitted for job in self.jobs if job.began]

    def turns(self) -> list[Turn]:
        """Return the turns between the jobs of each slot."""
        return self.slots.turns(
            begins={job.replica: job.began for job in self.jobs if job.began},
            ends={job.replica: job.ended for job in self.jobs if job.ended},
        )

    def cycle(self) -> float:
        """Return what a job takes of a slot at least, on average: its own time and Swarm's."""
        return statistics.mean(self.works()) + statistics.mean(self.slots.gaps())


def run(
    open_client: Callable[[], AbstractContextManager[httpx.Client]],
    prompt: str,
    *,
    jobs: int,
    clients: int,
    tries: int = 1,
    pause: float = 0,
) -> Load:
    """Let so many clients run the jobs, each one after the other."""
    load = Load([Job() for _ in range(jobs)])
    waiting = deque(load.jobs)
    faults: list[Exception] = []

    def work() -> None:
        try:
            with open_client() as client:
                while True:
                    try:
                        job = waiting.popleft()
                    except IndexError:
                        return
                    job.run(client, prompt, tries=tries, pause=pause)
        except Exception as fault:
            faults.append(fault)

    # An interrupted benchmark waits for none of them.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
    psutil.cpu_percent()  # from here on
    began = time.time()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        waiting.clear()
        with open_client() as client:
            for job in load.jobs:
                if job.id and not job.end:
                    client.post(f"/api/jobs/{job.id}/cancel")
    if faults:
        raise faults[0]
    load.cpu = psutil.cpu_percent()
    load.wall = max(job.ended for job in load.jobs) - began
    return load


def run_alone(pool: Target, prompt: str, *, jobs: int) -> Load:
    """Run jobs one at a time, each on a pool that is otherwise idle."""
    alone = Load([])
    with pool.client() as client, watched(pool.service("claude-api")) as alone.slots:
        for _ in range(jobs):
            pool.wait_idle(client)
            alone.jobs += run(pool.client, prompt, jobs=1, clients=1).jobs
        pool.wait_idle(client)
    return alone


def run_pool(pool: Target, prompt: str, *, jobs: int, clients: int) -> Load:
    """Run all jobs on the pool. Nothing is submitted twice: a refused job stays refused."""
    with pool.client() as client, watched(pool.service("claude-api")) as slots:
        load = run(pool.client, prompt, jobs=jobs, clients=clients)
        pool.wait_idle(client)
    load.slots = slots
    return load


def run_peer(
    pool: Target, prompt: str, *, replicas: int, jobs: int, clients: int, tries: int, pause: float
) -> Load:
    """Run all jobs on the design without a queue, whose clients try again."""
    with round_robin(pool, replicas=replicas) as peer, watched(peer.replicas) as slots:
        load = run(
            lambda: httpx.Client(base_url=peer.url, timeout=3600),
            prompt,
            jobs=jobs,
            clients=clients,
            tries=tries,
            pause=pause,
        )
        peer.wait_ready()
    load.slots = slots
    return load


def slot_rows(name: str, load: Load) -> dict[str, list[float]]:
    """Return what the slots of a load did, to be shown."""
    turns = load.turns()
    return {
        f"{name}: job, connected -> end": load.works(),
        f"{name}: end of job -> exit of container": [turn.end_to_exit for turn in turns],
        f"{name}: exit -> next start (Swarm's own)": [turn.exit_to_start for turn in turns],
        f"{name}: start -> next job begins": [turn.start_to_begin for turn in turns],
    }


def show_counts(loads: dict[str, Load], ideal: float) -> None:
    """Print what became of the jobs, side by side."""
    rows: dict[str, Callable[[Load], float]] = {
        "completed": lambda load: load.count(lambda job: job.end == "completed"),
        "ended with an error": lambda load: load.count(lambda job: job.end == "error"),
        "lost after their start": lambda load: load.count(lambda job: job.accepted and not job.end),
        "given up by their client": lambda load: load.count(lambda job: not job.accepted),
        "refused at least once": lambda load: load.count(lambda job: job.refused > 0),
        "answers 429": lambda load: sum(job.refused for job in load.jobs),
        "answers 502, 503, none": lambda load: sum(job.unreachable for job in load.jobs),
        "CPU of the machine in use, %": lambda load: load.cpu,
        "wall time, s": lambda load: load.wall,
        "wall time / ideal": lambda load: load.wall / ideal,
    }
    width = max(map(len, rows))
    print(f"\n{'':{width}}" + "".join(f"{name:>14}" for name in loads))
    for title, figure in rows.items():
        figures = [figure(load) for load in loads.values()]
        print(
            f"{title:{width}}"
            + "".join(f"{one:14d}" if isinstance(one, int) else f"{one:14.2f}" for one in figures)
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=100, help="jobs in all")
    options.add_argument("--clients", type=int, default=20, help="clients that submit them")
    options.add_argument("--work", type=float, default=10, help="seconds that each job sleeps")
    options.add_argument("--alone", type=int, default=5, help="jobs that run alone, for the ideal")
    options.add_argument(
        "--tries", type=int, default=100, help="how often a client of the peer submits a job"
    )
    options.add_argument(
        "--pause", type=float, default=1, help="seconds between two tries, give or take a half"
    )
    given = options.parse_args()
    pool = target(given)
    prompt = f"run sleep {given.work:g}"

    with pool.client() as client:
        if not client.get("/status").raise_for_status().json().get("demo"):
            raise SystemExit("the pool is not in demo mode: these jobs are the demo model's")
        replicas = pool.wait_idle(client)
    print(
        f"{given.jobs} jobs of {given.work:g} s, {given.clients} clients, {replicas} replicas",
        flush=True,
    )
    alone = run_alone(pool, prompt, jobs=given.alone)
    load = run_pool(pool, prompt, jobs=given.jobs, clients=given.clients)
    peer = run_peer(
        pool,
        prompt,
        replicas=replicas,
        jobs=given.jobs,
        clients=given.clients,
        tries=given.tries,
        pause=given.pause,
    )

    show(
        {
            "alone: job, connected -> end": alone.works(),
            "alone: exit -> next start": alone.slots.gaps(),
            **slot_rows("pool", load),
            **slot_rows("round robin", peer),
            "pool: submitted -> job begins": load.waits(),
            "round robin: submitted -> job begins": peer.waits(),
        },
        unit="s",
    )
    show({"round robin: tries a job": [float(job.tries) for job in peer.jobs]}, unit="tries")
    ideal = given.jobs / replicas * load.cycle()
    ideal_alone = given.jobs / replicas * alone.cycle()
    show_counts({"pool": load, "round robin": peer}, ideal)
    print(
        f"\nideal, a job and a restart as this load has them:  {ideal:7.1f} s"
        f"\nideal, both as they are on an idle machine:        {ideal_alone:7.1f} s"
        f"  (pool: {load.wall / ideal_alone:.2f} x)"
    )
    none_refused = load.count(lambda job: job.end == "completed") == given.jobs
    print(
        f"target: all run, none refused: {'met' if none_refused else 'MISSED'}\n"
        f"target: wall time at most {ALLOWED} x the ideal: "
        f"{'met' if load.wall <= ALLOWED * ideal else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
