"""What is done to one connection: looking, asking, concluding, waking, losing it.

Every kind of consumer decides through this room. It knows who is under decision, and
nothing of who waits for a connection: it only tells the consumer that something is due,
or that a place was given back.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypeVar, cast

from condaccept._delivery import current_task
from condaccept._group import Groups, OpenStreams
from condaccept._pending import (
    PEEK_LIMIT,
    Condition,
    Peer,
    PendingDeque,
    PendingTransport,
    Status,
)
from condaccept._sockets import OwnedSocket, apply_flow, inherit_options, peer, reset
from condaccept._stream import Stream
from condaccept._verdict import Accept, AnyVerdict, Defer, Reject, Verdict
from condaccept.exceptions import (
    AcceptError,
    AcceptInProgressError,
    BuffersExhaustedError,
    CalleeDataError,
    DescriptorsExhaustedError,
    InvalidGroupError,
    InvalidVerdictError,
    ListenerClosedError,
    NetworkDownError,
    PendingExpiredError,
    PendingResetError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from condaccept._capacity import Capacity, Limit
    from condaccept._delivery import Delivery
    from condaccept._events import Signals
    from condaccept._group import StreamGroup
    from condaccept._ledger import Ledger
    from condaccept._pending import Arrival, Release, Stay
    from condaccept._qos import FlowSpec
    from condaccept._sockets import Option
    from condaccept._watch import Watch
    from condaccept.gates._gate import Gate

__all__ = (
    "LOSSES",
    "PER_WAKE_UP",
    "TO_COME",
    "TO_OFFER",
    "Consumer",
    "Deciding",
    "OnEof",
    "OnFull",
    "closed_error",
)

T = TypeVar("T")

logger = logging.getLogger("condaccept")

OnEof = Literal["keep", "withdraw"]
OnFull = Literal["wait", "expire_oldest"]

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
TO_RECONSIDER: Final = frozenset({Status.DEFERRED, Status.DECIDING})
TO_COME: Final = object()
"""In the place of a stream: it is on the deque, accepted, and has still to come or to be
given out."""
_KEPT: Final = frozenset({Status.DEFERRED, Status.ADMITTED, *LOSSES})
"""What a connection that was never on the deque is put there for."""
_NOTE: Final = " was rejected because of this."
_IN_HAND: Final = object()
"""The taker of a connection that a call is about to be done with."""
PER_WAKE_UP: Final = 32
"""Newcomers acted on before the loop's other readers have their turn: a few hundred
microseconds."""
AT_ONCE: Final = 65536
"""Connections taken in at once where the kernel does not tell how many it may have queued."""
RELISTEN: Final = 1.0
"""Seconds until a kernel that would not listen again is asked the next time, and until
newcomers over a limit are looked at again who could not be taken."""
PER_TURN: Final = 256
"""Deferred connections looked at before the loop has its turn: about a millisecond."""


class Consumer(Protocol):
    """Whoever has a condition: the accept calls, one `streams()`, or one `serve()`."""

    reports: bool
    """Whether a loss stays on the deque until a call has reported it."""

    def arrived(self) -> None:
        """Note that somebody came to the gate."""

    def became_due(self, pending: PendingTransport | None) -> None:
        """Note that *pending* is due, or that there is a reason to look for oneself."""

    def left_place(self) -> None:
        """Note that a place on the deque, or for a stream, may be free."""

    def busy(self) -> bool:
        """Whether another kind of consumer has to wait."""

    def closed(self) -> None:
        """Note that the listener was closed, or takes no more."""


class _Nobody:
    """In the place of an arrival that accept(2) did not give out."""

    caller_id = None


class Deciding(Generic[T]):
    """Decides connections, one at a time, for whoever has a condition.

    Attributes:
        consumer: Whoever has the condition now.
        capacity: The limits of open and of starting streams.
        suspended: Whether nothing is taken for the time being.
        stopped: Whether nothing will be taken any more.
        asked: The connection that a plain condition is being asked about, right now.
        deciders: Those under decision by an async condition, and the tasks that wait.
        groups: The listener's groups of streams.
        options: Socket options set after the listener began.
        closed: Whether `close()` was called.
        aborted: Whether the streams were aborted as well.
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
        on_full: OnFull | None,
        on_eof: OnEof,
        capacity: Capacity,
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._gate = gate
        self._pending = pending
        self._ledger = ledger
        self._signals = signals
        self._delivery = delivery
        self._stream_factory = stream_factory
        self._on_full = on_full
        self._withdraw = on_eof == "withdraw"
        self.capacity = capacity
        self.consumer: Consumer
        self._first: Consumer
        self.suspended = False
        self.stopped = False
        self._refusing = False  # the kernel refuses newcomers
        self._refusal_asked = False  # and is to, whatever room there is
        self._cannot_refuse = False  # that was logged
        self._relisten: asyncio.TimerHandle | None = None
        self._left_queued = 0
        self._until_free: list[tuple[int, PendingTransport]] = []  # by place, some of them old
        self._frees = 0  # how many places were given back that nobody waited for
        self._frees_before = 0  # the same, when the last offer began
        self._fresh: PendingTransport | None = None  # taken, and in the hands of a call
        self._streams = OpenStreams()
        self._serial = 0
        self._thread = threading.get_ident()
        self._idle: list[asyncio.Future[None]] = []  # wait_closed calls
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.asked: PendingTransport | None = None
        self.deciders: dict[PendingTransport, asyncio.Task[Any] | None] = {}
        self.groups = Groups(sock.family for sock in gate.sockets)
        self.options: list[Option] = []
        self.closed = False
        self.aborted = False

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

    def abandon(self, pending: PendingTransport, task: asyncio.Task[Any]) -> None:
        """End a decision whose task has ended without having begun, if it is one."""
        if self.deciders.get(pending) is task:
            del self.deciders[pending]
            if pending._status is Status.DECIDING:
                self.undo(pending)
            self._wake_idle()

    def check_reentry(self) -> None:
        """Refuse what comes from a condition of this listener."""
        if self.asked is not None or (self.deciders and current_task() in self.deciders.values()):
            reason = "a condition cannot accept from the listener that asks it"
            raise AcceptInProgressError(reason)

    def finished(self) -> bool:
        """Whether no connection will ever be decided any more."""
        return self.closed or (self.stopped and not len(self._pending))

    def _arrived(self) -> None:
        self._overflow()
        self.consumer.arrived()

    def _told(self) -> None:
        """Note that a rejected caller has read why, which has given a descriptor back."""
        self._wake_idle()
        self.consumer.left_place()

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
            if pending._stay.taker is _IN_HAND:
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

    async def _until_idle(self) -> None:
        waiter = self._loop.create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._idle:
                self._idle.remove(waiter)

    def abort_streams(self, own: Stream | None = None) -> None:
        """Abort every stream that is open, but for *own*."""
        self.aborted = True
        self._streams._abort(own)

    def undecided(self) -> tuple[PendingTransport, ...]:
        """See `Listener.pending`."""
        fresh = self._fresh
        if fresh is None or fresh._kept or fresh._status is not Status.QUEUED:
            return self._pending.undecided()
        return (*self._pending.undecided(), fresh)

    def is_over(self) -> bool:
        """Whether nothing can happen any more: closed, and no accepted connection is open."""
        return self.closed and not len(self._streams) and not self.deciders

    def streams(self) -> tuple[Stream, ...]:
        """Return the streams that are open, and those whose transports are."""
        return self._streams.streams

    @property
    def open_streams(self) -> int:
        """How many accepted connections are open."""
        return len(self._streams)

    # -- looking

    def take(self) -> PendingTransport | None:
        """Take a connection from the gate; ``None`` if nobody waits there, or may be taken.

        What is returned may be a loss; one that is to be reported is on the deque then.

        Raises:
            AcceptError: Nothing could be taken; whoever waits at the gate goes on waiting.
        """
        if self.suspended or self.stopped or not self.room_to_offer():
            return None
        return self._take()

    def _overflow(self) -> None:
        """Do to newcomers what a limit that is reached says; nobody need wait for one.

        Called whenever that may have become possible: somebody came, a limit was reached
        or set, or taking goes on.
        """
        if self.suspended or self.stopped or not self.capacity.limited:
            return
        full = self.capacity.overflow()
        if full is None or full[0] == "queue":
            return
        how, reason = full
        try:
            if how == "reject":
                self._reject_new(reason)
            else:
                self.refuse_new()
        except AcceptError as error:
            logger.debug("%s, and nobody can be taken: %s", reason, error.reason)
            if isinstance(error, (DescriptorsExhaustedError, BuffersExhaustedError)):
                # They wait, and a descriptor that is closed elsewhere tells nobody.
                self._stop_relistening()
                self._relisten = self._loop.call_later(RELISTEN, self._overflow_again)
        except OSError as error:
            # It was possible when the limit was set. What cannot be refused is queued.
            if not self._cannot_refuse:
                self._cannot_refuse = True
                logger.warning("%s, and the kernel cannot refuse: %s", reason, error)

    def _overflow_again(self) -> None:
        self._listen_if_room()
        self._overflow()

    def _reject_new(self, reason: str) -> None:
        taken = 0
        for pending in self._newcomers(PER_WAKE_UP):
            taken += 1
            if pending._status in TO_OFFER:
                self.refuse(pending, reason)
            elif pending._kept:
                self._pending.report(pending)  # no call is told of the rejected ones either
        if taken and self._gate.waiting():
            self._loop.call_soon(self._overflow)

    def _newcomers(self, limit: int, *, places: bool = False) -> Iterator[PendingTransport]:
        """Take up to *limit* connections for which nobody has asked; some may be lost.

        With *places*, not more than there are places for on the deque.
        """
        fresh = self._fresh  # a condition may be asked about it
        try:
            for _ in range(limit):
                if places and self._pending.crowded:
                    return
                try:
                    pending = self._take()
                except NetworkDownError as error:
                    logger.debug("%s", error.reason)
                    continue
                if pending is None:
                    return
                yield pending
        finally:
            self._fresh = fresh

    def _take(self) -> PendingTransport | None:
        try:
            taken = self._gate.take(1)
        except PendingResetError as error:
            # Told of by accept(2), which gave no connection: a loss like any other.
            self._ledger.taken += 1
            pending = PendingTransport(cast("Arrival", _Nobody()), time.monotonic, self)
            self._book(pending, Status.RESET, error.reason)
            return pending
        if not taken:
            return None
        pending = PendingTransport(taken[0], time.monotonic, self)
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
            pending._again = False
        self._frees_before = self._frees
        self._ledger.offers += 1
        pending.callback_data = callback_data
        pending.group = pending._callee_data = pending._sqos = None
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

    async def report_after_turn(self, loss: PendingTransport) -> AcceptError:
        """Return the error that tells of a loss, after a turn of the loop.

        A call that is cancelled in it has told nobody; then the loss stays.
        """
        loss._stay.taker = _IN_HAND
        try:
            await asyncio.sleep(0)
        except BaseException:
            loss._stay.taker = None
            self.consumer.became_due(loss)
            raise
        return self._report(loss)

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
                return self._reject(pending, _REJECT)
            if verdict is _BARE_DEFER:
                return self._defer(pending, _DEFER)
            if isinstance(verdict, Accept):
                return self._accept(pending, verdict, deliver=deliver)
            if isinstance(verdict, Reject):
                return self._reject(pending, verdict)
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

    def refuse(self, pending: PendingTransport, reason: str) -> None:
        """Reject a connection for a reason of the listener's own."""
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, b"")
        self._ledger.settle(pending, Status.REJECTED, reason)

    def _accept(self, pending: PendingTransport, accept: Accept, *, deliver: bool) -> object:
        if pending.group is not None and self.groups.find(pending.group) is None:
            raise _no_group(pending)
        admission = self._gate.admit(pending._arrival)
        pending._offered = False
        self._take_slots(pending)
        pending._reason = accept.reason
        if isinstance(admission, OwnedSocket):
            if deliver or self.closed:
                return self._deliver(pending, admission)
            self._to(pending, Status.ADMITTED)
            pending._stay.socket = admission
            self._to(pending, Status.READY)
            self.consumer.became_due(pending)
            return TO_COME
        self._to(pending, Status.ADMITTED)
        pending._stay.socket = admission
        if self.closed:
            self._drop(pending)
            raise closed_error(pending)
        admission.add_done_callback(partial(self._came, pending))
        self.consumer.left_place()
        return TO_COME

    def _take_slots(self, pending: PendingTransport) -> None:
        """Count an accepted connection, until what is held for it is released."""
        starting = self.capacity.starting.take()
        holds = pending._holds = pending._holds or []
        holds += self.capacity.streams.take(), starting
        pending._started = partial(self._started, starting)
        if self.capacity.limited:
            full = self.capacity.overflow()
            if full is not None and full[0] != "queue":
                self._loop.call_soon(self._overflow)

    def _started(self, give_back: Callable[[], bool]) -> None:
        if give_back():
            self._freed()

    def _reject(self, pending: PendingTransport, reject: Reject) -> Reject:
        data = reject.data
        if data is None:
            data = b"" if pending._callee_data is None else bytes(pending._callee_data)
        elif len(data) > pending.callee_data.capacity:
            capacity = pending.callee_data.capacity
            reason = f"callee data of {len(data)} bytes is over the capacity of {capacity}"
            raise CalleeDataError(reason, pending.caller_id)
        self._to(pending, Status.REJECTED)
        self._gate.refuse(pending._arrival, data)
        self._ledger.settle(pending, Status.REJECTED, reject.reason)
        return reject

    def _defer(self, pending: PendingTransport, defer: Defer) -> Defer:
        if self.closed:
            self._drop(pending)
            raise closed_error(pending)
        try:
            self._gate.watch(
                pending._arrival, defer.until_bytes or 0, partial(self._changed, pending)
            )
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

    def _hint(self, stay: Stay, defer: Defer) -> None:
        stay.due = False
        stay.hints = defer
        waits = [each for each in (defer.after, defer.within) if each is not None]
        stay.wake_at = self._loop.time() + min(waits) if waits else None

    # -- waking

    def wake(self, pending: PendingTransport) -> bool:
        """Make a deferred connection due; return whether it will be offered again."""
        if pending._status is Status.DEFERRED:
            if not pending._stay.due:
                pending._stay.due = True
                self._drop_hints(pending)
                self.consumer.became_due(pending)
            return True
        if pending._status is Status.DECIDING or pending is self.asked:
            pending._again = True
            return True
        return pending._status is Status.QUEUED

    def _drop_hints(self, pending: PendingTransport) -> None:
        """Wait for nothing any more, but for the deadline and for the caller to leave."""
        hints, pending._stay.hints = pending._stay.hints, None
        pending._stay.wake_at = None
        if hints is not None and hints.until_bytes is not None:
            # Above its mark a socket tells of every further segment.
            self._gate.watch(pending._arrival, 0, partial(self._changed, pending))

    def wake_all(self, predicate: Callable[[PendingTransport], object] | None) -> None:
        """See `Listener.reconsider()`."""
        # Whoever is under decision may have looked before the change; but a condition that
        # calls this has seen it, and would be asked for ever.
        task = current_task()
        chosen = [
            pending
            for pending in self._pending
            if pending._status is Status.DEFERRED
            or (
                pending._status is Status.DECIDING
                and pending is not self.asked
                and (task is None or self.deciders.get(pending) is not task)
            )
        ]
        self._wake_some(iter(chosen), predicate)

    def _wake_some(
        self,
        chosen: Iterator[PendingTransport],
        predicate: Callable[[PendingTransport], object] | None,
    ) -> None:
        for _, pending in zip(range(PER_TURN), chosen, strict=False):
            if pending._status in TO_RECONSIDER and (predicate is None or predicate(pending)):
                self.wake(pending)
        if not self.closed and chosen.__length_hint__():  # type: ignore[attr-defined]
            self._loop.call_soon(self._wake_some, chosen, predicate)

    def _freed(self) -> None:
        """Note that a place was given back: whoever waits for one has it, the oldest first."""
        self._wake_idle()
        if self.closed:
            return
        if not self._wake_next_free():
            self._frees += 1
        self.consumer.left_place()
        self._listen_if_room()

    def _wait_for_place(self, pending: PendingTransport) -> None:
        if pending._stay.in_line:
            return
        if len(self._until_free) > 2 * self._pending.deferred + 64:
            # Those that have found their end, and nobody has come to.
            self._until_free = [each for each in self._until_free if each[1]._kept]
            heapq.heapify(self._until_free)
        pending._stay.in_line = True
        heapq.heappush(self._until_free, (pending._stay.place, pending))

    def _wake_next_free(self) -> bool:
        """Have the oldest that waits for a place offered again; whether there is one."""
        while self._until_free and not self.closed:
            pending = heapq.heappop(self._until_free)[1]
            stay = pending._stay
            stay.in_line = False
            if pending._status is Status.DEFERRED and stay.hints and stay.hints.until_free:
                stay.by_free = True
                self.wake(pending)
                return True
        return False

    def group_qos(self, name: object) -> FlowSpec | None:
        """See `PendingTransport.gqos`."""
        return self.groups.qos(name)

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
            self._changed(pending)
            self.consumer.became_due(pending)

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

    def _deliver(self, pending: PendingTransport, sock: OwnedSocket) -> tuple[Stream, object]:
        """Make the stream of an accepted connection; also return what becomes of it."""
        if pending._kept:
            pending._stay.taker = _IN_HAND
        serial = self._serial = self._serial + 1
        group = None if pending.group is None else self.groups.find(pending.group)
        holds = pending._release_holds()
        if group is not None:
            # First, so that what is released can count on the place in the group.
            holds = [partial(group._discard, serial), *holds]
        sock.own(partial(self._over, serial, holds), self._forgotten)
        if self.options:
            inherit_options(sock, self.options)
        if pending._sqos is not None or pending.group is not None:
            self._apply_qos(pending, sock, group)
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
        stream._started = pending._started
        self._streams._add(serial, stream)
        if group is not None:
            group._add(serial, stream)
        if pending._callee_data:
            _send_callee_data(stream, bytes(pending._callee_data))
        factory = self._stream_factory
        result = stream if factory is None else self._made(factory, stream, pending)
        self._to(pending, Status.ACCEPTED)
        self._ledger.settle(pending, Status.ACCEPTED, pending._reason)
        return stream, result

    def _made(
        self, factory: Callable[[Stream], object], stream: Stream, pending: PendingTransport
    ) -> object:
        """Return what ``stream_factory`` makes of a new stream."""
        try:
            return factory(stream)
        except BaseException as error:
            self._fail(pending, f"stream_factory raised {error!r}")
            stream.abort()
            raise

    def _apply_qos(
        self, pending: PendingTransport, sock: OwnedSocket, group: StreamGroup | None
    ) -> None:
        """Apply the flow spec that the condition asked for, or else its group's."""
        try:
            if group is None and pending.group is not None:
                # Named between the verdict and the end of a slow admission.
                raise _no_group(pending)
            flow = None if pending._sqos is None else pending._sqos.sending
            if flow is None and group is not None:
                flow = group.qos
            if flow is not None:
                apply_flow(sock, flow, pending.ip)
        except AcceptError as error:
            error.caller_id = pending.caller_id
            self._fail(pending, error.reason)
            reset(sock)
            raise

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
        self._streams._discard(serial)
        if holds:
            self._ledger.release(holds)
        self._freed()
        if self.closed:
            self._delivery.look_over()

    def unasked(self, pending: PendingTransport) -> object:
        """Act on what needs no condition: a loss to report, a connection that is ready."""
        if pending._status in LOSSES:
            raise self._report(pending)
        sock, pending._stay.socket = pending._stay.socket, None
        return self._deliver(pending, sock)

    def still_there(self, ready: PendingTransport) -> bool:
        """Whether the caller of an accepted connection that nobody has taken yet is there."""
        sock = ready._stay.socket
        if peer(sock, tcp=sock.proto == socket.IPPROTO_TCP) is not Peer.GONE:
            return True
        ready._stay.socket = None
        reset(sock)
        self._book(ready, Status.RESET, "the peer reset the connection before it was taken")
        return False

    async def completed(self, pending: PendingTransport) -> object:
        """Wait until the gate has produced the socket of an accepted connection."""
        taker = pending._stay.taker = self._loop.create_future()
        try:
            await taker
        except BaseException:
            pending._stay.taker = None
            if pending._status is Status.READY or pending._status in LOSSES:
                # It came in the very turn of the cancellation: somebody else has to know.
                self.consumer.became_due(pending)
            raise
        pending._stay.taker = None
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
            pending._stay.socket = None
            self._book(pending, Status.RESET, "the caller left before the connection was complete")
        else:
            pending._stay.socket = admission.result()
            self._to(pending, Status.READY)
        if pending._stay.taker is None:
            self.consumer.became_due(pending)
        elif not pending._stay.taker.done():
            pending._stay.taker.set_result(None)

    # -- lost

    def _lose(self, pending: PendingTransport, status: Status, reason: str) -> None:
        """Close a connection that was lost before a verdict; somebody has to be told."""
        self._gate.forget(pending._arrival)
        self._book(pending, status, reason)

    def _book(self, pending: PendingTransport, loss: Status, reason: str) -> None:
        was = pending._status
        self._to(pending, loss)
        if not self.consumer.reports:
            self._pending.report(pending)
            self._wake_idle()
            self.consumer.left_place()
        pending._reason = reason
        self._ledger.settle(pending, loss, reason)
        if was is Status.ADMITTED or was is Status.READY:
            self._freed()

    def _report(self, loss: PendingTransport) -> AcceptError:
        """Return the error that tells of a loss, which is told once."""
        if loss._kept:
            self._pending.report(loss)
        return LOSSES[loss._status](loss._reason, loss.caller_id)

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

    def _changed(self, pending: PendingTransport) -> None:
        """Look at a deferred connection: its peer left, or enough bytes came, or neither."""
        if pending._status is not Status.DEFERRED:
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
        expired, woken = self._pending.alarms(self._loop.time(), PER_TURN)
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

    def expire(self, pending: PendingTransport, reason: str) -> None:
        """End a deferred connection, if it is one still."""
        if pending._status is Status.DEFERRED:
            self._lose(pending, Status.EXPIRED, reason)
            self.consumer.became_due(pending)

    # -- taking no more

    @property
    def expires_oldest(self) -> bool:
        """Whether room is made for a newcomer when `max_pending` is reached."""
        if self._on_full is None:
            return not self.consumer.reports
        return self._on_full == "expire_oldest"

    def room_to_offer(self) -> bool:
        """Whether one more connection may be accepted, those under decision counted in."""
        room = self.capacity.room()
        return room is None or room > self._pending.deciding

    def take_in(self) -> None:
        """Put everybody whom the kernel has queued on the deque, as far as there are places.

        Raises:
            AcceptError: Not everybody; they wait at the gate.
        """
        known = self._gate.backlog()
        # Who comes meanwhile does not count, or there might be no end.
        most = AT_ONCE if known is None else known[1] + 1
        for pending in self._newcomers(most, places=True):
            if pending._status in TO_OFFER:
                self._enter(pending, Status.QUEUED)
            self.consumer.became_due(pending)

    def refuse_new(self) -> None:
        """Have the kernel refuse newcomers; those it has queued are taken in before.

        Raises:
            AcceptError: They cannot be; nothing is refused.
            OSError: It cannot be done with these sockets; nothing has changed.
        """
        if self._refusing:
            return
        self._gate.check_refusable()
        # No await between the two: whoever comes in between is reset.
        self.take_in()
        self._gate.refuse_new()
        self._refusing = True

    def set_limit(self, name: str, limit: Limit | None) -> None:
        """Change a limit; whoever waited for it goes on.

        Raises:
            OSError: It refuses at the kernel, which these sockets cannot; nothing has
                changed.
        """
        if limit is not None and limit.overflow == "refuse" and not self.stopped:
            self._gate.check_refusable()
        before = self.capacity.room()
        self.capacity.set(name, limit)
        room = self.capacity.room()
        if before is not None:
            waiting = len(self._until_free)
            for _ in range(waiting if room is None else min(waiting, room - before)):
                self._wake_next_free()
            if room is None or room > before:
                self._frees += 1  # for who is under decision
        self._cannot_refuse = False
        self._overflow()
        self._listen_if_room()
        self.consumer.left_place()

    def suspend(self, *, refuse: bool) -> None:
        """Take nobody; with *refuse*, have the kernel refuse them.

        Raises:
            OSError: As `refuse_new()`; nothing has changed.
        """
        if refuse:
            self.refuse_new()
            self._refusal_asked = True
        self.suspended = True

    def resume(self) -> None:
        """Take again, after `suspend()`.

        Raises:
            OSError: The kernel does not listen again; nothing has changed.
        """
        if self._refusing and self.capacity.may_listen():
            self._gate.listen_again()
            self._refusing = False
        self.suspended = self._refusal_asked = False
        self._overflow()
        # Both: who came before waits for no news.
        self.consumer.left_place()
        self.consumer.arrived()

    def _listen_if_room(self) -> None:
        """Have the kernel listen again, if it refuses only for want of room."""
        if (
            not self._refusing
            or self._refusal_asked
            or self.stopped
            or not self.capacity.may_listen()
        ):
            return
        self._stop_relistening()
        try:
            self._gate.listen_again()
        except OSError as error:
            logger.error(  # noqa: TRY400 - what failed stands in the sentence
                "callers are still refused, in %s s it is tried again: %s", RELISTEN, error
            )
            self._relisten = self._loop.call_later(RELISTEN, self._listen_if_room)
            return
        self._refusing = False
        self.consumer.arrived()

    def _stop_relistening(self) -> None:
        if self._relisten is not None:
            self._relisten.cancel()
            self._relisten = None

    @property
    def rejecting(self) -> int:
        """How many rejected callers are still being told why."""
        return self._gate.rejecting

    @property
    def refusing(self) -> bool:
        """Whether the kernel refuses newcomers."""
        return self._refusing

    def stop(self) -> int:
        """Take in who is queued, and then nobody any more; return how many could not be."""
        if self.stopped:
            return self._left_queued
        if not self._refusing:
            try:
                self.take_in()
            except AcceptError as error:
                logger.warning("the shutdown cannot take those who wait: %s", error.reason)
            backlog = self._gate.backlog()
            self._left_queued = 0 if backlog is None else backlog[0]
        self.stopped = True
        self._stop_relistening()
        self._gate.stop()
        return self._left_queued

    # -- moving

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

    def _use_place(self, pending: PendingTransport, status: Status) -> None:
        """Pass a place on that a connection was woken for and does not use.

        One that waits for another has found that there is none; so would those behind it.
        """
        if status is Status.DECIDING:
            return
        pending._stay.by_free = False
        hints = pending._stay.hints
        waits_on = status is Status.DEFERRED and hints is not None and hints.until_free
        if status is not Status.ADMITTED and status is not Status.ACCEPTED and not waits_on:
            self._wake_next_free()

    def done_with_fresh(self) -> None:
        """Note that the call which took a connection has nothing in its hands any more."""
        self._fresh = None
        if self.closed:
            self._delivery.look_over()

    def _wake_idle(self) -> None:
        if self.stopped:
            idle, self._idle = self._idle, []
            for waiter in idle:
                if not waiter.done() and not self._loop.is_closed():
                    waiter.set_result(None)


def _send_callee_data(stream: Stream, data: bytes) -> None:
    try:
        stream.write(data)
    except OSError:
        # The caller has left: the stream remembers, and says so when it is used.
        pass


def _no_group(pending: PendingTransport) -> InvalidGroupError:
    return InvalidGroupError(f"the listener has no group {pending.group!r}", pending.caller_id)


def closed_error(pending: PendingTransport | None = None) -> ListenerClosedError:
    """Return what a call on a closed listener raises."""
    reason = "the listener is closed"
    return ListenerClosedError(reason, None if pending is None else pending.caller_id)
