"""What is to happen to a job: its submission, its replicas, its agents, its cancellation."""

from dataclasses import dataclass
from enum import StrEnum

from faulty_wire import Fault


class Fate(StrEnum):
    """How an agent ends."""

    WELL = "well"
    BADLY = "badly"
    KILLED = "killed"  # by somebody else
    UNWATCHED = "unwatched"  # its watchdog is killed
    LASTS = "lasts"  # only when it is told to


@dataclass(frozen=True)
class AgentScript:
    """An agent is saved or not, prints lines, is silent for some seconds, and ends."""

    saved: bool = True
    lines: int = 1
    silent: float = 0.0
    fate: Fate = Fate.WELL


@dataclass(frozen=True)
class Submission:
    """With `again` it is sent to both gateways at once, with one key.

    Sent through a gateway of its own that a fault strikes, it is repeated only with a key.
    """

    keyed: bool = True
    again: bool = False
    fault: Fault | None = None


@dataclass(frozen=True)
class Cancellation:
    """Is asked for once the log has so many events, through a gateway that a fault may strike."""

    events: int
    again: bool = False
    fault: Fault | None = None


@dataclass(frozen=True)
class JobScript:
    """`faults` are what strikes the replicas that the job is handed to, one a delivery.

    What comes after the last fault goes well, and so does what comes after the last agent.
    """

    submission: Submission = Submission()
    cancellation: Cancellation | None = None
    faults: tuple[Fault | None, ...] = ()
    agents: tuple[AgentScript, ...] = ()
