"""Removes the directories of jobs that were taken in long ago (`WORKSPACE_MODE=per-job`)."""

import contextlib
import logging
import os
from datetime import timedelta
from functools import partial
from pathlib import Path

from claude_jobs.bus.records import accepted_at, is_job_id
from claude_jobs.contract.base import now
from claude_jobs.gateway.conditions import Conditions
from claude_jobs.gateway.file_store import delete
from claude_jobs.gateway.settlement import is_over
from claude_jobs.gateway.state import Backend
from claude_jobs.workspace import JOB_DIRECTORIES, WorkspaceError, locate
from claude_jobs.workspace_threads import WorkspaceThreads

log = logging.getLogger(__name__)


async def remove_old(
    backend: Backend, threads: WorkspaceThreads, root: Path, age: timedelta
) -> None:
    """Remove the directories of jobs that are over and were taken in longer ago than `age`.

    What cannot be removed stays for the next time. Raises `WorkspaceStalledError`.
    """
    before = now() - age
    for job_id in await threads.run(_job_directories, root):
        if accepted_at(job_id) >= before or not await is_over(backend, job_id):
            continue
        try:
            await threads.run(
                partial(delete, root, (JOB_DIRECTORIES, job_id), Conditions(), recursive=True)
            )
            log.info("removed the directory of a job", extra={"job": job_id})
        except (OSError, WorkspaceError) as error:
            log.warning(
                "the directory of a job is left for the next time",
                extra={"job": job_id, "cause": str(error)},
            )


def _job_directories(root: Path) -> list[str]:
    """Return the names below `jobs` that are ids of jobs."""
    with contextlib.suppress(OSError, WorkspaceError), locate(root, (JOB_DIRECTORIES, ".")) as top:
        directory = top.open(os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(directory) as entries:
                return sorted(entry.name for entry in entries if is_job_id(entry.name))
        finally:
            os.close(directory)
    return []
