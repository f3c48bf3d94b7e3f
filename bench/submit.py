"""From `POST` to a waiting replica having the job, as the client sees it.

One job at a time against an idle pool. The clock starts before the request is sent, on a
connection that is open already, and stops when the client has read the event.
"""

import statistics
import time

from target import parser, run_job, show, target


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=40)
    given = options.parse_args()
    pool = target(given)
    queued, connected = [], []
    with pool.client() as client:
        for _ in range(given.jobs):
            pool.wait_idle(client)
            sent = time.time()
            for event in run_job(client, "hello"):
                if event.type == "queued":
                    queued.append(event.at - sent)
                elif event.type == "connected":
                    connected.append(event.at - sent)
            assert event.type == "completed", event.data
    rows = {"POST -> queued": queued, "POST -> a replica has the job": connected}
    show(rows, unit="ms", scale=1000)
    p50 = statistics.median(connected) * 1000
    print(f"target: under 10 ms, p50: {'met' if p50 < 10 else 'MISSED'}")


if __name__ == "__main__":
    main()
