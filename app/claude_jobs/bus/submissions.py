"""Submissions by `Idempotency-Key`: the same key of the same client is the same job."""

import hashlib

from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.topology import SUBMISSIONS_BUCKET
from claude_jobs.contract.base import Document


class Submission(Document):
    """What a key stands for: the job, and a digest of the request that made it."""

    job_id: str
    request_digest: str


class Submissions:
    """The bucket of submissions. One is remembered for `Bounds.submission_age`."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> "Submissions":
        """Open the bucket; raises `nats.js.errors.NotFoundError` until a gateway made it."""
        return cls(await bus.jetstream.key_value(SUBMISSIONS_BUCKET))

    async def claim(self, client: str, key: str, submission: Submission) -> Submission:
        """Remember a submission under a key; returns the first one that was, perhaps another's."""
        while True:
            try:
                await self._bucket.create(_name(client, key), submission.to_json())
            except KeyWrongLastSequenceError:
                try:
                    entry = await self._bucket.get(_name(client, key))
                except KeyNotFoundError:
                    continue  # it was forgotten in this very moment
                return Submission.model_validate_json(entry.value or b"")
            return submission

    async def forget(self, client: str, key: str) -> None:
        """Forget a submission that was refused, so that the client may try again."""
        await self._bucket.delete(_name(client, key))


def _name(client: str, key: str) -> str:
    """Return the bucket's key: any text of a client becomes a fixed set of characters."""
    return hashlib.sha256(f"{client}\0{key}".encode()).hexdigest()
