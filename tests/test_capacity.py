"""How many may be in, and what happens to the next caller."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from condaccept import (
    ACCEPT,
    DEFER,
    AnyVerdict,
    ConnectionRejectedError,
    Defer,
    Limit,
    Listener,
    Outcome,
    PendingTransport,
    Slots,
    Status,
    Stream,
    listen,
)
from condaccept._capacity import Capacity
from condaccept._taking import PER_WAKE_UP
from condaccept.testing import memory_listener
from tests.support import (
    LIMIT,
    Condition,
    accept,
    caught_up,
    defer,
    logged,
    queued,
    reject,
    reset,
    turns,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support import Dial

# -- pure


@pytest.mark.parametrize(
    ("arguments", "kind", "word"),
    [
        ((-1,), ValueError, "at least 0"),
        ((True,), TypeError, "number of streams"),
        (("5",), TypeError, "number of streams"),
        ((5, "drop"), ValueError, "'queue', 'reject', 'refuse'"),
        ((5, "queue", 3), ValueError, "overflow='refuse'"),
        ((5, "refuse", 5), ValueError, "below the limit of 5"),
        ((5, "refuse", -1), ValueError, "at least 0"),
        ((5, "refuse", 1.5), TypeError, "number of streams"),
    ],
)
def test_no_limit(arguments: tuple[Any, ...], kind: type[Exception], word: str) -> None:
    """What is no limit says what is wrong with it."""
    with pytest.raises(kind, match=word):
        Limit(*arguments)


@pytest.mark.parametrize(
    ("n", "low", "mark"), [(8, None, 6), (1, None, 0), (0, None, 0), (8, 0, 0)]
)
def test_low_mark(n: int, low: int | None, mark: int) -> None:
    """The kernel listens again at three quarters, if nothing else is said."""
    assert Limit(n, "refuse", low).low_mark == mark


class SlotsMachine(RuleBasedStateMachine):
    """Slots in any order of taking, giving back and changing the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(3)
        self.held: list[Callable[[], bool]] = []
        self.returned: list[Callable[[], bool]] = []

    @rule()
    def take(self) -> None:
        """Take one, free or not."""
        self.held.append(self.slots.take())

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """The first call gives it back."""
        if self.held:
            slot = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            assert slot() is True
            self.returned.append(slot)

    @rule(data=st.data())
    def give_back_again(self, data: st.DataObject) -> None:
        """Later ones do nothing."""
        if self.returned:
            assert data.draw(st.sampled_from(self.returned))() is False

    @rule(limit=st.none() | st.integers(0, 5))
    def change(self, limit: int | None) -> None:
        """Set below what is taken, too."""
        self.slots.limit = limit

    @invariant()
    def counted(self) -> None:
        """What is taken is what is held, and never less than nothing is free."""
        assert self.slots.taken == len(self.held)
        limit, free = self.slots.limit, self.slots.free
        assert free == (None if limit is None else max(0, limit - len(self.held)))


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(max_examples=12, stateful_step_count=25)

limits = st.none() | st.builds(
    Limit, st.integers(0, 6), st.sampled_from(["queue", "reject", "refuse"])
)


@given(limits, limits, st.integers(0, 8), st.integers(0, 8))
def test_capacity(streams: Limit | None, starting: Limit | None, taken: int, still: int) -> None:
    """The room is that of the tighter limit, and the stricter overflow of those reached counts."""
    capacity = Capacity(streams, starting)
    for _ in range(taken):
        capacity.streams.take()
    for _ in range(still):
        capacity.starting.take()
    both = [(streams, taken, "max_streams"), (starting, still, "max_starting")]
    known = [(limit, n, name) for limit, n, name in both if limit is not None]
    full = [
        (limit.overflow, f"{name}={limit.n} is reached") for limit, n, name in known if n >= limit.n
    ]

    assert (capacity.get("max_streams"), capacity.get("max_starting")) == (streams, starting)
    assert capacity.limited == bool(known)
    assert capacity.room() == min((max(0, limit.n - n) for limit, n, _ in known), default=None)
    for how in ("refuse", "reject", "queue"):
        if any(overflow == how for overflow, _ in full):
            assert capacity.overflow() in [each for each in full if each[0] == how]
            break
    else:
        assert capacity.overflow() is None
    refusing = [(limit, n) for limit, n, _ in known if limit.overflow == "refuse"]
    assert capacity.refuses == bool(refusing)
    assert capacity.may_listen() == all(
        n < limit.n and n <= 3 * limit.n // 4 for limit, n in refusing
    )


