"""What to do without descriptors. Pure: time comes in, what to do comes out."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

__all__ = ("Episode", "Exhaustion", "OnExhausted")

OnExhausted: TypeAlias = Literal["pause", "shed_oldest_deferred"]

FIRST: Final = 0.05
"""Seconds to the first look for a free descriptor: half a percent of a core."""
LONGEST: Final = 1.0
"""Seconds between two looks at the most: Go's net/http has the same."""


@attrs.frozen
class Episode:
    """A time without descriptors, or without memory for sockets.

    Attributes:
        reason: What was missing, in words for a person.
        waiting: Callers in the kernel's queue; ``None`` where it does not tell.
        seconds: How long it has lasted; at its beginning 0.
    """

    reason: str
    waiting: int | None
    seconds: float


class Exhaustion:
    """One episode after the other, each with one beginning and one end.

    An episode ends when the queue was found empty, or accept(2) has got through it: a
    single success is no end, or every caller of a long queue would be an episode.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._delay = FIRST
        self._reason = ""
        self._waiting: int | None = None

    @property
    def under_way(self) -> bool:
        """Whether an episode is."""
        return self._since is not None

    def pause(self) -> float:
        """Return the seconds until the next attempt that nothing gives a reason for.

        Each is longer than the one before, until an attempt succeeds.
        """
        delay, self._delay = self._delay, min(2 * self._delay, LONGEST)
        return delay

    def failed(self, now: float, reason: str, waiting: int | None) -> Episode | None:
        """Note an attempt that failed; return the episode if it begins with that."""
        if self._since is not None:
            if waiting is not None:
                self._waiting = max(self._waiting or 0, waiting)
            return None
        self._since = now
        self._delay = FIRST
        self._reason = reason
        self._waiting = waiting
        return Episode(reason, waiting, 0.0)

    def succeeded(self) -> None:
        """Note that a descriptor was free: the next attempt may come soon."""
        self._delay = FIRST

    def caught_up(self, now: float) -> Episode | None:
        """Note that nobody waits any more; return the episode that has ended, if any."""
        if self._since is None:
            return None
        ended = Episode(self._reason, self._waiting, now - self._since)
        self._since = None
        return ended
