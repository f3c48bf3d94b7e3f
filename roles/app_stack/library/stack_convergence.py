#!/usr/bin/python
"""Wait until every service of a stack runs its newest spec."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: stack_convergence
short_description: Wait until every service of a stack runs its newest spec
description:
  - Asks the Docker engine again and again until each service of the stack has as many tasks of its newest spec as it
    wants, until no update is under way, and until this has held for a while. Changes nothing.
  - "Made for replicas that end by themselves after every job. A replica that has just been replaced is not healthy
    until its next health check, so a busy pool may never have all replicas healthy at one moment. What counts is the
    slot: it must hold a task of the newest spec that lives, and a task of that spec must have been healthy there, or,
    in a service that is named in O(one_shot), have ended well. A task that fails takes this credit away again."
  - Old replicas that still finish a job are waited for by nobody; they are counted in RV(draining).
options:
  name:
    description: Name of the stack.
    type: str
    required: true
  one_shot:
    description: >-
      Services (full names) whose tasks end well by design. Under short jobs without a pause none of them may ever live
      until its first health check.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait before giving up.
    type: float
    default: 300
  rolled_back:
    description: Whether services that were rolled back count as well.
    type: bool
    default: false
  settle:
    description: Seconds for which everything must hold, so that what starts only to fail is not taken for what runs.
    type: float
    default: 2
  interval:
    description: Seconds between two looks.
    type: float
    default: 0.5
  socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
author:
  - claude-code-sse-api maintainers
"""

EXAMPLES = r"""
- name: Wait for the stack
  stack_convergence:
    name: claude-code-stack
    one_shot: [claude-code-stack_claude-api]
    timeout: 300
"""

RETURN = r"""
services:
  description: For each service how many tasks it wants, how many of them are healthy now, and how many start.
  type: dict
  returned: always
  sample: {"claude-code-stack_claude-api": {"wanted": 5, "running": 4, "starting": 1}}
draining:
  description: Replicas of an older spec that still finish their job.
  type: int
  returned: always
seconds:
  description: How long it took.
  type: float
  returned: always
problems:
  description: What is wrong, one sentence each, with what the tasks and their last log lines say.
  type: list
  elements: str
  returned: on failure
"""

Json = Mapping[str, Any]

LIVE = frozenset({"new", "pending", "assigned", "accepted", "preparing", "ready", "starting", "running", "allocated"})
FAILED = frozenset({"failed", "rejected", "orphaned"})
# An update in one of these states goes no further by itself.
STUCK = frozenset({"paused", "rollback_started", "rollback_paused", "rollback_completed"})
STACK_LABEL = "com.docker.stack.namespace"
LOG_LINES = 10
# So many tasks of a spec that failed, while none of it ever ran, and no more are waited for.
HOPELESS = 6


class EngineError(Exception):
    """The engine gave no answer, or one that is not 200."""


class Engine(Protocol):
    """What is read from the Docker engine."""

    def services(self, stack: str) -> list[Json]: ...
    def tasks(self, stack: str) -> list[Json]: ...
    def logs(self, container: str) -> list[str]: ...


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class SocketEngine:
    """A Docker engine behind its socket. Needs nothing but Python."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _get(self, path: str, **query: str) -> bytes:
        connection = _UnixConnection(self._path)
        try:
            connection.request("GET", f"{path}?{urllib.parse.urlencode(query)}")
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"The Docker engine at {self._path} does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise EngineError(f"The Docker engine answers {answer.status} to {path}: {body.decode(errors='replace')}")
        return body

    def _list(self, path: str, stack: str) -> list[Json]:
        filters = json.dumps({"label": [f"{STACK_LABEL}={stack}"]})
        found: list[Json] = json.loads(self._get(path, filters=filters))
        return found

    def services(self, stack: str) -> list[Json]:
        return self._list("/services", stack)

    def tasks(self, stack: str) -> list[Json]:
        return self._list("/tasks", stack)

    def logs(self, container: str) -> list[str]:
        """Return the last lines of a container, or none where it is gone or on another node."""
        try:
            raw = self._get(f"/containers/{container}/logs", stdout="1", stderr="1", tail=str(LOG_LINES))
        except EngineError:
            return []
        return _demultiplex(raw).decode(errors="replace").splitlines()


def _demultiplex(raw: bytes) -> bytes:
    """Take the engine's frames (one byte of stream, three of zero, four of length) off a log."""
    text = b""
    while len(raw) >= 8 and raw[0] in (0, 1, 2) and raw[1:4] == b"\0\0\0":
        length = int.from_bytes(raw[4:8], "big")
        text += raw[8 : 8 + length]
        raw = raw[8 + length :]
    return text + raw


