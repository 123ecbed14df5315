"""Waking the deferred: each form of `Defer`, `reconsider()`, deadlines, and those who leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AnyVerdict,
    ConnectionDeferredError,
    Defer,
    InvalidVerdictError,
    Listener,
    PendingTransport,
    Reject,
    Status,
    Stream,
    _moving,
    _waking,
    listen,
)
from condaccept.testing import MemoryGate, memory_listener
from tests.consumers import Handler, Held, cancelled, ended, outcomes, result, serving, start
from tests.support import (
    Condition,
    Dial,
    accept,
    caught_up,
    descriptors,
    reset,
    turns,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

Memory = tuple[Listener[Stream], MemoryGate]
SOON = 0.005
"""Seconds after which an alarm rings; nothing depends on how late it does."""
LONG = 1000.0
RCVLOWAT = socket.SOL_SOCKET, socket.SO_RCVLOWAT


class Script:
    """A condition that says the same to each caller in turn, then its last word for ever."""

    def __init__(self, *verdicts: AnyVerdict) -> None:
        self.verdicts = verdicts
        self.offers: list[PendingTransport] = []
        self.timed_out: list[bool] = []

    def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Say what is next for this caller."""
        n = sum(each is pending for each in self.offers)
        self.offers.append(pending)
        self.timed_out.append(pending.timed_out)
        return self.verdicts[min(n, len(self.verdicts) - 1)]

    async def asked(self, n: int) -> None:
        """Wait until *n* offers have been made."""
        await until(lambda: len(self.offers) == n)

    async def still(self, n: int) -> None:
        """Check that, after all that has happened by now, there were *n* offers."""
        await caught_up()
        await turns()
        assert len(self.offers) == n


@pytest.fixture
async def memory() -> AsyncIterator[Memory]:
    """A listener without a network: its gate tells of a caller inside `dial()`."""
    listener, gate = memory_listener()
    async with listener:
        yield listener, gate


@pytest.fixture(params=["tcp", "tcp6", "unix"])
async def each_family(request: pytest.FixtureRequest) -> AsyncIterator[Listener[Stream]]:
    """A listener on IPv4, IPv6 and Unix."""
    if request.param == "unix":
        opened = await listen(path=f"\0condaccept waking {id(request)}")
    else:
        opened = await listen("::1" if request.param == "tcp6" else "127.0.0.1", 0)
    async with opened:
        yield opened


async def has_come(pending: PendingTransport, n: int) -> None:
    """Wait until *n* bytes have come."""
    await until(lambda: len(pending.peek(100)) == n)


# -- time


async def test_without_a_hint(memory: Memory) -> None:
    """A plain DEFER waits for reconsider(), whatever happens besides."""
    listener, gate = memory
    script = Script(DEFER, ACCEPT)
    handler = Handler()
    serve = await serving(listener, script, handler)
    with gate.dial() as client:
        client.send(b"data")
        client.shutdown(socket.SHUT_WR)
        await script.still(1)
        assert listener.pending[0].reconsider()
        await handler.has(1)
        assert script.offers[0].deferrals == 1
        assert not script.offers[0].reconsider()
    await cancelled(serve)


@pytest.mark.parametrize("after", [0, SOON])
async def test_after(listener: Listener[Stream], dial: Dial, after: float) -> None:
    """Defer(after=…) is asked again when that time has passed, by itself."""
    loop = asyncio.get_running_loop()
    script, handler = Script(Defer(after=after), ACCEPT), Handler()
    serve = await serving(listener, script, handler)
    before = loop.time()
    dial(listener)
    await handler.has(1)
    assert loop.time() - before >= after - 0.001
    assert script.timed_out == [False, False]
    await cancelled(serve)


async def test_not_before(memory: Memory) -> None:
    """Nobody is asked again before its time."""
    listener, gate = memory
    script = Script(Defer(after=LONG))
    serve = await serving(listener, script)
    with gate.dial():
        await script.still(1)
        await cancelled(serve)


