"""`condaccept._delivery`: async callbacks, failing ones, and the record of `Listener.watch()`."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import socket
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from condaccept import DEFER, Event, EventRecord, Listener, ListenerClosedError, Stream, listen
from condaccept._delivery import _AT_WORK
from tests.support import (
    Condition,
    Dial,
    accept,
    caught_up,
    queued,
    reject,
    reset,
    turns,
    until,
    wire,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Pair: TypeAlias = tuple[Stream, socket.socket]
Told: TypeAlias = list[tuple[Any, Event, OSError | None]]

ALL = Event.PENDING | Event.READ | Event.WRITE | Event.CLOSE | Event.OOB
ABOUT_STREAMS = Event.READ | Event.WRITE | Event.CLOSE


class Slow:
    """An async callback: notes its calls, and in each waits to be let go."""

    def __init__(self) -> None:
        self.told: Told = []
        self.ended: list[Event] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self._gates: list[asyncio.Future[None]] = []

    async def __call__(self, source: Any, event: Event, error: OSError | None) -> None:
        """Note the call and wait."""
        self.told.append((source, event, error))
        self.tasks.append(task_here())
        gate = asyncio.get_running_loop().create_future()
        self._gates.append(gate)
        try:
            await gate
        finally:
            self.ended.append(event)

    @property
    def running(self) -> int:
        """How many calls have not ended."""
        return len(self.told) - len(self.ended)

    async def idle(self) -> None:
        """Wait until every call has ended."""
        await until(lambda: not self.running)

    def let_go(self, error: BaseException | None = None) -> None:
        """End the call that has waited longest, with an error or without."""
        gate = self._gates.pop(0)
        if error is None:
            gate.set_result(None)
        else:
            gate.set_exception(error)


class Log:
    """A plain callback that keeps what it is told."""

    def __init__(self) -> None:
        self.told: Told = []

    def __call__(self, source: Any, event: Event, error: OSError | None) -> None:
        """Keep it."""
        self.told.append((source, event, error))

    async def count(self, n: int) -> None:
        """Wait until it was told *n* times."""
        await until(lambda: len(self.told) == n)

    @property
    def events(self) -> list[Event]:
        """The events alone, in order."""
        return [event for _, event, _ in self.told]


def task_here() -> asyncio.Task[Any]:
    """Return the task that runs."""
    task = asyncio.current_task()
    assert task is not None
    return task


def heed() -> list[dict[str, Any]]:
    """Return a list that the loop's exception handler fills from now on."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


async def grown(what: list[Any], n: int) -> None:
    """Wait until a list has *n* items."""
    await until(lambda: len(what) == n)


