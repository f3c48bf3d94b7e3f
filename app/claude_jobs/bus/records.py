"""Job records: what is known about each job, by its id."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable
from datetime import UTC, datetime, timedelta

from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.topology import RECORDS_BUCKET
from claude_jobs.contract.base import now
from claude_jobs.contract.job import JobRecord

# Records that are fetched at a time.
_BATCH = 50


class JobRecords:
    """The bucket of job records. The event log is the truth; a record sums it up.

    A key begins with the day that the job's id tells (UUIDv7): so the newest jobs are found
    without a look at the older ones.
    """

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self._bus = bus
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> "JobRecords":
        """Open the bucket; raises `nats.js.errors.NotFoundError` until a gateway made it."""
        return cls(bus, await bus.jetstream.key_value(RECORDS_BUCKET))

    async def put(self, record: JobRecord) -> None:
        """Store a record, in place of the one before."""
        await self._bucket.put(_key(record.id), record.to_json())

    async def add(self, record: JobRecord) -> None:
        """Store the record of a new job; one that is there stays as it is."""
        try:
            await self._bucket.create(_key(record.id), record.to_json())
        except KeyWrongLastSequenceError:
            return

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job's record, or None when it is not known (any more)."""
        if not is_job_id(job_id):
            return None
        try:
            entry = await self._bucket.get(_key(job_id))
        except KeyNotFoundError:
            return None
        return JobRecord.model_validate_json(entry.value or b"")

    async def get_all(self, job_ids: Iterable[str]) -> list[JobRecord]:
        """Return the records of these jobs, in their order; unknown ones are left out."""
        wanted = list(job_ids)
        found: list[JobRecord] = []
        for start in range(0, len(wanted), _BATCH):
            batch = await asyncio.gather(*map(self.get, wanted[start : start + _BATCH]))
            found += [record for record in batch if record is not None]
        return found

    async def ids(self, *, before: str | None, age: timedelta) -> AsyncGenerator[list[str]]:
        """Yield the ids of the jobs of the last `age`, the newest first, in batches.

        With `before`, only those that were accepted before that job.
        """
        day = now() + timedelta(days=1)  # clocks differ
        oldest = now() - age - timedelta(days=1)
        if before is not None:
            day = min(day, accepted_at(before))
        while day >= oldest:
            found = [each for each in await self._ids_of(day) if before is None or each < before]
            for start in range(0, len(found), _BATCH):
                yield found[start : start + _BATCH]
            day -= timedelta(days=1)

    async def _ids_of(self, day: datetime) -> list[str]:
        prefix = f"$KV.{RECORDS_BUCKET}.{_day(day)}."
        info = await self._bus.jetstream.stream_info(
            f"KV_{RECORDS_BUCKET}", subjects_filter=f"{prefix}*"
        )
        return sorted(
            (subject.removeprefix(prefix) for subject in info.state.subjects or {}), reverse=True
        )

    async def forget(self, job_id: str) -> None:
        """Remove the record of a job that was not accepted after all."""
        await self._bucket.purge(_key(job_id))


def is_job_id(text: str) -> bool:
    """Tell whether a text can be a job's id: a UUIDv7 in its usual form."""
    try:
        parsed = uuid.UUID(text)
        accepted_at(text)
    except (ValueError, OverflowError):
        return False
    return parsed.version == 7 and str(parsed) == text


def accepted_at(job_id: str) -> datetime:
    """Return the time (UTC) in a job's id: when it was accepted, to the millisecond."""
    milliseconds = uuid.UUID(job_id).int >> 80
    return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=milliseconds)


def _key(job_id: str) -> str:
    return f"{_day(accepted_at(job_id))}.{job_id}"


def _day(time: datetime) -> str:
    return time.strftime("%Y%m%d")
