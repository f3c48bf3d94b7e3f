import json
from typing import Any

import pytest

from claude_jobs.model_stub.rules import (
    DEFAULT_CONTENT,
    MAX_BYTES,
    MAX_SECONDS,
    MAX_SHOWN_OUTPUT,
    Answer,
    Fail,
    Say,
    UseTool,
    Wait,
    answer,
)

ENVIRONMENT = (
    "<system-reminder>\n# Environment\n - Primary working directory: /ws\n</system-reminder>"
)


def user(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def result(output: str = "ok", *, is_error: bool = False) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": "t", "content": output, "is_error": is_error}
    return {"role": "user", "content": [block]}


def ask(prompt: str, *later: dict[str, Any]) -> Answer:
    return answer({"messages": [user(ENVIRONMENT, prompt), *later]})


def text_of(reply: Answer) -> str:
    return "".join(step.text for step in reply.steps if isinstance(step, Say))


def call_of(reply: Answer) -> UseTool:
    last = reply.steps[-1]
    assert isinstance(last, UseTool)
    assert reply.stop_reason == "tool_use"
    return last


def test_plain_text_is_echoed_in_several_pieces_and_names_the_demo_model() -> None:
    reply = ask("How are you?\nTell me.")
    assert text_of(reply).startswith("You said: How are you? Tell me.")
    assert "demo model" in text_of(reply)
    assert isinstance(reply.steps[0], Say)
    assert len(reply.steps[0].pieces) > 1
    assert reply.stop_reason == "end_turn"


def test_what_claude_code_inserts_is_not_taken_for_the_users_words() -> None:
    inserted = "<system-reminder>\nrun rm -rf /\n</system-reminder>"
    assert text_of(ask(f"{inserted}hello")).startswith("You said: hello\n")
    later = {"role": "user", "content": [{"type": "text", "text": inserted}]}
    assert text_of(ask("hello", later)).startswith("You said: hello\n")


@pytest.mark.parametrize(
    ("prompt", "path", "content"),
    [
        ("create a file called test.txt", "/ws/test.txt", DEFAULT_CONTENT),
        ("Please CREATE a file called test.txt.", "/ws/test.txt", DEFAULT_CONTENT),
        ("create the file sub/a.txt in the workspace", "/ws/sub/a.txt", DEFAULT_CONTENT),
        ("create a file /tmp/b.txt with content: one, two", "/tmp/b.txt", "one, two"),
        ("create a file called a.txt with the content x\\ny\\n", "/ws/a.txt", "x\ny\n"),
        ('create a new file named a.txt containing "hi there"', "/ws/a.txt", "hi there"),
        ('create a file called a.txt with "Hello World"', "/ws/a.txt", "Hello World"),
        ("create a file called 'my notes.txt' with text: x", "/ws/my notes.txt", "x"),
    ],
)
def test_a_file_is_written_at_an_absolute_path(prompt: str, path: str, content: str) -> None:
    call = call_of(ask(prompt))
    assert (call.name, call.input) == ("Write", {"file_path": path, "content": content})


@pytest.mark.parametrize(
    "place",
    [
        {"system": "env\nWorking directory: /there\n"},
        {"system": [{"type": "text", "text": "<env>\nWorking directory: /there\n</env>"}]},
        {"messages": [{"role": "system", "content": " - Primary working directory: /there"}]},
        {"messages": [user(ENVIRONMENT.replace("/ws", "/there"))]},
    ],
)
def test_the_working_directory_is_found_wherever_claude_code_puts_it(place: dict[str, Any]) -> None:
    body = {**place, "messages": [*place.get("messages", []), user("create a file called a")]}
    assert call_of(answer(body)).input["file_path"] == "/there/a"


def test_a_working_directory_in_the_users_own_words_is_not_believed() -> None:
    reply = ask("Working directory: /etc\ncreate a file called a")
    assert call_of(reply).input["file_path"] == "/ws/a"


def test_a_file_that_must_be_read_first_is_read_and_then_written() -> None:
    prompt = "create a file called a\nrun true"
    refused = result("<tool_use_error>File has not been read yet.</tool_use_error>", is_error=True)
    assert call_of(ask(prompt, refused)).name == "Read"
    assert call_of(ask(prompt, refused, result())).name == "Write"
    assert call_of(ask(prompt, refused, result(), result())).name == "Bash"
    assert call_of(ask(prompt, refused, result(), refused)).name == "Bash"


@pytest.mark.parametrize(
    ("prompt", "command"),
    [
        ("run echo hi | wc -c", "echo hi | wc -c"),
        ("Run: ls -l", "ls -l"),
        ("please run `ls -l`", "ls -l"),
        ("run sleep 30", "true; sleep 30"),
    ],
)
def test_a_command_is_run(prompt: str, command: str) -> None:
    call = call_of(ask(prompt))
    assert (call.name, call.input["command"]) == ("Bash", command)


def test_a_file_is_read() -> None:
    call = call_of(ask("read the file a.txt"))
    assert (call.name, call.input) == ("Read", {"file_path": "/ws/a.txt"})


def test_after_the_last_result_the_answer_shows_what_the_tools_gave_back() -> None:
    reminder = "\n<system-reminder>\ninserted\n</system-reminder>"
    reply = ask("run a\nrun b", result(f"first{reminder}"), result("Exit code 3", is_error=True))
    assert reply.stop_reason == "end_turn"
    assert "2 tool calls" in text_of(reply)
    assert "1. Bash a\nfirst\n" in text_of(reply)
    assert "2. Bash b (failed)\nExit code 3" in text_of(reply)
    assert "inserted" not in text_of(reply)


def test_a_tools_output_is_shown_in_part_when_it_is_long() -> None:
    assert len(text_of(ask("run a", result("x" * 1_000_000)))) < MAX_SHOWN_OUTPUT + 200


def test_lines_are_steps_in_order_and_other_lines_are_passed_over() -> None:
    prompt = "Do this:\nrun one\ncount to 2 slowly\ncreate a file called a\nthank you\nsay 3 bytes"
    assert call_of(ask(prompt)).input["command"] == "one"
    second = ask(prompt, result())
    assert text_of(second) == "1\n2\n"
    assert call_of(second).name == "Write"
    last = ask(prompt, result(), result())
    assert last.stop_reason == "end_turn"
    assert text_of(last).startswith("dem")


def test_a_command_in_the_middle_of_a_line_is_plain_text() -> None:
    assert "You said" in text_of(ask("I would like you to run ls"))


def test_a_later_prompt_starts_its_own_steps() -> None:
    reply = ask("run one", result(), {"role": "assistant", "content": "done"}, user("run two"))
    assert call_of(reply).input["command"] == "two"


@pytest.mark.parametrize(
    "prompt", ["continue", "Please continue.", "Continue from where you left off."]
)
def test_continue_goes_on_with_the_steps_of_the_prompt_before(prompt: str) -> None:
    interrupted = user("[Request interrupted by user for tool use]")
    reply = ask("run one\nrun two", result(), interrupted, user(prompt))
    assert call_of(reply).input["command"] == "two"


def test_work_forever_never_ends() -> None:
    assert call_of(ask("work forever")).input["command"] == "sleep 1"
    assert call_of(ask("work forever", *[result()] * 500)).input["command"] == "sleep 1"


def test_slow_answers() -> None:
    assert ask("wait 7 seconds").steps[0] == Wait(7)
    assert ask("wait 999999 seconds").steps[0] == Wait(MAX_SECONDS)
    assert ask("stall").steps == (Wait(None),)
    assert ask("count to 3 slowly").steps == (Say(("1\n", "2\n", "3\n"), delay=1),)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 529])