# -- on real sockets


class Service:
    """A consumer of either kind, whose streams stay open until their callers leave."""

    def __init__(self, how: str, condition: Any = accept, **options: Any) -> None:
        self.how = how
        self.condition = condition
        self.options = {"stream_factory": self.make, **options}
        self.peak = 0
        self.served: list[Any] = []
        self.outcomes: list[Outcome] = []
        self.handlers: set[asyncio.Task[None]] = set()
        self.listener: Listener[Stream]

    def make(self, stream: Stream) -> Stream:
        """Note how many are open, this one included."""
        self.peak = max(self.peak, self.listener.statistics().streams)
        return stream

    async def handle(self, stream: Stream) -> None:
        """Serve one caller."""
        self.served.append(stream.caller_id)
        async with stream:
            with contextlib.suppress(OSError):
                while line := await stream.readline():
                    if line == b"started\n":
                        stream.started()

    async def consume(self) -> None:
        """Accept until the listener is closed."""
        if self.how == "serve":
            await self.listener.serve(self.handle, self.condition)
        elif self.how == "streams":
            async for stream in self.listener.streams(self.condition):
                self.start(stream)
        else:
            while True:
                try:
                    self.start(await self.listener.accept(self.condition))
                except ConnectionRejectedError:
                    continue
                except ValueError:  # closed
                    return

    def start(self, stream: Stream) -> None:
        """Have it handled by a task."""
        task = asyncio.ensure_future(self.handle(stream))
        self.handlers.add(task)
        task.add_done_callback(self.handlers.discard)

    async def has_served(self, n: int) -> None:
        """Wait until *n* callers have got in."""
        await until(lambda: len(self.served) == n)

    async def has_open(self, n: int) -> None:
        """Wait until *n* streams are open."""
        await until(lambda: self.listener.statistics().streams == n)

    def check(self) -> None:
        """Check that every connection is in exactly one place."""
        s = self.listener.statistics()
        assert s.taken == sum(
            (s.accepted, s.rejected, s.reset, s.expired, s.failed, s.closed, s.pending)
        )


@contextlib.asynccontextmanager
async def running(how: str, condition: Any = accept, **options: Any) -> AsyncIterator[Service]:
    """Run a service on a port of its own; nothing of it is left."""
    service = Service(how, condition, **options)
    service.listener = await listen("127.0.0.1", 0, **service.options)
    service.listener.on_outcome(service.outcomes.append)
    consuming = asyncio.ensure_future(service.consume())
    await asyncio.sleep(0)
    try:
        yield service
    finally:
        service.listener.abort()
        await consuming
        await until(lambda: not service.handlers)
        capacity = service.listener._deciding.capacity
        assert (capacity.streams.taken, capacity.starting.taken) == (0, 0)
        service.check()


async def slowly(_pending: PendingTransport) -> AnyVerdict:
    """Say ACCEPT after a while."""
    for _ in range(3):
        await asyncio.sleep(0)
    return ACCEPT


each_consumer = pytest.mark.parametrize("how", ["serve", "streams", "accept"])
each_condition = pytest.mark.parametrize("condition", [accept, slowly])


def open_streams(service: Service) -> int:
    """How many streams are open."""
    return service.listener.statistics().streams


@each_condition
@each_consumer
async def test_queue(dial: Dial, how: str, condition: Any) -> None:
    """At the limit nobody is taken; all get in as others leave, in their order."""
    async with running(how, condition, max_streams=3) as service:
        clients = [dial(service.listener) for _ in range(10)]
        names = [client.getsockname() for client in clients]
        await service.has_served(3)
        await caught_up()
        statistics = service.listener.statistics()
        assert (statistics.taken, statistics.backlog, statistics.pending) == (3, 7, 0)
        for n, client in enumerate(clients):
            client.close()
            await service.has_served(min(10, n + 4))
        await until(lambda: not open_streams(service))
        assert service.served == names
        assert service.peak == 3


