"""What a deployment can set: the environment for plain settings, files for secrets.

Each process reads only its own class, so that a process without need of a secret can neither
read nor ask for it. A secret is a file named after its field in `SECRETS_DIR`.
"""

import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from claude_jobs.api_tokens import ApiToken, parse_api_tokens

DEFAULT_SECRETS_DIR = Path("/run/secrets")


def _has_a_majority(servers: int) -> int:
    if servers not in (1, 3, 5):
        raise ValueError("must be 1, 3 or 5: several servers decide by majority")
    return servers


@dataclass(frozen=True, repr=False)
class Passwords:
    """A password of the broker; while it is changed, those that it also takes.

    The secret has one a line. Each is never shown.
    """

    accepted: tuple[str, ...]

    @property
    def current(self) -> str:
        """The one to come in with: the first."""
        return self.accepted[0]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the secret; raises `ValueError` for one that is too short or not there."""
        passwords = tuple(text.split())
        if not passwords or min(map(len, passwords)) < _MIN_PASSWORD_LENGTH:
            raise ValueError(
                f"must be a password of at least {_MIN_PASSWORD_LENGTH} characters, "
                "or several, one a line"
            )
        return cls(passwords)


_MIN_PASSWORD_LENGTH = 16
Password = Annotated[Passwords, NoDecode, PlainValidator(Passwords.parse)]
EventBytes = Annotated[int, Field(ge=2**20)]
SessionBytes = Annotated[int, Field(ge=2**20)]
ServerCount = Annotated[int, AfterValidator(_has_a_majority)]
# Read from its text, so that every sentence about it is ours and quotes no token.
ApiTokens = Annotated[tuple[ApiToken, ...], NoDecode, PlainValidator(parse_api_tokens)]


_NFS_SOURCE = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/\[\]]+):/.*")
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _nfs_source(text: str) -> str:
    path = text.partition(":/")[2]
    if text and (not _NFS_SOURCE.fullmatch(text) or {".", ".."} & {*path.split("/")}):
        raise ValueError(
            "must be what the NFS server exports, as address:/path "
            "(192.168.77.11:/srv/claude-code/workspace, an IPv6 address in brackets)"
        )
    return text


def _host_name(text: str) -> str:
    if text and not _HOST_NAME.fullmatch(text):
        raise ValueError("must be the name of a node of the swarm, as `docker node ls` shows it")
    return text


class SettingsError(Exception):
    """A setting is missing or wrong; the sentence names it and never quotes a value."""


class WorkspaceMode(StrEnum):
    """Where a job works unless its request says otherwise."""

    SHARED = "shared"  # in the workspace itself
    PER_JOB = "per-job"  # in a directory of its own, `jobs/<id>`


class ProcessSettings(BaseSettings):
    """What every process reads."""

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True)

    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    node_env: str = "production"


class BusSettings(ProcessSettings):
    """What every client of the broker reads.

    With `workspace_source` (`address:/path` of an NFS export) the workspace counts only where
    it is that file system; on the node `workspace_host`, the file server, it is a directory.
    """

    broker_url: str = "nats://nats:4222"
    node_name: str = Field(default_factory=socket.gethostname)
    workspace_dir: Path = Path("/workspace")
    workspace_source: Annotated[str, AfterValidator(_nfs_source)] = ""
    workspace_host: Annotated[str, AfterValidator(_host_name)] = ""
    # A replica that is not heard of for so long has lost its job; the same for every process.
    lease_seconds: Annotated[float, Field(ge=1)] = 20

    @model_validator(mode="after")
    def _a_host_has_something_to_serve(self) -> Self:
        if self.workspace_host and not self.workspace_source:
            raise ValueError(
                "WORKSPACE_HOST names the file server, but WORKSPACE_SOURCE does not say "
                "what it exports: set both or neither"
            )
        return self


class GatewaySettings(BusSettings):
    """The gateway's settings. The secret `api_tokens` has the form of `api_tokens.FORM`."""

    broker_gateway_password: Password
    # The broker's: each of its servers holds a copy of everything.
    broker_servers: ServerCount = 1
    api_tokens: ApiTokens = Field(default=(), validate_default=False)
    allow_anonymous: bool = False
    demo_mode: bool = False
    queue_limit: Annotated[int, Field(ge=1)] = 1000
    workspace_mode: WorkspaceMode = WorkspaceMode.SHARED
    max_request_bytes: Annotated[int, Field(ge=1024)] = 2 * 2**20
    max_upload_bytes: Annotated[int, Field(ge=0)] = 2**30
    job_timeout_seconds: Annotated[int, Field(ge=1)] = 3600
    max_turns: Annotated[int, Field(ge=1)] = 1000
    event_age_hours: Annotated[int, Field(ge=1)] = 168
    event_bytes: EventBytes = 4 * 2**30
    session_age_hours: Annotated[int, Field(ge=1)] = 720
    session_bytes: SessionBytes = 2 * 2**30
    # 0: for ever.
    job_directory_age_hours: Annotated[int, Field(ge=0)] = 720

    @model_validator(mode="after")
    def _someone_may_come_in(self) -> Self:
        if not self.api_tokens and not self.allow_anonymous:
            raise ValueError(
                "the secret api_tokens is missing or empty: give it tokens, "
                "or set ALLOW_ANONYMOUS=true to let everybody in on purpose"
            )
        return self

    @property
    def event_age(self) -> timedelta:
        """How long events and job records are kept."""
        return timedelta(hours=self.event_age_hours)

    @property
    def session_age(self) -> timedelta:
        """How long a session is kept after its last job."""
        return timedelta(hours=self.session_age_hours)

    @property
    def job_directory_age(self) -> timedelta | None:
        """How long after its acceptance a job's own directory is kept; None: for ever."""
        return timedelta(hours=self.job_directory_age_hours) or None