async def test_a_later_time_does_not_hide_a_sooner_one(memory: Memory) -> None:
    """Each is asked again at its own time, in whatever order these were set."""
    listener, gate = memory
    waits = [LONG, SOON, LONG, 2 * SOON]
    asked: list[int] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        n = pending.caller_id[1]
        asked.append(n)
        return Defer(after=waits[n]) if pending.deferrals == 0 else REJECT

    serve = await serving(listener, condition)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(4)]
    await until(lambda: len(asked) == 6)
    assert asked == [0, 1, 2, 3, 1, 3]
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_a_timer_that_nobody_needs_hides_none() -> None:
    """After the only alarm has gone, the next one that is set still rings."""
    listener, gate = memory_listener(defer_timeout=None)
    async with listener:
        verdicts = [Defer(after=0.01), DEFER, Defer(after=0.02), REJECT]
        serve = await serving(listener, lambda _: verdicts.pop(0))
        with gate.dial():
            listener.pending[0].decide(REJECT)
        with gate.dial():
            listener.pending[0].decide(REJECT)
        with gate.dial():
            await until(lambda: not verdicts)
        await cancelled(serve)


async def test_the_deadline_counts_from_the_first_deferral() -> None:
    """However often it is asked again, defer_timeout ends a deferral, from the first on."""
    listener, gate = memory_listener(defer_timeout=0.02)
    async with listener:
        seen = outcomes(listener)
        script = Script(Defer(after=0))
        released: list[int] = []

        def condition(pending: PendingTransport) -> AnyVerdict:
            pending.hold(partial(released.append, 1))
            return script(pending)

        serve = await serving(listener, condition)
        with gate.dial() as client:
            assert await wire_end(client) == "eof"
            await until(lambda: seen)
        assert seen[0].status is Status.EXPIRED
        assert seen[0].deferrals == len(script.offers) == len(released)
        assert listener.pending == ()
        await cancelled(serve)


async def test_one_timer_for_all(dial: Dial) -> None:
    """However many wait for whatever, a listener has one timer and one epoll set."""
    loop: Any = asyncio.get_running_loop()
    shows = hasattr(loop, "_scheduled")  # uvloop does not

    def handles() -> tuple[int, int]:
        if not shows:
            return 0, descriptors()
        return sum(not each.cancelled() for each in loop._scheduled), len(loop._selector.get_map())

    async with await listen("127.0.0.1", 0) as listener:
        timers, readers = handles()
        forms: list[AnyVerdict] = [
            DEFER,
            Defer(after=LONG),
            Defer(until_bytes=10, within=LONG),
            Defer(until_free=True, after=2 * LONG),
        ]
        script = Condition(*forms * 10)
        serve = await serving(listener, script)
        clients = [dial(listener) for _ in range(40)]
        await until(lambda: listener.statistics().deferred == 40)
        # uvloop: the clients and their other ends.
        assert handles() == ((timers + 1, readers) if shows else (0, readers + 80))
        await cancelled(serve)
        for client in clients:
            client.close()
    assert handles()[0] == timers


# -- bytes


async def test_until_bytes(each_family: Listener[Stream], dial: Dial) -> None:
    """It is asked again when so many bytes can be peeked, and not for fewer."""
    script, handler = Script(Defer(until_bytes=5), ACCEPT), Handler()
    serve = await serving(each_family, script, handler)
    client = dial(each_family)
    await script.asked(1)
    for n in range(1, 5):
        client.send(b"x")
        await has_come(script.offers[0], n)
        await script.still(1)
    client.send(b"y")
    await handler.has(1)

    # Back to 1: the stream tells of a single byte.
    assert handler.streams[0].get_extra_info("socket").getsockopt(*RCVLOWAT) == 1
    assert await handler.streams[0].read(5) == b"xxxxy"
    read = start(handler.streams[0].read(5))
    await asyncio.sleep(0)
    client.send(b"z")
    assert await result(read) == b"z"
    await cancelled(serve)


async def test_bytes_that_are_there(each_family: Listener[Stream], dial: Dial) -> None:
    """Bytes that came before the deferral count."""
    script = Script(Defer(until_bytes=3), REJECT)
    dial(each_family, data=b"abc")
    serve = await serving(each_family, script)
    await script.asked(2)
    await cancelled(serve)


