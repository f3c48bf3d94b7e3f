"""Job records: what is known about each job, by its id."""

from nats.js.errors import KeyNotFoundError
from nats.js.kv import KeyValue

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.topology import RECORDS_BUCKET
from claude_jobs.contract.job import JobRecord


class JobRecords:
    """The bucket of job records. The event log is the truth; a record sums it up."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> "JobRecords":
        """Open the bucket; raises `nats.js.errors.NotFoundError` until a gateway made it."""
        return cls(await bus.jetstream.key_value(RECORDS_BUCKET))

    async def put(self, record: JobRecord) -> None:
        """Store a record, in place of the one before."""
        await self._bucket.put(record.id, record.to_json())

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job's record, or None when it is not known (any more)."""
        try:
            entry = await self._bucket.get(job_id)
        except KeyNotFoundError:
            return None
        return JobRecord.model_validate_json(entry.value or b"")

    async def forget(self, job_id: str) -> None:
        """Remove the record of a job that was not accepted after all."""
        await self._bucket.purge(job_id)