class ReportSettings(GatewaySettings):
    """The settings of what reports on the pool beside a gateway: the gateway's own."""


class ReplicaSettings(BusSettings):
    """A replica's settings. Times are in seconds.

    `agent_uid` and `agent_gid` are the agent's user; without them it runs as the supervisor's
    own (only for development). `trust_workspace_settings` lets agents obey settings files, hooks
    and MCP servers that lie in the workspace. A job is begun at most `max_attempts` times.
    Credentials come from `CLAUDE_CODE_CREDENTIALS_JSON` or the
    secret `claude_credentials`.
    """

    broker_replica_password: Password
    claude_code_credentials_json: SecretStr | None = None
    claude_credentials: SecretStr | None = None
    anthropic_base_url: str = ""
    replica_name: str = Field(default_factory=socket.gethostname)
    agent_uid: int | None = None
    agent_gid: int | None = None
    agent_home: Path = Path("/home/agent")
    claude_path: Path | None = None
    claude_max_retries: Annotated[int, Field(ge=0)] = 10
    trust_workspace_settings: bool = False
    job_timeout_seconds: Annotated[float, Field(gt=0)] = 3600
    max_turns: Annotated[int, Field(ge=1)] = 1000
    max_attempts: Annotated[int, Field(ge=1)] = 3
    idle_timeout_seconds: Annotated[float, Field(gt=0)] = 900
    result_grace_seconds: Annotated[float, Field(gt=0)] = 10


class BrokerSettings(ProcessSettings):
    """The broker's settings: where it keeps its data, and the passwords of its two users.

    `event_bytes` and `session_bytes` are the gateway's, so that what it asks for always fits.
    One of several `broker_servers` finds the others at `broker_routes`, addresses or names with
    commas between them; a name may stand for all of them. `broker_url` is where clients find them.
    It is known by its `node_name`.
    """

    broker_gateway_password: Password
    broker_replica_password: Password
    broker_port: int = 4222
    broker_monitor_port: int = 8222
    broker_servers: ServerCount = 1
    broker_cluster_port: int = 6222
    broker_routes: Annotated[str, Field(pattern=r"\S")] = "nats:6222"
    broker_url: str = "nats://nats:4222"
    node_name: str = Field(default_factory=socket.gethostname, pattern=r"^[-_.a-zA-Z0-9]+$")
    broker_data_dir: Path = Path("/data")
    broker_config_dir: Path = Path("/run/broker")
    event_bytes: EventBytes = 4 * 2**30
    session_bytes: SessionBytes = 2 * 2**30

    @property
    def own_url(self) -> str:
        """Where this server itself is found, from beside it."""
        return f"nats://127.0.0.1:{self.broker_port}"


class BrokerJoinSettings(BrokerSettings):
    """The settings of what runs beside a server of the broker: the server's own."""


class BrokerBackupSettings(BrokerSettings):
    """The settings of what takes a backup beside a server of the broker: the server's own."""


class BrokerRestoreSettings(BrokerSettings):
    """The settings of what makes a server's store out of a backup: the server's own."""


class ModelStubSettings(ProcessSettings):
    """The model stub's settings."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8080


_Settings = TypeVar("_Settings", bound=ProcessSettings)


def load(kind: type[_Settings], *, secrets_dir: Path = DEFAULT_SECRETS_DIR) -> _Settings:
    """Read the settings of one kind of process.

    Raises `SettingsError` with a sentence a setting. An empty variable counts as not set, as a
    stack file cannot leave one out.
    """
    try:
        return kind(
            _env_ignore_empty=True,
            _secrets_dir=secrets_dir if secrets_dir.is_dir() else None,
        )
    except ValidationError as error:
        raise SettingsError("; ".join(_sentences(error))) from None


def _sentences(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(str(part) for part in item['loc']) or 'settings'}: "
        f"{item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_input=False, include_context=False)
    ]
