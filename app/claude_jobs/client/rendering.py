"""Shows a job to a person: live in a terminal, or as plain lines; to a program: as JSON lines."""

import json
import sys
from collections.abc import Iterator
from time import monotonic
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from claude_jobs.client.clean_text import clean, clean_line
from claude_jobs.client.job_event import JobEvent

# What of a tool's input says best what it does, the first that is there.
_SUBJECTS = ("command", "file_path", "path", "pattern", "url", "query", "description", "prompt")
_LONGEST_SUBJECT = 160


class View(Protocol):
    """Where a job's events are shown."""

    def event(self, event: JobEvent) -> None:
        """Show an event."""

    def note(self, text: str) -> None:
        """Show something that the client itself has to say."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class JsonView:
    """Each event as a line of JSON on standard output; ASCII only, so nothing needs cleaning."""

    def event(self, event: JobEvent) -> None:
        """Print the event with its id."""
        say(json.dumps({"id": event.id, "event": event.type, "data": event.data}))

    def note(self, text: str) -> None:
        """Print to standard error."""
        tell(text)

    def close(self) -> None:
        """Nothing is held."""


class PlainView:
    """What the agent says on standard output; progress on standard error.

    `quiet` leaves the progress away, and prints the result alone.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._said = ""

    def event(self, event: JobEvent) -> None:
        """Print what is new."""
        if event.text and not self._quiet and not event.content.get("parent_tool_use_id"):
            self._said = event.text
            say(event.text)
        if event.type == "completed":
            result = str(event.data.get("result", ""))
            # The result repeats the last thing that was said.
            if result.strip() and result.strip() != self._said.strip():
                say(result)
        if not self._quiet or event.type == "error":
            for line in progress(event):
                tell(line)

    def note(self, text: str) -> None:
        """Print to standard error."""
        tell(text)

    def close(self) -> None:
        """Nothing is held."""


class LiveView:
    """A terminal: messages as Markdown, tools as one line each, below them where the job stands."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, emoji=False, markup=False)
        self._state = "submitting"
        self._began = monotonic()
        self._said = ""
        self._spinner = Spinner("dots")
        self._live = Live(
            get_renderable=self._footer,
            console=self._console,
            transient=True,
            refresh_per_second=8,
        )
        self._live.start()

    def event(self, event: JobEvent) -> None:
        """Show the event above the footer."""
        match event.type:
            case "queued":
                self._state = _queued(event.data)
            case "connected":
                self._began = monotonic()
                self._state = f"running on {_place(event.data)}"
                self._print(Text("\n".join(progress(event)), style="dim"))
            case "message":
                self._message(event)
            case "completed":
                result = str(event.data.get("result", ""))
                if result.strip() != self._said.strip():
                    self._markdown(result)
                self._print(Text("\n".join(progress(event)), style="green"))
            case "error":
                self._print(Text("\n".join(progress(event)), style="red"))
            case _:
                self._print(Text("\n".join(progress(event)), style="yellow"))

    def note(self, text: str) -> None:
        """Show a line of the client's own."""
        self._print(Text(clean(text), style="yellow"))

    def close(self) -> None:
        """Remove the footer."""
        self._live.stop()

    def _message(self, event: JobEvent) -> None:
        indent = "  " if event.content.get("parent_tool_use_id") else ""
        for block in event.blocks:
            match block.get("type"):
                case "text" if event.text:
                    self._said = str(block.get("text"))
                    self._markdown(self._said)
                case "tool_use":
                    self._print(Text(f"{indent}● {tool_line(block)}", style="cyan"))
                case "tool_result" if block.get("is_error"):
                    said = clean_line(_texts(block.get("content")), _LONGEST_SUBJECT)
                    self._print(Text(f"{indent}  ✗ {said}", style="red"))

    def _markdown(self, text: str) -> None:
        # A link shows where it leads: what a terminal would hide behind other words it must not.
        self._print(Markdown(clean(text), hyperlinks=False))

    def _print(self, renderable: RenderableType) -> None:
        self._console.print(_Harmless(renderable))

    def _footer(self) -> RenderableType:
        seconds = monotonic() - self._began
        self._spinner.update(text=Text(f"{self._state}  {duration(seconds)}", style="dim"))
        return self._spinner


