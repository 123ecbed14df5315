"""How connections end: what is released, who is told, what is counted, and when."""

from __future__ import annotations

import asyncio
import gc
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    Accept,
    AcceptInterruptedError,
    AnyVerdict,
    CalleeDataError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Defer,
    Event,
    InvalidGroupError,
    InvalidVerdictError,
    Listener,
    ListenerClosedError,
    NoPendingError,
    Outcome,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    Reject,
    Status,
    Stream,
    Verdict,
    listen,
)
from condaccept.testing import memory_listener
from tests.support import (
    Condition,
    Dial,
    accept,
    caught_up,
    defer,
    queued,
    reject,
    reset,
    somaxconn,
    until,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MB = 1024 * 1024
SOON = 0.005
"""A defer_timeout that is over before long; nothing depends on how long it takes."""


def add_up(listener: Listener[Any]) -> None:
    """Check that every connection that was taken is counted once."""
    now = listener.statistics()
    ends = now.accepted, now.rejected, now.reset, now.expired, now.failed, now.closed
    assert now.taken == sum(ends) + now.pending
    assert now.deciding <= now.pending
    assert (now.oldest_age is None) == (now.pending == 0)


class Held:
    """Holds three things in each offer, and keeps in which order they are released."""

    def __init__(self) -> None:
        self.released: list[str] = []
        self.offers = 0

    def hold(self, pending: PendingTransport) -> None:
        """Hold, under names that tell the offer."""
        self.offers += 1
        for name in "abc":
            pending.hold(partial(self.released.append, f"{name}{self.offers}"))

    def then(
        self, end: Callable[[PendingTransport], Any]
    ) -> Callable[[PendingTransport], AnyVerdict]:
        """Return a plain condition that holds and then does *end*."""

        def condition(pending: PendingTransport) -> Any:
            self.hold(pending)
            return end(pending)

        return condition

    def later(
        self, end: Callable[[PendingTransport], Any], go: asyncio.Event | None = None
    ) -> Callable[[PendingTransport], Awaitable[AnyVerdict]]:
        """Return an async condition that holds, waits for *go*, and then does *end*."""

        async def condition(pending: PendingTransport) -> Any:
            self.hold(pending)
            await (asyncio.sleep(0) if go is None else go.wait())
            return end(pending)

        return condition


def outcomes(listener: Listener[Any]) -> list[Outcome]:
    """Collect the outcomes of a listener."""
    seen: list[Outcome] = []
    listener.on_outcome(seen.append)
    return seen


async def offered(
    listener: Listener[Any], kind: str, held: Held, end: Callable[[PendingTransport], Any]
) -> Any:
    """Make one offer in one of three ways."""
    if kind == "nowait":
        return listener.accept_nowait(held.then(end))
    return await listener.accept(held.then(end) if kind == "plain" else held.later(end))


def forget(things: list[Any]) -> None:
    """Drop what is in the list."""
    things.clear()
    gc.collect()


async def deferred(listener: Listener[Any], dial: Dial, *, data: bytes = b"") -> socket.socket:
    """Return a caller that was deferred."""
    client = dial(listener, data=data)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    return client


async def deciding(
    listener: Listener[Any], condition: Callable[[PendingTransport], Any], n: int = 1
) -> asyncio.Task[Any]:
    """Start an accept call and return when its condition is being asked."""
    task: asyncio.Task[Any] = asyncio.ensure_future(listener.accept(condition))
    await until(lambda: listener.statistics().deciding == n)
    return task


# -- what a condition holds


def bad_group(pending: PendingTransport) -> AnyVerdict:
    """Name a group that no listener has."""
    pending.group = "nobody"
    return ACCEPT


def groupless(pending: PendingTransport) -> AnyVerdict:
    """Name no group after all."""
    pending.group = None
    return ACCEPT


def raises(_pending: PendingTransport) -> AnyVerdict:
    """Raise."""
    raise ZeroDivisionError


WITHOUT_A_STREAM: list[tuple[type[Exception], Callable[[PendingTransport], Any], bool]] = [
    (ConnectionDeferredError, defer, True),
    (ConnectionRejectedError, reject, False),
    (ConnectionRejectedError, lambda _: Reject(data=b"no"), False),
    (ZeroDivisionError, raises, False),
    (InvalidVerdictError, lambda _: 7, True),
    (InvalidVerdictError, lambda _: None, True),
    (InvalidGroupError, bad_group, True),
    (CalleeDataError, lambda _: Reject(data=bytes(5000)), True),
]


@pytest.mark.parametrize("kind", ["plain", "async", "nowait"])
@pytest.mark.parametrize(
    ("error", "end", "stays"),
    WITHOUT_A_STREAM,
    ids=["defer", "reject", "tell", "raise", "seven", "none", "group", "long"],
)
async def test_holds_of_an_offer_without_a_stream(
    listener: Listener[Stream],
    dial: Dial,
    kind: str,
    error: type[Exception],
    end: Callable[[PendingTransport], Any],
    *,
    stays: bool,
) -> None:
    """What an offer held is released when it ends without ACCEPT, last held first, once."""
    held = Held()
    client = dial(listener)
    await queued(listener, 1)
    for offer in (1, 2) if stays else (1,):
        with pytest.raises(error):
            await offered(listener, kind, held, end)
        assert held.released[-3:] == [f"{name}{offer}" for name in "cba"]
        assert len(held.released) == 3 * offer
        add_up(listener)
    assert len(listener.pending) == stays
    if stays:
        stream = await listener.accept(groupless)
        assert stream.caller_id == client.getsockname()
        stream.close()
    listener.close()
    assert len(held.released) == 3 * held.offers


@pytest.mark.parametrize("how", ["close", "abort", "forget", "listener"])
async def test_holds_of_a_stream(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """What an accepted offer held is released when the descriptor is closed, once."""
    held = Held()
    dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(held.then(defer))
    assert held.released == ["c1", "b1", "a1"]
    held.released.clear()
    streams = [await listener.accept(held.then(accept))]
    gc.collect()
    assert held.released == []
    if how == "close":
        streams[0].close()
    elif how == "abort":
        streams[0].abort()
    elif how == "forget":
        with pytest.warns(ResourceWarning):
            forget(streams)
        await asyncio.sleep(0)
    else:
        listener.close()
        assert held.released == []
        listener.abort()
    assert held.released == ["c2", "b2", "a2"]
    assert listener.statistics().streams == 0
    listener.abort()
    gc.collect()
    assert held.released == ["c2", "b2", "a2"]


async def test_holds_last_through_the_flush(listener: Listener[Stream], dial: Dial) -> None:
    """A stream that is closed keeps its holds until what it wrote has gone out."""
    held = Held()
    client = dial(listener)
    stream = await listener.accept(held.later(accept))
    stream.write(bytes(8 * MB))
    stream.close()
    await caught_up()
    assert held.released == []
    assert listener.statistics().streams == 1

    def drain() -> None:
        while client.recv(65536):
            pass

    await asyncio.to_thread(drain)
    await stream.wait_closed()
    assert held.released == ["c1", "b1", "a1"]


async def test_hold_is_released_behind_the_close(listener: Listener[Stream], dial: Dial) -> None:
    """When a hold is released the descriptor is closed already, and accepting works."""
    seen: list[object] = []
    dial(listener)
    dial(listener)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: seen.append(listener.accept_nowait(accept)))
        return ACCEPT

    stream = await listener.accept(condition)
    fd = stream.get_extra_info("socket").fileno()
    stream.close()
    (second,) = seen
    assert isinstance(second, Stream)
    assert second.get_extra_info("socket").fileno() == fd
    assert not second.is_closing()
    second.close()
    add_up(listener)


async def test_holds_when_the_decision_is_cancelled(listener: Listener[Stream], dial: Dial) -> None:
    """A decision that is cancelled releases its holds, and the next offer begins anew."""
    held = Held()
    dial(listener)
    for offer in (1, 2):
        task = await deciding(listener, held.later(accept, asyncio.Event()))
        assert len(held.released) == 3 * (offer - 1)
        add_up(listener)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.released[-3:] == [f"{name}{offer}" for name in "cba"]
        assert len(listener.pending) == 1
        add_up(listener)


async def test_holds_when_the_caller_resets(listener: Listener[Stream], dial: Dial) -> None:
    """A caller that resets under decision is lost whatever the verdict; holds are released."""
    held = Held()
    for offer, end in enumerate((accept, reject, defer), 1):
        go = asyncio.Event()
        client = dial(listener)
        task = await deciding(listener, held.later(end, go))
        reset(client)
        go.set()
        with pytest.raises(PendingResetError):
            await task
        assert held.released[-3:] == [f"{name}{offer}" for name in "cba"]
        assert len(held.released) == 3 * offer
        assert listener.statistics().reset == offer
        add_up(listener)
    with pytest.raises(NoPendingError):
        listener.accept_nowait(accept)


async def test_holds_when_the_listener_closes(listener: Listener[Stream], dial: Dial) -> None:
    """close() cancels a decision and releases what it held; its caller is reset."""
    held = Held()
    client = dial(listener)
    task = await deciding(listener, held.later(accept, asyncio.Event()))
    listener.close()
    assert held.released == ["c1", "b1", "a1"]
    with pytest.raises(ListenerClosedError):
        await task
    assert await wire_end(client) == "reset"
    assert held.released == ["c1", "b1", "a1"]
    assert listener.statistics().closed == 1
    add_up(listener)


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("end", [accept, reject, defer, raises, lambda _: 7])
async def test_holds_when_the_condition_closes_the_listener(
    listener: Listener[Stream],
    dial: Dial,
    kind: str,
    end: Callable[[PendingTransport], Any],
) -> None:
    """A condition that closes the listener keeps its verdict and its holds, until ACCEPT's end."""
    held = Held()
    client = dial(listener)

    def close(pending: PendingTransport) -> Any:
        listener.close()
        assert held.released == []
        return end(pending)

    call = listener.accept(held.then(close) if kind == "plain" else held.later(close))
    if end is accept:
        stream = await call
        assert held.released == []
        stream.close()
        assert await wire_end(client) == "eof"
    else:
        expected: dict[Any, type[Exception]] = {
            reject: ConnectionRejectedError,
            defer: ListenerClosedError,
            raises: ZeroDivisionError,
        }
        with pytest.raises(expected.get(end, InvalidVerdictError)):
            await call
        assert await wire_end(client) == "reset"
    assert held.released == ["c1", "b1", "a1"]
    add_up(listener)
    await listener.wait_closed()


async def test_farewell_from_a_condition_that_closes(
    listener: Listener[Stream], dial: Dial
) -> None:
    """Callee data of a REJECT that closed the listener leaves nothing in the background."""
    client = dial(listener)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        return Reject(data=b"too late")

    with pytest.raises(ConnectionRejectedError):
        await listener.accept(condition)
    now = listener.statistics()
    assert (now.rejected, now.rejecting) == (1, 0)
    assert await wire_end(client) in (b"too late", "reset")


async def test_holds_when_the_factory_fails(dial: Dial) -> None:
    """A stream_factory that raises releases what the accepted offer held."""
    held = Held()

    def factory(_stream: Stream) -> None:
        assert held.released == []
        raise ZeroDivisionError

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        dial(listener)
        with pytest.raises(ZeroDivisionError):
            await listener.accept(held.then(accept))
        assert held.released == ["c1", "b1", "a1"]
    assert held.released == ["c1", "b1", "a1"]


@pytest.mark.parametrize("ends", [accept, reject])
async def test_release_that_raises(
    listener: Listener[Stream], dial: Dial, ends: Callable[[PendingTransport], AnyVerdict]
) -> None:
    """A release that raises is reported; the others are released, the listener lives."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: reported.append(each))
    released: list[str] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: released.append("first"))
        pending.hold(lambda: 1 / 0)
        pending.hold(lambda: released.append("last"))
        return ends(pending)

    dial(listener)
    if ends is accept:
        (await listener.accept(condition)).close()
    else:
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(condition)
    assert released == ["last", "first"]
    assert [type(each["exception"]) for each in reported] == [ZeroDivisionError]
    assert "release" in reported[0]["message"]
    dial(listener)
    (await listener.accept()).close()


async def test_hold_belongs_to_an_offer(listener: Listener[Stream], dial: Dial) -> None:
    """hold() outside of an offer is a RuntimeError, before, between and after them."""
    kept: list[PendingTransport] = []

    def condition(pending: PendingTransport) -> Any:
        kept.append(pending)
        return verdicts.pop(0)

    verdicts: list[Any] = [DEFER, 7, ACCEPT]
    client = dial(listener)
    for error in (ConnectionDeferredError, InvalidVerdictError):
        with pytest.raises(error):
            await listener.accept(condition)
        with pytest.raises(RuntimeError, match="offer"):
            kept[-1].hold(lambda: None)
    stream = await listener.accept(condition)
    assert kept[0] is kept[1] is kept[2]
    with pytest.raises(RuntimeError, match="offer"):
        kept[0].hold(lambda: None)
    stream.close()
    assert await wire_end(client) == "eof"


async def test_hold_under_a_decision_by_another_task(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A task of an async condition may hold for the offer under way."""
    released: list[str] = []

    async def helper(pending: PendingTransport) -> None:
        pending.hold(lambda: released.append("helper"))

    async def condition(pending: PendingTransport) -> AnyVerdict:
        await asyncio.ensure_future(helper(pending))
        return ACCEPT

    dial(listener)
    stream = await listener.accept(condition)
    assert released == []
    stream.close()
    assert released == ["helper"]


@pytest.mark.parametrize("end", [defer, lambda _: 7])
async def test_release_that_accepts_keeps_the_order(
    listener: Listener[Stream], dial: Dial, end: Callable[[PendingTransport], Any]
) -> None:
    """A release that makes an accept call of its own changes nobody's place."""
    first, second = dial(listener), dial(listener)

    def release() -> None:
        with pytest.raises((ConnectionDeferredError, NoPendingError)):
            listener.accept_nowait(defer)

    def condition(pending: PendingTransport) -> Any:
        pending.hold(release)
        return end(pending)

    with pytest.raises((ConnectionDeferredError, InvalidVerdictError)):
        await listener.accept(condition)
    streams = [await listener.accept() for _ in range(2)]
    assert [stream.caller_id for stream in streams] == [
        first.getsockname(),
        second.getsockname(),
    ]
    for stream in streams:
        stream.close()
    add_up(listener)


@pytest.mark.parametrize("end", [accept, reject, defer, lambda _: 7])
async def test_release_that_closes_the_listener(
    listener: Listener[Stream], dial: Dial, end: Callable[[PendingTransport], Any]
) -> None:
    """A release may close the listener; the connection it belonged to has one end all the same."""
    seen = outcomes(listener)
    client = dial(listener)

    def condition(pending: PendingTransport) -> Any:
        pending.hold(listener.close)
        return end(pending)

    if end is accept:
        (await listener.accept(condition)).close()
    else:
        expected: dict[Any, type[Exception]] = {
            reject: ConnectionRejectedError,
            defer: ListenerClosedError,
        }
        with pytest.raises(expected.get(end, InvalidVerdictError)):
            await listener.accept(condition)
    assert listener.sockets == ()
    assert await wire_end(client) == ("eof" if end is accept else "reset")
    await until(lambda: seen)
    await caught_up()
    assert len(seen) == 1
    add_up(listener)
    assert listener.statistics().pending == 0


# -- what becomes of an admission that takes time


@pytest.fixture
async def slow() -> AsyncIterator[tuple[Listener[Stream], Any]]:
    """A listener whose accepted connections are complete only when the test says so."""
    listener, gate = memory_listener(slow=True)
    async with listener:
        yield listener, gate


async def test_holds_through_an_admission(slow: tuple[Listener[Stream], Any]) -> None:
    """Holds last through the admission and the stream."""
    listener, gate = slow
    held = Held()
    seen = outcomes(listener)
    with gate.dial():
        task = asyncio.ensure_future(listener.accept(held.then(accept)))
        await until(lambda: gate.admitting)
        add_up(listener)
        assert (held.released, seen) == ([], [])
        gate.complete()
        stream = await task
        assert held.released == []
        stream.close()
    assert held.released == ["c1", "b1", "a1"]
    await caught_up()
    assert [each.status for each in seen] == [Status.ACCEPTED]


@pytest.mark.parametrize("taker", ["waits", "was cancelled", "nowait"])
async def test_admission_that_fails(slow: tuple[Listener[Stream], Any], taker: str) -> None:
    """A caller that leaves during the admission is lost: told once, its holds released."""
    listener, gate = slow
    held = Held()
    seen = outcomes(listener)
    with gate.dial():
        if taker == "nowait":
            with pytest.raises(NoPendingError):
                listener.accept_nowait(held.then(accept))
        else:
            task = asyncio.ensure_future(listener.accept(held.then(accept)))
            await until(lambda: gate.admitting)
            if taker == "was cancelled":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert held.released == []
        gate.fail()
        with pytest.raises(PendingResetError):
            await (task if taker == "waits" else listener.accept(accept))
    assert held.released == ["c1", "b1", "a1"]
    with pytest.raises(NoPendingError):
        listener.accept_nowait(accept)
    await caught_up()
    assert [each.status for each in seen] == [Status.RESET]
    add_up(listener)


@pytest.mark.parametrize("complete", [False, True])
async def test_admission_when_the_listener_closes(
    slow: tuple[Listener[Stream], Any], *, complete: bool
) -> None:
    """An accepted connection that nobody has taken at close() is closed, its holds released."""
    listener, gate = slow
    held = Held()
    seen = outcomes(listener)
    with gate.dial() as client:
        with pytest.raises(NoPendingError):
            listener.accept_nowait(held.then(accept))
        if complete:
            gate.complete()
            await caught_up()
        listener.close()
        assert held.released == ["c1", "b1", "a1"]
        assert await wire_end(client) == "eof"
    await caught_up()
    assert [each.status for each in seen] == [Status.CLOSED]
    assert listener.statistics().closed == 1
    add_up(listener)


# -- who is told


async def test_accepted_outcome(listener: Listener[Stream], dial: Dial) -> None:
    """An accepted connection has one outcome, told soon but not inside the call."""
    seen = outcomes(listener)
    client = dial(listener)
    for reason in ("first", "second"):
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(Condition(Defer(reason=reason)))
    await caught_up()
    assert seen == []
    stream = listener.accept_nowait(lambda _: Accept(reason="a friend"))
    assert seen == []
    stream.close()
    await until(lambda: seen)
    (outcome,) = seen
    assert (outcome.status, outcome.verdict, outcome.loss) == (
        Status.ACCEPTED,
        Verdict.ACCEPT,
        None,
    )
    assert outcome.caller_id == client.getsockname()
    assert outcome.reason == "a friend"
    assert outcome.deferrals == 2
    assert outcome.age >= 0
    await caught_up()
    assert len(seen) == 1


async def test_rejected_outcomes(listener: Listener[Stream], dial: Dial) -> None:
    """A rejection tells its reason; so does a condition that raised."""
    seen = outcomes(listener)
    first, second = dial(listener), dial(listener)
    with pytest.raises(ConnectionRejectedError) as rejected:
        await listener.accept(lambda _: Reject(reason="too many"))
    with pytest.raises(ZeroDivisionError) as raised:
        await listener.accept(raises)
    assert rejected.value.reason == "too many"
    assert any(str(second.getsockname()) in note for note in raised.value.__notes__)
    await until(lambda: len(seen) == 2)
    assert [each.status for each in seen] == [Status.REJECTED] * 2
    assert [each.verdict for each in seen] == [Verdict.REJECT] * 2
    assert [each.caller_id for each in seen] == [first.getsockname(), second.getsockname()]
    assert seen[0].reason == "too many"
    assert "ZeroDivisionError" in seen[1].reason
    assert await wire_end(first) == "reset"
    assert await wire_end(second) == "reset"


async def test_lost_outcomes(dial: Dial) -> None:
    """Resets, expiries, withdrawals, failures and closings have outcomes without a verdict."""

    def factory(_stream: Stream) -> None:
        raise ZeroDivisionError

    listener = await listen(
        "127.0.0.1", 0, on_eof="withdraw", defer_timeout=SOON, stream_factory=factory
    )
    seen = outcomes(listener)
    reset(dial(listener))
    with pytest.raises(PendingResetError):
        await listener.accept(defer)
    await deferred(listener, dial)
    await until(lambda: len(seen) == 2)
    with pytest.raises(PendingExpiredError):
        await listener.accept(defer)
    dial(listener).close()
    with pytest.raises(PendingExpiredError):
        await listener.accept(accept)
    dial(listener)
    with pytest.raises(ZeroDivisionError):
        await listener.accept(accept)
    dial(listener)
    with pytest.raises(InvalidVerdictError):
        await listener.accept(lambda _: None)  # type: ignore[arg-type,return-value]
    listener.close()
    add_up(listener)
    await until(lambda: len(seen) == 5)
    assert [each.status for each in seen] == [
        Status.RESET,
        Status.EXPIRED,
        Status.EXPIRED,
        Status.FAILED,
        Status.CLOSED,
    ]
    assert {each.verdict for each in seen} == {None}
    assert [each.loss for each in seen] == [each.status for each in seen]
    assert [each.deferrals for each in seen] == [0, 1, 0, 0, 0]
    assert len({each.reason for each in seen}) == 5
    assert len({each.caller_id for each in seen}) == 5


async def test_outcome_callbacks(listener: Listener[Stream], dial: Dial) -> None:
    """Several callbacks are told each; one that raises is reported and harms nobody."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: reported.append(each))
    first = outcomes(listener)
    listener.on_outcome(lambda _: 1 / 0)
    second = outcomes(listener)
    with pytest.raises(TypeError, match="cannot be called"):
        listener.on_outcome(None)  # type: ignore[arg-type]
    dial(listener)
    (await listener.accept()).close()
    await until(lambda: second)
    assert first == second
    assert [type(each["exception"]) for each in reported] == [ZeroDivisionError]


@pytest.mark.parametrize("wrong", ["async", None])
async def test_callbacks_nobody_can_call(
    listener: Listener[Stream], dial: Dial, wrong: Any
) -> None:
    """An async callback, or none, is refused when it is given, and the caller gets in."""

    async def callback(_outcome: Outcome) -> None:
        pytest.fail("nobody awaits this")

    given: Any = callback if wrong else None

    def condition(pending: PendingTransport) -> AnyVerdict:
        with pytest.raises(TypeError, match="the callback"):
            pending.on_settled(given)
        return ACCEPT

    for register in (listener.on_outcome, listener.on_exhausted):
        with pytest.raises(TypeError, match="the callback"):
            register(given)
    dial(listener)
    (await listener.accept(condition)).close()


async def test_outcomes_of_many(listener: Listener[Stream], dial: Dial) -> None:
    """Every connection has its own outcome, in the order of the ends."""
    seen = outcomes(listener)
    verdicts = [ACCEPT, REJECT, ACCEPT, REJECT, REJECT] * 6
    clients = [dial(listener) for _ in verdicts]
    condition = Condition(*verdicts)
    for _ in clients:
        try:
            (await listener.accept(condition)).close()
        except ConnectionRejectedError:
            continue
    await until(lambda: len(seen) == len(verdicts))
    assert [each.verdict for each in seen] == verdicts
    assert [each.caller_id for each in seen] == [client.getsockname() for client in clients]


async def test_on_settled(listener: Listener[Stream], dial: Dial) -> None:
    """on_settled() belongs to the connection: told once, whichever offer asked for it."""
    seen: list[tuple[str, Outcome]] = []
    kept: list[PendingTransport] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        kept.append(pending)
        label = f"offer {len(kept)}"
        pending.on_settled(lambda outcome: seen.append((label, outcome)))
        return DEFER if len(kept) < 3 else ACCEPT

    dial(listener)
    for _ in range(2):
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(condition)
    kept[0].on_settled(lambda outcome: seen.append(("between", outcome)))
    everything = outcomes(listener)
    stream = listener.accept_nowait(condition)
    assert seen == []
    with pytest.raises(RuntimeError, match="accepted already"):
        kept[0].on_settled(lambda _: None)
    await until(lambda: everything)
    assert [label for label, _ in seen] == ["offer 1", "offer 2", "between", "offer 3"]
    assert {id(outcome) for _, outcome in seen} == {id(everything[0])}
    stream.close()
    await caught_up()
    assert len(seen) == 4


@pytest.mark.parametrize("status", [Status.REJECTED, Status.RESET, Status.EXPIRED, Status.CLOSED])
async def test_on_settled_of_others(dial: Dial, status: Status) -> None:
    """on_settled() tells of every end, once."""
    timeout = SOON if status is Status.EXPIRED else None
    listener = await listen("127.0.0.1", 0, defer_timeout=timeout)
    seen: list[Outcome] = []

    kept: list[PendingTransport] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        kept.append(pending)
        pending.on_settled(seen.append)
        return DEFER

    client = dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(condition)
    (pending,) = kept
    if status is Status.REJECTED:
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(reject)
    elif status is Status.RESET:
        reset(client)
    elif status is Status.CLOSED:
        listener.close()
    await until(lambda: seen)
    assert [each.status for each in seen] == [status]
    assert pending.status is status
    with pytest.raises(RuntimeError, match=f"{status.value} already"):
        pending.on_settled(seen.append)
    listener.close()
    await caught_up()
    assert len(seen) == 1


async def test_settled_callback_may_call_back(listener: Listener[Stream], dial: Dial) -> None:
    """A callback may make accept calls, and may close the listener."""
    seen: list[object] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.on_settled(lambda _: seen.append(listener.accept_nowait(accept)))
        pending.on_settled(lambda _: listener.close())
        return ACCEPT

    dial(listener)
    dial(listener)
    stream = await listener.accept(condition)
    await until(lambda: listener.sockets == ())
    (second,) = seen
    assert isinstance(second, Stream)
    stream.close()
    second.close()
    add_up(listener)


# -- what is counted


async def test_statistics(listener: Listener[Stream], dial: Dial) -> None:
    """The counts add up after every step, and say how things stand."""
    limit = min(4096, somaxconn())
    now = listener.statistics()
    assert (now.taken, now.pending, now.streams, now.oldest_age) == (0, 0, 0, None)
    assert (now.backlog, now.backlog_limit) == (0, limit)
    clients = [dial(listener) for _ in range(5)]
    await queued(listener, 5)
    assert listener.statistics().taken == 0

    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    now = listener.statistics()
    assert (now.taken, now.backlog, now.pending, now.deferrals, now.offers) == (1, 4, 1, 1, 1)
    assert now.oldest_age is not None
    assert now.oldest_age >= 0
    stream = await listener.accept(accept)
    now = listener.statistics()
    assert (now.accepted, now.streams, now.pending, now.offers) == (1, 1, 0, 2)
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(reject)
    with pytest.raises(ZeroDivisionError):
        await listener.accept(raises)
    assert listener.statistics().rejected == 2

    go = asyncio.Event()
    held = Held()
    task = await deciding(listener, held.later(accept, go))
    now = listener.statistics()
    assert (now.deciding, now.pending, now.backlog) == (1, 1, 1)
    add_up(listener)
    go.set()
    (await task).close()
    reset(clients[4])
    with pytest.raises(PendingResetError):
        await listener.accept(accept)
    now = listener.statistics()
    assert (now.taken, now.accepted, now.rejected, now.reset) == (5, 2, 2, 1)
    assert (now.pending, now.deciding, now.backlog) == (0, 0, 0)
    assert now.streams == 1
    add_up(listener)
    stream.close()
    assert listener.statistics().streams == 0


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("deferrals", [0, 1])
async def test_statistics_inside_a_condition(
    listener: Listener[Stream], dial: Dial, kind: str, deferrals: int
) -> None:
    """A condition finds the connection it is asked about among the pending ones."""
    seen: list[tuple[int, tuple[PendingTransport, ...]]] = []

    def look(_pending: PendingTransport) -> AnyVerdict:
        add_up(listener)
        seen.append((listener.statistics().pending, listener.pending))
        return ACCEPT

    async def look_later(pending: PendingTransport) -> AnyVerdict:
        return look(pending)

    dial(listener)
    for _ in range(deferrals):
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(defer)
    stream = await listener.accept(look if kind == "plain" else look_later)
    ((count, pending),) = seen
    assert count == 1
    assert [each.caller_id for each in pending] == [stream.caller_id]
    stream.close()


async def test_statistics_with_callee_data(dial: Dial) -> None:
    """Rejected callers that are still being told so are counted, and those cut short."""
    async with await listen("127.0.0.1", 0, reject_timeout=SOON) as listener:
        patient = dial(listener)
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(lambda _: Reject(data=b"no"))
        await until(lambda: listener.statistics().rejecting == 0)
        now = listener.statistics()
        assert (now.rejected, now.cut_short) == (1, 1)
        add_up(listener)
        patient.close()
    async with await listen("127.0.0.1", 0, reject_timeout=None) as listener:
        client = dial(listener)
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(lambda _: Reject(data=b"no"))
        assert listener.statistics().rejecting == 1
        assert await wire_end(client) == b"no"
        client.close()
        await until(lambda: listener.statistics().rejecting == 0)
        assert listener.statistics().cut_short == 0


async def test_statistics_after_close(listener: Listener[Stream], dial: Dial) -> None:
    """A closed listener's counts add up, and say nothing of the kernel's queue."""
    clients = [dial(listener) for _ in range(3)]
    stream = await listener.accept()
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    listener.close()
    now = listener.statistics()
    assert (now.taken, now.accepted, now.closed, now.streams) == (2, 1, 1, 1)
    assert (now.backlog, now.backlog_limit) == (None, None)
    add_up(listener)
    assert [await wire_end(client) for client in clients[1:]] == ["reset", "reset"]
    stream.close()
    assert listener.statistics().streams == 0


# -- deferred too long


async def test_deferral_expires(dial: Dial) -> None:
    """A deferred connection expires: its caller is reset, it is told once, and off the deque."""
    async with await listen("127.0.0.1", 0, defer_timeout=SOON) as listener:
        client = await deferred(listener, dial)
        await until(lambda: listener.statistics().expired)
        assert await wire_end(client) == "reset"
        assert listener.pending == ()
        behind = dial(listener)
        with pytest.raises(PendingExpiredError) as caught:
            await listener.accept(accept)
        assert caught.value.caller_id == client.getsockname()
        assert str(SOON) in caught.value.reason
        stream = await listener.accept(accept)
        assert stream.caller_id == behind.getsockname()
        assert listener.statistics().offers == 2
        add_up(listener)
        stream.close()


async def test_several_deferrals_expire(dial: Dial) -> None:
    """Expired ones are told in their places, between those that were not deferred."""
    async with await listen("127.0.0.1", 0, defer_timeout=SOON) as listener:
        go = asyncio.Event()

        async def late_defer(_pending: PendingTransport) -> AnyVerdict:
            await go.wait()
            return DEFER

        async def never(_pending: PendingTransport) -> AnyVerdict:
            await asyncio.get_running_loop().create_future()
            return ACCEPT

        clients = [dial(listener) for _ in range(4)]
        tasks = [
            await deciding(listener, each, n)
            for n, each in enumerate([late_defer, never, late_defer], 1)
        ]
        go.set()
        for task in (tasks[0], tasks[2]):
            with pytest.raises(ConnectionDeferredError):
                await task
        await until(lambda: listener.statistics().expired == 2)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert [each.caller_id for each in listener.pending] == [clients[1].getsockname()]
        add_up(listener)

        told: list[object] = []
        for _ in clients:
            try:
                stream = await listener.accept(accept)
            except PendingExpiredError as error:
                told.append(("expired", error.caller_id))
            else:
                told.append(("accepted", stream.caller_id))
                stream.close()
        names = [client.getsockname() for client in clients]
        assert told == [
            ("expired", names[0]),
            ("accepted", names[1]),
            ("expired", names[2]),
            ("accepted", names[3]),
        ]
        add_up(listener)


async def test_expiry_wakes_who_waits(dial: Dial) -> None:
    """wait_pending() and on(PENDING) learn of an expiry."""
    async with await listen("127.0.0.1", 0, defer_timeout=SOON) as listener:
        told: list[Event] = []
        await deferred(listener, dial)
        listener.on(Event.PENDING, lambda _, event, __: told.append(event))
        await listener.wait_pending()
        assert listener.statistics().expired == 1
        await until(lambda: told)
        with pytest.raises(PendingExpiredError):
            await listener.accept()


async def test_expiry_wakes_an_accept_call(dial: Dial) -> None:
    """An accept call that waits behind a decision is told of an expiry there."""
    async with await listen("127.0.0.1", 0, defer_timeout=SOON, max_pending=1) as listener:
        go = asyncio.Event()

        async def condition(_pending: PendingTransport) -> AnyVerdict:
            await go.wait()
            return DEFER

        client = dial(listener)
        first = await deciding(listener, condition)
        second = asyncio.ensure_future(listener.accept(accept))
        await caught_up()
        assert not second.done()
        go.set()
        with pytest.raises(ConnectionDeferredError):
            await first
        try:
            (await second).close()
        except PendingExpiredError as error:
            assert error.caller_id == client.getsockname()  # noqa: PT017 - either may be first
        add_up(listener)


async def turn_to(listener: Listener[Any], task: asyncio.Future[Any]) -> None:
    """Wait until the condition of *task* is being asked, or its connection has expired."""
    await until(lambda: task.done() or listener.statistics().deciding)
    if task.done():
        with pytest.raises(PendingExpiredError):
            await task


@pytest.mark.parametrize("end", [accept, reject, defer])
async def test_deadline_during_a_decision(
    dial: Dial, end: Callable[[PendingTransport], AnyVerdict]
) -> None:
    """A deadline that passes during a decision waits for it: only a deferral then expires."""
    async with await listen("127.0.0.1", 0, defer_timeout=SOON) as listener:
        seen = outcomes(listener)
        go = asyncio.Event()
        loop = asyncio.get_running_loop()
        expired = -1
        while listener.statistics().deciding == 0:
            # On a busy machine the deadline may pass before the second decision begins.
            expired += 1
            client = await deferred(listener, dial)
            deadline = loop.time() + SOON
            task = asyncio.ensure_future(listener.accept(Held().later(end, go)))
            await turn_to(listener, task)
        await until(lambda: loop.time() > deadline + SOON)
        assert listener.statistics().expired == expired
        go.set()
        if end is accept:
            stream = await task
            stream.write(b"in time")
            assert await wire_end(client) == b"in time"
            stream.close()
        elif end is reject:
            with pytest.raises(ConnectionRejectedError):
                await task
        else:
            with pytest.raises(ConnectionDeferredError):
                await task
            await until(lambda: listener.statistics().expired == expired + 1)
            assert await wire_end(client) == "reset"
        await until(lambda: len(seen) > expired)
        await caught_up()
        assert len(seen) == expired + 1
        add_up(listener)


async def test_deadline_is_that_of_the_first_deferral(dial: Dial) -> None:
    """Deferring again does not put the deadline off, and it expires once."""
    async with await listen("127.0.0.1", 0, defer_timeout=SOON) as listener:
        seen = outcomes(listener)
        await deferred(listener, dial)
        deferrals = 1
        while True:
            try:
                await listener.accept(defer)
            except ConnectionDeferredError:
                deferrals += 1
            except PendingExpiredError:
                break
        await until(lambda: seen)
        assert [(each.status, each.deferrals) for each in seen] == [(Status.EXPIRED, deferrals)]
        await caught_up()
        assert len(seen) == 1


async def test_defer_timeout_of_zero(dial: Dial) -> None:
    """A defer_timeout of 0 expires a deferral at once."""
    async with await listen("127.0.0.1", 0, defer_timeout=0) as listener:
        client = await deferred(listener, dial)
        await until(lambda: listener.statistics().expired)
        assert await wire_end(client) == "reset"


async def test_no_defer_timeout(dial: Dial) -> None:
    """Without a defer_timeout there is no timer."""
    async with await listen("127.0.0.1", 0, defer_timeout=None) as listener:
        await deferred(listener, dial)
        assert listener._deciding._timer is None
        (await listener.accept()).close()


async def test_closing_ends_the_timer(dial: Dial) -> None:
    """close() leaves no timer behind for what was deferred."""
    listener = await listen("127.0.0.1", 0, defer_timeout=1000)
    await deferred(listener, dial)
    timer = listener._deciding._timer
    assert timer is not None
    listener.close()
    assert timer.cancelled()


# -- callers that leave


@pytest.mark.parametrize("data", [b"", b"hello"])
async def test_deferred_caller_that_resets(
    listener: Listener[Stream], dial: Dial, data: bytes
) -> None:
    """A deferred caller that resets is noticed without any call, and told once."""
    seen = outcomes(listener)
    told: list[Event] = []
    client = await deferred(listener, dial, data=data)
    name = client.getsockname()
    behind = dial(listener)
    await queued(listener, 1)
    await listener.wait_pending()  # of the newcomer
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    listener.on(Event.PENDING, lambda _, event, __: told.append(event))
    waiting = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert (waiting.done(), told) == (False, [])
    reset(client)
    await waiting
    assert listener.pending == ()
    await until(lambda: seen and told)
    assert [(each.status, each.caller_id) for each in seen] == [(Status.RESET, name)]
    add_up(listener)

    with pytest.raises(PendingResetError) as caught:
        await listener.accept(accept)
    assert caught.value.caller_id == name
    stream = await listener.accept(accept)
    assert stream.caller_id == behind.getsockname()
    assert listener.statistics().offers == 3
    stream.close()
    await until(lambda: len(seen) == 2)
    assert seen[1].status is Status.ACCEPTED


async def test_fin_is_kept(listener: Listener[Stream], dial: Dial) -> None:
    """Under on_eof="keep" a FIN changes nothing: a half-closed caller is still served."""
    client = await deferred(listener, dial, data=b"question")
    client.shutdown(socket.SHUT_WR)
    await until(lambda: listener.pending[0].peer_closed)
    await caught_up()
    seen: list[bool] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.peer_closed)
        return ACCEPT

    stream = await listener.accept(condition)
    assert seen == [True]
    assert await stream.read() == b"question"
    stream.write(b"answer")
    stream.close()
    assert await wire_end(client) == b"answer"


async def test_reset_behind_a_fin(listener: Listener[Stream], dial: Dial) -> None:
    """A deferred caller that first half-closes and then resets is noticed as reset."""
    client = await deferred(listener, dial)
    client.shutdown(socket.SHUT_WR)
    await until(lambda: listener.pending[0].peer_closed)
    await caught_up()
    assert listener.statistics().reset == 0
    reset(client)
    await until(lambda: listener.statistics().reset)
    assert listener.pending == ()


@pytest.mark.parametrize("data", [b"", b"hello"])
async def test_fin_withdraws(dial: Dial, data: bytes) -> None:
    """Under on_eof="withdraw" a FIN before the verdict is an expiry, noticed at once."""
    async with await listen("127.0.0.1", 0, on_eof="withdraw") as listener:
        seen = outcomes(listener)
        early = dial(listener, data=data)
        name = early.getsockname()
        early.shutdown(socket.SHUT_WR)
        with pytest.raises(PendingExpiredError) as caught:
            await listener.accept(accept)
        assert caught.value.caller_id == name
        assert await wire_end(early) == "reset"

        late = await deferred(listener, dial, data=data)
        late.shutdown(socket.SHUT_WR)
        await listener.wait_pending()
        assert listener.pending == ()
        assert await wire_end(late) == "reset"
        with pytest.raises(PendingExpiredError):
            await listener.accept(accept)

        reset(await deferred(listener, dial))
        await until(lambda: listener.statistics().reset)
        with pytest.raises(PendingResetError):
            await listener.accept(accept)
        await until(lambda: len(seen) == 3)
        assert [each.status for each in seen] == [Status.EXPIRED, Status.EXPIRED, Status.RESET]
        assert "withdr" in seen[0].reason
        add_up(listener)


async def test_fin_during_a_decision_withdraws(dial: Dial) -> None:
    """Under on_eof="withdraw" a FIN during a decision makes the verdict void."""
    async with await listen("127.0.0.1", 0, on_eof="withdraw") as listener:
        held = Held()
        go = asyncio.Event()
        client = dial(listener)
        task = await deciding(listener, held.later(accept, go))
        client.shutdown(socket.SHUT_WR)
        go.set()
        with pytest.raises(PendingExpiredError):
            await task
        assert held.released == ["c1", "b1", "a1"]
        assert await wire_end(client) == "reset"
        add_up(listener)


# -- what a stream becomes


async def test_stream_factory(dial: Dial) -> None:
    """accept() and accept_nowait() return what stream_factory made of the stream."""
    made: list[tuple[str, Stream]] = []

    def factory(stream: Stream) -> tuple[str, Stream]:
        made.append(("made", stream))
        return made[-1]

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        client = dial(listener)
        result = await listener.accept()
        assert result is made[0]
        assert result[1].caller_id == client.getsockname()
        dial(listener)
        await queued(listener, 1)
        assert listener.accept_nowait() is made[1]
        for _, stream in made:
            stream.close()


async def test_stream_factory_without_result(dial: Dial) -> None:
    """A factory may keep the stream to itself, or close it."""
    kept: list[Stream] = []
    async with await listen("127.0.0.1", 0, stream_factory=kept.append) as listener:
        client = dial(listener)
        assert await listener.accept() is None  # type: ignore[func-returns-value]
        assert await_free(kept[0]) == client.getsockname()
        kept[0].close()
    async with await listen("127.0.0.1", 0, stream_factory=Stream.close) as other:
        client = dial(other)
        assert await other.accept() is None  # type: ignore[func-returns-value]
        assert await wire_end(client) == "eof"
        now = other.statistics()
        assert (now.accepted, now.streams) == (1, 0)


def await_free(stream: Stream) -> Any:
    """Return the caller's address of a stream that is open."""
    assert not stream.is_closing()
    return stream.caller_id


@pytest.mark.parametrize("nowait", [False, True])
async def test_stream_factory_that_raises(dial: Dial, *, nowait: bool) -> None:
    """A factory that raises: caller reset, counted as failed, and the listener lives."""
    error = ZeroDivisionError("no stream today")
    told: list[Event] = []
    fails = [True, False]

    def factory(stream: Stream) -> Stream:
        if fails.pop(0):
            raise error
        return stream

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        everything = Event.READ | Event.WRITE | Event.CLOSE
        subscription = listener.on(everything, lambda _, event, __: told.append(event))
        client = dial(listener, data=b"data")
        await queued(listener, 1)
        with pytest.raises(ZeroDivisionError) as caught:
            listener.accept_nowait(accept) if nowait else await listener.accept(accept)
        assert caught.value is error
        assert await wire_end(client) == "reset"
        now = listener.statistics()
        assert (now.failed, now.accepted, now.streams, now.pending) == (1, 0, 0, 0)
        await caught_up()
        assert told == []
        subscription.cancel()
        dial(listener)
        (await listener.accept(accept)).close()
        add_up(listener)


async def test_stream_factory_that_calls_back(dial: Dial) -> None:
    """A factory may accept the next one, and may close or abort the listener."""
    nested: list[Stream] = []

    def factory(stream: Stream) -> Stream:
        nested.append(stream)
        if len(nested) < 3:
            listener.accept_nowait(accept)
        elif len(nested) == 4:
            listener.abort()
        return stream

    listener = await listen("127.0.0.1", 0, stream_factory=factory)
    clients = [dial(listener) for _ in range(4)]
    await queued(listener, 4)
    first = await listener.accept()
    assert [each.caller_id for each in nested] == [each.getsockname() for each in clients[:3]]
    assert first is nested[0]
    assert listener.statistics().accepted == 3
    add_up(listener)
    last = await listener.accept()
    assert last.is_closing()
    assert [await wire_end(client) for client in clients] == ["reset"] * 4
    now = listener.statistics()
    assert (now.accepted, now.streams) == (4, 0)


async def test_state_and_callback_data(listener: Listener[Stream], dial: Dial) -> None:
    """State goes from the condition to the stream; callback data is that of the call."""
    marker = object()
    seen: list[object] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.callback_data)
        seen.append(pending.state)
        pending.state = marker
        return DEFER if len(seen) == 2 else ACCEPT

    dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(condition, "first")
    stream = await listener.accept(condition, seen)
    assert seen == ["first", None, seen, marker]
    assert stream.state is marker
    stream.close()
    dial(listener)
    other = await listener.accept(None, "unused")
    assert other.state is None
    other.close()


