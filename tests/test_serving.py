"""`streams()` and `serve()`: whoever is deferred blocks nobody, and nobody is lost."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import itertools
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptInProgressError,
    AnyVerdict,
    ConditionNotCallableError,
    Listener,
    ListenerClosedError,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from condaccept._taking import PER_WAKE_UP
from condaccept.testing import MemoryGate, memory_listener
from tests.consumers import (
    Handler,
    Held,
    add_up,
    cancelled,
    ended,
    iterating,
    keep,
    outcomes,
    result,
    serving,
    start,
)
from tests.support import (
    LIMIT,
    Condition,
    Dial,
    accept,
    caught_up,
    defer,
    descriptors,
    queued,
    reject,
    reset,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

Memory = tuple[Listener[Stream], MemoryGate]
VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="nobody's")
SWEEP = 9
IN_A_ROW = 64


class MishapError(Exception):
    """What goes wrong here."""


@pytest.fixture
async def memory() -> AsyncIterator[Memory]:
    """A listener without a network: its gate tells of a caller inside `dial()`."""
    listener, gate = memory_listener()
    async with listener:
        yield listener, gate


# -- who gets what


async def test_streams_in_order(either: Listener[Stream], dial: Dial) -> None:
    """An iteration gives accepted callers in the order they came, and ends with the listener."""
    clients = [dial(either).getsockname() for _ in range(5)]
    got = []
    async for stream in either.streams(accept):
        got.append(stream.caller_id)
        stream.close()
        if len(got) == 5:
            either.close()
    assert got == clients


async def test_serve_runs_a_handler_for_each(either: Listener[Stream], dial: Dial) -> None:
    """Each accepted caller has a handler of its own, whose return closes the stream."""
    handler = Handler()
    serve = await serving(either, None, handler)
    clients = [dial(either) for _ in range(3)]
    await handler.has(3)
    assert either.statistics().handlers == 3
    handler.go.set()

    assert [await wire_end(client) for client in clients] == ["eof"] * 3
    await until(lambda: either.statistics().handlers == 0)
    either.close()
    await result(serve)
    assert either.statistics().streams == 0


async def test_deferral_blocks_nobody(listener: Listener[Stream], dial: Dial) -> None:
    """Those behind a deferred caller go on, and it is not asked about again."""
    condition = Condition(DEFER, ACCEPT, REJECT, ACCEPT)
    clients = [dial(listener).getsockname() for _ in range(4)]
    streams = listener.streams(condition)
    got = [await anext(streams), await anext(streams)]

    assert [stream.caller_id for stream in got] == [clients[1], clients[3]]
    assert condition.offered == clients
    assert [each.caller_id for each in listener.pending] == [clients[0]]
    assert listener.pending[0].status is Status.DEFERRED
    for stream in got:
        stream.close()


async def test_callback_data(memory: Memory) -> None:
    """What the caller of serve() passed is seen by the condition, untouched."""
    listener, gate = memory
    seen: list[object] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.callback_data)
        return REJECT

    serve = await serving(listener, condition, keep, "data")
    with gate.dial():
        assert seen == ["data"]
    await cancelled(serve)


async def test_nothing_is_taken_without_demand(listener: Listener[Stream], dial: Dial) -> None:
    """While no iteration waits, callers stay in the kernel's queue."""
    streams = listener.streams()
    dial(listener)
    (await anext(streams)).close()
    dial(listener)
    await queued(listener, 1)
    await caught_up()

    assert listener.statistics().taken == 1
    (await anext(streams)).close()


async def test_a_cancelled_iteration_demands_nothing(memory: Memory) -> None:
    """A caller who comes in the turn of the cancellation is not taken."""
    listener, gate = memory
    iteration = await iterating(listener.streams())
    iteration.cancel()
    with gate.dial():
        assert isinstance(await ended(iteration), asyncio.CancelledError)
        assert listener.statistics().taken == 0


@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_a_rejected_caller_costs_no_task(
    listener: Listener[Stream], dial: Dial, consumer: str
) -> None:
    """A plain condition is asked from the readiness callback, outside of any task."""
    tasks: list[Any] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        tasks.append(asyncio.current_task())
        return REJECT

    streams = listener.streams(condition)
    task = await (serving(listener, condition) if consumer == "serve" else iterating(streams))
    before = asyncio.all_tasks()
    clients = [dial(listener) for _ in range(5)]
    await until(lambda: len(tasks) == 5)

    assert tasks == [None] * 5
    assert asyncio.all_tasks() == before
    assert [wire(client) for client in clients] == ["reset"] * 5
    await cancelled(task)


@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_async_conditions_side_by_side(consumer: str) -> None:
    """So many decisions as max_deciding allows are under way at once, and no more."""
    listener, gate = memory_listener(max_deciding=2)
    async with listener:
        held, handler = Held(), Handler()
        streams = listener.streams(held)
        task = await (
            serving(listener, held, handler) if consumer == "serve" else iterating(streams)
        )
        clients = [gate.dial(("192.0.2.1", n)) for n in range(4)]
        await held.asked(2)
        await caught_up()
        assert len(held.offered) == listener.statistics().deciding == 2
        held.verdicts[1].set_result(REJECT)
        await held.asked(3)
        held.verdicts[2].set_result(ACCEPT)
        held.verdicts[0].set_result(REJECT)
        if consumer == "serve":
            await handler.has(1)
            await held.asked(4)
        else:
            (await result(task)).close()
        assert [each.caller_id[1] for each in held.offered][:3] == [0, 1, 2]
        for each in clients:
            each.close()
        listener.close()
        await listener.wait_closed()
        handler.go.set()
        await ended(task)


# -- one kind of consumer