async def test_a_fin_below_the_mark(each_family: Listener[Stream], dial: Dial) -> None:
    """A caller who will send no more is asked about again; once, not for ever."""
    script = Script(Defer(until_bytes=5))
    serve = await serving(each_family, script)
    client = dial(each_family, data=b"abc")
    await script.asked(1)
    client.shutdown(socket.SHUT_WR)
    await script.asked(2)
    assert script.offers[0].peer_closed
    await script.still(2)
    await cancelled(serve)


async def test_a_condition_that_goes_on_waiting(each_family: Listener[Stream], dial: Dial) -> None:
    """The same bytes fulfil a hint once; further ones do again: nothing spins."""
    script = Script(Defer(until_bytes=1))
    serve = await serving(each_family, script)
    client = dial(each_family)
    await script.asked(1)
    for n in range(1, 5):
        client.send(b"x")
        await has_come(script.offers[0], n)
        await script.asked(1 + n)
        await script.still(1 + n)
    await cancelled(serve)


async def test_a_condition_that_wants_more(each_family: Listener[Stream], dial: Dial) -> None:
    """One that asks for more bytes, which are there already, is asked again at once."""
    script = Script(Defer(until_bytes=2), Defer(until_bytes=4), REJECT)
    serve = await serving(each_family, script)
    dial(each_family, data=b"abcd")
    await script.asked(3)
    await cancelled(serve)


async def test_no_wake_up_while_it_is_due(listener: Listener[Stream], dial: Dial) -> None:
    """Above its mark a caller may send what it likes: nobody is woken for it."""
    script = Script(Defer(until_bytes=1), DEFER)
    serve = await serving(listener, script)
    client = dial(listener)
    await script.asked(1)
    client.send(b"x")
    await script.asked(2)
    calls = count_wake_ups(listener)
    for n in range(2, 10):
        client.send(b"x")
        await has_come(script.offers[0], n)
    await script.still(2)
    assert calls == []
    await cancelled(serve)


async def test_no_wake_up_while_nobody_asks(listener: Listener[Stream], dial: Dial) -> None:
    """One that is due, and has to wait for an iteration, is not told of again and again."""
    script = Script(Defer(until_bytes=1))
    iteration = start(anext(listener.streams(script)))
    client = dial(listener)
    await script.asked(1)
    await cancelled(iteration)
    client.send(b"x")
    await until(lambda: listener.pending[0]._stay.due)
    calls = count_wake_ups(listener)
    for n in range(2, 10):
        client.send(b"x")
        await has_come(script.offers[0], n)
    await script.still(1)
    assert calls == []


def count_wake_ups(listener: Listener[Any]) -> list[int]:
    """Count what the watch tells of the only connection that it watches."""
    calls: list[int] = []
    watch: Any = listener._watch
    listening = {sock.fileno() for sock in listener._gate.sockets}
    for fd, callback in list(watch._callbacks.items()):
        if fd not in listening:

            def counting(events: int, callback: Any = callback) -> None:
                calls.append(events)
                callback(events)

            watch._callbacks[fd] = counting
    return calls


async def test_within(each_family: Listener[Stream], dial: Dial) -> None:
    """The recipe for a first byte: its wait is over by itself, and that can be told."""
    script = Script(Defer(until_bytes=1, within=SOON), REJECT)
    serve = await serving(each_family, script)
    dial(each_family)
    await script.asked(2)
    assert script.timed_out == [False, True]
    await cancelled(serve)


async def test_within_that_is_not_needed(listener: Listener[Stream], dial: Dial) -> None:
    """Where the bytes have come in time, the time is not over."""
    script = Script(Defer(until_bytes=1, within=LONG), Defer(after=0), REJECT)
    serve = await serving(listener, script)
    dial(listener, data=b"x")
    await script.asked(3)
    assert script.timed_out == [False, False, False]
    await cancelled(serve)


