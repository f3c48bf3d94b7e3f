"""What a client gets to see of a job: its events as they came, and its result."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from claude_jobs.contract.base import Document
from claude_jobs.contract.event import (
    Completed,
    Connected,
    Failed,
    Gap,
    LinePart,
    Message,
    Queued,
    Recovering,
)

_KNOWN: dict[str, type[Document]] = {
    "queued": Queued,
    "connected": Connected,
    "message": Message,
    "recovering": Recovering,
    "completed": Completed,
    "error": Failed,
    "gap": Gap,
}


@dataclass(frozen=True)
class JobEvent:
    """One event of a job. Types and fields that this client does not know are kept in `data`.

    `id` is None for what is not in the log (a change of position, a gap). A caller that wants to
    go on later keeps the last `id` that is not None.
    """

    id: int | None
    type: str
    data: dict[str, Any]

    @property
    def is_terminal(self) -> bool:
        """Tell whether nothing follows."""
        return self.type in {"completed", "error"}

    @property
    def content(self) -> dict[str, Any]:
        """The line of Claude Code in a `message`; empty for other types."""
        content = self.data.get("content")
        return content if self.type == "message" and isinstance(content, dict) else {}

    @property
    def text(self) -> str:
        """What the agent says in a `message`: the text blocks of an `assistant` line."""
        if self.content.get("type") != "assistant":
            return ""
        return "\n\n".join(
            str(block["text"]) for block in self.blocks if block.get("type") == "text"
        )

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The content blocks of an `assistant` or `user` line."""
        message = self.content.get("message")
        blocks = message.get("content") if isinstance(message, dict) else None
        if isinstance(blocks, str):
            return [{"type": "text", "text": blocks}]
        return [each for each in blocks or [] if isinstance(each, dict)]

    def parsed(self) -> Document | None:
        """Return the event as a model of `contract.event`, or None where it is of a later form."""
        known = _KNOWN.get(self.type)
        try:
            return known.model_validate(self.data) if known else None
        except ValidationError:
            return None


class JobResult(Document):
    """How a job ended well. `duration_ms` is in milliseconds, `cost_usd` in US dollars.

    What a server does not say has its default: only the job's record is left of an old job.
    """

    result: str
    session_id: str | None = None
    usage: dict[str, Any] = Field(default_factory=dict)
    cost_usd: float | None = None
    num_turns: int | None = None
    duration_ms: int | None = None
    permission_denials: list[Any] = Field(default_factory=list)


_line: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass
class LineJoiner:
    """Makes one `message` of the parts that a very long line came in.

    Its id is that of the last part. Parts that do not make a line (the first ones are missing,
    or their writer died) are passed on as they came.
    """

    _held: list[JobEvent] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)

    def feed(self, event: JobEvent) -> Iterator[JobEvent]:
        """Take the next event and yield those that are whole."""
        if event.id is None and event.type != "gap":  # stands beside the log
            yield event
            return
        part = _part(event)
        if self._held and (part is None or part.index != len(self._held)):
            yield from self._held
            self._clear()
        if part is None or part.index != len(self._held):
            yield event
            return
        self._held.append(event)
        self._texts.append(part.text)
        if len(self._held) == part.count:
            yield from self._joined()
            self._clear()

    def _joined(self) -> Iterator[JobEvent]:
        last = self._held[-1]
        try:
            content = _line.validate_json("".join(self._texts))
        except ValidationError:
            yield from self._held
        else:
            yield JobEvent(last.id, last.type, {**last.data, "content": content})

    def _clear(self) -> None:
        self._held, self._texts = [], []


def _part(event: JobEvent) -> LinePart | None:
    if event.content.get("type") != "line_part":
        return None
    try:
        return LinePart.model_validate(event.content)
    except ValidationError:
        return None
