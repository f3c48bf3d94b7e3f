"""What the operator is told of the broker's streams is what its servers hold."""

import asyncio
import contextlib
from dataclasses import replace

import pytest
from broker_contents import BOUNDS
from broker_node import BrokerNodes
from nats.js.errors import APIError

from claude_jobs.broker.users import GATEWAY_USER
from claude_jobs.bus.connection import connect
from claude_jobs.bus.topology import ensure_topology
from claude_jobs.operator.report import report
from claude_jobs.settings import Passwords

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]


async def test_a_lone_server_holds_everything(nodes: BrokerNodes) -> None:
    await nodes.first.start()
    async with nodes.first.connected(GATEWAY_USER) as gateway:
        await ensure_topology(gateway, BOUNDS)
        await gateway.jetstream.publish("events.a", b"a")
    seen = await report(nodes.gateway_settings(servers=1))
    assert {(each.copies, each.leader, *each.behind) for each in seen.streams} == {(1, "nats")}
    assert [each.messages for each in seen.streams if each.name == "EVENTS"] == [1]


async def test_a_server_that_is_gone_is_named_at_once(nodes: BrokerNodes) -> None:
    """The broker itself counts it as there, and up to date, for ten seconds and more."""
    await nodes.start()
    await nodes.joined()
    async with nodes.connected() as gateway:
        await ensure_topology(gateway, replace(BOUNDS, copies=3))
    settings = nodes.gateway_settings()
    seen = await report(settings)
    assert {(each.copies, *each.behind) for each in seen.streams} == {(3,)}
    await nodes.nodes[1].kill()
    async with asyncio.timeout(60):
        while True:
            # Until those that it led have another leader.
            with contextlib.suppress(APIError, TimeoutError):
                seen = await report(settings)
                break
    assert {(each.copies, *each.behind) for each in seen.streams} == {(3, "nats-node-1")}


async def test_a_gateway_of_before_a_rotation_still_learns_what_the_servers_hold(
    nodes: BrokerNodes,
) -> None:
    secret = nodes.first.secrets / "broker_gateway_password"
    before = secret.read_text()
    secret.write_text(f"of-after-the-rotation\n{before}")
    await nodes.start()
    await nodes.joined()
    async with connect(nodes.urls, user=GATEWAY_USER, password=before, name="test") as gateway:
        await ensure_topology(gateway, replace(BOUNDS, copies=3))
    settings = nodes.gateway_settings().model_copy(
        update={"broker_gateway_password": Passwords.parse(before)}
    )
    seen = await report(settings)
    assert {(each.copies, *each.behind) for each in seen.streams} == {(3,)}
