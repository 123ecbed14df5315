"""The ends of connections: every one is counted, told and released here, once. Pure."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import attrs

from condaccept._events import Outcome
from condaccept._pending import Status, check_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from condaccept._pending import PendingTransport, Release

__all__ = ("Ledger", "Statistics")

logger = logging.getLogger("condaccept")


@attrs.frozen(kw_only=True)
class Statistics:
    """A listener at one moment.

    Counts since it began, in connections: every one that was *taken* is in exactly one of
    *accepted*, *rejected*, *reset*, *expired*, *failed*, *closed* and *pending*.

    Attributes:
        taken: Taken from the kernel.
        offers: Times a condition was asked, or accept() was called without one.
        deferrals: Times a condition said DEFER.
        accepted: Given to a caller as a stream.
        rejected: Rejected by a condition, or because it raised.
        reset: Reset by the peer before a verdict.
        expired: Over their deadline, or withdrawn.
        failed: Accepted, and then ``stream_factory`` raised, the flow spec could not be
            applied, or the kernel had no room to watch the stream.
        closed: Undecided when the listener closed.
        pending: Without an outcome now.
        deciding: Of these, on the deque and under decision now.
        deferred: Of these, deferred by a condition.
        ready: Of these, accepted, and not taken by anybody yet.
        oldest_age: Seconds since the oldest pending one was taken; ``None`` without any.
        rejecting: Rejected ones that are still being sent callee data.
        cut_short: Rejected ones that were not given the time to read callee data.
        streams: Accepted ones that are still open.
        starting: Accepted ones that have not said `Stream.started()`.
        handlers: Handlers of `serve()` that are running.
        backlog: Connections in the kernel's accept queue; ``None`` where it does not tell.
        backlog_limit: How many it queues; ``None`` where it does not tell.
        suspended: Whether nothing is taken for the time being.
        refusing: Whether the kernel refuses newcomers.
        exhausted: Whether `streams()` or `serve()` has no descriptors to accept with.
    """

    taken: int
    offers: int
    deferrals: int
    accepted: int
    rejected: int
    reset: int
    expired: int
    failed: int
    closed: int
    pending: int
    deciding: int
    deferred: int
    ready: int
    oldest_age: float | None
    rejecting: int
    cut_short: int
    streams: int
    starting: int
    handlers: int
    backlog: int | None
    backlog_limit: int | None
    suspended: bool
    refusing: bool
    exhausted: bool


class Ledger:
    """Counts, outcomes and the release of holds.

    *call_soon* runs a callback later, from the loop; *report* is told of an exception that
    nobody else would see, as ``report(message, exception)``.
    """

    def __init__(
        self,
        call_soon: Callable[..., object],
        report: Callable[[str, BaseException], object],
    ) -> None:
        self._call_soon = call_soon
        self._report = report
        self.callbacks: list[Callable[[Outcome], object]] = []
        self.taken = 0
        self.offers = 0
        self.deferrals = 0
        self.counts = dict.fromkeys(
            (
                Status.ACCEPTED,
                Status.REJECTED,
                Status.RESET,
                Status.EXPIRED,
                Status.FAILED,
                Status.CLOSED,
            ),
            0,
        )

    def on_outcome(self, callback: Callable[[Outcome], object]) -> None:
        """Have *callback* called with every `Outcome`, soon after it."""
        check_plain(callback)
        self.callbacks.append(callback)

    def settle(self, pending: PendingTransport, status: Status, reason: str) -> None:
        """Book the end of *pending*, which its owner has just moved to *status*.

        Whatever its last offer held and no stream took over is released here.
        """
        self.counts[status] += 1
        pending._offered = False
        if pending._holds is not None or pending._place is not None:
            self.release(pending._release_holds())
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%s %r: %s",
                status.value,
                pending.caller_id,
                reason,
                extra={
                    "status": status.value,
                    "caller_id": pending.caller_id,
                    "reason": reason,
                    "age": pending.age,
                    "deferrals": pending.deferrals,
                },
            )
        if self.callbacks or pending._settled is not None:
            settled, pending._settled = pending._settled, None
            outcome = Outcome(status, pending.caller_id, reason, pending.age, pending.deferrals)
            self._tell(outcome, [*(settled or ()), *self.callbacks])

    def end_offer(self, pending: PendingTransport) -> None:
        """Release what the offer that has just ended without a decision held."""
        pending._offered = False
        if pending._holds is not None:
            self.release(pending._release_holds())

    def release(self, holds: Iterable[Release]) -> None:
        """Call each release, whatever the one before did."""
        fatal: BaseException | None = None
        for release in holds:
            try:
                left = release()
                if left is not None and inspect.iscoroutine(left):
                    left.close()
                    message = "a release is called, and nobody awaits what it returns"
                    raise TypeError(message)
            except (KeyboardInterrupt, SystemExit) as error:
                fatal = fatal or error
            except BaseException as error:  # noqa: BLE001 - the others have to be released too
                self._report(f"a release held for a connection raised: {release!r}", error)
        if fatal is not None:
            raise fatal

    def _tell(self, outcome: Outcome, callbacks: Iterable[Callable[[Any], object]]) -> None:
        for callback in callbacks:
            self._call_soon(callback, outcome)
