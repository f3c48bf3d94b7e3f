"""A place at which a stream is read: one of the broker's servers keeps it for the reader."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_Place = TypeVar("_Place")

# How long (seconds) a server may take to make a place, and how many are asked.
_TIMEOUT = 2.0
_TRIES = 3


async def take_place(make: Callable[[], Awaitable[_Place]]) -> _Place:
    """Take a place to read at, which `make` asks for.

    For some minutes after a server was lost, the others still give it places to keep: such a
    place is never made, and the next one may be given to a server that is there. Raises
    `TimeoutError` when none was made.
    """
    for _ in range(_TRIES - 1):
        try:
            async with asyncio.timeout(_TIMEOUT):
                return await make()
        except TimeoutError:
            continue
    async with asyncio.timeout(_TIMEOUT):
        return await make()
