"""Asking a condition about a connection, and doing what it says.

Every kind of consumer decides through this room. It knows who is under decision, and
nothing of who waits for a connection: it only tells the consumer that something is due,
or that a place was given back.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from condaccept._admitting import TO_COME, Admitting
from condaccept._delivery import current_task
from condaccept._moving import IN_HAND, LOSSES, TO_OFFER, closed_error
from condaccept._pending import REJECTED, Condition, PendingTransport, Status
from condaccept._verdict import Accept, AnyVerdict, Defer, Reject, Verdict
from condaccept.exceptions import (
    AcceptInProgressError,
    CalleeDataError,
    InvalidGroupError,
    InvalidVerdictError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from contextvars import Context

    from condaccept._stream import Stream
    from condaccept._waking import Consumer

__all__ = ("Deciding",)

T = TypeVar("T")

_BARE_ACCEPT, _BARE_REJECT, _BARE_DEFER = Verdict
_ACCEPT: Final = Accept()
_REJECT: Final = Reject()
_DEFER: Final = Defer()


class Deciding(Admitting[T]):
    """Decides connections, one at a time, for whoever has a condition."""

    __slots__ = ("_first",)
    _first: Consumer

    def start(self, consumer: Consumer) -> None:
        """Begin, with *consumer* as the one that there is."""
        self.consumer = self._first = consumer
        self._gate.start(self._arrived, self._told)
        self._overflow()

    def switch(self, consumer: Consumer) -> None:
        """Make *consumer* the one that has the condition.

        Raises:
            ListenerClosedError: The listener is closed.
            AcceptInProgressError: The call comes from a condition, or another kind of
                consumer is at work.
        """
        if self.finished():
            raise closed_error()
        self.check_reentry()
        if self.consumer is consumer:
            return
        if self.consumer.busy():
            reason = "another accept(), streams() or serve() is at work on this listener"
            raise AcceptInProgressError(reason)
        self.consumer = consumer

    def leave(self, consumer: Consumer) -> None:
        """Give the condition back from *consumer* to whom it was with at the beginning."""
        if self.consumer is consumer:
            self.consumer = self._first
            if not self.closed:
                self._first.became_due(None)

    def check_reentry(self) -> None:
        """Refuse what comes from a condition of this listener."""
        if self.asked is not None or (self.deciders and current_task() in self.deciders.values()):
            reason = "a condition cannot accept from the listener that asks it"
            raise AcceptInProgressError(reason)

    # -- asking

    def ask(
        self,
        pending: PendingTransport,
        condition: Condition | None,
        callback_data: object,
        context: Context | None = None,
    ) -> AnyVerdict | Awaitable[AnyVerdict]:
        """Make one offer, as far as a plain condition goes, in *context* or in the caller's."""
        if pending._kept:
            self._pending.move(pending, Status.DECIDING, 0.0)
            pending._again = False
            pending.group = pending._callee_data = pending._sqos = None
        self._frees_before = self._frees
        self._ledger.offers += 1
        pending.callback_data = callback_data
        if condition is None:
            return _ACCEPT
        pending._offered = True
        self.asked = pending
        try:
            return condition(pending) if context is None else context.run(condition, pending)
        except BaseException as error:
            self._raised(pending, error)
            raise
        finally:
            self.asked = None

    async def answer(
        self, pending: PendingTransport, awaitable: Awaitable[AnyVerdict]
    ) -> AnyVerdict:
        """Wait for the verdict of an async condition; the caller has to look after it.

        Raises:
            ListenerClosedError: The listener was closed meanwhile.
            BaseException: What the condition raised: the connection is rejected. Or
                CancelledError, for this call: the connection is in its place again.
        """
        task = current_task()
        cancelling = 0 if task is None else task.cancelling()
        self.under_decision(pending, task)
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
            self._wake_idle()
        if pending._status is Status.CLOSED:
            # The condition has swallowed the cancellation by close().
            if task is not None:
                task.uncancel()
            raise closed_error(pending)
        return verdict

    def under_decision(self, pending: PendingTransport, task: asyncio.Task[Any] | None) -> None:
        """Note that *task* waits for the verdict about *pending*."""
        if pending not in self.deciders:
            if not pending._kept:
                self._enter(pending, Status.DECIDING)
            pending._stay.frees = self._frees_before
        self.deciders[pending] = task
        self.consumer.left_place()

    def abandon(self, pending: PendingTransport, task: asyncio.Task[Any]) -> None:
        """End a decision whose task has ended without having begun, if it is one."""
        if self.deciders.get(pending) is task:
            del self.deciders[pending]
            if pending._status is Status.DECIDING:
                self.undo(pending)
            self._wake_idle()

    # -- doing what the verdict says

    def conclude(
        self, pending: PendingTransport, verdict: object, *, deliver: bool = True, keep: bool = True
    ) -> object:
        """Do as the verdict says.

        Returns:
            The `Reject` or `Defer` that was carried out; or a pair of the stream and of
            what ``stream_factory`` made of it; or TO_COME, always if not *deliver*.

        Raises:
            AcceptError: The verdict cannot be carried out; the connection keeps its place,
                or is rejected if not *keep*.
            ListenerClosedError: The condition deferred, and has closed the listener.
            Exception: No stream could be made; the connection has failed.
        """
        try:
            if verdict is _BARE_ACCEPT:
                return self._accept(pending, _ACCEPT, deliver=deliver)
            if verdict is _BARE_REJECT:
                return self.reject(pending, _REJECT)
            if verdict is _BARE_DEFER:
                return self._defer(pending, _DEFER)
            if isinstance(verdict, Accept):
                return self._accept(pending, verdict, deliver=deliver)
            if isinstance(verdict, Reject):
                return self.reject(pending, verdict)
            if isinstance(verdict, Defer):
                return self._defer(pending, verdict)
            reason = f"a condition returns ACCEPT, REJECT or DEFER, this one returned {verdict!r}"
            raise InvalidVerdictError(reason, pending.caller_id)
        except (InvalidVerdictError, InvalidGroupError, CalleeDataError) as error:
            # Unless ``stream_factory`` has raised it.
            if pending._status is Status.DECIDING or pending._status is Status.QUEUED:
                if keep:
                    self.undo(pending)
                else:
                    self.refuse(pending, error.reason)
            raise

    def reject(self, pending: PendingTransport, reject: Reject = _REJECT) -> Reject:
        """Carry a rejection out.

        Raises:
            CalleeDataError: Its data is too long; nothing has been done.
        """
        data = reject.data
        if data is None:
            data = b"" if pending._callee_data is None else bytes(pending._callee_data)
        elif len(data) > pending.callee_data.capacity:
            capacity = pending.callee_data.capacity
            reason = f"callee data of {len(data)} bytes is over the capacity of {capacity}"
            raise CalleeDataError(reason, pending.caller_id)
        if pending._kept:
            self._to(pending, REJECTED)
        else:
            pending._status = REJECTED  # a newcomer may go anywhere
        self._gate.refuse(pending._arrival, data)
        self._ledger.settle(pending, REJECTED, reject.reason)
        return reject

    def _defer(self, pending: PendingTransport, defer: Defer) -> Defer:
        if self.closed:
            self._drop(pending)
            raise closed_error(pending)
        try:
            self._gate.watch(pending._arrival, defer.until_bytes or 0, pending)
        except ValueError as error:
            raise InvalidVerdictError(str(error), pending.caller_id) from error
        pending.deferrals += 1
        self._ledger.deferrals += 1
        pending.timed_out = False
        frees = pending._stay.frees if pending._kept else self._frees_before
        if pending._kept:
            self._hint(pending._stay, defer)
            self._to(pending, Status.DEFERRED)
        else:
            self._to(pending, Status.DEFERRED)
            self._hint(pending._stay, defer)
            self._pending.set_alarm(pending)
        self._set_timer()
        # Given back while the condition was still thinking, the place would go to nobody.
        again = pending._again or (defer.until_free and frees < self._frees)
        if defer.until_free:
            self._wait_for_place(pending)
        # Last: a release may do anything, close the listener for one.
        self._ledger.end_offer(pending)
        if self.closed:
            raise closed_error(pending)
        if again:
            self.wake(pending)
        return defer

    # -- deciding by handle

    def decide(self, pending: PendingTransport, verdict: AnyVerdict) -> None:
        """See `PendingTransport.decide()`."""
        self._begin(pending)
        self.conclude(pending, verdict, deliver=False)

    async def hand_out(self, pending: PendingTransport) -> object:
        """See `PendingTransport.take()`."""
        await asyncio.sleep(0)
        ready = pending._status is Status.READY and pending._stay.taker is None
        if ready and self.still_there(pending):
            made = self.unasked(pending)
        else:
            self._begin(pending)
            made = self.conclude(pending, _BARE_ACCEPT)
        if made is TO_COME:
            made = await self.completed(pending)
        return cast("tuple[Stream, object]", made)[1]

    def _begin(self, pending: PendingTransport) -> None:
        """Put a connection under a decision that is made elsewhere."""
        status = pending._status
        if status is Status.DECIDING or (status is Status.QUEUED and not pending._kept):
            reason = "this connection is under decision"
            raise AcceptInProgressError(reason, pending.caller_id)
        if status in LOSSES or (status in TO_OFFER and not self.look(pending)):
            # An answer, not the report, which is for an accept call.
            raise LOSSES[pending._status](pending._reason, pending.caller_id)
        if status not in TO_OFFER:
            message = f"the connection from {pending.caller_id!r} is {status.value} already"
            raise RuntimeError(message)
        pending._again = False
        self._pending.move(pending, Status.DECIDING, 0.0)
        pending._stay.frees = self._frees

    # -- the end

    def close(self) -> None:
        """Close whatever is undecided, and the gate."""
        self.closed = self.stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._stop_relistening()
        current = current_task()
        for pending in self._pending.undecided():
            task = self.deciders.get(pending)
            if pending is self.asked or (task is not None and task is current):
                continue  # the condition that closes the listener keeps its verdict
            if pending._stay.taker is IN_HAND:
                continue
            self._drop(pending)
            if task is not None:
                task.cancel()
        while (loss := self._pending.head()) is not None:
            self._pending.report(loss)
        self._gate.close()
        self._watch.release()
        self._wake_idle()
        self._delivery.look_over()

    async def wait_closed(self) -> None:
        """Wait until no decision is under way after `close()`, but for the caller's own."""
        while not self.closed or any(task is not current_task() for task in self.deciders.values()):
            await self._until_idle()

    async def quiet(self, own: Stream | None) -> None:
        """Wait, once nobody is taken any more, until nobody is undecided and no stream open.

        Rejected callers are to have read why. What only the caller can end is not waited
        for: a decision of its own, and *own*, its stream.
        """
        current = current_task()
        while (
            self._gate.rejecting
            or self._streams.others(own)
            or any(
                pending._status not in LOSSES
                and (current is None or self.deciders.get(pending) is not current)
                for pending in self._pending
            )
        ):
            await self._until_idle()
