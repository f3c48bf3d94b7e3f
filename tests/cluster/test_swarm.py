"""The swarm is what the inventory says: all of it, and nothing else."""

import json

import pytest
from conftest import Node


@pytest.fixture(scope="module")
def members(managers: list[Node]) -> dict[str, dict[str, str]]:
    """Return what the first manager lists, by the nodes' names."""
    listed = managers[0].output("docker node ls --format '{{json .}}'")
    rows: list[dict[str, str]] = [json.loads(line) for line in listed.splitlines()]
    members = {row["Hostname"]: row for row in rows}
    assert len(members) == len(rows), "a node is listed twice"
    return members


def test_the_swarm_has_the_machines_of_the_inventory(
    members: dict[str, dict[str, str]], nodes: list[Node]
) -> None:
    assert set(members) == {node.name for node in nodes}


def test_every_node_is_ready_and_takes_tasks(members: dict[str, dict[str, str]]) -> None:
    assert {(row["Status"], row["Availability"]) for row in members.values()} == {
        ("Ready", "Active")
    }


def test_the_managers_are_those_of_the_inventory(
    members: dict[str, dict[str, str]], managers: list[Node]
) -> None:
    managing = {name: row["ManagerStatus"] for name, row in members.items() if row["ManagerStatus"]}
    assert set(managing) == {node.name for node in managers}
    assert sorted(managing.values()) == ["Leader"] + ["Reachable"] * (len(managers) - 1)
