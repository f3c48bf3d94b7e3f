"""A job: what a client asks for, what waits in the queue, and what is known about it."""

import json
from datetime import datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Self
from uuid import UUID

import uuid_utils
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from claude_jobs.contract.base import Document, now
from claude_jobs.contract.event import Completed, FailureCode, TerminalEvent

_MAX_NAME_BYTES = 255  # of a file or directory, on Linux
MAX_METADATA_BYTES = 16_384
# Parsers of JSON give up at some depth, and a job nests what a request holds.
MAX_METADATA_DEPTH = 32


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"  # accepted, waits for a replica
    RUNNING = "running"  # a replica has started its agent
    COMPLETED = "completed"  # ended with a result
    FAILED = "failed"  # ended with an error
    CANCELLED = "cancelled"  # ended by request


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})


class PermissionMode(StrEnum):
    """Claude Code's permission modes (`claude --help`)."""

    ACCEPT_EDITS = "acceptEdits"
    AUTO = "auto"
    BYPASS = "bypassPermissions"
    DEFAULT = "default"
    DONT_ASK = "dontAsk"
    PLAN = "plan"


def _has_text(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("must not be empty")
    return prompt


def _lies_below(path: str) -> str:
    """Refuse what leaves the workspace by its very words; links are resolved where it is used."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ValueError("must be a relative path inside the workspace, without '..'")
    if any(len(part.encode()) > _MAX_NAME_BYTES for part in parts.parts):
        raise ValueError(f"must not have a part of over {_MAX_NAME_BYTES} bytes")
    return str(parts)


def _fits(metadata: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(metadata)) > MAX_METADATA_BYTES:
        raise ValueError(f"must not exceed {MAX_METADATA_BYTES} bytes of JSON")
    if _depth(metadata) > MAX_METADATA_DEPTH:
        raise ValueError(f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
    return metadata


def _depth(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return 1 + max((_depth(part) for part in value), default=0)


ToolRule = Annotated[
    str,
    # The rule travels as a command-line value: it must not look like an option.
    Field(max_length=500, pattern=r"^[A-Za-z][^\x00-\x1f]*$"),
]


def _whole(number: object) -> object:
    """Take 3.0 for 3: to JSON they are the same number."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


_Whole = BeforeValidator(_whole)


class JobRequest(Document):
    """The body of `POST /api/execute`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, AfterValidator(_has_text), Field(max_length=1_000_000)]
    workspace: Annotated[str, AfterValidator(_lies_below), Field(max_length=1024)] = "."
    resume_session_id: Annotated[UUID, Field(strict=False)] | None = None
    model: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][\w.:/@\[\]-]*$")] | None = (
        None
    )
    max_turns: Annotated[int, Field(ge=1, le=10_000), _Whole] | None = None
    timeout_seconds: Annotated[int, Field(ge=1, le=604_800), _Whole] | None = None
    permission_mode: Annotated[PermissionMode, Field(strict=False)] | None = None
    # Not set: permissions are skipped unless `permission_mode` says otherwise.
    dangerously_skip_permissions: bool | None = None
    allowed_tools: Annotated[list[ToolRule], Field(max_length=200)] | None = None
    disallowed_tools: Annotated[list[ToolRule], Field(max_length=200)] | None = None
    append_system_prompt: Annotated[str, Field(max_length=32_000, pattern=r"^[^\x00]*$")] | None = (
        None
    )
    metadata: Annotated[dict[str, Any], AfterValidator(_fits)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_permission_mode(self) -> Self:
        skip, mode = self.dangerously_skip_permissions, self.permission_mode
        if None not in (skip, mode) and skip is not (mode is PermissionMode.BYPASS):
            raise ValueError(
                "dangerouslySkipPermissions and permissionMode contradict each other: give one"
            )
        return self

    @property
    def effective_permission_mode(self) -> PermissionMode:
        """The mode that Claude Code is started in."""
        if self.permission_mode is not None:
            return self.permission_mode
        if self.dangerously_skip_permissions is False:
            return PermissionMode.DEFAULT
        return PermissionMode.BYPASS


def new_job_id() -> str:
    """Return a UUIDv7: it holds the time, so that ids sort by it."""
    return str(uuid_utils.uuid7())


class Job(Document):
    """An accepted request as it waits in the queue.

    `client` is the name of the token, `max_running` the most jobs of that token that may run at
    a time, `workspace` the directory below the shared workspace that the agent works in.
    """

    id: str
    request: JobRequest
    client: str
    workspace: str
    created_at: datetime
    max_running: int | None = None

    @classmethod
    def accept(
        cls,
        request: JobRequest,
        *,
        client: str,
        workspace: str | None = None,
        max_running: int | None = None,
        job_id: str | None = None,
    ) -> Self:
        """Give a request its identity: a UUIDv7, so that ids sort by time of acceptance."""
        return cls(
            id=job_id or new_job_id(),
            request=request,
            client=client,
            workspace=request.workspace if workspace is None else workspace,
            created_at=now(),
            max_running=max_running,
        )


class JobRecord(Document):
    """What is known about a job; `GET /api/jobs/{id}` shows it."""

    id: str
    status: JobStatus
    prompt: str
    workspace: str
    client: str
    created_at: datetime
    attempt: int = 0
    session_id: str | None = None
    replica: str | None = None
    node: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    result: str | None = None
    error: str | None = None
    error_code: str | None = None
    usage: dict[str, Any] | None = None
    cost_usd: float | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def queued(cls, job: Job) -> Self:
        """Return the record of a job that has just been accepted."""
        return cls(
            id=job.id,
            status=JobStatus.QUEUED,
            prompt=job.request.prompt,
            workspace=job.workspace,
            client=job.client,
            created_at=job.created_at,
            metadata=job.request.metadata,
        )

    def ended(self, ending: TerminalEvent) -> Self:
        """Return the record as the job's terminal event leaves it."""
        changes: dict[str, Any] = {"ended_at": now()}
        if isinstance(ending, Completed):
            changes |= {
                "status": JobStatus.COMPLETED,
                "session_id": ending.session_id,
                "result": ending.result,
                "usage": ending.usage,
                "cost_usd": ending.cost_usd,
            }
        else:
            cancelled = ending.code is FailureCode.CANCELLED
            changes |= {
                "status": JobStatus.CANCELLED if cancelled else JobStatus.FAILED,
                "error": ending.error,
                "error_code": ending.code,
            }
        return self.model_copy(update=changes)
