"""`claude-jobs`: jobs on the command line. Also `python -m claude_jobs.client`."""

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path, PurePosixPath
from typing import Any, cast

from claude_jobs import __version__
from claude_jobs.client.access import DEFAULT_URL, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE
from claude_jobs.client.clean_text import clean_line
from claude_jobs.client.client import Client
from claude_jobs.client.errors import ApiError, ClientError
from claude_jobs.client.following import ExitCode, Following, interruptible
from claude_jobs.client.rendering import View, job_view, say, tell
from claude_jobs.contract.base import Document
from claude_jobs.contract.file import FileEntry, FileType
from claude_jobs.contract.job import JobRecord, JobStatus, PermissionMode
from claude_jobs.contract.session import Session

Command = Callable[[Client, argparse.Namespace, View | None], Awaitable[int]]

_SIGPIPE = 141
_EPILOG = f"""
exit codes:
  0    the job ended well, or what was asked for is done
  1    the job ended with an error
  2    wrong arguments, or the API refused the request as wrong
  3    the API is out of reach, busy, or does not let this token in
  4    the job was cancelled
  5    the job took too long, or was silent for too long
  6    the job's replica was lost and it could not be gone on with
  130  left with Ctrl-C: the job goes on, unless it was asked to end
  141  whoever read the output went away: the job goes on

environment:
  {URL_VARIABLE}         the API's address (default {DEFAULT_URL})
  {TOKEN_VARIABLE}       the token
  {TOKEN_FILE_VARIABLE}  a file that holds it (default ~/.config/claude-jobs/token)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that does not know a character gets a question mark, not a traceback.
        cast("Any", stream).reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        return int(asyncio.run(_with_client(options)))
    except KeyboardInterrupt:
        return ExitCode.LEFT
    except BrokenPipeError:
        # Whoever read the output has enough. The interpreter must not complain on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE
    except ApiError as refused:
        tell(f"claude-jobs: {refused}")
        return ExitCode.USAGE if refused.status in _OWN_MISTAKES else ExitCode.UNAVAILABLE
    except ClientError as error:
        tell(f"claude-jobs: {error}")
        return ExitCode.UNAVAILABLE
    except OSError as error:
        tell(f"claude-jobs: {error.filename or 'input or output'}: {error.strerror}")
        return ExitCode.USAGE


_OWN_MISTAKES = {400, 404, 405, 409, 411, 412, 413, 416, 422}


async def _with_client(options: argparse.Namespace) -> int:
    shown = options.command in (_run, _attach) and not getattr(options, "detach", False)
    view = job_view(as_json=options.json, quiet=options.quiet) if shown else None

    def note(cause: ClientError, seconds: float) -> None:
        line = f"{cause}; trying again in {seconds:.0f} s"
        view.note(line) if view else tell(line)

    command: Command = options.command
    try:
        async with Client(
            options.url,
            token_file=options.token_file,
            give_up_after=options.give_up_after,
            notify=note,
        ) as client:
            return await command(client, options, view)
    finally:
        if view:
            view.close()


async def _run(client: Client, options: argparse.Namespace, view: View | None) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    job = await interruptible(
        client.submit(
            prompt,
            workspace=options.workspace,
            resume_session_id=options.resume,
            model=options.model,
            max_turns=options.max_turns,
            timeout_seconds=options.timeout,
            permission_mode=options.permission_mode,
            dangerously_skip_permissions=options.dangerously_skip_permissions,
            allowed_tools=options.allowed_tools,
            disallowed_tools=options.disallowed_tools,
            append_system_prompt=options.append_system_prompt,
            metadata=dict(options.metadata) if options.metadata else None,
            idempotency_key=options.idempotency_key,
        )
    )
    if job is None:
        tell("left before the API had answered; if it took the job, `claude-jobs jobs` lists it")
        return ExitCode.LEFT
    if view is None:
        say(job.id)
        return ExitCode.COMPLETED
    view.note(f"job {job.id}")
    return await _follow(client, options, view, job.id, cancels=True)


async def _attach(client: Client, options: argparse.Namespace, view: View | None) -> int:
    assert view is not None  # noqa: S101 - `attach` always shows
    return await _follow(client, options, view, options.job, cancels=False)


async def _follow(
    client: Client, options: argparse.Namespace, view: View, job_id: str, *, cancels: bool
) -> int:
    come_back = ["claude-jobs", "attach", job_id]
    if options.url:
        come_back += ["--url", options.url]
    if options.token_file:
        come_back += ["--token-file", str(options.token_file)]
    following = Following(
        client,
        view,
        job_id,
        cancels=cancels,
        come_back=shlex.join(come_back),
        after=getattr(options, "after", 0),
    )
    return await following.to_its_end()


async def _jobs(client: Client, options: argparse.Namespace, _: View | None) -> int:
    def line(job: JobRecord) -> str:
        return f"{job.id}  {job.status:9}  {job.created_at:%Y-%m-%d %H:%M}  {_gist(job.prompt)}"

    return await _list(client.jobs(status=options.status, limit=options.limit), line, options.json)


async def _sessions(client: Client, options: argparse.Namespace, _: View | None) -> int:
    def line(session: Session) -> str:
        return (
            f"{session.id}  {session.updated_at:%Y-%m-%d %H:%M}  "
            f"job {session.last_job_id}  {clean_line(session.workspace)}"
        )

    if options.delete:
        await client.delete_session(options.delete)
        return ExitCode.COMPLETED
    return await _list(client.sessions(limit=options.limit), line, options.json)


async def _list(found: AsyncIterable[Any], line: Callable[[Any], str], as_json: bool) -> int:
    async with aclosing(cast("Any", found)) as documents:
        async for each in documents:
            say(_json(each) if as_json else line(each))
    return ExitCode.COMPLETED


async def _cancel(client: Client, options: argparse.Namespace, _: View | None) -> int:
    record = await client.cancel(options.job)
    state = "is cancelled" if record.status is JobStatus.CANCELLED else "is being cancelled"
    tell(f"job {record.id} {state}")
    return ExitCode.COMPLETED


async def _status(client: Client, options: argparse.Namespace, _: View | None) -> int:
    status = await client.status()
    if options.json:
        say(_json(status))
        return ExitCode.COMPLETED
    counts, queue = status.replicas, status.queue
    say(f"{status.status}: {counts.idle} of {counts.total} replicas idle, {queue.depth} jobs wait")
    for replica in counts.list:
        job = f"  job {replica.job_id}" if replica.job_id else ""
        fault = f"  {replica.fault}" if replica.fault else ""
        say(clean_line(f"  {replica.replica}  {replica.node}  {replica.status}{job}{fault}"))
    if status.notice:
        tell(status.notice)
    return ExitCode.COMPLETED


async def _files_list(client: Client, options: argparse.Namespace, _: View | None) -> int:
    def line(entry: FileEntry) -> str:
        mark = "/" if entry.type is FileType.DIRECTORY else ""
        size = "" if entry.size is None else str(entry.size)
        return f"{size:>12}  {entry.modified_at:%Y-%m-%d %H:%M}  {clean_line(entry.name)}{mark}"

    return await _list(client.files.list(options.path), line, options.json)


async def _files_get(client: Client, options: argparse.Namespace, _: View | None) -> int:
    to = options.to or Path(PurePosixPath(options.path).name)
    if to.is_dir():
        to /= PurePosixPath(options.path).name
    await client.files.download(options.path, to)
    return ExitCode.COMPLETED


async def _files_put(client: Client, options: argparse.Namespace, _: View | None) -> int:
    await client.files.upload(
        options.path, options.source, if_none_match="*" if options.new else None
    )
    return ExitCode.COMPLETED


async def _files_remove(client: Client, options: argparse.Namespace, _: View | None) -> int:
    await client.files.delete(options.path, recursive=options.recursive)
    return ExitCode.COMPLETED


def _json(document: Document) -> str:
    # ASCII only: what is in a prompt must not reach the terminal as it is.
    return json.dumps(document.model_dump(mode="json", exclude_none=True))


def _gist(prompt: str) -> str:
    return clean_line(prompt[:500], 70)


def _parser() -> argparse.ArgumentParser:
    access = argparse.ArgumentParser(add_help=False)
    access.add_argument("--url", help=f"the API's address (default: ${URL_VARIABLE})")
    # No --token: every user of the machine can read a command line.
    access.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token")
    access.add_argument(
        "--give-up-after",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="the longest that an outage or a full queue may last (default 120)",
    )
    access.add_argument("--json", action="store_true", help="JSON lines, for programs")

    shape = {
        "epilog": _EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,  # or `--token <secret>` would be taken for --token-file
    }
    parser = argparse.ArgumentParser(prog="claude-jobs", description=__doc__, **cast("Any", shape))
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Command, summary: str, among: Any = commands
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = among.add_parser(
            name, help=summary, description=summary, parents=[access], **cast("Any", shape)
        )
        added.set_defaults(command=command, quiet=False)
        return added

    _add_run(add("run", _run, "run a job and show it to its end"))
    attach = add("attach", _attach, "show a job that was submitted before")
    attach.add_argument("job")
    attach.add_argument("--after", type=int, default=0, metavar="ID", help="only later events")
    attach.add_argument("--quiet", action="store_true", help="print the result alone")
    jobs = add("jobs", _jobs, "list jobs, the newest first")
    jobs.add_argument("--status", choices=[each.value for each in JobStatus])
    jobs.add_argument("--limit", type=int, default=20, help="the most that are listed (default 20)")
    add("cancel", _cancel, "ask that a job be ended").add_argument("job")
    sessions = add("sessions", _sessions, "list the sessions that `run --resume` can go on with")
    sessions.add_argument("--limit", type=int, default=20, help="the most that are listed")
    sessions.add_argument("--delete", metavar="SESSION", help="delete this one instead")
    add("status", _status, "show the replicas and the queue")

    summary = "the shared workspace: list, get, put, rm"
    files = commands.add_parser("files", help=summary, description=summary)
    verbs = files.add_subparsers(required=True, metavar="VERB")
    ls = add("list", _files_list, "list a directory", verbs)
    ls.add_argument("path", nargs="?", default="", help="below the shared workspace")
    get = add("get", _files_get, "download a file", verbs)
    get.add_argument("path", help="below the shared workspace")
    get.add_argument("to", nargs="?", type=Path, help="a local file or directory")
    put = add("put", _files_put, "upload a file", verbs)
    put.add_argument("source", type=Path, help="the local file")
    put.add_argument("path", help="below the shared workspace")
    put.add_argument("--new", action="store_true", help="never replace a file")
    remove = add("rm", _files_remove, "delete a file or a directory", verbs)
    remove.add_argument("path", help="below the shared workspace")
    remove.add_argument("--recursive", action="store_true", help="also what a directory holds")
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("prompt", help="what the agent is to do; - reads it from standard input")
    run.add_argument("--workspace", metavar="DIRECTORY", help="below the shared workspace")
    run.add_argument("--resume", metavar="SESSION", help="go on with an earlier session")
    run.add_argument("--model")
    run.add_argument("--max-turns", type=int, metavar="N")
    run.add_argument("--timeout", type=int, metavar="SECONDS", help="the longest it may take")
    run.add_argument("--permission-mode", choices=[each.value for each in PermissionMode])
    run.add_argument(
        "--dangerously-skip-permissions",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the default, as nobody is there to ask; with --no-… tools that need leave are denied",
    )
    for name in ("--allowed-tools", "--disallowed-tools"):
        run.add_argument(
            name, action="append", metavar="RULE", help="a rule like 'Bash(git:*)'; repeat it"
        )
    run.add_argument("--append-system-prompt", metavar="TEXT")
    run.add_argument(
        "--metadata", action="append", type=_pair, metavar="NAME=TEXT", help="repeat it"
    )
    run.add_argument(
        "--idempotency-key", metavar="KEY", help="running again with this key is the same job"
    )
    run.add_argument("--quiet", action="store_true", help="print the result alone")
    run.add_argument("--detach", action="store_true", help="print the job's id and leave")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError("must be NAME=TEXT")
    return name, value
