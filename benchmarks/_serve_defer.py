"""Deferred connections under measurement: ``python _serve_defer.py LOOP PLACES KIND TRACE``.

The first connection is let in, and says what is to be done, a line each; the answer is a
line of numbers. All others are deferred, as KIND says, and stay. TRACE is ``trace`` to count
the memory that Python's allocators give out, which makes everything else slower.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

from _serving import HOST, LIFETIME, announce, run

import condaccept
from condaccept import ACCEPT, DEFER, Defer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SPACING = 0.0002
"""Seconds from one ``after`` to the next, whoever's: each waits longer the more there are."""
HEAD_START = 0.5
"""Seconds for all of them to be told how long to wait before the first one's wait is over."""
RUN_IN = 100  # wake-ups by ``after`` before those that count
PAGE = 4096


class Deferring:
    """A condition that defers, and what the control connection can ask for."""

    def __init__(self, places: int, kind: str) -> None:
        """Let the first in, and defer so many."""
        self.places = places
        self.choose(kind)
        self.offers = 0
        self.lost = -1  # the one that is let in is an outcome, too
        self.goal = 0
        self.reached: asyncio.Future[None] | None = None
        self.to_wake: Iterator[condaccept.PendingTransport] = iter(())
        self.controlled = False

    def choose(self, kind: str) -> None:
        """Defer as *kind* says from now on."""
        self.told = 0
        self.defer = getattr(self, f"defer_{kind}")

    # -- conditions

    def condition(self, pending: condaccept.PendingTransport) -> object:
        """Count the offer, and defer."""
        if not self.controlled:
            self.controlled = True
            return ACCEPT
        self.offers += 1
        if self.offers == self.goal and self.reached is not None:
            self.reached.set_result(None)
            self.reached = None
        return self.defer(pending)

    def defer_plain(self, _pending: condaccept.PendingTransport) -> object:
        """Until it is reconsidered."""
        return DEFER

    def defer_next(self, _pending: condaccept.PendingTransport) -> object:
        """The same; in its next turn, the loop wakes another one."""
        following = next(self.to_wake, None)
        if following is not None:
            self.loop.call_soon(following.reconsider)
        return DEFER

    def defer_bytes(self, pending: condaccept.PendingTransport) -> object:
        """Until one more byte has come."""
        pending.state = (pending.state or 0) + 1
        return Defer(until_bytes=pending.state)

    def defer_after(self, pending: condaccept.PendingTransport) -> object:
        """For a time after which as many others have been offered as there are.

        By a timetable: told to wait so long from now, a few would soon come all at once.
        """
        now = self.loop.time()
        if self.told < self.places:
            if not self.told:
                self.begin = now + HEAD_START
            self.told += 1
            pending.state = self.begin + self.told * SPACING
        else:
            pending.state += self.places * SPACING
        return Defer(after=max(pending.state - now, 0))

    def defer_long(self, _pending: condaccept.PendingTransport) -> object:
        """For longer than this process lives."""
        return Defer(after=LIFETIME)

    # -- what can be asked for

    async def mark(self) -> Sequence[int]:
        """Count offers and CPU time from now on."""
        self.offers = 0
        self.cpu = time.process_time_ns()
        return ()

    async def offered(self, offers: int) -> Sequence[int]:
        """Wait for so many since the mark, and return the CPU time."""
        if self.offers < offers:
            self.goal = offers
            self.reached = self.loop.create_future()
            await self.reached
        return (time.process_time_ns() - self.cpu,)

    async def everybody(self, rounds: int) -> Sequence[int]:
        """Offer all of them again, so many times, and return the CPU time."""
        await self.mark()
        for number in range(rounds):
            self.listener.reconsider()
            await self.offered((number + 1) * self.places)
        return await self.offered(0)

    async def one_by_one(self, count: int) -> Sequence[int]:
        """Wake *count*, each after the one before was offered, and return the CPU time."""
        self.choose("next")
        pending = self.listener.pending
        self.to_wake = iter([pending[i % self.places] for i in range(count)])
        await self.mark()
        next(self.to_wake).reconsider()
        return await self.offered(count)

    async def bytes(self) -> Sequence[int]:
        """Wait for data, all of them."""
        self.choose("bytes")
        await self.everybody(1)
        return await self.mark()

    async def after(self) -> Sequence[int]:
        """Wait for a time, all of them."""
        self.choose("after")
        await self.everybody(1)
        await self.offered(self.places + RUN_IN)
        return await self.mark()

    async def memory(self) -> Sequence[int]:
        """Return the bytes that Python's allocators gave out, and those that are resident."""
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1])  # noqa: ASYNC240  # memory
        return tracemalloc.get_traced_memory()[0], resident * PAGE

    async def kept(self) -> Sequence[int]:
        """Return how many are deferred, and how many found an end."""
        return len(self.listener.pending), self.lost

    # -- serving

    async def control(self, stream: condaccept.Stream) -> None:
        """Do what is asked, one line after the other."""
        while line := await stream.readline():
            name, *arguments = line.decode().split()
            answer = await getattr(self, name)(*map(int, arguments))
            await stream.send(" ".join(map(str, answer)).encode() + b"\n")

    def ended(self, _outcome: condaccept.Outcome) -> None:
        """Count one that is not deferred any more."""
        self.lost += 1

    async def serve(self, *, trace: bool) -> None:
        """Serve until the process is killed."""
        self.loop = asyncio.get_running_loop()
        self.listener = await condaccept.listen(
            HOST, 0, max_pending=self.places, defer_timeout=LIFETIME
        )
        self.listener.on_outcome(self.ended)
        if trace:
            tracemalloc.start()
        announce(self.listener.sockname[1])
        await self.listener.serve(self.control, self.condition)  # type: ignore[arg-type]


if __name__ == "__main__":
    loop, places, kind, trace = sys.argv[1:]
    run(loop, Deferring(int(places), kind).serve(trace=trace == "trace"))