@pytest.mark.parametrize(
    ("hints", "over"),
    [
        (Defer(until_bytes=1, within=LONG, after=SOON), False),
        (Defer(until_bytes=1, within=SOON, after=LONG), True),
        (Defer(until_bytes=1, after=SOON), False),
        (Defer(until_free=True, after=SOON), False),
    ],
)
async def test_the_first_hint_counts(memory: Memory, hints: Defer, *, over: bool) -> None:
    """Of several hints the first fulfilled counts; timed_out is for *within* alone."""
    listener, gate = memory
    script = Script(hints, REJECT)
    serve = await serving(listener, script)
    with gate.dial():
        await script.asked(2)
    assert script.timed_out == [False, over]
    await cancelled(serve)


@pytest.mark.parametrize(
    "verdict", [DEFER, Defer(after=LONG), Defer(until_bytes=100)], ids=["bare", "time", "bytes"]
)
async def test_waiting_takes_no_socket_object(
    listener: Listener[Stream], dial: Dial, verdict: Any
) -> None:
    """Whoever waits has a descriptor and no more, also after a second offer."""
    script = Script(verdict)
    serve = await serving(listener, script)
    client = dial(listener)
    await script.asked(1)
    arrival: Any = listener.pending[0]._arrival
    assert arrival._sock is None
    listener.reconsider()
    await script.asked(2)
    assert arrival._sock is None
    await cancelled(serve)
    client.close()


async def test_a_socket_that_a_condition_has_stays(listener: Listener[Stream], dial: Dial) -> None:
    """What a condition got as the socket works on until there is a verdict."""
    socks: list[Any] = []

    def condition(pending: PendingTransport) -> Defer:
        socks.append(pending.get_extra_info("socket"))
        return Defer(until_bytes=100)

    serve = await serving(listener, condition)
    client = dial(listener)
    await until(lambda: listener.statistics().deferred)
    for _ in range(2):
        assert socks[0].getpeername() == client.getsockname()
        assert socks[0].getsockopt(*RCVLOWAT) == 100
        listener.reconsider()
        await until(lambda: len(socks) > 1)
    await cancelled(serve)
    client.close()


async def test_a_farewell_takes_the_mark_off(listener: Listener[Stream], dial: Dial) -> None:
    """A rejected caller's last bytes are discarded as they come, whatever was waited for."""
    script = Script(Defer(until_bytes=100))
    serve = await serving(listener, script)
    client = dial(listener)
    await script.asked(1)
    pending = listener.pending[0]
    sock = pending._arrival.sock  # type: ignore[attr-defined]
    assert sock.getsockopt(*RCVLOWAT) == 100
    pending.decide(Reject(data=b"bye"))
    assert sock.getsockopt(*RCVLOWAT) == 1
    assert await wire_end(client) == b"bye"
    client.close()
    await until(lambda: listener.statistics().rejecting == 0)
    await cancelled(serve)


async def test_more_than_the_buffer_holds(dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that SO_RCVBUF cannot hold are a bad verdict: logged, rejected; raised by accept()."""
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
    async with await listen("127.0.0.1", 0, options=small) as listener:
        script = Script(Defer(until_bytes=16384))
        serve = await serving(listener, script)
        assert await wire_end(dial(listener)) == "reset"
        assert [each.levelno for each in caplog.records] == [logging.ERROR]
        assert "16384 bytes cannot wait unread on this socket" in caplog.text
        await cancelled(serve)
        client = dial(listener)
        with pytest.raises(InvalidVerdictError, match="cannot wait unread"):
            await listener.accept(script)
        assert wire(client) == "open"
        assert listener.pending[0]._arrival.sock.getsockopt(*RCVLOWAT) == 1  # type: ignore[attr-defined]


# -- places


class Places:
    """A condition with so many places, for which callers wait."""

    def __init__(self, free: int, **hints: Any) -> None:
        self.free = free
        self.asked: list[int] = []
        self.defer = Defer(until_free=True, **hints)

    def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Let in who has a place."""
        self.asked.append(pending.caller_id[1])
        if not self.free:
            return self.defer
        self.free -= 1
        pending.hold(self.give_back)
        return ACCEPT

    def give_back(self) -> None:
        """Give a place back."""
        self.free += 1


async def test_until_free(memory: Memory) -> None:
    """Each stream that ends wakes one that waits for a place, the oldest first."""
    listener, gate = memory
    places, handler = Places(2), Handler()
    serve = await serving(listener, places, handler)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(7)]
    await handler.has(2)
    assert places.asked == [*range(7)]
    for n in range(2, 7):
        handler.streams[n - 2].abort()
        await handler.has(n + 1)
        await turns()
        assert places.asked == [*range(7), *range(2, n + 1)]
        assert handler.streams[n].caller_id[1] == n
    assert listener._deciding._until_free == []
    await cancelled(serve)
    for client in clients:
        client.close()


