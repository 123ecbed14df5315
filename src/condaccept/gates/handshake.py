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
    check_listening,
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
_REUSE: Final = (socket.SOL_SOCKET, socket.SO_REUSEADDR)
_INSTEAD: Final = "suspend() without refuse leaves callers in the kernel's queue"
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE})


class _Lane:
    """One listening socket."""

    __slots__ = ("accept", "fd", "kind", "limit", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.kind = Kind(int(sock.family))
        self.accept: Callable[[], tuple[int, Address]] = raw_accept(sock)
        self.limit = 0  # the backlog it had, while it refuses

    def refuse(self) -> None:
        """Have the kernel refuse connects, and nobody else get the port.

        Source: shutdown(2), socket(7) on SO_REUSEADDR.
        """
        known = backlog(self.sock)
        self.limit = 0 if known is None else known[1]
        # Only ever on a socket that listens: on another it fails with ENOTCONN, and yet
        # all connections of a later listen(2) could not be written to.
        self.sock.shutdown(socket.SHUT_RDWR)
        # Until here connections have inherited it, and they must: else the port could not
        # be listened on again while one of them lives.
        self.sock.setsockopt(*_REUSE, 0)

    def listen(self) -> None:
        """Listen again as before; shutdown(2) has left the other options alone."""
        self.sock.setsockopt(*_REUSE, 1)
        try:
            self.sock.listen(self.limit)
        except OSError as error:
            self.sock.setsockopt(*_REUSE, 0)
            reason = f"cannot listen again on {self.sock.getsockname()!r}: {error.strerror}"
            raise OSError(error.errno, reason) from error


class HandshakeGate(ConnectedGate):
    """Takes finished connections from listening sockets, which it owns.

    With *lingers*, each socket has been made to let connections inherit that closing them
    is a reset (see `inherit_reset()`), which saves a rejection a system call. Then nobody
    else may accept from the sockets; *lingers* is what an admitted connection gets instead.
    `share()` ends that, and so does a fork of the process.

    On the same sockets `refuse_new()` is possible until then: shutdown(2) acts on the
    socket and not on the descriptor, so it would shut out whoever else has it.
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
        self._own = lingers is not None
        self._shared = False
        self._refusing = False
        self._lanes = deque(_Lane(sock) for sock in sockets)
        self._first = self._lanes[0]
        self._only = self._first if len(self._lanes) == 1 else None
        # Asking is a fifth of the price of an accept(2) that says EAGAIN, and it tells
        # EMFILE with somebody waiting from EMFILE with nobody: Linux looks for a free
        # descriptor before it looks at the queue.
        self._poll = select.poll()
        self._ready: list[tuple[int, int]] = []  # what it said last, and may be old
        self.more = False
        for lane in self._lanes:
            lane.sock.setblocking(False)
            self._poll.register(lane.fd, select.POLLIN)
            if lingers is None and lane.kind.tcp:
                # Whoever had the socket before may have been one of us, and who was queued
                # in its time inherited that closing is a reset: a stream's end would be lost.
                lane.kind.linger = linger(lane.sock)
        if lingers is not None:
            for lane, asked in zip(self._lanes, lingers, strict=True):
                lane.kind.linger = asked
                lane.kind.resets = True
            _unshared.add(self)

    def share(self) -> None:
        """Let connections inherit nothing that another process would not expect."""
        self._shared = True
        self._inherit_plainly()

    def refuse_new(self) -> None:
        if self._refusing:
            return
        self.check_refusable()
        refused: list[_Lane] = []
        try:
            for lane in self._lanes:
                lane.refuse()
                refused.append(lane)
        except OSError as error:
            for lane in refused:
                _undo(lane.listen, error)
            raise
        for lane in self._lanes:
            # A socket that was shut down reports a hangup again and again.
            self._watch.unregister(lane.fd)
        self._refusing = True

    def listen_again(self) -> None:
        if not self._refusing:
            return
        opened: list[_Lane] = []
        try:
            for lane in self._lanes:
                lane.listen()
                opened.append(lane)
            for lane in self._lanes:
                self._register(lane)
        except OSError as error:
            for lane in opened:
                self._watch.unregister(lane.fd)
                _undo(lane.refuse, error)
            raise
        self._refusing = False

    def check_refusable(self) -> None:
        # It would hit others, or could not be undone.
        if self._refusing:
            return
        for sock in self.sockets:
            check_listening(sock)
        if any(not lane.kind.tcp for lane in self._lanes):
            reason = f"a Unix socket that was shut down cannot listen again: {_INSTEAD}"
        elif not self._own:
            reason = (
                "connects can be refused only on sockets that listen() made, and on Linux: "
                f"others may have these, and would be shut out too; {_INSTEAD}"
            )
        elif self._shared:
            reason = (
                "the listening sockets are shared (Listener.sockets was asked for, or the "
                "process has forked), and refusing would shut them for everybody who has "
                f"them: {_INSTEAD}"
            )
        elif self._of_any(socket.SO_REUSEPORT):
            reason = (
                "with reuse_port the others on the port would get everybody: close() this "
                f"listener and make another later, or {_INSTEAD}"
            )
        elif not self._of_all(socket.SO_REUSEADDR):
            reason = (
                "SO_REUSEADDR is off, so the port could not be listened on again while an "
                f"accepted connection lives: leave it on, or {_INSTEAD}"
            )
        else:
            return
        raise OSError(errno.EOPNOTSUPP, reason)

    def _of_any(self, option: int) -> bool:
        return any(sock.getsockopt(socket.SOL_SOCKET, option) for sock in self.sockets)

    def _of_all(self, option: int) -> bool:
        return all(sock.getsockopt(socket.SOL_SOCKET, option) for sock in self.sockets)

    def _inherit_plainly(self) -> None:
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
            self._inherit_plainly()
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

    def start(self, ready: Callable[[], object], told: Callable[[], object]) -> None:
        self._farewells.ended = told
        self._arrived = ready
        for lane in self._lanes:
            self._register(lane)

    def _register(self, lane: _Lane) -> None:
        self._watch.register(lane.fd, READ, lambda _: self._arrived())

    def waiting(self) -> bool:
        self._ready = []
        if self._refusing:
            return False
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

    def take(self) -> Connection | None:
        if self._refusing:
            return None
        poll = self._poll
        while ready := self._ready or poll.poll(0):
            lane = self._only or self._in_turn(ready)
            try:
                fd, caller_id = lane.accept()
            except BlockingIOError:
                # Another process that shares the socket was faster.
                self._ready = []
                continue
            except OSError as error:
                if error.errno in _EXHAUSTED and not self.waiting():
                    return None  # what was asked before is old: somebody else took the caller
                raise classify(error) from error
            # One question for two answers: whether the caller is still there, and, for
            # the next turn, who else waits. Descriptors come back in this order.
            poll.register(fd, _POLLRDHUP)
            ready = poll.poll(0)
            poll.unregister(fd)
            hangup = False
            if ready and ready[-1][0] == fd:
                ready.pop()
                hangup = True
            self._ready = ready
            if ready:
                self.more = True
            else:
                self.more = False
                self._dry()
            return Connection(fd, lane.kind, caller_id, hangup)
        self.more = False
        self._dry()
        return None

    def admit(self, arrival: Connection) -> OwnedSocket:
        if arrival.pending is not None:
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

    def _in_turn(self, ready: list[tuple[int, int]]) -> _Lane:
        """Return the next listening socket that somebody waits on, by turns."""
        lanes = self._lanes
        descriptors = {fd for fd, _ in ready}
        while lanes[0].fd not in descriptors:
            lanes.rotate(-1)
        # Turn about: whoever is served now goes to the end.
        lanes.rotate(-1)
        return lanes[-1]


def _undo(step: Callable[[], object], error: OSError) -> None:
    try:
        step()
    except OSError as another:
        error.add_note(f"And it could not be undone: {another}")


_unshared: weakref.WeakSet[HandshakeGate] = weakref.WeakSet()


def _before_fork() -> None:
    for gate in list(_unshared):
        gate.share()


os.register_at_fork(before=_before_fork)
