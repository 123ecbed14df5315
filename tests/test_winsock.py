"""Winsock's conditional accept, scenario by scenario.

Each test is named by the scenario it is about: A accepting and rejecting, D deferring, C the
caller leaving early, V what a condition gives back, L what can be listened on, F bad arguments,
B waiting, P what a condition sees, R calls from inside a condition, E events and what is
inherited, O the option for conditional accept. What cannot exist here is in `NOT_HERE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptError,
    AcceptInProgressError,
    AcceptInterruptedError,
    AnyVerdict,
    CalleeDataError,
    ConditionNotCallableError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Defer,
    Event,
    InvalidGroupError,
    InvalidVerdictError,
    Listener,
    ListenerClosedError,
    NoPendingError,
    NotASocketError,
    NotListeningError,
    NotStreamSocketError,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from tests.support import (
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

ROWS = (
    *(f"A{n}" for n in range(1, 6)),
    *(f"D{n}" for n in range(1, 15)),
    *(f"C{n}" for n in range(1, 5)),
    *(f"V{n}" for n in range(1, 5)),
    *(f"L{n}" for n in range(1, 6)),
    *(f"F{n}" for n in range(1, 5)),
    *(f"B{n}" for n in range(1, 5)),
    *(f"P{n}" for n in range(1, 4)),
    *(f"R{n}" for n in range(1, 4)),
    *(f"E{n}" for n in range(1, 10)),
    "O1",
)

NOT_HERE = (
    ("L5", "there is no start-up call that could be missing: importing the package is all"),
    ("F4", "addr and addrlen are no arguments: stream, error and outcome always carry caller_id"),
    ("E3", "there is no blocking mode to inherit: under asyncio a stream never blocks"),
)
"""Scenarios without a counterpart, each with the reason."""

Take = Callable[..., Awaitable[Stream]]
"""One offer, by either call."""


async def by_accept(
    listener: Listener[Stream], condition: Any = None, callback_data: object = None
) -> Stream:
    """Take by `accept()`."""
    return await listener.accept(condition, callback_data)


async def by_accept_nowait(
    listener: Listener[Stream], condition: Any = None, callback_data: object = None
) -> Stream:
    """Take by `accept_nowait()`."""
    return listener.accept_nowait(condition, callback_data)


either = pytest.mark.parametrize("take", [by_accept, by_accept_nowait])
"""For `accept()` and `accept_nowait()`."""
silent_or_not = pytest.mark.parametrize(
    "sent", [pytest.param(b"", id="silent"), pytest.param(b"hello", id="sent")]
)
"""For a caller that has sent nothing, and one that has."""

CODES: dict[type[AcceptError], tuple[int, str, type[Exception]]] = {
    ConnectionRejectedError: (errno.ECONNREFUSED, "WSAECONNREFUSED", ConnectionRefusedError),
    ConnectionDeferredError: (errno.EAGAIN, "WSATRY_AGAIN", BlockingIOError),
    PendingResetError: (errno.ECONNRESET, "WSAECONNRESET", ConnectionResetError),
    PendingExpiredError: (errno.EACCES, "WSAEACCES", PermissionError),
    NoPendingError: (errno.EWOULDBLOCK, "WSAEWOULDBLOCK", BlockingIOError),
    AcceptInterruptedError: (errno.EINTR, "WSAEINTR", InterruptedError),
    AcceptInProgressError: (errno.EINPROGRESS, "WSAEINPROGRESS", RuntimeError),
    ListenerClosedError: (errno.EINVAL, "WSAEINVAL", ValueError),
    NotListeningError: (errno.EINVAL, "WSAEINVAL", ValueError),
    InvalidVerdictError: (errno.EINVAL, "WSAEINVAL", ValueError),
    InvalidGroupError: (errno.EINVAL, "WSAEINVAL", ValueError),
    ConditionNotCallableError: (errno.EFAULT, "WSAEFAULT", TypeError),
    CalleeDataError: (errno.EFAULT, "WSAEFAULT", ValueError),
    NotASocketError: (errno.ENOTSOCK, "WSAENOTSOCK", OSError),
    NotStreamSocketError: (errno.EOPNOTSUPP, "WSAEOPNOTSUPP", OSError),
}


def check(
    error: BaseException, kind: type[AcceptError], caller_id: object, reason: str | None
) -> None:
    """Assert what our caller got: type, errno, Winsock name, address, reason."""
    code, winsock, builtin = CODES[kind]
    assert isinstance(error, kind)
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert (error.errno, error.winsock) == (code, winsock)
    assert error.caller_id == caller_id
    assert error.reason == error.strerror
    assert error.reason
    assert reason is None or error.reason == reason


@contextlib.contextmanager
def raises(
    kind: type[AcceptError], caller_id: object = None, reason: str | None = None
) -> Iterator[pytest.ExceptionInfo[AcceptError]]:
    """Expect an error of exactly *kind*, about *caller_id*."""
    with pytest.raises(kind) as caught:
        yield caught
    check(caught.value, kind, caller_id, reason)


COUNTS = (
    *("taken", "offers", "deferrals", "accepted", "rejected", "reset", "expired", "failed"),
    *("closed", "pending", "deciding", "rejecting", "cut_short", "streams", "backlog"),
)


def books(listener: Listener[Any]) -> dict[str, int]:
    """Return every count of the listener's statistics that is not zero."""
    statistics = listener.statistics()
    counts = {name: getattr(statistics, name) for name in COUNTS}
    return {name: count for name, count in counts.items() if count}


def waiting(listener: Listener[Any]) -> list[tuple[object, Status]]:
    """Return who is on the deque, in order, and how each stands."""
    return [(pending.caller_id, pending.status) for pending in listener.pending]


async def converse(stream: Stream, client: socket.socket, *, after: bytes = b"") -> None:
    """Assert that data flows both ways, and what the stream begins with; then close it."""
    client.sendall(b"ping")
    received = b""
    while len(received) < len(after) + 4:
        chunk = await stream.read(64)
        assert chunk
        received += chunk
    assert received == after + b"ping"
    stream.write(b"pong")
    assert await wire_end(client) == b"pong"
    stream.close()
    assert await wire_end(client) == "eof"


class Log:
    """An event callback that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, Event, OSError | None]] = []

    def __call__(self, source: Any, event: Event, error: OSError | None) -> None:
        """Keep it."""
        self.told.append((source, event, error))

    def of(self, source: object) -> list[Event]:
        """Return the events of one source, in order."""
        return [event for each, event, _ in self.told if each is source]


ANY_EVENT = Event.PENDING | Event.READ | Event.WRITE | Event.CLOSE | Event.OOB


def test_every_scenario_is_here() -> None:
    """Each scenario is either tested, by its name, or listed with the reason why not."""
    tested = {name.split("_")[1].upper() for name in globals() if name.startswith("test_")}
    listed = {row for row, reason in NOT_HERE if reason}
    assert len(listed) == len(NOT_HERE)
    assert not tested & listed
    assert (tested & set(ROWS)) | listed == set(ROWS)


# -- A: accepting and rejecting


@either
@silent_or_not
async def test_a1_no_condition(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """Without a condition the oldest connection is accepted."""
    client = dial(listener, data=sent)
    await queued(listener, 1)
    stream = await take(listener)

    assert stream.caller_id == client.getsockname()
    assert books(listener) == {"taken": 1, "offers": 1, "accepted": 1, "streams": 1}
    assert listener.pending == ()
    await converse(stream, client, after=sent)
    assert books(listener) == {"taken": 1, "offers": 1, "accepted": 1}


@either
@silent_or_not
async def test_a2_accept(listener: Listener[Stream], dial: Dial, take: Take, sent: bytes) -> None:
    """ACCEPT gives a stream; the condition was asked once, before the call returned."""
    client = dial(listener, data=sent)
    await queued(listener, 1)
    condition = Condition(ACCEPT)
    stream = await take(listener, condition)

    assert condition.offered == [client.getsockname()]
    assert stream.caller_id == client.getsockname()
    assert books(listener) == {"taken": 1, "offers": 1, "accepted": 1, "streams": 1}
    assert listener.pending == ()
    await converse(stream, client, after=sent)


@either
async def test_a3_reject(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """REJECT raises with the caller's address, and a silent caller is reset."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    with raises(ConnectionRejectedError, name, Reject().reason):
        await take(listener, reject)

    assert await wire_end(client) == "reset"
    assert books(listener) == {"taken": 1, "offers": 1, "rejected": 1}
    assert listener.pending == ()