async def test_state_reaches_the_factory(dial: Dial) -> None:
    """stream_factory finds the state on the stream."""
    async with await listen("127.0.0.1", 0, stream_factory=lambda each: each) as listener:
        dial(listener)

        def condition(pending: PendingTransport) -> AnyVerdict:
            pending.state = 5
            return ACCEPT

        stream = await listener.accept(condition)
        assert stream.state == 5
        stream.close()


# -- waiting for something to do


async def test_wait_pending_takes_nothing(listener: Listener[Stream], dial: Dial) -> None:
    """wait_pending() returns for every waiter when somebody comes, and takes nobody."""
    waiting = [asyncio.ensure_future(listener.wait_pending()) for _ in range(3)]
    await caught_up()
    assert not any(task.done() for task in waiting)
    dial(listener)
    await asyncio.gather(*waiting)
    assert listener.statistics().taken == 0
    await listener.wait_pending()
    (await listener.accept()).close()
    again = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert not again.done()
    dial(listener)
    await again


async def test_wait_pending_behind_a_deferral(listener: Listener[Stream], dial: Dial) -> None:
    """A deferral is nothing new; each newcomer behind it is, once."""
    await deferred(listener, dial)
    for n in (1, 2, 3):
        waiting = asyncio.ensure_future(listener.wait_pending())
        await caught_up()
        assert not waiting.done()
        dial(listener)
        await waiting
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(defer)
        assert listener.statistics().backlog == n
    waiting = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert not waiting.done()
    (await listener.accept()).close()
    await waiting  # those behind it are within reach now
    (await listener.accept()).close()


