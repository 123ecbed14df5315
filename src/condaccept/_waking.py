"""When a deferred connection is offered again: hints, places, and whoever asks for it.

Everything that wakes ends in `Waking.wake()`.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final, Protocol

from condaccept._delivery import current_task
from condaccept._pending import PendingDeque, PendingTransport, Status

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from condaccept._pending import Stay
    from condaccept._verdict import Defer
    from condaccept.gates._gate import Gate

__all__ = ("Consumer", "Waking")

_TO_RECONSIDER: Final = frozenset({Status.DEFERRED, Status.DECIDING})
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


class Waking:
    """Makes the deferred due, and tells the consumer.

    Attributes:
        consumer: Whoever has the condition now.
        asked: The connection that a plain condition is being asked about, right now.
        deciders: Those under decision by an async condition, and the tasks that wait.
        closed: Whether the listener was closed.
    """

    # In this layer and in those above it: together they have more attributes than the 30
    # that CPython keeps without a dictionary, and each call of a method would cost double,
    # which was 3 % of a rejection.
    __slots__ = (
        "_frees",
        "_frees_before",
        "_gate",
        "_loop",
        "_pending",
        "_until_free",
        "asked",
        "closed",
        "consumer",
        "deciders",
    )
    consumer: Consumer

    def __init__(
        self, loop: asyncio.AbstractEventLoop, gate: Gate[Any], pending: PendingDeque
    ) -> None:
        self._loop = loop
        self._gate = gate
        self._pending = pending
        self._until_free: list[PendingTransport] = []  # a heap; some have found their end
        self._frees = 0  # how many places were given back that nobody waited for
        self._frees_before = 0  # the same, when the last offer began
        self.asked: PendingTransport | None = None
        self.deciders: dict[PendingTransport, asyncio.Task[Any] | None] = {}
        self.closed = False

    def wake(self, pending: PendingTransport) -> bool:
        """Make a deferred connection due; return whether it will be offered again."""
        if pending._status is Status.DEFERRED:
            if not pending._stay.due:
                self._drop_hints(pending)
                self.consumer.became_due(pending)
            return True
        if pending._status is Status.DECIDING or pending is self.asked:
            pending._again = True
            return True
        return pending._status is Status.QUEUED

    def _hint(self, stay: Stay, defer: Defer) -> None:
        stay.hints = defer
        waits = [each for each in (defer.after, defer.within) if each is not None]
        stay.wake_at = self._loop.time() + min(waits) if waits else None

    def _drop_hints(self, pending: PendingTransport) -> None:
        """Wait for nothing any more, but for the deadline and for the caller to leave."""
        hints, pending._stay.hints = pending._stay.hints, None
        pending._stay.wake_at = None
        if hints is not None and hints.until_bytes is not None:
            # Above its mark a socket tells of every further segment.
            self._gate.watch(pending._arrival, 0, pending)

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
            if pending._status in _TO_RECONSIDER and (predicate is None or predicate(pending)):
                self.wake(pending)
        if not self.closed and chosen.__length_hint__():  # type: ignore[attr-defined]
            self._loop.call_soon(self._wake_some, chosen, predicate)

    # -- places

    def _wait_for_place(self, pending: PendingTransport) -> None:
        if pending._stay.in_line:
            return
        if len(self._until_free) > 2 * self._pending.deferred + 64:
            # Those that have found their end, and nobody has come to.
            self._until_free = [each for each in self._until_free if each._kept]
            heapq.heapify(self._until_free)
        pending._stay.in_line = True
        heapq.heappush(self._until_free, pending)

    def _wake_next_free(self) -> bool:
        """Have the oldest that waits for a place offered again; whether there is one."""
        while self._until_free and not self.closed:
            pending = heapq.heappop(self._until_free)
            stay = pending._stay
            stay.in_line = False
            if pending._status is Status.DEFERRED and stay.hints and stay.hints.until_free:
                stay.by_free = True
                self.wake(pending)
                return True
        return False

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
