"""A pool that is backed up under jobs, lost, and made anew from the backup on fresh machines."""

import asyncio
import json
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from machines import Machines
from playbooks import done, playbook, refused

from claude_jobs.client import Job

Run = Callable[[Coroutine[Any, Any, Any]], Any]

pytestmark = [pytest.mark.long, pytest.mark.machines, pytest.mark.spread]

KEPT = "kept.txt"


async def ended(job: Job) -> list[tuple[int | None, str]]:
    """Wait until a job has ended; returns its events."""
    await job.result()
    return [(event.id, event.type) async for event in job.events()]


def test_a_pool_is_the_same_after_it_was_lost_and_restored(
    whole: Cluster, machines: Machines, directory: str, run: Run, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text(secrets.token_urlsafe(32))
    password.chmod(0o600)
    backups = tmp_path / "backups"
    where = {"backup_dir": str(backups), "backup_password_file": str(password)}
    file = tmp_path / "file"
    file.write_bytes(secrets.token_bytes(2**20))

    async def backed_up() -> tuple[Job, list[tuple[int | None, str]], list[Job]]:
        async with whole.client(whole.managers[0]) as client:
            await client.files.upload(f"{directory}/{KEPT}", file)
            first = await client.submit("run echo first", workspace=directory)
            events = await ended(first)
            # Some are at work while it is backed up, and some wait; none has ended by then.
            going = [
                await client.submit(f"run sleep 90; echo {n}", workspace=directory)
                for n in range(whole.replicas + 3)
            ]
            await asyncio.to_thread(done, whole, "backup", **where)
            for job in going:
                await job.result()
            return first, events, going

    # The harder case: the engine makes no new cluster of a manager that is locked at rest.
    whole.docker("swarm", "update", "--autolock=true")
    first, events, going = run(backed_up())
    done(whole, "backup", **where)
    older, newer = sorted(backups.iterdir())
    kept = f"workspace/{directory}/{KEPT}"
    assert (older / kept).stat().st_ino == (newer / kept).stat().st_ino
    assert "password" not in " ".join(p.name for p in older.iterdir())
    cluster_id, token = cluster_of(whole), whole.token

    assert "has a swarm" in refused(whole, "restore", backup=str(older), **_password(where))
    machines.reinstall(*whole.nodes)
    whole.forget_secrets()
    broken = playbook(whole, "playbooks/restore.yml", backup=f"{older}.partial", **_password(where))
    assert "is no whole backup" in " ".join(broken.stdout.split())
    done(whole, "restore", backup=str(older), **_password(where))

    assert cluster_of(whole) == cluster_id
    assert whole.token == token
    whole.wait_whole()

    async def restored() -> None:
        async with whole.client(whole.managers[0]) as client:
            again = await client.job(first.id)
            assert again.status == "completed"
            assert [(e.id, e.type) async for e in client.events(first.id)] == events
            target = tmp_path / "again"
            await client.files.download(f"{directory}/{KEPT}", target)
            assert target.read_bytes() == file.read_bytes()
            # Those that were at work then are recovered, as after a loss of all machines.
            for job in going:
                await client.result(job.id)
            more = await client.submit(
                "run echo more", resume_session_id=again.session_id, workspace=directory
            )
            await more.result()

    run(restored())
    done(whole, "status")
    assert whole.docker("swarm", "unlock-key", "--quiet").strip()
    whole.docker("swarm", "update", "--autolock=false")


def _password(where: dict[str, str]) -> dict[str, str]:
    return {"backup_password_file": where["backup_password_file"]}


def cluster_of(cluster: Cluster) -> str:
    """Return the ID of the swarm."""
    info = json.loads(cluster.docker("info", "--format", "{{json .Swarm.Cluster.ID}}"))
    return str(info)
