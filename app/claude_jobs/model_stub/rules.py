"""What the demo model answers: pure functions from a request's body to an ``Answer``.

A prompt is a list of steps, one a line. Each answer plays the steps up to and including the next
tool call, so the number of tool results since the prompt says where the job stands and the
service needs no memory of its own.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

MAX_SECONDS = 3600
MAX_BYTES = 20_000_000
MAX_SHOWN_OUTPUT = 2000
"""Characters of one tool's output that the closing text repeats."""
MAX_SHOWN_PROMPT = 300
BASH_TIMEOUT_MS = 600_000
"""The longest that Claude Code's Bash tool lets a foreground command run."""
DEFAULT_CONTENT = "Hello from the demo model.\n"
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
"""HTTP status to the ``type`` of Anthropic's error body."""


@dataclass(frozen=True, slots=True)
class Say:
    """A text block, streamed piece by piece with ``delay`` seconds before each."""

    pieces: tuple[str, ...]
    delay: float = 0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Wait:
    """A pause of ``seconds``, with pings; ``None``: silence for ever."""

    seconds: int | None


@dataclass(frozen=True, slots=True)
class UseTool:
    """A tool call. ``forever``: asked for again after each result."""

    name: str
    input: dict[str, str | int]
    forever: bool = False
    retried: bool = False


@dataclass(frozen=True, slots=True)
class Fail:
    """An HTTP error instead of an answer. ``once``: only for the first such request."""

    status: int
    once: bool


Step = Say | Wait | UseTool | Fail


@dataclass(frozen=True, slots=True)
class Answer:
    """``steps`` make the message, unless ``failure`` applies."""

    steps: tuple[Say | Wait | UseTool, ...]
    failure: Fail | None = None

    @property
    def stop_reason(self) -> str:
        """Anthropic's name for why the message ends."""
        uses_tool = any(isinstance(step, UseTool) for step in self.steps)
        return "tool_use" if uses_tool else "end_turn"


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gave back, without what Claude Code wrote beside it."""

    text: str
    is_error: bool


@dataclass(slots=True)
class Turn:
    """What the user wrote, and the tool results that came back for it."""

    text: str
    results: list[ToolResult]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The user's side of a request. ``cwd`` is the agent's working directory, where known."""

    turns: list[Turn]
    cwd: str | None

    @classmethod
    def from_body(cls, body: dict[str, object]) -> "Conversation":
        """Read a Messages API body. Whatever has an unknown shape is passed over."""
        turns: list[Turn] = []
        reminders = _texts(body.get("system"))
        for message in _dicts(body.get("messages")):
            if message.get("role") == "system":
                reminders += _texts(message.get("content"))
            if message.get("role") != "user":
                continue
            for block in _blocks(message.get("content")):
                if block.get("type") == "tool_result" and turns:
                    output, _ = _split_reminders("\n".join(_texts(block.get("content"))))
                    turns[-1].results.append(ToolResult(output, block.get("is_error") is True))
                elif block.get("type") == "text":
                    human, inserted = _split_reminders(str(block.get("text")))
                    reminders += inserted
                    if human and not _NOT_A_NEW_PROMPT.match(human):
                        turns.append(Turn(human, []))
        found = [match[1].strip() for text in reminders for match in _CWD.finditer(text)]
        return cls(turns, found[-1] if found else None)

    def resolve(self, path: str) -> str:
        """Make a path absolute as Claude Code's file tools demand it."""
        return str(PurePosixPath(self.cwd or "", path))


def answer(body: dict[str, object]) -> Answer:
    """Decide on the last thing that the user wrote."""
    conversation = Conversation.from_body(body)
    if not conversation.turns:
        return Answer((_say("This is the demo model. There is nothing to answer."),))
    turn = conversation.turns[-1]
    queue, done = _after_results(_steps(turn.text, conversation), turn.results)

    steps: list[Say | Wait | UseTool] = []
    failure: Fail | None = None
    for step in queue:
        if isinstance(step, Fail):
            failure = failure or step
            steps.append(_say(f"The first request failed with {step.status}; this one did not."))
            continue
        steps.append(step)
        if isinstance(step, UseTool):
            break
    else:
        if done or not steps:
            steps.append(_say(_closing(done)))
    return Answer(tuple(steps), failure)