async def parked(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start *awaitable* and see it wait."""
    task = asyncio.ensure_future(awaitable)
    await turns()
    assert not task.done()
    return task


# -- async callbacks


async def test_an_async_callback_runs(pair: Pair) -> None:
    """An async callback runs in a task, and is told as a plain one is."""
    stream, client = pair
    slow = Slow()
    stream.on(Event.READ | Event.WRITE, slow)
    client.sendall(b"x")
    await until(lambda: len(slow.told) == 2)
    assert sorted(str(event) for _, event, _ in slow.told) == ["Event.READ", "Event.WRITE"]
    assert {(source, error) for source, _, error in slow.told} == {(stream, None)}
    assert len(set(slow.tasks)) == 2
    slow.let_go()
    slow.let_go()
    await slow.idle()


async def test_a_callback_is_async_by_its_result(pair: Pair) -> None:
    """What a callback returns decides: a plain function may return an awaitable of any kind."""
    stream, _ = pair
    slow = Slow()
    future = asyncio.get_running_loop().create_future()

    class Later:
        def __await__(self) -> Any:
            return future.__await__()

    stream.on(Event.WRITE, slow)
    stream.on(Event.WRITE, lambda *told: asyncio.ensure_future(slow(*told)))
    stream.on(Event.WRITE, lambda *_: Later())
    stream.on(Event.WRITE, lambda *_: future)
    stream.on(Event.WRITE, lambda *_: 5)
    await until(lambda: len(slow.told) == 2)
    await turns()
    assert len(stream._delivery._running) == 4
    future.set_result(None)
    slow.let_go()
    slow.let_go()
    await until(lambda: not stream._delivery._running)


async def test_one_run_at_a_time(pair: Pair) -> None:
    """During a run further occurrences are kept, as one, which runs when that has ended."""
    stream, client = pair
    slow = Slow()
    stream.on(Event.READ, slow)
    for n in range(3):
        client.sendall(b"x")
        await until(lambda: stream._signals and not stream._signals.armed(Event.READ))
        await caught_up()
        assert await stream.read(10) == b"x", n
    assert len(slow.told) == 1
    slow.let_go()
    await until(lambda: len(slow.told) == 2)
    slow.let_go()
    await slow.idle()
    await caught_up()
    assert len(slow.told) == 2
    client.sendall(b"x")
    await until(lambda: len(slow.told) == 3)
    slow.let_go()
    await slow.idle()


async def test_runs_of_other_events_sources_and_callbacks(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A run holds up neither another event, nor another stream, nor another subscription."""
    slow, other, log = Slow(), Slow(), Log()
    for callback in (slow, other, log):
        listener.on(Event.READ | Event.WRITE, callback)
    clients = [dial(listener, data=b"x") for _ in range(2)]
    streams = [await listener.accept() for _ in clients]
    await until(lambda: len(log.told) + len(slow.told) + len(other.told) == 12)
    expected = {(stream, event) for stream in streams for event in (Event.READ, Event.WRITE)}
    for each in (slow, other, log):
        assert {(source, event) for source, event, _ in each.told} == expected
    assert slow.running == other.running == 4
    for each in (slow, other):
        for _ in range(4):
            each.let_go()
        await each.idle()
    for stream in streams:
        stream.close()


async def test_a_kept_occurrence_of_a_stream_that_is_gone(pair: Pair) -> None:
    """What was kept is dropped when the stream is closed meanwhile."""
    stream, client = pair
    slow = Slow()
    stream.on(Event.READ, slow)
    client.sendall(b"x")
    await until(lambda: slow.told)
    assert await stream.read(1) == b"x"
    client.sendall(b"y")
    await until(lambda: stream._delivery._kept)
    stream.close()
    slow.let_go()
    await slow.idle()
    await caught_up()
    assert len(slow.told) == 1
    assert not stream._delivery._kept


async def test_cancelling_during_a_run(pair: Pair) -> None:
    """Cancelling a subscription lets its task go on, and drops what was kept for it."""
    stream, client = pair
    slow = Slow()
    subscription = stream.on(Event.READ, slow)
    client.sendall(b"x")
    await until(lambda: slow.told)
    assert await stream.read(1) == b"x"
    client.sendall(b"y")
    await until(lambda: stream._delivery._kept)
    subscription.cancel()
    await turns()
    assert slow.running == 1
    slow.let_go()
    await slow.idle()
    await caught_up()
    assert len(slow.told) == 1
    assert not stream._delivery._kept
    assert not stream._delivery._running


async def test_a_task_is_held(dial: Dial) -> None:
    """A callback's task is not collected as garbage, though nobody else knows what it awaits."""
    gates: list[weakref.ref[asyncio.Future[None]]] = []
    ended: list[str] = []

    async def waits(*_told: object) -> None:
        gate = asyncio.get_running_loop().create_future()
        gates.append(weakref.ref(gate))
        try:
            await gate
        finally:
            ended.append("woken" if gate.done() else "collected")

    listener = await listen("127.0.0.1", 0)
    dial(listener)
    stream = await listener.accept()
    stream.on(Event.WRITE, waits)
    await until(lambda: gates)
    listener.close()
    stream.close()
    del listener, stream
    gc.collect()
    gate = gates[0]()
    assert gate is not None
    gate.set_result(None)
    await until(lambda: ended)
    assert ended == ["woken"]


async def test_tasks_do_not_pile_up(pair: Pair) -> None:
    """Of a run that has ended nothing is kept."""
    stream, client = pair
    reads: list[bytes] = []

    async def reading(source: Stream, _event: Event, _error: OSError | None) -> None:
        reads.append(await source.read(1))

    stream.on(Event.READ, reading)
    for n in range(50):
        client.sendall(b"x")
        await grown(reads, n + 1)
    await until(lambda: not stream._delivery._running)
    assert not stream._delivery._kept
    assert stream._delivery not in _AT_WORK


async def test_read_is_told_again_to_who_subscribed_late(pair: Pair) -> None:
    """READ is armed by each read, also on a stream that had waited before anybody subscribed."""
    stream, client = pair
    task = await parked(stream.read(10))
    client.sendall(b"a")
    assert await task == b"a"
    log = Log()
    stream.on(Event.READ, log)
    for n in range(1, 4):
        client.sendall(b"b")
        await log.count(n)
        assert await stream.read(10) == b"b"


async def test_no_bookkeeping_without_subscribers(listener: Listener[Stream], dial: Dial) -> None:
    """A stream that nobody subscribed to has nothing but a reference to the delivery."""
    dial(listener)
    stream = await listener.accept()
    assert stream._signals is None
    assert stream._delivery is listener._delivery
    assert stream not in stream._watch.needed
    stream.close()


# -- callbacks that fail


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), asyncio.CancelledError()], ids=repr)
async def test_a_plain_callback_that_raises(pair: Pair, error: BaseException) -> None:
    """A callback that raises is reported by name; others and later events reach theirs."""
    stream, client = pair
    failures = heed()
    log = Log()
    calls: list[Event] = []

    def fails(_source: Stream, event: Event, _error: OSError | None) -> None:
        calls.append(event)
        raise error

    stream.on(Event.READ, fails)
    stream.on(Event.READ, log)
    for n in (1, 2):
        client.sendall(b"x")
        await log.count(n)
        assert await stream.read(1) == b"x"
    await turns()
    assert calls == [Event.READ] * 2
    assert [each["exception"] for each in failures] == [error] * 2
    assert failures[0]["message"] == f"the callback of {Event.READ} raised: {fails!r}"


