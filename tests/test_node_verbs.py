"""What the role swarm_node refuses to do to a node."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).resolve().parent.parent / "roles/swarm_node/filter_plugins/node_verbs.py"
spec = importlib.util.spec_from_file_location("node_verbs", PLUGIN)
assert spec is not None and spec.loader is not None
verbs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verbs)

Json = dict[str, Any]


def node(
    name: str,
    *labels: str,
    manager: bool = False,
    state: str = "ready",
    availability: str = "active",
    reachable: bool = True,
    address: str = "",
) -> Json:
    """A node as the engine lists it."""
    return {
        "ID": f"id-{name}",
        "Description": {"Hostname": name},
        "Spec": {
            "Role": "manager" if manager else "worker",
            "Availability": availability,
            "Labels": {f"claude-code.{label}": "true" for label in labels},
        },
        "Status": {"State": state, "Addr": address},
        **(
            {"ManagerStatus": {"Reachability": "reachable" if reachable else "unreachable"}}
            if manager
            else {}
        ),
    }


def managers(*names: str) -> list[Json]:
    return [node(name, "agents", "gateway", "broker", manager=True) for name in names]


def test_a_node_is_known_by_its_own_id_before_its_name() -> None:
    dead, alive = node("a", state="down"), node("b")
    assert verbs.swarm_node([dead, alive], "a", "id-b") is alive
    assert verbs.swarm_node([dead, alive], "a", "id-of-another-swarm") == {}


def test_a_machine_that_is_off_is_known_by_its_name_or_its_address() -> None:
    nodes = [node("a", state="down"), node("host-7", state="down", address="10.0.0.7")]
    assert verbs.swarm_node(nodes, "a") is nodes[0]
    assert verbs.swarm_node(nodes, "b", addresses=["10.0.0.7"]) is nodes[1]
    assert verbs.swarm_node(nodes, "c", addresses=["10.0.0.8"]) == {}


def test_of_two_with_one_name_the_one_that_lives_is_meant() -> None:
    dead, alive = node("a", state="down"), node("a") | {"ID": "another"}
    assert verbs.swarm_node([dead, alive], "a") is alive


def test_one_of_several_nodes_with_agents_can_be_drained() -> None:
    nodes = [*managers("m"), node("w", "agents")]
    assert verbs.drain_problems(nodes[1], nodes) == []


@pytest.mark.parametrize(
    "other", [node("v", "agents", state="down"), node("v", "agents", availability="drain")]
)
def test_the_last_node_with_agents_is_not_drained(other: Json) -> None:
    nodes = [node("w", "agents"), other]
    (problem,) = verbs.drain_problems(nodes[0], nodes)
    assert "last node that runs agents" in problem


def test_a_lone_manager_is_not_drained() -> None:
    nodes = [*managers("m"), node("w", "agents")]
    gateway, broker = verbs.drain_problems(nodes[0], nodes)
    assert "last node with a gateway" in gateway
    assert "it has the broker" in broker


def test_one_of_three_managers_can_be_drained_and_then_no_second() -> None:
    nodes = managers("a", "b", "c")
    assert verbs.drain_problems(nodes[0], nodes) == []
    nodes[0]["Spec"]["Availability"] = "drain"
    (problem,) = verbs.drain_problems(nodes[1], nodes)
    assert "most of its servers" in problem


def test_a_worker_is_demoted_already() -> None:
    nodes = [*managers("m"), node("w", "agents")]
    assert verbs.demotion_problems(nodes[1], nodes) == []


def test_the_only_manager_is_not_demoted() -> None:
    nodes = [*managers("m"), node("w", "agents")]
    assert verbs.demotion_problems(nodes[0], nodes) == ["it is the only manager of the swarm"]


def test_what_would_cost_the_quorum_is_not_done() -> None:
    nodes = [node(name, manager=True, reachable=name != "c") for name in "abc"]
    (problem,) = verbs.demotion_problems(nodes[0], nodes)
    assert "2 must be reachable and 1 are" in problem
    assert verbs.demotion_problems(nodes[2], nodes) == []


def test_a_copy_of_the_brokers_data_moves_to_a_manager_that_has_none() -> None:
    nodes = [*managers("a", "b", "c"), node("d", manager=True), node("e", manager=True)]
    heir = verbs.broker_heir(nodes[0], nodes, ["id-b", "id-c", "id-e"])
    assert heir == "id-e"
    assert verbs.demotion_problems(nodes[0], nodes, heir) == []
    # One that has no copy leaves none.
    assert verbs.broker_heir(nodes[3], nodes, ["id-a", "id-b", "id-c"]) == ""
    assert verbs.demotion_problems(nodes[3], nodes) == []


def test_a_copy_does_not_move_while_it_would_cost_the_brokers_majority() -> None:
    nodes = [*managers("a", "b", "c"), node("d", manager=True)]
    nodes[2]["Status"]["State"] = "down"
    (problem,) = verbs.demotion_problems(nodes[1], nodes, "id-d")
    assert "3 servers 2 must go on while its copy moves, and of the others 1 can" in problem
    # The one that is down can make way: the other two go on.
    assert verbs.demotion_problems(nodes[2], nodes, "id-d") == []


def test_what_may_have_had_a_copy_goes_only_when_the_others_are_whole() -> None:
    nodes = [*managers("a", "b", "c"), node("d", manager=True), node("w")]
    assert verbs.awaits_broker(nodes[3], nodes)
    # A copy that it has yet is moved, and waited for; a worker never had one.
    assert not verbs.awaits_broker(nodes[0], nodes)
    assert not verbs.awaits_broker(nodes[4], nodes)
    # The only copy moves nowhere.
    alone = [*managers("a"), node("b", manager=True)]
    assert not verbs.awaits_broker(alone[1], alone)


@pytest.mark.parametrize(
    "other",
    [
        node("d", manager=True, state="down"),
        node("d", manager=True, availability="drain"),
        node("d"),
    ],
)
def test_a_copy_that_nobody_can_take_stays(other: Json) -> None:
    nodes = [*managers("a", "b", "c"), other]
    assert verbs.broker_heir(nodes[0], nodes, ["id-b", "id-c", "id-d"]) == ""
    (problem,) = verbs.demotion_problems(nodes[0], nodes)
    assert "a copy of what the broker keeps, of 3" in problem


def test_the_only_copy_of_the_brokers_data_stays() -> None:
    nodes = [*managers("a"), node("b", manager=True), node("c", manager=True)]
    assert verbs.broker_heir(nodes[0], nodes, ["id-b"]) == ""
    (problem,) = verbs.demotion_problems(nodes[0], nodes)
    assert "it has all that the broker keeps" in problem


def test_the_workspace_and_the_last_agents_are_not_removed() -> None:
    nodes = [node("m", manager=True), node("w", "agents")]
    assert verbs.removal_problems(nodes[1], nodes, "", True) == [
        "the workspace is on it",
        "no other node that works runs agents",
    ]


def test_a_dead_worker_can_be_removed() -> None:
    nodes = [*managers("m"), node("w", "agents", state="down")]
    assert verbs.removal_problems(nodes[1], nodes, "", False) == []