def _after_results(
    steps: Iterable[Step], results: Iterable[ToolResult]
) -> tuple[deque[Step], list[tuple[UseTool, ToolResult]]]:
    """Walk through what has happened: the steps still to do, and the calls done."""
    queue = deque(steps)
    done: list[tuple[UseTool, ToolResult]] = []
    for result in results:
        call = _pop_call(queue)
        if call is None:
            break
        if call.forever:
            queue.appendleft(call)
        elif call.name == "Write" and _READ_FIRST in result.text and not call.retried:
            # Claude Code overwrites only a file that the session has read.
            queue.appendleft(replace(call, retried=True))
            queue.appendleft(UseTool("Read", {"file_path": call.input["file_path"]}))
        else:
            done.append((call, result))
    return queue, done


def _pop_call(queue: deque[Step]) -> UseTool | None:
    while queue:
        step = queue.popleft()
        if isinstance(step, UseTool):
            return step
    return None


def _closing(done: list[tuple[UseTool, ToolResult]]) -> str:
    lines = [f"The demo model is done: {len(done)} tool call{'' if len(done) == 1 else 's'}."]
    for number, (call, result) in enumerate(done, start=1):
        subject = call.input.get("command") or call.input.get("file_path")
        outcome = " (failed)" if result.is_error else ""
        lines.append(f"\n{number}. {call.name} {subject}{outcome}")
        lines.append(_shortened(result.text, MAX_SHOWN_OUTPUT))
    return "\n".join(lines)


def _steps(text: str, conversation: Conversation) -> Iterator[Step]:
    matched = False
    for line in text.splitlines():
        for pattern, make in _RULES:
            if match := pattern.match(line):
                matched = True
                yield from make(match, conversation)
                break
    if not matched:
        gist = _shortened(" ".join(text.split()), MAX_SHOWN_PROMPT)
        yield _say(f"You said: {gist}\n\nThis is the demo model: it answers by simple rules.")


def _create_file(match: re.Match[str], conversation: Conversation) -> list[Step]:
    path = conversation.resolve(_unquoted(match["path"].rstrip(".,;:!?")))
    content = match["content"]
    content = DEFAULT_CONTENT if content is None else _unquoted(content).replace("\\n", "\n")
    return [UseTool("Write", {"file_path": path, "content": content})]


def _read_file(match: re.Match[str], conversation: Conversation) -> list[Step]:
    path = conversation.resolve(_unquoted(match["path"].rstrip(".,;:!?")))
    return [UseTool("Read", {"file_path": path})]


def _run(match: re.Match[str], _: Conversation) -> list[Step]:
    command = match["command"].strip()
    if command[0] == command[-1] == "`" and len(command) > 2:
        command = command[1:-1]
    if command.startswith("sleep "):
        command = f"true; {command}"  # Claude Code's Bash tool blocks a long leading sleep
    return [_bash(command)]


def _work_forever(*_: object) -> list[Step]:
    return [_bash("sleep 1", forever=True)]


def _wait(match: re.Match[str], _: Conversation) -> list[Step]:
    seconds = min(int(match["n"]), MAX_SECONDS)
    return [Wait(seconds), _say(f"The demo model waited {seconds} seconds.")]


def _stall(*_: object) -> list[Step]:
    return [Wait(None)]


def _count(match: re.Match[str], _: Conversation) -> list[Step]:
    numbers = range(1, min(int(match["n"]), MAX_SECONDS) + 1)
    return [Say(tuple(f"{number}\n" for number in numbers), delay=1)]


def _fail(match: re.Match[str], _: Conversation) -> list[Step]:
    return [Fail(int(match["status"]), once=match["once"] is not None)]


