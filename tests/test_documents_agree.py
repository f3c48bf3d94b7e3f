"""README, stack file, roles and code say the same."""

import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from claude_jobs.contract.event import Event, FailureCode
from claude_jobs.contract.job import JobRequest
from claude_jobs.settings import (
    BrokerSettings,
    GatewaySettings,
    ProcessSettings,
    ReplicaSettings,
)

ROOT = Path(__file__).resolve().parent.parent
ROLES = sorted(path.parent.name for path in (ROOT / "roles").glob("*/defaults"))
README = (ROOT / "README.md").read_text()

# Rendered by the role from facts or from the inventory: their default is no plain word.
COMPUTED = {
    "app_stack_image",
    "app_stack_workspace",
    "app_stack_publish_mode",
    "app_stack_gateway_endpoint_mode",
    "app_stack_gateway_update_order",
}


@cache
def stack_variables() -> dict[str, str]:
    """Every `${NAME:-default}` of the stack files."""
    found: dict[str, str] = {}
    for name in ("swarm.yml", "swarm.demo.yml"):
        for variable, default in re.findall(r"\$\{(\w+):-([^}]*)\}", (ROOT / name).read_text()):
            assert found.setdefault(variable, default) == default, f"{variable} has two defaults"
    return found


def role_file(role: str, name: str) -> Any:
    return yaml.safe_load((ROOT / "roles" / role / name).read_text())


def readme_settings() -> list[tuple[str, str, str]]:
    """Rows of the README's tables: the role's variable, the stack file's, the default."""
    rows = re.findall(
        r"^\| (?:`(app_stack_\w+)`)? ?\| (?:`([A-Z_]+)`)? ?\| (?:`([^`]+)`)? ?\|", README, re.M
    )
    assert len(rows) > 20
    return rows


@pytest.mark.parametrize(("variable", "name", "default"), readme_settings())
def test_a_setting_in_the_readme_is_the_one_of_the_role_and_of_the_stack_file(
    variable: str, name: str, default: str
) -> None:
    if name:
        assert stack_variables()[name] == default
    if variable:
        assert variable in role_file("app_stack", "defaults/main.yml")
    if variable and variable not in COMPUTED:
        value = role_file("app_stack", "defaults/main.yml")[variable]
        assert (str(value).lower() if isinstance(value, bool) else str(value)) == default


def test_the_role_passes_on_only_what_the_stack_file_knows() -> None:
    passed = role_file("app_stack", "vars/main.yml")["__app_stack_environment"]
    assert set(passed) <= set(stack_variables())


# The services of swarm.yml and what their processes read.
PROCESSES: dict[str, type[ProcessSettings]] = {
    "gateway": GatewaySettings,
    "claude-api": ReplicaSettings,
    "nats": BrokerSettings,
}
# Read by the libraries of the application or by the agent itself.
NOT_OURS = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}


@cache
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "swarm.yml").read_text())["services"])


@pytest.mark.parametrize(("service", "process"), PROCESSES.items())
def test_the_stack_file_says_the_defaults_of_the_application(
    service: str, process: type[ProcessSettings]
) -> None:
    for name, value in services()[service]["environment"].items():
        if name in NOT_OURS:
            continue
        default = process.model_fields[name.lower()].default
        if (variable := re.fullmatch(r"\$\{(\w+):-(.*)\}", value)) is not None:
            said = str(default).lower() if isinstance(default, bool) else str(default)
            assert variable.groups() == (name, said), (service, name)


def test_a_setting_of_several_processes_reaches_them_all_from_one_variable() -> None:
    # What every process has, the broker does well without: its log is nats-server's.
    common = ProcessSettings.model_fields.keys()
    for service in PROCESSES:
        for name, value in services()[service]["environment"].items():
            for other, process in PROCESSES.items():
                if name.lower() in process.model_fields.keys() - common:
                    assert services()[other]["environment"].get(name) == value, (other, name)


def test_only_the_gateway_starts_anew_when_tokens_change() -> None:
    users = {
        name
        for name, service in services().items()
        if any(secret["source"] == "api_tokens" for secret in service.get("secrets", []))
    }
    assert users == {"gateway"}
    assert (ROOT / "swarm.yml").read_text().count("API_TOKENS_SECRET") == 1


