"""The default gate: connections whose handshake the kernel has finished.

The caller's ``connect()`` has succeeded before anybody here is asked. So a refusal is a
reset, or callee data and the end of the stream, and never a failed ``connect()``.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from condaccept._sockets import OwnedSocket, backlog, classify, raw_accept, reset
from condaccept._watch import READ
from condaccept.gates._connection import Connection
from condaccept.gates._farewell import Farewells

if TYPE_CHECKING:
    import asyncio

    from condaccept._pending import Address
    from condaccept._watch import Watch

__all__ = ("HandshakeGate",)


class _Lane:
    """One listening socket."""

    __slots__ = ("accept", "family", "fd", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.family = int(sock.family)
        self.accept: Callable[[], tuple[int, Address]] = raw_accept(sock)


class HandshakeGate:
    """Takes finished connections from listening sockets, which it owns."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        sockets: Sequence[socket.socket],
        *,
        reject_timeout: float | None = 5.0,
    ) -> None:
        self.sockets = tuple(sockets)
        self._watch = watch
        self._farewells = Farewells(loop, watch, reject_timeout)
        self._lanes = deque(_Lane(sock) for sock in sockets)
        # Asking is a fifth of the price of an accept(2) that says EAGAIN, and it tells
        # EMFILE with somebody waiting from EMFILE with nobody: Linux looks for a free
        # descriptor before it looks at the queue.
        self._poll = select.poll()
        for lane in self._lanes:
            lane.sock.setblocking(False)
            self._poll.register(lane.fd, select.POLLIN)

    @property
    def rejecting(self) -> int:
        return len(self._farewells)

    @property
    def cut_short(self) -> int:
        return self._farewells.cut_short

    def start(self, ready: Callable[[], object]) -> None:
        for lane in self._lanes:
            self._watch.register(lane.fd, READ, lambda _: ready())

    def waiting(self) -> bool:
        return self._ready_lane() is not None

    def backlog(self) -> tuple[int, int] | None:
        known = [each for each in map(backlog, self.sockets) if each is not None]
        if not known:
            return None
        return sum(depth for depth, _ in known), sum(limit for _, limit in known)

    def take(self, limit: int) -> list[Connection]:
        taken: list[Connection] = []
        while len(taken) < limit and (lane := self._ready_lane()) is not None:
            # Turn about: whoever was served goes to the end.
            self._lanes.rotate(-1)
            try:
                fd, caller_id = lane.accept()
            except BlockingIOError:
                # Another process that shares the socket was faster.
                break
            except OSError as error:
                if taken:
                    break
                raise classify(error) from error
            taken.append(Connection.of_descriptor(fd, lane.family, caller_id))
        return taken

    def watch(self, arrival: Connection, changed: Callable[[], object]) -> None:
        if self._watch.tells_hangup and not arrival.watched:
            arrival.watched = True
            self._watch.register(arrival.sock.fileno(), 0, lambda _: changed())

    def admit(self, arrival: Connection) -> OwnedSocket:
        self._unwatch(arrival)
        return arrival.own()

    def refuse(self, arrival: Connection, data: bytes) -> None:
        self._unwatch(arrival)
        if data:
            self._farewells.say(arrival.sock, data)
        else:
            reset(arrival.sock)

    def forget(self, arrival: Connection) -> None:
        self._unwatch(arrival)
        reset(arrival.sock)

    def close(self) -> None:
        self._farewells.close()
        for lane in self._lanes:
            self._watch.unregister(lane.fd)
            lane.sock.close()

    def _unwatch(self, arrival: Connection) -> None:
        # Before the descriptor is closed: its number may come back at once.
        if arrival.watched:
            arrival.watched = False
            self._watch.unregister(arrival.sock.fileno())

    def _ready_lane(self) -> _Lane | None:
        """Return the next listening socket that somebody waits on, by turns."""
        ready = self._poll.poll(0)
        if not ready:
            for lane in self._lanes:
                self._watch.dry(lane.fd)
            return None
        if len(self._lanes) > 1:
            descriptors = {fd for fd, _ in ready}
            while self._lanes[0].fd not in descriptors:
                self._lanes.rotate(-1)
        return self._lanes[0]