@each_condition
@each_consumer
async def test_reject(dial: Dial, how: str, condition: Any) -> None:
    """At the limit the newcomer is reset without being asked about, and the reason is told."""
    async with running(how, condition, max_streams=Limit(2, "reject")) as service:
        clients = [dial(service.listener) for _ in range(2)]
        await service.has_served(2)
        offers = service.listener.statistics().offers
        for _ in range(3):
            assert await wire_end(dial(service.listener)) == "reset"
        await until(lambda: len(service.outcomes) == 5)
        assert service.listener.statistics().offers == offers
        assert [each.reason for each in service.outcomes[2:]] == ["max_streams=2 is reached"] * 3
        assert {each.status for each in service.outcomes[2:]} == {Status.REJECTED}
        clients[0].close()
        await service.has_open(1)
        dial(service.listener)
        await service.has_served(3)
        assert service.peak == 2


async def test_reject_without_a_call(listener: Listener[Stream], dial: Dial) -> None:
    """Whom a limit keeps out is reset though no accept() call is there to take anybody."""
    dial(listener)
    first = await listener.accept()
    waiting = dial(listener)
    await queued(listener, 1)
    listener.max_streams = Limit(1, "reject")

    assert wire(waiting) == "reset"
    assert await wire_end(dial(listener)) == "reset"
    assert listener.statistics().rejected == 2
    first.close()


async def test_reject_behind_those_who_left(listener: Listener[Stream], dial: Dial) -> None:
    """A caller is reset though a whole wake-up's worth of those before it have left."""
    listener.max_streams = Limit(0, "reject")
    for _ in range(PER_WAKE_UP):
        reset(dial(listener))
    caller = dial(listener)

    assert await wire_end(caller) == "reset"
    statistics = listener.statistics()
    assert (statistics.reset, statistics.rejected) == (PER_WAKE_UP, 1)


async def test_reject_keeps_nobody(dial: Dial) -> None:
    """Who leaves before a limit would have reset it is not kept for an accept() call."""
    async with await listen("127.0.0.1", 0, max_pending=2) as listener:
        listener.max_streams = Limit(0, "reject")
        for _ in range(5):
            reset(dial(listener))
        await until(lambda: listener.statistics().reset == 5)
        assert len(listener._pending) == 0

        listener.max_streams = None
        dial(listener)
        (await asyncio.wait_for(listener.accept(), LIMIT)).close()


@pytest.mark.parametrize("overflow", ["reject", "refuse"])
async def test_over_a_limit_without_descriptors(
    listener: Listener[Stream], dial: Dial, exhaust: Any, overflow: Any
) -> None:
    """Who waits over a limit is seen to when a descriptor is free that was closed elsewhere."""
    caller = dial(listener)
    give_back = exhaust()
    listener.max_streams = Limit(0, overflow)
    await turns()
    assert (listener.statistics().taken, listener.statistics().refusing) == (0, False)
    give_back()

    if overflow == "reject":
        assert await wire_end(caller) == "reset"
    else:
        await until(lambda: listener.statistics().refusing)
        assert len(listener.pending) == 1


@each_consumer
async def test_refuse(dial: Dial, how: str) -> None:
    """At the limit the kernel refuses, and listens again at the low mark, not before."""
    async with running(how, max_streams=Limit(4, "refuse", low=1)) as service:
        listener = service.listener
        clients = [dial(listener) for _ in range(4)]
        await until(lambda: listener.statistics().refusing)
        assert len(service.served) == 4
        for left in (4, 3, 2):
            with pytest.raises(ConnectionRefusedError):
                dial(listener)
            clients.pop().close()
            await service.has_open(left - 1)
        assert not listener.statistics().refusing
        dial(listener)
        await service.has_served(5)
        assert service.peak == 4


@each_consumer
async def test_refuse_takes_in(dial: Dial, how: str) -> None:
    """Whoever was queued when the kernel begins to refuse is not reset, and gets in later."""
    async with running(how, max_streams=0) as service:
        listener = service.listener
        clients = [dial(listener) for _ in range(5)]
        await queued(listener, 5)
        listener.max_streams = Limit(2, "refuse")
        await until(lambda: listener.statistics().refusing)
        assert len(service.served) == 2
        assert listener.statistics().pending == 3
        service.check()
        for client in clients:
            client.close()
        await service.has_served(5)
        await until(lambda: not listener.statistics().refusing)
        assert service.peak == 2