async def test_wait_pending_for_an_undecided_one(listener: Listener[Stream], dial: Dial) -> None:
    """A connection whose decision was cancelled, or no verdict, is due again."""
    dial(listener)
    task = await deciding(listener, Held().later(accept, asyncio.Event()))
    waiting = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert not waiting.done()
    task.cancel()
    await waiting
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(InvalidVerdictError):
        await listener.accept(lambda _: 7)  # type: ignore[arg-type,return-value]
    await listener.wait_pending()
    (await listener.accept()).close()


async def test_wait_pending_is_ended(listener: Listener[Stream], dial: Dial) -> None:
    """wait_pending() is ended by cancellation, by cancel_accept() and by close()."""
    task = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert listener.cancel_accept() == 0
    task = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert listener.cancel_accept() == 1
    with pytest.raises(AcceptInterruptedError):
        await task
    task = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    dial(listener)
    listener.close()
    with pytest.raises(ListenerClosedError):
        await task


async def test_wait_pending_lets_the_loop_turn(listener: Listener[Stream], dial: Dial) -> None:
    """Waiting for what is there already yields to the loop now and then."""
    dial(listener)
    ticks: list[int] = []
    loop = asyncio.get_running_loop()
    loop.call_soon(ticks.append, 1)
    for _ in range(65):
        await listener.wait_pending()
    assert ticks


