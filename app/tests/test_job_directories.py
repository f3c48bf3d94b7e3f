"""Directories of jobs' own do not stay for ever."""

import uuid
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from bus_ends import ENDED, Ends, job

from claude_jobs.contract.base import now
from claude_jobs.contract.job import Job, JobRecord
from claude_jobs.gateway.job_directories import remove_old
from claude_jobs.gateway.state import Backend
from claude_jobs.workspace_threads import WorkspaceThreads

pytestmark = pytest.mark.asyncio(loop_scope="session")

AGE = timedelta(hours=720)


def job_of(time: datetime) -> Job:
    """Return a job that was taken in at a time."""
    milliseconds = int(time.timestamp() * 1000)
    number = (milliseconds << 80) | (uuid.uuid4().int & ~(-1 << 80))
    number = number & ~(0xF << 76) | (7 << 76)
    number = number & ~(0x3 << 62) | (2 << 62)
    return job("x").model_copy(update={"id": str(uuid.UUID(int=number))})


async def test_only_directories_of_jobs_of_long_ago_that_are_over_are_removed(
    ends: Ends, tmp_path: Path
) -> None:
    backend = await Backend.open(ends.gateway)
    long_ago = now() - AGE - timedelta(hours=1)
    forgotten, running, young = job_of(long_ago), job_of(long_ago), job_of(now())
    await backend.queue.submit(running)
    await backend.records.put(JobRecord.queued(running))
    await backend.records.put(JobRecord.queued(young).ended(ENDED))
    elsewhere = tmp_path / "elsewhere"
    linked = job_of(long_ago)
    for kept in (elsewhere, *(tmp_path / "jobs" / each.id for each in (forgotten, running, young))):
        (kept / "deep").mkdir(parents=True)
        (kept / "deep" / "file").write_text("x")
    (tmp_path / "jobs" / "notes").mkdir()
    (tmp_path / "jobs" / linked.id).symlink_to(elsewhere)
    (tmp_path / "jobs" / forgotten.id / "link").symlink_to(elsewhere)

    await remove_old(backend, WorkspaceThreads(tmp_path), tmp_path, AGE)

    left = {entry.name for entry in (tmp_path / "jobs").iterdir()}
    assert left == {running.id, young.id, "notes"}
    assert (elsewhere / "deep" / "file").exists()


async def test_a_workspace_without_such_directories_is_left_as_it_is(
    ends: Ends, tmp_path: Path
) -> None:
    backend = await Backend.open(ends.gateway)
    await remove_old(backend, WorkspaceThreads(tmp_path), tmp_path, AGE)
    (tmp_path / "jobs").write_text("somebody's file")
    await remove_old(backend, WorkspaceThreads(tmp_path), tmp_path, AGE)
    assert (tmp_path / "jobs").read_text() == "somebody's file"
