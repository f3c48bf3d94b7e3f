"""Lines of Claude Code as `message` events: each whole, or in parts when it is very long."""

import json
from typing import Any

from claude_jobs.contract.base import now
from claude_jobs.contract.event import LinePart, Message

# The broker takes messages of 8 MiB (`broker.MAX_PAYLOAD_BYTES`); the rest of an event is small.
MAX_EVENT_BYTES = 7 * 2**20
# A character of a part takes at most 6 bytes: as UTF-8 up to 4, escaped (`\u0000`) 6.
_PART_CHARACTERS = MAX_EVENT_BYTES // 7

Line = dict[str, Any]


def messages(line: Line) -> list[Message]:
    """Return the events that carry a line: one, or as many parts as it takes."""
    whole = Message(content=line, timestamp=now())
    if len(whole.to_json()) <= MAX_EVENT_BYTES:
        return [whole]
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    pieces = [text[at : at + _PART_CHARACTERS] for at in range(0, len(text), _PART_CHARACTERS)]
    return [
        Message(
            content=LinePart(index=index, count=len(pieces), text=piece).model_dump(),
            timestamp=whole.timestamp,
        )
        for index, piece in enumerate(pieces)
    ]
