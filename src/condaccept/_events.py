"""Events and outcomes, and who wants to hear of them. Pure: no socket, no loop."""

from __future__ import annotations

import contextvars
import enum
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias
from weakref import WeakSet

import attrs

from condaccept._pending import Status
from condaccept._verdict import Verdict

if TYPE_CHECKING:
    from condaccept._pending import Address

__all__ = (
    "Event",
    "EventCallback",
    "Outcome",
    "SharedSubscription",
    "Signals",
    "Subscription",
    "check_events",
)


class Event(enum.Flag):
    """Something a listener or a stream is ready for; combine them with ``|``.

    Source: the network events of WSPAsyncSelect.
    """

    PENDING = enum.auto()
    """Something is due on the listener (FD_ACCEPT)."""
    READ = enum.auto()
    """Data, or the end of the stream, waits and nobody reads."""
    WRITE = enum.auto()
    """The stream was just accepted, or has room again after the kernel took no more."""
    CLOSE = enum.auto()
    """The stream has ended and all its data was read, or it failed."""
    OOB = enum.auto()
    """An urgent byte waits for `Stream.read_oob()`. Never told where there is no epoll."""


EventCallback: TypeAlias = Callable[[Any, Event, OSError | None], object]
"""Called as ``callback(source, event, error)``, for one event, from the loop; what it returns
is awaited if it can be."""

_VERDICTS: Final = {Status.ACCEPTED: Verdict.ACCEPT, Status.REJECTED: Verdict.REJECT}


@attrs.frozen
class Outcome:
    """What became of a connection; there is one for each, and only one.

    Attributes:
        status: ACCEPTED, REJECTED, RESET, EXPIRED, FAILED or CLOSED.
        caller_id: The caller's address, as accept(2) gave it.
        reason: Why, in words for a person.
        age: Seconds from the taking to the outcome.
        deferrals: How often it was deferred before.
    """

    status: Status
    caller_id: Address
    reason: str
    age: float
    deferrals: int

    @property
    def verdict(self) -> Verdict | None:
        """ACCEPT or REJECT; ``None`` if the connection was lost before a verdict."""
        return _VERDICTS.get(self.status)

    @property
    def loss(self) -> Status | None:
        """How the connection was lost; ``None`` if there was a verdict."""
        return None if self.status in _VERDICTS else self.status


class Kept(Protocol):
    """A source that lives on while somebody is subscribed, though nobody else has it."""

    def _let_go(self) -> None:
        """Live on no longer than others want it, if nobody is subscribed any more."""


class Subscription:
    """One callback and the events it is for; `cancel()` ends it."""

    __slots__ = ("_events", "_keeps", "callback", "cancelled", "context")

    at_once: ClassVar[bool] = False
    """Whether the callback only notes the event, and is called where the event happens."""

    def __init__(self, events: Event, callback: EventCallback) -> None:
        self._events = events.value
        self.callback = callback
        self.cancelled = False
        self.context = contextvars.copy_context()
        self._keeps: WeakSet[Kept] | None = None

    def keep(self, source: Kept) -> None:
        """Note a source that has to know when this is cancelled."""
        if self._keeps is None:
            self._keeps = WeakSet()
        self._keeps.add(source)

    def cancel(self) -> None:
        """Call the callback no more, not even for an event under way to it.

        Streams that were accepted before keep what they inherited. A task that an async
        callback runs in goes on.
        """
        self.cancelled = True
        kept, self._keeps = self._keeps, None
        for source in kept or ():
            source._let_go()

    def __repr__(self) -> str:
        gone = " cancelled" if self.cancelled else ""
        return f"<{type(self).__name__} {Event(self._events)!r} {self.callback!r}{gone}>"

    def wants(self, event: Event) -> bool:
        """Whether the callback is to be told of *event*."""
        # The value, not the member: `&` of two Flags costs fifty times that of two ints.
        return not self.cancelled and bool(self._events & event.value)

    def copy(self) -> Subscription:
        """Return what a new stream inherits."""
        twin = Subscription(Event(self._events), self.callback)
        twin.context = self.context
        return twin


class SharedSubscription(Subscription):
    """One that all streams share with their listener, so that cancelling ends it for all."""

    __slots__ = ()

    at_once = True

    def copy(self) -> SharedSubscription:
        """Return itself."""
        return self


class Signals:
    """The subscriptions of one source, and which of its events are armed.

    An event is told once and then disarmed, until the operation that belongs to it arms
    it again: Winsock's re-enabling functions.

    Attributes:
        subscriptions: Cancelled ones included.
        urgent: The urgent byte that was set aside for who subscribed to OOB, unread.
    """

    __slots__ = ("_disarmed", "subscriptions", "urgent")

    def __init__(self, inherited: Iterable[Subscription] = ()) -> None:
        self.subscriptions = [each.copy() for each in inherited if not each.cancelled]
        self._disarmed: int = 0
        self.urgent = b""

    def add(self, events: Event, callback: EventCallback) -> Subscription:
        """Subscribe *callback* to *events*."""
        check_events(events)
        if not callable(callback):
            message = f"the callback cannot be called: {callback!r}"
            raise TypeError(message)
        subscription = Subscription(events, callback)
        self.join(subscription)
        return subscription

    def join(self, subscription: Subscription) -> None:
        """Take in a subscription that was made elsewhere."""
        self.subscriptions = [each for each in self.subscriptions if not each.cancelled]
        self.subscriptions.append(subscription)

    def heard(self) -> bool:
        """Whether anybody is subscribed to anything."""
        return not all(each.cancelled for each in self.subscriptions)

    def subscribed(self, event: Event) -> bool:
        """Whether anybody is subscribed to *event*, armed or not."""
        return any(each.wants(event) for each in self.subscriptions)

    def wanted(self, event: Event) -> bool:
        """Whether somebody would be told of *event* now."""
        return self.armed(event) and self.subscribed(event)

    def armed(self, event: Event) -> bool:
        """Whether *event* has not been told since it was last armed."""
        return not self._disarmed & event.value

    def arm(self, event: Event) -> None:
        """Let *event* be told again."""
        self._disarmed &= ~event.value

    def fire(self, event: Event) -> list[Subscription]:
        """Return who is to be told of *event*, and disarm it; nobody if it is disarmed."""
        if not self.armed(event):
            return []
        told = [each for each in self.subscriptions if each.wants(event)]
        if told:
            self._disarmed |= event.value
        return told


def check_events(events: object) -> None:
    """Refuse what is not at least one event.

    Raises:
        TypeError: *events* is none.
    """
    if not isinstance(events, Event) or not events:
        message = f"events are one or more of Event, combined with |; got {events!r}"
        raise TypeError(message)
