"""Read the Docker engine's lists: what belongs to a stack, and what holds a port that it wants."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_STACK_LABEL = "com.docker.stack.namespace"
# The engine's own processes listen in place of a container or service, which is named instead.
_ENGINE_PROCESSES = frozenset({"dockerd", "docker-proxy"})
_PROCESS = re.compile(r'"([^"]+)",pid=(\d+)')

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


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"port_holders": port_holders, "stack_services": stack_services}
