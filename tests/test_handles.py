"""Deciding by handle: any entry of `listener.pending`, in any order, under any consumer."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptInProgressError,
    AnyVerdict,
    CalleeDataError,
    ConnectionDeferredError,
    Defer,
    InvalidGroupError,
    InvalidVerdictError,
    Listener,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from condaccept.testing import MemoryGate, memory_listener, pending_transport
from tests.consumers import (
    Handler,
    Held,
    cancelled,
    ended,
    iterating,
    outcomes,
    result,
    serving,
    start,
)
from tests.support import Dial, caught_up, defer, reset, turns, until, wire, wire_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

Memory = tuple[Listener[Stream], MemoryGate]
CONSUMERS = ["none", "accept", "streams", "serve"]


@pytest.fixture
async def memory() -> AsyncIterator[Memory]:
    """A listener without a network: its gate tells of a caller inside `dial()`."""
    listener, gate = memory_listener()
    async with listener:
        yield listener, gate


class Consumer:
    """One of the consumers, with callers that it has deferred."""

    def __init__(self, listener: Listener[Stream], kind: str) -> None:
        self.listener = listener
        self.kind = kind
        self.handler = Handler()
        self.task: asyncio.Task[Any] | None = None
        self.hints: AnyVerdict = DEFER

    def condition(self, _pending: PendingTransport) -> AnyVerdict:
        """Defer everybody."""
        return self.hints

    async def defer(self, dial: Callable[[int], Any], n: int) -> list[Any]:
        """Have *n* callers deferred; return them."""
        clients = [dial(each) for each in range(n)]
        if self.kind == "serve":
            self.task = await serving(self.listener, self.condition, self.handler)
        elif self.kind == "streams":
            self.task = await iterating(self.listener.streams(self.condition))
        else:
            # An accept call cannot get past a deferred head: so many decide at once.
            held = Held()
            calls = [start(self.listener.accept(held)) for _ in range(n)]
            await held.asked(n)
            for each in held.verdicts:
                each.set_result(self.hints)
            for call in calls:
                assert isinstance(await ended(call), ConnectionDeferredError)
        await until(lambda: self.listener.statistics().deferred == n)
        return clients

    async def stream(self) -> Stream:
        """Return the stream of one that was accepted by handle."""
        if self.kind == "serve":
            await self.handler.has(1)
            return self.handler.streams[0]
        if self.kind == "streams":
            assert self.task is not None
            stream: Stream = await result(self.task)
            return stream
        taken: Stream = await result(self.listener.accept())
        return taken

    async def end(self) -> None:
        """End it."""
        if self.task is not None and not self.task.done():
            await cancelled(self.task)


@pytest.mark.parametrize("kind", CONSUMERS)
@pytest.mark.parametrize("verdict", [REJECT, Reject(data=b"bye"), DEFER, Defer(after=1000.0)])
async def test_decide(
    listener: Listener[Stream], dial: Dial, kind: str, verdict: AnyVerdict
) -> None:
    """The middle one of three can be rejected, or deferred again, out of order."""
    consumer = Consumer(listener, kind)
    clients = await consumer.defer(lambda _: dial(listener), 3)
    before = listener.pending
    before[1].decide(verdict)

    if verdict is REJECT:
        assert wire(clients[1]) == "reset"
    elif isinstance(verdict, Reject):
        assert wire(clients[1]) == b"bye"
    if verdict is REJECT or isinstance(verdict, Reject):
        assert listener.pending == (before[0], before[2])
    else:
        assert listener.pending == before
        assert before[1].deferrals == 2
    assert [wire(clients[n]) for n in (0, 2)] == ["open"] * 2
    await consumer.end()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", CONSUMERS)
async def test_decide_accept(kind: str, *, slow: bool) -> None:
    """An accepted one goes to whoever takes the listener's streams; accept() keeps its turn."""
    listener, gate = memory_listener(slow=slow)
    async with listener:
        seen = outcomes(listener)
        consumer = Consumer(listener, kind)
        clients = await consumer.defer(lambda n: gate.dial(("192.0.2.1", n)), 2)
        n = 0 if kind in ("none", "accept") else 1
        listener.pending[n].decide(ACCEPT)
        if slow:
            assert listener.statistics().ready == 1
            gate.complete()
            await asyncio.sleep(0)
        stream = await consumer.stream()
        assert stream.caller_id[1] == n
        stream.close()
        await until(lambda: len(seen) == 1)
        assert seen[0].status is Status.ACCEPTED
        await consumer.end()
        for client in clients:
            client.close()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", CONSUMERS)
