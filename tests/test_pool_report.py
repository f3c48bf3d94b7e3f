"""What the role pool_status says of a pool, and what it calls a problem."""

import importlib.util
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).resolve().parent.parent / "roles/pool_status/filter_plugins/pool_report.py"
spec = importlib.util.spec_from_file_location("pool_report", PLUGIN)
assert spec is not None and spec.loader is not None
status = importlib.util.module_from_spec(spec)
spec.loader.exec_module(status)

Json = dict[str, Any]
SOURCE = "192.168.77.11:/srv/claude-code/workspace"
IMAGE = "sha256:" + "a" * 64


def engine_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.123456789Z")


def machine(name: str) -> Json:
    """What a node says itself."""
    expires = datetime.now(UTC) + timedelta(days=60)
    return {
        "info": {
            "ServerVersion": "26.1.5",
            "Swarm": {"NodeID": f"id-{name}", "LocalNodeState": "active"},
        },
        "gateways": [],
        "disk": "8000 20000",
        "mount": {"filesystems": [{"source": SOURCE, "fstype": "nfs4"}]} if name != "m" else {},
        "workspace_answers": True,
        "agent": True,
        "certificate": expires.strftime("notAfter=%b %d %H:%M:%S %Y GMT"),
    }


def node(name: str) -> Json:
    """What the managers know of it."""
    manager = {"ManagerStatus": {"Leader": True, "Reachability": "reachable"}}
    return {
        "ID": f"id-{name}",
        "Description": {"Hostname": name, "Engine": {"EngineVersion": "26.1.5"}},
        "Spec": {"Role": "worker", "Availability": "active", "Labels": {}},
        "Status": {"State": "ready"},
        **(manager if name == "m" else {}),
    }


def service(name: str, replicas: int, *environment: str) -> Json:
    return {
        "ID": f"id-{name}",
        "Spec": {
            "Name": f"claude-code-stack_{name}",
            "Labels": {"com.docker.stack.namespace": "claude-code-stack"},
            "Mode": {"Replicated": {"Replicas": replicas}},
            "TaskTemplate": {"ContainerSpec": {"Image": IMAGE, "Env": list(environment)}},
        },
    }


def task(name: str, state: str = "running", desired: str = "running") -> Json:
    return {
        "ServiceID": f"id-{name}",
        "DesiredState": desired,
        "Status": {"State": state},
        "Spec": {"ContainerSpec": {"Image": IMAGE}},
    }


@pytest.fixture
def seen() -> Json:
    """A pool of two nodes in which all is well, as the filter is given it."""
    made = engine_time(datetime.now(UTC) - timedelta(days=3))
    return {
        "nodes": {"m": machine("m"), "w": machine("w")},
        "swarm": {
            "nodes": [node("m"), node("w")],
            "services": [
                service("gateway", 1, f"WORKSPACE_SOURCE={SOURCE}", "WORKSPACE_HOST=m"),
                service("claude-api", 2),
                service("nats", 1, "BROKER_SERVERS=1"),
            ],
            "tasks": [task("gateway"), task("claude-api"), task("claude-api"), task("nats")],
            "secrets": [{"Spec": {"Name": "claude-code-stack_api_tokens_v1"}, "CreatedAt": made}],
        },
        "report": {
            "replicas": [{"replica": "r", "node": "w", "status": "idle"}],
            "waiting": 0,
            "unfinished": 0,
            "queueLimit": 1000,
            "streams": [
                {
                    "name": "JOBS",
                    "messages": 0,
                    "bytes": 0,
                    "copies": 1,
                    "leader": "n",
                    "behind": [],
                }
            ],
        },
        "wanted": {
            "addresses": {},
            "stack": "claude-code-stack",
            "disk_mb": 2048,
            "certificate_days": 7,
            "secret_days": 180,
        },
    }


def judged(seen: Json) -> Json:
    found: Json = status.pool_report(**seen)
    assert found["well"] is not bool(found["problems"])
    # Whatever is known, there is a screen.
    screen = status.pool_screen(found)
    assert ("All is well." in screen) is found["well"]
    return found


def the_problem(seen: Json) -> str:
    (problem,) = judged(seen)["problems"]
    return str(problem)


def test_a_pool_in_which_all_is_well(seen: Json) -> None:
    found = judged(seen)
    assert found["problems"] == found["warnings"] == []
    assert [row["workspace"] for row in found["nodes"]] == ["directory", SOURCE]
    assert [row["role"] for row in found["nodes"]] == ["leader", "worker"]
    assert found["nodes"][0]["certificate_days"] == pytest.approx(60, abs=0.1)
    assert found["secrets"] == [{"name": "claude-code-stack_api_tokens_v1", "age_days": 3.0}]


def test_a_node_that_is_down_and_not_reached(seen: Json) -> None:
    seen["nodes"]["w"] = {}
    seen["swarm"]["nodes"][1]["Status"]["State"] = "down"
    assert "remove_node.yml -e node=w" in the_problem(seen)


def test_a_node_that_works_but_is_not_reached(seen: Json) -> None:
    seen["nodes"]["w"] = {}
    assert "look at its ssh" in the_problem(seen)


def test_a_machine_that_has_not_joined(seen: Json) -> None:
    seen["nodes"]["x"] = machine("x")
    assert the_problem(seen).startswith("x is not in the swarm: run site.yml")


