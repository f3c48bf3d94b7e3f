"""The command line and the environment that Claude Code is started with."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from claude_jobs.contract.job import JobRequest, PermissionMode

_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
# What a company's network needs, and nothing else of the supervisor's environment.
_PASSED_ON = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "TZ",
)


@dataclass(frozen=True)
class AgentUser:
    """The user that agents run as; not the supervisor's own, except in development."""

    uid: int
    gid: int


def bundled_claude() -> Path:
    """Return the CLI that the pinned Agent SDK brings along, without importing the SDK."""
    package = importlib.util.find_spec("claude_agent_sdk")
    if package is None or package.origin is None:
        raise FileNotFoundError("the package claude-agent-sdk is not installed")
    return Path(package.origin).parent / "_bundled" / "claude"


def read_ahead(claude: Path) -> None:
    """Have the CLI, 381 MB, read into the machine's page cache; raises `OSError`.

    Does not wait for it and costs nobody memory that is wanted otherwise.
    """
    with claude.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def command_line(
    claude: Path,
    request: JobRequest,
    session_id: str,
    *,
    resume: bool,
    max_turns: int,
    trust_workspace_settings: bool,
) -> list[str]:
    """Return the arguments of one run; the prompt goes through standard input.

    Unless they are trusted, settings files, hooks and MCP servers that lie in the workspace,
    where any job can write, are not obeyed. `max_turns` bounds what the request asks for.
    """
    arguments = [
        str(claude),
        "--output-format=stream-json",
        "--input-format=stream-json",
        "--verbose",
        # What goes into the session's transcript is printed, too, for the session store.
        "--session-mirror",
        f"--resume={session_id}" if resume else f"--session-id={session_id}",
        f"--max-turns={min(request.max_turns or max_turns, max_turns)}",
    ]
    if trust_workspace_settings:
        arguments.append("--setting-sources=user,project,local")
    else:
        arguments += ["--setting-sources=user", "--strict-mcp-config"]
    mode = request.effective_permission_mode
    if mode is PermissionMode.BYPASS:
        arguments.append("--dangerously-skip-permissions")
    else:
        arguments.append(f"--permission-mode={mode}")
    if request.model is not None:
        arguments.append(f"--model={request.model}")
    if request.allowed_tools:
        arguments += ["--allowedTools", ",".join(request.allowed_tools)]
    if request.disallowed_tools:
        arguments += ["--disallowedTools", ",".join(request.disallowed_tools)]
    if request.append_system_prompt is not None:
        arguments.append(f"--append-system-prompt={request.append_system_prompt}")
    return arguments


def config_directory(home: Path) -> Path:
    """Return where Claude Code keeps its own files, its sessions among them."""
    return home / ".claude"


def in_directory(directory: Path, arguments: list[str]) -> list[str]:
    """Wrap a command so that it goes to a directory by itself, once it is a process of its own.

    Whoever starts a process in a directory waits until it is there, and with it every thread of
    this interpreter: for as long as the file server is away.
    """
    return ["env", f"--chdir={directory}", "--", *arguments]


def as_user(user: AgentUser, arguments: list[str]) -> list[str]:
    """Wrap a command so that it runs as `user`, without any capability or a way to get one.

    A change between two users that are not root keeps ambient capabilities, so they are
    dropped by name.
    """
    return [
        "setpriv",
        f"--reuid={user.uid}",
        f"--regid={user.gid}",
        "--clear-groups",
        "--inh-caps=-all",
        "--ambient-caps=-all",
        "--no-new-privs",
        "--",
        *arguments,
    ]


def environment(
    *,
    home: Path,
    base_url: str,
    credentials: tuple[str, int],
    max_retries: int,
    inherited: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the agent's whole environment: nothing of the supervisor's, no secret.

    `credentials` is the CLI's variable and the number of the descriptor to read them from.
    """
    variable, descriptor = credentials
    variables = {
        "HOME": str(home),
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "PATH": f"{home}/.local/bin:/usr/local/bin:/usr/bin:/bin",
        "CLAUDE_CONFIG_DIR": str(config_directory(home)),
        "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_MAX_RETRIES": str(max_retries),
        variable: str(descriptor),
    }
    if base_url:
        variables["ANTHROPIC_BASE_URL"] = base_url
    if _CA_BUNDLE.exists():
        # Programs with a certificate store of their own would not know a company's CA.
        variables |= dict.fromkeys(
            ("NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(_CA_BUNDLE)
        )
    return variables | {name: inherited[name] for name in _PASSED_ON if inherited.get(name)}