@pytest.mark.parametrize("how", ["rejected", "reset", "expired", "deferred", "raised", "handle"])
async def test_a_place_that_is_not_used_is_passed_on(memory: Memory, how: str) -> None:
    """If the one that was woken does not take the place, the next is woken."""
    listener, gate = memory
    handler = Handler()
    asked: list[int] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        n = pending.caller_id[1]
        asked.append(n)
        if n == 0:
            return ACCEPT
        if pending.deferrals == 0:
            return Defer(until_free=True)
        if n == 1:
            if how == "raised":
                raise ValueError
            return {"rejected": REJECT, "deferred": DEFER}[how]
        return ACCEPT

    serve = await serving(listener, condition, handler)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(3)]
    await handler.has(1)
    one = listener.pending[0]
    if how in ("reset", "expired", "handle"):
        # Between the wake-up and the next offer.
        listener._deciding.consumer._later = lambda: None  # type: ignore[attr-defined]
        handler.streams[0].abort()
        del listener._deciding.consumer._later  # type: ignore[attr-defined]
        if how == "expired":
            listener._deciding.expire(one, "too late")
        elif how == "handle":
            one.decide(REJECT)
        else:
            listener._deciding._lose(one, Status.RESET, "gone")
    else:
        handler.streams[0].abort()
    await handler.has(2)
    assert handler.streams[1].caller_id[1] == 2
    assert asked.count(2) == 2
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_one_that_waits_on_keeps_its_turn(memory: Memory) -> None:
    """One that finds no place after all waits on, ahead of those behind it."""
    listener, gate = memory
    places, handler = Places(1), Handler()
    serve = await serving(listener, places, handler)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(3)]
    await handler.has(1)
    places.free = -1
    handler.streams[0].abort()  # gives back to 0: still none
    await turns()
    assert places.asked == [0, 1, 2, 1]
    places.free = 1
    listener._deciding._freed()
    await handler.has(2)
    assert handler.streams[1].caller_id[1] == 1
    await cancelled(serve)
    for client in clients:
        client.close()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("again", [False, True])