def test_a_locked_manager(seen: Json) -> None:
    locked = machine("x")
    locked["info"]["Swarm"] = {"LocalNodeState": "locked", "NodeID": ""}
    seen["nodes"]["x"] = locked
    assert the_problem(seen).startswith("x is locked: unlock it")


def test_a_node_that_is_not_in_the_inventory(seen: Json) -> None:
    del seen["nodes"]["w"]
    assert "w is in the swarm, but not in the inventory" in the_problem(seen)


def test_a_drained_node_is_a_warning(seen: Json) -> None:
    seen["swarm"]["nodes"][1]["Spec"]["Availability"] = "drain"
    (warning,) = judged(seen)["warnings"]
    assert "activate_node.yml -e node=w" in warning


def test_an_engine_without_its_agent_of_the_network(seen: Json) -> None:
    seen["nodes"]["w"]["agent"] = False
    assert "w's engine has no agent of the network between containers" in the_problem(seen)


def test_little_room_on_the_disk(seen: Json) -> None:
    seen["nodes"]["w"]["disk"] = "2047 20000"
    assert "w has 2047 MB free" in the_problem(seen)


def test_a_file_server_that_is_silent(seen: Json) -> None:
    seen["nodes"]["w"]["workspace_answers"] = False
    assert "w has no answer from its workspace" in the_problem(seen)


def test_a_directory_in_place_of_the_workspace(seen: Json) -> None:
    seen["nodes"]["w"]["mount"] = {}
    assert f"w has a directory in place of the workspace {SOURCE}" in the_problem(seen)


def test_a_certificate_that_was_not_renewed(seen: Json) -> None:
    seen["nodes"]["w"]["certificate"] = (datetime.now(UTC) + timedelta(days=2)).strftime(
        "notAfter=%b %d %H:%M:%S %Y GMT"
    )
    assert "w's certificate in the swarm ends in 2" in the_problem(seen)


def test_missing_tasks_and_why(seen: Json) -> None:
    seen["swarm"]["tasks"][1]["Status"] = {"State": "failed", "Err": "no such image"}
    assert the_problem(seen) == "claude-code-stack_claude-api has 1 of 2 tasks (no such image)."


def test_a_replica_that_starts_again_is_no_problem(seen: Json) -> None:
    seen["swarm"]["tasks"][1] = task("claude-api", "starting")
    assert judged(seen)["well"]


def test_replicas_that_finish_their_job_are_counted_apart(seen: Json) -> None:
    seen["swarm"]["tasks"].append(task("claude-api", desired="shutdown"))
    found = judged(seen)
    assert found["well"]
    assert "1 tasks of the version before finish" in found["warnings"][0]


def test_an_update_that_stopped(seen: Json) -> None:
    seen["swarm"]["services"][0]["UpdateStatus"] = {"State": "paused", "Message": "too bad"}
    assert "its update is paused (too bad)" in the_problem(seen)


def test_an_update_that_was_rolled_back_is_told_and_no_fault(seen: Json) -> None:
    seen["swarm"]["services"][0]["UpdateStatus"] = {"State": "rollback_completed", "Message": "bad"}
    (warning,) = judged(seen)["warnings"]
    assert "was rolled back, it runs as before it (bad)" in warning


def test_no_manager_that_answers(seen: Json) -> None:
    seen["swarm"], seen["report"] = {}, {}
    problems = judged(seen)["problems"]
    assert any("No manager answers" in problem for problem in problems)


def test_a_swarm_without_the_pool(seen: Json) -> None:
    seen["swarm"]["services"], seen["report"] = [], {}
    assert the_problem(seen) == "There is no pool in this swarm: run site.yml."


def test_no_gateway_that_tells(seen: Json) -> None:
    seen["report"] = {}
    assert "No gateway tells of the pool" in the_problem(seen)


def test_a_replica_that_takes_no_job(seen: Json) -> None:
    seen["report"]["replicas"][0]["fault"] = "the workspace is not the shared one"
    assert "A replica on w takes no job: the workspace is not" in the_problem(seen)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"leader": None}, "has no leader"),
        ({"behind": ["nats-b"]}, "not whole on nats-b"),
        ({"copies": 3}, "has 3 of 1 copies"),
    ],
)
def test_a_stream_that_is_not_whole(seen: Json, change: Json, said: str) -> None:
    seen["report"]["streams"][0] |= change
    assert said in the_problem(seen)


def test_what_is_old_full_or_even_is_a_warning(seen: Json) -> None:
    seen["wanted"]["secret_days"] = 2
    seen["report"]["unfinished"] = 950
    second = deepcopy(seen["swarm"]["nodes"][0])
    second["ManagerStatus"]["Leader"] = False
    seen["swarm"]["nodes"][1] |= {"ManagerStatus": second["ManagerStatus"]}
    seen["swarm"]["nodes"][1]["Spec"]["Role"] = "manager"
    seen["nodes"]["w"]["info"]["ServerVersion"] = "20.10.24"
    found = judged(seen)
    assert found["well"]
    engines, even, secret, queue = found["warnings"]
    assert "different engines (20.10.24, 26.1.5)" in engines
    assert "2 managers" in even
    assert "3 days old" in secret
    assert "950 of 1000" in queue
