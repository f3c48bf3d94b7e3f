"""What teardown leaves of a cluster: nothing but engines."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from begun_jobs import begun_jobs
from cluster import Cluster
from playbooks import changes, done, refused

Run = Callable[[Coroutine[Any, Any, Any]], Any]

pytestmark = [pytest.mark.long, pytest.mark.machines]

WORKSPACE = "/srv/claude-code/workspace"


def test_a_swarm_that_somebody_else_uses_is_not_left(whole: Cluster) -> None:
    whole.docker("service", "create", "--detach", "--replicas=0", "--name=theirs", "their-image")
    try:
        said = refused(whole, "teardown", teardown_leave_swarm=True)
    finally:
        whole.docker("service", "rm", "theirs")
    assert "services of others (theirs)" in said


def test_nothing_is_left_on_any_node(whole: Cluster, directory: str, run: Run) -> None:
    async def under_jobs() -> str:
        async with whole.client(whole.managers[0]) as client:
            await begun_jobs(client, whole.replicas, "sleep 600", directory=directory)
            return await asyncio.to_thread(done, whole, "teardown", **everything)

    everything = {"teardown_leave_swarm": True, "teardown_workspace": WORKSPACE}
    run(under_jobs())
    for name in whole.nodes:
        host = whole.host(name)
        assert whole.swarm_state(name) == "inactive"
        for kind in ("container", "volume", "network"):
            mine = ("--filter=label=com.docker.stack.namespace=claude-code-stack", "--quiet")
            assert whole.docker(kind, "ls", *mine, on=name) == "", (name, kind)
        assert not host.mount_point(WORKSPACE).exists
        assert not host.file(f"{WORKSPACE}/{directory}").exists
        assert "claude" not in host.check_output("nft list tables")
    assert not whole.host(whole.nfs_server).file(WORKSPACE).exists
    assert WORKSPACE not in whole.host(whole.nfs_server).check_output("exportfs")
    assert changes(done(whole, "teardown", **everything)) == 0