def _pruned(value: Any) -> Any:
    """Return ``value`` without its empty parts, which the engine writes in one place and leaves out in another."""
    if isinstance(value, Mapping):
        return {key: kept for key, part in value.items() if (kept := _pruned(part)) not in (None, {}, [], "", 0, False)}
    if isinstance(value, list):
        return [_pruned(part) for part in value]
    return value


def is_current(task: Json, service: Json) -> bool:
    """Say whether a task runs its service's newest spec.

    Versions cannot be compared: deploying the same spec again raises the service's, and leaves the tasks
    as they are. Placement is left out, as Swarm does not replace a task that still fits.
    """
    wanted = {key: part for key, part in service["Spec"]["TaskTemplate"].items() if key not in ("Placement", "Runtime")}
    found = {key: part for key, part in task["Spec"].items() if key not in ("Placement", "Runtime")}
    return bool(_pruned(wanted) == _pruned(found))


def _state(task: Json) -> str:
    return str(task["Status"]["State"])


def _slot(task: Json) -> str:
    """Return the place that a task fills: its number, or its node for a global service."""
    return str(task.get("Slot") or task.get("NodeID") or task["ID"])


@dataclasses.dataclass
class ServiceWatch:
    """What has been seen of one service so far. Fed with one look after the other."""

    name: str
    one_shot: bool = False
    rolled_back: bool = False
    proven: set[str] = dataclasses.field(default_factory=set)
    wanted: int = 0
    running: int = 0
    starting: int = 0
    converged: bool = False
    stuck: str = ""
    ran: bool = False
    failed: set[str] = dataclasses.field(default_factory=set)

    def look(self, service: Json, tasks: Iterable[Json]) -> None:
        current = sorted((task for task in tasks if is_current(task, service)), key=lambda task: task["CreatedAt"])
        live: dict[str, Json] = {}
        for task in current:
            slot, state = _slot(task), _state(task)
            if state == "running" or (state == "complete" and self.one_shot):
                self.proven.add(slot)
                self.ran = True
            elif state == "complete" or state in FAILED:
                self.proven.discard(slot)
                self.failed.add(str(task["ID"]))
            if task["DesiredState"] in ("running", "ready") and state in LIVE:
                live[slot] = task
        healthy = sum(_state(task) == "running" for task in live.values())

        mode = service["Spec"]["Mode"]
        self.wanted = mode["Replicated"].get("Replicas", 1) if "Replicated" in mode else max(len(live), 1)
        self.running = healthy
        self.starting = len(live) - healthy
        update = service.get("UpdateStatus") or {}
        update_state = update.get("State") or "completed"
        if self.rolled_back and update_state.startswith("rollback_"):
            update_state = {"rollback_completed": "completed", "rollback_started": "updating"}.get(
                update_state, update_state
            )
        self.stuck = f"its update is {update_state}: {update.get('Message', '')}" if update_state in STUCK else ""
        if not self.stuck and not self.ran and len(self.failed) >= HOPELESS:
            self.stuck = f"{len(self.failed)} tasks of the newest spec have failed, and none has run"
        self.converged = update_state == "completed" and len(live) == self.wanted and set(live) <= self.proven


