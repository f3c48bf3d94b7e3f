"""The operator's verbs, with jobs at work: none of them loses a job or runs one twice."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from begun_jobs import begun_jobs
from cluster import STACK, Cluster, wait_until
from machines import Machines
from playbooks import changes, checked, done, playbook, refused, said

from claude_jobs.client import Job

Run = Callable[[Coroutine[Any, Any, Any]], Any]

NODE_KEY = "/var/lib/docker/swarm/certificates/swarm-node.key"


@asynccontextmanager
async def jobs_at_work(
    cluster: Cluster, directory: str, *, seconds: int = 30
) -> AsyncIterator[dict[str, Job]]:
    """Have a job on every replica, and some that wait; in the end each has run once."""
    async with cluster.client(cluster.managers[0]) as client:
        replicas = cluster.replicas
        running = await begun_jobs(client, replicas, f"sleep {seconds}", directory=directory)
        waiting = [await client.submit("run echo done", workspace=directory) for _ in range(3)]
        yield running
        for job in (*running.values(), *waiting):
            await job.result()
            types = [event.type async for event in job.events()]
            # Once to its end, and begun once: nobody lost it.
            assert (types.count("completed"), types.count("connected")) == (1, 1), types
            assert "recovering" not in types


async def under_jobs(cluster: Cluster, directory: str, name: str, **given: object) -> str:
    """Run a verb while jobs run; returns what it prints."""
    async with jobs_at_work(cluster, directory):
        return await asyncio.to_thread(done, cluster, name, **given)


def test_the_status_of_a_pool_in_which_all_is_well(whole: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    shown = done(whole, "status", format="json", status_file=str(file))
    assert changes(shown) == 0
    state = json.loads(file.read_text())
    assert state["well"]
    assert {row["name"] for row in state["nodes"]} == set(whole.nodes)
    assert len(state["pool"]["replicas"]) == whole.replicas
    assert {stream["name"] for stream in state["pool"]["streams"]} >= {"JOBS", "EVENTS"}
    assert "All is well." in done(whole, "status")


@pytest.mark.spread
def test_a_pool_shrinks_and_grows_while_jobs_run(whole: Cluster, directory: str, run: Run) -> None:
    before = whole.replicas
    try:
        run(under_jobs(whole, directory, "scale", replicas=before - 1))
        assert whole.replicas == before - 1
    finally:
        done(whole, "scale", replicas=before)
    assert changes(done(whole, "scale", replicas=before)) == 0


@pytest.mark.once
@pytest.mark.parametrize("wanted", ["0", "many", "1000"])
def test_a_number_of_replicas_that_cannot_be_is_refused(whole: Cluster, wanted: str) -> None:
    assert "Nothing was changed: " in refused(whole, "scale", replicas=wanted)


@pytest.mark.long
@pytest.mark.spread
def test_a_node_is_drained_once_its_jobs_have_ended_and_activated_again(
    whole: Cluster, directory: str, run: Run
) -> None:
    node = whole.workers[-1]
    run(under_jobs(whole, directory, "drain_node", node=node))
    assert whole.docker("ps", "--quiet", on=node) == ""
    assert changes(done(whole, "drain_node", node=node)) == 0
    assert f"{node} is drained" in done(whole, "status")
    done(whole, "activate_node", node=node)
    assert changes(done(whole, "activate_node", node=node)) == 0


def test_what_the_pool_cannot_do_without_is_refused(whole: Cluster) -> None:
    assert "nobody is not in the inventory" in refused(whole, "drain_node", node="nobody")
    assert "No node was named" in refused(whole, "drain_node")
    assert "the workspace is on it" in refused(whole, "remove_node", node=whole.nfs_server)
    if len(whole.managers) == 1:
        manager = whole.managers[0]
        assert "last node with a gateway" in refused(whole, "drain_node", node=manager)
        assert "only manager of the swarm" in refused(whole, "remove_node", node=manager)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.managers
def test_a_manager_and_a_worker_change_places_under_jobs(
    whole: Cluster, directory: str, run: Run, tmp_path: Path
) -> None:
    """The broker's copy moves with the manager, and back."""
    worker, manager = whole.workers[0], whole.managers[-1]
    rest = whole.managers[:-1]
    more = whole.in_roles(tmp_path / "more", managers=[*rest, manager, worker], workers=[])
    # Who comes new stands last: the broker stays with the first three.
    back = whole.in_roles(tmp_path / "back", managers=[*rest, worker, manager], workers=[])
    other = whole.in_roles(tmp_path / "other", managers=[*rest, worker], workers=[manager])
    assert f"{worker} is not among the swarm_managers" in refused(whole, "promote", node=worker)
    assert f"{manager} is not among the swarm_workers" in refused(whole, "demote", node=manager)
    assert "there is no manager without one to take it" in refused(other, "demote", node=manager)

    async def change_places() -> None:
        async with jobs_at_work(whole, directory, seconds=120):
            await asyncio.to_thread(done, more, "promote", node=worker)
            await asyncio.to_thread(done, other, "demote", node=manager)

    run(change_places())
    assert whole.tasks("nats") == dict.fromkeys((*rest, worker), 1)
    assert whole.tasks("gateway") == dict.fromkeys((*rest, worker), 1)
    done(back, "promote", node=manager)
    done(whole, "demote", node=worker)
    assert whole.tasks("nats") == dict.fromkeys(whole.managers, 1)
    assert "All is well." in done(whole, "status")


