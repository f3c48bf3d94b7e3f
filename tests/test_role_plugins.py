"""What the roles' own Python promises: the wait for a stack, the port's holders, secrets."""

import base64
import importlib.util
import json
import math
import re
import secrets
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from nacl.secret import SecretBox

from claude_jobs.api_tokens import parse_api_tokens

ROLES = Path(__file__).resolve().parent.parent / "roles"
Json = dict[str, Any]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROLES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


convergence = load("app_stack/library/stack_convergence.py")
engine_lists = load("app_stack/filter_plugins/engine_lists.py")
credentials = load("docker_secrets/filter_plugins/claude_credentials.py")
tokens = load("docker_secrets/filter_plugins/api_tokens.py")
manager_key = load("swarm_manager/filter_plugins/manager_key.py")

NEW, OLD = {"ContainerSpec": {"Image": "pool:2"}}, {"ContainerSpec": {"Image": "pool:1"}}
STACK = "com.docker.stack.namespace"
STUCK = ("paused", "rollback_started", "rollback_paused", "rollback_completed")
NO_LOGS = SimpleNamespace(logs=lambda _: [])


def service(wanted: int | None = 1, name: str = "pool_api", **more: Any) -> Json:
    mode = {"Global": {}} if wanted is None else {"Replicated": {"Replicas": wanted}}
    return {"ID": name, "Spec": {"Name": name, "TaskTemplate": NEW, "Mode": mode}, **more}


def task(state: str, slot: int = 1, *, at: int = 0, spec: Json = NEW, **status: Any) -> Json:
    return {
        "ID": f"{slot}-{at}",
        "ServiceID": "pool_api",
        "Slot": slot,
        "CreatedAt": f"2026-01-01T00:00:{at:02}Z",
        "DesiredState": "running" if state in ("starting", "running") else "shutdown",
        "Spec": spec,
        "Status": {"State": state, **status},
    }


def looked(one: Json, *looks: list[Json], one_shot: bool = False, rolled_back: bool = False) -> Any:
    watch = convergence.StackWatch(
        one_shot=frozenset({"pool_api"} if one_shot else ()), rolled_back=rolled_back
    )
    for tasks in looks:
        watch.look([one], tasks)
    return watch


def converges(one: Json, *looks: list[Json], one_shot: bool = False) -> bool:
    return bool(looked(one, *looks, one_shot=one_shot).converged)


def test_a_stack_converges_when_every_wanted_replica_is_healthy() -> None:
    watch = looked(service(2), [task("running", 1), task("running", 2)])
    assert watch.converged and convergence.problems(watch, [service(2)], [], NO_LOGS) == []
    assert not converges(service(2), [task("running", 1)])
    assert not converges(service(2), [task("running", 1), task("starting", 2)])
    assert not converges(service(1), [task("running", 1), task("running", 2)])


def test_a_stack_without_services_or_with_one_that_has_no_replica_yet_does_not_converge() -> None:
    watch = looked(service())
    assert not watch.converged
    assert convergence.problems(watch, [], [], NO_LOGS) == ["It has no services."]
    watch.look([service(), service(name="pool_nats")], [task("running")])
    assert not watch.converged


def test_a_replica_of_an_older_spec_does_not_count_and_is_counted_as_draining() -> None:
    old = {**task("running", spec=OLD), "DesiredState": "shutdown"}
    watch = looked(service(), [old])
    assert (watch.converged, watch.draining) == (False, 1)
    assert watch.summary()["pool_api"] == {"wanted": 1, "running": 0, "starting": 0}
    watch.look([service()], [old, task("running", at=1)])
    assert (watch.converged, watch.draining) == (True, 1)
    assert not converges(service(), [task("running", spec=OLD)])


def test_what_the_engine_leaves_out_and_where_a_task_may_run_make_no_other_spec() -> None:
    written = {**NEW, "Placement": {"Constraints": ["node.role==manager"]}, "Networks": []}
    assert converges(service(), [task("running", spec={**written, "ForceUpdate": 0})])
    assert not converges(service(), [task("running", spec={**NEW, "ForceUpdate": 1})])