@dataclasses.dataclass
class StackWatch:
    """What has been seen of a stack so far."""

    one_shot: frozenset[str] = frozenset()
    rolled_back: bool = False
    services: dict[str, ServiceWatch] = dataclasses.field(default_factory=dict)
    draining: int = 0

    def look(self, services: list[Json], tasks: list[Json]) -> None:
        self.services = {
            name: self.services.get(name)
            or ServiceWatch(name, one_shot=name in self.one_shot, rolled_back=self.rolled_back)
            for name in sorted(service["Spec"]["Name"] for service in services)
        }
        for service in services:
            self.services[service["Spec"]["Name"]].look(
                service, [task for task in tasks if task["ServiceID"] == service["ID"]]
            )
        self.draining = sum(
            _state(task) == "running" and task["DesiredState"] in ("shutdown", "remove") for task in tasks
        )

    @property
    def converged(self) -> bool:
        return bool(self.services) and all(service.converged for service in self.services.values())

    @property
    def stuck(self) -> bool:
        return any(service.stuck for service in self.services.values())

    def summary(self) -> dict[str, dict[str, int]]:
        return {
            name: {"wanted": service.wanted, "running": service.running, "starting": service.starting}
            for name, service in self.services.items()
        }


def _error(task: Json) -> str:
    """Say in a few words what a task complains about; empty when it does not."""
    status = task["Status"]
    if status.get("Err"):
        return f"{_state(task)}: {status['Err']}"
    return f"{_state(task)}: {status.get('Message', '')}" if _state(task) in ("pending", *FAILED) else ""


def problems(watch: StackWatch, services: list[Json], tasks: list[Json], engine: Engine) -> list[str]:
    """Describe each service that has not converged: its tasks' errors, each once, and the last failed one's log."""
    if not watch.services:
        return ["It has no services."]
    found = []
    for service in sorted(services, key=lambda one: str(one["Spec"]["Name"])):
        seen = watch.services[service["Spec"]["Name"]]
        if seen.converged:
            continue
        own = sorted((task for task in tasks if task["ServiceID"] == service["ID"]), key=lambda task: task["CreatedAt"])
        text = f"{seen.name}: {seen.running} of {seen.wanted} healthy with the newest spec, {seen.starting} starting"
        text += f"; {seen.stuck}" if seen.stuck else ""
        errors = dict.fromkeys(error for task in own if is_current(task, service) and (error := _error(task)))
        text += "".join(f"\n  {error}" for error in errors)
        unhappy = [task for task in own if is_current(task, service) and _state(task) in FAILED | {"starting"}]
        containers = [(task["Status"].get("ContainerStatus") or {}).get("ContainerID", "") for task in unhappy]
        for container in reversed([one for one in containers if one]):
            if lines := engine.logs(container):
                text += "".join(f"\n  log: {line}" for line in lines)
                break
        found.append(text)
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "one_shot": {"type": "list", "elements": "str", "default": []},
            "rolled_back": {"type": "bool", "default": False},
            "timeout": {"type": "float", "default": 300},
            "settle": {"type": "float", "default": 2},
            "interval": {"type": "float", "default": 0.5},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    stack = module.params["name"]
    engine = SocketEngine(module.params["socket"])
    watch = StackWatch(one_shot=frozenset(module.params["one_shot"]), rolled_back=module.params["rolled_back"])
    start = time.monotonic()
    good_since: float | None = None
    try:
        while True:
            services, tasks = engine.services(stack), engine.tasks(stack)
            watch.look(services, tasks)
            now = time.monotonic()
            good_since = (good_since if good_since is not None else now) if watch.converged else None
            result = {"services": watch.summary(), "draining": watch.draining, "seconds": round(now - start, 1)}
            if good_since is not None and now - good_since >= module.params["settle"]:
                module.exit_json(changed=False, **result)
            if watch.stuck or now - start > module.params["timeout"]:
                why = "is stuck" if watch.stuck else f"did not come up within {module.params['timeout']:.0f} seconds"
                found = problems(watch, services, tasks, engine)
                module.fail_json(msg="\n".join([f"The stack {stack} {why}.", *found]), problems=found, **result)
            time.sleep(module.params["interval"])
    except EngineError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
