"""Who is taken from the gate, and who is not: limits, pauses, refusal, the end of taking."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final, cast

from condaccept._moving import TO_OFFER, Moving
from condaccept._pending import PendingTransport, Status
from condaccept.exceptions import (
    AcceptError,
    BuffersExhaustedError,
    DescriptorsExhaustedError,
    NetworkDownError,
    PendingResetError,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from condaccept._capacity import Capacity, Limit
    from condaccept._ledger import Ledger
    from condaccept._moving import OnEof, OnFull
    from condaccept._pending import Arrival, Owner, PendingDeque
    from condaccept.gates._gate import Gate

__all__ = ("PER_WAKE_UP", "Taking")

logger = logging.getLogger("condaccept")

PER_WAKE_UP: Final = 32
"""Newcomers acted on before the loop's other readers have their turn: a few hundred
microseconds."""
AT_ONCE: Final = 65536
"""Connections taken in at once where the kernel does not tell how many it may have queued."""
RELISTEN: Final = 1.0
"""Seconds until a kernel that would not listen again is asked the next time, and until
newcomers over a limit are looked at again who could not be taken."""


class _Nobody:
    """In the place of an arrival that accept(2) did not give out."""

    caller_id = None


class Taking(Moving):
    """Takes connections from the gate while it may, and does to newcomers what a limit says.

    Attributes:
        capacity: The limits of open and of starting streams.
        suspended: Whether nothing is taken for the time being.
        clock: What the age of a connection is measured by.
    """

    __slots__ = (
        "_cannot_refuse",
        "_fresh",
        "_left_queued",
        "_owner",
        "_refusal_asked",
        "_refusing",
        "_relisten",
        "capacity",
        "clock",
        "suspended",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gate: Gate[Any],
        pending: PendingDeque,
        ledger: Ledger,
        *,
        on_full: OnFull | None,
        on_eof: OnEof,
        capacity: Capacity,
    ) -> None:
        super().__init__(loop, gate, pending, ledger, on_full=on_full, on_eof=on_eof)
        # The whole has what is still missing here.
        self._owner = cast("Owner", self)
        self.clock = time.monotonic
        self.capacity = capacity
        self.suspended = False
        self._refusing = False  # the kernel refuses newcomers
        self._refusal_asked = False  # and is to, whatever room there is
        self._cannot_refuse = False  # that was logged
        self._relisten: asyncio.TimerHandle | None = None
        self._left_queued = 0
        self._fresh: PendingTransport | None = None  # taken, and in the hands of a call

    def _arrived(self) -> None:
        self._overflow()
        self.consumer.arrived()

    def _told(self) -> None:
        """Note that a rejected caller has read why, which has given a descriptor back."""
        self._wake_idle()
        self.consumer.left_place()

    def take(self, *, to_offer: bool = True) -> PendingTransport | None:
        """Take a connection from the gate; ``None`` if nobody waits there, or may be taken.

        What is returned may be a loss; one that is to be reported is on the deque then.
        One that will not be offered, if not *to_offer*, needs no room for a stream.

        Raises:
            AcceptError: Nothing could be taken; whoever waits at the gate goes on waiting.
        """
        if to_offer and (
            self.suspended or self.stopped or (self.capacity.limited and not self.room_to_offer())
        ):
            return None
        try:
            arrival = self._gate.take()
        except PendingResetError as error:
            # Told of by accept(2), which gave no connection: a loss like any other.
            self._ledger.taken += 1
            pending = PendingTransport(cast("Arrival", _Nobody()), self._owner)
            self._book(pending, Status.RESET, error.reason)
            return pending
        if arrival is None:
            return None
        self._ledger.taken += 1
        pending = self._fresh = PendingTransport(arrival, self._owner)
        if arrival.hangup:
            self.look(pending)
        return pending

    def room_to_offer(self) -> bool:
        """Whether one more connection may be accepted, those under decision counted in."""
        room = self.capacity.room()
        return room is None or room > self._pending.deciding

    def undecided(self) -> tuple[PendingTransport, ...]:
        """See `Listener.pending`."""
        fresh = self._fresh
        if fresh is None or fresh._kept or fresh._status is not Status.QUEUED:
            return self._pending.undecided()
        return (*self._pending.undecided(), fresh)

    def finished(self) -> bool:
        """Whether no connection will ever be decided any more."""
        return self.closed or (self.stopped and not len(self._pending))

    # -- limits

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
                    pending = self.take(to_offer=False)
                except NetworkDownError as error:
                    logger.debug("%s", error.reason)
                    continue
                if pending is None:
                    return
                yield pending
        finally:
            self._fresh = fresh

    def _freed(self) -> None:
        """Note that a place was given back: whoever waits for one has it, the oldest first."""
        if self.stopped:
            self._wake_idle()
            if self.closed:
                return
        if not (self._until_free and self._wake_next_free()):
            self._frees += 1
        self.consumer.left_place()
        if self._refusing:
            self._listen_if_room()

    # -- taking no more

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

    def take_in(self) -> None:
        """Put everybody whom the kernel has queued on the deque, as far as there are places.

        Raises:
            AcceptError: Not everybody; they wait at the gate.
        """
        known = self._gate.backlog()
        # Who comes meanwhile does not count, or there might be no end.
        most = AT_ONCE if known is None else known[1] + 1
        asked = self.asked
        if asked is not None and not asked._kept and not self._pending.crowded:
            # Its condition may have led here; those who come in now come behind it.
            self._enter(asked, Status.DECIDING)
        for pending in self._newcomers(most, places=True):
            if pending._status in TO_OFFER:
                self._enter(pending, Status.QUEUED)
                # It may have to wait long for its offer.
                self._gate.watch(pending._arrival, 0, pending)
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
