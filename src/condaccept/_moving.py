"""From one state to the next: entering and leaving the deque, losing, expiring, refusing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

from condaccept._pending import PEEK_LIMIT, Peer, PendingDeque, PendingTransport, Status
from condaccept._sockets import reset
from condaccept._waking import PER_TURN, Waking
from condaccept.exceptions import (
    AcceptError,
    ListenerClosedError,
    PendingExpiredError,
    PendingResetError,
)

if TYPE_CHECKING:
    from condaccept._ledger import Ledger
    from condaccept.gates._gate import Gate

__all__ = ("IN_HAND", "LOSSES", "TO_OFFER", "Moving", "OnEof", "OnFull", "closed_error")

OnEof = Literal["keep", "withdraw"]
OnFull = Literal["wait", "expire_oldest"]

LOSSES: Final[dict[Status, type[AcceptError]]] = {
    Status.RESET: PendingResetError,
    Status.EXPIRED: PendingExpiredError,
}
"""How a connection can be lost before a verdict, and the error that tells of it."""
TO_OFFER: Final = frozenset({Status.QUEUED, Status.DEFERRED})
_KEPT: Final = frozenset({Status.DEFERRED, Status.ADMITTED, *LOSSES})
"""What a connection that was never on the deque is put there for."""
_NOTE: Final = " was rejected because of this."
IN_HAND: Final = object()
"""The taker of a connection that a call is about to be done with."""


class Moving(Waking):
    """Moves connections, and sees to it that each finds one end.

    Attributes:
        stopped: Whether nothing will be taken any more.
    """

    __slots__ = ("_idle", "_ledger", "_on_full", "_timer", "_timer_at", "_withdraw", "stopped")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gate: Gate[Any],
        pending: PendingDeque,
        ledger: Ledger,
        *,
        on_full: OnFull | None,
        on_eof: OnEof,
    ) -> None:
        super().__init__(loop, gate, pending)
        self._ledger = ledger
        self._on_full = on_full
        self._withdraw = on_eof == "withdraw"
        self._idle: list[asyncio.Future[None]] = []  # those who wait for the end
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.stopped = False

    def _to(self, pending: PendingTransport, status: Status) -> None:
        """Make a transition, on the deque where it belongs there."""
        if pending._kept:
            self._pending.move(pending, status, self._loop.time())
            if pending._stay.by_free:
                self._use_place(pending, status)
            self._wake_idle()
            self.consumer.left_place()
        elif status in _KEPT:
            self._enter(pending, status)
        else:
            pending._move(status)

    def _enter(self, pending: PendingTransport, status: Status) -> None:
        """Put a connection on the deque, where that may need a place."""
        if self._pending.crowded and self.expires_oldest and status not in LOSSES:
            oldest = self._pending.oldest_deferred()
            if oldest is not None:
                reason = (
                    f"expired for a newcomer: max_pending={self._pending.max_pending} is reached"
                )
                self.expire(oldest, reason)
        self._pending.enter(pending, status, self._loop.time())

    @property
    def expires_oldest(self) -> bool:
        """Whether room is made for a newcomer when `max_pending` is reached."""
        if self._on_full is None:
            return not self.consumer.reports
        return self._on_full == "expire_oldest"

    # -- without a verdict

    def undo(self, pending: PendingTransport) -> None:
        """End an offer without a verdict: the connection keeps its place."""
        if self.closed:
            self._drop(pending)
            return
        if pending._kept:
            self._pending.resume(pending, self._loop.time())
            self._set_timer()
        else:
            self._enter(pending, Status.QUEUED)
        self._ledger.end_offer(pending)
        if not self.closed:
            stay = pending._stay
            if pending._status is Status.DEFERRED and stay.hints and stay.hints.until_free:
                if stay.frees < self._frees:
                    self.wake(pending)
                else:
                    self._wait_for_place(pending)
            # Its peer may have left meanwhile, and the watch tells that once.
            self.changed(pending)
            self.consumer.became_due(pending)

    def _drop(self, pending: PendingTransport) -> None:
        """Close a connection because the listener was."""
        was = pending._status
        taker = pending._stay.taker
        self._to(pending, Status.CLOSED)
        if was is Status.ADMITTED:
            pending._stay.socket.cancel()
            if taker is not None and not taker.done():
                taker.set_result(None)
        elif was is Status.READY:
            reset(pending._stay.socket)
        else:
            self._gate.forget(pending._arrival)
        self._ledger.settle(pending, Status.CLOSED, "the listener was closed")

    def refuse(self, pending: PendingTransport, reason: str) -> None:
        """Reject a connection for a reason of the listener's own."""
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, b"")
        self._ledger.settle(pending, Status.REJECTED, reason)

    def _raised(self, pending: PendingTransport, error: BaseException) -> None:
        """Reject a connection whose condition raised."""
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, b"")
        self._ledger.settle(pending, Status.REJECTED, f"the condition raised {error!r}")
        # One exception object may be raised for many connections: it names the last.
        notes = getattr(error, "__notes__", [])
        notes[:] = [note for note in notes if not note.endswith(_NOTE)]
        error.add_note(f"The connection from {pending.caller_id!r}{_NOTE}")

    # -- losing

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

    def expire(self, pending: PendingTransport, reason: str) -> None:
        """End a deferred connection, if it is one still."""
        if pending._status is Status.DEFERRED:
            self._lose(pending, Status.EXPIRED, reason)
            self.consumer.became_due(pending)

    def _lose(self, pending: PendingTransport, status: Status, reason: str) -> None:
        """Close a connection that was lost before a verdict; somebody has to be told."""
        self._gate.forget(pending._arrival)
        self._book(pending, status, reason)

    def _book(self, pending: PendingTransport, loss: Status, reason: str) -> None:
        self._to(pending, loss)
        if not self.consumer.reports:
            self._pending.report(pending)
            self._wake_idle()
            self.consumer.left_place()
        pending._reason = reason
        self._ledger.settle(pending, loss, reason)

    def _report(self, loss: PendingTransport) -> AcceptError:
        """Return the error that tells of a loss, which is told once."""
        if loss._kept:
            self._pending.report(loss)
        return LOSSES[loss._status](loss._reason, loss.caller_id)

    async def report_after_turn(self, loss: PendingTransport) -> AcceptError:
        """Return the error that tells of a loss, after a turn of the loop.

        A call that is cancelled in it has told nobody; then the loss stays.
        """
        loss._stay.taker = IN_HAND
        try:
            await asyncio.sleep(0)
        except BaseException:
            loss._stay.taker = None
            self.consumer.became_due(loss)
            raise
        return self._report(loss)

    # -- what the watch and the timer tell

    def changed(self, pending: PendingTransport) -> None:
        """Look at one that waits: its peer left, or enough bytes came, or neither."""
        if pending._status not in TO_OFFER:
            return
        stay = pending._stay
        if not self.look(pending):
            self.consumer.became_due(pending)
        elif stay.hints is not None and (n := stay.hints.until_bytes) is not None:
            # A Unix socket tells of any number of bytes. And what has fulfilled a hint does
            # not fulfil the same again: a condition that goes on waiting would be asked for
            # ever about a caller who will send no more.
            told = n, len(pending.peek(PEEK_LIMIT)), pending.peer_closed
            if (told[1] >= n or told[2]) and told != stay.told:
                stay.told = told
                self.wake(pending)

    def _set_timer(self) -> None:
        alarm = self._pending.next_alarm
        if self._timer is not None:
            if alarm is None or self._timer_at <= alarm:
                return
            self._timer.cancel()
        if alarm is not None:
            # Kept beside it: for a time that has come, uvloop gives a handle without when().
            self._timer_at = alarm
            self._timer = self._loop.call_at(alarm, self._on_alarm)

    def _on_alarm(self) -> None:
        self._timer = None
        # uvloop's timers may fire half a millisecond early: what this one was set for is due.
        now = max(self._loop.time(), self._timer_at)
        expired, woken = self._pending.alarms(now, PER_TURN)
        for pending in expired:
            self.expire(
                pending, f"no verdict within {self._pending.defer_timeout} s of the first deferral"
            )
        for pending in woken:
            if pending._status is Status.DEFERRED:
                hints = pending._stay.hints
                pending.timed_out = (
                    hints is not None
                    and hints.within is not None
                    and (hints.after is None or hints.within <= hints.after)
                )
                self.wake(pending)
        if not self.closed:
            self._set_timer()

    # -- those who wait for the end

    async def _until_idle(self) -> None:
        waiter = self._loop.create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._idle:
                self._idle.remove(waiter)

    def _wake_idle(self) -> None:
        if self.stopped:
            idle, self._idle = self._idle, []
            for waiter in idle:
                if not waiter.done() and not self._loop.is_closed():
                    waiter.set_result(None)


def closed_error(pending: PendingTransport | None = None) -> ListenerClosedError:
    """Return what a call on a closed listener raises."""
    reason = "the listener is closed"
    return ListenerClosedError(reason, None if pending is None else pending.caller_id)
