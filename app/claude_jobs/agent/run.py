"""Runs Claude Code once and says what came of it, in every case and in bounded time."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from claude_agent_sdk import ClaudeSDKClient, ClaudeSDKError, CLIConnectionError, ProcessError

from claude_jobs.agent.command import AgentUser, as_user, command_line, environment
from claude_jobs.agent.credentials import Credentials
from claude_jobs.agent.outcome import outcome, refuses_credentials
from claude_jobs.agent.process_tree import end_descendants
from claude_jobs.agent.transport import AgentProcess, Frame
from claude_jobs.contract.event import Failed, FailureCode, TerminalEvent
from claude_jobs.contract.job import JobRequest

log = logging.getLogger(__name__)

# Lines of the control protocol between the SDK and the CLI: not the agent's words.
_CONTROL = {"control_request", "control_response", "control_cancel_request", "keep_alive"}
# Between SIGTERM and SIGKILL, in seconds; the CLI was seen to take 1.5 with a tool running.
_TERMINATION_GRACE = 3.0


@dataclass(frozen=True)
class AgentSetup:
    """How agents run in this deployment; times are in seconds.

    `idle_timeout` bounds the silence between two lines, `result_grace` the time between the
    result and the exit.
    """

    claude: Path
    home: Path
    user: AgentUser | None
    base_url: str
    max_retries: int
    idle_timeout: float
    result_grace: float


class _SilenceError(Exception):
    """The agent printed nothing for longer than it may."""


async def run_agent(
    setup: AgentSetup,
    credentials: Credentials,
    request: JobRequest,
    *,
    session_id: str,
    directory: Path,
    time_limit: float,
    on_frame: Callable[[Frame], Awaitable[None]],
) -> TerminalEvent:
    """Run the request in `directory` and return its terminal event.

    Awaits `on_frame` for each line. When this returns or raises, no process of the agent is
    left. What `on_frame` raises is passed on.
    """
    if credentials.expires_at is not None and credentials.expires_at <= datetime.now(UTC):
        return Failed(
            code=FailureCode.CREDENTIALS,
            error=f"the OAuth access token ended at {credentials.expires_at.isoformat()}: "
            "deploy new credentials",
        )
    descriptor = credentials.pipe()
    arguments = command_line(setup.claude, request, session_id)
    process = AgentProcess(
        as_user(setup.user, arguments) if setup.user else arguments,
        cwd=directory,
        env=environment(
            home=setup.home,
            base_url=setup.base_url,
            credentials=(credentials.variable, descriptor),
            max_retries=setup.max_retries,
        ),
        pass_fds=(descriptor,),
    )
    client = ClaudeSDKClient(transport=process)
    conversation = asyncio.create_task(_converse(client, process, request.prompt))
    try:
        async with asyncio.timeout(time_limit) as limit:
            result, output_ended = await _relay(process, setup, on_frame)
            exit_code = await _exit_code(process, setup.result_grace) if output_ended else None
    except TimeoutError:
        if not limit.expired():
            raise
        return Failed(
            code=FailureCode.TIMEOUT,
            error=f"the job reached its time limit of {time_limit:g} s",
            session_id=session_id,
        )
    except _SilenceError:
        return Failed(
            code=FailureCode.TIMEOUT,
            error=f"the agent was silent for {setup.idle_timeout:g} s, the longest it may be",
            session_id=session_id,
        )
    finally:
        await end_descendants(grace=_TERMINATION_GRACE)
        conversation.cancel()
        with contextlib.suppress(asyncio.CancelledError, ClaudeSDKError):
            await conversation
        await client.disconnect()
        os.close(descriptor)
    if result is None and not conversation.cancelled() and (fault := conversation.exception()):
        log.warning("the agent could not be started", extra={"cause": repr(fault)})
        return Failed(code=FailureCode.AGENT_ERROR, error=str(fault))
    return outcome(result, session_id=session_id, exit_code=exit_code, stderr=process.stderr)


async def _converse(client: ClaudeSDKClient, process: AgentProcess, prompt: str) -> None:
    """Speak the SDK's side of the conversation: start, prompt, and read to the end."""
    try:
        await client.connect(prompt)
        ended = False
        while not ended:
            try:
                # The lines themselves are taken from the process: here they must only flow.
                async for _ in client.receive_messages():
                    pass
                ended = True
            except (CLIConnectionError, ProcessError):
                raise
            except ClaudeSDKError as error:
                log.info("the SDK does not know a line", extra={"cause": type(error).__name__})
    finally:
        process.end_frames()


async def _relay(
    process: AgentProcess, setup: AgentSetup, on_frame: Callable[[Frame], Awaitable[None]]
) -> tuple[Frame | None, bool]:
    """Hand on every line until the output ends or need not be waited for.

    Returns the last `result`, or None when there was none, and whether the output ended.
    """
    result: Frame | None = None
    frames = process.frames()
    while True:
        try:
            async with asyncio.timeout(
                setup.idle_timeout if result is None else setup.result_grace
            ):
                frame = await anext(frames, None)
        except TimeoutError:
            if result is None:
                raise _SilenceError from None
            log.warning("Claude Code does not exit after its result")
            return result, False
        if frame is None:
            return result, True
        if frame.get("type") in _CONTROL:
            continue
        await on_frame(frame)
        if frame.get("type") == "result":
            result = frame
            # Work in the background may bring another turn; no prompt of ours will.
            await process.end_input()
        elif result is None and refuses_credentials(frame):
            refusal = {
                "is_error": True,
                "api_error_status": frame.get("error_status"),
                "result": f"the model's service refused the credentials (HTTP "
                f"{frame.get('error_status')}, {frame.get('error')})",
            }
            return refusal, False


async def _exit_code(process: AgentProcess, grace: float) -> int | None:
    with contextlib.suppress(TimeoutError, ClaudeSDKError):
        async with asyncio.timeout(grace):
            return await process.wait()
    return None
