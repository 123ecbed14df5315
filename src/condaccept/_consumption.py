"""Taking, asking and parking: what `streams()` and `serve()` have in common.

A plain condition is asked straight from the readiness callback; a rejected caller costs no
task and no future. Whoever is deferred is parked until its hints are fulfilled, and those
behind it go on.
"""

from __future__ import annotations

import abc
import asyncio
import contextvars
import inspect
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from condaccept._exhaustion import Exhaustion
from condaccept._moving import LOSSES, TO_OFFER
from condaccept._pending import QUEUED, Status
from condaccept._sockets import descriptor_free
from condaccept._taking import PER_WAKE_UP
from condaccept._verdict import Accept, Defer, Reject, Verdict
from condaccept.exceptions import (
    AcceptError,
    BuffersExhaustedError,
    CalleeDataError,
    ConditionNotCallableError,
    DescriptorsExhaustedError,
    InvalidGroupError,
    InvalidVerdictError,
    ListenerClosedError,
    NetworkDownError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from condaccept._deciding import Deciding
    from condaccept._exhaustion import Episode, OnExhausted
    from condaccept._pending import Condition, PendingTransport
    from condaccept._stream import Stream

__all__ = ("Consumption", "Policy")

T = TypeVar("T")

_VERDICTS: Final = (Verdict, Accept, Reject, Defer)
_BARE_REJECT: Final = Verdict.REJECT

logger = logging.getLogger("condaccept")


class Policy:
    """What a listener does without descriptors, whoever consumes.

    Attributes:
        on_exhausted: Called with the `Episode` when one begins.
        exhausted: Whether to wait, or to expire the oldest deferred connection.
        exhaustion: The episode under way.
    """

    def __init__(self, exhausted: OnExhausted) -> None:
        self.exhausted = exhausted
        self.on_exhausted: list[Callable[[Episode], object]] = []
        self.exhaustion = Exhaustion()


class Consumption(abc.ABC, Generic[T]):
    """Takes, asks and parks; what becomes of an accepted connection is its heirs' matter."""

    reports = False

    def __init__(
        self,
        deciding: Deciding[T],
        policy: Policy,
        condition: Condition | None,
        callback_data: object,
    ) -> None:
        if condition is not None and not callable(condition):
            reason = f"the condition cannot be called: {condition!r}"
            raise ConditionNotCallableError(reason)
        self._deciding = deciding
        self._loop = deciding._loop
        self._gate = deciding._gate
        self._pending = deciding._pending
        self._ledger = deciding._ledger
        self._policy = policy
        self._condition = condition
        self._callback_data = callback_data
        # What conditions and handlers see of context variables is what the caller saw.
        self._context = contextvars.copy_context()
        self._due: deque[PendingTransport] = deque()  # to be offered again
        self._round = 0  # how many of them have their turn in this wake-up
        self._ready: deque[PendingTransport] = deque()  # to be given out
        self._deciders: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._again = False
        self._dry = False  # nobody waits any more who was not told of
        self._soon: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._errors = 0  # of accept(2), one after the other
        self._troubled = True  # there may have been some since the last one that succeeded

    # -- what it is told as the consumer

    def arrived(self) -> None:
        """Take and decide: somebody came."""
        if not self._policy.exhaustion.under_way:
            # Without descriptors each newcomer would only be one more failure.
            self._run()

    def became_due(self, pending: PendingTransport | None) -> None:
        """Offer *pending* again in its turn, or give it out."""
        if pending is not None:
            if pending._status is Status.READY:
                self._ready.append(pending)
            elif pending._status in TO_OFFER:
                self._due.append(pending)
        self._later()

    def left_place(self) -> None:
        """Go on: somebody may have waited for the place."""
        self._later()

    def closed(self) -> None:
        """Stop: the listener was closed, or takes no more."""
        if self._deciding.stopped:
            self._no_more_episode()
        self._later()

    @abc.abstractmethod
    def busy(self) -> bool:
        """Whether another consumer has to wait."""

    # -- the pump

    def _begin(self) -> None:
        """Become the consumer: whoever waits undecided is offered to this condition."""
        if self._deciding.consumer is self:
            return
        self._deciding.switch(self)
        self._troubled = True
        self._due.clear()
        self._ready.clear()
        for pending in list(self._pending):
            if pending._status in LOSSES:
                self._pending.report(pending)
            elif pending._status is not Status.DEFERRED:
                self.became_due(pending)
            elif not pending._stay.due:
                self._deciding.wake(pending)
            else:
                self._due.append(pending)

    def _end(self) -> None:
        """Do nothing any more."""
        if self._deciding.consumer is self:
            self._no_more_episode()
        for handle in (self._soon, self._retry):
            if handle is not None:
                handle.cancel()
        self._soon = self._retry = None
        self._deciding.leave(self)

    def _later(self) -> None:
        """Go on in the next turn of the loop, or at the end of this one's work."""
        if self._pumping:
            self._again = True
        elif self._soon is None and not self._loop.is_closed():
            self._soon = self._loop.call_soon(self._run)

    def _run(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._deciding.consumer is not self:
            return
        if not self._pumping:
            self._pump()
        self._after()

    def _after(self) -> None:
        """See whether the work has ended."""

    def _pump(self) -> None:
        """Take and decide, for a bounded number of offers."""
        self._pumping = True
        self._again = False
        # Those that become due in between come next time: one that is reconsidered by its
        # own condition must not keep the others waiting.
        self._round = len(self._due)
        self._dry = False
        try:
            for _ in range(PER_WAKE_UP):
                if not self._wants():
                    return
                pending = self._next()
                if pending is None:
                    self._again |= self._round == 0 and bool(self._due)
                    return
                self._offer(pending)
            self._again = True
        except BaseException:
            self._again = True  # what told of the others is spent
            raise
        finally:
            self._deciding.done_with_fresh()
            self._pumping = False
            if self._again:
                self._later()

    @abc.abstractmethod
    def _wants(self) -> bool:
        """Whether somebody is there for whom to take another connection."""

    @abc.abstractmethod
    def _give(self, stream: Stream, result: T) -> None:
        """Give an accepted connection to whom it was taken for."""

    @abc.abstractmethod
    def _wants_stream(self) -> bool:
        """Whether one that is accepted now can be given out now."""

    def _next(self) -> PendingTransport | None:
        """Return the next one to look at, who may be lost by now; ``None``: nobody is there."""
        deciding = self._deciding
        deque = self._pending
        if self._ready and self._wants_stream():
            return self._ready.popleft()
        if deque.deciding >= deque.max_deciding:
            return None
        if self._round:
            return self._next_due()
        if self._dry or (deque.crowded and not (deciding.expires_oldest and deque.deferred)):
            return None
        try:
            pending = deciding.take()
        except AcceptError as error:
            self._not_taken(error)
            return None
        if self._troubled:
            self._taken(pending)
        else:
            self._dry = not self._gate.more
        return pending

    def _next_due(self) -> PendingTransport | None:
        if not self._deciding.room_to_offer():
            return None
        self._round -= 1
        return self._due.popleft()

    def _not_taken(self, error: AcceptError) -> None:
        """Act on an accept(2) that failed."""
        self._troubled = True
        if isinstance(error, NetworkDownError):
            # About one connection, says accept(2), so the next is tried at once; unless
            # there is no end of them.
            logger.debug("%s", error.reason)
            self._errors += 1
            if self._errors % PER_WAKE_UP:
                self._again = True
            else:
                self._set_retry()
        elif isinstance(error, (DescriptorsExhaustedError, BuffersExhaustedError)):
            self._exhausted(error)
        else:
            logger.error("accepting has ended: %s", error.reason)
            self._broken(error)

    def _taken(self, pending: PendingTransport | None) -> None:
        """Note an accept(2) that did not fail, after one that did."""
        exhaustion = self._policy.exhaustion
        self._errors = 0
        if pending is not None:
            exhaustion.succeeded()
        elif exhaustion.under_way and not self._gate.waiting():
            self._nobody_waits()
        self._troubled = exhaustion.under_way

    @abc.abstractmethod
    def _broken(self, error: AcceptError) -> None:
        """End: nothing can be accepted from these sockets any more."""

    def _offer(self, pending: PendingTransport) -> None:
        deciding = self._deciding
        if pending._kept or pending._status is not QUEUED:
            if pending._status is Status.READY:
                self._give_ready(pending)
                return
            if not (_is_due(pending) and deciding.look(pending)):
                return  # here twice, decided meanwhile, or lost
        # No offer sees what another one has set in context variables; a handler sees what
        # its own connection's condition has.
        context = self._context.copy()
        try:
            verdict = deciding.ask(pending, self._condition, self._callback_data, context)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - of one client
            self._condition_raised(pending, error)
            return
        if verdict is _BARE_REJECT and pending._settled is None and not self._ledger.callbacks:
            # What a flood comes to, the short way: it can fail in nothing that `_conclude()`
            # is prepared for.
            deciding.reject(pending)
        elif isinstance(verdict, _VERDICTS) or not inspect.isawaitable(verdict):
            context.run(self._conclude, pending, verdict)
        else:
            context.run(self._await, pending, verdict)

    def _await(self, pending: PendingTransport, verdict: Awaitable[Any]) -> None:
        """Have a task wait for the verdict of an async condition."""
        task = self._loop.create_task(self._decide(pending, verdict))
        self._deciders.add(task)
        if not task.done():  # as it may be where tasks are eager
            self._deciding.under_decision(pending, task)
        task.add_done_callback(partial(self._decided, pending, verdict))

    async def _decide(self, pending: PendingTransport, awaitable: Awaitable[Any]) -> None:
        try:
            verdict = await self._deciding.answer(pending, awaitable)
        except (Exception, asyncio.CancelledError) as error:
            if pending._status is Status.REJECTED:
                self._condition_raised(pending, error)
            elif pending._status is not Status.CLOSED or not isinstance(error, ListenerClosedError):
                raise
        else:
            if self._deciding.look(pending):
                self._conclude(pending, verdict)

    def _decided(
        self, pending: PendingTransport, awaitable: Awaitable[Any], task: asyncio.Task[None]
    ) -> None:
        self._deciders.discard(task)
        if task.cancelled():
            # Before its first step, maybe: then nobody has ever awaited it.
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            elif asyncio.isfuture(awaitable):
                awaitable.cancel()
        self._deciding.abandon(pending, task)
        self._later()

    def _conclude(self, pending: PendingTransport, verdict: object) -> None:
        deciding = self._deciding
        try:
            # Fail closed: there is no caller who could be told to try something else.
            made: Any = deciding.conclude(
                pending, verdict, deliver=self._wants_stream(), keep=False
            )
        except ListenerClosedError:
            return
        except (InvalidVerdictError, InvalidGroupError, CalleeDataError) as error:
            logger.error(  # noqa: TRY400 - whose fault it is stands in the sentence
                "%r is not accepted: %s", pending.caller_id, error.reason, extra=_extra(pending)
            )
            return
        except (Exception, asyncio.CancelledError):
            logger.exception(
                "no stream could be made for %r", pending.caller_id, extra=_extra(pending)
            )
            return
        if type(made) is tuple:
            self._give(*made)

    def _give_ready(self, pending: PendingTransport) -> None:
        if pending._stay.taker is not None or not self._deciding.still_there(pending):
            return  # to be given to a call that waits for it, or lost
        try:
            made: Any = self._deciding.unasked(pending)
        except (Exception, asyncio.CancelledError):
            logger.exception(
                "no stream could be made for %r", pending.caller_id, extra=_extra(pending)
            )
            return
        self._give(*made)

    def _condition_raised(self, pending: PendingTransport, error: BaseException) -> None:
        logger.error(
            "rejected %r: its condition raised",
            pending.caller_id,
            exc_info=error,
            extra=_extra(pending),
        )

    # -- without descriptors

    def _exhausted(self, error: AcceptError) -> None:
        backlog = self._gate.backlog()
        waiting = None if backlog is None else backlog[0]
        exhaustion = self._policy.exhaustion
        begun = exhaustion.failed(self._loop.time(), error.reason, waiting)
        if self._policy.exhausted == "shed_oldest_deferred":
            oldest = self._pending.oldest_deferred()
            if oldest is not None:
                self._deciding.expire(oldest, f"expired for a newcomer: {error.reason}")
                self._again = True
        if begun is not None:
            logger.warning(
                "cannot accept: %s; %s waiting",
                begun.reason,
                "somebody is" if waiting is None else waiting,
                extra={"waiting": waiting},
            )
            for callback in self._policy.on_exhausted:
                self._loop.call_soon(callback, begun)
                self._again = True  # behind it: it may have closed something
        self._set_retry()

    def _set_retry(self) -> None:
        # A descriptor that is closed elsewhere in the process tells nobody.
        if self._retry is None:
            self._retry = self._loop.call_later(self._policy.exhaustion.pause(), self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._run()

    def _nobody_waits(self) -> None:
        """End the episode, if there is a descriptor for the next who comes."""
        if not descriptor_free():
            self._set_retry()
            return
        self._end_episode("accepting again, nobody waits")

    def _end_episode(self, how: str) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        ended = self._policy.exhaustion.caught_up(self._loop.time())
        if ended is not None:
            logger.warning(
                "%s; it lasted %.3f s%s",
                how,
                ended.seconds,
                "" if ended.waiting is None else f", up to {ended.waiting} waited at once",
                extra={"seconds": ended.seconds, "waiting": ended.waiting},
            )

    def _no_more_episode(self) -> None:
        """Try no more: nobody is to be taken."""
        self._end_episode("nobody is accepted any more")


def _is_due(pending: PendingTransport) -> bool:
    return pending._status is Status.QUEUED or (
        pending._status is Status.DEFERRED and pending._stay.due
    )


def _extra(pending: PendingTransport) -> dict[str, object]:
    return {"caller_id": pending.caller_id, "deferrals": pending.deferrals}
