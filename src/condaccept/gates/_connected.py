"""What gates of connected sockets have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from condaccept._watch import READ
from condaccept.gates._farewell import Farewells

if TYPE_CHECKING:
    import asyncio

    from condaccept._pending import PendingTransport
    from condaccept._watch import Watch
    from condaccept.gates._connection import Connection

__all__ = ("ConnectedGate",)


class ConnectedGate:
    """Watches and refuses connections that have a socket already."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, watch: Watch, reject_timeout: float | None
    ) -> None:
        self._watch = watch
        self._farewells = Farewells(loop, watch, reject_timeout)

    @property
    def rejecting(self) -> int:
        """How many refused connections are still being told so."""
        return len(self._farewells)

    @property
    def cut_short(self) -> int:
        """How many refused connections could not be given the time to read why."""
        return self._farewells.cut_short

    def watch(self, arrival: Connection, n: int, pending: PendingTransport) -> None:
        """Tell *pending* when its peer leaves, or *n* bytes came."""
        if n or arrival.marked:
            arrival.mark(n)
        interest = READ if n else 0
        if arrival.pending is not None:
            self._watch.modify(arrival.fd, interest)
        elif n or self._watch.tells_hangup:
            try:
                # The arrival is its own callback: one object fewer for each that waits.
                self._watch.register(arrival.fd, interest, arrival)
            except OSError:
                # fs.epoll.max_user_watches, or no memory: noticed when offered again.
                return
            arrival.pending = pending

    def refuse(self, arrival: Connection, data: bytes) -> None:
        """Refuse a connection; with *data*, the caller is to read that first."""
        if arrival.pending is not None:
            self._unwatch(arrival)
        if data:
            self._farewells.say(arrival.farewell(), data)
        else:
            arrival.reset()

    def forget(self, arrival: Connection) -> None:
        """Drop a connection that found its end without a verdict."""
        if arrival.pending is not None:
            self._unwatch(arrival)
        arrival.reset()

    def _unwatch(self, arrival: Connection) -> None:
        # Before the descriptor is closed: its number may come back at once.
        arrival.pending = None
        self._watch.unregister(arrival.fd)