async def test_a_place_given_back_while_it_was_asked(
    memory: Memory, *, asynchronous: bool, again: bool
) -> None:
    """A place that comes back during a decision is not missed by it."""
    listener, gate = memory
    handler = Handler()
    offers = 0

    def plain(pending: PendingTransport) -> AnyVerdict:
        nonlocal offers
        if pending.caller_id[1] == 0:
            return ACCEPT
        offers += 1
        if offers == 1 + again:
            handler.streams[0].abort()
        elif offers > 1 + again:
            return ACCEPT
        return Defer(until_free=True)

    async def slow(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        verdict = plain(pending)
        await asyncio.sleep(0)
        return verdict

    serve = await serving(listener, slow if asynchronous else plain, handler)
    with gate.dial(("192.0.2.1", 0)):
        await handler.has(1)
        with gate.dial(("192.0.2.1", 1)):
            if again:
                await until(lambda: listener.statistics().deferred)
                listener.pending[0].reconsider()
            await handler.has(2)
    assert offers == 2 + again
    await cancelled(serve)


@pytest.mark.parametrize("how", ["failed", "gone", "factory"])
async def test_an_accepted_one_that_comes_to_nothing(how: str) -> None:
    """A place taken by a connection of which no stream came is given back, too."""

    def factory(stream: Stream) -> Stream:
        if how == "factory" and stream.caller_id[1] == 0:
            raise ValueError
        return stream

    listener, gate = memory_listener(slow=True, stream_factory=factory)
    async with listener:
        places, handler = Places(1), Handler()
        serve = await serving(listener, places, handler)
        clients = [gate.dial(("192.0.2.1", n)) for n in range(2)]
        assert places.asked == [0, 1]
        if how == "failed":
            gate.fail()
        elif how == "factory":
            gate.complete()
        else:
            gate.admitting[0][1].cancel()
        await until(lambda: len(places.asked) == 3)
        gate.complete()
        await handler.has(1)
        assert handler.streams[0].caller_id[1] == 1
        await cancelled(serve)
        for client in clients:
            client.close()


async def test_churn_leaves_nothing_behind(memory: Memory) -> None:
    """Thousands that waited for times and places do not pile up behind one that waits on."""
    listener, gate = memory
    verdict: Any = Defer(until_free=True, after=LONG)
    serve = await serving(listener, lambda _: verdict)
    with gate.dial():
        for _ in range(1000):
            with gate.dial():
                listener.pending[1].decide(verdict)
                listener.pending[1].decide(REJECT)
        assert len(listener._deciding._until_free) < 100
        assert len(listener._pending._alarms) < 100
        assert len(listener._pending._deadlines) < 100
        assert len(listener.pending) == 1
        await cancelled(serve)


# -- reconsidering


async def test_reconsider(memory: Memory) -> None:
    """Those for which the predicate is true are offered again, in the order they came."""
    listener, gate = memory
    script = Script(DEFER)
    serve = await serving(listener, script)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(6)]
    listener.reconsider(lambda pending: pending.caller_id[1] % 2)
    await script.asked(9)
    assert [each.caller_id[1] for each in script.offers[6:]] == [1, 3, 5]
    listener.reconsider()
    await script.asked(15)
    assert [each.caller_id[1] for each in script.offers[9:]] == [*range(6)]
    await script.still(15)
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_reconsider_is_bounded(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many are looked at in a turn of the loop; those decided meanwhile are left out."""
    monkeypatch.setattr(_waking, "PER_TURN", 3)
    listener, gate = memory
    serve = await serving(listener, lambda _: DEFER)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(8)]
    seen: list[int] = []
    listener.reconsider(lambda pending: seen.append(pending.caller_id[1]))
    assert seen == [0, 1, 2]
    listener.pending[4].decide(REJECT)
    await asyncio.sleep(0)
    assert seen == [0, 1, 2, 3, 5]
    await asyncio.sleep(0)
    assert seen == [0, 1, 2, 3, 5, 6, 7]
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_a_timer_that_fires_early(memory: Memory) -> None:
    """What a timer was set for is due when it fires, be that a little before its time."""
    listener, gate = memory
    script = Script(Defer(after=10), REJECT)
    serve = await serving(listener, script)
    client = gate.dial()
    await script.asked(1)
    await until(lambda: listener.statistics().deferred)
    listener._deciding._on_alarm()
    await script.asked(2)
    await cancelled(serve)
    client.close()


async def test_alarms_are_bounded(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many whose time has come are woken in a turn of the loop, and the others after."""
    monkeypatch.setattr(_moving, "PER_TURN", 2)
    listener, gate = memory
    script = Script(Defer(after=0), REJECT)
    serve = await serving(listener, script)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(7)]
    await script.asked(14)
    assert [each.caller_id[1] for each in script.offers[7:]] == [*range(7)]
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_a_predicate_that_raises(memory: Memory) -> None:
    """It is raised to who called, and those before it are offered again."""
    listener, gate = memory
    script = Script(DEFER)
    serve = await serving(listener, script)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(3)]

    def predicate(pending: PendingTransport) -> bool:
        if pending.caller_id[1] == 1:
            raise KeyError
        return True

    with pytest.raises(KeyError):
        listener.reconsider(predicate)
    await script.still(4)
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_reconsider_from_a_condition(memory: Memory) -> None:
    """A condition may have the others offered again; itself it is not asked again for that."""
    listener, gate = memory
    asked: list[int] = []

    async def condition(pending: PendingTransport) -> AnyVerdict:
        n = pending.caller_id[1]
        asked.append(n)
        await asyncio.sleep(0)
        if n == 2:
            listener.reconsider()
        return DEFER

    serve = await serving(listener, condition)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(2)]
    await until(lambda: listener.statistics().deferred == 2)
    clients.append(gate.dial(("192.0.2.1", 2)))
    await until(lambda: len(asked) == 5)
    await turns()
    assert asked == [0, 1, 2, 0, 1]
    await cancelled(serve)
    for client in clients:
        client.close()


