"""How long a slot of the pool is without a replica between two jobs.

The queue is kept full. For each pair of jobs in one slot the time from the end of the first to the
second's start is split at the container's exit and the next one's start: what lies between these
two is what Swarm itself needs. Beside it, as a floor, a service of the same image that only sleeps.
"""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from containers import watched
from target import Event, Target, docker, parser, run_job, show, target


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

    turns = slots.turns(begins=begins, ends=ends)
    print(f"{jobs} jobs of {work:g} s over {replicas} replicas")
    return {
        "end of job -> exit of container": [turn.end_to_exit for turn in turns],
        "exit -> next start (Swarm's own)": [turn.exit_to_start for turn in turns],
        "start -> next job pulled": [turn.start_to_begin for turn in turns],
        "end of job -> next job pulled": [turn.whole for turn in turns],
        "  of which on top of Swarm's own": [turn.whole - turn.exit_to_start for turn in turns],
    }


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
