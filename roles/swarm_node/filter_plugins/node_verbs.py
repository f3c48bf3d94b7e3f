"""Judge what a verb would do to a swarm: whom the pool would lose with a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

AGENTS, GATEWAY, BROKER = ("claude-code.agents", "claude-code.gateway", "claude-code.broker")


def swarm_node(nodes: Iterable[Json], name: str, node_id: str = "", addresses: Sequence[str] = ()) -> Json:
    """Return the node of the swarm that is the machine ``name`` of the inventory; nothing where it is none.

    ``node_id`` is what the machine says itself; where it cannot be asked, its host name or an address tells. Two
    machines may have had one name: one that lives goes first.
    """
    every = sorted(nodes, key=lambda node: node["Status"].get("State") != "ready")
    if node_id:
        return next((node for node in every if node["ID"] == node_id), {})
    by_name = [node for node in every if hostname(node) == name]
    by_address = [node for node in every if node["Status"].get("Addr") in addresses]
    return next(iter(by_name + by_address), {})


def hostname(node: Json) -> str:
    """Return the host name that a node told the managers."""
    return str((node.get("Description") or {}).get("Hostname") or "")


def has(node: Json, label: str) -> bool:
    """Say whether a node has a label of ours."""
    return bool((node["Spec"].get("Labels") or {}).get(label) == "true")


def works(node: Json) -> bool:
    """Say whether tasks come to a node."""
    return bool(node["Status"].get("State") == "ready" and node["Spec"].get("Availability") == "active")


def is_manager(node: Json) -> bool:
    """Say whether a node counts for the quorum, alive or not.

    Its role in the spec does not say that: what was a manager before a new cluster was forced is none for the others.
    """
    return "ManagerStatus" in node


def _majority(of: int) -> int:
    return of // 2 + 1


def drain_problems(node: Json, nodes: Sequence[Json]) -> list[str]:
    """Return what the pool would lose while no task may run on a node: for each a part of a sentence."""
    others = [one for one in nodes if one["ID"] != node["ID"] and works(one)]
    problems = []
    if has(node, AGENTS) and not any(has(one, AGENTS) for one in others):
        problems.append("it is the last node that runs agents: jobs would wait until it is active again")
    if has(node, GATEWAY) and not any(has(one, GATEWAY) for one in others):
        problems.append("it is the last node with a gateway: the API would not answer")
    if has(node, BROKER):
        servers = sum(has(one, BROKER) for one in nodes)
        if sum(has(one, BROKER) for one in others) < _majority(servers):
            problems.append(
                "the broker would lose most of its servers: nothing could be accepted"
                if servers > 1
                else "it has the broker, which is nowhere else: the API would accept nothing"
            )
    return problems


def broker_heir(node: Json, nodes: Sequence[Json], wanted: Sequence[str]) -> str:
    """Return the ID of the node that is to have the copy of the broker's data that ``node`` has, or nothing.

    ``wanted`` are the IDs of those that are to have the broker. The only copy cannot move: a server begins empty.
    """
    if not has(node, BROKER) or sum(has(one, BROKER) for one in nodes) == 1:
        return ""
    free = {
        one["ID"]
        for one in nodes
        if one["ID"] != node["ID"] and is_manager(one) and works(one) and not has(one, BROKER)
    }
    return next((node_id for node_id in wanted if node_id in free), "")


def demotion_problems(node: Json, nodes: Sequence[Json], heir: str = "") -> list[str]:
    """Return why a manager cannot become a worker: for each a part of a sentence. None for a worker.

    ``heir`` is the node that takes its copy of the broker's data.
    """
    problems = []
    if is_manager(node):
        others = [one for one in nodes if is_manager(one) and one["ID"] != node["ID"]]
        if not others:
            return ["it is the only manager of the swarm"]
        reachable = [one for one in others if one["ManagerStatus"].get("Reachability") == "reachable"]
        needed = _majority(len(others))
        if len(reachable) < needed:
            problems.append(
                f"of the other {len(others)} managers {needed} must be reachable and {len(reachable)} are, "
                "so the swarm would lose its quorum"
            )
    copies = sum(has(one, BROKER) for one in nodes)
    if has(node, BROKER) and heir:
        # The one that takes its copy comes in addition: until it is counted, those of before decide.
        working = sum(has(one, BROKER) and works(one) for one in nodes if one["ID"] != node["ID"])
        if working < _majority(copies):
            problems.append(
                f"of the broker's {copies} servers {_majority(copies)} must go on while its copy moves, and of the "
                f"others {working} can: bring them back first"
            )
    elif has(node, BROKER):
        problems.append(
            f"it has a copy of what the broker keeps, of {copies}, and there is no manager without one to take it: "
            "add a manager first (playbooks/promote.yml)"
            if copies > 1
            else "it has all that the broker keeps: with three managers there are three copies, and one of them can go"
        )
    return problems


def awaits_broker(node: Json, nodes: Sequence[Json]) -> bool:
    """Say whether a manager without a copy goes only when all others are whole.

    It may be that its copy was to move and the verb was broken off before the new one was whole.
    """
    return is_manager(node) and not has(node, BROKER) and sum(has(one, BROKER) for one in nodes) > 1


def removal_problems(node: Json, nodes: Sequence[Json], heir: str, has_workspace: bool) -> list[str]:
    """Return why a node cannot leave the swarm for good: for each a part of a sentence."""
    problems = demotion_problems(node, nodes, heir)
    if has_workspace:
        problems.append("the workspace is on it")
    rest = [one for one in nodes if one["ID"] != node["ID"]]
    if has(node, AGENTS) and not any(has(one, AGENTS) and works(one) for one in rest):
        problems.append("no other node that works runs agents")
    return problems


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "swarm_node": swarm_node,
            "broker_heir": broker_heir,
            "awaits_broker": awaits_broker,
            "drain_problems": drain_problems,
            "demotion_problems": demotion_problems,
            "removal_problems": removal_problems,
        }
