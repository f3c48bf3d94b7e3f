"""A session: the conversation that a job had with the model, which later jobs can go on with."""

from datetime import datetime

from claude_jobs.contract.base import Document


class Session(Document):
    """What is known about a session; `GET /api/sessions/{id}` shows it.

    `last_job_id` is the job that used it last. While that job has not ended, no other may.
    `workspace` is where it began, below the shared workspace.
    """

    id: str
    last_job_id: str
    client: str
    workspace: str
    created_at: datetime
    updated_at: datetime
