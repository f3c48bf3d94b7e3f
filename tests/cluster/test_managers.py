"""Three managers: the loss of any one of them is no loss."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from begun_jobs import begun_jobs
from cluster import STACK, Cluster, wait_until
from machines import Machines
from test_preflight import preflight

Run = Callable[[Coroutine[Any, Any, Any]], Any]
ANSWERS_AGAIN = 30  # seconds

pytestmark = [pytest.mark.machines, pytest.mark.managers]


def swarm_leader(cluster: Cluster, *, on: str) -> str:
    """Return the manager that leads the swarm."""
    nodes = cluster.lines("node", "ls", on=on)
    return next(str(node["Hostname"]) for node in nodes if node["ManagerStatus"] == "Leader")


def streams(cluster: Cluster, *, on: str) -> list[dict[str, Any]]:
    """Return what the broker's server on a node knows of the streams."""
    container = cluster.docker("ps", "--quiet", "--filter", f"name={STACK}_nats", on=on).split()[0]
    address = "http://127.0.0.1:8222/jsz?streams=true"
    shown = json.loads(cluster.docker("exec", container, "curl", "--silent", address, on=on))
    return [stream for account in shown["account_details"] for stream in account["stream_detail"]]


def broker_leader(cluster: Cluster, stream: str, *, on: str) -> str:
    """Return the node whose server of the broker leads a stream, once the one on `on` knows it."""

    def ask() -> str:
        leaders = {one["name"]: one["cluster"].get("leader") for one in streams(cluster, on=on)}
        return str(leaders.get(stream) or "")

    leader = wait_until(ask, f"{stream} has a leader", seconds=60)
    # One that has moved there a second time is `nats-<node>_2`.
    return leader.removeprefix("nats-").partition("_")[0]


def test_everything_has_three_copies(whole: Cluster) -> None:
    copies = {
        one["name"]: 1 + len(one["cluster"].get("replicas", []))
        for one in streams(whole, on=whole.managers[0])
    }
    assert {"JOBS", "EVENTS", "SESSIONS"} <= set(copies)
    assert set(copies.values()) == {3}, copies


def test_jobs_from_before_the_growth_ended_once(
    cluster: Cluster, pytestconfig: pytest.Config, run: Run
) -> None:
    """They were accepted by a pool with one manager, and some of them ran while it grew.

    Those may have been held meanwhile, for longer than a lease: then they were recovered.
    """
    jobs = json.loads((pytestconfig.getoption("machines") / "jobs-before-growth.json").read_text())

    async def ends() -> list[list[str]]:
        async with cluster.client(cluster.managers[0]) as client:
            seen = []
            for job_id in jobs:
                await client.result(job_id)
                seen.append([event.type async for event in client.events(job_id)])
            return seen

    types = run(ends())
    assert len(types) == len(jobs)
    assert all(each.count("completed") == 1 for each in types)


@pytest.mark.parametrize("leads", [pytest.param("swarm", marks=pytest.mark.long), "broker"])
def test_the_api_answers_soon_after_a_leader_loses_power(
    whole: Cluster, machines: Machines, directory: str, run: Run, leads: str
) -> None:
    """What was accepted before ends, and new work is accepted within half a minute."""
    victim = (
        swarm_leader(whole, on=whole.managers[0])
        if leads == "swarm"
        else broker_leader(whole, "JOBS", on=whole.managers[0])
    )
    other = next(name for name in whole.managers if name != victim)

    async def lose_leader() -> float:
        async with whole.client(other) as client:
            begun = await begun_jobs(client, whole.replicas, "sleep 60", directory=directory)
            waiting = [
                await client.submit("say 10 bytes", workspace=directory)
                for _ in range(whole.replicas)
            ]
            await asyncio.to_thread(machines.power_off, victim)
            lost = time.monotonic()
            after = await client.submit("say 10 bytes", workspace=directory)
            waited = time.monotonic() - lost
            for job in (*begun.values(), *waiting, after):
                await job.result()
                types = [event.type async for event in job.events()]
                assert types.count("completed") == 1
            return waited

    try:
        waited = run(lose_leader())
        assert waited < ANSWERS_AGAIN
        wait_until(
            lambda: whole.states(on=other)[victim] == "Down",
            f"the managers see {victim} down",
            seconds=90,
        )
    finally:
        machines.power_on(victim)
    if whole.variables(victim).get("swarm_manager_autolock"):
        wait_until(
            lambda: whole.swarm_state(victim) == "locked",
            f"the engine of {victim} asks for the key",
            seconds=60,
        )
        said = preflight(whole.inventory).stdout
        assert f"{victim} is a manager of a swarm that is locked. Unlock it" in said
        whole.unlock(victim, by=other)
    wait_until(
        lambda: whole.tasks("nats", on=other)[victim] == 1,
        f"the broker's server on {victim} is back",
        seconds=240,
    )
    whole.wait_whole()
