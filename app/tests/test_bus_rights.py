"""What each role may do on the bus, as a real nats-server enforces it."""

import asyncio
import json

import nats.errors
import nats.js.errors
import pytest
from bus_ends import Ends, job, line
from nats_server import PASSWORDS, NatsServer

from claude_jobs.broker import GATEWAY_USER, REPLICA_USER
from claude_jobs.bus.connection import Bus
from claude_jobs.bus.topology import (
    EVENTS_STREAM,
    JOBS_CONSUMER,
    JOBS_STREAM,
    JOBS_SUBJECTS,
    job_subject,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]


async def refused(bus: Bus, subject: str, payload: bytes = b"{}") -> bool:
    """Tell whether a request is not answered: the broker passes on nothing that is forbidden."""
    try:
        await bus.nats.request(subject, payload, timeout=0.5)
    except (nats.errors.TimeoutError, nats.errors.NoRespondersError):
        return True
    return False


async def test_a_replica_cannot_submit_a_job(ends: Ends) -> None:
    with pytest.raises((nats.errors.Error, nats.js.errors.Error)):
        await ends.replica.jetstream.publish(job_subject("c", "j"), job().to_json(), timeout=0.5)
    assert await ends.inbound.depth() == 0


async def test_a_replica_can_neither_make_nor_change_nor_empty_a_stream(ends: Ends) -> None:
    for name in ("NEW", EVENTS_STREAM):
        config = json.dumps({"name": name, "subjects": [f"{name}.>"]}).encode()
        assert await refused(ends.replica, f"$JS.API.STREAM.CREATE.{name}", config)
        assert await refused(ends.replica, f"$JS.API.STREAM.UPDATE.{name}", config)
    assert await refused(ends.replica, f"$JS.API.STREAM.PURGE.{EVENTS_STREAM}")
    assert await refused(ends.replica, f"$JS.API.STREAM.DELETE.{EVENTS_STREAM}")
    assert await refused(ends.replica, f"$JS.API.STREAM.MSG.GET.{JOBS_STREAM}", b'{"seq":1}')
    names = [stream.config.name for stream in await ends.gateway.jetstream.streams_info()]
    assert "NEW" not in names
    assert EVENTS_STREAM in names


@pytest.mark.parametrize("subject", [f"_INBOX_{GATEWAY_USER}.>", ">", "events.*", JOBS_SUBJECTS])
async def test_a_replica_hears_nothing_that_is_not_for_it(ends: Ends, subject: str) -> None:
    heard: list[object] = []

    async def hear(message: object) -> None:
        heard.append(message)

    await ends.replica.nats.subscribe(subject, cb=hear)
    await ends.replica.nats.flush()
    await ends.inbound.submit(job())
    await (await ends.reader.writer("j")).append(line(1))
    await ends.replica.nats.flush()
    assert heard == []


async def test_a_gateway_cannot_pull(ends: Ends) -> None:
    await ends.inbound.submit(job())
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{JOBS_CONSUMER}"
    assert await refused(ends.gateway, subject, b'{"batch":1,"no_wait":true}')
    assert await ends.inbound.depth() == 1


@pytest.mark.parametrize("stream", [EVENTS_STREAM, "NEW"])
async def test_only_the_broker_itself_carries_whole_streams(ends: Ends, stream: str) -> None:
    for bus in (ends.gateway, ends.replica):
        wish = json.dumps({"deliver_subject": bus.nats.new_inbox()}).encode()
        assert await refused(bus, f"$JS.API.STREAM.SNAPSHOT.{stream}", wish)
        assert await refused(bus, f"$JS.API.STREAM.RESTORE.{stream}")


async def test_nobody_comes_in_with_a_wrong_password(nats_server: NatsServer, ends: Ends) -> None:
    assert ends.replica.is_connected
    for user, password in ((REPLICA_USER, "wrong"), ("", "")):
        with pytest.raises(nats.errors.Error):
            await nats.connect(nats_server.url, user=user, password=password, allow_reconnect=False)


async def test_a_client_with_the_password_of_before_works_on_while_it_is_changed(
    nats_server: NatsServer,
) -> None:
    """The broker starts anew with both; who holds the old one comes back by himself."""
    secret = nats_server.directory / "secrets" / f"broker_{REPLICA_USER}_password"
    new = "the-new-password-of-the-replica"
    async with nats_server.connected(REPLICA_USER) as holder_of_the_old:
        secret.write_text(f"{new}\n{secret.read_text()}\n")
        await nats_server.restart()
        async with nats_server.connected(REPLICA_USER, new) as holder_of_the_new:
            await holder_of_the_new.nats.flush()
        async with asyncio.timeout(20):
            while not holder_of_the_old.is_connected:
                await asyncio.sleep(0.1)
        await holder_of_the_old.nats.flush()
    secret.write_text(PASSWORDS[REPLICA_USER])
    await nats_server.restart()
