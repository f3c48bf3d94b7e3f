"""A connection to the broker ends when it is told to, whatever it is at."""

import asyncio

import pytest

from claude_jobs.bus.connection import connect
from claude_jobs.development import free_port

pytestmark = pytest.mark.asyncio

# About one in seventy is cancelled at the very moment in which a try fails.
_AT_ONCE = 500


async def test_a_broker_that_is_away_is_waited_for_no_longer_than_told() -> None:
    url = f"nats://127.0.0.1:{free_port()}"

    async def wait(seconds: float) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                async with connect(url, user="gateway", password="none", name="test"):
                    pass

    waits = [asyncio.create_task(wait(0.4 + 0.4 * n / _AT_ONCE)) for n in range(_AT_ONCE)]
    ended, going_on = await asyncio.wait(waits, timeout=15)
    for each in going_on:
        each.cancel()
    assert not going_on
    for each in ended:
        each.result()