def _say_bytes(match: re.Match[str], _: Conversation) -> list[Step]:
    piece = "demo model 0123\n" * 4096
    whole, rest = divmod(min(int(match["n"]), MAX_BYTES), len(piece))
    return [Say((piece,) * whole + ((piece[:rest],) if rest else ()))]


def _remember(match: re.Match[str], _: Conversation) -> list[Step]:
    return [_say(f"The demo model remembers: {_shortened(match['what'], MAX_SHOWN_PROMPT)}")]


def _recall(_: re.Match[str], conversation: Conversation) -> list[Step]:
    earlier = [_shortened(turn.text, MAX_SHOWN_PROMPT) for turn in conversation.turns[:-1]]
    if not earlier:
        return [_say("You said nothing before; this is the start of the conversation.")]
    return [_say("\n".join(["Before, you said:", *(f"- {text}" for text in earlier)]))]


def _rule(pattern: str) -> re.Pattern[str]:
    return re.compile(r"\s*(?:please\s+)?" + pattern, re.IGNORECASE)


_QUOTED = r"\"[^\"]+\"|'[^']+'|`[^`]+`"
_RULES: list[tuple[re.Pattern[str], Callable[[re.Match[str], Conversation], list[Step]]]] = [
    (
        _rule(
            rf"create (?:(?:a|the) )?(?:new )?file (?:(?:called|named) )?(?P<path>{_QUOTED}|\S+)"
            r"(?: (?:containing|with(?: the)?(?: contents?| text)?)(?:: ?| )(?P<content>.*))?"
        ),
        _create_file,
    ),
    (_rule(rf"read (?:the )?file (?P<path>{_QUOTED}|\S+)"), _read_file),
    (_rule(r"run(?::\s*|\s+)(?P<command>\S.*)"), _run),
    (_rule(r"work forever\b"), _work_forever),
    (_rule(r"wait (?P<n>[0-9]{1,9}) seconds?\b"), _wait),
    (_rule(r"stall\b"), _stall),
    (_rule(r"count to (?P<n>[0-9]{1,9}) slowly\b"), _count),
    (_rule(rf"fail (?P<once>once )?with (?P<status>{'|'.join(map(str, ERROR_TYPES))})\b"), _fail),
    (_rule(r"say (?P<n>[0-9]{1,9}) bytes?\b"), _say_bytes),
    (_rule(r"remember\s+(?P<what>\S.*)"), _remember),
    (_rule(r"what did i (?:just )?say\b"), _recall),
]
_NOT_A_NEW_PROMPT = re.compile(
    # The second is what Claude Code writes into a session that was cut off.
    r"\s*(?:please\s+)?continue\b|\[Request interrupted by user",
    re.IGNORECASE,
)
"""Texts after which the steps of the prompt before go on where they stopped."""
_CWD = re.compile(r"^[ \t-]*(?:primary )?working directory: (.+)$", re.IGNORECASE | re.MULTILINE)
_READ_FIRST = "has not been read yet"


def _say(text: str) -> Say:
    return Say(tuple(text[start : start + 24] for start in range(0, len(text), 24)))


def _bash(command: str, *, forever: bool = False) -> UseTool:
    arguments: dict[str, str | int] = {
        "command": command,
        "timeout": BASH_TIMEOUT_MS,
        "description": "Run the command of the prompt",
    }
    return UseTool("Bash", arguments, forever)


def _unquoted(text: str) -> str:
    return text[1:-1] if re.fullmatch(_QUOTED, text) else text


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _dicts(value: object) -> list[dict[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _blocks(content: object) -> list[dict[str, object]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return _dicts(content)


def _texts(content: object) -> list[str]:
    return [str(block["text"]) for block in _blocks(content) if "text" in block]


def _split_reminders(text: str) -> tuple[str, list[str]]:
    """Part what the user (or a tool) wrote from Claude Code's ``<system-reminder>`` blocks."""
    head, *tails = text.split("<system-reminder>")
    parts = [tail.partition("</system-reminder>") for tail in tails]
    return "".join([head, *(after for _, _, after in parts)]).strip(), [tag for tag, _, _ in parts]