@pytest.mark.parametrize("overflow", ["queue", "reject", "refuse"])
@each_consumer
async def test_zero(dial: Dial, how: str, overflow: Any) -> None:
    """A limit of 0 lets nobody in; raised, it does."""
    async with running(how, max_streams=Limit(0, overflow)) as service:
        listener = service.listener
        if overflow == "refuse":
            with pytest.raises(ConnectionRefusedError):
                dial(listener)
        elif overflow == "reject":
            assert await wire_end(dial(listener)) == "reset"
        else:
            dial(listener)
            await queued(listener, 1)
            await caught_up()
            assert listener.statistics().taken == 0
        assert not service.served
        listener.max_streams = 1
        if overflow != "queue":
            dial(listener)
        await service.has_served(1)


@each_consumer
async def test_starting(dial: Dial, how: str) -> None:
    """Whoever has started makes room for the next to start, and ends without giving it twice."""
    async with running(how, max_starting=2, max_streams=5) as service:
        listener = service.listener
        clients = [dial(listener) for _ in range(7)]
        await service.has_served(2)
        await caught_up()
        assert listener.statistics().starting == 2
        for n in range(2):
            clients[n].sendall(b"started\nstarted\n")
        await service.has_served(4)
        assert (listener.statistics().starting, open_streams(service)) == (2, 4)
        clients[0].close()
        clients[2].close()
        await service.has_served(5)
        assert (listener.statistics().starting, open_streams(service)) == (2, 3)
        clients[3].sendall(b"started\n")
        await service.has_served(6)
        clients[4].sendall(b"started\n")
        await service.has_served(7)
        assert service.peak <= 5


async def test_both_limits(dial: Dial) -> None:
    """With both limits reached the stricter way counts, and each alone its own."""
    async with running(
        "serve", max_streams=Limit(2, "reject"), max_starting=Limit(1, "queue")
    ) as service:
        listener = service.listener
        first = dial(listener)
        await service.has_served(1)
        second = dial(listener)
        await queued(listener, 1)
        await caught_up()
        assert wire(second) == "open"
        first.sendall(b"started\n")
        await service.has_served(2)
        assert await wire_end(dial(listener)) == "reset"
        await until(lambda: len(service.outcomes) == 3)
        assert service.outcomes[-1].reason == "max_streams=2 is reached"


@each_consumer
async def test_lowered_and_raised(dial: Dial, how: str) -> None:
    """A limit below what is open closes nothing, and lets in nobody before enough have left."""
    async with running(how) as service:
        listener = service.listener
        clients = [dial(listener) for _ in range(4)]
        await service.has_served(4)
        # Set only now: those who are in count all the same.
        listener.max_streams = 2
        assert listener.max_streams == Limit(2)
        waiting = [dial(listener) for _ in range(3)]
        for left in (3, 2):
            clients.pop().close()
            await service.has_open(left)
            await caught_up()
            assert len(service.served) == 4
        clients.pop().close()
        await service.has_served(5)
        listener.max_streams = 3
        await service.has_served(6)
        await caught_up()
        assert listener.statistics().backlog == 1
        listener.max_streams = None
        await service.has_served(7)
        assert listener.max_streams is None
        assert all(wire(client) == "open" for client in [*clients, *waiting])


async def test_calls_wait_for_room(listener: Listener[Stream], dial: Dial) -> None:
    """Accept calls that wait for room all go on when there is enough, though one is deferred."""
    listener.max_streams = 1
    dial(listener)
    first = await listener.accept()
    calls = [asyncio.ensure_future(listener.accept()) for _ in range(3)]
    for _ in range(3):
        dial(listener)
    await queued(listener, 3)
    await caught_up()
    assert not any(call.done() for call in calls)
    first.close()
    await until(lambda: sum(call.done() for call in calls) == 1)
    listener.max_streams = 3
    for stream in await asyncio.wait_for(asyncio.gather(*calls), LIMIT):
        stream.close()


