"""Read the Docker engine's lists: what belongs to a stack, and what holds a port that it wants."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_STACK_LABEL = "com.docker.stack.namespace"
# The engine's own processes listen in place of a container or service, which is named instead.
_ENGINE_PROCESSES = frozenset({"dockerd", "docker-proxy"})
_PROCESS = re.compile(r'"([^"]+)",pid=(\d+)')
_LABEL = re.compile(r"node\.labels\.([\w.-]+)==(.*)")
# Where nothing is set aside, any number fits.
_NO_LIMIT = 9999

Json = Mapping[str, Any]


def port_holders(
    port: int, stack: str, containers: list[Json], services: list[Json], listeners: list[str]
) -> list[str]:
    """Return in words what holds the TCP port ``port``, without what belongs to ``stack``.

    ``containers`` and ``services`` are the engine's own lists; ``listeners`` are the lines of ``ss`` about this port.
    """
    wanted = (port, "tcp")  # another protocol's port of that number is another port
    docker = [
        (f"the container {(container.get('Names') or [container['Id'][:12]])[0].lstrip('/')}", container.get("Labels"))
        for container in containers
        if any((one.get("PublicPort"), one.get("Type")) == wanted for one in container.get("Ports") or [])
    ] + [
        (f"the swarm service {service['Spec']['Name']}", service["Spec"].get("Labels"))
        for service in services
        if any(
            (one.get("PublishedPort"), one.get("Protocol")) == wanted
            for one in (service.get("Endpoint") or {}).get("Ports") or []
        )
    ]
    holders = [name for name, labels in docker if (labels or {}).get(_STACK_LABEL) != stack]
    for line in listeners:
        processes = _PROCESS.findall(line)
        if docker and all(name in _ENGINE_PROCESSES for name, _ in processes):
            continue
        holders += [f"{name} (process {pid})" for name, pid in processes] or ["an unknown process"]
    return list(dict.fromkeys(holders))


def stack_services(services: list[Json], stack: str) -> list[str]:
    """Return the names of those services that belong to ``stack``."""
    return [
        service["Spec"]["Name"]
        for service in services
        if (service["Spec"].get("Labels") or {}).get(_STACK_LABEL) == stack
    ]


def changed_services(services: list[Json], before: list[Json]) -> list[str]:
    """Return the names of those services whose spec is another one than ``before``, and that had one before."""
    specs = {service["ID"]: service["Spec"] for service in before}
    return [
        service["Spec"]["Name"]
        for service in services
        if service.get("PreviousSpec") and specs.get(service["ID"], service["Spec"]) != service["Spec"]
    ]


def replica_room(nodes: list[Json], service: Json) -> int:
    """Return how many replicas the nodes have room for, by what the service sets aside for each.

    Counted are nodes that work and have every label that the service asks for; what else runs there is not.
    """
    template = (service.get("Spec") or {}).get("TaskTemplate") or {}
    wanted = (template.get("Resources") or {}).get("Reservations") or {}
    labels = [
        _LABEL.fullmatch(one.replace(" ", "")) for one in (template.get("Placement") or {}).get("Constraints") or []
    ]
    room = 0
    for node in nodes:
        has = node["Spec"].get("Labels") or {}
        if (
            node["Status"].get("State") != "ready"
            or node["Spec"].get("Availability") != "active"
            or any(label and has.get(label[1]) != label[2] for label in labels)
        ):
            continue
        there = node["Description"]["Resources"]
        shares = [there.get(kind, 0) // wanted[kind] for kind in ("NanoCPUs", "MemoryBytes") if wanted.get(kind)]
        room += min(shares, default=_NO_LIMIT)
    return min(room, _NO_LIMIT)


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "changed_services": changed_services,
            "port_holders": port_holders,
            "replica_room": replica_room,
            "stack_services": stack_services,
        }