@pytest.mark.long
@pytest.mark.machines
@pytest.mark.spread
def test_a_machine_that_is_off_is_shown_with_what_to_do(whole: Cluster, machines: Machines) -> None:
    node = next(name for name in whole.workers if name != whole.nfs_server)
    # What was deployed a moment ago may not be on its disk yet: files of zeros are another matter.
    whole.host(node).check_output("sync")
    machines.power_off(node)
    try:
        wait_until(
            lambda: whole.states()[node] == "Down", f"the managers see {node} down", seconds=90
        )
        assert f"playbooks/remove_node.yml -e node={node}" in refused(whole, "status")
    finally:
        machines.power_on(node)
    whole.wait_whole()


@pytest.mark.long
@pytest.mark.spread
def test_new_settings_come_in_while_jobs_of_before_finish(
    whole: Cluster, directory: str, run: Run
) -> None:
    run(under_jobs(whole, directory, "update", app_stack_max_turns=999))
    shown = whole.docker("service", "inspect", f"{STACK}_claude-api")
    assert "MAX_TURNS=999" in shown


@pytest.mark.long
@pytest.mark.spread
def test_a_broken_image_is_rolled_back_and_jobs_go_on(
    whole: Cluster, directory: str, run: Run
) -> None:
    """One whose replicas and gateways do not start: the broker that it has is good."""
    image = str(specs(whole)[f"{STACK}_claude-api"]["TaskTemplate"]["ContainerSpec"]["Image"])
    broken = "broken:1"
    entry = '["sh", "-c", "[ $0 = broker ] && exec /usr/local/bin/entrypoint $0; exit 1"]'
    for node in whole.nodes:
        container = whole.docker("create", image, on=node).strip()
        whole.docker("commit", f"--change=ENTRYPOINT {entry}", container, broken, on=node)
        whole.docker("rm", container, on=node)
    before = specs(whole)

    async def update() -> None:
        async with jobs_at_work(whole, directory):
            shown = await asyncio.to_thread(
                playbook, whole, "playbooks/update.yml", app_stack_image=broken
            )
            assert shown.returncode != 0
            assert "The services run as before again" in " ".join(shown.stdout.split())

    run(update())
    assert specs(whole) == before


def specs(cluster: Cluster) -> dict[str, Any]:
    """Return what each service of the pool is to be."""
    names = [line["Name"] for line in cluster.lines("service", "ls")]
    return {
        one["Spec"]["Name"]: one["Spec"]
        for one in json.loads(cluster.docker("service", "inspect", *names))
    }


@pytest.mark.long
@pytest.mark.managers
def test_secrets_are_rotated_under_jobs(whole: Cluster, directory: str, run: Run) -> None:
    old = whole.token
    run(under_jobs(whole, directory, "rotate_secrets", rotate="api_token,broker,join_tokens,ca"))
    secrets = whole.lines("secret", "ls")
    assert len(secrets) == 4, "one version of each, and all others are gone"
    new = whole.token
    assert new != old
    for token in (old, new):
        assert whole.accepts(token)
    assert not whole.accepts("another-token-of-this-length")
    assert "is still good" in refused(whole, "rotate_secrets", rotate="api_token")
    assert "but it names what to rotate" in refused(whole, "rotate_secrets", rotate="everything")


@pytest.mark.long
@pytest.mark.spread
def test_what_is_known_to_break_is_repaired(whole: Cluster) -> None:
    node = next(name for name in whole.workers if name != whole.nfs_server)
    path = "/srv/claude-code/workspace"
    whole.host(node).check_output("systemctl stop 'srv-claude*.timer' && umount --lazy %s", path)
    whole.docker(
        *("service", "update", "--detach", "--update-failure-action=pause"),
        *("--args=no-such-process", f"{STACK}_gateway"),
    )
    wait_until(
        lambda: (
            "paused"
            in whole.docker(
                "service", "inspect", f"{STACK}_gateway", "--format={{.UpdateStatus.State}}"
            )
        ),
        "the update of the gateways stops",
        seconds=120,
    )
    said = refused(whole, "status")
    assert f"{node} has a directory in place of the workspace" in said
    assert "its update is paused" in said
    playbook(whole, "playbooks/repair.yml")
    whole.wait_whole()
    assert "All is well." in done(whole, "status")


