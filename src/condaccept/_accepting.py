"""One offer, and those who wait for it: `accept()` and what belongs to it.

The whole way of a connection under `accept()` is here, from the taking to the stream or
the error. Nothing is taken but by a call that decides it at once, in its own step: a call
that is cancelled while it waits has nothing to give back, and waking one is a hint only.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, cast

from condaccept._events import Event
from condaccept._pending import Condition, Peer, PendingDeque, PendingTransport, Status
from condaccept._sockets import OwnedSocket, inherit_options, reset
from condaccept._stream import Stream, check_callback, deliver
from condaccept._verdict import Accept, AnyVerdict, Defer, Reject, Verdict
from condaccept.exceptions import (
    AcceptError,
    AcceptInProgressError,
    AcceptInterruptedError,
    CalleeDataError,
    ConditionNotCallableError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    InvalidGroupError,
    InvalidVerdictError,
    ListenerClosedError,
    NoPendingError,
    PendingExpiredError,
    PendingResetError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from condaccept._events import EventCallback, Signals, Subscription
    from condaccept._ledger import Ledger
    from condaccept._pending import Arrival, Release
    from condaccept._sockets import Option
    from condaccept._watch import Watch
    from condaccept.gates._gate import Gate

__all__ = ("Accepting", "OnEof")

T = TypeVar("T")

OnEof = Literal["keep", "withdraw"]

IN_A_ROW: Final = 64
"""Calls that complete at once before one yields to the loop."""

_BARE_ACCEPT, _BARE_REJECT, _BARE_DEFER = Verdict
_ACCEPT: Final = Accept()
_REJECT: Final = Reject()
_DEFER: Final = Defer()
_LOSSES: Final[dict[Status, type[AcceptError]]] = {
    Status.RESET: PendingResetError,
    Status.EXPIRED: PendingExpiredError,
}
_VERDICTS: Final = (Verdict, Accept, Reject, Defer)
_TO_OFFER: Final = frozenset({Status.QUEUED, Status.DEFERRED})
_KEPT: Final = frozenset({Status.DEFERRED, Status.ADMITTED, *_LOSSES})
"""What a connection that was never on the deque is put there for."""
_IN_HAND: Final = object()
"""The taker of a connection that a call is about to be done with."""
_TO_COME: Final = object()
"""In the place of a stream: the gate has still to produce it."""


class _Nobody:
    """In the place of an arrival that accept(2) did not give out."""

    caller_id = None


class Accepting(Generic[T]):
    """Decides pending connections, one per call."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        gate: Gate[Any],
        *,
        pending: PendingDeque,
        ledger: Ledger,
        signals: Signals,
        source: Callable[[], object],
        stream_factory: Callable[[Stream], T] | None,
        on_eof: OnEof,
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._gate = gate
        self._pending = pending
        self._ledger = ledger
        self._signals = signals
        self._source = source
        self._stream_factory = stream_factory
        self._withdraw = on_eof == "withdraw"
        self._streak = 0
        self._news = False  # somebody came since the last accept call looked
        self._asked: PendingTransport | None = None  # by a plain condition, right now
        self._deciders: dict[PendingTransport, asyncio.Task[Any] | None] = {}
        self._waiters: deque[asyncio.Future[bool]] = deque()  # accept calls
        self._places: deque[asyncio.Future[bool]] = deque()  # accept calls, at a bound
        self._watchers: deque[asyncio.Future[bool]] = deque()  # wait_pending calls
        self._idle: list[asyncio.Future[None]] = []  # wait_closed calls
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._fresh: PendingTransport | None = None  # taken by a call that has it in hand
        self._streams: dict[int, weakref.ref[Stream]] = {}
        self.options: list[Option] = []
        self.closed = False
        gate.start(self._arrived)

    # -- the calls

    async def accept(self, condition: Condition | None, callback_data: object) -> T:
        """See `Listener.accept()`."""
        turned = False  # whether this call has yielded to the loop
        pending = None
        try:
            self._check(condition)
            if self._streak >= IN_A_ROW:
                turned = True
                await self._turn()
            # A call that raises has yielded. A loss keeps its place until then: this call
            # may be cancelled, and another has to tell of it.
            while (pending := self._head()) is None or (pending._status in _LOSSES and not turned):
                turned = True
                if pending is not None:
                    await self._turn()
                else:
                    await self._wait(self._places if self._pending.full else self._waiters)
            if pending._status not in _TO_OFFER:
                stream: Any = self._unasked(pending)
            else:
                verdict = self._ask(pending, condition, callback_data)
                if not isinstance(verdict, _VERDICTS) and inspect.isawaitable(verdict):
                    verdict = await self._answer(pending, verdict)
                stream = self._conclude(pending, verdict)
                if stream is _TO_COME:
                    stream = await self._completed(pending)
        except BaseException as error:
            self._looked(pending, error)
            if not turned and isinstance(error, Exception) and not _is_bad(condition):
                await self._turn()
            raise
        self._streak += 1
        self._looked(pending)
        result: T = stream
        return result

    def accept_nowait(self, condition: Condition | None, callback_data: object) -> T:
        """See `Listener.accept_nowait()`."""
        self._check(condition)
        pending = None
        try:
            pending = self._head()
            if pending is None:
                reason = "nobody is pending"
                raise NoPendingError(reason)
            if pending._status not in _TO_OFFER:
                stream: Any = self._unasked(pending)
            else:
                verdict = self._ask(pending, condition, callback_data)
                if not isinstance(verdict, _VERDICTS) and inspect.isawaitable(verdict):
                    self._undo(pending)
                    if inspect.iscoroutine(verdict):
                        verdict.close()
                    reason = "accept_nowait() cannot await a condition: use accept()"
                    raise InvalidVerdictError(reason, pending.caller_id)
                stream = self._conclude(pending, verdict)
                if stream is _TO_COME:
                    reason = "accepted, but the connection is not complete yet"
                    raise NoPendingError(reason, pending.caller_id)
        except BaseException as error:
            self._looked(pending, error)
            raise
        self._looked(pending)
        result: T = stream
        return result

    async def wait_pending(self) -> None:
        """See `Listener.wait_pending()`."""
        turned = self._streak >= IN_A_ROW
        if turned:
            await self._turn()
        while not self.closed and not self._due():
            turned = True
            await self._wait(self._watchers)
        if self.closed:
            if not turned:
                await self._turn()
            raise _closed()
        self._streak += 1

    def cancel_accept(self) -> int:
        """See `Listener.cancel_accept()`."""
        cancelled = 0
        for waiters in (self._waiters, self._places, self._watchers):
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(True)
                    cancelled += 1
            waiters.clear()
        return cancelled

    def close(self) -> None:
        """See `Listener.close()`."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        current = _current_task()
        for pending in self._pending.undecided():
            task = self._deciders.get(pending)
            if pending is self._asked or (task is not None and task is current):
                continue  # the condition that closes the listener keeps its verdict
            if pending._taker is _IN_HAND:
                continue
            self._drop(pending)
            if task is not None:
                task.cancel()
        while (loss := self._pending.head()) is not None:
            self._pending.report(loss)
        for waiters in (self._waiters, self._places, self._watchers):
            self._wake(waiters)
        self._gate.close()
        self._watch.release()
        self._decider_left()

    async def wait_closed(self) -> None:
        """See `Listener.wait_closed()`."""
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        while not self.closed or any(
            task is not _current_task() for task in self._deciders.values()
        ):
            waiter = self._loop.create_future()
            self._idle.append(waiter)
            await waiter

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

    @property
    def open_streams(self) -> int:
        """How many accepted connections are open."""
        return len(self._streams)

    # -- looking

    def _check(self, condition: Condition | None) -> None:
        """Refuse a call that cannot be made, before the deque is touched."""
        if self.closed:
            raise _closed()
        if self._asked is not None or (
            self._deciders and _current_task() in self._deciders.values()
        ):
            reason = "a condition cannot accept from the listener that asks it"
            raise AcceptInProgressError(reason)
        if _is_bad(condition):
            reason = f"the condition cannot be called: {condition!r}"
            raise ConditionNotCallableError(reason)

    def _head(self) -> PendingTransport | None:
        """Return what this call is to act on, taking it if need be; None: nobody is there."""
        if self.closed:
            raise _closed()
        self._news = False
        if self._pending:
            pending = self._pending.head()
            if pending is not None:
                if pending._status in _TO_OFFER:
                    self._look(pending)
                return pending
            if self._pending.full:
                return None
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
            self._look(pending)
        return pending

    def _look(self, pending: PendingTransport) -> bool:
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

    def _due(self) -> bool:
        """Whether an accept call has something new to act on."""
        head = self._pending.head()
        if head is None:
            return not self._pending.full and self._gate.waiting()
        # A head that was deferred is nothing new, and those behind it are out of reach: who
        # waits for them is told of their coming, once.
        return head._status is not Status.DEFERRED or self._news

    # -- asking

    def _ask(
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
        self._asked = pending
        try:
            return condition(pending)
        except BaseException as error:
            self._raised(pending, error)
            raise
        finally:
            self._asked = None

    async def _answer(
        self, pending: PendingTransport, awaitable: Awaitable[AnyVerdict]
    ) -> AnyVerdict:
        """Wait for the verdict of an async condition."""
        if not pending._kept:
            self._pending.enter(pending, Status.DECIDING, 0.0)
        self._pass_on()
        task = _current_task()
        cancelling = 0 if task is None else task.cancelling()
        self._deciders[pending] = task
        try:
            verdict = await awaitable
        except BaseException as error:
            # No decision any more: a release below may close the listener.
            del self._deciders[pending]
            if pending._status is Status.CLOSED:
                # close() has cancelled this task; somebody else may have, too.
                if task is not None and task.uncancel() > cancelling:
                    raise
                raise _closed(pending) from error
            if isinstance(error, asyncio.CancelledError) and (
                task is None or task.cancelling() > cancelling
            ):
                self._undo(pending)
            else:
                self._raised(pending, error)
            raise
        finally:
            self._deciders.pop(pending, None)
            self._decider_left()
        if pending._status is Status.CLOSED:
            # The condition has swallowed the cancellation by close().
            if task is not None:
                task.uncancel()
            raise _closed(pending)
        if not self._look(pending):
            # This call tells of the loss, unless it is cancelled before it has yielded.
            pending._taker = _IN_HAND
            try:
                await self._turn()
            except BaseException:
                pending._taker = None
                self._became_due()
                raise
            raise self._report(pending)
        return verdict

    def _conclude(self, pending: PendingTransport, verdict: object) -> object:
        """Do as the verdict says: return the stream, or _TO_COME, or raise."""
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
        self._undo(pending)
        reason = f"a condition returns ACCEPT, REJECT or DEFER, this one returned {verdict!r}"
        raise InvalidVerdictError(reason, pending.caller_id)

    def _accept(self, pending: PendingTransport, accept: Accept) -> object:
        if pending.group is not None:
            self._undo(pending)
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
            raise _closed(pending)
        admission.add_done_callback(partial(self._came, pending))
        self._pass_on()
        return _TO_COME

    def _reject(self, pending: PendingTransport, reject: Reject) -> AcceptError:
        data = reject.data
        if data is None:
            data = b"" if pending._callee_data is None else bytes(pending._callee_data)
        elif len(data) > pending.callee_data.capacity:
            self._undo(pending)
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
            return _closed(pending)
        pending.deferrals += 1
        self._ledger.deferrals += 1
        self._to(pending, Status.DEFERRED)
        self._gate.watch(pending._arrival, partial(self._changed, pending))
        self._set_timer()
        # Last: a release may do anything, close the listener for one.
        self._ledger.end_offer(pending)
        if self.closed:
            return _closed(pending)
        error = ConnectionDeferredError(defer.reason, pending.caller_id)
        error.defer = defer
        return error

    def _undo(self, pending: PendingTransport) -> None:
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
            self._became_due()

    def _raised(self, pending: PendingTransport, error: BaseException) -> None:
        """Reject a connection whose condition raised."""
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, b"")
        self._ledger.settle(pending, Status.REJECTED, f"the condition raised {error!r}")
        error.add_note(f"The connection from {pending.caller_id!r} was rejected because of this.")

    # -- accepted

    def _deliver(self, pending: PendingTransport, sock: OwnedSocket, reason: str) -> object:
        """Make the stream of an accepted connection."""
        fd = sock.fileno()
        pending._taker = _IN_HAND
        sock.own(partial(self._over, fd, pending._release_holds()))
        if self.options:
            inherit_options(sock, self.options)
        stream = Stream(
            sock, self._loop, self._watch, pending.caller_id, self._signals.subscriptions
        )
        stream.state = pending.state
        self._streams[fd] = weakref.ref(stream)
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
                stream.abort()
                self._to(pending, Status.FAILED)
                self._ledger.settle(pending, Status.FAILED, f"stream_factory raised {error!r}")
                raise
        self._to(pending, Status.ACCEPTED)
        self._ledger.settle(pending, Status.ACCEPTED, reason)
        return result

    def _over(self, fd: int, holds: Sequence[Release]) -> None:
        """Note that an accepted connection's descriptor is gone."""
        self._streams.pop(fd, None)
        if holds:
            self._ledger.release(holds)

    def _unasked(self, pending: PendingTransport) -> object:
        """Act on what needs no condition: a loss to report, a connection that is ready."""
        if pending._status in _LOSSES:
            raise self._report(pending)
        sock, pending._socket = pending._socket, None
        return self._deliver(pending, sock, _ACCEPT.reason)

    async def _completed(self, pending: PendingTransport) -> object:
        """Wait until the gate has produced the socket of an accepted connection."""
        taker = pending._taker = self._loop.create_future()
        try:
            await taker
        finally:
            pending._taker = None
            if taker.cancelled() and pending._status is not Status.ADMITTED:
                self._became_due()
        if self.closed:
            raise _closed(pending)
        return self._unasked(pending)

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
        return _LOSSES[loss._status](loss._reason, loss.caller_id)

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
        if pending._status is Status.DEFERRED and not self._look(pending):
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

    # -- moving, waiting, waking

    def _to(self, pending: PendingTransport, status: Status) -> None:
        """Make a transition, on the deque where it belongs there."""
        if pending._kept:
            self._pending.move(pending, status, self._loop.time())
            self._pass_on()
        elif status in _KEPT:
            self._pending.enter(pending, status, self._loop.time())
        else:
            pending._move(status)

    async def _turn(self) -> None:
        self._streak = 0
        await asyncio.sleep(0)

    async def _wait(self, waiters: deque[asyncio.Future[bool]]) -> None:
        waiter: asyncio.Future[bool] = self._loop.create_future()
        waiters.append(waiter)
        self._streak = 0
        try:
            interrupted = await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                # Woken, and cancelled before it could look: somebody else has to.
                self._pass_on()
            elif waiter in waiters:  # and not dropped since by whoever came to wake it
                waiters.remove(waiter)
            raise
        if interrupted:
            reason = "cancel_accept() ended the wait"
            raise AcceptInterruptedError(reason)

    def _arrived(self) -> None:
        """Note that somebody came: the gate says so."""
        self._news = True
        self._became_due()

    def _became_due(self) -> None:
        """Tell everybody that there is something new to act on."""
        self._wake_one()
        self._wake(self._watchers)
        self._fire_pending()

    def _pass_on(self) -> None:
        """Wake others if there is more to act on."""
        if self._places and not self._pending.full:
            self._wake_one()
        elif (self._waiters or self._watchers) and self._due():
            self._wake_one()
            self._wake(self._watchers)

    def _wake_one(self) -> None:
        """Wake the accept call that has waited longest and may take."""
        full = self._pending.full
        for waiters in (self._waiters, self._places) if full else (self._places, self._waiters):
            while waiters:
                waiter = waiters.popleft()
                if not waiter.done():
                    waiter.set_result(False)
                    return

    def _wake(self, waiters: deque[asyncio.Future[bool]]) -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(False)
        waiters.clear()

    def _looked(self, pending: PendingTransport | None, error: BaseException | None = None) -> None:
        """Note the end of a call that looked at the deque, and at *pending* there."""
        self._fresh = None
        if self._waiters or self._places or self._watchers:
            self._pass_on()
        if not self._signals.subscriptions:
            return
        if (
            pending is not None
            and pending._status is Status.DEFERRED
            and isinstance(error, ConnectionDeferredError)
        ):
            return  # a deferral; not a condition that raised the same
        self._signals.arm(Event.PENDING)
        if self._signals.wanted(Event.PENDING) and not self.closed and self._due():
            self._fire_pending()

    def _fire_pending(self) -> None:
        for subscription in self._signals.fire(Event.PENDING):
            self._deliver_pending(subscription)

    def _deliver_pending(self, subscription: Subscription) -> None:
        self._loop.call_soon(deliver, subscription, self._source(), Event.PENDING, None)

    def on(self, events: Event, callback: EventCallback) -> Subscription:
        """See `Listener.on()`."""
        check_callback(callback)
        told = not self._signals.armed(Event.PENDING)
        subscription = self._signals.add(events, callback)
        if subscription.wants(Event.PENDING) and not self.closed and self._due():
            if told:
                self._deliver_pending(subscription)
            else:
                self._fire_pending()
        return subscription

    def _decider_left(self) -> None:
        if self.closed:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running: close() from outside
        return None


def _is_bad(condition: object) -> bool:
    return condition is not None and not callable(condition)


def _closed(pending: PendingTransport | None = None) -> ListenerClosedError:
    reason = "the listener is closed"
    return ListenerClosedError(reason, None if pending is None else pending.caller_id)