async def test_a_deferred_head_waits_for_room(listener: Listener[Stream], dial: Dial) -> None:
    """A call that waits for room is woken by it even if the head was deferred before."""
    dial(listener)
    with pytest.raises(BlockingIOError):
        await listener.accept(defer)
    listener.max_streams = 0
    call = asyncio.ensure_future(listener.accept())
    watching = asyncio.ensure_future(listener.wait_pending())
    await turns()
    assert not call.done()
    listener.max_streams = 1

    stream = await asyncio.wait_for(call, LIMIT)
    await caught_up()
    assert not watching.done()
    listener.close()
    with pytest.raises(ValueError, match="closed"):
        await watching
    stream.close()


async def test_a_loss_needs_no_room(listener: Listener[Stream], dial: Dial) -> None:
    """At the limit accept() still tells of a connection that was lost."""
    client = dial(listener)
    with pytest.raises(BlockingIOError):
        await listener.accept(defer)
    listener.max_streams = 0
    call = asyncio.ensure_future(listener.accept())
    await turns()
    reset(client)

    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(call, LIMIT)


@each_consumer
async def test_decisions_keep_their_room(dial: Dial, how: str) -> None:
    """A decision under way has its place: no more begin than could all say ACCEPT."""
    go = asyncio.Event()
    under_way: list[int] = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        under_way.append(service.listener.statistics().deciding)
        await go.wait()
        return ACCEPT

    async with running(how, condition, max_streams=2) as service:
        if how == "accept":
            others = [asyncio.ensure_future(service.consume()) for _ in range(4)]
        clients = [dial(service.listener) for _ in range(5)]
        await until(lambda: len(under_way) == 2)
        await caught_up()
        statistics = service.listener.statistics()
        assert (statistics.deciding, statistics.backlog) == (2, 3)
        go.set()
        await service.has_served(2)
        for client in clients:
            client.close()
        await service.has_served(5)
        assert service.peak == 2
        if how == "accept":
            service.listener.close()
            await asyncio.gather(*others)


async def test_deferred_wait_for_room(dial: Dial) -> None:
    """A deferred connection that is due is offered only when it could be let in."""
    condition = Condition(DEFER, ACCEPT, ACCEPT, ACCEPT)
    async with running("serve", condition, max_streams=1) as service:
        listener = service.listener
        early = dial(listener)
        await until(lambda: listener.statistics().deferred == 1)
        first = dial(listener)
        await service.has_served(1)
        third = dial(listener)
        names = [each.getsockname() for each in (early, first, third)]
        listener.reconsider()
        await caught_up()
        assert len(condition.offered) == 2
        first.close()
        await service.has_served(2)
        early.close()
        await service.has_served(3)
        third.close()
        assert condition.offered == [names[0], names[1], names[0], names[2]]
        assert service.peak == 1


def deferred(listener: Listener[Stream], n: int) -> bool:
    """Whether *n* connections are."""
    return listener.statistics().deferred == n


async def test_until_free(dial: Dial) -> None:
    """Each place that comes free wakes one who waits for it, the oldest first."""
    full = [True]

    def condition(_pending: PendingTransport) -> AnyVerdict:
        return Defer(until_free=True) if full[0] else ACCEPT

    async with running("serve", condition, max_streams=1) as service:
        listener = service.listener
        full[0] = False
        clients = [dial(listener)]
        await service.has_served(1)
        listener.max_streams = 10
        full[0] = True
        for n in range(3):
            clients.append(dial(listener))
            await until(partial(deferred, listener, n + 1))
        names = [client.getsockname() for client in clients]
        listener.max_streams = 1
        full[0] = False
        clients[0].close()
        await service.has_served(2)
        await caught_up()
        assert listener.statistics().deferred == 2
        # A limit that is raised makes places, too.
        listener.max_streams = 2
        await service.has_served(3)
        await caught_up()
        assert listener.statistics().deferred == 1
        listener.max_streams = None
        await service.has_served(4)
        assert service.served == names


async def test_until_free_in_time(dial: Dial) -> None:
    """Who says until_free when the place has come meanwhile is asked again at once."""
    go = asyncio.Event()
    asked: list[int] = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        asked.append(1)
        if len(asked) > 1:
            return ACCEPT
        await go.wait()
        return Defer(until_free=True)

    async with running("serve", condition, max_streams=1) as service:
        dial(service.listener)
        await until(lambda: asked)
        service.listener.max_streams = 2
        go.set()
        await service.has_served(1)
        assert len(asked) == 2