class _Harmless:
    """Cleans what a renderable makes of its text: Markdown can spell characters out."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            if segment.control:
                continue
            yield Segment(clean(segment.text), segment.style)


def progress(event: JobEvent) -> Iterator[str]:
    """Say in lines for a person what an event means; nothing where its message says it."""
    data = event.data
    match event.type:
        case "queued":
            yield _queued(data)
        case "connected":
            resumed = ", resuming the session" if data.get("resuming") else ""
            yield f"running on {_place(data)}{resumed}"
        case "message":
            for block in event.blocks:
                if block.get("type") == "tool_use":
                    yield tool_line(block)
        case "recovering":
            yield f"interrupted: {_said(data, 'reason')}; attempt {_said(data, 'attempt')} follows"
        case "gap":
            yield f"the events {_said(data, 'from')} to {_said(data, 'to')} are no longer kept"
        case "completed":
            yield f"completed: {_sum(data)}"
        case "error":
            yield f"{_said(data, 'code')}: {_said(data, 'error')}"
            if data.get("sessionId"):
                yield f"its session: {_said(data, 'sessionId')}"


def tool_line(block: dict[str, Any]) -> str:
    """Describe a use of a tool on one line."""
    name = clean_line(str(block.get("name", "tool")), 60)
    asked = block.get("input")
    if not isinstance(asked, dict):
        return name
    texts = [asked[key] for key in _SUBJECTS if isinstance(asked.get(key), str)]
    texts += [value for value in asked.values() if isinstance(value, str)]
    return f"{name}  {clean_line(texts[0], _LONGEST_SUBJECT)}" if texts else name


def duration(seconds: float) -> str:
    """Write a duration as a person would: 0:07, 12:00, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _queued(data: dict[str, Any]) -> str:
    return f"queued at position {_said(data, 'position')}"


def _place(data: dict[str, Any]) -> str:
    attempt = data.get("attempt")
    again = f", attempt {attempt}" if isinstance(attempt, int) and attempt > 1 else ""
    return f"{_said(data, 'replica')} (node {_said(data, 'node')}{again})"


def _sum(data: dict[str, Any]) -> str:
    parts = []
    if isinstance(milliseconds := data.get("durationMs"), int):
        parts.append(duration(milliseconds / 1000))
    if isinstance(turns := data.get("numTurns"), int):
        parts.append(f"{turns} turn{'' if turns == 1 else 's'}")
    if isinstance(cost := data.get("costUsd"), int | float):
        parts.append(f"${cost:.4f}")
    if denials := data.get("permissionDenials"):
        parts.append(f"{len(denials)} tool uses were denied")
    parts.append(f"session {_said(data, 'sessionId')}")
    return ", ".join(parts)


def _said(data: dict[str, Any], name: str) -> str:
    return clean_line(str(data.get(name, "?")))


def _texts(content: object) -> str:
    if isinstance(content, list):
        return " ".join(str(each.get("text", "")) for each in content if isinstance(each, dict))
    return str(content)


def say(text: str) -> None:
    """Write lines to standard output, at once."""
    sys.stdout.write(clean(text) + "\n")
    sys.stdout.flush()


def tell(text: str) -> None:
    """Write lines to standard error: what is not the output itself."""
    sys.stderr.write(clean(text) + "\n")
    sys.stderr.flush()


def job_view(*, as_json: bool, quiet: bool) -> View:
    """Choose how a job is shown: live only where somebody looks on."""
    if as_json:
        return JsonView()
    if quiet or not sys.stdout.isatty():
        return PlainView(quiet=quiet)
    return LiveView()
