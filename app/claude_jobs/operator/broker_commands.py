"""The broker's archive as commands of the operator's playbooks: an exit code and one sentence."""

import json
import sys

import nats.errors
import nats.js.errors

from claude_jobs.bus.snapshot import SnapshotError
from claude_jobs.operator.broker_archive import ArchiveError, Kept, back_up, restore
from claude_jobs.settings import BrokerSettings

# sysexits.h: EX_DATAERR, EX_UNAVAILABLE.
_WRONG_DATA, _AWAY = 65, 69
_BROKER_FAILED = (nats.errors.Error, nats.js.errors.Error, SnapshotError, TimeoutError, OSError)


async def write_archive(settings: BrokerSettings) -> int:
    """Write the archive to standard output, and what is in it to standard error."""
    try:
        kept = await back_up(settings, sys.stdout.buffer)
    except _BROKER_FAILED as error:
        sys.stderr.write(f"the broker was not backed up: {error!r}\n")
        return _AWAY
    sys.stderr.write(_shown(kept))
    return 0


async def read_archive(settings: BrokerSettings) -> int:
    """Make a store of the archive on standard input, and write what is in it to standard output."""
    try:
        kept = await restore(settings, sys.stdin.buffer)
    except ArchiveError as error:
        sys.stderr.write(f"the broker was not restored: {error}\n")
        return _WRONG_DATA
    except _BROKER_FAILED as error:
        sys.stderr.write(f"the broker was not restored: {error!r}\n")
        return _AWAY
    sys.stdout.write(_shown(kept))
    return 0


def _shown(kept: dict[str, Kept]) -> str:
    return json.dumps({name: vars(each) for name, each in kept.items()}) + "\n"
