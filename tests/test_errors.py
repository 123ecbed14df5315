"""Every error of an accept call: what it is, and how it really comes about."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import os
import pickle
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    AcceptError,
    AcceptInProgressError,
    AcceptInterruptedError,
    AnyVerdict,
    BuffersExhaustedError,
    CalleeDataError,
    Condition,
    ConditionNotCallableError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Defer,
    DescriptorsExhaustedError,
    Event,
    InvalidGroupError,
    InvalidVerdictError,
    Listener,
    ListenerClosedError,
    NetworkDownError,
    NoPendingError,
    NotASocketError,
    NotListeningError,
    NotStreamSocketError,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    QualityOfServiceError,
    Reject,
    Status,
    Stream,
    listen,
)
from condaccept.testing import ScriptedSocket, memory_listener
from tests.support import (
    LIMIT,
    Dial,
    accept,
    defer,
    queued,
    reject,
    reset,
    turns,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

E = TypeVar("E", bound=BaseException)


@attrs.frozen
class Row:
    """A row of the table of errors."""

    kind: type[AcceptError]
    winsock: str
    code: int
    also: type[Exception] | None


TABLE = [
    Row(ConnectionRejectedError, "WSAECONNREFUSED", errno.ECONNREFUSED, ConnectionRefusedError),
    Row(ConnectionDeferredError, "WSATRY_AGAIN", errno.EAGAIN, BlockingIOError),
    Row(PendingResetError, "WSAECONNRESET", errno.ECONNRESET, ConnectionResetError),
    Row(PendingExpiredError, "WSAEACCES", errno.EACCES, PermissionError),
    Row(QualityOfServiceError, "WSAEOPNOTSUPP", errno.EOPNOTSUPP, None),
    Row(NoPendingError, "WSAEWOULDBLOCK", errno.EWOULDBLOCK, BlockingIOError),
    Row(AcceptInterruptedError, "WSAEINTR", errno.EINTR, InterruptedError),
    Row(AcceptInProgressError, "WSAEINPROGRESS", errno.EINPROGRESS, RuntimeError),
    Row(ListenerClosedError, "WSAEINVAL", errno.EINVAL, ValueError),
    Row(NotListeningError, "WSAEINVAL", errno.EINVAL, ValueError),
    Row(InvalidVerdictError, "WSAEINVAL", errno.EINVAL, ValueError),
    Row(InvalidGroupError, "WSAEINVAL", errno.EINVAL, ValueError),
    Row(ConditionNotCallableError, "WSAEFAULT", errno.EFAULT, TypeError),
    Row(CalleeDataError, "WSAEFAULT", errno.EFAULT, ValueError),
    Row(DescriptorsExhaustedError, "WSAEMFILE", errno.EMFILE, None),
    Row(BuffersExhaustedError, "WSAENOBUFS", errno.ENOBUFS, None),
    Row(NetworkDownError, "WSAENETDOWN", errno.ENETDOWN, None),
    Row(NotASocketError, "WSAENOTSOCK", errno.ENOTSOCK, None),
    Row(NotStreamSocketError, "WSAEOPNOTSUPP", errno.EOPNOTSUPP, None),
]

every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind.__name__)
either_call = pytest.mark.parametrize("how", ["accept", "accept_nowait"])


async def attempt(listener: Listener[Any], how: str, condition: Any = None) -> Any:
    """Make either call."""
    if how == "accept":
        async with asyncio.timeout(LIMIT):
            return await listener.accept(condition)
    return listener.accept_nowait(condition)


async def failure(
    kind: type[E], listener: Listener[Any], how: str = "accept", condition: Any = None
) -> E:
    """Make a call that raises exactly *kind*, and, if it can, yields before it does."""
    turned: list[bool] = []
    asyncio.get_running_loop().call_soon(turned.append, True)
    with pytest.raises(kind) as caught:
        await attempt(listener, how, condition)
    assert type(caught.value) is kind
    assert bool(turned) == (how == "accept"), "whether the call has yielded"
    return caught.value


def must_not_be_asked(pending: PendingTransport) -> AnyVerdict:
    """Fail the test."""
    pytest.fail(f"{pending!r} was offered")


def scripted(*script: OSError | None) -> Listener[Stream]:
    """Return a listener whose accept(2) fails by script."""
    return Listener.from_socket(ScriptedSocket(socket.create_server(("127.0.0.1", 0)), script))


# -- the table


def test_the_table_is_complete() -> None:
    """Every leaf has its row, and no row is a branch."""
    assert {row.kind for row in TABLE} == set(AcceptError.__subclasses__())
    assert not any(row.kind.__subclasses__() for row in TABLE)


@every_row
def test_what_an_error_is(row: Row) -> None:
    """Each has the errno and the seed's name, and is what people would catch elsewhere."""
    error = row.kind("because", ("192.0.2.1", 5))

    assert isinstance(error, AcceptError)
    assert isinstance(error, OSError)
    assert row.also is None or isinstance(error, row.also)
    assert (error.errno, error.winsock) == (row.code, row.winsock)
    assert (row.kind.code, row.kind.winsock) == (row.code, row.winsock)
    assert (error.reason, error.strerror) == ("because", "because")
    assert error.caller_id == ("192.0.2.1", 5)
    assert str(error) == f"[Errno {row.code}] because (caller ('192.0.2.1', 5))"


@every_row
def test_an_error_about_no_connection(row: Row) -> None:
    """Without a connection there is no address, and the sentence names none."""
    error = row.kind("because")

    assert error.caller_id is None
    assert str(error) == f"[Errno {row.code}] because"
    assert type(error) is row.kind


def test_an_address_that_is_empty_is_one() -> None:
    """A Unix caller without a name has an address, and the sentence says so."""
    assert str(ConnectionRejectedError("because", "")) == "[Errno 111] because (caller '')"


def test_nothing_else_is_claimed() -> None:
    """No error is also a built-in that the table does not name."""
    for row in TABLE:
        allowed = {row.kind, AcceptError, *OSError.__mro__}
        if row.also is not None:
            allowed |= set(row.also.__mro__)
        assert set(row.kind.__mro__) == allowed


