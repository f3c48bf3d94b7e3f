"""A place in the event log, and the stored events that come after it.

The broker hands out what was asked for and no more, so that a reader who takes their time fills
nobody's memory.
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from claude_jobs.bus.connection import Bus
from claude_jobs.bus.places import take_place
from claude_jobs.bus.topology import EVENTS_STREAM
from claude_jobs.contract.event import Completed, Event, Failed, parse_event

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

TERMINAL_TYPES = frozenset(str(kind.model_fields["type"].default) for kind in (Completed, Failed))

# The sequence number of the job's event before, with which each event is appended.
EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
# The same, where the broker must be told otherwise because it dropped that event meanwhile.
PREVIOUS = "Previous-Sequence"

# What is asked for at a time. The broker hands out nothing at all where a single event has more
# bytes: then once as much as any event may have.
_BATCH = 500
_BATCH_BYTES = 2**20
_BATCH_BYTES_OF_ONE = 9 * 2**20
# How long (seconds) the broker waits for events, and how often it says that it still does. A
# broker that was restarted has forgotten the question, and is silent.
_EXPIRES = 10.0
_HEARTBEAT = 1.0
_SILENCE = 2.5
# The broker forgets a place about which nobody asked for so long (seconds).
_FORGOTTEN_AFTER = 60.0
_TYPE_PREFIX = b'{"type":"'


class CursorLostError(Exception):
    """The broker does not know the place any more: it must be taken up anew."""


@dataclass(frozen=True)
class LoggedEvent:
    """An event with its sequence number in the log; `data` is its JSON as it was appended.

    `previous` is the sequence number of the job's event before it (0: it is the first; None: not
    known). By it a reader sees that nothing is missing, or that the log has dropped something.
    """

    sequence: int
    data: bytes
    previous: int | None = None

    @property
    def event(self) -> Event:
        """The parsed event."""
        return parse_event(self.data)

    @cached_property
    def type(self) -> str:
        """The event's type, found without parsing the rest: `type` comes first."""
        if self.data.startswith(_TYPE_PREFIX):
            start = len(_TYPE_PREFIX)
            return self.data[start : self.data.index(b'"', start)].decode()
        return str(json.loads(self.data)["type"])

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows this event."""
        return self.type in TERMINAL_TYPES


def previous_of(headers: dict[str, str] | None) -> int | None:
    """Read from an event's headers which one of the job's came before it."""
    headers = headers or {}
    text = headers.get(PREVIOUS) or headers.get(EXPECTED_LAST)
    return int(text) if text else None


class EventCursor:
    """A place in the log after a sequence number; None is the log's end at this moment.

    Entering it raises what the connection raises while the broker is away. Everything after
    `start` then comes by `take`, in order.
    """

    def __init__(self, bus: Bus, subject: str, *, after: int | None) -> None:
        self._bus = bus
        self._subject = subject
        self._after = after
        self._inbox = bus.nats.new_inbox()
        self._subscription: Subscription | None = None
        self._name = ""
        self._arrived: list[tuple[str, LoggedEvent]] = []
        self._news = asyncio.Event()
        self._outstanding = 0
        self._expired = False
        self._delivered = 0
        self._batch_bytes = _BATCH_BYTES
        self._lost = ""
        self._reconnects = bus.nats.stats["reconnects"]
        self.start = after or 0

    async def __aenter__(self) -> Self:
        self._subscription = await self._bus.nats.subscribe(
            self._inbox,
            cb=self._receive,
            # What may come is bounded by what is asked for.
            pending_msgs_limit=0,
            pending_bytes_limit=0,
        )
        try:
            await self._create()
        except BaseException:
            await self._subscription.unsubscribe()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(nats.errors.Error):
            if self._subscription:
                await self._subscription.unsubscribe()
            # Nobody waits for the answer: the broker forgets the place by itself, only later.
            await self._bus.nats.publish(f"$JS.API.CONSUMER.DELETE.{EVENTS_STREAM}.{self._name}")

    async def take(self) -> list[tuple[str, LoggedEvent]]:
        """Wait for events and return all that came, each with its subject.

        Returns nothing when none came for some seconds. Raises `CursorLostError`.
        """
        self._expired = False
        while not self._arrived:
            if self._lost or self._bus.nats.stats["reconnects"] != self._reconnects:
                raise CursorLostError(self._lost or "the connection was lost")
            if self._expired:
                return []
            if self._outstanding <= 0:
                await self._ask()
            self._news.clear()
            try:
                async with asyncio.timeout(_SILENCE):
                    await self._news.wait()
            except TimeoutError:
                raise CursorLostError("the broker is silent") from None
        arrived, self._arrived = self._arrived, []
        return arrived

    async def _create(self) -> None:
        place = (
            ConsumerConfig(deliver_policy=DeliverPolicy.NEW)
            if self._after is None
            else ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self._after + 1
            )
        )
        info = await take_place(
            partial(
                self._bus.jetstream.add_consumer,
                EVENTS_STREAM,
                place,
                filter_subject=self._subject,
                ack_policy=AckPolicy.NONE,
                inactive_threshold=_FORGOTTEN_AFTER,
                # It is not worth a place on the disk: who loses it takes up another.
                mem_storage=True,
                num_replicas=1,
            )
        )
        self._name = info.name
        if self._after is None and info.delivered:
            self.start = info.delivered.stream_seq

    async def _ask(self) -> None:
        self._outstanding = _BATCH
        wish = {
            "batch": _BATCH,
            "max_bytes": self._batch_bytes,
            "expires": int(_EXPIRES * 1e9),
            "idle_heartbeat": int(_HEARTBEAT * 1e9),
        }
        await self._bus.nats.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.{self._name}",
            json.dumps(wish).encode(),
            reply=self._inbox,
        )

    async def _receive(self, message: Msg) -> None:
        headers = message.headers
        if not message.data and headers and "Status" in headers:
            self._heed(headers["Status"], headers)
        else:
            # $JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>
            place = message.reply.split(".")
            self._delivered += 1
            self._outstanding -= 1
            self._batch_bytes = _BATCH_BYTES
            if int(place[6]) != self._delivered:
                self._lost = "an event was lost on the way"
            if not self._lost:
                logged = LoggedEvent(int(place[5]), message.data, previous_of(headers))
                self._arrived.append((message.subject, logged))
        self._news.set()

    def _heed(self, status: str, headers: dict[str, str]) -> None:
        said = headers.get("Description", "").lower()
        match status:
            case "100":
                pass
            case "404" | "408":
                self._outstanding = 0
                self._expired = True
            case "409" if "maxbytes" in said:
                if self._outstanding == _BATCH:
                    self._batch_bytes = _BATCH_BYTES_OF_ONE
                self._outstanding = 0
            case "409" if "batch completed" in said:
                # A newer broker says so, too, of what was handed out in full: that is counted.
                if headers.get("Nats-Pending-Messages") != "0":
                    self._outstanding = 0
            case _:
                self._lost = f"the broker says {status} {said}"
