"""The events of a job: `queued`, then what happens, then exactly one terminal event."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from claude_jobs.contract.base import Document


class FailureCode(StrEnum):
    """Why a job ended with `error`."""

    AGENT_ERROR = "agent_error"  # Claude Code ended without a good result
    CREDENTIALS = "credentials"  # the model's service refused the credentials
    TIMEOUT = "timeout"  # the total time or the silence limit was reached
    CANCELLED = "cancelled"  # somebody asked for it
    WORKER_LOST = "worker_lost"  # the replica vanished while its agent ran
    INTERNAL = "internal"  # a fault of ours; the log of the replica has the details


class Queued(Document):
    """The job was accepted; `position` 1 is the next to be taken."""

    type: Literal["queued"] = "queued"
    job_id: str
    position: int


class Connected(Document):
    """A replica starts the agent. Once this is logged, the job may have had effects."""

    type: Literal["connected"] = "connected"
    job_id: str
    session_id: str
    replica: str
    node: str
    attempt: int
    resuming: bool = False
    resumed_from: str | None = None


class Recovering(Document):
    """The job was interrupted and goes on, here or on another replica, as attempt `attempt`."""

    type: Literal["recovering"] = "recovering"
    attempt: int
    reason: str


class Message(Document):
    """One line of Claude Code, untouched.

    A line that the broker cannot take in one piece comes as several of these; the `content` of
    each is then a `LinePart`.
    """

    type: Literal["message"] = "message"
    content: dict[str, Any]
    timestamp: datetime


class LinePart(Document):
    """A piece of a very long line: the `text` of all `count` parts, joined, is the line's JSON.

    `index` counts from 0; the parts of a line follow each other.
    """

    type: Literal["line_part"] = "line_part"
    index: int
    count: int
    text: str


class Completed(Document):
    """The job ended well. Durations are in milliseconds."""

    type: Literal["completed"] = "completed"
    result: str
    session_id: str
    usage: dict[str, Any]
    cost_usd: float
    num_turns: int
    duration_ms: int
    permission_denials: list[Any]


class Failed(Document):
    """The job ended otherwise."""

    type: Literal["error"] = "error"
    code: FailureCode
    error: str
    session_id: str | None = None


class Gap(Document):
    """The log no longer holds the events `from` to `to` (ids). Never logged: a reader is told."""

    type: Literal["gap"] = "gap"
    from_: int = Field(alias="from")
    to: int


TerminalEvent = Completed | Failed
Event = Queued | Connected | Recovering | Message | Completed | Failed

_adapter: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(data: bytes) -> Event:
    """Read an event from the JSON of the log; raises `pydantic.ValidationError`."""
    return _adapter.validate_json(data)


def is_terminal(event: object) -> bool:
    """Tell whether nothing can follow this event."""
    return isinstance(event, Completed | Failed)
