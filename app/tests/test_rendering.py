"""What a person gets to see of a job, and what of an agent's text never reaches a terminal."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from claude_jobs.client.clean_text import clean, clean_line
from claude_jobs.client.command_line import main
from claude_jobs.client.job_event import JobEvent
from claude_jobs.client.rendering import JsonView, LiveView, PlainView, duration, tool_line

EVIL = "\x1b]0;title\x07 \x1b[2J \x9b31m \r over \u202egnp.exe \x08 \ud800"


def _messages(text: str) -> list[JobEvent]:
    def line(number: int, kind: str, *blocks: dict[str, Any]) -> JobEvent:
        return JobEvent(
            number, "message", {"content": {"type": kind, "message": {"content": list(blocks)}}}
        )

    return [
        JobEvent(1, "queued", {"position": text}),
        JobEvent(2, "connected", {"replica": text, "node": text, "attempt": 2}),
        line(3, "assistant", {"type": "text", "text": f"# {text}\n[x](http://y/{text}) &#x202e;"}),
        line(4, "assistant", {"type": "tool_use", "name": text, "input": {"command": text}}),
        line(5, "user", {"type": "tool_result", "is_error": True, "content": text}),
        JobEvent(6, "recovering", {"attempt": 2, "reason": text}),
        JobEvent(7, "from_the_future", {"x": text}),
        JobEvent(8, "error", {"code": text, "error": text, "sessionId": text}),
        JobEvent(9, "completed", {"result": text, "sessionId": text}),
    ]


def test_a_terminal_gets_no_sequence_of_an_agent(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=True, width=200, color_system=None)
        view = LiveView(console)
        for event in _messages(EVIL):
            view.event(event)
        view.note(EVIL)
        view.close()
    shown = (tmp_path / "shown").read_text(encoding="utf-8")
    for sequence in ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\x07", "\x08"):
        assert sequence not in shown.replace("\x1b[2K", "")
    assert "gnp.exe" in shown


def test_a_pipe_gets_no_sequence_of_an_agent(capsys: pytest.CaptureFixture[str]) -> None:
    for view in (PlainView(), PlainView(quiet=True), JsonView()):
        for event in _messages(EVIL):
            view.event(event)
    shown = "".join(capsys.readouterr())
    assert "gnp.exe" in shown
    assert not [each for each in shown if each != "\n" and not each.isprintable()]


def test_clean_text_keeps_what_is_text() -> None:
    assert clean("a\tb\nc é 漢字 🎉\r\n") == "a\tb\nc é 漢字 🎉\n"
    assert clean("\x1b[31m") == "\N{REPLACEMENT CHARACTER}[31m"
    assert clean_line("a\n  b" + "c" * 20, 10) == "a bcccccc…"


def test_small_things_are_said_as_people_say_them() -> None:
    assert [duration(each) for each in (7.9, 720, 3723)] == ["0:07", "12:00", "1:02:03"]
    assert tool_line({"name": "Read", "input": {"file_path": "/x"}}) == "Read  /x"
    assert tool_line({"name": "X", "input": {"n": 1}}) == "X"


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run"], ["attach"], ["jobs"], ["files", "get"]):
        with pytest.raises(SystemExit) as exited:
            main([*command, "--help"])
        assert exited.value.code == 0
        assert "exit codes:" in capsys.readouterr().out
