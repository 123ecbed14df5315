"""What is done to one connection: looking, asking, concluding, losing it.

Every kind of consumer decides through this room. It knows who is under decision, and
nothing of who waits for a connection: it only says that something is due, or that a place
on the deque was given back.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, cast

from condaccept._delivery import current_task
from condaccept._pending import Condition, Peer, PendingDeque, PendingTransport, Status
from condaccept._sockets import OwnedSocket, inherit_options, reset
from condaccept._stream import Stream
from condaccept._verdict import Accept, AnyVerdict, Defer, Reject, Verdict
from condaccept.exceptions import (
    AcceptError,
    CalleeDataError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    InvalidGroupError,
    InvalidVerdictError,
    ListenerClosedError,
    PendingExpiredError,
    PendingResetError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from condaccept._delivery import Delivery
    from condaccept._events import Signals
    from condaccept._ledger import Ledger
    from condaccept._pending import Arrival, Release
    from condaccept._sockets import Option
    from condaccept._watch import Watch
    from condaccept.gates._gate import Gate

__all__ = ("LOSSES", "TO_COME", "TO_OFFER", "Deciding", "OnEof", "closed_error")

T = TypeVar("T")

OnEof = Literal["keep", "withdraw"]

_BARE_ACCEPT, _BARE_REJECT, _BARE_DEFER = Verdict
_ACCEPT: Final = Accept()
_REJECT: Final = Reject()
_DEFER: Final = Defer()
LOSSES: Final[dict[Status, type[AcceptError]]] = {
    Status.RESET: PendingResetError,
    Status.EXPIRED: PendingExpiredError,
}
"""How a connection can be lost before a verdict, and the error that tells of it."""
TO_OFFER: Final = frozenset({Status.QUEUED, Status.DEFERRED})
TO_COME: Final = object()
"""In the place of a stream: the gate has still to produce it."""
_KEPT: Final = frozenset({Status.DEFERRED, Status.ADMITTED, *LOSSES})
"""What a connection that was never on the deque is put there for."""
_NOTE: Final = " was rejected because of this."
_IN_HAND: Final = object()
"""The taker of a connection that a call is about to be done with."""


class _Nobody:
    """In the place of an arrival that accept(2) did not give out."""

    caller_id = None


class Deciding(Generic[T]):
    """Decides connections, one at a time, for whoever has a condition.

    Attributes:
        asked: The connection that a plain condition is being asked about, right now.
        deciders: Those under decision by an async condition, and the tasks that wait.
        options: Socket options set after the listener began.
        closed: Whether `close()` was called.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        gate: Gate[Any],
        *,
        pending: PendingDeque,
        ledger: Ledger,
        signals: Signals,
        delivery: Delivery,
        stream_factory: Callable[[Stream], T] | None,
        on_eof: OnEof,
        became_due: Callable[[], object],
        left_place: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._gate = gate
        self._pending = pending
        self._ledger = ledger
        self._signals = signals
        self._delivery = delivery
        self._stream_factory = stream_factory
        self._withdraw = on_eof == "withdraw"
        self._became_due = became_due
        self._left_place = left_place
        self._fresh: PendingTransport | None = None  # taken, and in the hands of a call
        self._streams: dict[int, weakref.ref[Stream]] = {}
        self._serial = 0
        self._thread = threading.get_ident()
        self._idle: list[asyncio.Future[None]] = []  # wait_closed calls
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.asked: PendingTransport | None = None
        self.deciders: dict[PendingTransport, asyncio.Task[Any] | None] = {}
        self.options: list[Option] = []
        self.closed = False

    def close(self) -> None:
        """Close whatever is undecided, and the gate."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        current = current_task()
        for pending in self._pending.undecided():
            task = self.deciders.get(pending)
            if pending is self.asked or (task is not None and task is current):
                continue  # the condition that closes the listener keeps its verdict
            if pending._taker is _IN_HAND:
                continue
            self._drop(pending)
            if task is not None:
                task.cancel()
        while (loss := self._pending.head()) is not None:
            self._pending.report(loss)
        self._gate.close()
        self._watch.release()
        self._decider_left()
        self._delivery.look_over()

    async def wait_closed(self) -> None:
        """Wait until no decision is under way after `close()`, but for the caller's own."""
        while not self.closed or any(task is not current_task() for task in self.deciders.values()):
            waiter = self._loop.create_future()
            self._idle.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._idle:
                    self._idle.remove(waiter)

    def abort_streams(self) -> None:
        """Abort every stream that is open."""
        for each in list(self._streams.values()):
            stream = each()
            if stream is not None:
                stream.abort()

    def undecided(self) -> tuple[PendingTransport, ...]:
        """See `Listener.pending`."""
        fresh = self._fresh
        if fresh is None or fresh._kept or fresh._status is not Status.QUEUED:
            return self._pending.undecided()
        return (*self._pending.undecided(), fresh)

    def is_over(self) -> bool:
        """Whether nothing can happen any more: closed, and no accepted connection is open."""
        return self.closed and not self._streams and not self.deciders

    @property
    def open_streams(self) -> int:
        """How many accepted connections are open."""
        return len(self._streams)

    # -- looking

    def take(self) -> PendingTransport | None:
        """Take a connection from the gate; ``None`` if nobody waits there.

        What is returned may be a loss, which then is on the deque.

        Raises:
            AcceptError: Nothing could be taken; whoever waits at the gate goes on waiting.
        """
        try:
            taken = self._gate.take(1)
        except PendingResetError as error:
            # Told of by accept(2), which gave no connection: a loss like any other.
            self._ledger.taken += 1
            pending = PendingTransport(cast("Arrival", _Nobody()), time.monotonic)
            self._book(pending, Status.RESET, error.reason)
            return pending
        if not taken:
            return None
        pending = PendingTransport(taken[0], time.monotonic)
        self._ledger.taken += 1
        self._fresh = pending
        if pending._arrival.hangup:
            self.look(pending)
        return pending

    def look(self, pending: PendingTransport) -> bool:
        """Whether the caller is still there; if not, the loss is booked and on the deque."""
        peer = pending._arrival.peer()
        if peer is Peer.THERE:
            return True
        if peer is Peer.GONE:
            self._lose(pending, Status.RESET, "the peer reset the connection before the verdict")
            return False
        if self._withdraw:
            self._lose(pending, Status.EXPIRED, "the caller closed before the verdict: withdrawn")
            return False
        return True

    # -- asking

    def ask(
        self, pending: PendingTransport, condition: Condition | None, callback_data: object
    ) -> AnyVerdict | Awaitable[AnyVerdict]:
        """Make one offer, as far as a plain condition goes."""
        if pending._kept:
            self._pending.move(pending, Status.DECIDING, 0.0)
        self._ledger.offers += 1
        pending.callback_data = callback_data
        pending.group = pending._callee_data = None
        if condition is None:
            return _ACCEPT
        pending._offered = True
        self.asked = pending
        try:
            return condition(pending)
        except BaseException as error:
            self._raised(pending, error)
            raise
        finally:
            self.asked = None

    async def answer(
        self, pending: PendingTransport, awaitable: Awaitable[AnyVerdict]
    ) -> AnyVerdict:
        """Wait for the verdict of an async condition."""
        if not pending._kept:
            self._pending.enter(pending, Status.DECIDING, 0.0)
        self._left_place()
        task = current_task()
        cancelling = 0 if task is None else task.cancelling()
        self.deciders[pending] = task
        try:
            verdict = await awaitable
        except BaseException as error:
            # No decision any more: a release below may close the listener.
            del self.deciders[pending]
            if pending._status is Status.CLOSED:
                # close() has cancelled this task; somebody else may have, too.
                if task is not None and task.uncancel() > cancelling:
                    raise
                raise closed_error(pending) from error
            if isinstance(error, asyncio.CancelledError) and (
                task is None or task.cancelling() > cancelling
            ):
                self.undo(pending)
            else:
                self._raised(pending, error)
            raise
        finally:
            self.deciders.pop(pending, None)
            self._decider_left()
        if pending._status is Status.CLOSED:
            # The condition has swallowed the cancellation by close().
            if task is not None:
                task.uncancel()
            raise closed_error(pending)
        if not self.look(pending):
            # This call tells of the loss, unless it is cancelled before it has yielded.
            pending._taker = _IN_HAND
            try:
                await asyncio.sleep(0)
            except BaseException:
                pending._taker = None
                self._became_due()
                raise
            raise self._report(pending)
        return verdict

    def conclude(self, pending: PendingTransport, verdict: object) -> object:
        """Do as the verdict says: return the stream, or TO_COME, or raise."""
        if verdict is _BARE_ACCEPT:
            return self._accept(pending, _ACCEPT)
        if verdict is _BARE_REJECT:
            raise self._reject(pending, _REJECT)
        if verdict is _BARE_DEFER:
            raise self._defer(pending, _DEFER)
        if isinstance(verdict, Accept):
            return self._accept(pending, verdict)
        if isinstance(verdict, Reject):
            raise self._reject(pending, verdict)
        if isinstance(verdict, Defer):
            raise self._defer(pending, verdict)
        self.undo(pending)
        reason = f"a condition returns ACCEPT, REJECT or DEFER, this one returned {verdict!r}"
        raise InvalidVerdictError(reason, pending.caller_id)

    def _accept(self, pending: PendingTransport, accept: Accept) -> object:
        if pending.group is not None:
            self.undo(pending)
            reason = f"the listener has no group {pending.group!r}"
            raise InvalidGroupError(reason, pending.caller_id)
        admission = self._gate.admit(pending._arrival)
        pending._offered = False
        if isinstance(admission, OwnedSocket):
            return self._deliver(pending, admission, accept.reason)
        pending._socket = admission
        self._to(pending, Status.ADMITTED)
        if self.closed:
            self._drop(pending)
            raise closed_error(pending)
        admission.add_done_callback(partial(self._came, pending))
        self._left_place()
        return TO_COME

    def _reject(self, pending: PendingTransport, reject: Reject) -> AcceptError:
        data = reject.data
        if data is None:
            data = b"" if pending._callee_data is None else bytes(pending._callee_data)
        elif len(data) > pending.callee_data.capacity:
            self.undo(pending)
            capacity = pending.callee_data.capacity
            reason = f"callee data of {len(data)} bytes is over the capacity of {capacity}"
            return CalleeDataError(reason, pending.caller_id)
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, data)
        self._ledger.settle(pending, Status.REJECTED, reject.reason)
        return ConnectionRejectedError(reject.reason, pending.caller_id)

    def _defer(self, pending: PendingTransport, defer: Defer) -> AcceptError:
        if self.closed:
            self._drop(pending)
            return closed_error(pending)
        pending.deferrals += 1
        self._ledger.deferrals += 1
        self._to(pending, Status.DEFERRED)
        self._gate.watch(pending._arrival, partial(self._changed, pending))
        self._set_timer()
        # Last: a release may do anything, close the listener for one.
        self._ledger.end_offer(pending)
        if self.closed:
            return closed_error(pending)
        error = ConnectionDeferredError(defer.reason, pending.caller_id)
        error.defer = defer
        return error

    def undo(self, pending: PendingTransport) -> None:
        """End an offer without a verdict: the connection keeps its place."""
        if self.closed:
            self._drop(pending)
            return
        if pending._kept:
            self._pending.resume(pending, self._loop.time())
            self._set_timer()
        else:
            self._pending.enter(pending, Status.QUEUED, 0.0)
        self._ledger.end_offer(pending)
        if not self.closed:
            # Its peer may have left meanwhile, and the watch tells that once.
            self._changed(pending)
            self._became_due()

    def _raised(self, pending: PendingTransport, error: BaseException) -> None:
        """Reject a connection whose condition raised."""
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, b"")
        self._ledger.settle(pending, Status.REJECTED, f"the condition raised {error!r}")
        # One exception object may be raised for many connections: it names the last.
        notes = getattr(error, "__notes__", [])
        notes[:] = [note for note in notes if not note.endswith(_NOTE)]
        error.add_note(f"The connection from {pending.caller_id!r}{_NOTE}")

    # -- accepted

    def _deliver(self, pending: PendingTransport, sock: OwnedSocket, reason: str) -> object:
        """Make the stream of an accepted connection."""
        pending._taker = _IN_HAND
        self._serial += 1
        sock.own(partial(self._over, self._serial, pending._release_holds()), self._forgotten)
        if self.options:
            inherit_options(sock, self.options)
        try:
            stream = Stream(
                sock,
                self._loop,
                self._watch,
                self._delivery,
                pending.caller_id,
                inherited=self._signals.subscriptions,
            )
        except OSError as error:
            # The watch has no room for it.
            self._fail(pending, f"the stream could not be made: {error}")
            sock.close()
            raise
        stream.state = pending.state
        self._streams[self._serial] = weakref.ref(stream)
        if pending._callee_data:
            try:
                stream.write(bytes(pending._callee_data))
            except OSError:
                # The caller has left: the stream remembers, and says so when it is used.
                pass
        result: object = stream
        if self._stream_factory is not None:
            try:
                result = self._stream_factory(stream)
            except BaseException as error:
                self._fail(pending, f"stream_factory raised {error!r}")
                stream.abort()
                raise
        self._to(pending, Status.ACCEPTED)
        self._ledger.settle(pending, Status.ACCEPTED, reason)
        return result

    def _fail(self, pending: PendingTransport, reason: str) -> None:
        self._to(pending, Status.FAILED)
        self._ledger.settle(pending, Status.FAILED, reason)

    def _forgotten(self, sock: OwnedSocket) -> None:
        """Close the socket of a stream that was collected as garbage, in whatever thread."""
        if self._loop.is_closed():
            sock.close()
        else:
            self._loop.call_soon_threadsafe(self._close_forgotten, sock)

    def _close_forgotten(self, sock: OwnedSocket) -> None:
        # In this order: the number of the descriptor may come back at once.
        self._watch.unregister(sock.fileno())
        sock.close()

    def _over(self, serial: int, holds: Sequence[Release]) -> None:
        """Note that an accepted connection's descriptor is gone."""
        if threading.get_ident() != self._thread and not self._loop.is_closed():
            # Collected as garbage, wherever the collector ran: releases are for this thread.
            self._loop.call_soon_threadsafe(self._over, serial, holds)
            return
        self._streams.pop(serial, None)
        if holds:
            self._ledger.release(holds)
        if self.closed:
            self._delivery.look_over()

    def unasked(self, pending: PendingTransport) -> object:
        """Act on what needs no condition: a loss to report, a connection that is ready."""
        if pending._status in LOSSES:
            raise self._report(pending)
        sock, pending._socket = pending._socket, None
        return self._deliver(pending, sock, _ACCEPT.reason)

    async def completed(self, pending: PendingTransport) -> object:
        """Wait until the gate has produced the socket of an accepted connection."""
        taker = pending._taker = self._loop.create_future()
        try:
            await taker
        finally:
            pending._taker = None
            if taker.cancelled() and pending._status is not Status.ADMITTED:
                self._became_due()
        if self.closed:
            raise closed_error(pending)
        return self.unasked(pending)

    def _came(self, pending: PendingTransport, admission: asyncio.Future[OwnedSocket]) -> None:
        """Note what has become of an admission."""
        lost = admission.cancelled() or admission.exception() is not None
        if pending._status is not Status.ADMITTED:
            if not lost:
                reset(admission.result())
            return
        if lost:
            pending._socket = None
            self._book(pending, Status.RESET, "the caller left before the connection was complete")
        else:
            pending._socket = admission.result()
            self._to(pending, Status.READY)
        if pending._taker is None:
            self._became_due()
        elif not pending._taker.done():
            pending._taker.set_result(None)

    # -- lost

    def _lose(self, pending: PendingTransport, status: Status, reason: str) -> None:
        """Close a connection that was lost before a verdict; somebody has to be told."""
        self._gate.forget(pending._arrival)
        self._book(pending, status, reason)

    def _book(self, pending: PendingTransport, loss: Status, reason: str) -> None:
        self._to(pending, loss)
        pending._reason = reason
        self._ledger.settle(pending, loss, reason)

    def _report(self, loss: PendingTransport) -> AcceptError:
        """Return the error that tells of a loss, which is told once."""
        if loss._kept:
            self._pending.report(loss)
        return LOSSES[loss._status](loss._reason, loss.caller_id)

    def _drop(self, pending: PendingTransport) -> None:
        """Close a connection because the listener was."""
        was = pending._status
        taker = pending._taker
        self._to(pending, Status.CLOSED)
        if was is Status.ADMITTED:
            pending._socket.cancel()
            if taker is not None and not taker.done():
                taker.set_result(None)
        elif was is Status.READY:
            reset(pending._socket)
        else:
            self._gate.forget(pending._arrival)
        self._ledger.settle(pending, Status.CLOSED, "the listener was closed")

    def _changed(self, pending: PendingTransport) -> None:
        """Look at a deferred connection whose peer may have left: the watch says so."""
        if pending._status is Status.DEFERRED and not self.look(pending):
            self._became_due()

    def _set_timer(self) -> None:
        deadline = self._pending.next_deadline
        if self._timer is not None:
            if deadline is None or self._timer_at <= deadline:
                return
            self._timer.cancel()
        if deadline is not None:
            # Kept beside it: for a time that has come, uvloop gives a handle without when().
            self._timer_at = deadline
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        for pending in self._pending.expired(self._loop.time()):
            reason = f"no verdict within {self._pending.defer_timeout} s of the first deferral"
            self._lose(pending, Status.EXPIRED, reason)
            self._became_due()
        self._set_timer()

    # -- moving

    def _to(self, pending: PendingTransport, status: Status) -> None:
        """Make a transition, on the deque where it belongs there."""
        if pending._kept:
            self._pending.move(pending, status, self._loop.time())
            self._left_place()
        elif status in _KEPT:
            self._pending.enter(pending, status, self._loop.time())
        else:
            pending._move(status)

    def done_with_fresh(self) -> None:
        """Note that the call which took a connection has nothing in its hands any more."""
        self._fresh = None
        if self.closed:
            self._delivery.look_over()

    def _decider_left(self) -> None:
        if self.closed:
            idle, self._idle = self._idle, []
            for waiter in idle:
                if not waiter.done() and not self._loop.is_closed():
                    waiter.set_result(None)


def closed_error(pending: PendingTransport | None = None) -> ListenerClosedError:
    """Return what a call on a closed listener raises."""
    reason = "the listener is closed"
    return ListenerClosedError(reason, None if pending is None else pending.caller_id)