def test_failures(status: int) -> None:
    assert ask(f"fail with {status}").failure == Fail(status, once=False)
    assert ask(f"fail once with {status}").failure == Fail(status, once=True)


def test_a_failure_comes_at_its_place_among_the_steps() -> None:
    prompt = "run one\nfail with 529"
    assert ask(prompt).failure is None
    assert ask(prompt, result()).failure == Fail(529, once=False)


def test_an_unknown_status_is_plain_text() -> None:
    assert "You said: fail with 418" in text_of(ask("fail with 418"))


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 1_000_000])
def test_a_text_of_a_given_size(size: int) -> None:
    assert len(text_of(ask(f"say {size} bytes")).encode()) == size


def test_a_text_is_bounded() -> None:
    assert len(text_of(ask("say 999999999 bytes"))) == MAX_BYTES


def test_earlier_prompts_are_recalled() -> None:
    first = ask("remember the word apple")
    assert "the word apple" in text_of(first)
    assistant = {"role": "assistant", "content": text_of(first)}
    recalled = text_of(ask("remember the word apple", assistant, user("what did I say before?")))
    assert recalled.endswith("\n- remember the word apple")
    assert "You said nothing before" in text_of(ask("what did I say before?"))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "run ls"},
        {"messages": [None, 1, "x", [], {}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [None, 1, {"type": "text"}, {"type": []}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}]},
        {"messages": [{"role": "system"}, result()]},
        {"messages": [user("hello"), result(), result()]},
        {"messages": [user("<system-reminder>never closed")]},
        {"messages": [user("\n\n"), user("run"), user("run:"), user("create a file called")]},
        {"messages": [user("run `"), user("read the file ."), user("say 0 bytes")]},
        {"messages": [user("\ud800 lone surrogate")], "system": 5},
    ],
)
def test_odd_bodies_get_an_answer(body: dict[str, Any]) -> None:
    reply = answer(body)
    assert reply.steps
    assert json.dumps([str(step) for step in reply.steps])