async def test_take(kind: str, *, slow: bool) -> None:
    """take() gives the stream to who asks for it, whatever its place, and to nobody else."""
    listener, gate = memory_listener(slow=slow)
    async with listener:
        consumer = Consumer(listener, kind)
        clients = await consumer.defer(lambda n: gate.dial(("192.0.2.1", n)), 3)
        taking = start(listener.pending[1].take())
        if slow:
            await until(lambda: gate.admitting)
            await turns()
            assert not taking.done()
            gate.complete()
        stream = await result(taking)
        assert stream.caller_id[1] == 1
        stream.close()
        await turns()
        assert consumer.handler.streams == []
        assert len(listener.pending) == 2
        await consumer.end()
        for client in clients:
            client.close()


async def test_take_of_what_was_made(dial: Dial) -> None:
    """take() returns what stream_factory makes, and raises what it raises."""
    made: list[Stream] = []

    def factory(stream: Stream) -> list[Stream]:
        made.append(stream)
        if len(made) > 1:
            raise KeyError
        return made

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        consumer = Consumer(listener, "serve")  # type: ignore[arg-type]
        await consumer.defer(lambda _: dial(listener), 2)
        one, two = listener.pending
        assert await one.take() is made
        with pytest.raises(KeyError):
            await two.take()
        made[0].close()
        assert listener.statistics().failed == 1
        await consumer.end()


def dialing(gate: MemoryGate) -> Callable[[int], Any]:
    """Return what connects to *gate*."""
    return lambda n: gate.dial(("192.0.2.1", n))


@pytest.mark.parametrize("kind", CONSUMERS)
async def test_cancelled_take(kind: str) -> None:
    """Whenever take() is cancelled, the connection is undecided, or goes to the consumer."""
    for n in range(5):
        listener, gate = memory_listener(slow=True)
        async with listener:
            consumer = Consumer(listener, kind)
            (client,) = await consumer.defer(dialing(gate), 1)
            (pending,) = listener.pending
            taking = start(pending.take())
            for each in range(n):
                await asyncio.sleep(0)
                if each == 2:
                    gate.complete()
            taking.cancel()
            if await ended(taking) is None:
                assert n > 3
                taking.result().close()
            else:
                if pending.status is Status.DEFERRED:
                    pending.decide(ACCEPT)
                while gate.admitting:
                    gate.complete()
                (await consumer.stream()).close()
            await consumer.end()
            client.close()
        assert listener.statistics().accepted == 1


async def test_take_of_a_ready_one(memory: Memory) -> None:
    """One that was accepted by handle and has gone to nobody yet can be taken."""
    listener, gate = memory
    consumer = Consumer(listener, "none")
    clients = await consumer.defer(lambda n: gate.dial(("192.0.2.1", n)), 2)
    one, two = listener.pending
    one.decide(ACCEPT)
    two.decide(ACCEPT)
    assert [each.status for each in (one, two)] == [Status.READY] * 2
    stream = await two.take()
    assert stream.caller_id[1] == 1
    stream.close()
    (await listener.accept()).close()
    with pytest.raises(RuntimeError, match="is accepted already"):
        await two.take()
    for client in clients:
        client.close()


async def test_a_take_and_a_new_consumer() -> None:
    """What take() waits for goes to nobody else, not to one that begins meanwhile either."""
    listener, gate = memory_listener(slow=True)
    async with listener:
        (client,) = await Consumer(listener, "none").defer(dialing(gate), 1)
        (pending,) = listener.pending
        taking = start(pending.take())
        await until(lambda: gate.admitting)
        gate.complete()
        await asyncio.sleep(0)  # it is ready now, and take() has still to have its turn
        assert pending.status is Status.READY
        iteration = listener.streams().__anext__()
        iteration.send(None)  # in this very turn
        (await result(taking)).close()
        iteration.close()
        client.close()


