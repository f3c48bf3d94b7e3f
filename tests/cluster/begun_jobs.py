"""Jobs whose agents are at work: of such a job enough is saved for another replica to go on."""

import asyncio
import time

from claude_jobs.client import ApiError, Client, Job


async def begun_jobs(
    client: Client, count: int, command: str, *, directory: str, seconds: float = 240
) -> dict[str, Job]:
    """Submit jobs that run a shell command, and wait until all of these run.

    Returns them by their nodes and numbers. Each leaves a file `begun-<number>` in the directory.
    """
    signs = {f"begun-{number}" for number in range(count)}
    jobs = [
        await client.submit(f"run touch {sign}; {command}", workspace=directory)
        for sign in sorted(signs)
    ]
    give_up = time.monotonic() + seconds
    while missing := signs - await _names(client, directory):
        assert time.monotonic() < give_up, f"these never began: {missing}"
        await asyncio.sleep(1)
    # Claude Code saves what it does a moment after it began: 0.1 s, and more on a busy node.
    await asyncio.sleep(5)
    places = [(await client.job(job.id)).node for job in jobs]
    return {f"{node}/{number}": jobs[number] for number, node in enumerate(places)}


async def _names(client: Client, directory: str) -> set[str]:
    """Return what is in a directory, which the first job makes."""
    try:
        return {entry.name async for entry in client.files.list(directory)}
    except ApiError as error:
        if error.code != "not_found":
            raise
        return set()
