"""A client of the API, for programs (`Client`) and for the command line (`claude-jobs`).

Needs httpx, httpx-sse and the contract; nothing of the gateway or the replicas is loaded.
"""

from claude_jobs.client.client import Client, Job
from claude_jobs.client.errors import (
    ApiError,
    ClientError,
    JobFailedError,
    UnreachableError,
)
from claude_jobs.client.files import Files
from claude_jobs.client.job_event import JobEvent, JobResult

__all__ = [
    "ApiError",
    "Client",
    "ClientError",
    "Files",
    "Job",
    "JobEvent",
    "JobFailedError",
    "JobResult",
    "UnreachableError",
]