async def test_an_async_callback_that_raises(pair: Pair) -> None:
    """So is one that raises in its task, and what was kept for it runs all the same."""
    stream, client = pair
    failures = heed()
    slow, log = Slow(), Log()
    stream.on(Event.READ, slow)
    stream.on(Event.READ, log)
    client.sendall(b"x")
    await until(lambda: slow.told)
    assert await stream.read(1) == b"x"
    client.sendall(b"y")
    await until(lambda: len(log.told) == 2)
    error = ZeroDivisionError("no")
    slow.let_go(error)
    await until(lambda: len(slow.told) == 2)
    assert [each["exception"] for each in failures] == [error]
    assert failures[0]["message"] == f"the callback of {Event.READ} raised: {slow!r}"
    slow.let_go()
    await slow.idle()
    assert await stream.read(1) == b"y"
    assert len(failures) == 1


async def test_a_failing_callback_of_the_listener(listener: Listener[Stream], dial: Dial) -> None:
    """A callback for PENDING that raises harms neither the listener nor the accepting."""
    failures = heed()

    def fails(*_told: object) -> None:
        raise ZeroDivisionError

    listener.on(Event.PENDING, fails)
    for n in (1, 2):
        dial(listener)
        await grown(failures, n)
        (await listener.accept()).close()


async def test_a_cancelled_callback_is_no_failure(pair: Pair) -> None:
    """A task that somebody cancels is not reported, and later events start another."""
    stream, client = pair
    slow = Slow()
    stream.on(Event.READ, slow)
    client.sendall(b"x")
    await until(lambda: slow.told)
    slow.tasks[0].cancel()
    await slow.idle()
    assert await stream.read(1) == b"x"
    client.sendall(b"y")
    await until(lambda: len(slow.told) == 2)
    del slow._gates[0]
    slow.let_go()
    await slow.idle()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_callback_may_end_the_program(kind: type[BaseException], *, is_async: bool) -> None:
    """KeyboardInterrupt and SystemExit go through the loop, as from any other callback."""

    def ends(*_told: object) -> None:
        raise kind

    async def ends_async(*_told: object) -> None:
        raise kind

    failures: list[dict[str, Any]] = []

    async def main() -> None:
        failures[:] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, each: failures.append(each))
        async with await listen("127.0.0.1", 0) as listener:
            listener.on(Event.PENDING, ends_async if is_async else ends)
            with socket.create_connection(listener.sockname):
                await asyncio.Event().wait()

    with pytest.raises(kind):
        asyncio.run(main())
    assert [each["message"] for each in failures if "callback of" in each["message"]] == []


# -- the listener's end


async def test_close_cancels_tasks_about_the_listener(dial: Dial) -> None:
    """Closing cancels a task for PENDING, and wait_closed() waits for its last step."""
    listener = await listen("127.0.0.1", 0)
    slow = Slow()
    listener.on(Event.PENDING, slow)
    dial(listener)
    await until(lambda: slow.told)
    assert slow.told == [(listener, Event.PENDING, None)]
    listener.close()
    assert slow.running == 1
    await listener.wait_closed()
    assert slow.running == 0
    assert slow.tasks[0].cancelled()
    await turns()
    assert not listener._delivery._running


async def test_wait_closed_waits_for_a_task_that_goes_on(dial: Dial) -> None:
    """A task that swallows its cancellation is waited for; wait_closed() may be cancelled."""
    listener = await listen("127.0.0.1", 0)
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    started = asyncio.Event()

    async def stubborn(*_told: object) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await gate

    listener.on(Event.PENDING, stubborn)
    dial(listener)
    await started.wait()
    listener.close()
    first = await parked(listener.wait_closed())
    second = await parked(listener.wait_closed())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not gate.cancelled()
    assert not second.done()
    gate.set_result(None)
    await second


async def test_the_task_that_closes_the_listener(dial: Dial) -> None:
    """A task for PENDING may close its listener and wait for that, and goes on."""
    listener = await listen("127.0.0.1", 0)
    other = Slow()
    done: list[str] = []

    async def closes(source: Listener[Stream], _event: Event, _error: OSError | None) -> None:
        await until(lambda: other.running)
        source.close()
        await source.wait_closed()
        done.append("closed")
        await asyncio.sleep(0)
        done.append("went on")

    listener.on(Event.PENDING, closes)
    listener.on(Event.PENDING, other)
    dial(listener)
    await until(lambda: len(done) == 2)
    assert other.running == 0
    await listener.wait_closed()


async def test_tasks_about_streams_go_on(dial: Dial) -> None:
    """Closing the listener leaves the tasks about its streams alone; abort() cancels them."""
    listener = await listen("127.0.0.1", 0)
    slow = Slow()
    listener.on(ABOUT_STREAMS, slow)
    dial(listener)
    stream = await listener.accept()
    await until(lambda: slow.told)
    listener.close()
    await listener.wait_closed()
    await turns()
    assert slow.running == 1
    listener.abort()
    await slow.idle()
    assert slow.tasks[0].cancelled()
    assert stream.is_closing()


async def test_nobody_is_called_after_abort(dial: Dial) -> None:
    """After abort() neither what was under way nor what was kept is told, of any source."""
    listener = await listen("127.0.0.1", 0)
    slow, log = Slow(), Log()
    listener.on(Event.CLOSE | Event.WRITE, slow)
    listener.on(Event.CLOSE, log)
    client = dial(listener)
    stream = await listener.accept()
    await until(lambda: slow.told)
    reset(client)
    await until(lambda: stream._ended)
    listener.abort()
    await slow.idle()
    await caught_up()
    assert [event for _, event, _ in slow.told] == [Event.WRITE]
    assert log.told == []


