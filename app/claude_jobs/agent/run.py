"""Runs Claude Code once and says what came of it, in every case and in bounded time."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from claude_agent_sdk import (
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ClaudeSDKError,
    CLIConnectionError,
    MirrorErrorMessage,
    ProcessError,
    SessionKey,
    SessionStore,
    SessionStoreEntry,
)

from claude_jobs.agent.command import (
    AgentUser,
    as_user,
    command_line,
    config_directory,
    environment,
    in_directory,
)
from claude_jobs.agent.credentials import Credentials
from claude_jobs.agent.outcome import outcome, refuses_credentials
from claude_jobs.agent.process_tree import end_descendants
from claude_jobs.agent.session_files import SavedSessions, restore_session
from claude_jobs.agent.transport import AgentProcess, Frame
from claude_jobs.contract.event import Failed, FailureCode, TerminalEvent
from claude_jobs.contract.job import JobRequest

log = logging.getLogger(__name__)

# Lines between the SDK and the CLI, and copies for the session store: not the agent's words.
_CONTROL = {
    "control_request",
    "control_response",
    "control_cancel_request",
    "keep_alive",
    "transcript_mirror",
}
# Between SIGTERM and SIGKILL, in seconds; the CLI was seen to take 1.5 with a tool running.
_TERMINATION_GRACE = 3.0
# A cancelled agent has less time, in seconds: to obey an interruption (it was seen to take 0.1),
# to exit then (often it takes over 1), to obey SIGTERM.
_INTERRUPTION_GRACE = 0.7
_INTERRUPTED_EXIT_GRACE = 0.2
_CANCELLATION_GRACE = 0.5
# The SDK's variable, in milliseconds, and by how many seconds it comes after our own bound.
_SDK_PATIENCE = "CLAUDE_CODE_STREAM_CLOSE_TIMEOUT"
_SDK_MARGIN = 60
# How long the last lines of an agent that has ended may take to be read, in seconds.
_LAST_LINES = 2.0


@dataclass(frozen=True)
class AgentSetup:
    """How agents run in this deployment; times are in seconds.

    `idle_timeout` bounds the silence between two lines, `result_grace` the time between the
    result and the exit. `max_turns` bounds what a request may ask for. With
    `trust_workspace_settings`, settings files, hooks and MCP servers in the workspace are obeyed.
    """

    claude: Path
    home: Path
    user: AgentUser | None
    base_url: str
    max_retries: int
    max_turns: int
    idle_timeout: float
    result_grace: float
    trust_workspace_settings: bool = False


class _SilenceError(Exception):
    """The agent printed nothing for longer than it may."""


async def run_agent(
    setup: AgentSetup,
    credentials: Credentials,
    request: JobRequest,
    *,
    session_id: str,
    prompt: str,
    resume: bool,
    sessions: SavedSessions,
    directory: Path,
    time_limit: float,
    on_frame: Callable[[Frame], Awaitable[None]],
    cancelled: asyncio.Event,
    on_started: Callable[[int], None] | None = None,
) -> TerminalEvent:
    """Send `prompt` to an agent in `directory` and return the terminal event.

    Awaits `on_frame` for each line and passes on what it raises. Once `cancelled` is set the
    agent is interrupted, and ended within 2 s. `on_started` gets the agent's process id.

    When this returns or raises, no process of the agent is left, `on_frame` has returned, and
    the session is saved as far as `sessions` takes it. With `resume`, what was saved before is
    gone on with; raises `NoSavedSessionError` when there is nothing. Raises `AgentKilledError`
    when somebody else killed the agent. Cancelled, or when `on_frame` raises, it kills the agent
    without a grace: the job is not ours any more.
    """
    if cancelled.is_set():
        return _cancellation(session_id)
    if credentials.expires_at is not None and credentials.expires_at <= datetime.now(UTC):
        return Failed(
            code=FailureCode.CREDENTIALS,
            error=f"the OAuth access token ended at {credentials.expires_at.isoformat()}: "
            "deploy new credentials",
        )
    config = config_directory(setup.home)
    if resume:
        await restore_session(sessions, session_id, projects=config / "projects", user=setup.user)
    if cancelled.is_set():
        return _cancellation(session_id)
    arguments = command_line(
        setup.claude,
        request,
        session_id,
        resume=resume,
        max_turns=setup.max_turns,
        trust_workspace_settings=setup.trust_workspace_settings,
    )
    descriptor = credentials.pipe()
    process = AgentProcess(
        # As the supervisor, which may go wherever the job's directory was made.
        in_directory(directory, as_user(setup.user, arguments) if setup.user else arguments),
        env=environment(
            home=setup.home,
            base_url=setup.base_url,
            credentials=(credentials.variable, descriptor),
            max_retries=setup.max_retries,
        ),
        pass_fds=(descriptor,),
        on_started=on_started,
    )
    options = ClaudeAgentOptions(
        # What the SDK asks of a store beyond this is for resuming, which it cannot do here.
        session_store=cast("SessionStore", _OneSession(sessions, session_id)),
        session_store_flush="eager",
        env={"CLAUDE_CONFIG_DIR": str(config)},
    )
    # The SDK would give an agent up that does not answer for a minute, as one does not whose file
    # server is away. How long it may be silent is for `idle_timeout` alone.
    os.environ[_SDK_PATIENCE] = str(int((setup.idle_timeout + _SDK_MARGIN) * 1000))
    run = _Run(setup, process, ClaudeSDKClient(options, transport=process), on_frame)
    try:
        stopped = await run.to_the_end(prompt, session_id, time_limit, cancelled)
    finally:
        await sessions.flush()
        os.close(descriptor)
    if stopped is not None:
        return stopped
    # An agent that ended by itself says more about it than whoever found its input closed.
    if run.result is None and run.fault is not None and (run.exit_code or 0) <= 0:
        log.warning("the agent could not be started", extra={"cause": repr(run.fault)})
        return Failed(code=FailureCode.AGENT_ERROR, error=str(run.fault))
    return outcome(
        run.result, session_id=session_id, exit_code=run.exit_code, stderr=process.stderr
    )


@dataclass
class _Run:
    """A run from the start of its process until none is left."""

    setup: AgentSetup
    process: AgentProcess
    client: ClaudeSDKClient
    on_frame: Callable[[Frame], Awaitable[None]]
    result: Frame | None = None
    exit_code: int | None = None
    fault: BaseException | None = None
    _speaks: asyncio.Event = field(default_factory=asyncio.Event)
    _has_result: asyncio.Event = field(default_factory=asyncio.Event)
    _abandoned: bool = False

    async def to_the_end(
        self, prompt: str, session_id: str, time_limit: float, cancelled: asyncio.Event
    ) -> Failed | None:
        """Run; returns why the agent was stopped, or None when what it said counts."""
        conversation = asyncio.create_task(self._converse(prompt))
        relay = asyncio.create_task(self._relay())
        cancellation = asyncio.create_task(cancelled.wait())
        grace = _TERMINATION_GRACE
        stopped: Failed | None = None
        try:
            await asyncio.wait(
                {relay, cancellation}, timeout=time_limit, return_when=asyncio.FIRST_COMPLETED
            )
            if relay.done():
                if not isinstance(relay.exception(), _SilenceError | None):
                    grace = 0.0
            elif not cancelled.is_set():
                stopped = Failed(
                    code=FailureCode.TIMEOUT,
                    error=f"the job reached its time limit of {time_limit:g} s",
                    session_id=session_id,
                )
            else:
                grace = _CANCELLATION_GRACE
                if self.result is None:
                    stopped = _cancellation(session_id)
                    await self._interrupt(relay)
        except asyncio.CancelledError:
            self._abandoned = True
            grace = 0.0
            raise
        finally:
            cancellation.cancel()
            relay.cancel()
            self.process.dismiss_frames()
            await end_descendants(grace=grace)
            reading = asyncio.create_task(self.process.was_read())
            await asyncio.wait(
                {conversation, reading},
                timeout=_LAST_LINES,
                return_when=asyncio.FIRST_COMPLETED,
            )
            reading.cancel()
            conversation.cancel()
            await asyncio.wait({conversation, relay, reading, cancellation})
            await self.client.disconnect()
        if not conversation.cancelled():
            self.fault = conversation.exception()
        if not relay.cancelled() and (fault := relay.exception()):
            if not isinstance(fault, _SilenceError):
                raise fault
            return stopped or Failed(
                code=FailureCode.TIMEOUT,
                error=f"the agent was silent for {self.setup.idle_timeout:g} s, "
                "the longest it may be",
                session_id=session_id,
            )
        return stopped

    async def _converse(self, prompt: str) -> None:
        """Speak the SDK's side of the conversation: start, prompt, and read to the end."""
        try:
            await self.client.connect(prompt)
            self._speaks.set()
            ended = False
            while not ended:
                try:
                    # The lines themselves are taken from the process: here they must only flow.
                    async for message in self.client.receive_messages():
                        if isinstance(message, MirrorErrorMessage):
                            log.warning("the session is not saved", extra={"cause": message.error})
                    ended = True
                except (CLIConnectionError, ProcessError):
                    raise
                except ClaudeSDKError as error:
                    log.info("the SDK does not know a line", extra={"cause": type(error).__name__})
        finally:
            self.process.end_frames()

    async def _relay(self) -> None:
        """Hand on every line until the output ends or need not be waited for."""
        frames = self.process.frames()
        while True:
            try:
                async with asyncio.timeout(
                    self.setup.idle_timeout if self.result is None else self.setup.result_grace
                ):
                    frame = await anext(frames, None)
            except TimeoutError:
                if self.result is None:
                    raise _SilenceError from None
                log.warning("Claude Code does not exit after its result")
                return
            if frame is None:
                break
            if frame.get("type") in _CONTROL:
                continue
            await self._hand_on(frame)
            if frame.get("type") == "result":
                self.result = frame
                self._has_result.set()
                # Work in the background may bring another turn; no prompt of ours will.
                await self.process.end_input()
            elif self.result is None and refuses_credentials(frame):
                status = frame.get("error_status")
                self.result = {
                    "is_error": True,
                    "api_error_status": status,
                    "result": "the model's service refused the credentials "
                    f"(HTTP {status}, {frame.get('error')})",
                }
                return
        with contextlib.suppress(TimeoutError, ClaudeSDKError):
            async with asyncio.timeout(self.setup.result_grace):
                self.exit_code = await self.process.wait()

    async def _hand_on(self, frame: Frame) -> None:
        handing = asyncio.ensure_future(self.on_frame(frame))
        try:
            await asyncio.shield(handing)
        except asyncio.CancelledError:
            # Cut off, nobody could tell whether it was done. Only who gave all up need not know.
            if self._abandoned:
                handing.cancel()
            await asyncio.wait({handing})
            if not handing.cancelled():
                handing.result()
            raise

    async def _interrupt(self, relay: asyncio.Task[None]) -> None:
        """Ask the agent to stop what it does, so that its session says so, and hear it out."""
        if not self._speaks.is_set():
            return
        asking = asyncio.create_task(self.client.interrupt())
        obeying = asyncio.create_task(self._has_result.wait())
        await asyncio.wait(
            {relay, obeying}, timeout=_INTERRUPTION_GRACE, return_when=asyncio.FIRST_COMPLETED
        )
        await asyncio.wait({relay}, timeout=_INTERRUPTED_EXIT_GRACE if obeying.done() else 0)
        for task in (asking, obeying):
            task.cancel()
        await asyncio.gather(asking, obeying, return_exceptions=True)


class _OneSession:
    """Takes the transcripts of one session alone.

    They come by the agent's standard output, where its tools could write, too.
    """

    def __init__(self, sessions: SavedSessions, session_id: str) -> None:
        self._sessions = sessions
        self._session_id = session_id

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        if key["session_id"] == self._session_id:
            await self._sessions.append(key, entries)
        else:
            log.warning("the transcript of another session is not saved")


def _cancellation(session_id: str) -> Failed:
    return Failed(code=FailureCode.CANCELLED, error="the job was cancelled", session_id=session_id)
