"""When the containers of a Swarm service start and exit, as the engine notes it."""

import contextlib
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx


@dataclass(frozen=True)
class Turn:
    """A slot between two jobs that follow each other in it, in seconds."""

    end_to_exit: float
    exit_to_start: float
    start_to_begin: float

    @property
    def whole(self) -> float:
        """The time from the end of one job to the begin of the next."""
        return self.end_to_exit + self.exit_to_start + self.start_to_begin


@dataclass
class Slots:
    """When containers of a service started and exited, by the slot that they filled."""

    started: dict[str, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))
    exited: dict[str, float] = field(default_factory=dict)

    def note_start(self, container: dict[str, Any]) -> None:
        """Take in a container that runs."""
        # SERVICE.SLOT.TASK
        slot = container["Config"]["Labels"]["com.docker.swarm.task.name"].split(".")[1]
        at = seconds(container["State"]["StartedAt"])
        self.started[slot].append((at, container["Id"][:12]))

    def note_exit(self, container: dict[str, Any]) -> None:
        """Take in a container that has ended."""
        self.exited[container["Id"][:12]] = seconds(container["State"]["FinishedAt"])

    def gaps(self) -> list[float]:
        """Return the time from each exit to the next start in the same slot, in seconds."""
        return [started - self.exited[before] for before, started, _ in self._pairs()]

    def turns(self, *, begins: dict[str, float], ends: dict[str, float]) -> list[Turn]:
        """Return the turns between jobs, of which each container has run one.

        `begins` and `ends` say when the client read that the job of a container began and ended.
        """
        return [
            Turn(
                end_to_exit=self.exited[before] - ends[before],
                exit_to_start=started - self.exited[before],
                start_to_begin=begins[after] - started,
            )
            for before, started, after in self._pairs()
            if before in ends and after in begins
        ]

    def _pairs(self) -> Iterator[tuple[str, float, str]]:
        """Yield each container that ended, when the next in its slot started, and that one."""
        for starts in self.started.values():
            for (_, before), (started, after) in itertools.pairwise(starts):
                if before in self.exited:
                    yield before, started, after


def seconds(moment: str) -> float:
    """Read a time of the engine, which has nanoseconds, as seconds since 1970."""
    return datetime.fromisoformat(f"{moment[:26].rstrip('Z')}+00:00").timestamp()


@contextmanager
def watched(service: str) -> Iterator[Slots]:
    """Watch the containers of a service; those that run already count as started.

    The times are the engine's own notes of when the process began and ended. It reports an exit
    only after it has cleaned up, which is a part of what Swarm needs.
    """
    slots = Slots()
    label = f"com.docker.swarm.service.name={service}"

    def read(events: httpx.Response) -> None:
        # With a client of its own: the other one may be closed while this asks.
        with contextlib.suppress(httpx.HTTPError), open_engine() as engine:
            for line in events.iter_lines():
                event = json.loads(line)
                found = engine.get(f"/containers/{event['id']}/json")
                if found.status_code == httpx.codes.OK:
                    note = slots.note_start if event["Action"] == "start" else slots.note_exit
                    note(found.json())

    filters = {"type": ["container"], "label": [label], "event": ["start", "die"]}
    with (
        open_engine() as engine,
        engine.stream("GET", "/events", params={"filters": json.dumps(filters)}) as events,
    ):
        running = engine.get("/containers/json", params={"filters": json.dumps({"label": [label]})})
        for container in running.json():
            slots.note_start(engine.get(f"/containers/{container['Id']}/json").json())
        reader = threading.Thread(target=read, args=(events,), daemon=True)
        reader.start()
        yield slots


def open_engine() -> httpx.Client:
    """Open a client of the engine's own API."""
    socket = httpx.HTTPTransport(uds="/var/run/docker.sock")
    return httpx.Client(transport=socket, base_url="http://docker", timeout=None)