# -- exactly once


async def _close(stream: Stream, _client: socket.socket) -> None:
    stream.close()


async def _abort(stream: Stream, _client: socket.socket) -> None:
    stream.abort()
    stream.abort()
    stream.close()


async def _reset(stream: Stream, client: socket.socket) -> None:
    reset(client)
    with pytest.raises(ConnectionResetError):
        await stream.read(1)
    stream.close()


async def _started(stream: Stream, _client: socket.socket) -> None:
    stream.started()
    stream.started()
    stream.close()
    stream.started()


async def _transport(stream: Stream, _client: socket.socket) -> None:
    transport, _ = await stream.into_transport(asyncio.Protocol)
    transport.close()


async def _aborted_transport(stream: Stream, _client: socket.socket) -> None:
    transport, _ = await stream.into_transport(asyncio.Protocol)
    stream.started()
    transport.abort()


async def _streams(stream: Stream, client: socket.socket) -> None:
    reader, writer = await stream.into_streams()
    client.close()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "end",
    [_close, _abort, _reset, _started, _transport, _aborted_transport, _streams],
    ids=lambda end: end.__name__.strip("_"),
)
async def test_given_back_once(listener: Listener[Stream], dial: Dial, end: Any) -> None:
    """However a stream ends, its place is given back once."""
    listener.max_streams = listener.max_starting = 2
    other, client = dial(listener), dial(listener)
    stays, stream = await listener.accept(), await listener.accept()
    if stream.caller_id != client.getsockname():
        client = other
    capacity = listener._deciding.capacity
    assert (capacity.streams.taken, capacity.starting.taken) == (2, 2)
    await end(stream, client)
    await until(lambda: capacity.streams.taken == 1)
    await turns()

    assert (capacity.streams.taken, capacity.starting.taken) == (1, 1)
    assert listener.statistics().streams == 1
    del stream
    stays.close()
    assert (capacity.streams.taken, capacity.starting.taken) == (0, 0)


async def test_forgotten_stream(listener: Listener[Stream], dial: Dial) -> None:
    """A stream that is collected as garbage gives its place to the call that waits for one."""
    listener.max_streams = 1
    dial(listener)
    dial(listener)
    stream: Stream | None = await listener.accept()
    call = asyncio.ensure_future(listener.accept())
    await turns()
    assert not call.done()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        stream = None
        gc.collect()
        stream = await asyncio.wait_for(call, LIMIT)
    assert listener.statistics().streams == 1
    stream.close()


async def test_failed_factory(dial: Dial) -> None:
    """A connection of which no stream came leaves its place to the next."""
    tries = []

    def fail(stream: Stream) -> Stream:
        tries.append(stream)
        if len(tries) == 1:
            raise ZeroDivisionError
        return stream

    async with await listen("127.0.0.1", 0, max_streams=1, stream_factory=fail) as listener:
        dial(listener)
        dial(listener)
        with pytest.raises(ZeroDivisionError):
            await listener.accept()
        assert listener._deciding.capacity.streams.taken == 0
        stream = await asyncio.wait_for(listener.accept(), LIMIT)
        stream.close()
        tries.clear()


async def test_holds_go_with_the_place(listener: Listener[Stream], dial: Dial) -> None:
    """What a condition holds is released once, when the place is: a pool of its own is right."""
    pool = Slots(1)
    released: list[str] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        if pool.free == 0:
            return DEFER
        pending.hold(pool.take())
        pending.hold(partial(released.append, "held"))
        return ACCEPT

    listener.max_streams = 5
    dial(listener)
    dial(listener)
    stream = await listener.accept(condition)
    with pytest.raises(BlockingIOError):
        await listener.accept(condition)
    assert (pool.taken, released) == (1, [])
    stream.close()
    assert (pool.taken, released) == (0, ["held"])
    stream = await listener.accept(condition)
    stream.abort()
    assert (pool.taken, released) == (0, ["held"] * 2)
    assert listener._deciding.capacity.streams.taken == 0