def test_a_replaced_replica_keeps_the_credit_of_its_slot_and_a_failed_one_takes_it_away() -> None:
    healthy, next_one = [task("running")], task("starting", at=9)
    assert converges(service(), healthy, [next_one])
    for state in ("failed", "rejected", "orphaned", "complete"):
        assert not converges(service(), healthy, [task(state, at=1), next_one]), state
    assert converges(service(), healthy, [task("failed", at=1), task("running", at=2)])
    assert not converges(service(), [next_one, task("failed", at=1), task("running")])  # any order


def test_a_busy_pool_converges_although_its_replicas_are_never_all_healthy_at_once() -> None:
    first = [task("running", 1), task("starting", 2)]
    then = [task("complete", 1), task("starting", 1, at=1), task("running", 2)]
    assert not converges(service(2), first, one_shot=True)
    assert converges(service(2), first, then, one_shot=True)
    never_healthy = [task("complete"), task("starting", at=1)]
    assert converges(service(), never_healthy, one_shot=True)
    assert not converges(service(), never_healthy)
    assert not converges(service(), [task("complete")], one_shot=True)


@pytest.mark.parametrize("state", STUCK)
def test_an_update_is_waited_for_until_it_is_paused_or_rolled_back(state: str) -> None:
    one = service(UpdateStatus={"State": state, "Message": "task 7 failed"})
    watch = looked(one, [task("running")])
    assert (watch.stuck, watch.converged) == (True, False)
    (problem,) = convergence.problems(watch, [one], [task("running")], NO_LOGS)
    assert f"its update is {state}: task 7 failed" in problem
    watch.look([service(UpdateStatus={"State": "updating"})], [task("running")])
    assert (watch.stuck, watch.converged) == (False, False)


def test_a_spec_of_which_every_task_fails_is_given_up_and_one_that_has_run_is_not() -> None:
    failures = [task("failed", at=number) for number in range(6)]
    before = task("running", spec=OLD)
    assert not looked(service(), [before, *failures[:5]]).stuck
    assert looked(service(), [before, *failures[:3]], [before, *failures[3:]]).stuck
    assert not looked(service(), [task("running")], failures).stuck
    assert not looked(service(), [*failures, task("running", slot=2)]).stuck


def test_after_a_rollback_what_was_rolled_back_counts() -> None:
    done = service(UpdateStatus={"State": "rollback_completed"})
    assert not looked(done, [task("running")]).converged
    assert looked(done, [task("running")], rolled_back=True).converged
    under_way = service(UpdateStatus={"State": "rollback_started"})
    assert not looked(under_way, [task("running")], rolled_back=True).converged
    assert not looked(under_way, [task("running")], rolled_back=True).stuck


def test_a_service_that_wants_nothing_converges_when_nothing_is_left() -> None:
    assert converges(service(0), []) and not converges(service(0), [task("running")])


def test_a_global_service_converges_when_its_replica_on_every_node_is_healthy() -> None:
    nodes = [{**task("running", 0), "NodeID": node} for node in ("a", "b")]
    assert converges(service(None), nodes)
    assert not converges(service(None), [*nodes, {**task("starting", 0), "NodeID": "c"}])
    assert not converges(service(None), [])


def test_a_problem_names_each_error_once_and_the_log_of_the_last_replica_that_left_one() -> None:
    tasks = [
        task("failed", at=1, Err="exit 1", ContainerStatus={"ContainerID": "one"}),
        task("failed", at=2, Err="exit 1", ContainerStatus={"ContainerID": "two"}),
        task("failed", at=3, Err="exit 1", ContainerStatus={"ContainerID": "gone"}),
        task("rejected", at=4, Message="no such image"),
        task("failed", at=0, spec=OLD, Err="an old error"),
        task("starting", at=5),
    ]
    watch = looked(service(), tasks)
    log = {"one": ["first log"], "two": ["a last line", "and one more"]}
    engine = SimpleNamespace(logs=lambda container: log.get(container, []))
    assert convergence.problems(watch, [service()], tasks, engine) == [
        "pool_api: 0 of 1 healthy with the newest spec, 1 starting\n"
        "  failed: exit 1\n  rejected: no such image\n  log: a last line\n  log: and one more"
    ]