async def test_abort_drops_what_was_kept(dial: Dial) -> None:
    """What was kept during a run that abort() cancels is never told."""
    listener = await listen("127.0.0.1", 0)
    slow = Slow()
    dial(listener, data=b"x")
    stream = await listener.accept()
    subscription = stream.on(Event.CLOSE, slow)
    stream._deliver(subscription, Event.CLOSE, None)
    stream._deliver(subscription, Event.CLOSE, None)
    await until(lambda: slow.told)
    assert stream._delivery._kept
    listener.abort()
    assert not stream._delivery._kept
    await slow.idle()
    await caught_up()
    assert len(slow.told) == 1


async def test_a_task_that_aborts_the_listener(dial: Dial) -> None:
    """The task that aborts the listener is not cancelled by that."""
    listener = await listen("127.0.0.1", 0)
    done: list[str] = []

    async def aborts(_stream: Stream, _event: Event, _error: OSError | None) -> None:
        listener.abort()
        await asyncio.sleep(0)
        done.append("went on")

    listener.on(Event.WRITE, aborts)
    dial(listener)
    stream = await listener.accept()
    await until(lambda: done)
    assert stream.is_closing()


@pytest.mark.parametrize("is_async", [False, True])
async def test_no_pending_after_close(dial: Dial, *, is_async: bool) -> None:
    """A PENDING that is under way, or kept, when the listener is closed is not told."""
    listener = await listen("127.0.0.1", 0)
    slow, log = Slow(), Log()
    listener.on(Event.PENDING, slow if is_async else log)
    dial(listener)
    dial(listener)
    await until(lambda: slow.told or log.told)
    await queued(listener, 2)
    (await listener.accept()).close()  # arms it, and PENDING is due again
    listener.close()
    await listener.wait_closed()
    await caught_up()
    assert len(slow.told) + len(log.told) == 1


async def test_a_forgotten_listener_ends(dial: Dial) -> None:
    """Neither a subscription nor a record with PENDING in it keeps a forgotten listener alive."""
    listener = await listen("127.0.0.1", 0)
    slow = Slow()
    listener.on(Event.READ, slow)
    record = listener.watch(ALL)
    dial(listener)
    await until(lambda: record._entries)
    gone = weakref.ref(listener)
    known = [listener]
    del listener
    with pytest.warns(ResourceWarning, match="unclosed listener"):
        known.clear()
    await until(lambda: gone() is None)
    assert record.read() == []
    with pytest.raises(ListenerClosedError):
        await record.wait()


# -- subscribing late, and from inside


async def test_subscribing_inside_a_callback(pair: Pair) -> None:
    """Who subscribes inside a callback is told, soon, of what still is so."""
    stream, client = pair
    log = Log()

    def subscribes(source: Stream, _event: Event, _error: OSError | None) -> None:
        source.on(Event.READ | Event.WRITE, log)
        assert log.told == []

    stream.on(Event.READ, subscribes)
    client.sendall(b"x")
    await until(lambda: len(log.told) == 2)
    await turns()
    assert set(log.events) == {Event.READ, Event.WRITE}
    assert len(log.told) == 2


async def test_subscribing_to_pending_inside_a_callback(
    listener: Listener[Stream], dial: Dial
) -> None:
    """So with PENDING, as long as nobody has accepted."""
    log = Log()

    def subscribes(source: Listener[Stream], _event: Event, _error: OSError | None) -> None:
        source.on(Event.PENDING, log)
        assert log.told == []

    listener.on(Event.PENDING, subscribes)
    dial(listener)
    await until(lambda: log.told)
    await turns()
    assert log.told == [(listener, Event.PENDING, None)]


async def test_no_write_for_a_stream_that_failed(pair: Pair) -> None:
    """Who subscribes to WRITE after the connection failed is not told."""
    stream, client = pair
    reset(client)
    with pytest.raises(ConnectionResetError):
        await stream.read(1)
    log = Log()
    stream.on(Event.WRITE | Event.CLOSE, log)
    await until(lambda: log.told)
    await turns()
    assert log.events == [Event.CLOSE]


async def test_looking_for_read_keeps_the_error(pair: Pair) -> None:
    """The look on behalf of a late subscriber does not take the reset from the next read."""
    stream, client = pair
    first, late = Log(), Log()
    stream.on(Event.READ, first)
    client.sendall(b"x")
    await until(lambda: first.told)
    assert await stream.read(1) == b"x"
    assert stream._signals is not None
    stream._signals.fire(Event.READ)  # told, and the loop has not turned since the reset
    reset(client)
    stream.on(Event.READ, late)
    with pytest.raises(ConnectionResetError):
        await stream.read(1)
    await turns()
    assert late.told == []