async def test_retry_loop(listener: Listener[Stream], dial: Dial) -> None:
    """wait_pending() and accept() in turn serve everybody and ask no more than there is news."""
    wanted = [ACCEPT, REJECT, ACCEPT, ACCEPT]
    condition = Condition(*wanted)
    accepted: list[Stream] = []

    async def serve() -> None:
        while True:
            await listener.wait_pending()
            try:
                accepted.append(await listener.accept(condition))
            except ConnectionRejectedError:
                continue

    task = asyncio.ensure_future(serve())
    clients = [dial(listener) for _ in wanted]
    await until(lambda: len(accepted) == 3)
    assert condition.offered == [client.getsockname() for client in clients]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for stream in accepted:
        stream.close()


# -- the PENDING event


@pytest.fixture
def told(listener: Listener[Stream]) -> list[tuple[object, Event, OSError | None]]:
    """What the listener's PENDING callback was told."""
    calls: list[tuple[object, Event, OSError | None]] = []
    listener.on(Event.PENDING, lambda *call: calls.append(call))
    return calls


Told = list[tuple[object, Event, OSError | None]]


@pytest.mark.parametrize("verdict", [ACCEPT, REJECT])
async def test_pending_event(
    listener: Listener[Stream], dial: Dial, told: Told, verdict: AnyVerdict
) -> None:
    """PENDING is told once, and again only when an accept call has looked and more is due."""
    dial(listener)
    await until(lambda: told)
    assert told == [(listener, Event.PENDING, None)]
    dial(listener)
    await queued(listener, 2)
    await caught_up()
    assert len(told) == 1
    for count in (2, 2):
        try:
            listener.accept_nowait(Condition(verdict)).close()
        except ConnectionRejectedError:
            pass
        await caught_up()
        assert len(told) == count
    dial(listener)
    await until(lambda: len(told) == 3)