def test_a_log_is_read_with_and_without_the_engines_frames() -> None:
    framed = b"\1\0\0\0\0\0\0\4out\n\2\0\0\0\0\0\0\4err\n"
    assert convergence._demultiplex(framed) == b"out\nerr\n"
    assert convergence._demultiplex(b"a terminal's\n") == b"a terminal's\n"


OURS, FREE = {STACK: "pool"}, '0.0.0.0:3000 users:(("{}",pid={},fd=4))'


def container(labels: Json | None = None, kind: str = "tcp") -> Json:
    ports = [{"PrivatePort": 80, "Type": "tcp"}, {"PublicPort": 3000, "Type": kind}]
    return {"Id": "0123456789abcdef", "Names": ["/web"], "Labels": labels, "Ports": ports}


def published(labels: Json | None = None, kind: str = "tcp") -> Json:
    ports = [{"PublishedPort": 3000, "Protocol": kind}]
    return {"Spec": {"Name": "web_front", "Labels": labels}, "Endpoint": {"Ports": ports}}


@pytest.mark.parametrize(
    "case",
    [
        ([{**container(), "Ports": [{"PublicPort": 3001}]}], [], [], []),
        ([container(OURS)], [published(OURS)], [FREE.format("docker-proxy", 7)], []),
        ([], [published(OURS)], ["0.0.0.0:3000"], []),  # ss without root names no process
        ([container()], [], [FREE.format("docker-proxy", 7)], ["the container web"]),
        ([{**container(), "Names": None}], [], [], ["the container 0123456789ab"]),
        ([], [published({STACK: "web"})], [], ["the swarm service web_front"]),
        ([], [], [FREE.format("nginx", 42)] * 2, ["nginx (process 42)"]),
        ([], [published(OURS)], [FREE.format("nginx", 42)], ["nginx (process 42)"]),
        ([], [], [FREE.format("dockerd", 7)], ["dockerd (process 7)"]),
        ([], [], ["0.0.0.0:3000"], ["an unknown process"]),
        ([{"Id": "1", "Ports": None}], [{"Spec": {"Name": "inner"}}], [], []),
        ([container(kind="udp")], [published(kind="udp")], [], []),
    ],
)
def test_a_port_is_held_by_whatever_is_not_ours(case: tuple[list[Any], ...]) -> None:
    *lists, holders = case
    assert engine_lists.port_holders(3000, "pool", *lists) == holders


def agent_node(cpus: int, gib: int, **more: Any) -> Json:
    resources = {"NanoCPUs": cpus * 10**9, "MemoryBytes": gib << 30}
    return {
        "Description": {"Resources": resources},
        "Spec": {"Availability": "active", "Labels": {"agents": "true"}},
        "Status": {"State": "ready"},
        **more,
    }


def test_replicas_fit_on_the_nodes_that_may_have_them_by_what_is_set_aside() -> None:
    template = {
        "Resources": {"Reservations": {"NanoCPUs": 250_000_000, "MemoryBytes": 512 << 20}},
        "Placement": {"Constraints": ["node.labels.agents == true"]},
    }
    pool = {"Spec": {"TaskTemplate": template}}
    others = [
        agent_node(8, 8, Spec={"Availability": "active", "Labels": {}}),
        agent_node(8, 8, Spec={"Availability": "drain", "Labels": {"agents": "true"}}),
        agent_node(8, 8, Status={"State": "down"}),
    ]
    # By its CPUs the first has room for 8, by its memory the second for 4.
    assert engine_lists.replica_room([agent_node(2, 8), agent_node(2, 2), *others], pool) == 12
    assert engine_lists.replica_room(others, pool) == 0
    assert engine_lists.replica_room([agent_node(1, 1)], {}) == 9999


def test_only_what_a_deployment_changed_is_rolled_back() -> None:
    before = [{"ID": name, "Spec": {"Name": name, "Image": 1}} for name in ("a", "b")]
    now = [
        before[0],
        {"ID": "b", "Spec": {"Name": "b", "Image": 2}, "PreviousSpec": before[1]["Spec"]},
        {"ID": "c", "Spec": {"Name": "c", "Image": 2}},
    ]
    assert engine_lists.changed_services(now, before) == ["b"]


