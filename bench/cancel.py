"""From a cancel to the job's end, as the client reads it, while the agent works with a tool.

One job at a time against an idle pool. The clock starts before the request is sent, and stops
when the client has read the terminal event: then no process of the agent is left.
"""

import threading
import time

from target import Target, parser, run_job, show, target


def cancelled(pool: Target) -> float:
    """Cancel a job whose agent sleeps; return how long that took, in seconds."""
    asked = 0.0

    def cancel(job_id: str) -> None:
        nonlocal asked
        with pool.client() as other:
            asked = time.time()
            other.post(f"/api/jobs/{job_id}/cancel").raise_for_status()

    canceller: threading.Thread | None = None
    with pool.client() as client:
        for event in run_job(client, "run sleep 600"):
            if event.type == "connected":
                job_id = event.data["jobId"]
            # The line that says which tool is used comes right before the tool.
            elif "tool_use" in str(event.data.get("content", "")) and not canceller:
                canceller = threading.Timer(0.5, cancel, [job_id])
                canceller.start()
    assert canceller, "no tool was used"
    canceller.join()
    assert event.data.get("code") == "cancelled", event.data
    return event.at - asked


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=40)
    given = options.parse_args()
    pool = target(given)
    times = []
    for _ in range(given.jobs):
        with pool.client() as client:
            pool.wait_idle(client)
        times.append(cancelled(pool))
    show({"cancel -> end of the job": times}, unit="s")
    p95 = sorted(times)[int(len(times) * 0.95)]
    print(f"target: within 2 s, p95: {p95:.2f} s, {'met' if p95 <= 2 else 'MISSED'}")


if __name__ == "__main__":
    main()