async def test_pending_event_is_not_armed_by_a_deferral(
    listener: Listener[Stream], dial: Dial, told: Told
) -> None:
    """A deferral does not arm PENDING; a verdict later does."""
    dial(listener)
    await until(lambda: told)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    await caught_up()
    assert len(told) == 1
    dial(listener)
    await queued(listener, 1)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    await caught_up()
    assert len(told) == 1
    (await listener.accept()).close()
    await until(lambda: len(told) == 2)
    (await listener.accept()).close()
    await caught_up()
    assert len(told) == 2


async def test_pending_event_after_an_empty_look(
    listener: Listener[Stream], dial: Dial, told: Told
) -> None:
    """A call that found nobody has looked, too."""
    dial(listener)
    await until(lambda: told)
    (await listener.accept()).close()
    with pytest.raises(NoPendingError):
        listener.accept_nowait()
    await caught_up()
    assert len(told) == 1
    dial(listener)
    await until(lambda: len(told) == 2)


async def test_pending_event_for_a_loss(listener: Listener[Stream], dial: Dial, told: Told) -> None:
    """A loss to be told is due: PENDING, if it is armed."""
    client = dial(listener)
    await until(lambda: told)
    with pytest.raises(InvalidVerdictError):
        await listener.accept(lambda _: 7)  # type: ignore[arg-type,return-value]
    await until(lambda: len(told) == 2)  # it is undecided, and due again
    reset(client)
    with pytest.raises(PendingResetError):
        await listener.accept()
    await caught_up()
    assert len(told) == 2