def test_a_stacks_services_are_those_with_its_label() -> None:
    assert engine_lists.stack_services([published(OURS), published()], "pool") == ["web_front"]


SECRET, NOW = "sk-ant-do-not-show", 1_800_000_000.0


def oauth(**more: Any) -> Json:
    return {"claudeAiOauth": {"scopes": [], "accessToken": SECRET, **more}}


NO_TIME = "hold a claudeAiOauth.expiresAt that is not a number of milliseconds"
ENDLESS = [{"apiKey": SECRET}, {"oauthToken": SECRET}, oauth(), oauth(expiresAt=None)]


@pytest.mark.parametrize("value", [*ENDLESS, oauth(expiresAt=(NOW + 25 * 3600) * 1000)])
def test_each_form_of_credentials_is_kept_as_it_is_given_as_text_and_as_object(value: Json) -> None:
    good = {"problem": "", "warning": "", "content": json.dumps(value, sort_keys=True)}
    for given in (value, json.dumps(value), json.dumps(value, indent=2)):
        assert credentials.claude_credentials(given, NOW) == good


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (SECRET, "are not JSON. Give"),
        ([SECRET], "are JSON, but not an object"),
        ({}, "have an unknown form"),
        ({"apiKey": SECRET, SECRET: SECRET}, "have an unknown form"),
        ({"apiKey": SECRET, "oauthToken": SECRET}, "have an unknown form"),
        ({"apiKey": [SECRET]}, "do not have a string as their apiKey."),
        ({"oauthToken": " "}, "hold an empty oauthToken."),
        ({"apiKey": f"{SECRET}\n"}, "have white space in their apiKey; "),
        ({"claudeAiOauth": SECRET}, "hold a claudeAiOauth that is not an object."),
        ({"claudeAiOauth": {"token": SECRET}}, "hold a claudeAiOauth without an accessToken."),
        (oauth(accessToken=""), "hold an empty claudeAiOauth.accessToken."),
        *((oauth(expiresAt=end), "have expired") for end in (0, -1, NOW * 1000)),
        *((oauth(expiresAt=end), NO_TIME) for end in (SECRET, True, math.nan, math.inf, 10**400)),
    ],
)
def test_credentials_are_refused_without_quoting_them(value: object, sentence: str) -> None:
    judged = credentials.claude_credentials(value, NOW)
    assert judged["problem"].startswith(sentence)
    assert SECRET not in judged["problem"]
    assert (judged["warning"], judged["content"]) == ("", "")


def test_credentials_that_expire_soon_are_kept_and_warned_of_without_quoting_them() -> None:
    value = oauth(expiresAt=(NOW + 5400) * 1000)
    judged = credentials.claude_credentials(value, NOW)
    assert judged["warning"].startswith("expire in 1.5 hours;")
    assert SECRET not in judged["warning"]
    assert (judged["problem"], json.loads(judged["content"])) == ("", value)
    assert credentials.claude_credentials(value, NOW, warn_hours=1)["warning"] == ""


TOKEN, OTHER = "sk-a-token-not-to-show", "sk-another-token-not-to-show"
LIMITED = {"token": OTHER, "maxRunning": 2, "maxQueued": 1}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"me": TOKEN}, {"me": TOKEN}),
        ({"me": {"token": TOKEN}}, {"me": TOKEN}),
        ({"me": {"token": TOKEN, "maxQueued": None}}, {"me": TOKEN}),
        ({"team_1": LIMITED, "CI-2": TOKEN}, {"CI-2": TOKEN, "team_1": LIMITED}),
    ],
)
def test_each_form_of_tokens_is_written_as_the_gateway_reads_it(given: Json, written: Json) -> None:
    content = json.dumps(written, sort_keys=True)
    for value in (given, json.dumps(given)):
        assert tokens.api_tokens(value) == {"problem": "", "content": content}
    assert {token.client.name for token in parse_api_tokens(content)} == given.keys()


