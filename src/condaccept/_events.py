"""Events and outcomes, and who wants to hear of them. Pure: no socket, no loop."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from condaccept._pending import Status
from condaccept._verdict import Verdict

if TYPE_CHECKING:
    from condaccept._pending import Address

__all__ = ("Event", "EventCallback", "Outcome", "Signals", "Subscription")


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


EventCallback: TypeAlias = Callable[[Any, Event, OSError | None], object]
"""Called as ``callback(source, event, error)``, for one event, from the loop."""

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


class Subscription:
    """One callback and the events it is for; `cancel()` ends it."""

    __slots__ = ("_events", "callback", "cancelled")

    def __init__(self, events: Event, callback: EventCallback) -> None:
        self._events = events.value
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """Call the callback no more, not even for an event under way to it.

        Streams that were accepted before keep what they inherited.
        """
        self.cancelled = True

    def __repr__(self) -> str:
        gone = " cancelled" if self.cancelled else ""
        return f"<Subscription {Event(self._events)!r} {self.callback!r}{gone}>"

    def wants(self, event: Event) -> bool:
        """Whether the callback is to be told of *event*."""
        # The value, not the member: `&` of two Flags costs fifty times that of two ints.
        return not self.cancelled and bool(self._events & event.value)

    def copy(self) -> Subscription:
        """Return what a new stream inherits."""
        return Subscription(Event(self._events), self.callback)


class Signals:
    """The subscriptions of one source, and which of its events are armed.

    An event is told once and then disarmed, until the operation that belongs to it arms
    it again: Winsock's re-enabling functions.

    Attributes:
        subscriptions: Cancelled ones included.
    """

    __slots__ = ("_disarmed", "subscriptions")

    def __init__(self, inherited: Iterable[Subscription] = ()) -> None:
        self.subscriptions = [each.copy() for each in inherited if not each.cancelled]
        self._disarmed: int = 0

    def add(self, events: Event, callback: EventCallback) -> Subscription:
        """Subscribe *callback* to *events*."""
        if not isinstance(events, Event) or not events:
            message = f"events are one or more of Event, combined with |; got {events!r}"
            raise TypeError(message)
        if not callable(callback):
            message = f"the callback cannot be called: {callback!r}"
            raise TypeError(message)
        self.subscriptions = [each for each in self.subscriptions if not each.cancelled]
        subscription = Subscription(events, callback)
        self.subscriptions.append(subscription)
        return subscription

    def wanted(self, event: Event) -> bool:
        """Whether somebody would be told of *event* now."""
        return self.armed(event) and any(each.wants(event) for each in self.subscriptions)

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