async def test_late_subscriber_to_pending(listener: Listener[Stream], dial: Dial) -> None:
    """Who subscribes to PENDING later is told if something is due, and only then."""
    first: list[Event] = []
    late: list[Event] = []
    dial(listener)
    await queued(listener, 1)
    listener.on(Event.PENDING, lambda _, event, __: first.append(event))
    assert first == []
    await caught_up()
    assert first == [Event.PENDING]
    subscription = listener.on(Event.PENDING, lambda _, event, __: late.append(event))
    assert late == []
    await caught_up()
    assert (len(first), len(late)) == (1, 1)
    subscription.cancel()
    (await listener.accept()).close()
    never: list[Event] = []
    listener.on(Event.PENDING, lambda _, event, __: never.append(event))
    await caught_up()
    assert never == []
    dial(listener)
    await until(lambda: never)
    assert (len(first), len(late)) == (2, 1)


async def test_pending_subscription_cancelled_under_way(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A PENDING under way to a callback that is cancelled is not told."""
    told: list[Event] = []
    dial(listener)
    await queued(listener, 1)
    listener.on(Event.PENDING, lambda _, event, __: told.append(event)).cancel()
    await caught_up()
    assert told == []


async def test_pending_event_is_for_listeners_alone(
    listener: Listener[Stream], dial: Dial, told: Told
) -> None:
    """Streams inherit nothing of PENDING, and a closed listener tells nothing."""
    client = dial(listener, data=b"x")
    stream = await listener.accept()
    await caught_up()
    count = len(told)
    client.sendall(b"y")
    client.shutdown(socket.SHUT_WR)
    assert await stream.read() == b"xy"
    stream.close()
    listener.close()
    listener.on(Event.PENDING, lambda *_: told.append((None, Event.PENDING, None)))
    await caught_up()
    assert len(told) == count
    assert {event for _, event, _ in told} <= {Event.PENDING}


async def test_pending_callback_that_accepts(listener: Listener[Stream], dial: Dial) -> None:
    """A callback that takes one connection a call serves everybody."""
    streams: list[Stream] = []

    def ready(source: Any, _event: Event, _error: OSError | None) -> None:
        try:
            streams.append(source.accept_nowait())
        except NoPendingError:
            return

    listener.on(Event.PENDING, ready)
    clients = [dial(listener) for _ in range(20)]
    await until(lambda: len(streams) == 20)
    assert [each.caller_id for each in streams] == [each.getsockname() for each in clients]
    dial(listener)
    await until(lambda: len(streams) == 21)
    for stream in streams:
        stream.close()
    add_up(listener)


async def test_pending_callback_that_closes(listener: Listener[Stream], dial: Dial) -> None:
    """A PENDING callback may close the listener."""
    listener.on(Event.PENDING, lambda source, *_: source.close())
    client = dial(listener)
    await listener.wait_closed()
    assert await wire_end(client) == "reset"
