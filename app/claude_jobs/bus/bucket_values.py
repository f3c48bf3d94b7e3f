"""All that a bucket holds at a moment."""

from functools import partial

from nats.js.errors import NoKeysError
from nats.js.kv import KeyValue

from claude_jobs.bus.places import take_place


async def bucket_values(bucket: KeyValue) -> list[bytes]:
    """Return the value of each key, the least recently written first."""
    values: list[bytes] = []
    watcher = await take_place(partial(bucket.watchall, ignore_deletes=True))
    try:
        async for entry in watcher:
            # None marks the end of what the bucket holds; news would follow.
            if entry is None:
                break
            values.append(entry.value or b"")
    except NoKeysError:
        pass
    finally:
        await watcher.stop()  # type: ignore[no-untyped-call] # nats-py
    return values