async def end_of(listener: Listener[Stream], status: Status) -> PendingTransport:
    """Return the handle of a connection that has found that end."""
    (pending,) = listener.pending
    if status is Status.ACCEPTED:
        (await pending.take()).close()
    elif status is Status.REJECTED:
        pending.decide(REJECT)
    elif status is Status.CLOSED:
        listener.close()
    elif status is Status.EXPIRED:
        listener._deciding.expire(pending, "too late")
    else:
        listener._deciding._lose(pending, status, "gone")
    return pending


@pytest.mark.parametrize("kind", ["none", "serve"])
@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (Status.ACCEPTED, RuntimeError, "is accepted already"),
        (Status.REJECTED, RuntimeError, "is rejected already"),
        (Status.CLOSED, RuntimeError, "is closed already"),
        (Status.RESET, PendingResetError, "gone"),
        (Status.EXPIRED, PendingExpiredError, "too late"),
    ],
)
async def test_a_handle_of_one_that_is_gone(
    memory: Memory, kind: str, status: Status, error: type[Exception], words: str
) -> None:
    """decide(), take() and reconsider() of a connection that has ended say so, and how."""
    listener, gate = memory
    consumer = Consumer(listener, kind)
    (client,) = await consumer.defer(lambda _: gate.dial(), 1)
    pending = await end_of(listener, status)
    assert pending.status is status
    for verdict in (ACCEPT, REJECT, DEFER):
        with pytest.raises(error, match=words):
            pending.decide(verdict)
    with pytest.raises(error, match=words):
        await pending.take()
    assert not pending.reconsider()
    if status is Status.CLOSED and consumer.task is not None:
        await result(consumer.task)
    await consumer.end()
    client.close()


@pytest.mark.parametrize("kind", ["none", "serve"])
@pytest.mark.parametrize("call", ["decide", "take"])
async def test_a_caller_that_has_just_reset(
    listener: Listener[Stream], dial: Dial, kind: str, call: str
) -> None:
    """A reset that nobody has noticed yet is noticed, and is one loss however often asked."""
    seen = outcomes(listener)
    consumer = Consumer(listener, kind)
    (client,) = await consumer.defer(lambda _: dial(listener), 1)
    (pending,) = listener.pending
    reset(client)
    for _ in range(2):
        with pytest.raises(PendingResetError):
            await (decided(pending) if call == "decide" else pending.take())
    await caught_up()
    assert [each.status for each in seen] == [Status.RESET]
    if kind == "none":
        # An answer is no report: that is for an accept call, once.
        with pytest.raises(PendingResetError):
            await listener.accept()
    assert not listener._pending
    await consumer.end()


async def decided(pending: PendingTransport) -> None:
    """Accept by handle."""
    pending.decide(ACCEPT)


async def test_a_ready_one_that_has_reset(listener: Listener[Stream], dial: Dial) -> None:
    """take() of an accepted one whose caller has reset since says so."""
    (client,) = await Consumer(listener, "none").defer(lambda _: dial(listener), 1)
    (pending,) = listener.pending
    pending.decide(ACCEPT)
    reset(client)
    with pytest.raises(PendingResetError, match="before it was taken"):
        await pending.take()
    with pytest.raises(PendingResetError, match="before it was taken"):
        await listener.accept()
    assert not listener._pending


