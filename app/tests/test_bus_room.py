"""The broker has room for what the gateway asks it to keep, whatever a deployment sets."""

from datetime import timedelta
from pathlib import Path

import pytest
from bus_ends import Ends
from nats_server import NatsServer

from claude_jobs.bus.topology import GIB, RECORDS_BUCKET, Bounds, ensure_topology

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(30)]


@pytest.mark.parametrize(("events", "sessions"), [(4 * GIB, 2 * GIB), (40 * GIB, 20 * GIB)])
async def test_every_stream_fits_when_broker_and_gateway_have_the_same_settings(
    tmp_path: Path, events: int, sessions: int
) -> None:
    server = NatsServer(
        tmp_path / "nats", settings={"EVENT_BYTES": str(events), "SESSION_BYTES": str(sessions)}
    )
    await server.start()
    try:
        bounds = Bounds(event_bytes=events, session_bytes=sessions)
        async with server.both_ends(bounds) as (gateway, _):
            made = await gateway.jetstream.streams_info()
            reserved = sum(max(stream.config.max_bytes or 0, 0) for stream in made)
            assert reserved == GIB + events + sessions
    finally:
        await server.stop()


@pytest.mark.parametrize("hours", [1, 1000])
async def test_what_is_kept_already_follows_a_changed_age(ends: Ends, hours: int) -> None:
    records = await ends.gateway.jetstream.key_value(RECORDS_BUCKET)
    await records.put("20260101.a", b"a record")
    await ensure_topology(ends.gateway, Bounds(event_age=timedelta(hours=hours)))
    assert (await records.status()).ttl == hours * 3600
    entry = await records.get("20260101.a")
    assert entry.value == b"a record"
