"""What a server that does not run has on its disk."""

from pathlib import Path

# nats-server keeps everything below this name in its `store_dir`.
STORE_NAME = "jetstream"
# The account that all our users are in.
_ACCOUNT = "$G"


def streams_in(directory: Path) -> set[str]:
    """Return the names of the streams in a server's `store_dir`; none where there is no store."""
    streams = directory / STORE_NAME / _ACCOUNT / "streams"
    if not streams.is_dir():
        return set()
    return {entry.name for entry in streams.iterdir() if entry.is_dir()}