@pytest.mark.parametrize("consumer", ["accept", "streams", "serve"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("before", ["fresh", "deferred"])
async def test_under_decision(
    memory: Memory, consumer: str, before: str, *, asynchronous: bool
) -> None:
    """While a condition is asked about it, a connection cannot be decided by handle."""
    listener, gate = memory
    seen: list[Any] = []

    async def take(pending: PendingTransport) -> None:
        with pytest.raises(AcceptInProgressError, match="under decision"):
            await pending.take()
        seen.append("take")

    tasks: list[Any] = []

    def plain(pending: PendingTransport) -> AnyVerdict:
        with pytest.raises(AcceptInProgressError, match="under decision"):
            pending.decide(REJECT)
        seen.append("decide")
        return REJECT

    async def slow(pending: PendingTransport) -> AnyVerdict:
        tasks.append(start(take(pending)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return plain(pending)

    condition: Any = slow if asynchronous else plain
    with gate.dial() as client:
        if before == "deferred":
            with pytest.raises(ConnectionDeferredError):
                await listener.accept(defer)
        coroutine: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "accept": lambda: listener.accept(condition),
            "streams": lambda: _anext(listener, condition),
            "serve": lambda: listener.serve(Handler(), condition),
        }
        task = start(coroutine[consumer]())
        assert await wire_end(client) == "eof"
        for each in tasks:
            await result(each)
        assert seen == (["take"] if asynchronous else []) + ["decide"]
        task.cancel()
        await ended(task)


async def _anext(listener: Listener[Stream], condition: Any) -> Any:
    return await anext(listener.streams(condition))


async def test_from_another_condition(memory: Memory) -> None:
    """A condition may decide about others: here a newcomer takes the place of the oldest."""
    listener, gate = memory

    def condition(pending: PendingTransport) -> AnyVerdict:
        for other in listener.pending:
            if other is not pending:
                other.decide(REJECT)
        return DEFER

    serve = await serving(listener, condition)
    clients = [gate.dial() for _ in range(3)]
    assert [wire(client) for client in clients] == ["eof", "eof", "open"]
    await cancelled(serve)
    for client in clients:
        client.close()


def ungrouped(pending: PendingTransport) -> AnyVerdict:
    """Name a group that there is not."""
    pending.group = "nobody's"
    return ACCEPT


@pytest.mark.parametrize("kind", ["none", "serve"])
@pytest.mark.parametrize(
    ("verdict", "error"),
    [(7, InvalidVerdictError), (Reject(data=bytes(5000)), CalleeDataError), (None, None)],
)
async def test_an_invalid_verdict_changes_nothing(
    listener: Listener[Stream],
    dial: Dial,
    kind: str,
    verdict: Any,
    error: type[Exception] | None,
) -> None:
    """It is raised to who gave it; the connection keeps its place, and waits as before."""
    consumer = Consumer(listener, kind)
    consumer.hints = Defer(until_bytes=3)
    (client,) = await consumer.defer(lambda _: dial(listener), 1)
    (pending,) = listener.pending
    if error is None:
        verdict, error = ungrouped(pending), InvalidGroupError
    with pytest.raises(error):
        pending.decide(verdict)
    assert (pending.status, pending.deferrals) == (Status.DEFERRED, 1)
    assert listener.pending == (pending,)
    offers = listener.statistics().offers
    await turns()
    assert not pending._stay.due
    client.send(b"abc")
    if kind == "serve":
        await until(lambda: listener.statistics().offers > offers)
    else:
        await listener.wait_pending()
    await consumer.end()


async def test_one_that_was_never_offered(memory: Memory) -> None:
    """An undecided connection, left by a cancelled decision, can be decided, too."""
    listener, gate = memory
    held = Held()
    call = start(listener.accept(held))
    with gate.dial():
        await held.asked(1)
        await cancelled(call)
        (pending,) = listener.pending
        assert pending.status is Status.QUEUED
        pending.decide(Defer(after=0))
        await listener.wait_pending()
        (await pending.take()).close()


async def test_without_a_listener() -> None:
    """A pending transport made for a test says that nobody owns it."""
    pending = pending_transport()
    with pytest.raises(RuntimeError, match="made for a test"):
        pending.decide(REJECT)
    with pytest.raises(RuntimeError, match="made for a test"):
        await pending.take()
    assert not pending.reconsider()


async def test_holds_and_on_settled(memory: Memory) -> None:
    """What a deciding by handle ends is told to on_settled() once, with its reason."""
    listener, gate = memory
    settled: list[Any] = []
    consumer = Consumer(listener, "serve")
    (client,) = await consumer.defer(lambda _: gate.dial(), 1)
    (pending,) = listener.pending
    pending.on_settled(settled.append)
    with pytest.raises(RuntimeError, match="belongs to an offer"):
        pending.hold(partial(settled.append, "released"))
    pending.decide(Reject("by hand"))
    await asyncio.sleep(0)
    assert [(each.status, each.reason) for each in settled] == [(Status.REJECTED, "by hand")]
    await consumer.end()
    client.close()
