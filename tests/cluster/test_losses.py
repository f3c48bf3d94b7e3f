"""What is lost when a machine or the workspace goes away: nothing."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from begun_jobs import begun_jobs
from cluster import STACK, Cluster, wait_until
from machines import Machines

from claude_jobs.client import ApiError

Run = Callable[[Coroutine[Any, Any, Any]], Any]
PAUSE = 60  # seconds that the NFS server is away


@pytest.mark.machines
@pytest.mark.spread
def test_jobs_of_a_machine_that_loses_power_end_on_others(
    whole: Cluster, machines: Machines, directory: str, run: Run
) -> None:
    # Swarm moves no replica to a machine only because it came back.
    tasks = whole.tasks("claude-api")
    victim = max(whole.workers, key=lambda name: tasks[name])

    async def lose_power() -> dict[str, list[str]]:
        async with whole.client(whole.managers[0]) as client:
            jobs = await begun_jobs(client, whole.replicas, "sleep 60", directory=directory)
            hit = {place: job for place, job in jobs.items() if place.startswith(f"{victim}/")}
            assert hit, f"no job ran on {victim}: {list(jobs)}"
            await asyncio.to_thread(machines.power_off, victim)
            seen: dict[str, list[str]] = {}
            for place, job in jobs.items():
                await job.result()
                seen[place] = [event.type async for event in job.events()]
                record = await client.job(job.id)
                assert (record.node != victim) or place not in hit
            return seen

    try:
        events = run(lose_power())
        for place, types in events.items():
            assert types.count("completed") == 1, place
            assert ("recovering" in types) == place.startswith(f"{victim}/"), place
        wait_until(
            lambda: whole.states()[victim] == "Down", f"the managers see {victim} down", seconds=90
        )
    finally:
        machines.power_on(victim)
    whole.wait_whole()


@pytest.mark.machines
@pytest.mark.spread
def test_jobs_wait_for_the_workspace_and_then_end(whole: Cluster, directory: str, run: Run) -> None:
    """The NFS server stops under running jobs: they stall and go on; nothing is lost."""
    server = whole.host(whole.nfs_server)
    lines = 30
    name = "$(cat /proc/sys/kernel/random/uuid)"
    write = f"f={name}; for i in $(seq {lines}); do echo $i >> $f; sleep 1; done; wc -l < $f"

    async def pause() -> list[str]:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(whole.client(whole.managers[0]))
            jobs = await begun_jobs(client, whole.replicas, write, directory=directory)
            server.check_output("systemctl stop nfs-server")
            try:
                await asyncio.sleep(PAUSE / 2)
                assert (await client.status()).replicas.busy > 0
                started = time.monotonic()
                async with whole.client(whole.managers[0], give_up_after=0) as impatient:
                    try:
                        await impatient.submit("say 1 bytes", workspace=directory)
                    except ApiError as error:
                        assert error.status == 503
                assert time.monotonic() - started < 20
                await asyncio.sleep(PAUSE / 2)
            finally:
                server.check_output("systemctl start nfs-server")
            return [str((await job.result()).result) for job in jobs.values()]

    for text in run(pause()):
        assert str(lines) in text.split()


@pytest.mark.registry
def test_a_replica_starts_again_without_the_registry(whole: Cluster) -> None:
    """Its image is known by digest, so that no engine asks the registry for it."""
    registry = whole.host(whole.registry)

    def healthy() -> set[str]:
        ask = [
            "ps",
            "--quiet",
            "--filter",
            f"name={STACK}_claude-api",
            "--filter",
            "health=healthy",
        ]
        return {each for name in whole.agents for each in whole.docker(*ask, on=name).split()}

    before = healthy()
    registry.check_output("systemctl stop docker-registry")
    try:
        for name in whole.agents:
            kill = f"docker kill $(docker ps --quiet --filter name={STACK}_claude-api)"
            whole.host(name).check_output(kill)
        wait_until(
            lambda: len(after := healthy()) == whole.replicas and not after & before,
            "as many other replicas are healthy",
            seconds=120,
        )
    finally:
        registry.check_output("systemctl start docker-registry")