def test_gateways_and_agents_may_write_in_the_workspace_and_nowhere_else() -> None:
    """Uploads are written by the user who owns the workspace's top, in the agents' group."""
    role = role_file("app_stack", "vars/main.yml")
    owner = f"{role['__app_stack_workspace_owner']}:{role['__app_stack_workspace_group']}"
    gateway = services()["gateway"]
    assert (gateway["user"], gateway["read_only"]) == (owner, True)
    (mount,) = gateway["volumes"]
    assert mount["target"] == str(GatewaySettings.model_fields["workspace_dir"].default)
    assert not mount.get("read_only")
    assert mount in services()["claude-api"]["volumes"]


def test_the_role_sets_every_bound_for_a_number_of_its_own() -> None:
    bounds = role_file("app_stack", "vars/main.yml")["__app_stack_bounds"]
    defaults = role_file("app_stack", "defaults/main.yml")
    for name, bound in bounds.items():
        assert bound["least"] <= defaults[name] <= bound["most"], name


def test_the_stop_grace_is_longer_than_the_longest_job() -> None:
    minutes = re.fullmatch(r"(\d+)m", stack_variables()["STOP_GRACE_PERIOD"])
    assert minutes is not None
    assert int(minutes[1]) * 60 > int(stack_variables()["JOB_TIMEOUT_SECONDS"])


def role_options(role: str) -> dict[str, Any]:
    """What a role takes; one without `main` has verbs that all take the same."""
    specs = role_file(role, "meta/argument_specs.yml")["argument_specs"]
    return dict(specs.get("main", next(iter(specs.values())))["options"])


@pytest.mark.parametrize("role", ROLES)
def test_a_roles_defaults_argument_specs_and_readme_name_the_same_variables(role: str) -> None:
    defaults = role_file(role, "defaults/main.yml") or {}
    options = role_options(role)
    assert set(defaults) == set(options)
    assert all(name.startswith(f"{role}_") for name in defaults)
    readme = (ROOT / "roles" / role / "README.md").read_text()
    in_table = set(re.findall(rf"^\| `({role}_\w+)`", readme, re.M))
    assert set(defaults) == in_table


@pytest.mark.parametrize("role", ROLES)
def test_a_roles_argument_specs_repeat_its_plain_defaults(role: str) -> None:
    defaults = role_file(role, "defaults/main.yml") or {}
    options = role_options(role)
    for name, option in options.items():
        if "default" in option and "{{" not in str(defaults[name]):
            assert option["default"] == defaults[name], name


def test_the_readme_lists_every_field_of_a_request() -> None:
    fields = {field.alias for field in JobRequest.model_fields.values()}
    table = README.split("The request's fields", 1)[1].split("\n\n", 2)[1]
    listed = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert listed == fields


def test_the_readme_lists_every_event_and_every_reason_of_an_error() -> None:
    for kind in get_args(Event):
        assert f"| `{kind.model_fields['type'].default}` |" in README
    words = " ".join(README.split())
    for code in FailureCode:
        assert f"`{code}` (" in words, code


def test_what_the_plays_take_for_unset_is_the_default_of_the_role() -> None:
    """A play does not see a role's defaults, so playbooks/vars/cluster.yml repeats some."""
    text = (ROOT / "playbooks/vars/cluster.yml").read_text()
    repeated = re.findall(r"\{\{ (app_stack_\w+) \| default\('?([^')]*)'?\) \}\}", text)
    assert len(repeated) == text.count("app_stack_")
    defaults = role_file("app_stack", "defaults/main.yml")
    for name, default in repeated:
        assert str(defaults[name]) == default, name


@pytest.mark.parametrize("guide", ["README.md", "docs/*.md", "examples/*", "roles/*/README.md"])
def test_no_guide_names_an_address_that_may_be_ipv6(guide: str) -> None:
    """On ::1 the engine takes connections to a port that Swarm publishes, and never answers."""
    for path in ROOT.glob(guide):
        assert not re.search(r"//localhost\b", path.read_text()), path