async def first(listener: Listener[Stream], kind: str) -> Any:
    """Let a consumer be at work."""
    if kind == "serve":
        return await serving(listener)
    if kind == "streams":
        return await iterating(listener.streams())
    task = start(listener.accept() if kind == "accept" else listener.wait_pending())
    await asyncio.sleep(0)
    return task


def second(listener: Listener[Stream], kind: str) -> Any:
    """Begin to consume."""
    calls: dict[str, Any] = {
        "accept_nowait": lambda: _nowait(listener),
        "accept": listener.accept,
        "wait_pending": listener.wait_pending,
        "streams": lambda: anext(listener.streams()),
        "serve": lambda: listener.serve(keep),
    }
    return calls[kind]()


async def _nowait(listener: Listener[Stream]) -> Any:
    listener.accept_nowait()


@pytest.mark.parametrize("late", ["accept", "accept_nowait", "wait_pending", "streams", "serve"])
@pytest.mark.parametrize("early", ["accept", "wait_pending", "streams", "serve"])
async def test_one_kind_of_consumer(memory: Memory, early: str, late: str) -> None:
    """While one consumer is at work, another kind is refused and changes nothing."""
    listener, gate = memory
    task = await first(listener, early)
    if not {early, late} <= {"accept", "wait_pending", "accept_nowait"}:  # one kind
        with pytest.raises(AcceptInProgressError, match="is at work on this listener"):
            await second(listener, late)
    assert not task.done()
    with gate.dial():
        await until(lambda: listener.statistics().taken or task.done())
    task.cancel()
    if early != "serve" and await ended(task) is None and early != "wait_pending":
        task.result().close()
    await ended(task)