@pytest.mark.parametrize("how", ["fail", "leave", "complete", "close"])
async def test_slow_admission(how: str) -> None:
    """On a gate whose admissions take time the place is taken with the verdict, and comes back."""
    listener, gate = memory_listener(slow=True, max_streams=1)
    streams: list[Stream] = []

    async def handler(stream: Stream) -> None:
        streams.append(stream)
        await stream.read()

    with contextlib.ExitStack() as stack:
        serving = asyncio.ensure_future(listener.serve(handler))
        await asyncio.sleep(0)
        clients = [stack.enter_context(gate.dial()) for _ in range(2)]
        await until(lambda: gate.admitting)
        await turns()
        assert (len(gate.admitting), listener.statistics().taken) == (1, 1)
        capacity = listener._deciding.capacity
        assert capacity.streams.taken == 1
        if how == "fail":
            gate.fail()
        elif how == "complete":
            gate.complete()
            await until(lambda: streams)
            clients[0].close()
        elif how == "leave":
            gate.admitting[0][1].cancel()
        else:
            listener.close()
            await asyncio.wait_for(serving, LIMIT)
            assert capacity.streams.taken == 0
            return
        await until(lambda: listener.statistics().taken == 2 and gate.admitting)
        gate.complete()
        await until(lambda: len(streams) == (2 if how == "complete" else 1))
        assert capacity.streams.taken == 1
        listener.abort()
        await asyncio.wait_for(serving, LIMIT)
        assert capacity.streams.taken == 0


async def test_ready_and_gone(dial: Dial) -> None:
    """One that was accepted, and left before anybody took it, gives its place to who waits."""
    async with await listen("127.0.0.1", 0, max_streams=1) as listener:
        condition = Condition(DEFER, Defer(until_free=True), ACCEPT)
        streams = listener.streams(condition)
        first = asyncio.ensure_future(anext(streams))
        client, other = dial(listener), dial(listener)
        await until(lambda: listener.statistics().deferred == 2)
        first.cancel()
        await asyncio.wait([first])
        oldest, _ = listener.pending
        if oldest.caller_id != client.getsockname():
            client, other = other, client
        oldest.decide(ACCEPT)
        assert listener.statistics().ready == 1
        reset(client)
        stream = await asyncio.wait_for(anext(streams), LIMIT)
        assert stream.caller_id == other.getsockname()
        assert len(condition.offered) == 3
        assert listener._deciding.capacity.streams.taken == 1
        stream.close()
        await streams.aclose()


async def test_by_handle(listener: Listener[Stream], dial: Dial) -> None:
    """A decision by handle does not ask for room, and what it lets in counts."""
    listener.max_streams = 1
    dial(listener)
    with pytest.raises(BlockingIOError):
        await listener.accept(defer)
    (pending,) = listener.pending
    listener.max_streams = 0
    stream = await pending.take()

    assert listener._deciding.capacity.streams.taken == 1
    stream.close()
    assert listener._deciding.capacity.streams.taken == 0


# -- changed from a condition; where it cannot be


@pytest.mark.parametrize("overflow", ["reject", "refuse"])
async def test_set_by_a_condition(dial: Dial, overflow: Any) -> None:
    """A condition may set a limit: its own connection is decided as it says, the next is not."""
    seen: list[int] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        service.listener.max_streams = Limit(0, overflow)
        seen.append(service.listener.statistics().pending)
        service.check()
        return ACCEPT

    async with running("serve", condition, max_streams=0) as service:
        listener = service.listener
        clients = [dial(listener) for _ in range(3)]
        await queued(listener, 3)
        listener.max_streams = None
        await until(lambda: service.served)
        await caught_up()
        assert len(service.served) == 1
        statistics = listener.statistics()
        if overflow == "reject":
            assert seen == [1]
            assert statistics.rejected == 2
            assert sorted(map(str, map(wire, clients))) == ["open", "reset", "reset"]
        else:
            assert seen == [3]
            assert statistics.refusing
            assert statistics.pending == 2


async def test_refuse_needs_sockets_of_its_own() -> None:
    """A limit that refuses is turned down at once where the kernel cannot, and nothing changes."""
    sock = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(OSError, match="sockets that listen"):
        Listener.from_socket(sock, max_streams=Limit(5, "refuse"))
    listener: Listener[Stream] = Listener.from_socket(sock, max_streams=7)
    async with listener:
        for name in ("max_streams", "max_starting"):
            with pytest.raises(OSError, match="sockets that listen"):
                setattr(listener, name, Limit(5, "refuse"))
        assert (listener.max_streams, listener.max_starting) == (Limit(7), None)
    with pytest.raises(OSError, match="Unix socket"):
        await listen(path=f"\0condaccept {id(sock)}", max_starting=Limit(5, "refuse"))