@pytest.mark.parametrize(
    "value",
    [
        TOKEN,
        f'{{"me": "{TOKEN}"',
        [TOKEN],
        f'{{"me": "{TOKEN}", "me": "{OTHER}"}}',
        *({name: TOKEN} for name in ("", "a b", "a.b", "é", "a\n", "x" * 65)),
        *(
            {"ci": entry}
            for entry in (None, 5, [TOKEN], {}, {"token": [TOKEN]}, LIMITED | {TOKEN: 1})
        ),
        *({"ci": secret} for secret in (TOKEN[:15], f"{TOKEN}\n", f"{TOKEN} {TOKEN}", f"{TOKEN}é")),
        *({"ci": LIMITED | {"maxRunning": limit}} for limit in (0, -1, 1.5, True, "2", [2])),
        {"ci": LIMITED | {"maxQueued": 0}},
        {"a": TOKEN, "b": OTHER, "c": {"token": TOKEN}},
    ],
)
def test_the_role_refuses_tokens_with_the_sentence_of_the_gateway(value: object) -> None:
    judged = tokens.api_tokens(value)
    assert judged["problem"] and judged["content"] == ""
    with pytest.raises(ValueError, match=f"^{re.escape(judged['problem'])}$"):
        parse_api_tokens(value if isinstance(value, str) else json.dumps(value))
    assert TOKEN[:15] not in judged["problem"]
    assert OTHER not in judged["problem"]


@pytest.mark.parametrize("value", [{1: TOKEN}, {True: TOKEN}])
def test_a_name_that_yaml_takes_for_something_else_is_refused(value: Json) -> None:
    assert "is no text; put it into quotes" in tokens.api_tokens(value)["problem"]


@pytest.mark.parametrize("value", ["{}", {}])
def test_no_tokens_at_all_are_refused(value: object) -> None:
    assert tokens.api_tokens(value)["problem"].startswith("is empty; give {")


def locked_key(unlock_key: bytes, raft_key: bytes) -> str:
    """Write a key as SwarmKit does for a manager that is locked at rest."""
    pem = (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(unlock_key),
        )
        .decode()
    )
    sealed = SecretBox(unlock_key).encrypt(raft_key)
    record = b"\x08\x01\x12\x30" + sealed.ciphertext + b"\x1a\x18" + sealed.nonce
    begin, rest = pem.split("\n", 1)
    dek = base64.b64encode(record).decode()
    return f"{begin}\nkek-version: 75\nraft-dek: {dek}\n\n{rest}"


def readable(unlock_key: bytes) -> str:
    return "SWMKEY-1-" + base64.b64encode(unlock_key).decode().rstrip("=")


def test_the_key_of_a_locked_manager_is_opened_for_a_new_cluster() -> None:
    unlock_key, raft_key = secrets.token_bytes(32), secrets.token_bytes(32)
    locked = locked_key(unlock_key, raft_key)
    assert manager_key.swarm_key_problem(locked, readable(unlock_key)) == ""
    opened = manager_key.swarm_key_opened(locked, readable(unlock_key) + "\n")
    begin, version, dek, empty, *body = opened.splitlines()
    assert (begin, version, empty) == ("-----BEGIN PRIVATE KEY-----", "kek-version: 0", "")
    assert base64.b64decode(dek.removeprefix("raft-dek: ")) == b"\x12\x20" + raft_key
    serialization.load_pem_private_key("\n".join([begin, *body, ""]).encode(), None)
    assert manager_key.swarm_key_opened(opened, "") == opened


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "no unlock key was given"),
        ("SWMKEY-1-tooshort", "no unlock key was given"),
        (readable(bytes(32)), "does not open"),
    ],
)
def test_an_unlock_key_that_opens_nothing_is_named_and_not_quoted(given: str, said: str) -> None:
    problem = manager_key.swarm_key_problem(locked_key(b"k" * 32, b"r" * 32), given)
    assert said in problem
    assert not given or given not in problem


def test_a_manager_key_of_another_form_is_refused() -> None:
    older = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
    assert "not known" in manager_key.swarm_key_problem(older, readable(bytes(32)))
