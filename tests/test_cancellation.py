"""Cancelling, closing and bounding calls of `accept()`: nobody is lost or overtaken."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptError,
    AcceptInProgressError,
    AcceptInterruptedError,
    AnyVerdict,
    ConnectionDeferredError,
    ConnectionRejectedError,
    InvalidVerdictError,
    Listener,
    ListenerClosedError,
    PendingResetError,
    PendingTransport,
    Status,
    Stream,
    listen,
)
from condaccept.testing import MemoryGate, memory_listener
from tests.support import (
    LIMIT,
    Dial,
    accept,
    caught_up,
    defer,
    queued,
    reject,
    reset,
    until,
    wire,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

AWAITS = 5
CANCELLATIONS = 300
IN_A_ROW = 64

Memory = tuple[Listener[Stream], MemoryGate]


class Held:
    """An async condition that says its verdicts when the test says so."""

    def __init__(self) -> None:
        self.offered: list[PendingTransport] = []
        self.released: list[PendingTransport] = []
        self.verdicts: list[asyncio.Future[Any]] = []

    async def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Hold something, and wait for the verdict of this offer."""
        pending.hold(partial(self.released.append, pending))
        verdict: asyncio.Future[AnyVerdict] = asyncio.get_running_loop().create_future()
        self.offered.append(pending)
        self.verdicts.append(verdict)
        return await verdict

    async def asked(self, n: int) -> None:
        """Wait until *n* offers have been made."""
        await until(lambda: len(self.offered) == n)


async def ended(task: asyncio.Task[Any]) -> BaseException | None:
    """Wait for a task; return what it raised, if it did."""
    await asyncio.wait([task], timeout=LIMIT)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def result(task: asyncio.Task[Any]) -> Any:
    """Wait for a task; return its result."""
    async with asyncio.timeout(LIMIT):
        return await task


