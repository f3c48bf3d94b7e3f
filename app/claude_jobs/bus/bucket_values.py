"""All that a bucket holds at a moment."""

import asyncio

from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError

# How long (seconds) the broker may take, and how many keys are asked for at once.
_TIMEOUT = 10.0
_AT_ONCE = 64


async def bucket_values(jetstream: JetStreamContext, bucket: str) -> list[bytes]:
    """Return the value of each key, the least recently written first.

    Key by key, because a watcher does not show a bucket that is written to meanwhile as it is:
    what changes on the way comes twice or not at all, and nats-py's calls a full one empty when
    the broker was quick. Raises `TimeoutError` when the broker does not say all of it in time.
    """
    stream = f"KV_{bucket}"
    some = asyncio.Semaphore(_AT_ONCE)

    async def last(subject: str) -> RawStreamMsg | None:
        try:
            async with some:
                return await jetstream.get_last_msg(stream, subject)
        except NotFoundError:
            return None

    async with asyncio.timeout(_TIMEOUT):
        info = await jetstream.stream_info(stream, subjects_filter=">")
        found = await asyncio.gather(*map(last, info.state.subjects or {}))
    # A key that was removed leaves a message which says so, without a value.
    messages = [message for message in found if message and message.data]
    return [message.data or b"" for message in sorted(messages, key=lambda each: each.seq or 0)]
