"""The accept calls: one offer each, and whose turn it is.

A connection is taken in the step of the call that decides it, so a call that is cancelled
while it waits has nothing to give back, and waking one is a hint only.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from condaccept._admitting import TO_COME
from condaccept._deciding import Deciding
from condaccept._events import Event
from condaccept._moving import LOSSES, TO_OFFER, OnEof, OnFull, closed_error
from condaccept._pending import Condition, PendingDeque, PendingTransport, Status
from condaccept._verdict import Accept, Defer, Reject, Verdict
from condaccept.exceptions import (
    AcceptError,
    AcceptInterruptedError,
    BuffersExhaustedError,
    ConditionNotCallableError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    DescriptorsExhaustedError,
    InvalidVerdictError,
    NoPendingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from condaccept._capacity import Capacity
    from condaccept._delivery import Delivery, EventRecord, Source
    from condaccept._events import EventCallback, Signals, Subscription
    from condaccept._ledger import Ledger
    from condaccept._stream import Stream
    from condaccept._watch import Watch
    from condaccept.gates._gate import Gate

__all__ = ("Accepting",)

T = TypeVar("T")

REST: Final = 0.05
"""Seconds between two looks for a free descriptor; Go's net/http begins with 0.005,
ranch waits 0.1."""
IN_A_ROW: Final = 64
"""Calls that complete at once before one yields to the loop."""

_VERDICTS: Final = (Verdict, Accept, Reject, Defer)


class Accepting(Generic[T]):
    """The calls that decide one connection each, and those that wait for one.

    Attributes:
        deciding: What they decide with.
    """

    reports = True

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
        source: Callable[[], Source | None],
        stream_factory: Callable[[Stream], T] | None,
        on_full: OnFull | None,
        on_eof: OnEof,
        capacity: Capacity,
    ) -> None:
        self._loop = loop
        self._gate = gate
        self._pending = pending
        self._signals = signals
        self._delivery = delivery
        self._source = source
        self._streak = 0
        self._calls = 0  # that wait or decide
        self._news = False  # somebody came since the last accept call looked
        self._resting: asyncio.TimerHandle | None = None  # no descriptors, a moment ago
        self._waiters: deque[asyncio.Future[bool]] = deque()  # accept calls
        self._places: deque[asyncio.Future[bool]] = deque()  # accept calls, at a bound
        self._watchers: deque[asyncio.Future[bool]] = deque()  # wait_pending calls
        self.deciding: Deciding[T] = Deciding(
            loop,
            watch,
            gate,
            pending=pending,
            ledger=ledger,
            signals=signals,
            delivery=delivery,
            stream_factory=stream_factory,
            on_full=on_full,
            on_eof=on_eof,
            capacity=capacity,
        )
        self.deciding.start(self)

    # -- the calls

    async def accept(self, condition: Condition | None, callback_data: object) -> T:
        """See `Listener.accept()`."""
        turned = False  # whether this call has yielded to the loop
        pending = None
        self._calls += 1
        try:
            self._check(condition)
            if self._streak >= IN_A_ROW:
                turned = True
                await self._turn()
            # A call that raises has yielded. A loss keeps its place until then: this call
            # may be cancelled, and another has to tell of it.
            while (pending := self._head()) is None or (pending._status in LOSSES and not turned):
                turned = True
                await (self._turn() if pending is not None else self._wait(self._line()))
            if pending._status not in TO_OFFER:
                stream: Any = self.deciding.unasked(pending)
            else:
                verdict = self.deciding.ask(pending, condition, callback_data)
                if not isinstance(verdict, _VERDICTS) and inspect.isawaitable(verdict):
                    verdict = await self.deciding.answer(pending, verdict)
                    if not self.deciding.look(pending):
                        raise await self.deciding.report_after_turn(pending)
                stream = self.deciding.conclude(pending, verdict)
                if stream is TO_COME:
                    stream = await self.deciding.completed(pending)
                elif type(stream) is not tuple:
                    raise _told(pending, stream)
        except BaseException as error:
            self._calls -= 1
            self._looked(pending, error)
            if not turned and isinstance(error, Exception) and not _is_bad(condition):
                await self._turn()
            raise
        self._streak += 1
        self._calls -= 1
        self._looked(pending)
        result: T = stream[1]
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
            if pending._status not in TO_OFFER:
                stream: Any = self.deciding.unasked(pending)
            else:
                verdict = self.deciding.ask(pending, condition, callback_data)
                if not isinstance(verdict, _VERDICTS) and inspect.isawaitable(verdict):
                    self.deciding.undo(pending)
                    if inspect.iscoroutine(verdict):
                        verdict.close()
                    reason = "accept_nowait() cannot await a condition: use accept()"
                    raise InvalidVerdictError(reason, pending.caller_id)
                stream = self.deciding.conclude(pending, verdict)
                if stream is TO_COME:
                    reason = "accepted, but the connection is not complete yet"
                    raise NoPendingError(reason, pending.caller_id)
                if type(stream) is not tuple:
                    raise _told(pending, stream)
        except BaseException as error:
            self._looked(pending, error)
            raise
        self._looked(pending)
        result: T = stream[1]
        return result

    async def wait_pending(self) -> None:
        """See `Listener.wait_pending()`."""
        turned = self._streak >= IN_A_ROW
        if turned:
            await self._turn()
        self._calls += 1
        try:
            self.deciding.switch(self)
            while not self._due():
                turned = True
                await self._wait(self._watchers)
                self.deciding.switch(self)
        except Exception:
            if not turned:
                await self._turn()
            raise
        finally:
            self._calls -= 1
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

    def closed(self) -> None:
        """End the waiting calls: the listener was closed, or takes no more."""
        if self._resting is not None:
            self._resting.cancel()
        for waiters in (self._waiters, self._places, self._watchers):
            self._wake(waiters)

    async def wait_closed(self) -> None:
        """See `Listener.wait_closed()`."""
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        await self.deciding.wait_closed()
        await self._delivery.wait_closed()

    # -- looking

    def _check(self, condition: Condition | None) -> None:
        """Refuse a call that cannot be made, before the deque is touched."""
        self.deciding.switch(self)
        if _is_bad(condition):
            reason = f"the condition cannot be called: {condition!r}"
            raise ConditionNotCallableError(reason)

    def _head(self) -> PendingTransport | None:
        """Return what this call is to act on, taking it if need be; None: nobody is there."""
        if self.deciding.finished():
            raise closed_error()
        self._news = False
        if self._pending:
            pending = self._pending.head()
            if pending is not None:
                if pending._status in TO_OFFER:
                    if not self.deciding.room_to_offer():
                        return None
                    self.deciding.look(pending)
                return pending
            if self._pending.full:
                return None
        try:
            return self.deciding.take()
        except (DescriptorsExhaustedError, BuffersExhaustedError):
            self._rest()
            raise

    def _rest(self) -> None:
        """Let nothing be due for a moment: asking at once would only fail again.

        A descriptor that becomes free somewhere else in the process is told by nobody, so
        a timer is all there is.
        """
        if self._resting is None:
            self._resting = self._loop.call_later(REST, self._rested)

    def _rested(self) -> None:
        self._resting = None
        if self._due():
            self.became_due(None)

    def _due(self) -> bool:
        """Whether an accept call has something new to act on."""
        deciding = self.deciding
        if deciding.consumer is not self:
            return False
        if self._pending.head() is None:
            return (
                self._resting is None
                and not self._at_bound()
                and not deciding.suspended
                and not deciding.stopped
                and self._gate.waiting()
            )
        if not deciding.room_to_offer():
            head = self._pending.head()
            return head is not None and head._status not in TO_OFFER
        # A head that was deferred is nothing new, and those behind it are out of reach: who
        # waits for them is told of their coming, once.
        return self._pending.due() or self._news

    def _at_bound(self) -> bool:
        """Whether nobody may be taken until a place comes free."""
        return self._pending.full or not self.deciding.room_to_offer()

    def _line(self) -> deque[asyncio.Future[bool]]:
        """Return where a call has to wait now."""
        return self._places if self._at_bound() else self._waiters

    # -- waiting and waking

    async def _turn(self) -> None:
        self._streak = 0
        await asyncio.sleep(0)

    async def _wait(self, waiters: deque[asyncio.Future[bool]]) -> None:
        waiter: asyncio.Future[bool] = self._loop.create_future()
        waiters.append(waiter)
        self._streak = 0
        try:
            interrupted = await waiter
        except BaseException:
            # Cancelled, or its coroutine was closed.
            if waiter.done() and not waiter.cancelled():
                # Woken, and ended before it could look: somebody else has to.
                self._pass_on()
            elif waiter in waiters:  # and not dropped since by whoever came to wake it
                waiters.remove(waiter)
            raise
        if interrupted:
            reason = "cancel_accept() ended the wait"
            raise AcceptInterruptedError(reason)

    # -- what it is told as the consumer

    def arrived(self) -> None:
        """Note that somebody came: the gate says so."""
        self._news = True
        self.became_due(None)

    def became_due(self, pending: PendingTransport | None) -> None:
        """Tell everybody that there is something new to act on."""
        if pending is not None and pending._status is Status.DEFERRED and not self._due():
            return  # behind another one, which comes first
        self._wake_one()
        self._wake(self._watchers)
        self._fire_pending()

    def left_place(self) -> None:
        """Wake others if there is more to act on."""
        if self.deciding.finished():
            self.closed()
        else:
            self._pass_on()

    def busy(self) -> bool:
        """Whether a call waits or decides."""
        return self._calls > 0

    def _pass_on(self) -> None:
        """Wake others if there is more to act on."""
        if self._places and not self._at_bound():
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
            # After the loop was closed there is nobody to wake.
            if not waiter.done() and not self._loop.is_closed():
                waiter.set_result(False)
        waiters.clear()

    def _looked(self, pending: PendingTransport | None, error: BaseException | None = None) -> None:
        """Note the end of a call that looked at the deque, and at *pending* there."""
        self.deciding.done_with_fresh()
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
        if self._signals.wanted(Event.PENDING) and not self.deciding.closed and self._due():
            self._fire_pending()

    def _fire_pending(self) -> None:
        for subscription in self._signals.fire(Event.PENDING):
            self._deliver_pending(subscription)

    def _deliver_pending(self, subscription: Subscription) -> None:
        source = self._source()
        if source is not None:  # it is not forgotten
            self._delivery.post(subscription, source, Event.PENDING, None)

    def on(self, events: Event, callback: EventCallback) -> Subscription:
        """See `Listener.on()`."""
        subscription = self._signals.add(events, callback)
        self._tell_late(subscription)
        return subscription

    def watch(self, events: Event) -> EventRecord:
        """See `Listener.watch()`."""
        record = self._delivery.record(events, partial(self._is_over, events))
        self._signals.join(record._subscription)
        self._tell_late(record._subscription)
        return record

    def _is_over(self, events: Event) -> bool:
        """Whether none of *events* can come any more."""
        return self.deciding.closed if events is Event.PENDING else self.deciding.is_over()

    def _tell_late(self, subscription: Subscription) -> None:
        """Tell a new subscriber what is so already."""
        if subscription.wants(Event.PENDING) and not self.deciding.closed and self._due():
            if self._signals.armed(Event.PENDING):
                self._fire_pending()
            else:
                self._deliver_pending(subscription)


def _told(pending: PendingTransport, verdict: Any) -> AcceptError:
    """Return the error that tells of a verdict which has been carried out."""
    if isinstance(verdict, Reject):
        return ConnectionRejectedError(verdict.reason, pending.caller_id)
    error = ConnectionDeferredError(verdict.reason, pending.caller_id)
    error.defer = verdict
    return error


def _is_bad(condition: object) -> bool:
    return condition is not None and not callable(condition)