@pytest.mark.parametrize("how", ["listener", "pending"])
async def test_reconsidered_while_it_is_decided(memory: Memory, how: str) -> None:
    """What changes during a decision is not missed: one that then defers is asked again."""
    listener, gate = memory
    held = Held()
    serve = await serving(listener, held)
    with gate.dial():
        await held.asked(1)
        if how == "listener":
            listener.reconsider()
        else:
            assert held.offered[0].reconsider()
        held.verdicts[0].set_result(DEFER)
        await held.asked(2)
        held.verdicts[1].set_result(DEFER)
        await until(lambda: listener.statistics().deferred)
        await turns()
        assert len(held.offered) == 2
        await cancelled(serve)


async def test_waking_costs_the_same(dial: Dial) -> None:
    """To wake one of 300 takes as many calls of functions as to wake one of 3."""
    counts = []
    for n in (3, 300):
        async with await listen("127.0.0.1", 0) as listener:
            script = Script(Defer(after=LONG, until_bytes=5))
            serve = await serving(listener, script)
            clients = [dial(listener) for _ in range(n)]
            await script.asked(n)
            for client in clients:
                client.setblocking(False)
            calls = []
            for _ in range(3):
                pending = listener.pending[n // 2]
                before = len(script.offers)
                calls.append(count_calls(pending.reconsider))
                await script.asked(before + 1)
            counts.append(min(calls))
            await cancelled(serve)
            for client in clients:
                client.close()
    assert counts[0] == counts[1] > 0


def count_calls(function: Callable[[], object]) -> int:
    """Call *function*; return how many calls that took, of Python and of C."""
    calls = 0

    def profile(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


# -- those who leave


@pytest.mark.parametrize(
    "hints", [DEFER, Defer(after=LONG), Defer(until_bytes=9), Defer(until_free=True)]
)
async def test_a_reset_while_deferred(
    listener: Listener[Stream], dial: Dial, hints: AnyVerdict
) -> None:
    """A deferred caller that resets is noticed at once, told of, and its place is free."""
    seen = outcomes(listener)
    settled: list[Any] = []
    script = Script(hints)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.on_settled(settled.append)
        return script(pending)

    serve = await serving(listener, condition)
    client = dial(listener)
    await script.asked(1)
    reset(client)
    await until(lambda: seen)
    assert seen == settled
    assert seen[0].status is Status.RESET
    assert listener.pending == ()
    await script.still(1)
    await cancelled(serve)


async def test_a_fin_while_deferred(dial: Dial) -> None:
    """Under on_eof="withdraw" a deferred caller that closes is gone at once."""
    async with await listen("127.0.0.1", 0, on_eof="withdraw", max_pending=1) as listener:
        seen = outcomes(listener)
        script = Script(DEFER)
        serve = await serving(listener, script)
        client = dial(listener)
        await script.asked(1)
        client.close()
        await until(lambda: seen)
        assert seen[0].status is Status.EXPIRED
        dial(listener)
        await script.asked(2)
        await cancelled(serve)


async def test_no_polling(listener: Listener[Stream], dial: Dial) -> None:
    """While nothing happens to the deferred, nothing is done about them."""
    script = Script(Defer(until_bytes=5, within=LONG))
    serve = await serving(listener, script)
    client = dial(listener)
    await script.asked(1)
    calls = count_wake_ups(listener)
    client.send(b"abc")  # below the mark: the kernel keeps it to itself
    await has_come(script.offers[0], 3)
    await script.still(1)
    assert calls == []
    await cancelled(serve)


def reconsider(listener: Listener[Stream]) -> None:
    """Have the oldest asked about again."""
    listener.pending[0].reconsider()


# -- under accept()


async def deferred(listener: Listener[Stream], hints: AnyVerdict) -> PendingTransport:
    """Defer the next caller by accept()."""
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(lambda _: hints)
    return listener.pending[-1]


async def test_hints_make_wait_pending_return(listener: Listener[Stream], dial: Dial) -> None:
    """Under accept() a fulfilled hint makes wait_pending() return, and the head is offered."""
    client = dial(listener)
    waits: list[tuple[Defer, Callable[[], object]]] = [
        (Defer(after=SOON), lambda: None),
        (Defer(until_bytes=2), lambda: client.send(b"xy")),
        (Defer(until_bytes=100, within=SOON), lambda: None),
        (Defer(), lambda: reconsider(listener)),
        (Defer(), listener.reconsider),
        (Defer(until_free=True), listener._deciding._freed),
    ]
    for hints, fulfil in waits:
        pending = await deferred(listener, hints)
        waiting = start(listener.wait_pending())
        await asyncio.sleep(0)
        assert not waiting.done() or SOON in (hints.after, hints.within)
        fulfil()
        await result(waiting)
        assert listener.pending == (pending,)
    await listener.wait_pending()  # due still
    (await listener.accept()).close()


async def test_a_hint_behind_the_head(listener: Listener[Stream], dial: Dial) -> None:
    """A fulfilled hint of one that accept() cannot reach makes nothing due."""
    dial(listener)
    await deferred(listener, DEFER)
    listener_client = dial(listener)
    await until(lambda: listener.statistics().backlog)
    held = Held()
    first = start(listener.accept(held))
    await held.asked(1)
    second = await deferred(listener, Defer(until_bytes=1))
    held.verdicts[0].set_result(DEFER)
    assert isinstance(await ended(first), ConnectionDeferredError)
    waiting = start(listener.wait_pending())
    await asyncio.sleep(0)
    listener_client.send(b"x")
    await caught_up()
    await turns()
    assert not waiting.done()
    assert second._stay.due
    listener.pending[0].decide(REJECT)
    await result(waiting)
    stream = await listener.accept()
    assert stream.caller_id == listener_client.getsockname()
    stream.close()


async def test_accept_does_not_wait_for_hints(listener: Listener[Stream], dial: Dial) -> None:
    """The next accept call offers a deferred head whatever its hints say, the mark taken off."""
    client = dial(listener)
    await deferred(listener, Defer(until_bytes=100, within=LONG))
    stream = await listener.accept(accept)
    assert stream.get_extra_info("socket").getsockopt(*RCVLOWAT) == 1
    read = start(stream.read(5))
    await asyncio.sleep(0)
    client.send(b"x")
    assert await result(read) == b"x"
    stream.close()


async def test_a_cancelled_decision_keeps_the_hints(listener: Listener[Stream], dial: Dial) -> None:
    """What a deferral waited for before a cancelled decision, it waits for after that."""
    client = dial(listener)
    await deferred(listener, Defer(until_bytes=2))
    held = Held()
    call = start(listener.accept(held))
    await held.asked(1)
    await cancelled(call)
    waiting = start(listener.wait_pending())
    await turns()
    assert not waiting.done()
    client.send(b"xy")
    await result(waiting)
    with contextlib.suppress(ConnectionDeferredError):
        await listener.accept(lambda _: DEFER)


async def test_a_cancelled_decision_keeps_its_turn_for_a_place(memory: Memory) -> None:
    """A place that is given back during a decision that comes to nothing wakes it after."""
    listener, gate = memory
    with gate.dial():
        await deferred(listener, Defer(until_free=True))
        held = Held()
        call = start(listener.accept(held))
        await held.asked(1)
        listener._deciding._freed()
        await cancelled(call)
        await result(start(listener.wait_pending()))
