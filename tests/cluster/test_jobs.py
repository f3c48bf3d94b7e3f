"""What clients of a cluster rely on, whichever nodes their requests and jobs come to."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from cluster import Cluster, wait_until

from claude_jobs.client import ApiError, Client

Run = Callable[[Coroutine[Any, Any, Any]], Any]


async def run_job(client: Client, prompt: str, *, directory: str) -> str:
    """Run a job to its good end and return the node that it ran on."""
    job = await client.submit(prompt, workspace=directory)
    await job.result()
    return str((await client.job(job.id)).node)


def test_every_nodes_port_serves_the_pool(whole: Cluster, directory: str, run: Run) -> None:
    async def ask() -> list[str]:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(whole.client(name)) for name in whole.nodes]
            return await asyncio.gather(
                *(run_job(client, "say 10 bytes", directory=directory) for client in clients)
            )

    assert len(run(ask())) == len(whole.nodes)


@pytest.mark.spread
def test_a_file_of_one_node_is_read_on_another(whole: Cluster, directory: str, run: Run) -> None:
    async def write_and_read() -> tuple[str, list[str], list[str]]:
        async with whole.client(whole.managers[0]) as client:
            writer = await run_job(
                client, 'create a file seen.txt with content: "one"', directory=directory
            )
            reads = [
                await client.submit("run cat seen.txt", workspace=directory)
                for _ in range(whole.replicas)
            ]
            results = [await job.result() for job in reads]
            nodes = [str((await client.job(job.id)).node) for job in reads]
            return writer, nodes, [str(result.result) for result in results]

    writer, nodes, texts = run(write_and_read())
    assert set(nodes) - {writer}, "every reader ran where the file was written"
    assert all("one" in text for text in texts), texts


def test_what_nobody_found_is_found_through_every_node_once_a_job_has_made_it(
    whole: Cluster, directory: str, run: Run
) -> None:
    """A node that was asked before remembers that there was nothing, and not for long."""

    async def ask() -> list[list[str]]:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(whole.client(name)) for name in whole.nodes]
            for client in clients:
                with pytest.raises(ApiError, match="404"):
                    await anext(client.files.list(directory))
            await run_job(clients[0], "run touch made", directory=directory)
            await asyncio.sleep(1)  # as long as docs/cluster.md says
            return [
                [entry.name async for entry in client.files.list(directory)] for client in clients
            ]

    assert run(ask()) == [["made"]] * len(whole.nodes)


@pytest.mark.spread
def test_thirty_jobs_of_ten_clients_run_once_each(whole: Cluster, directory: str, run: Run) -> None:
    """Each job makes a file of its own name and of chance: two runs would make two."""
    jobs = [f"job-{number:02}" for number in range(30)]

    async def work(client: Client, names: list[str]) -> None:
        for name in names:
            sign = f"run touch {name}.$(cat /proc/sys/kernel/random/uuid)"
            await run_job(client, sign, directory=directory)

    async def all_clients() -> list[str]:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    whole.client(whole.nodes[number % len(whole.nodes)])
                )
                for number in range(10)
            ]
            await asyncio.gather(
                *(work(client, jobs[number::10]) for number, client in enumerate(clients))
            )
            return [entry.name async for entry in clients[0].files.list(directory)]

    signed = Counter(name.split(".")[0] for name in run(all_clients()))
    assert signed == Counter(jobs)


@pytest.mark.spread
def test_every_node_gets_replicas_once_jobs_have_run(whole: Cluster) -> None:
    """A used up replica is replaced where the fewest are: on a node that joined last, too."""
    # The swarm says that one runs once its first health check has passed: after it is idle.
    wait_until(
        lambda: set(whole.tasks("claude-api")) == set(whole.agents),
        "replicas run on every node",
        seconds=60,
    )