@pytest.mark.long
@pytest.mark.managers
def test_engines_are_upgraded_node_by_node(whole: Cluster, directory: str, run: Run) -> None:
    version = "+again"
    for name in whole.nodes:
        offer_engine(whole, name, version)
    # The jobs wait meanwhile: agents run on one node alone.
    assert "last node that runs agents" in refused(whole, "upgrade_engine")
    run(under_jobs(whole, directory, "upgrade_engine", swarm_node_force=True))
    for name in whole.nodes:
        assert whole.host(name).package("docker.io").version.endswith(version)
    whole.wait_whole()
    assert changes(done(whole, "upgrade_engine")) == 0


def offer_engine(cluster: Cluster, name: str, suffix: str) -> None:
    """Offer a node the engine that it has as a newer version, by a repository on its disk."""
    cluster.host(name).check_output(
        """set -e
        mkdir -p /srv/engine && cd /srv/engine
        apt-get download -q docker.io
        dpkg-deb --raw-extract docker.io_*.deb unpacked && rm docker.io_*.deb
        sed -i 's/^Version: .*/&%s/' unpacked/DEBIAN/control
        dpkg-deb -Znone --build unpacked docker.io.deb >/dev/null
        {
            cat unpacked/DEBIAN/control
            echo "Filename: ./docker.io.deb"
            echo "Size: $(stat --format=%%s docker.io.deb)"
            echo "SHA256: $(sha256sum docker.io.deb | cut -d' ' -f1)"
        } > Packages
        rm -r unpacked
        echo 'deb [trusted=yes] file:/srv/engine ./' > /etc/apt/sources.list.d/engine.list
        """,
        suffix,
    )


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.machines
@pytest.mark.managers
def test_a_lost_quorum_is_made_anew_by_name(
    whole: Cluster, machines: Machines, directory: str, run: Run, tmp_path: Path
) -> None:
    """By a job that runs on meanwhile; the managers of before join again, with their data."""
    first, *lost = whole.managers
    key = tmp_path / "unlock-key"
    key.write_text(whole.docker("swarm", "unlock-key", "--quiet"))
    # After that the engine changes it once more with a new cluster.
    whole.docker("swarm", "ca", "--rotate", "--quiet")

    async def at_work() -> Job:
        async with whole.client(first) as client:
            await (await client.submit("run echo before", workspace=directory)).result()
            jobs = await begun_jobs(client, 1, "sleep 60", directory=directory)
            return next(iter(jobs.values()))

    job = run(at_work())
    for name in lost:
        whole.host(name).check_output("sync")
        machines.power_off(name)
    try:
        wait_until(
            lambda: whole.host(first).run("docker node ls").rc != 0,
            "the quorum is lost",
            seconds=120,
        )
        assert "No manager answers" in said(whole, "status")
        shown = said(whole, "repair")
        assert "The swarm has no quorum" in shown
        assert f"these were reached: {first}." in shown
        assert "no unlock key was given" in said(whole, "repair", force_new_cluster=first)
        said(whole, "repair", force_new_cluster=first, unlock_key_file=str(key))
        assert whole.states()[first] == "Ready"
        assert "ENCRYPTED" in whole.host(first).file(NODE_KEY).content_string, "locked as before"
        gone = lost[0]
        assert "gone for good" in refused(whole, "remove_node", node=gone)
        done(whole, "remove_node", node=gone, swarm_node_force=True)
        assert gone not in whole.states()
    finally:
        for name in lost:
            machines.power_on(name)
    for name in lost:
        whole.host(name).check_output("docker swarm leave --force")
    playbook(whole, "site.yml").check_returncode()
    whole.wait_whole()

    async def ended() -> None:
        async with whole.client(first) as client:
            await client.result(job.id)
            assert (await client.job(job.id)).status == "completed"

    run(ended())
    assert "All is well." in done(whole, "status")


@pytest.mark.long
@pytest.mark.spread
def test_a_node_is_removed_under_jobs(whole: Cluster, directory: str, run: Run) -> None:
    node = next(name for name in whole.workers if name != whole.nfs_server)
    for verb in ("drain_node", "remove_node"):
        checked(whole, verb, node=node)
    run(under_jobs(whole, directory, "remove_node", node=node))
    assert node not in whole.states()
    assert whole.swarm_state(node) == "inactive"
    assert not whole.host(node).mount_point("/srv/claude-code/workspace").exists
    assert changes(done(whole, "remove_node", node=node)) == 0
    assert f"{node} is not a node of the swarm" in refused(whole, "drain_node", node=node)