@pytest.mark.parametrize("failed", [False, True])
async def test_late_subscriber_to_close_of_a_closed_stream(pair: Pair, *, failed: bool) -> None:
    """An end before this side closed is told to whoever subscribes afterwards; nothing else is."""
    stream, client = pair
    if failed:
        reset(client)
        with pytest.raises(ConnectionResetError):
            await stream.read(1)
    else:
        client.close()
        assert await stream.read(1) == b""
    stream.close()
    log, other = Log(), Log()
    stream.on(ABOUT_STREAMS, log)
    stream.on(Event.READ | Event.WRITE, other)
    await until(lambda: log.told)
    await turns()
    assert log.events == [Event.CLOSE]
    assert isinstance(log.told[0][2], ConnectionResetError if failed else type(None))
    assert other.told == []


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_ending_by_this_side_is_no_event(pair: Pair, how: str) -> None:
    """Closing or aborting a stream drops what was under way, and tells nothing of its own."""
    stream, client = pair
    log = Log()
    stream.on(ABOUT_STREAMS | Event.OOB, log)
    client.sendall(b"x")
    getattr(stream, how)()
    client.close()
    await caught_up()
    await turns()
    assert log.told == []


async def test_the_context_of_a_callback(listener: Listener[Stream], dial: Dial) -> None:
    """A callback runs in the context of who subscribed it, not of who caused the event."""
    name = contextvars.ContextVar("name", default="nobody")
    told: list[tuple[str, Event, str]] = []

    def under(whose: str) -> Callable[[Any, Event, OSError | None], object]:
        return lambda _, event, __: told.append((whose, event, name.get()))

    async def later(_source: Any, event: Event, _error: OSError | None) -> None:
        await asyncio.sleep(0)
        told.append(("task", event, name.get()))

    name.set("listener")
    listener.on(Event.READ | Event.CLOSE, under("listener"))
    client = dial(listener)
    name.set("acceptor")
    stream = await listener.accept()
    name.set("task")
    stream.on(Event.READ | Event.CLOSE, later)
    name.set("stream")
    stream.on(Event.WRITE | Event.READ | Event.CLOSE, under("stream"))
    name.set("reader")
    client.sendall(b"x")
    await grown(told, 4)
    assert await stream.read(1) == b"x"
    client.close()
    assert await stream.read(1) == b""
    await until(lambda: sum(event is Event.CLOSE for _, event, __ in told) == 3)
    assert all(whose == seen for whose, _, seen in told)
    assert {(whose, event) for whose, event, _ in told} == {
        *((each, Event.READ) for each in ("listener", "task", "stream")),
        *((each, Event.CLOSE) for each in ("listener", "task", "stream")),
        ("stream", Event.WRITE),
    }
    stream.close()


@pytest.mark.parametrize("late", [False, True])
async def test_no_events_while_this_side_is_closing(
    either: Listener[Stream], dial: Dial, *, late: bool
) -> None:
    """While a close sends what is unsent, nothing that the peer does is an event."""
    record = either.watch(ABOUT_STREAMS)
    client = dial(either)
    stream = await either.accept()
    await turns()
    record.read()
    log = Log()
    if not late:
        stream.on(Event.READ | Event.CLOSE, log)
    stream.write(bytes(8_000_000))
    stream.close()
    if late:
        stream.on(ABOUT_STREAMS, log)
    client.sendall(b"x")
    await caught_up()
    client.shutdown(socket.SHUT_WR)
    await caught_up()
    reset(client)
    with pytest.raises(BrokenPipeError):
        await stream.wait_closed()
    await turns()
    assert log.told == []
    assert record.read() == []


@pytest.mark.parametrize("how", ["on", "watch"])
async def test_a_cancelled_subscription_keeps_nothing(
    listener: Listener[Stream], dial: Dial, how: str
) -> None:
    """A stream that nobody has but a subscription ends when that is cancelled."""
    record = listener.watch(Event.READ)
    client = dial(listener)
    stream = await listener.accept()
    subscription = stream.on(Event.READ, Log())
    if how == "on":
        record.cancel()
    forgotten = weakref.ref(stream)
    del stream
    await caught_up()
    gc.collect()
    assert forgotten() is not None
    if how == "watch":
        subscription.cancel()
    gc.collect()
    assert forgotten() is not None
    last = record if how == "watch" else subscription
    with pytest.warns(ResourceWarning, match="unclosed"):
        last.cancel()
    assert forgotten() is None
    await until(lambda: wire(client) == "eof")


async def test_a_subscription_that_cannot_be_made(
    dial: Dial, exhaust: Callable[[], Callable[[], None]]
) -> None:
    """on() raises where no descriptor is free for the watch, and leaves the stream as it was."""
    async with await listen("127.0.0.1", 0) as listener:
        client = dial(listener)
        stream = await listener.accept()
    await listener.wait_closed()
    log = Log()
    give_back = exhaust()
    with pytest.raises(OSError, match="Too many open files"):
        stream.on(Event.READ, log)
    assert stream not in stream._watch.needed
    give_back()
    client.sendall(b"x")
    other = Log()
    stream.on(Event.READ, other)
    await other.count(1)
    assert await stream.read(1) == b"x"
    assert log.told == []
    stream.close()


@pytest.mark.parametrize("late", [False, True])
async def test_subscribers_keep_no_stream_that_has_ended(
    either: Listener[Stream], dial: Dial, *, late: bool
) -> None:
    """A stream that nobody has ends when its subscribers have been told of its end."""
    log = Log()
    client = dial(either)
    stream = await either.accept()
    if not late:
        stream.on(ABOUT_STREAMS, log)
    client.close()
    assert await stream.read() == b""
    if late:
        stream.on(ABOUT_STREAMS, log)
    await until(lambda: Event.CLOSE in log.events)
    log.told.clear()
    streams = [stream]
    forgotten = weakref.ref(stream)
    del stream
    await turns()
    with pytest.warns(ResourceWarning, match="unclosed"):
        streams.clear()
    assert forgotten() is None
    await until(lambda: not either.statistics().streams)


