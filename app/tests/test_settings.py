"""Settings come from the environment and from files, and never show what they hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import pytest

from claude_jobs.broker.configuration import MAX_PAYLOAD_BYTES, configuration
from claude_jobs.replica.lines import MAX_EVENT_BYTES
from claude_jobs.settings import (
    BrokerSettings,
    GatewaySettings,
    ModelStubSettings,
    ProcessSettings,
    ReplicaSettings,
    SettingsError,
    load,
)

PASSWORD = "a-password-of-the-broker"
TOKEN = "a-token-of-a-client"
Kind = TypeVar("Kind", bound=ProcessSettings)


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name != "PATH":
            monkeypatch.delenv(name)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    (tmp_path / "broker_gateway_password").write_text(PASSWORD)
    (tmp_path / "broker_replica_password").write_text(f"{PASSWORD}-2")
    (tmp_path / "api_tokens").write_text(json.dumps({"default": TOKEN}))
    return tmp_path


def refusal(kind: type[ProcessSettings], secrets: Path) -> str:
    with pytest.raises(SettingsError) as refused:
        load(kind, secrets_dir=secrets)
    assert PASSWORD not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert refused.value.__cause__ is None
    return str(refused.value)


def test_the_defaults_are_the_documented_ones(secrets: Path) -> None:
    gateway = load(GatewaySettings, secrets_dir=secrets)
    assert (gateway.port, gateway.queue_limit, gateway.job_timeout_seconds) == (3000, 1000, 3600)
    assert gateway.workspace_dir == Path("/workspace")
    assert gateway.node_env == "production"
    assert (gateway.demo_mode, gateway.allow_anonymous) == (False, False)
    replica = load(ReplicaSettings, secrets_dir=secrets)
    assert replica.idle_timeout_seconds == 900
    assert gateway.lease_seconds == replica.lease_seconds == 20
    assert gateway.workspace_mode == "shared"
    assert gateway.max_turns == replica.max_turns == 1000
    assert (replica.max_attempts, replica.trust_workspace_settings) == (3, False)
    assert replica.anthropic_base_url == ""
    assert load(ModelStubSettings, secrets_dir=secrets).port == 8080


def test_secrets_come_from_files(secrets: Path) -> None:
    settings = load(GatewaySettings, secrets_dir=secrets)
    assert settings.broker_gateway_password.current == PASSWORD
    (token,) = settings.api_tokens
    assert (token.client.name, token.secret.get_secret_value()) == ("default", TOKEN)
    assert PASSWORD not in repr(settings)
    assert TOKEN not in repr(settings)


def test_a_password_that_is_changed_is_two_of_which_the_first_is_ones_own(secrets: Path) -> None:
    (secrets / "broker_gateway_password").write_text(f"the-new-password\n{PASSWORD}\n")
    password = load(GatewaySettings, secrets_dir=secrets).broker_gateway_password
    assert password.current == "the-new-password"
    assert password.accepted == ("the-new-password", PASSWORD)
    assert PASSWORD not in repr(password)


@pytest.mark.parametrize("text", ["", " \n", "short", f"{PASSWORD}\nshort"])
def test_a_password_that_is_too_short_is_named_and_not_shown(secrets: Path, text: str) -> None:
    (secrets / "broker_gateway_password").write_text(text)
    said = refusal(GatewaySettings, secrets)
    assert "broker_gateway_password: must be a password of at least 16 characters" in said
    assert PASSWORD not in said


def test_an_empty_variable_counts_as_not_set(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PORT", "QUEUE_LIMIT", "ANTHROPIC_BASE_URL", "IDLE_TIMEOUT_SECONDS", "API_TOKENS"):
        monkeypatch.setenv(name, "")
    assert load(GatewaySettings, secrets_dir=secrets).port == 3000
    assert load(ReplicaSettings, secrets_dir=secrets).idle_timeout_seconds == 900


@pytest.mark.parametrize("tokens", [None, "{}", ""])
def test_a_gateway_without_tokens_says_what_to_do(secrets: Path, tokens: str | None) -> None:
    (secrets / "api_tokens").unlink()
    if tokens is not None:
        (secrets / "api_tokens").write_text(tokens)
    said = refusal(GatewaySettings, secrets)
    assert "the secret api_tokens is missing or empty" in said
    assert "ALLOW_ANONYMOUS=true" in said


def test_a_gateway_lets_everybody_in_only_on_purpose(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (secrets / "api_tokens").unlink()
    monkeypatch.setenv("ALLOW_ANONYMOUS", "true")
    assert not load(GatewaySettings, secrets_dir=secrets).api_tokens


def test_a_short_token_is_named_and_not_shown(secrets: Path) -> None:
    (secrets / "api_tokens").write_text(json.dumps({"default": TOKEN, "ci": "s3cret"}))
    said = refusal(GatewaySettings, secrets)
    assert "api_tokens: the token of the entry 'ci' has fewer than 16 characters" in said
    assert "s3cret" not in said


@pytest.mark.parametrize("tokens", [f'{{"default": "{TOKEN}"', f'["{TOKEN}"]', TOKEN])
def test_tokens_of_another_form_are_not_shown(secrets: Path, tokens: str) -> None:
    (secrets / "api_tokens").write_text(tokens)
    assert "api_tokens" in refusal(GatewaySettings, secrets)


def test_every_wrong_setting_is_named(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setenv("QUEUE_LIMIT", "0")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    said = refusal(GatewaySettings, secrets)
    assert {sentence.split(":")[0] for sentence in said.split("; ")} == {
        "port",
        "queue_limit",
        "log_level",
    }


def test_a_missing_or_short_password_is_named(secrets: Path) -> None:
    (secrets / "broker_replica_password").write_text("short")
    assert "broker_replica_password" in refusal(ReplicaSettings, secrets)
    (secrets / "broker_replica_password").unlink()
    assert "broker_replica_password: Field required" in refusal(ReplicaSettings, secrets)
    assert "broker_replica_password" in refusal(ReplicaSettings, secrets / "nothing")


def test_a_process_that_cannot_start_says_why_in_a_line(secrets: Path) -> None:
    (secrets / "api_tokens").unlink()
    ended = subprocess.run(
        [sys.executable, "-m", "claude_jobs", "gateway"],
        env={"PATH": os.environ["PATH"], "SECRETS_DIR": str(secrets)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == 78
    assert ended.stderr.startswith("gateway cannot start: settings: the secret api_tokens")
    assert len(ended.stderr.splitlines()) == 1


# The broker's configuration


def broker(secrets: Path, version: tuple[int, int] = (2, 10)) -> dict[str, object]:
    found = json.loads(configuration(load(BrokerSettings, secrets_dir=secrets), version))
    assert isinstance(found, dict)
    return found


def test_each_role_has_its_own_rights(secrets: Path) -> None:
    authorization = broker(secrets)["authorization"]
    assert isinstance(authorization, dict)
    # The name tells the password, too.
    users = {user["user"].rpartition("-")[0]: user for user in authorization["users"]}
    assert len(users) == len(authorization["users"])
    assert users.keys() == {"gateway", "replica", "broker"}
    assert len({user["password"] for user in users.values()}) == 3
    for name, user in users.items():
        assert user["permissions"]["subscribe"] == {"allow": [f"_INBOX_{name}.>"]}
    replica = users["replica"]["permissions"]["publish"]["allow"]
    assert not any(subject.startswith("jobs.") for subject in replica)
    assert not any(subject in {">", "$JS.API.>", "$KV.>"} for subject in replica)
    assert not any("STREAM.CREATE" in subject or "PURGE" in subject for subject in replica)
    gateway = users["gateway"]["permissions"]["publish"]
    assert gateway["deny"] == [
        "$JS.API.CONSUMER.MSG.NEXT.JOBS.>",
        "$JS.API.STREAM.SNAPSHOT.>",
        "$JS.API.STREAM.RESTORE.>",
    ]


def test_while_a_password_is_changed_both_are_good_and_nothing_else_differs(secrets: Path) -> None:
    (secrets / "broker_replica_password").write_text(f"the-new-password\n{PASSWORD}\n")
    authorization = broker(secrets)["authorization"]
    assert isinstance(authorization, dict)
    new, old = (each for each in authorization["users"] if each["user"].startswith("replica-"))
    assert (new["password"], old["password"]) == ("the-new-password", PASSWORD)
    assert new["user"] != old["user"]
    assert new["permissions"] == old["permissions"]


def test_what_is_accepted_is_on_disk_where_the_server_can(secrets: Path) -> None:
    for version, always in (((2, 9), None), ((2, 10), "always"), ((2, 11), "always")):
        jetstream = broker(secrets, version)["jetstream"]
        assert isinstance(jetstream, dict)
        assert jetstream.get("sync_interval") == always


def test_only_the_clients_port_is_open_to_others(secrets: Path) -> None:
    made = broker(secrets)
    assert made["listen"] == "0.0.0.0:4222"
    assert made["http"] == "127.0.0.1:8222"


def test_a_lone_server_is_what_it_was(secrets: Path) -> None:
    made = broker(secrets)
    assert made["server_name"] == "nats"
    assert isinstance(made["jetstream"], dict)
    assert made["jetstream"]["store_dir"] == "/data"
    assert "cluster" not in made


@pytest.mark.parametrize(
    ("servers", "given", "routes"),
    [
        ("3", "", ["nats:6222/0", "nats:6222/1", "nats:6222/2"]),
        ("3", "a:1, b:2,nats://c:3", ["a:1/0", "b:2/0", "c:3/0"]),
        ("5", "a:1,b:2", ["a:1/0", "b:2/0", "a:1/1", "b:2/1", "a:1/2", "b:2/2"]),
    ],
)
def test_several_servers_know_how_many_they_are_and_let_nobody_else_in(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, servers: str, given: str, routes: list[str]
) -> None:
    monkeypatch.setenv("BROKER_SERVERS", servers)
    monkeypatch.setenv("BROKER_ROUTES", given)
    monkeypatch.setenv("NODE_NAME", "manager-1.example")
    made = broker(secrets)
    assert made["server_name"] == "nats-manager-1.example"
    assert isinstance(made["jetstream"], dict)
    assert made["jetstream"]["store_dir"] == "/data/cluster"
    cluster = made["cluster"]
    assert isinstance(cluster, dict)
    assert cluster["listen"] == "0.0.0.0:6222"
    # One connection between two; older servers know nothing else, and not the word.
    assert cluster["pool_size"] == -1
    assert "pool_size" not in broker(secrets, version=(2, 9))["cluster"]  # type: ignore[operator]
    password = cluster["authorization"]["password"]
    assert cluster["routes"] == [f"nats-route://route:{password}@{route}" for route in routes]
    assert isinstance(made["authorization"], dict)
    assert password not in {user["password"] for user in made["authorization"]["users"]}


@pytest.mark.parametrize("kind", [BrokerSettings, GatewaySettings])
@pytest.mark.parametrize("servers", ["0", "2", "4", "-3"])
def test_a_number_of_servers_without_a_clear_majority_is_refused(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ProcessSettings], servers: str
) -> None:
    monkeypatch.setenv("BROKER_SERVERS", servers)
    said = refusal(kind, secrets)
    assert said == "broker_servers: must be 1, 3 or 5: several servers decide by majority"


def test_the_longest_line_fits_into_a_message() -> None:
    assert MAX_EVENT_BYTES < MAX_PAYLOAD_BYTES