def start(*coroutines: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Start a task for each."""
    return [asyncio.ensure_future(each) for each in coroutines]


async def waiting(listener: Listener[Stream], n: int, condition: Any = None) -> Any:
    """Start *n* tasks that wait in accept()."""
    tasks = start(*(listener.accept(condition) for _ in range(n)))
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


@pytest.fixture
async def memory() -> AsyncIterator[Memory]:
    """A listener without a network: its gate tells of a caller inside `dial()`."""
    listener, gate = memory_listener()
    async with listener:
        yield listener, gate


# -- cancelled while nobody is there


@pytest.mark.slow
@pytest.mark.parametrize("waiters", [1, 3])
async def test_random_cancellations_lose_nobody(
    listener: Listener[Stream], dial: Dial, waiters: int
) -> None:
    """However accept() is cancelled while callers come, all are served, in order."""
    rng = random.Random(waiters)  # noqa: S311 - a seeded sequence, no secret
    clients: list[Any] = []
    served: list[Any] = []
    calls: list[asyncio.Task[None]] = []
    cancelled: list[asyncio.Task[None]] = []

    async def serve() -> None:
        stream = await listener.accept(accept)
        served.append(stream.caller_id)
        stream.close()

    def refill() -> Any:
        calls[:] = [each for each in calls if not each.done()]
        calls.extend(start(*(serve() for _ in range(waiters - len(calls)))))

    async def turns() -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)

    def come() -> None:
        # Not so many that no call ever waits.
        if rng.random() < 0.5 and len(clients) - len(served) < waiters:
            clients.append(dial(listener).getsockname())

    while len(cancelled) < CANCELLATIONS:
        refill()
        await turns()
        come()
        await turns()
        victim = rng.choice(calls)
        if victim.cancel():
            cancelled.append(victim)
        come()

    await until(lambda: refill() or len(served) == len(clients))
    for each in calls:
        each.cancel()
    ends = [await ended(each) for each in [*cancelled, *calls]]
    assert {type(end) for end in ends} <= {asyncio.CancelledError, type(None)}
    assert served == clients
    assert len(clients) > CANCELLATIONS // 4
    statistics = listener.statistics()
    assert statistics.taken == statistics.offers == statistics.accepted == len(clients)
    assert statistics.pending == statistics.deciding == statistics.streams == 0


async def test_woken_then_cancelled(memory: Memory) -> None:
    """A call cancelled after its wake-up wakes the next, which gets the caller."""
    listener, gate = memory
    first, second = await waiting(listener, 2)
    with gate.dial():
        first.cancel()

        assert isinstance(await ended(first), asyncio.CancelledError)
        (await result(second)).close()
    assert listener.statistics().accepted == 1


async def test_cancelled_then_woken(memory: Memory) -> None:
    """A caller who comes while a waiting call is being cancelled goes to the next call."""
    listener, gate = memory
    first, second = await waiting(listener, 2)
    with gate.dial():
        first.cancel()
    with gate.dial():
        assert isinstance(await ended(first), asyncio.CancelledError)
        (await result(second)).close()
        (await listener.accept()).close()
    assert listener.statistics().accepted == 2


async def test_arrival_while_cancelled(memory: Memory) -> None:
    """A call whose caller comes in the turn of its cancellation is cancelled, no more."""
    listener, gate = memory
    first, second = await waiting(listener, 2)
    first.cancel()
    with gate.dial():
        assert isinstance(await ended(first), asyncio.CancelledError)
        (await result(second)).close()
    assert listener.statistics().accepted == 1


async def test_last_waiter_cancelled_when_woken(memory: Memory) -> None:
    """If the only call is cancelled after its wake-up, the next call gets the caller."""
    listener, gate = memory
    (only,) = await waiting(listener, 1)
    with gate.dial():
        only.cancel()
        assert isinstance(await ended(only), asyncio.CancelledError)
        assert listener.statistics().taken == 0

        (await listener.accept()).close()
    assert listener.statistics().accepted == 1


@pytest.mark.parametrize("before", [True, False])
async def test_wait_pending_cancelled_when_woken(memory: Memory, before: bool) -> None:  # noqa: FBT001 - a parameter
    """A caller who comes in the turn in which wait_pending() is cancelled is not lost."""
    listener, gate = memory
    watcher, other = start(listener.wait_pending(), listener.wait_pending())
    await asyncio.sleep(0)
    if before:
        watcher.cancel()
    with gate.dial():
        watcher.cancel()

        assert isinstance(await ended(watcher), asyncio.CancelledError)
        await result(other)
        (await listener.accept()).close()
    assert listener.statistics().accepted == 1


@pytest.mark.parametrize("end", [Listener.cancel_accept, Listener.close])
async def test_cancelled_before_all_waits_end(
    memory: Memory, end: Callable[[Listener[Stream]], object]
) -> None:
    """A call cancelled right before cancel_accept() or close() ends as cancelled."""
    listener, _ = memory
    accepting, watching = start(listener.accept(), listener.wait_pending())
    await asyncio.sleep(0)
    accepting.cancel()
    watching.cancel()
    count = end(listener)

    assert isinstance(await ended(accepting), asyncio.CancelledError)
    assert isinstance(await ended(watching), asyncio.CancelledError)
    assert not count


async def test_cancelled_in_its_turn(memory: Memory) -> None:
    """A call cancelled while it yields before it looks takes nobody."""
    listener, gate = memory
    for _ in range(IN_A_ROW):
        gate.dial().close()
        (await listener.accept()).close()
    with gate.dial():
        (task,) = start(listener.accept())
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()

        assert isinstance(await ended(task), asyncio.CancelledError)
        assert listener.statistics().taken == IN_A_ROW
        (await listener.accept()).close()


async def test_timeout_while_waiting(listener: Listener[Stream], dial: Dial) -> None:
    """`asyncio.timeout` around a waiting accept() ends it and nothing else."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await listener.accept()

    client = dial(listener)
    stream = await listener.accept()
    assert stream.caller_id == client.getsockname()
    stream.close()


# -- interrupted by cancel_accept


async def test_cancel_accept(listener: Listener[Stream], dial: Dial) -> None:
    """cancel_accept() ends all waits, tells how many, and touches no connection."""
    tasks = await waiting(listener, 3)
    watchers = start(listener.wait_pending(), listener.wait_pending())
    await asyncio.sleep(0)

    assert listener.cancel_accept() == 5
    for task in (*tasks, *watchers):
        error = await ended(task)
        assert isinstance(error, AcceptInterruptedError)
        assert error.caller_id is None
    assert listener.cancel_accept() == 0

    client = dial(listener)
    stream = await listener.accept()
    assert stream.caller_id == client.getsockname()
    stream.close()


async def test_cancel_accept_spares_who_was_woken(memory: Memory) -> None:
    """A call that was woken for a caller goes on; only the others are interrupted."""
    listener, gate = memory
    tasks = await waiting(listener, 3)
    with gate.dial():
        assert listener.cancel_accept() == 2
        errors = [await ended(task) for task in tasks]

    assert errors[0] is None
    assert all(isinstance(error, AcceptInterruptedError) for error in errors[1:])
    tasks[0].result().close()
    assert listener.statistics().accepted == 1


async def test_cancel_accept_spares_decisions(listener: Listener[Stream], dial: Dial) -> None:
    """A call whose condition is being awaited is not interrupted."""
    dial(listener)
    held = Held()
    (deciding,) = start(listener.accept(held))
    await held.asked(1)
    (idle,) = start(listener.accept(held))
    await asyncio.sleep(0)

    assert listener.cancel_accept() == 1
    assert isinstance(await ended(idle), AcceptInterruptedError)
    held.verdicts[0].set_result(ACCEPT)
    (await result(deciding)).close()


async def test_cancel_accept_then_cancelled(memory: Memory) -> None:
    """A call that is cancelled after cancel_accept() counted it ends as cancelled."""
    listener, _ = memory
    (task,) = await waiting(listener, 1)
    assert listener.cancel_accept() == 1
    task.cancel()
    assert isinstance(await ended(task), asyncio.CancelledError)


# -- cancelled while a condition decides


@pytest.mark.parametrize("deferred", [False, True], ids=["queued", "deferred"])
@pytest.mark.parametrize("at", range(AWAITS))
async def test_cancelled_at_every_await(
    listener: Listener[Stream],
    dial: Dial,
    at: int,
    deferred: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Cancelled at any await of its condition, the connection keeps its place."""
    clients = [dial(listener), dial(listener)]
    if deferred:
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(defer)
    reached = 0
    held: list[int] = []
    released: list[int] = []

    async def condition(pending: PendingTransport) -> AnyVerdict:
        nonlocal reached
        for step in range(AWAITS):
            pending.hold(partial(released.append, step))
            held.append(step)
            reached += 1
            await asyncio.sleep(0)
        return ACCEPT

    (task,) = start(listener.accept(condition))
    await until(lambda: reached == at + 1)
    assert listener.statistics().deciding == 1
    task.cancel()

    assert isinstance(await ended(task), asyncio.CancelledError)
    assert released == held[::-1]
    (pending,) = listener.pending
    assert pending.caller_id == clients[0].getsockname()
    assert pending.status is (Status.DEFERRED if deferred else Status.QUEUED)
    assert (listener.statistics().deciding, listener.statistics().taken) == (0, 1)
    assert wire(clients[0]) == "open"

    held.clear()
    released.clear()
    for client in clients:
        stream = await listener.accept(condition)
        assert stream.caller_id == client.getsockname()
        assert released == []
        stream.close()
        assert released == list(range(AWAITS))[::-1]
        released.clear()
    assert listener.statistics().offers == 3 + deferred
    assert listener.statistics().accepted == 2


@pytest.mark.parametrize("verdict_first", [True, False])
async def test_cancelled_with_the_verdict(
    listener: Listener[Stream],
    dial: Dial,
    verdict_first: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Cancelled in the turn of the verdict, the call ends as cancelled and undecided."""
    client = dial(listener)
    held = Held()
    (task,) = start(listener.accept(held))
    await held.asked(1)
    if verdict_first:
        held.verdicts[0].set_result(REJECT)
        task.cancel()
    else:
        task.cancel()
        assert held.verdicts[0].cancelled()

    assert isinstance(await ended(task), asyncio.CancelledError)
    assert held.released == held.offered == list(listener.pending)
    assert wire(client) == "open"
    (await listener.accept()).close()


async def test_cancelled_decision_wakes_a_waiter(listener: Listener[Stream], dial: Dial) -> None:
    """When a decision is cancelled, a call that waits is offered the connection."""
    client = dial(listener)
    held = Held()
    (first,) = start(listener.accept(held))
    await held.asked(1)
    (second,) = await waiting(listener, 1, held)
    first.cancel()

    await held.asked(2)
    assert held.offered[0] is held.offered[1]
    held.verdicts[1].set_result(ACCEPT)
    stream = await result(second)
    assert stream.caller_id == client.getsockname()
    assert held.released == held.offered[:1]
    stream.close()
    assert held.released == held.offered
    assert isinstance(await ended(first), asyncio.CancelledError)


async def test_cancelled_decision_is_due(listener: Listener[Stream], dial: Dial) -> None:
    """When the decision about a new connection is cancelled, wait_pending() returns."""
    dial(listener)
    held = Held()
    (first,) = start(listener.accept(held))
    await held.asked(1)
    (watcher,) = start(listener.wait_pending())
    await asyncio.sleep(0)
    assert not watcher.done()
    first.cancel()

    await result(watcher)
    assert list(listener.pending) == held.offered
    listener.accept_nowait().close()
    assert isinstance(await ended(first), asyncio.CancelledError)


async def test_cancelled_decisions_keep_their_order(listener: Listener[Stream], dial: Dial) -> None:
    """Of several decisions, cancelled in any order, each connection keeps its place."""
    clients = [dial(listener).getsockname() for _ in range(5)]
    held = Held()
    tasks = start(*(listener.accept(held) for _ in clients))
    await held.asked(len(clients))
    for n in (3, 0, 4, 2, 1):
        tasks[n].cancel()
        assert isinstance(await ended(tasks[n]), asyncio.CancelledError)

    assert [pending.caller_id for pending in listener.pending] == clients
    assert sorted(map(id, held.released)) == sorted(map(id, held.offered))
    served = []
    for _ in clients:
        stream = await listener.accept()
        served.append(stream.caller_id)
        stream.close()
    assert served == clients


async def test_timeout_around_a_decision(listener: Listener[Stream], dial: Dial) -> None:
    """`asyncio.timeout` around accept() ends the offer; the connection is offered again."""
    client = dial(listener)
    held = Held()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await listener.accept(held)

    assert held.released == list(listener.pending) == held.offered
    assert wire(client) == "open"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    (await listener.accept()).close()


async def test_timeout_inside_a_condition(listener: Listener[Stream], dial: Dial) -> None:
    """A condition's own timeout is an exception like any other: the caller is rejected."""
    client = dial(listener)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        async with asyncio.timeout(0.001):
            await asyncio.get_running_loop().create_future()
        return ACCEPT

    with pytest.raises(TimeoutError) as caught:
        await listener.accept(condition)
    assert str(client.getsockname()) in caught.value.__notes__[0]
    assert wire(client) == "reset"
    assert listener.statistics().rejected == 1


async def test_a_condition_that_cancels_its_own_work(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A CancelledError that nobody asked of the call is the condition's: a rejection."""
    client = dial(listener)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        work: asyncio.Future[AnyVerdict] = asyncio.get_running_loop().create_future()
        work.cancel()
        return await work

    (task,) = start(listener.accept(condition))
    assert isinstance(await ended(task), asyncio.CancelledError)
    assert wire(client) == "reset"
    assert listener.statistics().rejected == 1


async def test_a_condition_that_swallows_the_cancellation(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A condition is told by its result: one that swallows a cancellation decides."""
    dial(listener)
    asked = asyncio.Event()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            asked.set()
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            pass
        return ACCEPT

    (task,) = start(listener.accept(condition))
    await asked.wait()
    task.cancel()
    stream = await result(task)
    assert listener.statistics().accepted == 1
    assert listener.pending == ()
    stream.close()


async def test_a_condition_that_turns_the_cancellation_into_an_error(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A condition that raises something else when it is cancelled has raised: rejected."""
    client = dial(listener)
    asked = asyncio.Event()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            asked.set()
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise KeyError from None
        return ACCEPT

    (task,) = start(listener.accept(condition))
    await asked.wait()
    task.cancel()
    assert isinstance(await ended(task), KeyError)
    assert listener.statistics().rejected == 1
    assert wire(client) == "reset"


# -- close() during a decision


async def _cancelling_after(awaitable: Awaitable[object], error: type[BaseException]) -> int:
    """Await something that raises; return how often this task is being cancelled then."""
    with pytest.raises(error):
        await awaitable
    task = asyncio.current_task()
    assert task is not None
    await asyncio.sleep(0)
    return task.cancelling()


async def test_close_ends_a_decision(listener: Listener[Stream], dial: Dial) -> None:
    """close() during a decision resets the caller; the task goes on, not cancelled."""
    client = dial(listener)
    held = Held()
    (task,) = start(_cancelling_after(listener.accept(held), ListenerClosedError))
    await held.asked(1)
    listener.close()

    assert wire(client) == "reset"
    assert held.released == held.offered
    assert await result(task) == 0
    assert held.verdicts[0].cancelled()
    await listener.wait_closed()
    assert held.offered[0].status is Status.CLOSED
    assert (listener.statistics().closed, listener.statistics().deciding) == (1, 0)


async def test_close_keeps_an_older_cancellation(listener: Listener[Stream], dial: Dial) -> None:
    """A task that was being cancelled before still is after a close() during its call."""
    dial(listener)
    held = Held()

    async def stubborn() -> int:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            return await _cancelling_after(listener.accept(held), ListenerClosedError)
        return -1

    (task,) = start(stubborn())
    await asyncio.sleep(0)
    task.cancel()
    await held.asked(1)
    listener.close()
    assert await result(task) == 1


@pytest.mark.parametrize("close_first", [True, False])
async def test_close_and_a_cancellation_at_once(
    listener: Listener[Stream],
    dial: Dial,
    close_first: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Closed and cancelled in one turn, a call ends as cancelled."""
    client = dial(listener)
    held = Held()
    (task,) = start(_cancelling_after(listener.accept(held), asyncio.CancelledError))
    await held.asked(1)
    for act in (listener.close, task.cancel) if close_first else (task.cancel, listener.close):
        act()

    assert await result(task) == 1
    assert wire(client) == "reset"
    assert held.released == held.offered
    assert listener.statistics().closed == 1


async def test_close_with_the_verdict(listener: Listener[Stream], dial: Dial) -> None:
    """Closed in the turn of the verdict, the call ends as closed."""
    client = dial(listener)
    held = Held()
    (task,) = start(_cancelling_after(listener.accept(held), ListenerClosedError))
    await held.asked(1)
    held.verdicts[0].set_result(ACCEPT)
    listener.close()

    assert await result(task) == 0
    assert wire(client) == "reset"
    assert (listener.statistics().closed, listener.statistics().accepted) == (1, 0)


@pytest.mark.parametrize("then", [ACCEPT, REJECT, DEFER, 7, KeyError()], ids=str)
async def test_close_swallowed_by_a_condition(
    listener: Listener[Stream], dial: Dial, then: Any
) -> None:
    """What a condition says after close() does not matter: the connection is closed."""
    client = dial(listener)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            asked.set()
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await go_on.wait()
        if isinstance(then, BaseException):
            raise then
        verdict: AnyVerdict = then
        return verdict

    (task,) = start(_cancelling_after(listener.accept(condition), ListenerClosedError))
    await asked.wait()
    listener.close()
    (closed,) = start(listener.wait_closed())
    await asyncio.sleep(0)

    assert wire(client) == "reset"
    assert not closed.done()
    go_on.set()
    assert await result(task) == 0
    await result(closed)
    statistics = listener.statistics()
    assert (statistics.closed, statistics.taken) == (1, 1)


async def test_close_ends_all_decisions_and_waits(listener: Listener[Stream], dial: Dial) -> None:
    """close() ends every decision, wait and deferral at once."""
    clients = [dial(listener) for _ in range(3)]
    held = Held()
    tasks = start(*(_cancelling_after(listener.accept(held), ListenerClosedError) for _ in "123"))
    await held.asked(3)
    tasks += start(
        _cancelling_after(listener.accept(), ListenerClosedError),
        _cancelling_after(listener.wait_pending(), ListenerClosedError),
    )
    await asyncio.sleep(0)
    listener.close()

    assert [wire(client) for client in clients] == ["reset"] * 3
    assert await asyncio.gather(*tasks) == [0] * 5
    assert sorted(map(id, held.released)) == sorted(map(id, held.offered))
    assert listener.statistics().closed == 3


@pytest.mark.parametrize("waits", [False, True], ids=["close", "wait_closed"])
@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (ACCEPT, (None, b"served", Status.ACCEPTED)),
        (REJECT, (ConnectionRejectedError, "reset", Status.REJECTED)),
        (DEFER, (ListenerClosedError, "reset", Status.CLOSED)),
        (7, (InvalidVerdictError, "reset", Status.CLOSED)),
        (KeyError(), (KeyError, "reset", Status.REJECTED)),
    ],
    ids=["accept", "reject", "defer", "invalid", "raises"],
)
async def test_close_from_an_async_condition(
    listener: Listener[Stream],
    dial: Dial,
    verdict: Any,
    expected: tuple[Any, object, Status],
    waits: bool,  # noqa: FBT001 - a parameter
) -> None:
    """A condition that closes the listener keeps its verdict; DEFER is a reset then."""
    error, seen, status = expected
    client, other = dial(listener), dial(listener)
    offered: list[PendingTransport] = []
    released: list[str] = []

    async def condition(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        offered.append(pending)
        pending.hold(partial(released.append, "hold"))
        listener.close()
        await asyncio.sleep(0)
        if waits:
            await listener.wait_closed()
        if isinstance(verdict, BaseException):
            raise verdict
        said: AnyVerdict = verdict
        return said

    if error is None:
        stream = await listener.accept(condition)
        stream.write(b"served")
        assert released == []
        stream.close()
    else:
        with pytest.raises(error):
            await listener.accept(condition)
    assert released == ["hold"]
    assert wire(client) == seen
    assert wire(other) == "reset"
    await listener.wait_closed()
    statistics = listener.statistics()
    assert offered[0].status is status
    assert listener.pending == ()
    assert statistics.taken == 1
    assert statistics.accepted + statistics.rejected + statistics.closed == 1
    assert (statistics.deciding, statistics.streams) == (0, 0)


# -- closing from where the listener calls out


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (ACCEPT, Status.ACCEPTED),
        (REJECT, Status.REJECTED),
        (DEFER, Status.CLOSED),
        (7, Status.CLOSED),
        (KeyError(), Status.REJECTED),
    ],
    ids=["accept", "reject", "defer", "invalid", "raises"],
)
async def test_close_from_a_release(
    listener: Listener[Stream],
    dial: Dial,
    verdict: Any,
    status: Status,
    is_async: bool,  # noqa: FBT001 - a parameter
) -> None:
    """Closing the listener while a hold is released leaves nothing behind."""
    client = dial(listener)
    offered: list[PendingTransport] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        offered.append(pending)
        pending.hold(listener.close)
        if isinstance(verdict, BaseException):
            raise verdict
        said: AnyVerdict = verdict
        return said

    async def slow_condition(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        return condition(pending)

    (task,) = start(listener.accept(slow_condition if is_async else condition))
    error = await ended(task)
    if error is None:
        task.result().close()
    else:
        assert isinstance(error, (AcceptError, KeyError)), repr(error)
        assert wire(client) == "reset"
    await listener.wait_closed()
    assert offered[0].status is status
    assert listener.pending == ()
    statistics = listener.statistics()
    assert statistics.accepted + statistics.rejected + statistics.closed == 1


async def test_close_from_a_release_of_a_cancelled_decision(
    listener: Listener[Stream], dial: Dial
) -> None:
    """Closing the listener while a cancelled decision ends leaves nothing behind."""
    client = dial(listener)
    offered: list[PendingTransport] = []

    async def condition(pending: PendingTransport) -> AnyVerdict:
        offered.append(pending)
        pending.hold(listener.close)
        await asyncio.get_running_loop().create_future()
        return ACCEPT

    (task,) = start(listener.accept(condition))
    await until(lambda: offered)
    task.cancel()
    assert isinstance(await ended(task), (asyncio.CancelledError, ListenerClosedError))
    await listener.wait_closed()
    assert offered[0].status is Status.CLOSED
    assert listener.statistics().closed == 1
    assert wire(client) == "reset"


async def test_close_from_a_release_of_a_loss(listener: Listener[Stream], dial: Dial) -> None:
    """Closing the listener while a lost connection's hold is released leaves nothing behind."""
    client = dial(listener)

    async def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(listener.close)
        await asyncio.sleep(0)
        reset(client)
        return ACCEPT

    with pytest.raises((PendingResetError, ListenerClosedError)):
        await listener.accept(condition)
    await listener.wait_closed()
    assert listener.statistics().reset == listener.statistics().taken == 1
    assert listener.pending == ()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_close_from_a_stream_factory(dial: Dial, is_async: bool) -> None:  # noqa: FBT001 - a parameter
    """A stream factory that closes the listener keeps its stream."""
    listeners: list[Listener[Stream]] = []

    def factory(stream: Stream) -> Stream:
        listeners[0].close()
        return stream

    async def slow_accept(_pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        return ACCEPT

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        listeners.append(listener)
        client = dial(listener)
        stream = await listener.accept(slow_accept if is_async else accept)
        stream.write(b"served")
        assert wire(client) == b"served"
        assert listener.statistics().accepted == 1
        assert listener.statistics().closed == 0
        stream.close()


async def test_accept_from_inside_a_decision(listener: Listener[Stream], dial: Dial) -> None:
    """accept() by the task that decides is refused; by a task it starts it is not."""
    clients = [dial(listener), dial(listener)]
    inner: list[Stream] = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        with pytest.raises(AcceptInProgressError):
            await listener.accept()
        with pytest.raises(AcceptInProgressError):
            listener.accept_nowait()
        inner.append(await asyncio.ensure_future(listener.accept()))
        return ACCEPT

    outer = await listener.accept(condition)
    assert outer.caller_id == clients[0].getsockname()
    assert inner[0].caller_id == clients[1].getsockname()
    outer.close()
    inner[0].close()


# -- side by side


@pytest.mark.parametrize("seed", range(3))
async def test_decisions_side_by_side(listener: Listener[Stream], dial: Dial, seed: int) -> None:
    """N tasks decide N connections; whichever verdict comes first, each gets its own."""
    rng = random.Random(seed)  # noqa: S311 - a seeded sequence, no secret
    clients = [dial(listener) for _ in range(12)]
    held = Held()
    tasks = start(*(listener.accept(held) for _ in clients))
    await held.asked(len(clients))
    assert [each.caller_id for each in held.offered] == [each.getsockname() for each in clients]
    assert listener.statistics().deciding == len(clients)
    assert list(listener.pending) == held.offered

    verdicts = [rng.choice([ACCEPT, REJECT, DEFER]) for _ in clients]
    deferred = []
    for n in rng.sample(range(len(clients)), len(clients)):
        held.verdicts[n].set_result(verdicts[n])
        error = await ended(tasks[n])
        if verdicts[n] is ACCEPT:
            stream = tasks[n].result()
            assert stream.caller_id == clients[n].getsockname()
            stream.write(b"in")
            assert wire(clients[n]) == b"in"
            stream.close()
        elif verdicts[n] is REJECT:
            assert isinstance(error, ConnectionRejectedError)
            assert error.caller_id == clients[n].getsockname()
            assert wire(clients[n]) == "reset"
        else:
            assert isinstance(error, ConnectionDeferredError)
            assert error.caller_id == clients[n].getsockname()
            assert wire(clients[n]) == "open"
            deferred.append(n)

    assert list(listener.pending) == [held.offered[n] for n in sorted(deferred)]
    assert sorted(map(id, held.released)) == sorted(map(id, held.offered))
    statistics = listener.statistics()
    assert statistics.accepted == verdicts.count(ACCEPT)
    assert statistics.rejected == verdicts.count(REJECT)
    assert statistics.deferrals == statistics.pending == verdicts.count(DEFER)
    assert statistics.offers == len(clients)
    assert statistics.deciding == 0


# -- bounds


async def _bounded(held: Held, dial: Dial, **bound: int) -> Any:
    """Return a listener at its bound of two, its calls, and three clients."""
    max_pending, max_deciding = bound.get("max_pending", 9), bound.get("max_deciding", 9)
    listener = await listen("127.0.0.1", 0, max_pending=max_pending, max_deciding=max_deciding)
    clients = [dial(listener) for _ in range(3)]
    await queued(listener, 3)
    tasks = start(*(listener.accept(held) for _ in clients))
    await held.asked(2)
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(held.offered) == 2
    statistics = listener.statistics()
    assert (statistics.taken, statistics.deciding, statistics.backlog) == (2, 2, 1)
    return listener, tasks, clients


@pytest.mark.parametrize("verdict", [ACCEPT, REJECT, KeyError()], ids=["accept", "reject", "raise"])
@pytest.mark.parametrize("bound", ["max_deciding", "max_pending"])
async def test_bound(dial: Dial, bound: str, verdict: Any) -> None:
    """At a bound a further call takes nobody; it goes on when a place is free."""
    held = Held()
    listener, tasks, clients = await _bounded(held, dial, **{bound: 2})
    async with listener:
        if isinstance(verdict, BaseException):
            held.verdicts[1].set_exception(verdict)
        else:
            held.verdicts[1].set_result(verdict)
        error = await ended(tasks[1])
        assert (error is None) == (verdict is ACCEPT)
        await held.asked(3)
        assert held.offered[2].caller_id == clients[2].getsockname()
        assert listener.statistics().deciding == 2

        held.verdicts[0].set_result(ACCEPT)
        held.verdicts[2].set_result(ACCEPT)
        for task in tasks:
            if await ended(task) is None:
                task.result().close()


@pytest.mark.parametrize("bound", ["max_deciding", "max_pending"])
async def test_bound_and_a_cancelled_decision(dial: Dial, bound: str) -> None:
    """A cancelled decision gives its connection, not a further one, to who waits."""
    held = Held()
    listener, tasks, _ = await _bounded(held, dial, **{bound: 2})
    async with listener:
        tasks[1].cancel()
        await held.asked(3)
        assert held.offered[2] is held.offered[1]
        assert listener.statistics().taken == 2

        held.verdicts[0].set_result(ACCEPT)
        held.verdicts[2].set_result(ACCEPT)
        for task in (tasks[0], tasks[2]):
            (await result(task)).close()
        (await listener.accept()).close()


async def test_bound_and_a_deferral(dial: Dial) -> None:
    """A deferral gives its place under max_deciding to a call that waited for one."""
    held = Held()
    listener, tasks, _ = await _bounded(held, dial, max_deciding=2)
    async with listener:
        held.verdicts[0].set_result(DEFER)
        assert isinstance(await ended(tasks[0]), ConnectionDeferredError)
        await held.asked(3)
        assert held.offered[2] is held.offered[0]

        held.verdicts[1].set_result(ACCEPT)
        held.verdicts[2].set_result(ACCEPT)
        for task in tasks[1:]:
            (await result(task)).close()
        (await listener.accept()).close()


async def test_bound_and_accept_nowait(dial: Dial) -> None:
    """At a bound accept_nowait() finds nobody, though the backlog has somebody."""
    held = Held()
    listener, tasks, _ = await _bounded(held, dial, max_pending=2)
    async with listener:
        tasks.pop().cancel()
        with pytest.raises(AcceptError) as caught:
            listener.accept_nowait()
        assert isinstance(caught.value, BlockingIOError)
        assert listener.statistics().backlog == 1
        for verdict, task in zip(held.verdicts, tasks, strict=True):
            verdict.set_result(REJECT)
            assert isinstance(await ended(task), ConnectionRejectedError)
        listener.accept_nowait().close()


async def test_bound_of_deferred_callers(dial: Dial) -> None:
    """Deferred callers count for max_pending: the next waits in the kernel's backlog."""
    held = Held()
    listener, tasks, clients = await _bounded(held, dial, max_pending=2)
    async with listener:
        tasks.pop().cancel()
        for verdict, task in zip(held.verdicts, tasks, strict=True):
            verdict.set_result(DEFER)
            assert isinstance(await ended(task), ConnectionDeferredError)
        for _ in range(3):
            with pytest.raises(ConnectionDeferredError) as caught:
                await listener.accept(defer)
            assert caught.value.caller_id == clients[0].getsockname()
        assert (listener.statistics().pending, listener.statistics().backlog) == (2, 1)
        for client in clients:
            stream = await listener.accept()
            assert stream.caller_id == client.getsockname()
            stream.close()


# -- the yield rule


class Ticks:
    """Counts the turns of the loop, by `call_soon`."""

    def __init__(self) -> None:
        self.n = 0
        self._tick()

    def _tick(self) -> None:
        self.n += 1
        self._handle = asyncio.get_running_loop().call_soon(self._tick)

    def stop(self) -> None:
        """Count no more."""
        self._handle.cancel()


async def test_64_in_a_row(memory: Memory) -> None:
    """At most 64 accept() calls complete in a row before the loop has its turn."""
    listener, gate = memory
    rows: list[int] = []
    for _ in range(5 * IN_A_ROW):
        gate.dial().close()
    ticks = Ticks()
    last = -1
    for _ in range(5 * IN_A_ROW):
        (await listener.accept()).close()
        if ticks.n != last:
            rows.append(0)
            last = ticks.n
        rows[-1] += 1
    ticks.stop()
    assert max(rows) <= IN_A_ROW
    assert len(rows) >= 5


async def test_64_in_a_row_by_wait_pending(memory: Memory) -> None:
    """At most 64 wait_pending() calls complete in a row before the loop has its turn."""
    listener, gate = memory
    gate.dial().close()
    ticks = Ticks()
    seen = []
    for _ in range(3 * IN_A_ROW):
        await listener.wait_pending()
        seen.append(ticks.n)
    ticks.stop()
    assert max(map(seen.count, seen)) <= IN_A_ROW
    assert listener.statistics().taken == 0


async def _swallow(awaitable: Awaitable[Stream]) -> None:
    try:
        (await awaitable).close()
    except (AcceptError, KeyError):
        return


def _raise(_pending: PendingTransport) -> AnyVerdict:
    raise KeyError


def _invalid(_pending: PendingTransport) -> Any:
    return "yes"


def _bad_group(pending: PendingTransport) -> AnyVerdict:
    pending.group = "nobody's"
    return ACCEPT


@pytest.mark.parametrize(
    "condition", [defer, reject, _raise, _invalid, _bad_group], ids=lambda each: each.__name__
)
async def test_a_call_that_raises_has_yielded(
    listener: Listener[Stream], dial: Dial, condition: Any
) -> None:
    """A retry loop over calls that raise lets every callback and timer run."""
    for _ in range(20):
        dial(listener)
    await queued(listener, 20)
    timer = asyncio.Event()
    asyncio.get_running_loop().call_later(0, timer.set)
    ticks = Ticks()
    for _ in range(20):
        before = ticks.n
        await _swallow(listener.accept(condition))
        assert ticks.n > before
    ticks.stop()
    assert timer.is_set()
    assert listener.statistics().offers == 20


async def test_a_loss_has_yielded(listener: Listener[Stream], dial: Dial) -> None:
    """A retry loop over callers who have reset lets every callback run."""
    for _ in range(20):
        client = dial(listener)
        reset(client)
    ticks = Ticks()
    for n in range(20):
        before = ticks.n
        await _swallow(listener.accept())
        assert ticks.n > before
        assert listener.statistics().reset == n + 1
    ticks.stop()
    assert listener.statistics().offers == 0


async def test_a_closed_listener_has_yielded(listener: Listener[Stream]) -> None:
    """A retry loop over a closed listener lets every callback run."""
    listener.close()
    ticks = Ticks()
    for method in (listener.accept, listener.wait_pending):
        before = ticks.n
        with pytest.raises(ListenerClosedError):
            await method()
        assert ticks.n > before
    ticks.stop()


async def test_a_nested_call_has_yielded(listener: Listener[Stream], dial: Dial) -> None:
    """A retry loop over accept() inside its own decision lets every callback run."""
    dial(listener)
    ticks = Ticks()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        for _ in range(20):
            before = ticks.n
            with pytest.raises(AcceptInProgressError):
                await listener.accept()
            assert ticks.n > before
        return ACCEPT

    (await listener.accept(condition)).close()
    ticks.stop()


async def test_a_retry_loop_over_a_deferral(listener: Listener[Stream], dial: Dial) -> None:
    """A loop that asks about a deferred caller again and again does not stop the timers."""
    dial(listener)
    timer = asyncio.Event()
    asyncio.get_running_loop().call_later(0.001, timer.set)
    for _ in range(1_000_000):
        await _swallow(listener.accept(defer))
        if timer.is_set():
            break
    assert timer.is_set()
    assert len(listener.pending) == 1


async def test_reset_during_a_decision_that_is_cancelled(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A deferred caller that resets while it is decided about again is noticed, once."""
    client = dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    asked = asyncio.Event()

    async def never(_pending: PendingTransport) -> AnyVerdict:
        asked.set()
        await asyncio.Event().wait()
        return ACCEPT

    call = asyncio.ensure_future(listener.accept(never))
    await asked.wait()
    reset(client)
    await caught_up()
    call.cancel()
    await asyncio.wait([call])
    async with asyncio.timeout(LIMIT):
        await listener.wait_pending()
    assert listener.statistics().reset == 1
    with pytest.raises(PendingResetError):
        await listener.accept()
    assert listener.pending == ()


async def test_a_waiting_call_that_is_closed(listener: Listener[Stream], dial: Dial) -> None:
    """A coroutine that is closed while it waits takes nobody's wake-up."""
    closed = listener.accept()
    closed.send(None)
    call = asyncio.ensure_future(listener.accept())
    await caught_up()
    closed.close()
    dial(listener)
    async with asyncio.timeout(LIMIT):
        (await call).close()


async def test_cancelled_waits_for_the_end_leave_nothing(listener: Listener[Stream]) -> None:
    """wait_closed() that is cancelled leaves nothing in the listener."""
    for _ in range(3):
        call = asyncio.ensure_future(listener.wait_closed())
        await caught_up()
        call.cancel()
        await asyncio.wait([call])
    assert listener._deciding._idle == []