async def test_shared_meanwhile(dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    """Where the sockets were shared since, callers are queued, and that is said once."""
    async with running("serve", max_streams=Limit(1, "refuse")) as service:
        assert service.listener.sockets
        first = dial(service.listener)
        await service.has_served(1)
        for n in range(3):
            dial(service.listener)
            await queued(service.listener, n + 1)
            await caught_up()
        assert [record.levelname for record in logged(caplog)] == ["WARNING"]
        assert "shared" in caplog.text
        first.close()
        await service.has_served(2)


async def test_a_closed_listener_has_limits() -> None:
    """A limit can be set on a closed listener, and does nothing."""
    listener: Listener[Stream] = await listen("127.0.0.1", 0)
    listener.close()
    listener.max_streams = Limit(0, "refuse")
    assert listener.max_streams == Limit(0, "refuse")


async def test_listening_again_fails(
    dial: Dial, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that will not listen again is asked until it does."""
    monkeypatch.setattr("condaccept._taking.RELISTEN", 0.001)
    async with running("serve", max_streams=Limit(1, "refuse")) as service:
        listener = service.listener
        again, tries = listener._gate.listen_again, []

        def listen_again() -> None:
            tries.append(listener.statistics().refusing)
            if len(tries) < 3:
                raise OSError(98, "Address already in use")
            again()

        monkeypatch.setattr(listener._gate, "listen_again", listen_again)
        client = dial(listener)
        await until(lambda: listener.statistics().refusing)
        client.close()
        await until(lambda: not listener.statistics().refusing)
        assert tries == [True] * 3
        assert caplog.text.count("still refused") == 2
        dial(listener)
        await service.has_served(2)


# -- wake-ups and turns


@each_consumer
async def test_no_spin(dial: Dial, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit, with callers in the backlog, nothing turns until something happens."""
    async with running(how, max_streams=1) as service:
        listener = service.listener
        dial(listener)
        await until(lambda: service.served)
        for _ in range(5):
            dial(listener)
        await queued(listener, 5)
        await caught_up()
        asked: list[int | None] = []
        room = listener._deciding.capacity.room

        def count() -> int | None:
            asked.append(room())
            return asked[-1]

        monkeypatch.setattr(listener._deciding.capacity, "room", count)
        await turns(100)
        assert not asked
        dial(listener)
        await queued(listener, 6)
        await caught_up()
        # One newcomer: a handful of questions, and no accept(2).
        assert 0 < len(asked) < 10
        assert listener.statistics().taken == 1


FLOOD = 500


@pytest.mark.slow
@pytest.mark.parametrize("way", ["condition", "limit", "lost", "deferred"])
async def test_others_have_their_turn(way: str) -> None:
    """Under a flood of rejected callers a reader of the loop is called every few offers."""
    condition = defer if way == "deferred" else reject
    async with running("serve", condition, max_streams=0) as service:
        listener = service.listener
        clients = []
        for _ in range(FLOOD):
            client = socket.create_connection(listener.sockname)
            if way == "lost":
                reset(client)
            clients.append(client)
        await queued(listener, FLOOD)
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        seen: list[int] = []
        ours.send(b"x")  # readable all the time
        loop.add_reader(theirs, lambda: seen.append(listener.statistics().taken))
        await turns(2)
        listener.max_streams = Limit(0, "reject") if way == "limit" else None
        await until(lambda: listener.statistics().taken == FLOOD)
        await turns(2)
        loop.remove_reader(theirs)
        for each in (ours, theirs, *clients):
            each.close()
        steps = [after - before for before, after in itertools.pairwise(seen)]
        assert sum(steps) == FLOOD
        assert max(steps) <= 2 * PER_WAKE_UP
        statistics = listener.statistics()
        end = {"lost": statistics.reset, "deferred": statistics.deferred}
        assert end.get(way, statistics.rejected) == FLOOD
