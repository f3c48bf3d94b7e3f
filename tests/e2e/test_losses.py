"""What is killed comes back; an accepted job ends in every case."""

import pytest
from deployment import Deployment
from engine import docker
from pool import Gate

# A lease of 20 s must run out, and another replica must find the job and its session.
LEASE_AND_MORE = 45


def test_a_job_on_a_killed_replica_goes_on_on_another_and_the_pool_is_complete_again(
    gate: Gate,
) -> None:
    job = gate.pool.start(gate.prompt("job"))
    gate.wait_began("job")
    lost = job.replica()
    docker("kill", lost)
    end = job.wait(seconds=LEASE_AND_MORE)
    assert end.type == "completed"
    assert job.events[-1] is end
    told = [event for event in job.events if event.type != "message"]
    assert [event.type for event in told] == [
        *("queued", "connected", "recovering", "connected", "completed"),
    ]
    first, recovering, second = (event.data for event in told[1:4])
    assert first["replica"] == lost != second["replica"]
    assert recovering["attempt"] == second["attempt"] == 2
    assert first["sessionId"] == second["resumedFrom"] == end.data["sessionId"]
    # Nothing was done a second time.
    assert gate.pool.ledger(gate.ledger) == ["job began"]
    gate.pool.wait_idle(seconds=30)


@pytest.mark.parametrize("service", ["gateway", "nats"])
def test_no_accepted_job_is_lost_or_run_twice_when_a_part_is_killed(
    gate: Gate, deployment: Deployment, service: str
) -> None:
    pool = gate.pool
    running = {name: pool.start(gate.prompt(name)) for name in ("a", "b", "c", "d", "e")}
    assert len(running) == pool.replicas
    for name in running:
        gate.wait_began(name)
    waiting = {name: pool.start(gate.prompt(name)) for name in ("f", "g")}
    for job in waiting.values():
        job.wait_for("queued")

    docker("kill", *deployment.stack.containers(service))
    assert not any(gate.began(name) for name in waiting)
    gate.open(deployment.stack.containers("claude-api")[0])

    if service == "nats":
        # The gateway lived: its streams outlast the broker's absence.
        for job in (running | waiting).values():
            assert job.wait(seconds=60).type == "completed"
    pool.wait_idle(seconds=90)
    steps = [f"{name}{step}" for name in running | waiting for step in ("", " began")]
    assert sorted(pool.ledger(gate.ledger)) == sorted(steps)
