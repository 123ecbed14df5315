"""`condaccept._events` and `condaccept._ledger`: who is told, and what is released, once."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from condaccept import Event, Outcome, PendingTransport, Statistics, Status, Subscription, Verdict
from condaccept._events import Signals
from condaccept._ledger import Ledger
from condaccept.testing import pending_transport

if TYPE_CHECKING:
    from collections.abc import Callable

ENDS = {
    Status.ACCEPTED: Verdict.ACCEPT,
    Status.REJECTED: Verdict.REJECT,
    Status.RESET: None,
    Status.EXPIRED: None,
    Status.FAILED: None,
    Status.CLOSED: None,
}


def ignore(_source: object, _event: Event, _error: OSError | None) -> None:
    """Do nothing with an event."""


# -- subscriptions


def test_the_events() -> None:
    """There are five events, and any of them can be combined."""
    assert list(Event) == [Event.PENDING, Event.READ, Event.WRITE, Event.CLOSE, Event.OOB]
    assert Event.READ in Event.READ | Event.CLOSE
    assert Event.WRITE not in Event.READ | Event.CLOSE


def test_subscribe() -> None:
    """A subscription is told of the events it is for, and of no other."""
    signals = Signals()
    subscription = signals.add(Event.READ | Event.CLOSE, ignore)

    assert subscription.callback is ignore
    assert not subscription.cancelled
    assert [event for event in Event if subscription.wants(event)] == [Event.READ, Event.CLOSE]
    assert [event for event in Event if signals.wanted(event)] == [Event.READ, Event.CLOSE]
    assert signals.fire(Event.READ) == [subscription]
    assert signals.fire(Event.WRITE) == []


@pytest.mark.parametrize("events", [0, 1, None, "READ", Event(0), Status.CLOSED], ids=repr)
def test_events_that_are_none(events: Any) -> None:
    """Subscribing to no event, or to what is none, is refused; nobody is subscribed."""
    signals = Signals()
    with pytest.raises(TypeError, match="events are one or more of Event"):
        signals.add(events, ignore)

    assert signals.subscriptions == []


@pytest.mark.parametrize("callback", [None, 5, "ignore"])
def test_a_callback_that_cannot_be_called(callback: Any) -> None:
    """What cannot be called is refused at once; nobody is subscribed."""
    signals = Signals()
    with pytest.raises(TypeError, match="the callback cannot be called"):
        signals.add(Event.READ, callback)

    assert signals.subscriptions == []


def test_a_subscription_shows_itself() -> None:
    """The repr names events and callback, and says if it was cancelled."""
    subscription = Subscription(Event.READ, ignore)
    assert repr(subscription) == f"<Subscription {Event.READ!r} {ignore!r}>"
    subscription.cancel()
    assert repr(subscription) == f"<Subscription {Event.READ!r} {ignore!r} cancelled>"


def test_cancelled_ones_are_told_nothing() -> None:
    """A cancelled subscription wants no event; cancelling again changes nothing."""
    signals = Signals()
    gone, stays = signals.add(Event.READ, ignore), signals.add(Event.READ, ignore)
    gone.cancel()
    gone.cancel()

    assert gone.cancelled
    assert not gone.wants(Event.READ)
    assert signals.fire(Event.READ) == [stays]


def test_cancelled_ones_do_not_pile_up() -> None:
    """Subscribing and cancelling for ever takes no room."""
    signals = Signals()
    for _ in range(100):
        signals.add(Event.READ, ignore).cancel()

    assert len(signals.subscriptions) == 1


def test_every_subscription_is_one() -> None:
    """The same callback twice is told twice, in the order of subscribing."""
    signals = Signals()
    first = signals.add(Event.READ, ignore)
    second = signals.add(Event.READ | Event.WRITE, ignore)

    assert first is not second
    assert signals.fire(Event.READ) == [first, second]


# -- arming


def test_told_once() -> None:
    """An event that was told is not told again before it is armed again."""
    signals = Signals()
    subscription = signals.add(Event.READ | Event.WRITE, ignore)

    assert signals.armed(Event.READ)
    assert signals.fire(Event.READ) == [subscription]
    assert not signals.armed(Event.READ)
    assert not signals.wanted(Event.READ)
    assert signals.fire(Event.READ) == []
    signals.arm(Event.READ)
    assert signals.wanted(Event.READ)
    assert signals.fire(Event.READ) == [subscription]


def test_events_are_armed_one_by_one() -> None:
    """Telling one event, or arming it, is nothing to the others."""
    signals = Signals()
    signals.add(Event.READ | Event.WRITE | Event.CLOSE, ignore)
    signals.fire(Event.READ)
    signals.fire(Event.CLOSE)
    assert [event for event in Event if not signals.armed(event)] == [Event.READ, Event.CLOSE]
    signals.arm(Event.READ)

    assert [event for event in Event if not signals.armed(event)] == [Event.CLOSE]


def test_an_event_nobody_wanted_stays_armed() -> None:
    """What was told to nobody can still be told to a late subscriber."""
    signals = Signals()
    signals.add(Event.WRITE, ignore)
    signals.add(Event.READ, ignore).cancel()
    assert signals.fire(Event.READ) == []
    assert signals.armed(Event.READ)
    late = signals.add(Event.READ, ignore)

    assert signals.fire(Event.READ) == [late]


def test_arming_what_is_armed() -> None:
    """Arming twice is arming once."""
    signals = Signals()
    subscription = signals.add(Event.READ, ignore)
    signals.arm(Event.READ)
    signals.arm(Event.READ)

    assert signals.fire(Event.READ) == [subscription]
    assert signals.fire(Event.READ) == []


# -- inheritance


def test_inherited_copies() -> None:
    """A new source inherits who is subscribed now, with everything armed."""
    parent = Signals()
    told = parent.add(Event.READ, ignore)
    parent.add(Event.READ, ignore).cancel()
    parent.fire(Event.READ)
    child = Signals(parent.subscriptions)
    parent.add(Event.WRITE, ignore)

    assert len(child.subscriptions) == 1
    assert child.subscriptions[0] is not told
    assert child.subscriptions[0].callback is ignore
    assert child.armed(Event.READ)
    assert not child.wanted(Event.WRITE)
    assert child.fire(Event.READ) == child.subscriptions


def test_copies_are_cancelled_by_themselves() -> None:
    """Cancelling here leaves the inherited copy alone, and the other way round."""
    parent = Signals()
    first, second = parent.add(Event.READ, ignore), parent.add(Event.READ, ignore)
    child = Signals(parent.subscriptions)
    first.cancel()
    child.subscriptions[1].cancel()

    assert parent.fire(Event.READ) == [second]
    assert child.fire(Event.READ) == [child.subscriptions[0]]


class SignalsMachine(RuleBasedStateMachine):
    """Signals beside two sets that do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.signals = Signals()
        self.live: list[tuple[Subscription, Event]] = []
        self.armed = set(Event)

    @rule(events=st.sets(st.sampled_from(list(Event)), min_size=1))
    def subscribe(self, events: set[Event]) -> None:
        """Subscribe to some events."""
        wanted = Event(0)
        for event in events:
            wanted |= event
        self.live.append((self.signals.add(wanted, ignore), wanted))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel one of them."""
        if self.live:
            one = data.draw(st.sampled_from(self.live))
            self.live.remove(one)
            one[0].cancel()

    @rule(event=st.sampled_from(list(Event)))
    def arm(self, event: Event) -> None:
        """Arm an event."""
        self.signals.arm(event)
        self.armed.add(event)

    @rule(event=st.sampled_from(list(Event)))
    def fire(self, event: Event) -> None:
        """Fire an event: everybody who wants it is told, or nobody."""
        told = [one for one, events in self.live if event in events and event in self.armed]
        assert self.signals.fire(event) == told
        if told:
            self.armed.discard(event)

    @rule()
    def inherit(self) -> None:
        """Let a new source take its place."""
        self.signals = Signals(self.signals.subscriptions)
        copies = self.signals.subscriptions
        self.live = [(copy, w) for copy, (_, w) in zip(copies, self.live, strict=True)]
        self.armed = set(Event)

    @invariant()
    def agree(self) -> None:
        """Both say the same of every event."""
        for event in Event:
            assert self.signals.armed(event) == (event in self.armed)
            some = any(event in events for _, events in self.live)
            assert self.signals.wanted(event) == (some and event in self.armed)


@pytest.mark.slow
def test_signals_against_sets() -> None:
    """Whatever is done to them, signals are the two sets that they claim to be."""
    run_state_machine_as_test(
        SignalsMachine, settings=settings(max_examples=50, stateful_step_count=30)
    )


# -- outcomes


@pytest.mark.parametrize("status", ENDS, ids=lambda status: status.value)
def test_outcome(status: Status) -> None:
    """An outcome is either a verdict or a loss, never both and never neither."""
    outcome = Outcome(status, ("192.0.2.1", 5), "because", 1.5, 2)

    assert outcome.verdict is ENDS[status]
    assert outcome.loss is (status if ENDS[status] is None else None)


def test_outcomes_are_values() -> None:
    """An outcome that was told cannot be changed by those who were told of it."""
    outcome = Outcome(Status.RESET, ("192.0.2.1", 5), "because", 1.5, 2)
    assert outcome == Outcome(Status.RESET, ("192.0.2.1", 5), "because", 1.5, 2)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        outcome.reason = "another"  # type: ignore[misc]


# -- the ledger


class Books:
    """A ledger, with what it has put off until later and what it has reported."""

    def __init__(self) -> None:
        self.later: list[tuple[Callable[..., object], Any]] = []
        self.reported: list[tuple[str, BaseException]] = []
        self.ledger = Ledger(
            lambda callback, argument: self.later.append((callback, argument)),
            lambda message, error: self.reported.append((message, error)),
        )

    def turn(self) -> None:
        """Call what was put off."""
        later, self.later = self.later, []
        for callback, argument in later:
            callback(argument)


def ended(status: Status) -> PendingTransport:
    """Return a connection whose owner has just moved it to *status*."""
    pending = pending_transport()
    pending._status = status
    return pending


@pytest.mark.parametrize("status", ENDS, ids=lambda status: status.value)
def test_settle_counts(status: Status) -> None:
    """Every end is counted once, where it belongs."""
    books = Books()
    books.ledger.settle(ended(status), status, "because")

    assert books.ledger.counts == {each: int(each is status) for each in ENDS}
    assert books.later == []


def test_settle_tells() -> None:
    """The outcome goes to whom the connection knows, then to everybody, and later only."""
    books = Books()
    told: list[tuple[str, Outcome]] = []
    books.ledger.on_outcome(lambda outcome: told.append(("all", outcome)))
    now = [10.0]
    pending = pending_transport(("192.0.2.3", 9), clock=lambda: now[0])
    pending.on_settled(lambda outcome: told.append(("first", outcome)))
    pending.on_settled(lambda outcome: told.append(("second", outcome)))
    pending.deferrals = 3
    now[0] = 12.5
    pending._status = Status.EXPIRED
    books.ledger.settle(pending, Status.EXPIRED, "too late")
    assert told == []

    books.turn()
    outcome = Outcome(Status.EXPIRED, ("192.0.2.3", 9), "too late", 2.5, 3)
    assert told == [("first", outcome), ("second", outcome), ("all", outcome)]
    assert books.later == []


def test_outcome_callbacks_must_be_callable() -> None:
    """What cannot be called is refused when it is given, not when it is needed."""
    books = Books()
    with pytest.raises(TypeError, match="the callback cannot be called: 5"):
        books.ledger.on_outcome(5)  # type: ignore[arg-type]
    books.ledger.settle(ended(Status.CLOSED), Status.CLOSED, "because")

    assert books.later == []


@pytest.mark.parametrize("how", ["settle", "end_offer"])
def test_holds_are_released_last_held_first(how: str) -> None:
    """What an offer held is released when it ends, last held first, and only once."""
    books = Books()
    released: list[str] = []
    pending = pending_transport()
    for name in "abc":
        pending.hold(partial(released.append, name))

    def end() -> None:
        if how == "settle":
            pending._status = Status.REJECTED
            books.ledger.settle(pending, Status.REJECTED, "because")
        else:
            books.ledger.end_offer(pending)

    end()
    assert released == ["c", "b", "a"]
    end()
    assert released == ["c", "b", "a"]
    assert books.reported == []
    with pytest.raises(RuntimeError, match="belongs to an offer"):
        pending.hold(partial(released.append, "d"))


def test_what_a_stream_took_over_is_left_to_it() -> None:
    """Holds that went to the stream are not released by the books."""
    books = Books()
    released: list[str] = []
    pending = pending_transport()
    pending.hold(partial(released.append, "a"))
    taken_over = pending._release_holds()
    pending._status = Status.ACCEPTED
    books.ledger.settle(pending, Status.ACCEPTED, "because")
    assert released == []

    books.ledger.release(taken_over)
    assert released == ["a"]


def test_a_release_that_raises() -> None:
    """A release that raises is reported, and the others are called all the same."""
    books = Books()
    released: list[str] = []
    error = ZeroDivisionError("no")

    def fail() -> None:
        raise error

    pending = pending_transport()
    for release in (partial(released.append, "a"), fail, partial(released.append, "c")):
        pending.hold(release)
    books.ledger.end_offer(pending)

    assert released == ["c", "a"]
    assert [each for _, each in books.reported] == [error]
    assert repr(fail) in books.reported[0][0]


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_a_release_that_raises_what_is_no_exception(kind: type[BaseException]) -> None:
    """Whatever one release raises, the others are called once."""
    books = Books()
    released: list[str] = []

    def fail() -> None:
        raise kind

    pending = pending_transport()
    for release in (partial(released.append, "a"), fail, partial(released.append, "c")):
        pending.hold(release)
    try:
        books.ledger.end_offer(pending)
    except kind:
        assert books.reported == []  # raised or reported, not both
    else:
        assert [type(error) for _, error in books.reported] == [kind]

    assert released == ["c", "a"]
    assert pending._release_holds() == []


def test_a_release_that_comes_back() -> None:
    """A release that ends the offer once more releases nothing twice."""
    books = Books()
    released: list[str] = []
    pending = pending_transport()

    def again() -> None:
        released.append("b")
        books.ledger.end_offer(pending)

    pending.hold(partial(released.append, "a"))
    pending.hold(again)
    books.ledger.end_offer(pending)

    assert released == ["b", "a"]


def test_statistics_are_frozen() -> None:
    """Statistics are of one moment: they are given by name and stay as they are."""
    numbers: dict[str, Any] = {field.name: 0 for field in attrs.fields(Statistics)}
    statistics = Statistics(**numbers)
    assert statistics == Statistics(**numbers)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        statistics.taken = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Statistics(*numbers.values())  # type: ignore[call-arg]
