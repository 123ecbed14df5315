"""The default gate: connections whose handshake the kernel has finished.

The caller's ``connect()`` has succeeded before anybody here is asked. So a refusal is a
reset, or callee data and the end of the stream, and never a failed ``connect()``.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from condaccept._sockets import (
    apply_options,
    backlog,
    classify,
    linger,
    raw_accept,
    set_linger,
)
from condaccept._watch import READ
from condaccept.gates._connected import ConnectedGate
from condaccept.gates._connection import Connection, Kind

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from condaccept._pending import Address
    from condaccept._sockets import Option, OwnedSocket
    from condaccept._watch import Watch

__all__ = ("HandshakeGate",)


_POLLRDHUP: Final[int] = getattr(select, "POLLRDHUP", 0)
_SO_LINGER: Final = (socket.SOL_SOCKET, socket.SO_LINGER)
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE})


class _Lane:
    """One listening socket."""

    __slots__ = ("accept", "fd", "kind", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.kind = Kind(int(sock.family))
        self.accept: Callable[[], tuple[int, Address]] = raw_accept(sock)


class HandshakeGate(ConnectedGate):
    """Takes finished connections from listening sockets, which it owns.

    With *lingers*, each socket has been made to let connections inherit that closing them
    is a reset (see `inherit_reset()`), which saves a rejection a system call. Then nobody
    else may accept from the sockets; *lingers* is what an admitted connection gets instead.
    `share()` ends that, and so does a fork of the process.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        sockets: Sequence[socket.socket],
        *,
        reject_timeout: float | None = 5.0,
        lingers: Sequence[bytes] | None = None,
    ) -> None:
        super().__init__(loop, watch, reject_timeout)
        self.sockets = tuple(sockets)
        self._lanes = deque(_Lane(sock) for sock in sockets)
        self._first = self._lanes[0]
        # Asking is a fifth of the price of an accept(2) that says EAGAIN, and it tells
        # EMFILE with somebody waiting from EMFILE with nobody: Linux looks for a free
        # descriptor before it looks at the queue.
        self._poll = select.poll()
        self._ready: list[tuple[int, int]] = []  # what it said last, and may be old
        for lane in self._lanes:
            lane.sock.setblocking(False)
            self._poll.register(lane.fd, select.POLLIN)
        if lingers is not None:
            for lane, asked in zip(self._lanes, lingers, strict=True):
                lane.kind.linger = asked
                lane.kind.resets = True
            _unshared.add(self)

    def share(self) -> None:
        """Let connections inherit nothing that another process would not expect."""
        for lane in self._lanes:
            if lane.kind.resets and lane.kind.linger is not None:
                # Those the kernel has queued keep what they have: `linger` stays.
                lane.kind.resets = False
                try:
                    set_linger(lane.sock, lane.kind.linger)
                except OSError:
                    # Closed behind our back: nobody can inherit it.
                    continue

    def setsockopt(self, option: Option) -> None:
        if option[:2] == _SO_LINGER:
            # Connections inherit what the sockets have: from now on that is this.
            self.share()
        for lane in self._lanes:
            apply_options(lane.sock, [option])
            if lane.kind.linger is not None and option[:2] == _SO_LINGER:
                lane.kind.linger = linger(lane.sock)

    def getsockopt(self, level: int, name: int, buflen: int) -> int | bytes:
        lane = self._first
        asked = lane.kind.linger
        if asked is not None and (level, name) == _SO_LINGER:
            return asked[:buflen] if buflen else int.from_bytes(asked[:4], sys.byteorder)
        if buflen:
            return lane.sock.getsockopt(level, name, buflen)
        return lane.sock.getsockopt(level, name)

    def start(self, ready: Callable[[], object]) -> None:
        for lane in self._lanes:
            self._watch.register(lane.fd, READ, lambda _: ready())

    def waiting(self) -> bool:
        self._ready = []
        if self._poll.poll(0):
            return True
        self._dry()
        return False

    def backlog(self) -> tuple[int, int] | None:
        try:
            known = [each for each in map(backlog, self.sockets) if each is not None]
        except OSError:
            # A descriptor was closed behind our back; the next accept call says so.
            return None
        if not known:
            return None
        return sum(depth for depth, _ in known), sum(limit for _, limit in known)

    def take(self, limit: int) -> list[Connection]:
        taken: list[Connection] = []
        while len(taken) < limit and (lane := self._ready_lane()) is not None:
            try:
                fd, caller_id = lane.accept()
            except BlockingIOError:
                # Another process that shares the socket was faster.
                self._ready = []
                continue
            except OSError as error:
                if error.errno in _EXHAUSTED and not self.waiting():
                    break  # what was asked before is old: somebody else took the caller
                if taken:
                    break
                raise classify(error) from error
            # One question for two answers: whether the caller is still there, and, for
            # the next turn, who else waits. Descriptors come back in this order.
            self._poll.register(fd, _POLLRDHUP)
            ready = self._poll.poll(0)
            self._poll.unregister(fd)
            hangup = bool(ready) and ready[-1][0] == fd
            if hangup:
                ready.pop()
            self._ready = ready
            if not ready:
                self._dry()
            taken.append(Connection(fd, lane.kind, caller_id, hangup=hangup))
        return taken

    def admit(self, arrival: Connection) -> OwnedSocket:
        if arrival.watched:
            self._unwatch(arrival)
        return arrival.own()

    def stop(self) -> None:
        _unshared.discard(self)
        for lane in self._lanes:
            self._watch.unregister(lane.fd)
            try:
                lane.sock.close()
            except OSError:
                # Closed behind our back: the others still have to be.
                continue

    def close(self) -> None:
        self.stop()
        self._farewells.close()

    def _dry(self) -> None:
        for lane in self._lanes:
            self._watch.dry(lane.fd)

    def _ready_lane(self) -> _Lane | None:
        """Return the next listening socket that somebody waits on, by turns."""
        ready = self._ready or self._poll.poll(0)
        if not ready:
            self._dry()
            return None
        self._ready = ready
        lanes = self._lanes
        if len(lanes) == 1:
            return lanes[0]
        descriptors = {fd for fd, _ in ready}
        while lanes[0].fd not in descriptors:
            lanes.rotate(-1)
        # Turn about: whoever is served now goes to the end.
        lanes.rotate(-1)
        return lanes[-1]


_unshared: weakref.WeakSet[HandshakeGate] = weakref.WeakSet()


def _before_fork() -> None:
    for gate in list(_unshared):
        gate.share()


os.register_at_fork(before=_before_fork)