@either
async def test_a4_reject_after_data(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A rejected caller that had sent something is reset just the same."""
    client = dial(listener, data=b"hello")
    name = client.getsockname()
    await queued(listener, 1)
    with raises(ConnectionRejectedError, name, "not today"):
        await take(listener, Condition(Reject("not today")))

    assert await wire_end(client) == "reset"
    assert books(listener) == {"taken": 1, "offers": 1, "rejected": 1}
    assert listener.pending == ()


@either
@silent_or_not
async def test_a5_reject_then_accept(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """After the first of two was rejected the next call offers the second, untouched so far."""
    a, b = dial(listener, data=sent), dial(listener, data=sent)
    name = a.getsockname()
    await queued(listener, 2)
    condition = Condition(REJECT, ACCEPT)
    with raises(ConnectionRejectedError, name):
        await take(listener, condition)
    assert await wire_end(a) == "reset"
    assert wire(b) == "open"
    assert books(listener) == {"taken": 1, "offers": 1, "rejected": 1, "backlog": 1}

    stream = await take(listener, condition)
    assert condition.offered == [name, b.getsockname()]
    assert books(listener) == {
        "taken": 2,
        "offers": 2,
        "rejected": 1,
        "accepted": 1,
        "streams": 1,
    }
    await converse(stream, b, after=sent)


# -- D: deferring


@either
@silent_or_not
async def test_d1_defer_accept(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """A deferred connection stays open, and the next call offers it again."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    await queued(listener, 1)
    hint = Defer(after=1.5, reason="ask me later")
    condition = Condition(hint, ACCEPT)
    with raises(ConnectionDeferredError, name, "ask me later") as caught:
        await take(listener, condition)
    assert isinstance(caught.value, ConnectionDeferredError)
    assert caught.value.defer is hint
    assert wire(client) == "open"
    assert waiting(listener) == [(name, Status.DEFERRED)]
    assert listener.pending[0].deferrals == 1
    assert books(listener) == {"taken": 1, "offers": 1, "deferrals": 1, "pending": 1}

    stream = await take(listener, condition)
    assert condition.offered == [name, name]
    assert listener.pending == ()
    assert books(listener) == {
        "taken": 1,
        "offers": 2,
        "deferrals": 1,
        "accepted": 1,
        "streams": 1,
    }
    await converse(stream, client, after=sent)


@either
@silent_or_not
async def test_d2_defer_reject(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """A deferred connection that is then rejected was open in between, and is reset."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    await queued(listener, 1)
    condition = Condition(DEFER, REJECT)
    with raises(ConnectionDeferredError, name, Defer().reason):
        await take(listener, condition)
    await caught_up()
    assert wire(client) == "open"

    with raises(ConnectionRejectedError, name):
        await take(listener, condition)
    assert await wire_end(client) == "reset"
    assert condition.offered == [name, name]
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "offers": 2, "deferrals": 1, "rejected": 1}


@either
async def test_d3_defer_twice(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A connection may be deferred any number of times, and is asked about each time."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    condition = Condition(*[DEFER] * 10, ACCEPT)
    for deferrals in range(1, 11):
        with raises(ConnectionDeferredError, name):
            await take(listener, condition)
        assert [each.deferrals for each in listener.pending] == [deferrals]

    stream = await take(listener, condition)
    assert condition.offered == [name] * 11
    assert listener.pending == ()
    assert listener.statistics().deferrals == 10
    await converse(stream, client)


@either
@silent_or_not
async def test_d3_deadline(dial: Dial, take: Take, sent: bytes) -> None:
    """Only the deadline ends deferring: the caller is reset, and that is reported once."""
    async with await listen("127.0.0.1", 0, defer_timeout=0.01) as listener:
        client = dial(listener, data=sent)
        name = client.getsockname()
        await queued(listener, 1)
        with raises(ConnectionDeferredError, name):
            await take(listener, defer)
        await until(lambda: listener.statistics().expired)
        assert await wire_end(client) == "reset"
        assert listener.pending == ()

        condition = Condition(ACCEPT)
        with raises(PendingExpiredError, name):
            await take(listener, condition)
        assert condition.offered == []
        with raises(NoPendingError):
            listener.accept_nowait(condition)
        assert books(listener) == {"taken": 1, "offers": 1, "deferrals": 1, "expired": 1}


@either
@silent_or_not
async def test_d4_defer_then_no_condition(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """A call without a condition accepts the deferred connection, not one behind it."""
    a, b = dial(listener, data=sent), dial(listener)
    name = a.getsockname()
    await queued(listener, 2)
    condition = Condition(DEFER)
    with raises(ConnectionDeferredError, name):
        await take(listener, condition)

    stream = await take(listener)
    assert condition.offered == [name]
    assert stream.caller_id == name
    assert listener.pending == ()
    assert books(listener)["backlog"] == 1
    assert wire(b) == "open"
    await converse(stream, a, after=sent)


@either
async def test_d5_deferred_head_first(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Of two, the first was deferred: it is offered again before the second ever is."""
    a, b = dial(listener), dial(listener)
    names = [each.getsockname() for each in (a, b)]
    await queued(listener, 2)
    condition = Condition(DEFER, ACCEPT, ACCEPT)
    with raises(ConnectionDeferredError, names[0]):
        await take(listener, condition)
    assert waiting(listener) == [(names[0], Status.DEFERRED)]
    streams = [await take(listener, condition) for _ in range(2)]

    assert condition.offered == [names[0], names[0], names[1]]
    assert [stream.caller_id for stream in streams] == names
    assert listener.pending == ()
    for stream, client in zip(streams, (a, b), strict=True):
        await converse(stream, client)


@either
async def test_d6_always_defer(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Whoever always defers is always offered the head; those behind keep their places."""
    clients = [dial(listener) for _ in range(3)]
    names = [client.getsockname() for client in clients]
    await queued(listener, 3)
    condition = Condition(*[DEFER] * 4)
    for _ in range(4):
        with raises(ConnectionDeferredError, names[0]):
            await take(listener, condition)
    assert condition.offered == [names[0]] * 4
    assert waiting(listener) == [(names[0], Status.DEFERRED)]
    assert books(listener) == {
        "taken": 1,
        "offers": 4,
        "deferrals": 4,
        "pending": 1,
        "backlog": 2,
    }
    assert [wire(client) for client in clients] == ["open"] * 3

    streams = [await take(listener) for _ in range(3)]
    assert [stream.caller_id for stream in streams] == names
    for stream, client in zip(streams, clients, strict=True):
        await converse(stream, client)


@either
async def test_d7_new_arrival_waits(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A new arrival never overtakes a deferred head; it is next when that one is decided."""
    a = dial(listener)
    await queued(listener, 1)
    condition = Condition(DEFER, REJECT, ACCEPT)
    with raises(ConnectionDeferredError, a.getsockname()):
        await take(listener, condition)
    b = dial(listener)
    names = [each.getsockname() for each in (a, b)]
    await queued(listener, 1)
    with raises(ConnectionRejectedError, names[0]):
        await take(listener, condition)
    assert await wire_end(a) == "reset"
    assert wire(b) == "open"

    stream = await take(listener, condition)
    assert condition.offered == [names[0], names[0], names[1]]
    assert listener.pending == ()
    await converse(stream, b)


@either
async def test_d8_deferral_wakes_nobody(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """wait_pending() returns for a caller, and not for the deferral of one; accept would."""
    client = dial(listener)
    await listener.wait_pending()
    await listener.wait_pending()  # it takes nothing
    assert books(listener) == {"backlog": 1}
    with raises(ConnectionDeferredError, client.getsockname()):
        await take(listener, defer)

    waiter = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert not waiter.done()
    stream = await take(listener)  # at once
    await caught_up()
    assert not waiter.done()
    dial(listener)
    await waiter
    assert books(listener)["backlog"] == 1
    await converse(stream, client)


@either
async def test_d8_newcomer_behind(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Behind a deferred head wait_pending() returns once for a newcomer, not again and again."""
    a = dial(listener)
    name = a.getsockname()
    await listener.wait_pending()
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    waiter = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert not waiter.done()
    b = dial(listener)
    await waiter

    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    waiter = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    assert not waiter.done()
    assert books(listener)["backlog"] == 1

    # A verdict about the head makes the one behind it due.
    stream = await take(listener)
    stream.close()
    await listener.wait_pending()
    await converse(await take(listener), b)
    waiter.cancel()
    await asyncio.wait([waiter])


async def test_d8_wait_pending_after_a_verdict(listener: Listener[Stream], dial: Dial) -> None:
    """A wait_pending() that waits behind a deferred head returns when a verdict frees the way."""
    a, b = dial(listener), dial(listener)
    await queued(listener, 2)
    await caught_up()
    with raises(ConnectionDeferredError, a.getsockname()):
        listener.accept_nowait(defer)
    waiter = asyncio.ensure_future(listener.wait_pending())
    await caught_up()
    with raises(ConnectionRejectedError, a.getsockname()):
        listener.accept_nowait(reject)
    await caught_up()
    assert waiter.done()
    await waiter
    await converse(listener.accept_nowait(), b)


async def test_d9_defer_nowait(listener: Listener[Stream], dial: Dial) -> None:
    """accept_nowait() re-offers until a verdict; then nobody is pending, and nobody is named."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    condition = Condition(DEFER, DEFER, REJECT, ACCEPT)
    for kind in (ConnectionDeferredError, ConnectionDeferredError, ConnectionRejectedError):
        with raises(kind, name):
            listener.accept_nowait(condition)
    with raises(NoPendingError, None):
        listener.accept_nowait(condition)

    assert condition.offered == [name] * 3
    assert await wire_end(client) == "reset"
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "offers": 3, "deferrals": 2, "rejected": 1}


@either
async def test_d10_data_while_deferred(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """What a caller sends while deferred can be seen, stays unread, and reaches the stream."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    seen: list[bytes | None] = []

    def look(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.caller_data)
        return DEFER

    with raises(ConnectionDeferredError, name):
        await take(listener, look)
    client.sendall(b"hello")
    await caught_up()
    for _ in range(2):
        with raises(ConnectionDeferredError, name):
            await take(listener, look)
    assert seen == [None, b"hello", b"hello"]
    assert listener.pending[0].peek(2) == b"he"

    await converse(await take(listener), client, after=b"hello")


@either
@silent_or_not
async def test_d11_fin_while_deferred(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """A deferred caller that closes is offered all the same, with its FIN to be seen."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    await queued(listener, 1)
    seen: list[bool] = []

    def look(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.peer_closed)
        return ACCEPT if pending.deferrals else DEFER

    with raises(ConnectionDeferredError, name):
        await take(listener, look)
    client.close()
    await until(lambda: listener.pending[0].peer_closed)
    await caught_up()
    assert waiting(listener) == [(name, Status.DEFERRED)]

    stream = await take(listener, look)
    assert seen == [False, True]
    assert stream.caller_id == name
    assert await stream.read() == sent
    assert await stream.read(1) == b""
    assert books(listener) == {
        "taken": 1,
        "offers": 2,
        "deferrals": 1,
        "accepted": 1,
        "streams": 1,
    }
    stream.close()


@either
async def test_d11_half_closed(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A FIN may be a half-close: such a caller still reads what the stream sends."""
    client = dial(listener, data=b"all I have")
    await queued(listener, 1)
    with raises(ConnectionDeferredError, client.getsockname()):
        await take(listener, defer)
    client.shutdown(socket.SHUT_WR)
    await until(lambda: listener.pending[0].peer_closed)
    stream = await take(listener)
    stream.write(b"answer")
    assert await stream.read() == b"all I have"
    stream.close()
    assert await wire_end(client) == b"answer"
    assert await wire_end(client) == "eof"


@either
@silent_or_not
async def test_d11_withdrawn(dial: Dial, take: Take, sent: bytes) -> None:
    """With on_eof="withdraw" a FIN is a withdrawal: reported once, as EACCES, and not offered."""
    async with await listen("127.0.0.1", 0, on_eof="withdraw") as listener:
        a = dial(listener, data=sent)
        name = a.getsockname()
        await queued(listener, 1)
        with raises(ConnectionDeferredError, name):
            await take(listener, defer)
        a.shutdown(socket.SHUT_WR)
        await until(lambda: listener.statistics().expired)
        b = dial(listener)
        await queued(listener, 1)

        condition = Condition(ACCEPT)
        with raises(PendingExpiredError, name):
            await take(listener, condition)
        assert condition.offered == []
        assert await wire_end(a) == "reset"
        stream = await take(listener, condition)
        assert condition.offered == [b.getsockname()]
        await converse(stream, b)
        assert books(listener) == {
            "taken": 2,
            "offers": 2,
            "deferrals": 1,
            "accepted": 1,
            "expired": 1,
        }


@either
@silent_or_not
@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "at-once"])
async def test_d12_reset_while_deferred(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes, *, noticed: bool
) -> None:
    """A deferred caller's reset is reported once, unasked; the next call goes on to the next."""
    a, b = dial(listener, data=sent), dial(listener)
    name = a.getsockname()
    await queued(listener, 2)
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    reset(a)
    if noticed:
        await until(lambda: listener.statistics().reset)
        assert listener.pending == ()
        await listener.wait_pending()  # the loss is due

    condition = Condition(ACCEPT)
    with raises(PendingResetError, name):
        await take(listener, condition)
    assert condition.offered == []
    assert listener.pending == ()
    stream = await take(listener, condition)
    assert condition.offered == [b.getsockname()]
    await converse(stream, b)
    with raises(NoPendingError):
        listener.accept_nowait()
    assert books(listener) == {
        "taken": 2,
        "offers": 2,
        "deferrals": 1,
        "accepted": 1,
        "reset": 1,
    }


@either
async def test_d12_reset_and_would_reject(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """A reset of the deferred caller is reported as that, also where the verdict were REJECT."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    condition = Condition(DEFER, REJECT)
    with raises(ConnectionDeferredError, name):
        await take(listener, condition)
    reset(client)
    with raises(PendingResetError, name):
        await take(listener, condition)
    assert condition.offered == [name]
    assert books(listener) == {"taken": 1, "offers": 1, "deferrals": 1, "reset": 1}


@either
@silent_or_not
async def test_d13_closed_while_deferred(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """Closing the listener resets a deferred caller, whether or not it had sent something."""
    client = dial(listener, data=sent)
    await queued(listener, 1)
    with raises(ConnectionDeferredError, client.getsockname()):
        await take(listener, defer)
    listener.close()
    assert await wire_end(client) == "reset"
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "offers": 1, "deferrals": 1, "closed": 1}
    with raises(ListenerClosedError):
        await take(listener)


@either
async def test_d14_nested_double_defer(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A condition that tries to defer the next one, and then defers its own, loses neither."""
    a, b = dial(listener), dial(listener)
    names = [each.getsockname() for each in (a, b)]
    await queued(listener, 2)

    def nested(_pending: PendingTransport) -> AnyVerdict:
        with raises(AcceptInProgressError):
            listener.accept_nowait(defer)
        return DEFER

    with raises(ConnectionDeferredError, names[0]):
        await take(listener, nested)
    assert waiting(listener) == [(names[0], Status.DEFERRED)]
    assert books(listener)["backlog"] == 1
    streams = [await take(listener) for _ in range(2)]
    assert [stream.caller_id for stream in streams] == names
    for stream, client in zip(streams, (a, b), strict=True):
        await converse(stream, client)


async def test_d14_two_decisions_defer(listener: Listener[Stream], dial: Dial) -> None:
    """Two decisions side by side that both defer, the later first, keep both, in order."""
    clients = [dial(listener), dial(listener)]
    names = [each.getsockname() for each in clients]
    await queued(listener, 2)
    offered: list[object] = []
    may = [asyncio.Event(), asyncio.Event()]

    async def condition(pending: PendingTransport) -> AnyVerdict:
        offered.append(pending.caller_id)
        await may[names.index(pending.caller_id)].wait()
        return DEFER

    calls = [asyncio.ensure_future(listener.accept(condition)) for _ in range(2)]
    await until(lambda: len(offered) == 2)
    assert offered == names
    assert waiting(listener) == [(name, Status.DECIDING) for name in names]
    for n in (1, 0):
        may[n].set()
        with raises(ConnectionDeferredError, names[n]):
            await calls[n]
    assert waiting(listener) == [(name, Status.DEFERRED) for name in names]
    assert [wire(client) for client in clients] == ["open"] * 2

    streams = [await listener.accept() for _ in range(2)]
    assert [stream.caller_id for stream in streams] == names
    for stream, client in zip(streams, clients, strict=True):
        await converse(stream, client)


# -- C: the caller leaves early


@either
@silent_or_not
@pytest.mark.parametrize("condition", [None, accept], ids=["plain", "condition"])
async def test_c1_fin_before(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes, condition: Any
) -> None:
    """A caller that closed before it was looked at is accepted: its data, then the end."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    client.close()
    await queued(listener, 1)
    stream = await take(listener, condition)

    assert stream.caller_id == name
    assert await stream.read() == sent
    assert await stream.read(1) == b""
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "offers": 1, "accepted": 1, "streams": 1}
    stream.close()


@either
@silent_or_not
async def test_c2_reset_before(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """A caller that reset before it was looked at is reported once, unasked, by its address."""
    a, b = dial(listener, data=sent), dial(listener)
    names = [each.getsockname() for each in (a, b)]
    await queued(listener, 2)
    reset(a)
    condition = Condition(ACCEPT)
    with raises(PendingResetError, names[0]):
        await take(listener, condition)
    assert condition.offered == []
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "reset": 1, "backlog": 1}

    stream = await take(listener, condition)
    assert condition.offered == [names[1]]
    await converse(stream, b)
    assert books(listener) == {"taken": 2, "offers": 1, "reset": 1, "accepted": 1}


@either
@silent_or_not
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_c3_reset_whatever_the_address(
    dial: Dial, take: Take, sent: bytes, host: str
) -> None:
    """A reset is one whatever form the address has, and also for a call without a condition."""
    async with await listen(host, 0) as listener:
        client = dial(listener, data=sent)
        name = client.getsockname()
        await queued(listener, 1)
        reset(client)
        with raises(PendingResetError, name):
            await take(listener)
        assert listener.pending == ()
        assert books(listener) == {"taken": 1, "reset": 1}


@silent_or_not
async def test_c4_closed_before_any_offer(
    listener: Listener[Stream], dial: Dial, sent: bytes
) -> None:
    """Closing the listener resets whoever was never offered."""
    clients = [dial(listener, data=sent) for _ in range(2)]
    await queued(listener, 2)
    listener.close()
    assert [await wire_end(client) for client in clients] == ["reset"] * 2
    assert listener.pending == ()
    assert books(listener) == {}


# -- V: what a condition gives back


@either
@pytest.mark.parametrize("verdict", [7, -1, None, True, "accept", Event.PENDING], ids=repr)
async def test_v1_invalid_verdict(
    listener: Listener[Stream], dial: Dial, take: Take, verdict: Any
) -> None:
    """What is no verdict is EINVAL; the connection stays at the head, undecided."""
    a, b = dial(listener, data=b"hello"), dial(listener)
    name = a.getsockname()
    await queued(listener, 2)
    for _ in range(2):
        with raises(InvalidVerdictError, name):
            await take(listener, lambda _: verdict)
        assert waiting(listener) == [(name, Status.QUEUED)]
        assert wire(a) == "open"
    assert books(listener) == {"taken": 1, "offers": 2, "pending": 1, "backlog": 1}
    await listener.wait_pending()  # it is due

    condition = Condition(DEFER)
    with raises(ConnectionDeferredError, name):
        await take(listener, condition)
    with raises(InvalidVerdictError, name):
        await take(listener, lambda _: verdict)
    assert waiting(listener) == [(name, Status.DEFERRED)]
    assert condition.offered == [name]
    await converse(await take(listener), a, after=b"hello")
    await converse(await take(listener), b)


async def test_v1_invalid_async_verdict(listener: Listener[Stream], dial: Dial) -> None:
    """The result of an async condition is held to the same."""
    client = dial(listener)
    name = client.getsockname()

    async def condition(_pending: PendingTransport) -> Any:
        await asyncio.sleep(0)
        return 7

    with raises(InvalidVerdictError, name):
        await listener.accept(condition)
    assert waiting(listener) == [(name, Status.QUEUED)]
    assert books(listener) == {"taken": 1, "offers": 1, "pending": 1}
    await converse(await listener.accept(), client)


async def test_v1_awaitable_nowait(listener: Listener[Stream], dial: Dial) -> None:
    """For accept_nowait() an async condition's result is no verdict; it is never started."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    started = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        started.append(True)
        return REJECT

    with raises(InvalidVerdictError, name):
        listener.accept_nowait(condition)
    await caught_up()
    assert started == []
    assert waiting(listener) == [(name, Status.QUEUED)]
    await converse(listener.accept_nowait(), client)


@either
async def test_v2_unknown_group(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Accepting into a group the listener does not have is EINVAL; the connection stays."""
    a, b = dial(listener, data=b"hello"), dial(listener)
    name = a.getsockname()
    await queued(listener, 2)
    offered = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        offered.append((pending.caller_id, pending.group))
        pending.group = "gold"
        return ACCEPT

    for _ in range(2):
        with raises(InvalidGroupError, name) as caught:
            await take(listener, condition)
        assert "'gold'" in caught.value.reason
        assert waiting(listener) == [(name, Status.QUEUED)]
        assert wire(a) == "open"
    assert books(listener) == {"taken": 1, "offers": 2, "pending": 1, "backlog": 1}

    # A group belongs to the offer whose condition named it.
    assert offered == [(name, None), (name, None)]
    await converse(await take(listener), a, after=b"hello")
    await converse(await take(listener, accept), b)


@either
async def test_v2_group_without_accept(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A group matters for ACCEPT only: DEFER and REJECT go through with any."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    verdicts: list[AnyVerdict] = [DEFER, REJECT]

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.group = "gold"
        return verdicts.pop(0)

    with raises(ConnectionDeferredError, name):
        await take(listener, condition)
    with raises(ConnectionRejectedError, name):
        await take(listener, condition)
    assert await wire_end(client) == "reset"
    assert books(listener) == {"taken": 1, "offers": 2, "deferrals": 1, "rejected": 1}


@either
@pytest.mark.parametrize("condition", [0x10, "accept", object(), ACCEPT, ()], ids=repr)
async def test_v3_condition_not_callable(
    listener: Listener[Stream], dial: Dial, take: Take, condition: Any
) -> None:
    """A condition that cannot be called is EFAULT, before the deque or the kernel is touched."""
    client = dial(listener)
    await queued(listener, 1)
    with raises(ConditionNotCallableError):
        await take(listener, condition)
    assert books(listener) == {"backlog": 1}
    assert wire(client) == "open"
    await converse(await take(listener), client)


@either
async def test_v4_no_global_error(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """The error is a part of the result: no errno that a condition leaves behind gets into it."""
    a, b, c = (dial(listener) for _ in range(3))
    names = [each.getsockname() for each in (a, b, c)]
    await queued(listener, 3)

    def failing(verdict: AnyVerdict) -> Callable[[PendingTransport], AnyVerdict]:
        def condition(_pending: PendingTransport) -> AnyVerdict:
            ctypes.set_errno(errno.EMFILE)
            with contextlib.suppress(OSError):
                os.close(-1)
            with contextlib.suppress(BlockingIOError):
                raise BlockingIOError(errno.EAGAIN, "not an empty queue")
            return verdict

        return condition

    await converse(await take(listener, failing(ACCEPT)), a)
    with raises(ConnectionRejectedError, names[1]) as first:
        await take(listener, failing(REJECT))
    with raises(ConnectionRejectedError, names[2]) as second:
        await take(listener, failing(REJECT))

    assert [caught.value.__context__ for caught in (first, second)] == [None, None]
    check(first.value, ConnectionRejectedError, names[1], Reject().reason)
    assert books(listener) == {"taken": 3, "offers": 3, "accepted": 1, "rejected": 2}


# -- L: what can be listened on


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
async def test_l1_not_listening(dial: Dial, *, bound: bool) -> None:
    """A socket that does not listen is EINVAL; it stays as it was, and its owner's."""
    with socket.socket() as sock:
        if bound:
            sock.bind(("127.0.0.1", 0))
        with raises(NotListeningError):
            Listener.from_socket(sock)
        assert sock.getblocking()
        sock.listen()
        async with Listener[Stream].from_socket(sock) as listener:
            client = dial(listener)
            await converse(await listener.accept(), client)


@either
async def test_l1_listens_no_more(dial: Dial, take: Take) -> None:
    """A socket shut down behind the listener's back is EINVAL; the condition is not asked."""
    sock = socket.create_server(("127.0.0.1", 0))
    async with Listener[Stream].from_socket(sock) as listener:
        client = dial(listener)
        await queued(listener, 1)
        sock.shutdown(socket.SHUT_RDWR)
        condition = Condition(ACCEPT)
        for _ in range(2):
            with raises(NotListeningError):
                await take(listener, condition)
        assert condition.offered == []
        assert books(listener) == {}
        assert await wire_end(client) == "reset"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
async def test_l2_datagram(family: socket.AddressFamily) -> None:
    """A datagram socket is EOPNOTSUPP, and stays its owner's."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        with raises(NotStreamSocketError):
            Listener.from_socket(sock)
        assert sock.fileno() >= 0
        assert sock.getblocking()


async def test_l3_not_a_socket() -> None:
    """A closed socket, a pipe and an epoll set are ENOTSOCK; a bare number is a TypeError."""
    closed = socket.socket()
    closed.close()
    with raises(NotASocketError):
        Listener.from_socket(closed)

    r, w = os.pipe()
    with select.epoll() as event_handle:
        for other in (r, event_handle.fileno()):
            with socket.socket() as sock:
                os.dup2(other, sock.fileno())
                with raises(NotASocketError):
                    Listener.from_socket(sock)
                assert sock.fileno() >= 0
    os.close(r)
    os.close(w)

    for number in (0, -1):
        with pytest.raises(TypeError, match=r"takes a socket\.socket"):
            Listener.from_socket(number)  # type: ignore[arg-type]


@either
async def test_l3_closed_behind_our_back(take: Take) -> None:
    """A descriptor that somebody closed is ENOTSOCK (EBADF); closing the listener still works."""
    sock = socket.create_server(("127.0.0.1", 0))
    listener = Listener[Stream].from_socket(sock)
    os.close(sock.fileno())
    condition = Condition(ACCEPT)
    with raises(NotASocketError):
        await take(listener, condition)
    assert condition.offered == []
    listener.close()
    await listener.wait_closed()
    with raises(ListenerClosedError):
        await take(listener)


@either
async def test_l3_not_a_socket_any_more(take: Take) -> None:
    """A descriptor that became something else behind the listener's back is ENOTSOCK."""
    sock = socket.create_server(("127.0.0.1", 0))
    async with Listener[Stream].from_socket(sock) as listener:
        r, w = os.pipe()
        os.write(w, b"x")  # readable, as with somebody in the queue
        os.dup2(r, sock.fileno())
        os.close(r)
        os.close(w)
        with raises(NotASocketError):
            await take(listener)
        assert listener.pending == ()


@either
async def test_l3_after_close(listener: Listener[Stream], take: Take) -> None:
    """After the listener's own close() every call is EINVAL, before any other check."""
    listener.close()
    with raises(ListenerClosedError):
        await take(listener)
    with raises(ListenerClosedError):
        await take(listener, 7)
    with raises(ListenerClosedError):
        await listener.wait_pending()
    assert books(listener) == {}


@either
async def test_l4_accepted_socket(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """An accepted connection cannot accept: EINVAL, and it goes on."""
    client = dial(listener)
    await queued(listener, 1)
    stream = await take(listener)
    fd = os.dup(stream.get_extra_info("socket").fileno())
    with socket.socket(fileno=fd) as accepted, raises(NotListeningError):
        Listener.from_socket(accepted)
    await converse(stream, client)


# -- F: bad arguments


@either
@silent_or_not
async def test_f1_too_long(listener: Listener[Stream], dial: Dial, take: Take, sent: bytes) -> None:
    """What does not fit its buffer is EFAULT and touches nothing: here, callee data."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    await queued(listener, 1)
    with raises(CalleeDataError, name):
        await take(listener, Condition(Reject(data=b"x" * 4097)))
    assert waiting(listener) == [(name, Status.QUEUED)]
    assert books(listener) == {"taken": 1, "offers": 1, "pending": 1}
    assert wire(client) == "open"

    full = b"x" * 4096
    with raises(ConnectionRejectedError, name):
        await take(listener, Condition(Reject(data=full)))
    received = b""
    while (chunk := await wire_end(client)) != "eof":
        assert isinstance(chunk, bytes)
        received += chunk
    assert received == full
    client.close()
    await until(lambda: not listener.statistics().rejecting)
    assert books(listener) == {"taken": 1, "offers": 2, "rejected": 1}


@either
async def test_f2_bad_argument_first(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A bad condition is EFAULT also with a deferred head or a loss to report, which stays."""
    client = dial(listener)
    name = client.getsockname()
    await queued(listener, 1)
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    with raises(ConditionNotCallableError):
        await take(listener, 0x10)
    assert waiting(listener) == [(name, Status.DEFERRED)]
    assert books(listener) == {"taken": 1, "offers": 1, "deferrals": 1, "pending": 1}

    reset(client)
    await until(lambda: listener.statistics().reset)
    with raises(ConditionNotCallableError):
        await take(listener, 0x10)
    with raises(PendingResetError, name):
        await take(listener, accept)
    assert books(listener) == {"taken": 1, "offers": 1, "deferrals": 1, "reset": 1}


@either
async def test_f3_bad_argument_on_empty(listener: Listener[Stream], take: Take) -> None:
    """With nobody pending a bad condition is EFAULT at once: not EWOULDBLOCK, and no waiting."""
    with raises(ConditionNotCallableError):
        await take(listener, 0x10)
    assert listener.cancel_accept() == 0
    assert books(listener) == {}


# -- B: waiting


async def test_b1_nobody(listener: Listener[Stream]) -> None:
    """accept_nowait() with nobody pending is EWOULDBLOCK; the condition is not asked."""
    condition = Condition(ACCEPT)
    for each in (condition, None):
        with raises(NoPendingError):
            listener.accept_nowait(each)
    assert condition.offered == []
    assert books(listener) == {}


async def test_b2_caller_comes_later(listener: Listener[Stream], dial: Dial) -> None:
    """accept() waits for a caller; its condition is then asked in the loop's thread."""
    threads = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        threads.append(threading.current_thread())
        return ACCEPT

    call = asyncio.ensure_future(listener.accept(condition))
    await caught_up()
    assert not call.done()
    assert threads == []
    client = dial(listener)
    stream = await call
    assert threads == [threading.current_thread()]
    assert stream.caller_id == client.getsockname()
    assert books(listener) == {"taken": 1, "offers": 1, "accepted": 1, "streams": 1}
    await converse(stream, client)


async def test_b3_closed_while_waiting(listener: Listener[Stream]) -> None:
    """Closing the listener ends the calls that wait, with EINVAL."""
    condition = Condition()
    calls: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(listener.accept(condition)),
        asyncio.ensure_future(listener.accept()),
        asyncio.ensure_future(listener.wait_pending()),
    ]
    await caught_up()
    assert not any(call.done() for call in calls)
    listener.close()
    for error in await asyncio.gather(*calls, return_exceptions=True):
        check(error, ListenerClosedError, None, None)
    assert condition.offered == []
    assert books(listener) == {}


async def test_b4_cancel_accept(listener: Listener[Stream], dial: Dial) -> None:
    """cancel_accept() ends the calls that wait, with EINTR, and harms the listener in no way."""
    assert listener.cancel_accept() == 0
    calls: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(listener.accept()),
        asyncio.ensure_future(listener.accept(accept)),
        asyncio.ensure_future(listener.wait_pending()),
    ]
    await caught_up()
    assert listener.cancel_accept() == 3
    assert listener.cancel_accept() == 0
    for error in await asyncio.gather(*calls, return_exceptions=True):
        check(error, AcceptInterruptedError, None, None)
    assert books(listener) == {}

    call = asyncio.ensure_future(listener.accept())
    await caught_up()
    client = dial(listener)
    await converse(await call, client)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("by", ["cancel_accept", "cancel"])
async def test_b4_nobody_is_lost(
    listener: Listener[Stream], dial: Dial, by: str, turns: int
) -> None:
    """A wait that is cancelled around the moment a caller comes either has it or leaves it."""
    call = asyncio.ensure_future(listener.accept())
    await caught_up()
    client = dial(listener)
    for _ in range(turns):
        await asyncio.sleep(0)
    if by == "cancel":
        call.cancel()
    else:
        listener.cancel_accept()
    await asyncio.wait([call])

    if call.cancelled():
        assert by == "cancel"
        stream = listener.accept_nowait()
    elif (error := call.exception()) is not None:
        assert by == "cancel_accept"
        check(error, AcceptInterruptedError, None, None)
        stream = listener.accept_nowait()
    else:
        stream = call.result()
    assert stream.caller_id == client.getsockname()
    assert books(listener) == {"taken": 1, "offers": 1, "accepted": 1, "streams": 1}
    await converse(stream, client)


async def test_b4_deciding_is_not_waiting(listener: Listener[Stream], dial: Dial) -> None:
    """cancel_accept() leaves a call alone that has found a connection."""
    client = dial(listener)
    asked, may = asyncio.Event(), asyncio.Event()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        asked.set()
        await may.wait()
        return ACCEPT

    call = asyncio.ensure_future(listener.accept(condition))
    await asked.wait()
    assert listener.cancel_accept() == 0
    may.set()
    await converse(await call, client)


# -- P: what a condition sees


class Seen:
    """A condition that accepts, and keeps everything it saw."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}

    def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Look at everything."""
        names = ("caller_id", "caller_data", "callee_id", "group", "callback_data", "deferrals")
        self.parameters = {name: getattr(pending, name) for name in names}
        self.parameters["ip"] = str(pending.ip)
        self.parameters["callee_data"] = bytes(pending.callee_data)
        self.parameters["capacity"] = pending.callee_data.capacity
        self.parameters["credentials"] = pending.credentials
        self.parameters["peername"] = pending.get_extra_info("peername")
        self.parameters["sockname"] = pending.get_extra_info("sockname")
        self.parameters["thread"] = threading.get_ident()
        return ACCEPT


@either
@silent_or_not
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - what a wildcard does
async def test_p1_ipv4(dial: Dial, take: Take, sent: bytes, host: str) -> None:
    """A condition sees both addresses, what was sent along, and the caller's own data."""
    async with await listen(host, 0) as listener:
        address = ("127.0.0.1", listener.sockname[1])
        client = dial(address, data=sent)
        await queued(listener, 1)
        seen, data = Seen(), object()
        stream = await take(listener, seen, data)

        assert seen.parameters == {
            "caller_id": client.getsockname(),
            "caller_data": sent or None,
            "callee_id": address,
            "group": None,
            "callback_data": data,
            "deferrals": 0,
            "ip": "127.0.0.1",
            "callee_data": b"",
            "capacity": 4096,
            "credentials": None,
            "peername": client.getsockname(),
            "sockname": address,
            "thread": threading.get_ident(),
        }
        assert seen.parameters["callback_data"] is data
        assert stream.caller_id == client.getsockname()
        assert stream.callee_id == address
        await converse(stream, client, after=sent)


@either
@silent_or_not
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_p2_ipv6(dial: Dial, take: Take, sent: bytes, host: str) -> None:
    """IPv6 addresses are whole, those of errors and of wildcard binds included."""
    async with await listen(host, 0) as listener:
        address = ("::1", listener.sockname[1], 0, 0)
        a, b = dial(address, data=sent), dial(address, data=sent)
        names = [each.getsockname() for each in (a, b)]
        assert [len(name) for name in names] == [4, 4]
        await queued(listener, 2)
        seen = Seen()
        stream = await take(listener, seen)
        with raises(ConnectionRejectedError, names[1]):
            await take(listener, reject)

        expected = {
            "caller_id": names[0],
            "caller_data": sent or None,
            "callee_id": address,
            "ip": "::1",
            "capacity": 4096,
            "credentials": None,
            "peername": names[0],
            "sockname": address,
        }
        assert {name: seen.parameters[name] for name in expected} == expected
        assert stream.callee_id == address
        assert await wire_end(b) == "reset"
        await converse(stream, a, after=sent)


@either
@silent_or_not
async def test_p3_no_callee_data(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """Callee data that is empty, or was made so again, adds nothing to either verdict."""
    a, b = dial(listener, data=sent), dial(listener, data=sent)
    await queued(listener, 2)
    verdicts: list[AnyVerdict] = [ACCEPT, REJECT]

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.set(b"never mind")
        pending.callee_data.set(b"")
        return verdicts.pop(0)

    stream = await take(listener, condition)
    with raises(ConnectionRejectedError, b.getsockname()):
        await take(listener, condition)
    assert await wire_end(b) == "reset"
    assert wire(a) == "open"
    assert listener.statistics().rejecting == 0
    await converse(stream, a, after=sent)


@either
@silent_or_not
async def test_p3_callee_data(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """Callee data is the first thing an accepted caller reads, and the last a rejected one does."""
    a, b = dial(listener, data=sent), dial(listener, data=sent)
    name = b.getsockname()
    await queued(listener, 2)
    verdicts: list[AnyVerdict] = [ACCEPT, REJECT]

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.write(b"a word ")
        pending.callee_data.write(b"from us")
        return verdicts.pop(0)

    stream = await take(listener, condition)
    assert await wire_end(a) == b"a word from us"
    with raises(ConnectionRejectedError, name):
        await take(listener, condition)
    assert await wire_end(b) == b"a word from us"
    assert await wire_end(b) == "eof"
    assert books(listener) == {
        "taken": 2,
        "offers": 2,
        "accepted": 1,
        "rejected": 1,
        "rejecting": 1,
        "streams": 1,
    }
    b.close()
    await until(lambda: not listener.statistics().rejecting)
    assert listener.statistics().cut_short == 0
    await converse(stream, a, after=sent)


@either
async def test_p3_callee_data_of_a_deferral(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """A deferral sends nothing: callee data goes with a verdict."""
    client = dial(listener)
    await queued(listener, 1)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.set(b"welcome")
        return ACCEPT if pending.deferrals else DEFER

    with raises(ConnectionDeferredError, client.getsockname()):
        await take(listener, condition)
    await caught_up()
    assert wire(client) == "open"
    stream = await take(listener, condition)
    assert await wire_end(client) == b"welcome"
    await converse(stream, client)


# -- R: calls from inside a condition


@either
@pytest.mark.parametrize("verdict", [ACCEPT, REJECT, DEFER])
async def test_r1_nested_call(
    listener: Listener[Stream], dial: Dial, take: Take, verdict: AnyVerdict
) -> None:
    """A plain condition that accepts from its own listener gets EINPROGRESS; its verdict stands."""
    a, b = dial(listener), dial(listener)
    names = [each.getsockname() for each in (a, b)]
    await queued(listener, 2)

    def nested(_pending: PendingTransport) -> AnyVerdict:
        for condition in (None, accept, 7):  # EINPROGRESS comes before EFAULT
            with raises(AcceptInProgressError):
                listener.accept_nowait(condition)  # type: ignore[arg-type]
        assert books(listener)["backlog"] == 1
        return verdict

    if verdict is ACCEPT:
        await converse(await take(listener, nested), a)
        assert listener.pending == ()
    elif verdict is REJECT:
        with raises(ConnectionRejectedError, names[0]):
            await take(listener, nested)
        assert await wire_end(a) == "reset"
        assert listener.pending == ()
    else:
        with raises(ConnectionDeferredError, names[0]):
            await take(listener, nested)
        assert waiting(listener) == [(names[0], Status.DEFERRED)]
        await converse(await take(listener), a)
    assert wire(b) == "open"
    stream = await take(listener)
    assert stream.caller_id == names[1]
    await converse(stream, b)


async def test_r1_nested_in_async(listener: Listener[Stream], dial: Dial) -> None:
    """So does an async condition, by either call, before and after it has waited."""
    a, b = dial(listener), dial(listener)
    await queued(listener, 2)

    async def nested(_pending: PendingTransport) -> AnyVerdict:
        for _ in range(2):
            with raises(AcceptInProgressError):
                listener.accept_nowait()
            with raises(AcceptInProgressError):
                await listener.accept()
            await asyncio.sleep(0)
        return ACCEPT

    await converse(await listener.accept(nested), a)
    await converse(await listener.accept(), b)
    assert books(listener) == {"taken": 2, "offers": 2, "accepted": 2}


@either
async def test_r1_unhandled(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Let through by the condition, EINPROGRESS is its failure: rejected, the next untouched."""
    a, b = dial(listener), dial(listener)
    name = a.getsockname()
    await queued(listener, 2)

    def nested(_pending: PendingTransport) -> AnyVerdict:
        listener.accept_nowait()
        return ACCEPT

    with raises(AcceptInProgressError) as caught:
        await take(listener, nested)
    assert [repr(name) in note for note in caught.value.__notes__] == [True]
    assert await wire_end(a) == "reset"
    assert books(listener) == {"taken": 1, "offers": 1, "rejected": 1, "backlog": 1}
    await converse(await take(listener), b)


@either
async def test_r1_task_of_a_condition_is_free(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """A task that a condition starts is no nested call: it gets the next connection."""
    a, b = dial(listener), dial(listener)
    await queued(listener, 2)
    calls: list[asyncio.Task[Stream]] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        calls.append(asyncio.ensure_future(listener.accept()))
        return ACCEPT

    first = await take(listener, condition)
    second = await calls[0]
    assert [each.caller_id for each in (first, second)] == [a.getsockname(), b.getsockname()]
    await converse(first, a)
    await converse(second, b)


@either
async def test_r1_other_listener_is_free(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """Only the same listener is busy: a condition may accept from another."""
    async with await listen("127.0.0.1", 0) as other:
        a, b = dial(listener), dial(other)
        await queued(listener, 1)
        await queued(other, 1)
        streams = []

        def condition(_pending: PendingTransport) -> AnyVerdict:
            streams.append(other.accept_nowait())
            return ACCEPT

        streams.append(await take(listener, condition))
        await converse(streams[0], b)
        await converse(streams[1], a)


@either
@silent_or_not
@pytest.mark.parametrize("before", [0, 1], ids=["first-offer", "deferred-before"])
async def test_r2_close_and_accept(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes, before: int
) -> None:
    """A condition that closes the listener and accepts is obeyed: the stream works."""
    a, b = dial(listener, data=sent), dial(listener, data=sent)
    await queued(listener, 2)

    def condition(pending: PendingTransport) -> AnyVerdict:
        if pending.deferrals < before:
            return DEFER
        listener.close()
        return ACCEPT

    for _ in range(before):
        with raises(ConnectionDeferredError, a.getsockname()):
            await take(listener, condition)
    stream = await take(listener, condition)
    assert await wire_end(b) == "reset"
    assert listener.pending == ()
    counts = books(listener)
    assert counts.pop("deferrals", 0) == before
    assert counts == {"taken": 1, "offers": before + 1, "accepted": 1, "streams": 1}
    with raises(ListenerClosedError):
        await take(listener)
    await converse(stream, a, after=sent)
    await listener.wait_closed()


@either
@silent_or_not
async def test_r2_close_and_reject(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """So is one that rejects: the call says so, not that the listener is closed."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    await queued(listener, 1)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        return REJECT

    with raises(ConnectionRejectedError, name):
        await take(listener, condition)
    assert await wire_end(client) == "reset"
    assert books(listener) == {"taken": 1, "offers": 1, "rejected": 1}


async def test_r2_close_and_accept_async(listener: Listener[Stream], dial: Dial) -> None:
    """So is an async one, also if it goes on for a while; other decisions end."""
    a, b = dial(listener), dial(listener)
    await queued(listener, 2)
    both = asyncio.Event()

    async def closing(_pending: PendingTransport) -> AnyVerdict:
        await both.wait()
        listener.close()
        await asyncio.sleep(0)
        return ACCEPT

    async def other(_pending: PendingTransport) -> AnyVerdict:
        both.set()
        await asyncio.Event().wait()
        return ACCEPT

    first = asyncio.ensure_future(listener.accept(closing))
    await until(lambda: listener.statistics().deciding)
    second = asyncio.ensure_future(listener.accept(other))
    stream = await first
    with raises(ListenerClosedError, b.getsockname()):
        await second
    assert await wire_end(b) == "reset"
    assert listener.pending == ()
    assert books(listener) == {"taken": 2, "offers": 2, "accepted": 1, "closed": 1, "streams": 1}
    await converse(stream, a)


@either
@silent_or_not
@pytest.mark.parametrize("before", [0, 1], ids=["first-offer", "deferred-before"])
async def test_r3_close_and_defer(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes, before: int
) -> None:
    """A condition that closes the listener and defers: the caller is reset, the call is EINVAL."""
    client = dial(listener, data=sent)
    name = client.getsockname()
    await queued(listener, 1)

    def condition(pending: PendingTransport) -> AnyVerdict:
        if pending.deferrals == before:
            listener.close()
        return DEFER

    for _ in range(before):
        with raises(ConnectionDeferredError, name):
            await take(listener, condition)
    with raises(ListenerClosedError, name):
        await take(listener, condition)
    assert await wire_end(client) == "reset"
    assert listener.pending == ()
    counts = books(listener)
    counts.pop("deferrals", None)
    assert counts == {"taken": 1, "offers": before + 1, "closed": 1}
    await listener.wait_closed()


async def test_r3_close_and_defer_async(listener: Listener[Stream], dial: Dial) -> None:
    """So with an async condition, and nothing of the decision is left."""
    client = dial(listener)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        await asyncio.sleep(0)
        return DEFER

    with raises(ListenerClosedError, client.getsockname()):
        await listener.accept(condition)
    assert await wire_end(client) == "reset"
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "offers": 1, "closed": 1}
    await listener.wait_closed()


@either
async def test_r3_close_and_no_verdict(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Closed and then no verdict at all: reset as well, for there is no place to keep."""
    client = dial(listener)
    await queued(listener, 1)

    def condition(_pending: PendingTransport) -> Any:
        listener.close()
        return 7

    with raises(InvalidVerdictError, client.getsockname()):
        await take(listener, condition)
    assert await wire_end(client) == "reset"
    assert listener.pending == ()
    assert books(listener) == {"taken": 1, "offers": 1, "closed": 1}


# -- E: events, and what a stream inherits


@either
async def test_e1_events_inherited(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """A stream reports to the listener's callback: WRITE at once, READ for data, CLOSE last."""
    log, late = Log(), Log()
    listener.on(ANY_EVENT, log)
    client = dial(listener)
    await until(lambda: log.told)
    assert log.told == [(listener, Event.PENDING, None)]
    stream = await take(listener, accept)
    assert log.of(stream) == []  # never inside the call that caused it
    await until(lambda: log.of(stream))
    assert log.of(stream) == [Event.WRITE]

    listener.on(ANY_EVENT, late)
    client.sendall(b"hello")
    await until(lambda: len(log.of(stream)) == 2)
    assert log.of(stream)[1:] == [Event.READ]
    assert await stream.read(10) == b"hello"
    client.close()
    await until(lambda: Event.CLOSE in log.of(stream))
    assert await stream.read(10) == b""
    await caught_up()
    assert log.of(stream) == [Event.WRITE, Event.READ, Event.READ, Event.CLOSE]
    assert {error for _, _, error in log.told} == {None}
    assert late.of(stream) == []  # as of the accept
    stream.close()


@either
async def test_e1_event_object(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """The same by an event object, which a stream inherits: it is read and cleared at once."""
    record = listener.watch(ANY_EVENT)
    client = dial(listener)
    assert await record.wait() == [(listener, Event.PENDING, None)]
    assert record.read() == []
    stream = await take(listener, accept)
    late = listener.watch(ANY_EVENT)
    assert record.read() == [(stream, Event.WRITE, None)]

    client.sendall(b"hello")
    assert await record.wait() == [(stream, Event.READ, None)]
    assert await stream.read(10) == b"hello"
    client.send(b"!", socket.MSG_OOB)
    assert await record.wait() == [(stream, Event.OOB, None)]
    assert stream.read_oob() == b"!"
    client.close()
    assert await record.wait() == [(stream, Event.READ, None), (stream, Event.CLOSE, None)]
    assert await stream.read(10) == b""
    await caught_up()
    assert record.read() == late.read() == []
    stream.close()


@either
async def test_e2_as_of_the_accept(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """What changed between DEFER and ACCEPT counts: a stream inherits as of the accept."""
    before, after = Log(), Log()
    handle = listener.on(Event.PENDING | Event.READ | Event.WRITE, before)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    client = dial(listener)
    await queued(listener, 1)
    with raises(ConnectionDeferredError, client.getsockname()):
        await take(listener, defer)
    listener.on(Event.WRITE, after)
    handle.cancel()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    client.sendall(b"hello")

    stream = await take(listener, accept)
    await until(lambda: after.told)
    await caught_up()
    assert after.told == [(stream, Event.WRITE, None)]
    assert before.of(stream) == []
    options = stream.get_extra_info("socket")
    assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    await converse(stream, client, after=b"hello")


LINGER = struct.pack("ii", 1, 3)
TIMEOUT = struct.pack("ll", 2, 0)
OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.SOL_SOCKET, socket.SO_LINGER, LINGER),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEOUT),
    (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
)


@either
@pytest.mark.parametrize("how", ["listen", "setsockopt", "queued"])
async def test_e4_options_inherited(dial: Dial, take: Take, how: str) -> None:
    """A stream has the listener's options, however and whenever they were set; it listens not."""
    async with await listen("127.0.0.1", 0, options=OPTIONS if how == "listen" else ()) as listener:
        if how == "setsockopt":
            for option in OPTIONS:
                listener.setsockopt(*option)
        client = dial(listener)
        await queued(listener, 1)
        if how == "queued":
            for option in OPTIONS:
                listener.setsockopt(*option)
        stream = await take(listener, accept)

        accepted = stream.get_extra_info("socket")
        for each in (accepted, listener):
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == LINGER
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == TIMEOUT
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
        await converse(stream, client)


@either
async def test_e5_pending_rearmed_by_accept(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """PENDING is told once, not again for the next arrival, and again after an accept call."""
    log = Log()
    listener.on(Event.PENDING, log)
    a = dial(listener)
    await until(lambda: log.told)
    b = dial(listener)
    await queued(listener, 2)
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)]

    first = await take(listener, accept)
    assert len(log.told) == 1
    await until(lambda: len(log.told) == 2)
    second = await take(listener, accept)
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)] * 2
    await converse(first, a)
    await converse(second, b)


@either
async def test_e6_pending_rearmed_by_reject(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """A rejection arms PENDING again, and it is told of who is next."""
    log = Log()
    listener.on(Event.PENDING, log)
    a, b = dial(listener), dial(listener)
    await queued(listener, 2)
    await until(lambda: log.told)
    await caught_up()
    assert len(log.told) == 1
    with raises(ConnectionRejectedError, a.getsockname()):
        await take(listener, reject)
    await until(lambda: len(log.told) == 2)
    with raises(ConnectionRejectedError, b.getsockname()):
        await take(listener, reject)
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)] * 2
    assert [await wire_end(client) for client in (a, b)] == ["reset"] * 2


@either
async def test_e6_pending_rearmed_by_a_loss(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """So does the report of a loss, and a verdict that is none: the connection is still due."""
    log = Log()
    listener.on(Event.PENDING, log)
    a, b = dial(listener), dial(listener)
    names = [each.getsockname() for each in (a, b)]
    await queued(listener, 2)
    await until(lambda: log.told)
    reset(a)
    with raises(PendingResetError, names[0]):
        await take(listener)
    await until(lambda: len(log.told) == 2)
    with raises(InvalidVerdictError, names[1]):
        await take(listener, lambda _: 7)
    await until(lambda: len(log.told) == 3)
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)] * 3
    await converse(await take(listener), b)


@either
async def test_e7_pending_not_rearmed_by_defer(
    listener: Listener[Stream], dial: Dial, take: Take
) -> None:
    """A deferral does not arm PENDING, nor does an arrival behind it; the verdict does."""
    log = Log()
    listener.on(Event.PENDING, log)
    a = dial(listener)
    name = a.getsockname()
    await until(lambda: log.told)
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    await caught_up()
    assert len(log.told) == 1
    b = dial(listener)
    await queued(listener, 1)
    await caught_up()
    assert len(log.told) == 1
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    await caught_up()
    assert len(log.told) == 1

    stream = await take(listener, accept)
    await until(lambda: len(log.told) == 2)
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)] * 2
    await converse(stream, a)
    await converse(await take(listener), b)


async def test_e8_pending_after_wouldblock(listener: Listener[Stream], dial: Dial) -> None:
    """A call that found nobody leaves PENDING armed: the next caller is told of."""
    log = Log()
    listener.on(Event.PENDING, log)
    with raises(NoPendingError):
        listener.accept_nowait()
    await caught_up()
    assert log.told == []
    a = dial(listener)
    await until(lambda: log.told)
    await converse(listener.accept_nowait(), a)
    with raises(NoPendingError):
        listener.accept_nowait()
    await caught_up()
    assert len(log.told) == 1
    b = dial(listener)
    await until(lambda: len(log.told) == 2)
    await converse(listener.accept_nowait(), b)
    assert log.told == [(listener, Event.PENDING, None)] * 2


async def test_e8_late_subscriber(listener: Listener[Stream], dial: Dial) -> None:
    """Who subscribes with somebody pending is told; those who were told are not told again."""
    client = dial(listener)
    await queued(listener, 1)
    await caught_up()
    logs = [Log(), Log()]
    for log in logs:
        listener.on(Event.PENDING, log)
        assert log.told == []  # never inside the call
        await caught_up()
    assert [log.told for log in logs] == [[(listener, Event.PENDING, None)]] * 2
    await converse(await listener.accept(), client)
    assert [len(log.told) for log in logs] == [1, 1]


async def test_e8_event_object(listener: Listener[Stream], dial: Dial) -> None:
    """So with event objects: what is so already is recorded at once, and not twice in one."""
    record = listener.watch(Event.PENDING)
    with raises(NoPendingError):
        listener.accept_nowait()
    client = dial(listener)
    assert await record.wait() == [(listener, Event.PENDING, None)]
    late = listener.watch(Event.PENDING)
    assert late.read() == [(listener, Event.PENDING, None)]
    await caught_up()
    assert late.read() == record.read() == []
    await converse(listener.accept_nowait(), client)
    assert late.read() == record.read() == []


@either
@silent_or_not
async def test_e9_no_events_of_the_undecided(
    listener: Listener[Stream], dial: Dial, take: Take, sent: bytes
) -> None:
    """No event of a connection without a verdict, or with REJECT, ever reaches the callback."""
    log = Log()
    listener.on(ANY_EVENT, log)
    client = dial(listener, data=sent)
    name = client.getsockname()
    await until(lambda: log.told)
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    client.sendall(b"more")
    client.shutdown(socket.SHUT_WR)
    await until(lambda: listener.pending[0].peer_closed)
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)]
    with raises(ConnectionRejectedError, name):
        await take(listener, reject)
    assert await wire_end(client) == "reset"
    await caught_up()
    assert log.told == [(listener, Event.PENDING, None)]

    other = dial(listener)
    await until(lambda: len(log.told) == 2)
    stream = await take(listener, accept)
    await until(lambda: len(log.told) == 3)
    assert log.told[1:] == [(listener, Event.PENDING, None), (stream, Event.WRITE, None)]
    await converse(stream, other)


# -- O: the option


async def test_o1_no_conditional_accept() -> None:
    """Asking before the handshake, which cannot be done yet, is refused; nothing is left open."""
    before = descriptors()
    with pytest.raises(NotImplementedError, match="conditional_accept"):
        await listen("127.0.0.1", 0, conditional_accept=True)
    assert descriptors() == before


SO_CONDITIONAL_ACCEPT = 0x3002
"""As winsock2.h has it."""


@either
async def test_o1_option(listener: Listener[Stream], dial: Dial, take: Take) -> None:
    """Winsock's option is ENOPROTOOPT to set and to get; verdicts are as without it."""
    with pytest.raises(OSError, match=str(SO_CONDITIONAL_ACCEPT)) as caught:
        listener.setsockopt(socket.SOL_SOCKET, SO_CONDITIONAL_ACCEPT, 1)
    assert caught.value.errno == errno.ENOPROTOOPT
    with pytest.raises(OSError, match="Protocol not available") as caught:
        listener.getsockopt(socket.SOL_SOCKET, SO_CONDITIONAL_ACCEPT)
    assert caught.value.errno == errno.ENOPROTOOPT

    client = dial(listener)  # connected before anybody is asked
    name = client.getsockname()
    await queued(listener, 1)
    with raises(ConnectionDeferredError, name):
        await take(listener, defer)
    assert wire(client) == "open"
    with raises(ConnectionRejectedError, name):
        await take(listener, reject)
    assert await wire_end(client) == "reset"
    assert books(listener) == {"taken": 1, "offers": 2, "deferrals": 1, "rejected": 1}
