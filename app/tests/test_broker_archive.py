"""What the broker keeps comes back from an archive as it was, or not at all."""

import asyncio
import io
import sys
import tarfile

import pytest
from broker_contents import contents, fill
from broker_node import BrokerNode, BrokerNodes

from claude_jobs.broker.users import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.queue import JobQueue
from claude_jobs.bus.topology import JOBS_CONSUMER, JOBS_STREAM

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]


async def operate(node: BrokerNode, command: str, given: bytes = b"") -> tuple[int, bytes, str]:
    """Run an operator's command as its playbook does; returns code, output and what was said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "claude_jobs", command),
        env=node.environment(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, said = await process.communicate(given)
    assert process.returncode is not None
    return process.returncode, output, said.decode()


async def backed_up(node: BrokerNode) -> bytes:
    code, archive, said = await operate(node, "broker-backup")
    assert code == 0, said
    return archive


async def test_an_archive_has_all_that_the_broker_keeps(nodes: BrokerNodes) -> None:
    first, second = nodes.nodes[:2]
    await first.start()
    before = await fill(first)
    archive = await backed_up(first)
    await first.kill()

    second.take_ports()
    code, _, said = await operate(second, "broker-restore", archive)
    assert code == 0, said
    await second.start()
    async with second.connected(GATEWAY_USER) as gateway:
        assert await contents(gateway) == before
        info = await gateway.jetstream.consumer_info(JOBS_STREAM, JOBS_CONSUMER)
        assert (info.num_ack_pending, info.num_pending) == (1, 18)
    async with second.connected(REPLICA_USER) as replica:
        assert (await JobQueue(replica).pull()).job.request.prompt == "job 2"


async def test_three_servers_take_up_what_one_of_them_got_from_an_archive(
    nodes: BrokerNodes,
) -> None:
    await nodes.first.start()
    before = await fill(nodes.first)
    archive = await backed_up(nodes.first)
    # The machines are new ones.
    await nodes.first.kill()
    nodes.first.forget()
    code, _, said = await operate(nodes.first, "broker-restore", archive)
    assert code == 0, said
    await nodes.start()
    await nodes.joined()
    async with nodes.connected() as gateway:
        assert await contents(gateway) == before


async def test_a_broker_that_has_something_is_left_alone(nodes: BrokerNodes) -> None:
    await nodes.first.start()
    before = await fill(nodes.first)
    archive = await backed_up(nodes.first)
    await nodes.first.stop()
    code, _, said = await operate(nodes.first, "broker-restore", archive)
    assert code == 65
    assert "this node has streams of a broker already: EVENTS, JOBS" in said
    await nodes.first.start()
    async with nodes.first.connected(GATEWAY_USER) as gateway:
        assert await contents(gateway) == before


async def test_an_archive_that_is_not_whole_leaves_nothing(nodes: BrokerNodes) -> None:
    first, second = nodes.nodes[:2]
    await first.start()
    await fill(first)
    archive = await backed_up(first)
    second.take_ports()
    for wrong, said_why in {
        archive[: len(archive) // 2]: "the archive",
        without(archive, "EVENTS/00000002"): "EVENTS",
        without(archive, "complete.json"): "broken off",
        b"no archive": "the archive cannot be read",
        b"": "the archive",
    }.items():
        code, _, said = await operate(second, "broker-restore", wrong)
        assert code in (65, 69), said
        assert said_why in said
        assert not (second.data / "jetstream").exists()


async def test_a_broker_that_is_away_is_said_to_be(nodes: BrokerNodes) -> None:
    nodes.first.take_ports()
    code, archive, said = await operate(nodes.first, "broker-backup")
    assert (code, archive) == (69, b"")
    assert "the broker was not backed up" in said


def without(archive: bytes, entry: str) -> bytes:
    """Return an archive that lacks an entry."""
    rest = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as given,
        tarfile.open(fileobj=rest, mode="w") as made,
    ):
        assert entry in given.getnames()
        for info in given:
            if info.name != entry:
                made.addfile(info, given.extractfile(info))
    return rest.getvalue()