@pytest.mark.parametrize("late", ["accept", "accept_nowait", "streams", "serve"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_no_consuming_from_a_condition(
    memory: Memory, consumer: str, late: str, *, asynchronous: bool
) -> None:
    """A condition of streams() or serve() can consume from the same listener in no way."""
    listener, gate = memory
    seen: list[type[BaseException]] = []

    def plain(_pending: PendingTransport) -> AnyVerdict:
        coroutine = second(listener, late)
        # Driven by hand: what a plain condition can do at most.
        if hasattr(coroutine, "__await__") and not hasattr(coroutine, "send"):
            coroutine = coroutine.__await__()
        try:
            while True:
                coroutine.send(None)
        except AcceptInProgressError as error:
            seen.append(type(error))
        return REJECT

    async def slow(_pending: PendingTransport) -> AnyVerdict:
        try:
            await second(listener, late)
        except AcceptInProgressError as error:
            seen.append(type(error))
        return REJECT

    condition = slow if asynchronous else plain
    if consumer == "serve":
        task = await serving(listener, condition)
    else:
        task = await iterating(listener.streams(condition))
    with gate.dial() as client:
        await until(lambda: listener.statistics().rejected)
        assert wire(client) == "eof"
    assert seen == [AcceptInProgressError]
    await cancelled(task)


async def test_a_handler_cannot_accept(memory: Memory) -> None:
    """While serve() runs, its handlers are not a second consumer."""
    listener, gate = memory
    seen: list[BaseException] = []

    async def handler(_stream: Stream) -> None:
        with pytest.raises(AcceptInProgressError) as caught:
            await listener.accept()
        seen.append(caught.value)

    serve = await serving(listener, None, handler)
    with gate.dial() as client:
        assert await wire_end(client) == "eof"
    assert len(seen) == 1
    await cancelled(serve)


async def test_a_refused_serve_changes_no_statistics(memory: Memory) -> None:
    """The handlers of a running serve() are counted, whatever a second one was told."""
    listener, gate = memory
    handler = Handler()
    serve = await serving(listener, None, handler)
    with gate.dial():
        await handler.has(1)
        with pytest.raises(AcceptInProgressError):
            await listener.serve(keep)
        assert listener.statistics().handlers == 1
        await cancelled(serve)
    assert listener.statistics().handlers == 0


async def test_an_idle_iterator_gives_way(memory: Memory) -> None:
    """After a break out of the iteration, accept(), and another iterator, can go on."""
    listener, gate = memory
    clients = [gate.dial() for _ in range(4)]
    streams = listener.streams(accept)
    async for stream in streams:
        stream.close()
        break
    (await listener.accept()).close()
    (await anext(listener.streams())).close()
    (await anext(streams)).close()
    assert listener.statistics().accepted == 4
    for client in clients:
        client.close()


@pytest.mark.parametrize("condition", [5, "text"])
async def test_what_cannot_be_called(memory: Memory, condition: Any) -> None:
    """What is no condition, or no handler, is refused before anything is touched."""
    listener, _ = memory
    with pytest.raises(ConditionNotCallableError):
        listener.streams(condition)
    with pytest.raises(ConditionNotCallableError):
        await listener.serve(keep, condition)
    with pytest.raises(TypeError, match="handler cannot be called"):
        await listener.serve(condition)
    assert not listener._deciding.consumer.busy()


async def test_a_closed_listener(memory: Memory) -> None:
    """On a closed listener an iteration ends at once, and serve() says why not."""
    listener, _ = memory
    listener.close()
    assert [each async for each in listener.streams()] == []
    with pytest.raises(ListenerClosedError):
        await listener.serve(keep)


# -- cancelled


async def condition_of(turns: int, _pending: PendingTransport) -> AnyVerdict:
    """Say ACCEPT after so many turns of the loop."""
    for _ in range(turns):
        await asyncio.sleep(0)
    return ACCEPT


CONDITIONS: dict[str, Any] = {
    "none": None,
    "plain": accept,
    "async": partial(condition_of, 2),
}


async def next_consumer(listener: Listener[Stream], kind: str, n: int) -> list[Any]:
    """Take *n* streams in one of three ways; return the callers."""
    if kind == "accept":
        got = [await result(listener.accept()) for _ in range(n)]
    elif kind == "streams":
        streams = listener.streams()
        got = [await result(anext(streams)) for _ in range(n)]
    else:
        handler = Handler()
        serve = await serving(listener, None, handler)
        await handler.has(n)
        got = handler.streams
        handler.go.set()
        await until(lambda: listener.statistics().handlers == 0)
        await cancelled(serve)
    for stream in got:
        stream.close()
    return [stream.caller_id for stream in got]


@pytest.mark.parametrize("late", ["accept", "streams", "serve"])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("early", ["streams", "serve"])
@pytest.mark.parametrize("kind", ["tcp", "slow"])
async def test_cancelled_at_every_turn(
    dial: Dial, kind: str, early: str, condition: str, late: str
) -> None:
    """Whenever a consumer is cancelled, what it has not given out goes to the next one."""
    for turns in range(SWEEP):
        listener, gate = await open_listener(kind)
        async with listener:
            seen = outcomes(listener)
            clients = [
                dial(listener) if gate is None else gate.dial(("192.0.2.1", n)) for n in range(3)
            ]
            if early == "serve":
                task = start(listener.serve(Handler(), CONDITIONS[condition]))
            else:
                task = start(anext(listener.streams(CONDITIONS[condition])))
            for n in range(turns):
                await asyncio.sleep(0)
                if n % 2:
                    complete(gate)
            task.cancel()
            if await ended(task) is None:
                task.result().close()
            # What was given to a handler ended there, aborted before its first step or later.
            done = listener.statistics().accepted
            rest = start(next_consumer(listener, late, 3 - done))
            while not rest.done():
                complete(gate)
                await asyncio.sleep(0)
            assert len(rest.result()) == 3 - done
            now = listener.statistics()
            assert now.taken == now.accepted == 3
            assert now.pending == now.deciding == now.ready == now.streams == now.handlers == 0
            await asyncio.sleep(0)
            assert len({each.caller_id for each in seen}) == len(seen) == 3
        for client in clients:
            client.close()


async def open_listener(kind: str) -> tuple[Listener[Stream], MemoryGate | None]:
    """Open a listener on TCP, or with a gate whose admissions `complete()` ends."""
    if kind == "slow":
        return memory_listener(slow=True)
    return await listen("127.0.0.1", 0), None


def complete(gate: MemoryGate | None) -> None:
    """Complete the admissions of a slow gate."""
    while gate is not None and gate.admitting:
        gate.complete()


@pytest.mark.parametrize("late", ["accept", "streams", "serve"])
async def test_accepted_and_not_taken(memory: Memory, late: str) -> None:
    """A connection that was accepted for a cancelled iteration is ready for the next one."""
    listener, gate = memory
    held = Held()
    iteration = await iterating(listener.streams(held))
    with gate.dial():
        await held.asked(1)
        iteration.cancel()
        await ended(iteration)
        held.verdicts[0].set_result(ACCEPT)
        await until(lambda: listener.statistics().ready)
        assert listener.pending[0].status is Status.READY
        assert held.released == []
        assert await next_consumer(listener, late, 1) == [gate_caller()]
    await until(lambda: held.released)
    assert len(held.offered) == len(held.released) == 1


def gate_caller() -> Any:
    """Return the address under which `MemoryGate.dial()` connects."""
    return ("192.0.2.1", 50000)


async def test_a_woken_iteration_that_is_cancelled_wakes_the_next(memory: Memory) -> None:
    """Of two waiting iterations the second gets what the cancelled first was woken for."""
    listener, gate = memory
    streams = listener.streams()
    one, two = await iterating(streams), await iterating(streams)
    with gate.dial():
        one.cancel()
        assert isinstance(await ended(one), asyncio.CancelledError)
        (await result(two)).close()


async def test_several_tasks_iterate(memory: Memory) -> None:
    """Each of several tasks over one iterator gets streams of its own."""
    listener, gate = memory
    streams = listener.streams(partial(condition_of, 1))
    got: list[list[Any]] = [[], [], []]

    async def work(mine: list[Any]) -> None:
        async for stream in streams:
            mine.append(stream.caller_id)
            stream.close()

    tasks = [start(work(mine)) for mine in got]
    clients = []
    for n in range(30):
        clients.append(gate.dial(("192.0.2.1", n)))
        await asyncio.sleep(0)
    await until(lambda: sum(map(len, got)) == 30)
    listener.close()
    for task in tasks:
        await result(task)
    assert sorted(each[1] for mine in got for each in mine) == list(range(30))
    assert all(got)
    for client in clients:
        client.close()


async def test_cancelled_serve_leaves_the_deque(listener: Listener[Stream], dial: Dial) -> None:
    """After a cancelled serve() accept() goes on with whoever is undecided, in place."""
    handler, held = Handler(), Held()

    def condition(pending: PendingTransport) -> Any:
        return held(pending) if len(listener.pending) > 1 else DEFER

    serve = await serving(listener, condition, handler)
    deferred = dial(listener)
    await until(lambda: listener.pending)
    deciding = dial(listener)
    await held.asked(1)
    await cancelled(serve)

    assert [each.status for each in listener.pending] == [Status.DEFERRED, Status.QUEUED]
    assert len(held.released) == 1
    for client in (deferred, deciding):
        stream = await listener.accept()
        assert stream.caller_id == client.getsockname()
        stream.close()


async def test_cancelled_serve_waits_for_its_handlers(memory: Memory) -> None:
    """Cancelling serve() cancels the handlers, waits for them, and aborts their streams."""
    listener, gate = memory
    events: list[str] = []

    async def handler(stream: Stream) -> None:
        try:
            await stream.read()
        finally:
            await asyncio.sleep(0)
            events.append("handler")

    serve = await serving(listener, None, handler)
    with gate.dial():
        await until(lambda: listener.statistics().handlers)
        await asyncio.sleep(0)
        await cancelled(serve)
        events.append("serve")
    assert events == ["handler", "serve"]
    assert listener.statistics().streams == 0


async def test_a_handler_cancelled_before_its_first_step(memory: Memory) -> None:
    """A stream whose handler never began is aborted all the same."""
    listener, gate = memory
    handler = Handler()
    serve = await serving(listener, None, handler)
    before = asyncio.all_tasks()
    with gate.dial() as client:
        (task,) = asyncio.all_tasks() - before
        await cancelled(task)
        assert await wire_end(client) == "eof"
    await cancelled(serve)
    assert handler.streams == []
    assert listener.statistics().streams == 0


async def test_a_handler_that_swallows_its_cancellation(memory: Memory) -> None:
    """serve() waits for a handler that will not be cancelled, and its stream is closed."""
    listener, gate = memory
    go = asyncio.Event()
    caught: list[str] = []

    async def handler(stream: Stream) -> None:
        try:
            await stream.read()
        except asyncio.CancelledError:
            caught.append("once")
        await go.wait()

    serve = await serving(listener, None, handler)
    with gate.dial() as client:
        await until(lambda: listener.statistics().handlers)
        await asyncio.sleep(0)
        serve.cancel()
        await until(lambda: caught)
        # Meanwhile the listener is free for another consumer.
        with gate.dial():
            (await listener.accept()).close()
        assert not serve.done()
        go.set()
        assert isinstance(await ended(serve), asyncio.CancelledError)
        assert await wire_end(client) == "eof"


async def test_a_condition_that_swallows_its_cancellation(memory: Memory) -> None:
    """What a decision comes to after serve() was cancelled goes to the next consumer."""
    listener, gate = memory
    began = asyncio.Event()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            began.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return ACCEPT

    handler = Handler()
    serve = await serving(listener, condition, handler)
    with gate.dial():
        await result(began.wait())
        await cancelled(serve)
        assert listener.statistics().ready == 1
        (await listener.accept()).close()
    assert handler.streams == []


@pytest.mark.parametrize("kind", ["coroutine", "future"])
async def test_a_decision_cancelled_before_its_first_step(memory: Memory, kind: str) -> None:
    """What nobody came to await is closed or cancelled, and its caller is asked about again."""
    listener, gate = memory
    held = Held()
    futures: list[asyncio.Future[Any]] = []

    def condition(pending: PendingTransport) -> Any:
        pending.hold(partial(held.released.append, pending))
        if futures:
            return REJECT
        futures.append(asyncio.get_running_loop().create_future())
        return held(pending) if kind == "coroutine" else futures[0]

    serve = await serving(listener, condition)
    before = asyncio.all_tasks()
    with gate.dial() as client:
        (task,) = asyncio.all_tasks() - before
        await cancelled(task)
        gc.collect()  # a coroutine that was never awaited would warn
        assert await wire_end(client) == "eof"
    assert held.offered == []
    assert futures[0].cancelled() == (kind == "future")
    assert len(held.released) == listener.statistics().offers == 2
    await cancelled(serve)


async def test_cancelled_while_the_handlers_end(memory: Memory) -> None:
    """serve() that waits for its handlers after close() can still be cancelled."""
    listener, gate = memory
    handler = Handler()
    serve = await serving(listener, None, handler)
    with gate.dial():
        await handler.has(1)
        listener.close()
        await caught_up()
        assert not serve.done()
        await cancelled(serve)
    assert handler.cancelled == 1


async def test_serve_ends_when_closed_and_done(memory: Memory) -> None:
    """After close() serve() returns as soon as its handlers have, and not before."""
    listener, gate = memory
    handler = Handler()
    serve = await serving(listener, None, handler)
    with gate.dial():
        await handler.has(1)
        listener.close()
        await caught_up()
        assert not serve.done()
        handler.go.set()
        await result(serve)
    assert handler.cancelled == 0


async def test_aclose(memory: Memory) -> None:
    """aclose() ends the iterations and the decisions; their callers stay for the next."""
    listener, gate = memory
    held = Held()
    streams = listener.streams(held)
    iteration = await iterating(streams)
    with gate.dial():
        await held.asked(1)
        await streams.aclose()
        assert isinstance(await ended(iteration), StopAsyncIteration)
        assert [each.status for each in listener.pending] == [Status.QUEUED]
        with pytest.raises(StopAsyncIteration):
            await anext(streams)
        await streams.aclose()
        (await listener.accept()).close()


async def test_aclose_cancelled(memory: Memory) -> None:
    """A cancelled aclose() has ended the iterator all the same."""
    listener, gate = memory
    held = Held()
    streams = listener.streams(held)
    iteration = await iterating(streams)
    with gate.dial():
        await held.asked(1)
        closing = start(streams.aclose())
        await asyncio.sleep(0)
        await cancelled(closing)
        await ended(iteration)
        await until(lambda: not listener.statistics().deciding)
        (await listener.accept()).close()


# -- what goes wrong


def raising(error: BaseException) -> Callable[[PendingTransport], AnyVerdict]:
    """Return a plain condition that raises."""

    def condition(_pending: PendingTransport) -> AnyVerdict:
        raise error

    return condition


def raising_later(error: BaseException) -> Callable[[PendingTransport], Awaitable[AnyVerdict]]:
    """Return an async condition that raises."""

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        raise error

    return condition


def grouped(pending: PendingTransport) -> AnyVerdict:
    """Name a group that the listener does not have."""
    pending.group = "nobody's"
    return ACCEPT


def told_too_much(_pending: PendingTransport) -> AnyVerdict:
    """Reject with more callee data than there is room for."""
    return Reject(data=bytes(5000))


async def later(condition: Any, pending: PendingTransport) -> Any:
    """Do as a plain condition does, later."""
    await asyncio.sleep(0)
    return condition(pending)


WRONG: dict[str, Any] = {
    "raises": raising(MishapError()),
    "raises in a while": raising_later(MishapError()),
    "raises CancelledError": raising(asyncio.CancelledError()),
    "raises CancelledError in a while": raising_later(asyncio.CancelledError()),
    "raises ListenerClosedError": raising(ListenerClosedError("another")),
    "raises ListenerClosedError in a while": raising_later(ListenerClosedError("another")),
    "no verdict": lambda _: 7,
    "no verdict in a while": partial(later, lambda _: None),
    "no group": grouped,
    "no group in a while": partial(later, grouped),
    "too much": told_too_much,
    "too much in a while": partial(later, told_too_much),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_a_condition_that_goes_wrong(
    listener: Listener[Stream],
    dial: Dial,
    caplog: pytest.LogCaptureFixture,
    consumer: str,
    wrong: str,
) -> None:
    """Its caller is rejected, which is logged at ERROR once, and the next one is served."""
    released: list[int] = []
    asked: list[Any] = []

    def condition(pending: PendingTransport) -> Any:
        asked.append(pending.caller_id)
        pending.hold(partial(released.append, 1))
        return WRONG[wrong](pending) if len(asked) == 1 else ACCEPT

    handler = Handler()
    streams = listener.streams(condition)
    task = await (
        serving(listener, condition, handler) if consumer == "serve" else iterating(streams)
    )
    client = dial(listener)
    assert await wire_end(client) == "reset"
    dial(listener)
    if consumer == "serve":
        await handler.has(1)
        stream = handler.streams[0]
        await cancelled(task)
    else:
        stream = await result(task)
    stream.abort()

    assert len(asked) == len(released) == 2
    assert [each.levelno for each in caplog.records] == [logging.ERROR]
    assert repr(client.getsockname()) in caplog.text
    now = listener.statistics()
    assert (now.rejected, now.accepted, now.taken, now.pending) == (1, 1, 2, 0)


async def test_a_bad_verdict_costs_nobody_a_place() -> None:
    """With the deque full, a caller without a proper verdict makes nobody expire."""
    listener, gate = memory_listener(max_pending=1)
    async with listener:
        verdicts: list[Any] = [DEFER, 7, REJECT]
        serve = await serving(listener, lambda _: verdicts.pop(0))
        clients = [gate.dial() for _ in range(3)]
        now = listener.statistics()
        assert (now.deferred, now.rejected, now.expired) == (1, 2, 0)
        await cancelled(serve)
        for client in clients:
            client.close()


@pytest.mark.parametrize("error", [MishapError, asyncio.CancelledError])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_a_stream_factory_that_raises(
    caplog: pytest.LogCaptureFixture, consumer: str, error: type[BaseException], *, slow: bool
) -> None:
    """The connection has failed, which is logged at ERROR, and the next one is served."""
    made: list[Stream] = []

    def factory(stream: Stream) -> Any:
        made.append(stream)
        if len(made) == 1:
            raise error
        return ["a list", stream]

    listener, gate = memory_listener(stream_factory=factory, slow=slow)
    got: list[Any] = []

    async def handler(made: Any) -> None:
        got.append(made)

    async with listener:
        if consumer == "serve":
            task = await serving(listener, accept, handler)
        else:
            task = await iterating(listener.streams(accept))
        clients = [gate.dial(), gate.dial()]
        while slow and gate.admitting:
            gate.complete()
        await until(lambda: len(made) == 2)
        if consumer == "serve":
            await until(lambda: got)
            await cancelled(task)
        else:
            got.append(await result(task))
        got[0][1].abort()
        assert wire(clients[0]) == "eof"
        now = listener.statistics()
        assert (now.failed, now.accepted, now.streams, now.pending) == (1, 1, 0, 0)
        for client in clients:
            client.close()
    assert [each.levelno for each in caplog.records] == [logging.ERROR]


async def test_a_handler_that_raises(
    listener: Listener[Stream], dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """Its stream is aborted, which is logged at ERROR, and the others go on."""

    async def handler(stream: Stream) -> None:
        if await stream.read(1):
            raise MishapError

    serve = await serving(listener, None, handler)
    bad, good = dial(listener, data=b"x"), dial(listener)
    assert await wire_end(bad) == "reset"
    assert wire(good) == "open"
    assert [each.levelno for each in caplog.records] == [logging.ERROR]
    await cancelled(serve)


async def test_a_handler_whose_caller_resets(
    listener: Listener[Stream], dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """What a handler raises because its caller has reset it is logged at DEBUG: no fault of it."""
    caplog.set_level(logging.DEBUG, "condaccept")
    serve = await serving(listener)
    client = dial(listener)
    await until(lambda: listener.statistics().handlers)
    reset(client)
    await until(lambda: not listener.statistics().handlers)
    logged = [each for each in caplog.records if "handler" in each.getMessage()]
    assert [each.levelno for each in logged] == [logging.DEBUG]
    await cancelled(serve)


async def test_an_async_release(memory: Memory) -> None:
    """A release that somebody had to await is reported, and the others are made."""
    listener, gate = memory
    released: list[str] = []
    reported: list[dict[str, Any]] = []

    async def give_back() -> None:
        released.append("async")  # pragma: no cover - which is the mistake

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: released.append("plain"))
        pending.hold(give_back)
        return REJECT

    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    serve = await serving(listener, condition)
    with gate.dial() as client:
        assert await wire_end(client) == "eof"
    await cancelled(serve)
    loop.set_exception_handler(before)
    assert released == ["plain"]
    assert "nobody awaits" in str(reported[0]["exception"])


async def test_a_predicate_that_is_none(listener: Listener[Stream]) -> None:
    """reconsider() refuses what cannot be called, also while nobody is deferred."""
    wrong: Any = 5
    with pytest.raises(TypeError, match="predicate cannot be called: 5"):
        listener.reconsider(wrong)


async def test_a_handler_that_is_not_async(
    memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain handler is told so in the log, and its stream is aborted."""
    listener, gate = memory
    handled: Any = lambda stream: None  # noqa: E731, ARG005 - the mistake that is made
    serve = await serving(listener, None, handled)
    with gate.dial() as client:
        assert await wire_end(client) == "eof"
    assert "a handler is async" in caplog.text
    await cancelled(serve)


async def test_a_handler_that_takes_no_stream(
    memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """An async handler that cannot be called is told so in the log, and serving goes on."""
    listener, gate = memory

    async def no_argument() -> None:
        """Do nothing."""

    wrong: Any = no_argument
    serve = await serving(listener, None, wrong)
    for _ in range(2):
        with gate.dial() as client:
            assert await wire_end(client) == "eof"
    assert caplog.text.count("takes 0 positional arguments") == 2
    await cancelled(serve)


@pytest.mark.skipif(
    not hasattr(inspect, "markcoroutinefunction"), reason="Python 3.12 brought the mark"
)
async def test_a_handler_marked_as_async(memory: Memory) -> None:
    """A function that says it is async, and returns another awaitable, is called once."""
    listener, gate = memory
    called: list[Stream] = []

    def marked(stream: Stream) -> asyncio.Future[None]:
        called.append(stream)
        stream.write(b"hello")
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    inspect.markcoroutinefunction(marked)  # type: ignore[attr-defined, unused-ignore]
    serve = await serving(listener, None, marked)
    with gate.dial() as client:
        assert await wire_end(client) == b"hello"
    assert len(called) == 1
    await cancelled(serve)


async def test_callbacks_that_raise(memory: Memory) -> None:
    """A release, on_settled and on_outcome that raise are reported, and serving goes on."""
    listener, gate = memory
    loop = asyncio.get_running_loop()
    reported: list[Any] = []
    handler = Handler()

    def raises(*_: object) -> None:
        raise MishapError

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(raises)
        pending.on_settled(raises)
        return REJECT if len(reported) < 3 else ACCEPT

    serve = await serving(listener, condition, handler)
    listener.on_outcome(raises)
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    with gate.dial():
        await until(lambda: len(reported) == 3)
    with gate.dial():
        await handler.has(1)
        await until(lambda: len(reported) == 5)
        await cancelled(serve)
    assert {type(each) for each in reported} == {MishapError}
    assert len(reported) == 6


@pytest.mark.parametrize("verdict", [ACCEPT, REJECT, DEFER])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("consumer", ["streams", "waiting streams", "serve"])
async def test_a_condition_that_closes_the_listener(
    memory: Memory, consumer: str, verdict: AnyVerdict, *, asynchronous: bool
) -> None:
    """It keeps its verdict, but for DEFER, which is a reset; then the consumer ends."""
    listener, gate = memory

    def plain(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        return verdict

    condition = partial(later, plain) if asynchronous else plain
    handler = Handler()
    if consumer == "serve":
        task = await serving(listener, condition, handler)
        client = gate.dial()
        if verdict is ACCEPT:
            await handler.has(1)
            handler.go.set()
        await result(task)
    elif consumer == "streams":
        client = gate.dial()
        got = [stream async for stream in listener.streams(condition)]
    else:
        task = await iterating(listener.streams(condition))
        client = gate.dial()
        error = await ended(task)
        got = [task.result()] if error is None else []
    if consumer != "serve":
        assert len(got) == (verdict is ACCEPT)
        for stream in got:
            stream.close()
    assert await wire_end(client) == "eof"
    client.close()
    now = listener.statistics()
    ends = {ACCEPT: now.accepted, REJECT: now.rejected, DEFER: now.closed}
    assert ends[verdict] == now.taken == 1  # type: ignore[index]


async def test_a_handler_that_closes_the_listener(memory: Memory) -> None:
    """serve() ends when that handler has."""
    listener, gate = memory

    async def handler(_stream: Stream) -> None:
        listener.close()

    serve = await serving(listener, None, handler)
    with gate.dial():
        await result(serve)


async def test_a_release_that_closes_the_listener(memory: Memory) -> None:
    """A deferral whose release closes the listener ends serve(), and its caller is reset."""
    listener, gate = memory

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(listener.close)
        return DEFER

    serve = await serving(listener, condition)
    with gate.dial() as client:
        await result(serve)
        assert wire(client) == "eof"
    assert listener.statistics().closed == 1


@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_a_socket_shut_by_somebody_else(
    listener: Listener[Stream], caplog: pytest.LogCaptureFixture, consumer: str
) -> None:
    """Where nothing can be accepted any more, the consumer ends with the error."""
    if consumer == "serve":
        task = await serving(listener)
    else:
        task = await iterating(listener.streams())
    listener._gate.sockets[0].shutdown(2)
    error = await ended(task)
    assert isinstance(error, OSError)
    assert type(error).__name__ == "NotListeningError"
    assert len(caplog.records) == 1


# -- bounds


@pytest.mark.parametrize("on_full", [None, "expire_oldest", "wait"])
async def test_a_deque_full_of_deferred_ones(on_full: Any) -> None:
    """By default the oldest deferred one expires for a newcomer; "wait" takes nobody."""
    listener, gate = memory_listener(max_pending=2, on_full=on_full)
    async with listener:
        seen = outcomes(listener)
        serve = await serving(listener, defer)
        clients = [gate.dial(("192.0.2.1", n)) for n in range(4)]
        await caught_up()
        names = [each.caller_id[1] for each in listener.pending]
        if on_full == "wait":
            assert names == [0, 1]
            assert seen == []
            listener.pending[0].decide(REJECT)
            await until(lambda: listener.statistics().taken == 3)
        else:
            assert names == [2, 3]
            assert [each.caller_id[1] for each in seen] == [0, 1]
            assert "max_pending=2 is reached" in seen[0].reason
        await cancelled(serve)
        for client in clients:
            client.close()


async def test_full_of_decisions_expires_nobody() -> None:
    """With nobody deferred to make room, a full deque takes nobody."""
    listener, gate = memory_listener(max_pending=2)
    async with listener:
        held = Held()
        serve = await serving(listener, held)
        clients = [gate.dial() for _ in range(3)]
        await held.asked(2)
        await caught_up()
        assert listener.statistics().taken == 2
        held.verdicts[0].set_result(DEFER)
        # There is one now; the third caller's decision makes it expire.
        await held.asked(3)
        now = listener.statistics()
        assert (now.expired, now.deciding, now.pending) == (1, 2, 2)
        await cancelled(serve)
        for client in clients:
            client.close()


async def test_ready_ones_are_bounded() -> None:
    """Nothing is taken beyond max_deciding for an iteration, and nothing for a gone one."""
    listener, gate = memory_listener(max_deciding=3)
    async with listener:
        held = Held()
        iteration = await iterating(listener.streams(held))
        clients = [gate.dial() for _ in range(9)]
        await held.asked(3)
        for each in held.verdicts:
            each.set_result(ACCEPT)
        (await result(iteration)).close()
        await until(lambda: listener.statistics().ready == 2)
        await caught_up()
        assert listener.statistics().taken == 3
        (await listener.accept()).close()
        (await listener.accept()).close()
        for client in clients:
            client.close()


async def test_the_pump_gives_others_their_turn(memory: Memory) -> None:
    """A wake-up makes so many offers, then the loop's other callbacks run."""
    listener, gate = memory
    asked = 0

    def condition(_pending: PendingTransport) -> AnyVerdict:
        nonlocal asked
        asked += 1
        return REJECT

    clients = [gate.dial() for _ in range(3 * PER_WAKE_UP)]
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def look() -> None:
        seen.append(asked)
        if asked < len(clients):
            loop.call_soon(look)

    loop.call_soon(look)
    serve = await serving(listener, condition)
    await until(lambda: asked == len(clients))
    assert max(b - a for a, b in itertools.pairwise([*seen, asked])) <= PER_WAKE_UP
    await cancelled(serve)
    for client in clients:
        client.close()


async def test_an_iteration_that_never_waits_yields(memory: Memory) -> None:
    """Of iterations that complete at once, at most 64 do before the loop has its turn."""
    listener, gate = memory
    clients = [gate.dial() for _ in range(3 * IN_A_ROW)]
    loop = asyncio.get_running_loop()
    got = 0
    seen: list[int] = []

    def look() -> None:
        seen.append(got)
        if got < len(clients):
            loop.call_soon(look)

    look()
    streams = listener.streams()
    while got < len(clients):
        (await anext(streams)).close()
        got += 1
    assert max(b - a for a, b in itertools.pairwise([*seen, got])) <= IN_A_ROW
    for client in clients:
        client.close()


async def test_a_refused_iteration_yields(memory: Memory) -> None:
    """A retry loop over a consumer that is refused does not freeze the loop."""
    listener, _ = memory
    serve = await serving(listener)
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    for _ in range(2):
        with pytest.raises(AcceptInProgressError):
            await anext(listener.streams())
    assert turned.is_set()
    await cancelled(serve)


async def test_one_that_reconsiders_itself_starves_nobody(memory: Memory) -> None:
    """A condition that has its own connection asked about again does not hold others up."""
    listener, gate = memory
    handler = Handler()
    offers = 0

    def condition(pending: PendingTransport) -> AnyVerdict:
        nonlocal offers
        if pending.caller_id[1]:
            return ACCEPT
        offers += 1
        pending.reconsider()
        return DEFER

    serve = await serving(listener, condition, handler)
    with gate.dial(("192.0.2.1", 0)), gate.dial(("192.0.2.1", 1)):
        await handler.has(1)
        assert offers < 5
        await cancelled(serve)


# -- besides


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_context_variables(memory: Memory, consumer: str, *, asynchronous: bool) -> None:
    """Conditions see the caller's context; a handler also what its own condition has set."""
    listener, gate = memory
    seen: list[str] = []
    handled: list[str] = []

    def plain(pending: PendingTransport) -> AnyVerdict:
        seen.append(VAR.get())
        VAR.set(f"{pending.caller_id[1]}'s")
        return ACCEPT

    async def handler(_stream: Stream) -> None:
        handled.append(VAR.get())

    condition = partial(later, plain) if asynchronous else plain
    token = VAR.set("the caller's")
    streams = listener.streams(condition)
    task = await serving(listener, condition, handler) if consumer == "serve" else None
    VAR.reset(token)
    clients = [gate.dial(("192.0.2.1", n)) for n in range(2)]
    if task is None:
        for _ in clients:
            (await anext(streams)).close()
    else:
        await until(lambda: len(handled) == 2)
        assert sorted(handled) == ["0's", "1's"]
        await cancelled(task)
    assert seen == ["the caller's"] * 2
    assert VAR.get() == "nobody's"
    for client in clients:
        client.close()


def memory_listener_with_a_cycle() -> Listener[Stream]:
    """Return a listener that the collector finds when it is asked to, and not before."""
    listener, _ = memory_listener()
    listener.cycle = listener  # type: ignore[attr-defined]
    return listener


async def test_a_collected_listener_ends_the_iteration() -> None:
    """An iterator does not keep its listener, which is closed, and that ends it."""
    iteration = await iterating(memory_listener_with_a_cycle().streams())
    with pytest.warns(ResourceWarning, match="unclosed listener"):
        gc.collect()
    assert isinstance(await ended(iteration), StopAsyncIteration)


@pytest.mark.parametrize("consumer", ["streams", "serve"])
async def test_nothing_is_left(dial: Dial, consumer: str) -> None:
    """After close() no task, timer, reader or descriptor of a served listener is left."""
    loop: Any = asyncio.get_running_loop()

    def handles() -> Any:
        timers = [each for each in getattr(loop, "_scheduled", ()) if not each.cancelled()]
        readers = len(loop._selector.get_map()) if hasattr(loop, "_selector") else 0
        return descriptors(), len(timers), readers, asyncio.all_tasks()

    before = handles()
    listener = await listen("127.0.0.1", 0)
    held = Held()

    def condition(pending: PendingTransport) -> Any:
        return DEFER if len(listener.pending) == 1 else held(pending)

    if consumer == "serve":
        task = await serving(listener, condition)
    else:
        task = await iterating(listener.streams(condition))
    clients = [dial(listener), dial(listener)]
    await held.asked(1)
    listener.close()
    await listener.wait_closed()
    await ended(task)
    for client in clients:
        assert wire(client) == "reset"
        client.close()
    await asyncio.sleep(0)
    assert handles() == before
    assert len(held.released) == 1
    add_up(listener)


async def test_serve_over_unix(dial: Dial) -> None:
    """A Unix socket is served as a TCP one."""
    async with await listen(path=f"\0condaccept serving {id(dial)}") as listener:
        handler = Handler()
        serve = await serving(listener, Condition(REJECT, ACCEPT), handler)
        assert await wire_end(dial(listener)) == "eof"
        client = dial(listener)
        await handler.has(1)
        handler.go.set()
        assert await wire_end(client) == "eof"
        await cancelled(serve)


async def test_callers_that_reset_at_once(listener: Listener[Stream]) -> None:
    """A hundred callers that have reset are counted, however they are noticed."""
    iteration = await iterating(listener.streams(reject))
    for _ in range(100):
        reset(socket.create_connection(listener.sockname))
    await until(lambda: listener.statistics().taken == 100)
    await caught_up()
    add_up(listener)
    assert listener.statistics().pending == listener.statistics().accepted == 0
    await cancelled(iteration)


async def test_a_handler_that_hands_its_stream_over(listener: Listener[Stream], dial: Dial) -> None:
    """What goes on over the loop's transport outlives the handler."""
    writers: list[asyncio.StreamWriter] = []

    async def handler(stream: Stream) -> None:
        _, writer = await stream.into_streams()
        writers.append(writer)

    serve = await serving(listener, None, handler)
    client = dial(listener)
    await until(lambda: writers and not listener.statistics().handlers)
    writers[0].write(b"still here")
    assert await wire_end(client) == b"still here"
    writers[0].close()
    assert await wire_end(client) == "eof"
    await cancelled(serve)


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_condition_loses_nobody(
    new_loop: Callable[[], asyncio.AbstractEventLoop], error: type[BaseException]
) -> None:
    """Where an interrupt in a plain condition stops the loop, running it again goes on."""
    loop = new_loop()
    asked: list[Any] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        asked.append(pending.caller_id)
        if len(asked) == 1:
            raise error
        return REJECT

    async def begin() -> tuple[Any, Any, Any]:
        listener = await listen("127.0.0.1", 0)
        clients = [socket.create_connection(listener.sockname) for _ in range(3)]
        return listener, clients, start(listener.serve(keep, condition))

    async def end() -> None:
        await until(lambda: len(asked) == 3)
        await caught_up()
        listener.close()
        await ended(serve)

    try:
        listener, clients, serve = loop.run_until_complete(begin())
        with pytest.raises(error):
            loop.run_until_complete(asyncio.sleep(LIMIT))
        loop.run_until_complete(end())
        now = listener.statistics()
        assert (now.rejected, now.taken, now.pending) == (3, 3, 0)
        for client in clients:
            client.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


# -- eager tasks


@contextlib.contextmanager
def eager_tasks() -> Iterator[None]:
    """Have the loop begin each task at once."""
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Future[Any]:
        # Not asyncio.eager_task_factory: uvloop says so itself, which 3.13.0 does not take.
        options["eager_start"] = True
        return asyncio.Task(coro, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(None)


eager = pytest.mark.skipif(
    not hasattr(asyncio, "eager_task_factory"), reason="Python 3.12 brought eager tasks"
)


@eager
@pytest.mark.parametrize("verdict", [ACCEPT, REJECT, DEFER])
async def test_eager_conditions(listener: Listener[Stream], dial: Dial, verdict: Any) -> None:
    """An async condition that has its verdict at once decides once where tasks are eager."""
    seen = outcomes(listener)

    async def condition(pending: PendingTransport) -> AnyVerdict:
        return REJECT if pending.deferrals else verdict

    with eager_tasks():
        task = start(listener.serve(keep, condition))
        clients = [dial(listener) for _ in range(3)]
        await until(lambda: listener.statistics().offers == 3)
        listener.reconsider()
        for client in clients:
            client.close()
        await until(lambda: len(seen) == 3)
        add_up(listener)
        listener.close()
        await result(task)


@eager
async def test_eager_handler(listener: Listener[Stream], dial: Dial) -> None:
    """A handler's shutdown does not wait for its own stream where tasks are eager."""
    left: list[Any] = []

    async def handler(_stream: Stream) -> None:
        left.append(await listener.shutdown())

    with eager_tasks():
        task = start(listener.serve(handler))
        dial(listener)
        await result(task)
    assert not left[0]