async def test_subscriptions_that_are_all_cancelled_hold_nothing(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A stream whose subscriptions were cancelled is not kept alive by them for ever."""
    subscription = listener.on(Event.READ, Log())
    client = dial(listener)
    stream = await listener.accept()
    assert stream in stream._watch.needed
    assert stream._signals is not None
    stream._signals.subscriptions[0].cancel()
    subscription.cancel()
    client.sendall(b"x")
    await until(lambda: stream not in stream._watch.needed)
    stream.close()


# -- the record


async def test_a_record(either: Listener[Stream], dial: Dial) -> None:
    """A record has the events of listener and streams, in order, each once, until it is read."""
    record = either.watch(ABOUT_STREAMS | Event.PENDING)
    client = dial(either)
    assert await record.wait() == [(either, Event.PENDING, None)]
    assert record.read() == []
    stream = await either.accept()
    assert record.read() == [(stream, Event.WRITE, None)]
    client.sendall(b"x")
    assert await record.wait() == [(stream, Event.READ, None)]
    assert await stream.read(1) == b"x"
    reset(client)
    told = await record.wait()
    while len(told) < 2:
        told += await record.wait()
    assert sorted(str(event) for _, event, _ in told) == ["Event.CLOSE", "Event.READ"]
    assert {type(error) for _, _, error in told} == {type(None), ConnectionResetError}
    stream.close()


async def test_a_record_is_one_for_all_streams(listener: Listener[Stream], dial: Dial) -> None:
    """All streams accepted after watch() report into it; those accepted before do not."""
    dial(listener, data=b"x")
    before = await listener.accept()
    record = listener.watch(Event.WRITE | Event.READ)
    for _ in range(2):
        dial(listener, data=b"x")
    streams = [await listener.accept() for _ in range(2)]
    await until(lambda: len(record._entries) == 4)
    told = record.read()
    assert [(s, e) for s, e, _ in told if e is Event.WRITE] == [(s, Event.WRITE) for s in streams]
    assert {s for s, e, _ in told if e is Event.READ} == {*streams}
    for stream in (before, *streams):
        stream.close()


async def test_a_record_is_bounded(either: Listener[Stream], dial: Dial) -> None:
    """An event that comes again before it is read keeps its one place."""
    record = either.watch(Event.WRITE | Event.READ)
    client = dial(either)
    stream = await either.accept()
    others: list[Stream] = []
    for n in range(3):
        client.sendall(b"x")
        await until(lambda: stream._signals and not stream._signals.armed(Event.READ))
        assert await stream.read(1) == b"x", n
        if not others:
            dial(either)
            others.append(await either.accept())
    first, second, third = record.read()
    assert first == (stream, Event.WRITE, None)
    assert second == (stream, Event.READ, None)
    assert third == (others[0], Event.WRITE, None)
    stream.close()
    others[0].close()


async def test_records_and_callbacks_add_up(listener: Listener[Stream], dial: Dial) -> None:
    """Each record, and each callback, has every event for itself."""
    records = [listener.watch(Event.PENDING) for _ in range(2)]
    log = Log()
    listener.on(Event.PENDING, log)
    dial(listener)
    for record in records:
        assert await record.wait() == [(listener, Event.PENDING, None)]
    await until(lambda: log.told)
    assert log.told == [(listener, Event.PENDING, None)]


async def test_a_late_record(listener: Listener[Stream], dial: Dial) -> None:
    """What is so already is recorded at once, whether or not others were told."""
    dial(listener)
    await queued(listener, 1)
    first = listener.watch(ALL)
    assert first.read() == [(listener, Event.PENDING, None)]
    late = listener.watch(Event.PENDING | Event.READ)
    assert late.read() == [(listener, Event.PENDING, None)]
    assert first.read() == []
    assert listener.watch(Event.READ).read() == []


async def test_a_stream_that_is_gone(listener: Listener[Stream], dial: Dial) -> None:
    """Of a stream that is closed by the time of reading, only CLOSE is reported."""
    record = listener.watch(ABOUT_STREAMS)
    client, other = dial(listener, data=b"x"), dial(listener)
    ended, closed = await listener.accept(), await listener.accept()
    assert await ended.read(1) == b"x"
    client.close()
    await until(lambda: (ended, Event.CLOSE) in record._entries)
    ended.close()
    closed.close()
    other.close()
    assert record.read() == [(ended, Event.CLOSE, None)]


async def test_waiting_past_what_is_gone(listener: Listener[Stream], dial: Dial) -> None:
    """wait() goes on waiting when all that was recorded is about streams that are gone."""
    record = listener.watch(Event.WRITE | Event.PENDING)
    dial(listener)
    assert await record.wait() == [(listener, Event.PENDING, None)]
    task = await parked(record.wait())
    (await listener.accept()).close()
    await turns()
    assert not task.done()
    dial(listener)
    assert await task == [(listener, Event.PENDING, None)]


async def test_cancelling_wait(listener: Listener[Stream], dial: Dial) -> None:
    """A wait() that is cancelled, even after it was woken, loses nothing."""
    record = listener.watch(Event.PENDING)
    task = await parked(record.wait())
    dial(listener)
    await until(lambda: record._waiter is not None and record._waiter.done())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await record.wait() == [(listener, Event.PENDING, None)]
    task = await parked(record.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = await parked(record.wait())
    (await listener.accept()).close()
    dial(listener)
    assert await task == [(listener, Event.PENDING, None)]


async def test_two_waits(listener: Listener[Stream], dial: Dial) -> None:
    """A second wait() is refused, after a turn of the loop; the first goes on."""
    record = listener.watch(Event.PENDING)
    task = await parked(record.wait())
    ticks: list[int] = []
    asyncio.get_running_loop().call_soon(ticks.append, 1)
    with pytest.raises(RuntimeError, match="another task waits"):
        await record.wait()
    assert ticks == [1]
    dial(listener)
    assert await task == [(listener, Event.PENDING, None)]


async def test_wait_yields(listener: Listener[Stream], dial: Dial) -> None:
    """However often wait() finds something at once, others have their turn."""
    record = listener.watch(Event.WRITE)
    dial(listener)
    stream = await listener.accept()
    ticks: list[int] = []
    asyncio.get_running_loop().call_soon(ticks.append, 1)
    calls = 0
    while not ticks:
        record._note(stream, Event.WRITE, None)
        assert await record.wait() == [(stream, Event.WRITE, None)]
        calls += 1
    assert calls == 33
    stream.close()


async def test_cancelling_a_record(listener: Listener[Stream], dial: Dial) -> None:
    """cancel() ends it for the listener and all streams, and wakes who waits, with nothing."""
    record = listener.watch(ALL)
    client = dial(listener)
    await record.wait()
    stream = await listener.accept()
    assert len(record._entries) == 1
    record.cancel()
    assert record.read() == []
    client.sendall(b"x")
    dial(listener)
    await queued(listener, 1)
    await caught_up()
    assert record.read() == []
    assert await record.wait() == []
    assert not stream._signals or not stream._signals.heard()

    second = listener.watch(Event.READ)
    task = await parked(second.wait())
    second.cancel()
    second.cancel()
    assert await task == []
    stream.close()


async def test_waiting_for_a_cancelled_record_yields(listener: Listener[Stream]) -> None:
    """A loop over a cancelled record does not freeze the service."""
    record = listener.watch(Event.READ)
    record.cancel()
    ticks: list[int] = []
    asyncio.get_running_loop().call_soon(ticks.append, 1)
    calls = 0
    while not ticks:
        assert await record.wait() == []
        calls += 1
    assert calls == 33


async def test_cancelled_records_do_not_pile_up(listener: Listener[Stream]) -> None:
    """Watching and cancelling for ever takes no room."""
    for _ in range(50):
        listener.watch(ALL).cancel()
    assert len(listener._delivery._records) == 1
    assert len(listener._accepting._signals.subscriptions) == 1


async def test_the_end_of_a_record(dial: Dial) -> None:
    """With the listener closed and its last connection gone, a waiting call is told so."""
    listener = await listen("127.0.0.1", 0)
    record = listener.watch(Event.READ | Event.CLOSE)
    clients = [dial(listener) for _ in range(2)]
    streams = [await listener.accept() for _ in clients]
    task = await parked(record.wait())
    streams[0].close()
    listener.close()
    await turns()
    assert not task.done()
    clients[1].close()
    assert (streams[1], Event.CLOSE, None) in [*await task, *record.read()]
    await until(lambda: not record.read())
    task = await parked(record.wait())
    streams[1].close()
    with pytest.raises(ListenerClosedError):
        await task
    ticks: list[int] = []
    asyncio.get_running_loop().call_soon(ticks.append, 1)
    with pytest.raises(ListenerClosedError, match="the listener is closed"):
        await record.wait()
    assert ticks == [1]


async def test_what_is_recorded_comes_before_the_end(dial: Dial) -> None:
    """With all closed, what was recorded is read first."""
    listener = await listen("127.0.0.1", 0)
    record = listener.watch(Event.CLOSE)
    client = dial(listener)
    stream = await listener.accept()
    client.close()
    await until(lambda: record._entries)
    stream.close()
    listener.close()
    assert await record.wait() == [(stream, Event.CLOSE, None)]
    with pytest.raises(ListenerClosedError):
        await record.wait()


async def test_the_end_of_a_record_of_pending(dial: Dial) -> None:
    """A record of PENDING alone ends with the listener, whatever connections are open."""
    listener = await listen("127.0.0.1", 0)
    record, other = listener.watch(Event.PENDING), listener.watch(ALL)
    dial(listener)
    stream = await listener.accept()
    record.read()
    other.read()
    task, waits = await parked(record.wait()), await parked(other.wait())
    dial(listener)
    await until(lambda: record._entries)
    await task
    await waits
    task, waits = await parked(record.wait()), await parked(other.wait())
    listener.close()
    with pytest.raises(ListenerClosedError):
        await task
    await turns()
    assert not waits.done()
    stream.close()
    with pytest.raises(ListenerClosedError):
        await waits


async def test_a_pending_of_before_the_close(dial: Dial) -> None:
    """PENDING that was recorded is reported no more once the listener is closed."""
    listener = await listen("127.0.0.1", 0)
    record = listener.watch(ALL)
    dial(listener)
    await until(lambda: record._entries)
    listener.close()
    assert record.read() == []
    with pytest.raises(ListenerClosedError):
        await record.wait()


@pytest.mark.parametrize("accepts", [False, True])
async def test_a_record_and_the_condition_that_closes(dial: Dial, *, accepts: bool) -> None:
    """A condition that closes its listener may still accept: the record waits for its verdict."""
    listener = await listen("127.0.0.1", 0)
    record = listener.watch(Event.WRITE)
    task = await parked(record.wait())

    def closes(pending: Any) -> Any:
        listener.close()
        return accept(pending) if accepts else reject(pending)

    dial(listener)
    if accepts:
        stream = await listener.accept(closes)
        assert await task == [(stream, Event.WRITE, None)]
        task = await parked(record.wait())
        stream.close()
    else:
        with pytest.raises(ConnectionRefusedError):
            await listener.accept(closes)
    with pytest.raises(ListenerClosedError):
        await task


async def test_a_record_and_an_async_condition_that_closes(dial: Dial) -> None:
    """So with one that is awaited."""
    listener = await listen("127.0.0.1", 0)
    record = listener.watch(Event.WRITE)
    task = await parked(record.wait())

    async def closes(pending: Any) -> Any:
        listener.close()
        await turns()
        assert not task.done()
        return reject(pending)

    dial(listener)
    with pytest.raises(ConnectionRefusedError):
        await listener.accept(closes)
    with pytest.raises(ListenerClosedError):
        await task


async def test_events_that_are_none_cannot_be_watched(listener: Listener[Stream]) -> None:
    """watch() refuses what is no event, and records nothing."""
    for bad in (0, None, "READ", Event(0)):
        with pytest.raises(TypeError, match="events are one or more of Event"):
            listener.watch(bad)  # type: ignore[arg-type]
    assert listener._delivery._records == []
    assert listener._accepting._signals.subscriptions == []


async def test_a_record_shows_itself(listener: Listener[Stream], dial: Dial) -> None:
    """The repr names events, what is recorded, and says if it was cancelled."""
    record = listener.watch(Event.PENDING)
    assert isinstance(record, EventRecord)
    dial(listener)
    await until(lambda: record._entries)
    assert repr(record) == f"<EventRecord {Event.PENDING!r} recorded=1>"
    record.cancel()
    assert repr(record) == f"<EventRecord {Event.PENDING!r} recorded=0 cancelled>"


async def test_a_deferral_is_not_recorded(listener: Listener[Stream], dial: Dial) -> None:
    """No event of an undecided connection is recorded, and a deferral arms nothing."""
    record = listener.watch(ALL)
    client = dial(listener, data=b"x")
    assert await record.wait() == [(listener, Event.PENDING, None)]
    with pytest.raises(BlockingIOError):
        await listener.accept(Condition(DEFER))
    client.sendall(b"y")
    client.shutdown(socket.SHUT_WR)
    await until(lambda: listener.pending[0].peer_closed)
    await caught_up()
    assert record.read() == []


def test_a_record_after_its_loop() -> None:
    """A record whose loop is closed can still be read and cancelled."""

    async def main() -> tuple[Listener[Stream], Stream, EventRecord, socket.socket]:
        listener = await listen("127.0.0.1", 0)
        record = listener.watch(Event.WRITE)
        listener.on(Event.WRITE | Event.CLOSE, Slow())
        client = socket.create_connection(listener.sockname)
        return listener, await listener.accept(), record, client

    listener, stream, record, client = asyncio.run(main())
    assert record.read() == [(stream, Event.WRITE, None)]
    reset(client)
    with pytest.raises(ConnectionError):
        stream.write(b"x")  # fails, which is an event
    record.cancel()
    listener.abort()


def test_a_task_after_its_loop(dial: Dial) -> None:
    """A listener whose loop was closed in the middle of a callback's task can be aborted."""
    loop = asyncio.new_event_loop()
    slow = Slow()

    async def main() -> Listener[Stream]:
        listener = await listen("127.0.0.1", 0)
        listener.on(Event.PENDING, slow)
        dial(listener)
        await until(lambda: slow.told)
        return listener

    listener = loop.run_until_complete(main())
    loop.close()
    listener.abort()
    assert slow.running == 1
    _AT_WORK.discard(listener._delivery)
    slow.tasks[0]._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_a_listener_that_is_collected(dial: Dial) -> None:
    """Between a listener's collection as garbage and its close nobody is told of it."""
    listener = await listen("127.0.0.1", 0)
    log = Log()
    listener.on(Event.PENDING, log)
    record = listener.watch(Event.PENDING)
    accepting = listener._accepting
    dial(listener)
    await queued(listener, 1)
    cycle: list[Any] = [listener]
    cycle.append(cycle)
    del listener, cycle
    with pytest.warns(ResourceWarning, match="unclosed listener"):
        gc.collect()
    accepting.became_due(None)
    assert record.read() == []
    await until(lambda: accepting.deciding.closed)
    await turns()
    assert log.told == []