def test_the_root() -> None:
    """The root stands for an errno nobody knows."""
    assert AcceptError("because").errno == errno.EIO
    assert AcceptError.winsock == ""


@every_row
def test_an_error_can_be_copied(row: Row) -> None:
    """Pickled, copied and copied deeply it says the same, with all it carries."""
    error = row.kind("because", ("::1", 5, 0, 0))
    error.add_note("a note")
    if isinstance(error, ConnectionDeferredError):
        error.defer = Defer(after=2)
    copies = [copy.copy(error), copy.deepcopy(error)]
    copies += [
        pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - made here
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    for other in copies:
        assert type(other) is row.kind
        assert vars(other) == vars(error)
        assert (other.errno, other.strerror, other.args) == (row.code, "because", error.args)
        assert str(other) == str(error)
        assert other.__notes__ == ["a note"]


@every_row
def test_errors_keep_to_themselves(row: Row) -> None:
    """What is noted on one copy is not on the other."""
    error = row.kind("because")
    other = copy.deepcopy(error)
    other.reason = "another"

    assert error.reason == "because"


# -- one connection: rejected, deferred


@either_call
async def test_rejected(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """REJECT gives ConnectionRejectedError, with address and reason; the caller is reset."""
    client = dial(listener)
    await queued(listener, 1)
    error = await failure(
        ConnectionRejectedError, listener, how, lambda _: Reject("not on a Sunday")
    )

    assert error.caller_id == client.getsockname()
    assert error.reason == "not on a Sunday"
    assert wire(client) == "reset"
    assert listener.pending == ()
    assert listener.statistics().rejected == 1


@either_call
@pytest.mark.parametrize("verdict", [DEFER, Defer(after=3, reason="first the others")], ids=repr)
async def test_deferred(
    listener: Listener[Stream], dial: Dial, how: str, verdict: AnyVerdict
) -> None:
    """DEFER gives ConnectionDeferredError with its hints; the connection stays."""
    client = dial(listener)
    await queued(listener, 1)
    error = await failure(ConnectionDeferredError, listener, how, lambda _: verdict)

    assert error.caller_id == client.getsockname()
    assert error.defer == (Defer() if verdict is DEFER else verdict)
    assert error.reason == error.defer.reason
    assert pickle.loads(pickle.dumps(error)).defer == error.defer  # noqa: S301 - made here
    assert wire(client) == "open"
    assert [each.status for each in listener.pending] == [Status.DEFERRED]
    assert listener.statistics().deferrals == 1


# -- one connection: lost


@either_call
async def test_reset_before_the_offer(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """A caller that has reset is told of once, by its address; the condition is not asked."""
    client = dial(listener, data=b"never read")
    await queued(listener, 1)
    address = client.getsockname()
    reset(client)
    error = await failure(PendingResetError, listener, how, must_not_be_asked)

    assert error.caller_id == address
    await failure(NoPendingError, listener, "accept_nowait", must_not_be_asked)
    statistics = listener.statistics()
    assert (statistics.taken, statistics.reset, statistics.offers) == (1, 1, 0)


@either_call
async def test_reset_while_deferred(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """A deferred caller that resets is told of once, in its place before the next."""
    client = dial(listener)
    await failure(ConnectionDeferredError, listener, "accept", defer)
    address = client.getsockname()
    reset(client)
    await until(lambda: listener.statistics().reset == 1)
    other = dial(listener)
    error = await failure(PendingResetError, listener, how, must_not_be_asked)

    assert error.caller_id == address
    (await listener.accept()).close()
    assert wire(other) == "eof"
    statistics = listener.statistics()
    assert (statistics.taken, statistics.reset, statistics.accepted) == (2, 1, 1)


async def test_reset_during_the_decision(listener: Listener[Stream], dial: Dial) -> None:
    """A caller that resets while it is being decided about is lost, whatever the verdict."""
    client = dial(listener)
    address = client.getsockname()
    asked: list[PendingTransport] = []

    async def condition(pending: PendingTransport) -> AnyVerdict:
        asked.append(pending)
        reset(client)
        await asyncio.sleep(0)
        return ACCEPT

    error = await failure(PendingResetError, listener, "accept", condition)

    assert error.caller_id == address
    assert asked[0].status is Status.RESET
    assert listener.pending == ()
    statistics = listener.statistics()
    assert (statistics.reset, statistics.accepted, statistics.streams) == (1, 0, 0)


@either_call
async def test_aborted_in_accept(dial: Dial, how: str) -> None:
    """Where accept(2) says ECONNABORTED, a caller was lost: it is counted and told once."""
    async with scripted(OSError(errno.ECONNABORTED, "aborted")) as listener:
        dial(listener)
        await queued(listener, 1)
        error = await failure(PendingResetError, listener, how, must_not_be_asked)

        assert error.caller_id is None
        assert (listener.statistics().taken, listener.statistics().reset) == (1, 1)
        (await listener.accept()).close()
        statistics = listener.statistics()
        assert (statistics.taken, statistics.reset, statistics.accepted) == (2, 1, 1)


@pytest.mark.parametrize("lost", ["at accept(2)", "while being asked"])
async def test_a_loss_survives_a_cancellation(dial: Dial, lost: str) -> None:
    """A loss found by a call that was cancelled before it could tell is told by the next."""
    script = [OSError(errno.ECONNABORTED, "aborted")] if lost == "at accept(2)" else []
    async with scripted(*script) as listener:
        client = dial(listener)
        await queued(listener, 1)

        async def condition(_pending: PendingTransport) -> AnyVerdict:
            reset(client)
            task.cancel()
            return ACCEPT

        task = asyncio.ensure_future(listener.accept(condition))
        if script:
            # It runs before what it waits for: a turn of the loop.
            asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

        assert listener.statistics().reset == 1
        await failure(PendingResetError, listener, "accept_nowait", must_not_be_asked)
        if not script:
            await failure(NoPendingError, listener, "accept_nowait", must_not_be_asked)


async def test_reset_before_it_was_complete() -> None:
    """An accepted caller that leaves before its gate is done with it was reset."""
    listener, gate = memory_listener(slow=True)
    async with listener:
        client = gate.dial(("192.0.2.5", 7))
        call = asyncio.ensure_future(listener.accept(accept))
        await until(lambda: gate.admitting)
        gate.fail()
        with pytest.raises(PendingResetError) as caught:
            await call
        client.close()

        assert caught.value.caller_id == ("192.0.2.5", 7)
        assert listener.statistics().reset == 1
        assert listener.pending == ()


@either_call
async def test_expired(dial: Dial, how: str) -> None:
    """A deferred caller past its deadline is closed, and told of once."""
    async with await listen("127.0.0.1", 0, defer_timeout=0.01) as listener:
        client = dial(listener)
        await failure(ConnectionDeferredError, listener, "accept", defer)
        await until(lambda: listener.statistics().expired)
        assert wire(client) == "reset"
        assert listener.pending == ()
        error = await failure(PendingExpiredError, listener, how, must_not_be_asked)

        assert error.caller_id == client.getsockname()
        assert "0.01" in error.reason
        await failure(NoPendingError, listener, "accept_nowait", must_not_be_asked)
        assert listener.statistics().expired == 1


async def test_expired_during_a_condition_that_blocks(dial: Dial) -> None:
    """A deadline that passes inside a condition expires the connection once, and no other."""
    async with await listen("127.0.0.1", 0, defer_timeout=0.02) as listener:
        dial(listener)
        await failure(ConnectionDeferredError, listener, "accept", defer)
        pending = listener.pending[0]
        deadline = pending.age + 0.02

        def block(_pending: PendingTransport) -> AnyVerdict:
            while pending.age <= deadline:
                pass
            return DEFER

        await failure(ConnectionDeferredError, listener, "accept_nowait", block)
        await until(lambda: listener.statistics().expired)
        await failure(PendingExpiredError, listener, "accept", must_not_be_asked)
        # The next one has a deadline, too.
        dial(listener)
        await failure(ConnectionDeferredError, listener, "accept", defer)
        await until(lambda: listener.statistics().expired == 2)


@either_call
async def test_withdrawn(dial: Dial, how: str) -> None:
    """Where a FIN means withdrawal, a caller that closed has expired; nobody is asked."""
    async with await listen("127.0.0.1", 0, on_eof="withdraw") as listener:
        client = dial(listener)
        await queued(listener, 1)
        client.shutdown(socket.SHUT_WR)
        error = await failure(PendingExpiredError, listener, how, must_not_be_asked)

        assert error.caller_id == client.getsockname()
        assert wire(client) == "reset"
        assert listener.statistics().expired == 1


# -- the call: nobody, interrupted, nested


async def test_nobody(listener: Listener[Stream]) -> None:
    """accept_nowait() with nobody pending raises, and is an empty queue by every name."""
    error = await failure(NoPendingError, listener, "accept_nowait", must_not_be_asked)

    assert error.caller_id is None
    assert listener.statistics().taken == 0


async def test_interrupted(listener: Listener[Stream], dial: Dial) -> None:
    """cancel_accept() ends the calls that wait, and leaves the listener to the next."""
    calls = [asyncio.ensure_future(listener.accept()) for _ in range(2)]
    calls.append(asyncio.ensure_future(listener.wait_pending()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert listener.cancel_accept() == 3
    errors = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(error) for error in errors] == [AcceptInterruptedError] * 3
    assert listener.cancel_accept() == 0
    dial(listener)
    (await listener.accept()).close()


async def test_nested_in_a_plain_condition(listener: Listener[Stream], dial: Dial) -> None:
    """A plain condition cannot accept from its own listener; what it says then counts."""
    dial(listener)
    dial(listener)
    seen: list[AcceptError] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        with pytest.raises(AcceptInProgressError) as caught:
            listener.accept_nowait()
        seen.append(caught.value)
        return ACCEPT

    (await listener.accept(condition)).close()

    assert seen[0].errno == errno.EINPROGRESS
    assert listener.statistics().taken == 1
    (await listener.accept()).close()


@either_call
async def test_nested_in_an_async_condition(
    listener: Listener[Stream], dial: Dial, how: str
) -> None:
    """The task that decides cannot accept; another that it starts can."""
    first, second = dial(listener), dial(listener)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        await failure(AcceptInProgressError, listener, how, must_not_be_asked)
        other = await asyncio.ensure_future(listener.accept())
        other.close()
        return ACCEPT

    stream = await listener.accept(condition)
    assert stream.caller_id == first.getsockname()
    stream.close()

    assert [wire(first), wire(second)] == ["eof", "eof"]
    assert listener.statistics().accepted == 2


async def test_a_condition_may_accept_elsewhere(listener: Listener[Stream], dial: Dial) -> None:
    """Only the listener that asks is closed to its condition."""
    async with await listen("127.0.0.1", 0) as other:
        dial(listener)
        dial(other)
        await queued(other, 1)

        def condition(_pending: PendingTransport) -> AnyVerdict:
            other.accept_nowait().close()
            return ACCEPT

        (await listener.accept(condition)).close()
        assert other.statistics().accepted == 1


# -- the listener: closed


@either_call
async def test_closed(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """After close() every call says so."""
    dial(listener)
    listener.close()
    await failure(ListenerClosedError, listener, how, must_not_be_asked)

    with pytest.raises(ListenerClosedError):
        await listener.wait_pending()
    with pytest.raises(ListenerClosedError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with pytest.raises(ListenerClosedError):
        listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert listener.sockets == ()
    assert listener.sockname is None
    assert listener.statistics().taken == 0


async def test_closed_while_waiting(listener: Listener[Stream]) -> None:
    """close() ends the calls that wait, at once."""
    calls = [asyncio.ensure_future(listener.accept()) for _ in range(2)]
    calls.append(asyncio.ensure_future(listener.wait_pending()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    listener.close()
    errors = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(error) for error in errors] == [ListenerClosedError] * 3


async def test_closed_during_the_decision(listener: Listener[Stream], dial: Dial) -> None:
    """close() cancels a decision under way: its call says closed, its caller is reset."""
    client = dial(listener)
    cancelled: list[bool] = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return ACCEPT

    call = asyncio.ensure_future(listener.accept(condition))
    await until(lambda: listener.statistics().deciding)
    listener.close()
    with pytest.raises(ListenerClosedError):
        await call

    assert cancelled == [True]
    assert not call.cancelled()
    assert wire(client) == "reset"
    assert listener.statistics().closed == 1


@either_call
async def test_closed_by_the_condition_that_defers(
    listener: Listener[Stream], dial: Dial, how: str
) -> None:
    """A condition that closes the listener and says DEFER has left nobody to ask again."""
    client = dial(listener)
    await queued(listener, 1)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        return DEFER

    await failure(ListenerClosedError, listener, how, condition)

    assert wire(client) == "reset"
    assert listener.pending == ()
    statistics = listener.statistics()
    assert (statistics.closed, statistics.deferrals) == (1, 0)


# -- the verdict


@either_call
@pytest.mark.parametrize(
    "verdict", [None, 7, 0, "accept", True, Defer, [ACCEPT], ConnectionRejectedError], ids=repr
)
async def test_no_verdict(
    listener: Listener[Stream], dial: Dial, how: str, verdict: object
) -> None:
    """What is no verdict decides nothing: the connection is first in line as before."""
    client = dial(listener)
    await queued(listener, 1)
    dial(listener)
    error = await failure(InvalidVerdictError, listener, how, lambda _: verdict)

    assert error.caller_id == client.getsockname()
    assert repr(verdict) in error.reason
    assert wire(client) == "open"
    assert [each.status for each in listener.pending] == [Status.QUEUED]
    stream = await listener.accept()
    assert stream.caller_id == client.getsockname()
    stream.close()


async def test_no_verdict_about_a_deferred_one(listener: Listener[Stream], dial: Dial) -> None:
    """A deferred connection stays deferred, first, and no deferral is counted."""
    client = dial(listener)
    await failure(ConnectionDeferredError, listener, "accept", defer)
    dial(listener)

    async def condition(_pending: PendingTransport) -> Any:
        await asyncio.sleep(0)
        return "accept"

    await failure(InvalidVerdictError, listener, "accept", condition)

    (pending,) = listener.pending
    assert pending.caller_id == client.getsockname()
    assert (pending.status, pending.deferrals) == (Status.DEFERRED, 1)
    await failure(ConnectionRejectedError, listener, "accept", reject)
    assert wire(client) == "reset"


async def test_nowait_cannot_await(listener: Listener[Stream], dial: Dial) -> None:
    """An async condition is no verdict for accept_nowait(); it is not left unawaited."""
    client = dial(listener)
    await queued(listener, 1)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        pytest.fail("it was run")

    error = await failure(InvalidVerdictError, listener, "accept_nowait", condition)

    assert error.caller_id == client.getsockname()
    assert wire(client) == "open"
    (await listener.accept()).close()


@either_call
async def test_no_such_group(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """A group the listener does not have decides nothing; put right, the verdict counts."""
    client = dial(listener)
    await queued(listener, 1)
    kept: list[PendingTransport] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        kept.append(pending)
        pending.group = "gold"
        return ACCEPT

    error = await failure(InvalidGroupError, listener, how, condition)

    assert error.caller_id == client.getsockname()
    assert "'gold'" in error.reason
    assert wire(client) == "open"
    assert listener.pending == (kept[0],)
    kept[0].group = None
    (await listener.accept()).close()


@either_call
async def test_a_farewell_over_the_capacity(
    listener: Listener[Stream], dial: Dial, how: str
) -> None:
    """Callee data beyond the capacity decides nothing, and not a byte of it is sent."""
    client = dial(listener)
    await queued(listener, 1)
    error = await failure(CalleeDataError, listener, how, lambda _: Reject(data=bytes(4097)))

    assert error.caller_id == client.getsockname()
    assert "4097 bytes is over the capacity of 4096" in error.reason
    assert wire(client) == "open"
    assert [each.status for each in listener.pending] == [Status.QUEUED]
    client.close()
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(lambda _: Reject(data=bytes(4096)))


@either_call
async def test_overfilled_callee_data(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """A condition that overfills the callee data has raised: its connection is rejected."""
    client = dial(listener)
    await queued(listener, 1)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data = bytes(5000)
        return ACCEPT

    await failure(CalleeDataError, listener, how, condition)

    assert wire(client) == "reset"
    assert listener.statistics().rejected == 1


@pytest.mark.parametrize("how", ["accept", "accept_nowait"])
@pytest.mark.parametrize("condition", [5, "accept", ACCEPT, Reject()], ids=repr)
async def test_a_condition_that_cannot_be_called(
    listener: Listener[Stream], dial: Dial, how: str, condition: Any
) -> None:
    """What cannot be called is refused before the deque is touched, somebody there or not."""
    for clients in (0, 1):
        if clients:
            dial(listener)
            await queued(listener, 1)
        with pytest.raises(ConditionNotCallableError, match="cannot be called") as caught:
            await attempt(listener, how, condition)
        assert caught.value.caller_id is None
        assert repr(condition) in caught.value.reason
    assert listener.statistics().taken == 0
    assert listener.statistics().backlog == 1
    (await listener.accept()).close()


# -- accept(2), by script


@either_call
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EMFILE, DescriptorsExhaustedError),
        (errno.ENFILE, DescriptorsExhaustedError),
        (errno.ENOBUFS, BuffersExhaustedError),
        (errno.ENOMEM, BuffersExhaustedError),
        (errno.ENETDOWN, NetworkDownError),
        (errno.EPROTO, NetworkDownError),
        (errno.ENOPROTOOPT, NetworkDownError),
        (errno.EHOSTDOWN, NetworkDownError),
        (errno.ENONET, NetworkDownError),
        (errno.EHOSTUNREACH, NetworkDownError),
        (errno.ENETUNREACH, NetworkDownError),
        (errno.ETIMEDOUT, NetworkDownError),
        (errno.EPERM, NetworkDownError),
        (errno.EINVAL, NotListeningError),
        (errno.EBADF, NotASocketError),
        (errno.ENOTSOCK, NotASocketError),
        (errno.EOPNOTSUPP, NotStreamSocketError),
        (errno.ELOOP, AcceptError),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
async def test_what_accept_says(dial: Dial, how: str, code: int, kind: type[AcceptError]) -> None:
    """An error of accept(2) is classified, its cause kept; who waits goes on waiting."""
    cause = OSError(code, os.strerror(code))
    async with scripted(cause) as listener:
        client = dial(listener)
        await queued(listener, 1)
        error = await failure(kind, listener, how, must_not_be_asked)

        assert error.__cause__ is cause
        assert error.caller_id is None
        assert listener.statistics().taken == 0
        assert listener.statistics().backlog == 1
        assert wire(client) == "open"
        stream = await listener.accept()
        assert stream.caller_id == client.getsockname()
        stream.close()


async def test_an_unknown_errno_is_named() -> None:
    """An errno that nobody knows comes as the root, with what the system says of it."""
    async with scripted(OSError(errno.ELOOP, "dizzy")) as listener:
        with socket.create_connection(listener.sockname):
            error = await failure(AcceptError, listener)

            assert f"[Errno {errno.ELOOP}] dizzy" in error.reason


async def test_an_error_without_errno() -> None:
    """An OSError that has no errno is an unknown one, too."""
    async with scripted(OSError("no number")) as listener:
        with socket.create_connection(listener.sockname):
            error = await failure(AcceptError, listener)

            assert "no number" in error.reason


async def test_errors_reach_every_call_that_waits(dial: Dial) -> None:
    """Of several calls that wait, each is told: none waits for an event that was eaten."""
    script = [OSError(errno.ENOBUFS, "no memory") for _ in range(3)]
    async with scripted(*script) as listener:
        calls = [asyncio.ensure_future(listener.accept()) for _ in range(3)]
        await asyncio.sleep(0)
        client = dial(listener)
        errors = await asyncio.gather(*calls, return_exceptions=True)

        assert [type(error) for error in errors] == [BuffersExhaustedError] * 3
        stream = await listener.accept()
        assert stream.caller_id == client.getsockname()
        stream.close()


async def test_errors_freeze_nobody(dial: Dial) -> None:
    """Who calls again at once after every error lets the loop run all the same."""
    script = [OSError(errno.ENETDOWN, "down") for _ in range(100)]
    async with scripted(*script) as listener:
        dial(listener)
        await queued(listener, 1)
        turns: list[int] = []
        for n in range(100):
            asyncio.get_running_loop().call_soon(turns.append, n)
            with pytest.raises(NetworkDownError):
                await listener.accept()
            assert turns[-1:] == [n]
        (await listener.accept()).close()


@either_call
async def test_somebody_else_was_faster(how: str, dial: Dial) -> None:
    """EAGAIN after all is no error: another process that shares the socket was faster."""
    async with scripted(BlockingIOError(errno.EAGAIN, "again")) as listener:
        client = dial(listener)
        await queued(listener, 1)
        stream = listener.accept_nowait() if how == "accept_nowait" else await listener.accept()
        assert stream.caller_id == client.getsockname()
        stream.close()


class Robbed(socket.socket):
    """A listening socket whose callers go to somebody else, just before they would be taken."""

    def __init__(self, sock: socket.socket, code: int) -> None:
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self._code: int | None = code
        self.stolen: list[int] = []

    def _accept(self) -> tuple[int, Any]:
        fd, address = super()._accept()  # type: ignore[misc]
        if self._code is None:
            return fd, address
        self.stolen.append(fd)
        code, self._code = self._code, None
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EMFILE, errno.ENFILE])
@either_call
async def test_robbed(dial: Dial, how: str, code: int) -> None:
    """When the only caller went elsewhere there is nobody pending, descriptors or not."""
    robbed = Robbed(socket.create_server(("127.0.0.1", 0)), code)
    listener: Listener[Stream] = Listener.from_socket(robbed)
    async with listener:
        dial(listener)
        await queued(listener, 1)
        if how == "accept_nowait":
            await failure(NoPendingError, listener, how)
            call = None
        else:
            call = asyncio.ensure_future(listener.accept())
            await until(lambda: robbed.stolen)
            await asyncio.sleep(0)
            assert not call.done()
        os.close(robbed.stolen.pop())
        client = dial(listener)
        stream = await (call or listener.accept())
        assert stream.caller_id == client.getsockname()
        stream.close()


# -- without descriptors, really


@either_call
async def test_no_descriptors(
    listener: Listener[Stream],
    dial: Dial,
    exhaust: Callable[[], Callable[[], None]],
    how: str,
) -> None:
    """Without descriptors a waiting caller stays queued, and is served when some are free."""
    client = dial(listener, data=b"still here")
    await queued(listener, 1)
    give_back = exhaust()
    for _ in range(3):
        error = await failure(DescriptorsExhaustedError, listener, how, must_not_be_asked)
        assert "RLIMIT_NOFILE" in error.reason
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.EMFILE
        assert (listener.statistics().taken, listener.statistics().backlog) == (0, 1)
    give_back()
    stream = await listener.accept()

    assert stream.caller_id == client.getsockname()
    assert await stream.read(100) == b"still here"
    stream.close()


async def test_no_descriptors_and_nobody(
    listener: Listener[Stream], dial: Dial, exhaust: Callable[[], Callable[[], None]]
) -> None:
    """Without descriptors and without callers there is nobody pending, and accept() waits."""
    give_back = exhaust()
    await failure(NoPendingError, listener, "accept_nowait", must_not_be_asked)
    call = asyncio.ensure_future(listener.accept())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not call.done()
    give_back()
    client = dial(listener)
    stream = await call

    assert stream.caller_id == client.getsockname()
    stream.close()


async def test_no_descriptors_when_somebody_comes(
    listener: Listener[Stream], exhaust: Callable[[], Callable[[], None]]
) -> None:
    """Every call that waits is told when a caller comes and there is no descriptor."""
    calls = [asyncio.ensure_future(listener.accept()) for _ in range(3)]
    await asyncio.sleep(0)
    with socket.socket() as client:
        client.settimeout(10)
        give_back = exhaust()
        client.connect(listener.sockname)
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [DescriptorsExhaustedError] * 3
        # Somebody is due all the same, and a further call is told at once.
        await listener.wait_pending()
        await failure(DescriptorsExhaustedError, listener)
        give_back()
        stream = await listener.accept()

        assert stream.caller_id == client.getsockname()
        stream.close()


async def test_deferred_ones_need_no_descriptor(
    listener: Listener[Stream], dial: Dial, exhaust: Callable[[], Callable[[], None]]
) -> None:
    """Without descriptors those on the deque can be deferred again, rejected and accepted."""
    first = dial(listener)
    await failure(ConnectionDeferredError, listener, "accept", defer)
    second = dial(listener)
    await queued(listener, 1)
    give_back = exhaust()
    await failure(ConnectionDeferredError, listener, "accept_nowait", defer)
    stream = listener.accept_nowait()
    stream.write(b"hello")
    assert wire(first) == b"hello"
    error = await failure(DescriptorsExhaustedError, listener)
    assert error.caller_id is None
    # The descriptor of a closed stream is the next caller's.
    stream.close()
    await failure(ConnectionRejectedError, listener, "accept", reject)
    give_back()

    assert wire(second) == "reset"


# -- the socket, behind our back


@contextlib.contextmanager
def shared(listener: Listener[Any]) -> Iterator[socket.socket]:
    """Open a listener's socket a second time, as another process would have it."""
    with socket.socket(fileno=os.dup(listener.sockets[0].fileno())) as other:
        yield other


@either_call
async def test_shut_down_behind_our_back(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """A socket that somebody shut down listens no more, as every call says."""
    deferred = dial(listener)
    await failure(ConnectionDeferredError, listener, "accept", defer)
    with shared(listener) as other:
        other.shutdown(socket.SHUT_RDWR)
    # Who is on the deque already is not touched by that.
    stream = await listener.accept()
    assert stream.caller_id == deferred.getsockname()
    stream.close()
    for _ in range(2):
        error = await failure(NotListeningError, listener, how, must_not_be_asked)
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.EINVAL


async def test_shut_down_behind_waiting_calls(listener: Listener[Stream]) -> None:
    """Calls that wait are told when the socket is shut down, each of them."""
    calls = [asyncio.ensure_future(listener.accept()) for _ in range(3)]
    await asyncio.sleep(0)
    with shared(listener) as other:
        other.shutdown(socket.SHUT_RDWR)
    errors = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(error) for error in errors] == [NotListeningError] * 3


@either_call
async def test_closed_behind_our_back(how: str) -> None:
    """A descriptor that somebody closed is no socket; close() still closes what is left."""
    listener = await listen("127.0.0.1", 0)
    before = set(os.listdir("/proc/self/fd"))
    os.close(listener.sockets[0].fileno())
    for _ in range(2):
        error = await failure(NotASocketError, listener, how, must_not_be_asked)
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.EBADF
    assert listener.statistics().taken == 0
    waiting = asyncio.ensure_future(listener.wait_closed())
    await asyncio.sleep(0)
    listener.close()
    await waiting

    await failure(ListenerClosedError, listener, how, must_not_be_asked)
    # The listening socket, and the set that watched it.
    assert len(before - set(os.listdir("/proc/self/fd"))) == 2


# -- the socket, before


def listening() -> socket.socket:
    """Return a socket that listens."""
    return socket.create_server(("127.0.0.1", 0))


def unbound() -> socket.socket:
    """Return a socket that was neither bound nor listens."""
    return socket.socket()


def bound() -> socket.socket:
    """Return a socket that was bound and does not listen."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def connected() -> socket.socket:
    """Return a socket that was accepted."""
    with listening() as server, socket.create_connection(server.getsockname()):
        return server.accept()[0]


def datagram() -> socket.socket:
    """Return a datagram socket."""
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def unix_datagram() -> socket.socket:
    """Return a datagram socket of the Unix family."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def unix_unbound() -> socket.socket:
    """Return a Unix socket that does not listen."""
    return socket.socket(socket.AF_UNIX)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (unbound, NotListeningError),
        (bound, NotListeningError),
        (connected, NotListeningError),
        (unix_unbound, NotListeningError),
        (datagram, NotStreamSocketError),
        (unix_datagram, NotStreamSocketError),
    ],
)
async def test_sockets_of_the_wrong_kind(
    make: Callable[[], socket.socket], kind: type[AcceptError]
) -> None:
    """from_socket() refuses what cannot accept; the socket is as it was, and the caller's."""
    with make() as sock:
        with pytest.raises(kind) as caught:
            Listener.from_socket(sock)

        assert type(caught.value) is kind
        assert caught.value.caller_id is None
        assert sock.fileno() >= 0
        assert sock.gettimeout() is None
        assert os.get_blocking(sock.fileno())


async def test_a_closed_socket() -> None:
    """A closed socket is none."""
    sock = listening()
    sock.close()
    with pytest.raises(NotASocketError):
        Listener.from_socket(sock)


async def test_a_descriptor_of_something_else() -> None:
    """A socket object whose descriptor is another thing by now is no socket."""
    reader, writer = os.pipe()
    with listening() as sock:
        os.dup2(reader, sock.fileno())
        with pytest.raises(NotASocketError) as caught:
            Listener.from_socket(sock)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOTSOCK
    os.close(reader)
    os.close(writer)


async def test_a_socket_that_changes_under_the_listener() -> None:
    """A listening descriptor that becomes another thing is no socket, once it is asked."""
    reader, writer = os.pipe()
    async with await listen("127.0.0.1", 0) as listener:
        os.dup2(reader, listener.sockets[0].fileno())
        os.write(writer, b"x")
        await failure(NotASocketError, listener, "accept_nowait", must_not_be_asked)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("thing", [None, 5, "socket", object()], ids=str)
async def test_what_is_no_socket_object(thing: Any) -> None:
    """from_socket() takes socket objects; anything else is a bad argument."""
    with pytest.raises(TypeError, match=r"takes a socket\.socket"):
        Listener.from_socket(thing)


async def test_options_that_cannot_be_set() -> None:
    """After an option that the kernel refuses, the socket is open and still the caller's."""
    with listening() as sock:
        with pytest.raises(OSError, match="9999") as caught:
            Listener.from_socket(sock, options=[(socket.SOL_SOCKET, 9999, 1)])

        assert caught.value.errno == errno.ENOPROTOOPT
        assert sock.gettimeout() is None
        with socket.create_connection(sock.getsockname()) as client:
            accepted, address = sock.accept()
            accepted.close()
            assert address == client.getsockname()


# -- the order of checks


async def test_closed_comes_before_in_progress(listener: Listener[Stream], dial: Dial) -> None:
    """A condition that closes its listener and accepts again is told that it is closed."""
    dial(listener)
    seen: list[type[BaseException]] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        with pytest.raises(AcceptError) as caught:
            listener.accept_nowait(5)  # type: ignore[arg-type]
        seen.append(caught.type)
        return ACCEPT

    (await listener.accept(condition)).close()
    assert seen == [ListenerClosedError]


@either_call
async def test_closed_comes_before_the_condition(listener: Listener[Stream], how: str) -> None:
    """A closed listener does not look at its arguments."""
    listener.close()
    with pytest.raises(ListenerClosedError):
        await attempt(listener, how, 5)


async def test_in_progress_comes_before_the_condition(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A nested call is told that it is nested, whatever its arguments."""
    dial(listener)
    seen: list[type[BaseException]] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        with pytest.raises(AcceptError) as caught:
            listener.accept_nowait(5)  # type: ignore[arg-type]
        seen.append(caught.type)
        return ACCEPT

    (await listener.accept(condition)).close()
    assert seen == [AcceptInProgressError]


@either_call
async def test_the_condition_comes_before_losses(
    listener: Listener[Stream], dial: Dial, how: str
) -> None:
    """A condition that cannot be called leaves a loss to be told by the next call."""
    client = dial(listener)
    await failure(ConnectionDeferredError, listener, "accept", defer)
    reset(client)
    await until(lambda: listener.statistics().reset)
    with pytest.raises(ConditionNotCallableError):
        await attempt(listener, how, 5)

    await failure(PendingResetError, listener, how)


async def test_the_condition_comes_before_nobody(listener: Listener[Stream]) -> None:
    """With nobody pending, a condition that cannot be called is the error all the same."""
    with pytest.raises(ConditionNotCallableError):
        listener.accept_nowait(5)  # type: ignore[arg-type]


async def test_losses_come_before_nobody(listener: Listener[Stream], dial: Dial) -> None:
    """Several losses are told one by one, oldest first, before anybody is missed."""
    clients = [dial(listener) for _ in range(3)]
    addresses = [client.getsockname() for client in clients]
    await queued(listener, 3)
    for client in clients:
        reset(client)
    told = [
        (await failure(PendingResetError, listener, how)).caller_id
        for how in ("accept_nowait", "accept", "accept_nowait")
    ]

    assert told == addresses
    await failure(NoPendingError, listener, "accept_nowait")
    assert listener.statistics().reset == 3


async def test_losses_come_before_descriptors(
    listener: Listener[Stream], dial: Dial, exhaust: Callable[[], Callable[[], None]]
) -> None:
    """A loss at the head is told before a lack of descriptors is met."""
    client = dial(listener)
    await failure(ConnectionDeferredError, listener, "accept", defer)
    dial(listener)
    await queued(listener, 1)
    reset(client)
    await until(lambda: listener.statistics().reset)
    give_back = exhaust()
    # The lost one had a descriptor, which was among those taken.
    await failure(PendingResetError, listener)
    await failure(DescriptorsExhaustedError, listener)
    give_back()
    (await listener.accept()).close()


# -- conditions that raise

RAISED = [
    BlockingIOError(errno.EAGAIN, "the condition's own"),
    ConnectionResetError(errno.ECONNRESET, "the condition's own"),
    ConnectionAbortedError(errno.ECONNABORTED, "the condition's own"),
    InterruptedError(errno.EINTR, "the condition's own"),
    TimeoutError("the condition's own"),
    PermissionError(errno.EPERM, "the condition's own"),
    FileNotFoundError(errno.ENOENT, "the condition's own"),
    OSError(errno.EMFILE, "the condition's own"),
    OSError(errno.ENETDOWN, "the condition's own"),
    OSError(errno.EINVAL, "the condition's own"),
    OSError("without a number"),
    *(row.kind("the condition's own") for row in TABLE),
    ZeroDivisionError("the condition's own"),
    StopAsyncIteration("the condition's own"),
]


@pytest.mark.parametrize("way", ["accept", "accept_nowait", "async"])
@pytest.mark.parametrize(
    "number", range(len(RAISED)), ids=lambda n: f"{n}-{type(RAISED[n]).__name__}"
)
async def test_a_condition_that_raises(
    listener: Listener[Stream], dial: Dial, number: int, way: str
) -> None:
    """Whatever it raises arrives unchanged, with a note; its connection alone is rejected."""
    # A copy each time: notes pile up on an exception that is raised again.
    error = copy.copy(RAISED[number])
    client = dial(listener)
    await queued(listener, 1)
    other = dial(listener)
    await queued(listener, 2)

    def plain(_pending: PendingTransport) -> AnyVerdict:
        raise error

    async def awaited(_pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        raise error

    condition: Condition = awaited if way == "async" else plain
    how = "accept_nowait" if way == "accept_nowait" else "accept"
    raised = await failure(type(error), listener, how, condition)

    assert raised is error
    assert raised.__cause__ is None
    (note,) = raised.__notes__
    assert repr(client.getsockname()) in note
    assert "rejected" in note
    assert await wire_end(client) == "reset"
    assert listener.pending == ()
    statistics = listener.statistics()
    assert (statistics.taken, statistics.offers, statistics.rejected) == (1, 1, 1)
    stream = await listener.accept()
    assert stream.caller_id == other.getsockname()
    stream.close()


async def test_a_plain_condition_that_raises_has_yielded(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A condition's error about its own arguments is not one about the call's."""
    dial(listener)
    await queued(listener, 1)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        reason = "the condition's own"
        raise ConditionNotCallableError(reason)

    await failure(ConditionNotCallableError, listener, "accept", condition)
    assert listener.statistics().rejected == 1


@pytest.mark.parametrize("kind", [asyncio.CancelledError, ConnectionDeferredError])
async def test_raising_is_no_deferral(
    listener: Listener[Stream], dial: Dial, kind: type[BaseException]
) -> None:
    """However a condition raises, those who wait for events are told of the next caller."""
    told: list[Event] = []
    listener.on(Event.PENDING, lambda _source, event, _error: told.append(event))
    dial(listener)
    await queued(listener, 1)
    other = dial(listener)
    await until(lambda: told)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        raise kind("the condition's own")

    with pytest.raises(kind):
        await listener.accept(condition)
    await until(lambda: len(told) == 2)
    stream = await listener.accept()
    assert stream.caller_id == other.getsockname()
    stream.close()


async def test_a_cancelled_decision_is_told_again(listener: Listener[Stream], dial: Dial) -> None:
    """After a decision was cancelled, those who wait for events hear of its connection."""
    told: list[Event] = []
    listener.on(Event.PENDING, lambda _source, event, _error: told.append(event))
    client = dial(listener)
    await until(lambda: told)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        await asyncio.Event().wait()
        return ACCEPT

    call = asyncio.ensure_future(listener.accept(condition))
    await until(lambda: listener.statistics().deciding)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await until(lambda: len(told) == 2)
    stream = listener.accept_nowait()
    assert stream.caller_id == client.getsockname()
    stream.close()


async def test_a_timeout_of_the_condition_is_its_own(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A condition that runs out of its own time has raised: its connection is rejected."""
    client = dial(listener)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()
        return ACCEPT

    error = await failure(TimeoutError, listener, "accept", condition)

    assert len(error.__notes__) == 1
    assert wire(client) == "reset"
    assert listener.statistics().rejected == 1


async def test_a_timeout_of_the_caller_is_a_cancellation(
    listener: Listener[Stream], dial: Dial
) -> None:
    """A call that runs out of its caller's time decides nothing: the connection stays."""
    client = dial(listener)

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        await asyncio.Event().wait()
        return ACCEPT

    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await listener.accept(condition)

    assert not hasattr(caught.value, "__notes__")
    assert wire(client) == "open"
    assert [each.status for each in listener.pending] == [Status.QUEUED]
    (await listener.accept()).close()


async def test_no_storm_without_descriptors(
    listener: Listener[Stream],
    dial: Dial,
    exhaust: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without descriptors nothing is due for a moment: neither PENDING nor a retry loop spins."""
    monkeypatch.setattr("condaccept._accepting.REST", 3600.0)
    accepting = listener._accepting
    told: list[Event] = []

    def callback(_source: object, event: Event, _error: OSError | None) -> None:
        told.append(event)
        with contextlib.suppress(DescriptorsExhaustedError):
            listener.accept_nowait(reject)

    dial(listener)
    await queued(listener, 1)
    await turns()  # the loop is told that somebody came, once
    exhaust()
    subscription = listener.on(Event.PENDING, callback)
    await until(lambda: told)
    waiting = asyncio.ensure_future(listener.wait_pending())
    await turns(200)
    assert len(told) == 1
    assert not waiting.done()

    assert accepting._resting is not None
    accepting._resting.cancel()
    accepting._rested()
    await waiting  # the next look
    await turns(200)
    assert len(told) == 2
    subscription.cancel()


async def test_a_stream_that_cannot_be_made(
    listener: Listener[Stream], dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accepted connection that the watch has no room for counts as failed, and is closed."""
    client = dial(listener)
    await queued(listener, 1)
    listener.on(Event.READ, lambda *_: None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    async def later(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        monkeypatch.setattr(listener._watch, "register", full)
        return accept(pending)

    with pytest.raises(OSError, match="no room"):
        await listener.accept(later)
    assert listener.pending == ()
    now = listener.statistics()
    assert (now.taken, now.failed, now.deciding, now.streams) == (1, 1, 0, 0)
    assert wire(client) == "eof"


async def test_a_farewell_that_cannot_wait(
    listener: Listener[Stream], dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rejection whose farewell the watch has no room for says what it can at once."""
    client = dial(listener)
    await queued(listener, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(listener._watch, "register", full)
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(lambda _: Reject(data=b"bye"))
    now = listener.statistics()
    assert (now.rejected, now.rejecting, now.cut_short) == (1, 0, 1)
    assert wire(client) == b"bye"
    assert wire(client) == "eof"


async def test_a_look_at_a_reset_caller(listener: Listener[Stream], dial: Dial) -> None:
    """A condition that looks at what a caller sent leaves its reset for the stream to tell."""
    client = dial(listener)
    await queued(listener, 1)

    def look(pending: PendingTransport) -> AnyVerdict:
        reset(client)
        assert pending.peek(10) == b""
        return accept(pending)

    stream = await listener.accept(look)
    with pytest.raises(ConnectionResetError):
        await stream.read(1)
    stream.close()


async def test_one_exception_object_for_many(listener: Listener[Stream], dial: Dial) -> None:
    """A condition that raises the same object again and again names the last connection."""
    error = ValueError("always the same")

    def condition(_pending: PendingTransport) -> AnyVerdict:
        raise error

    for _ in range(3):
        client = dial(listener)
        name = client.getsockname()
        with pytest.raises(ValueError, match="always"):
            await listener.accept(condition)
    assert len(error.__notes__) == 1
    assert repr(name) in error.__notes__[0]
