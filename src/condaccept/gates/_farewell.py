"""Refusing with callee data, so that the caller really reads it.

Closing a socket with unread bytes in it resets the connection, and a reset overtakes what
was sent before: asyncio's StreamReader drops its whole buffer, BSD and Windows drop the
receive queue. So: send, half-close, read and discard until the caller has closed, and
only then close.

Source: RFC 1122, 4.2.2.13; RFC 9293, 3.10.4.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from condaccept._sockets import RawSocket, reset
from condaccept._watch import READ, WRITE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from condaccept._watch import Watch

__all__ = ("Farewells",)

AT_ONCE: Final = 64
"""Farewells in the background; each holds a descriptor."""
DISCARD: Final = 16 * 1024 * 1024
"""Bytes discarded for one caller before it is reset."""
CHUNK: Final = 65536
PER_TURN: Final = 16
"""Chunks discarded before the loop has its turn."""

_scratch = bytearray(CHUNK)


class Farewells:
    """Refused connections that are still being told so.

    Attributes:
        ended: Called when one of them is over and its descriptor closed.
        cut_short: How many were not given the time to read.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, watch: Watch, timeout: float | None
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._timeout = timeout
        # In the order of their deadlines, since the time allowed is the same for all.
        self._open: OrderedDict[_Farewell, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.ended: Callable[[], object] = lambda: None
        self.cut_short = 0

    def __len__(self) -> int:
        return len(self._open)

    def say(self, sock: RawSocket, data: bytes) -> None:
        """Send *data* and close, in the background where that takes time."""
        farewell = _Farewell(sock, data)
        if farewell.advance():
            return
        late = self._closed or len(self._open) >= AT_ONCE or self._timeout == 0
        if late or not self._register(farewell):
            # What can be done at once is done: the bytes are on their way, the end of the
            # stream is, and nothing the caller had sent so far turns it into a reset.
            self.cut_short += 1
            sock.close()
            return
        self._open[farewell] = 0.0 if self._timeout is None else self._loop.time() + self._timeout
        if self._timer is None and self._timeout is not None:
            self._timer = self._loop.call_later(self._timeout, self._time_over)

    def _register(self, farewell: _Farewell) -> bool:
        try:
            self._watch.register(
                farewell.sock.fileno(), farewell.interest, lambda _: self._go_on(farewell)
            )
        except OSError:
            # fs.epoll.max_user_watches, or no memory.
            return False
        return True

    def close(self) -> None:
        """End all of them; whoever has not read its data by now is reset.

        Later ones are cut short too.
        """
        self._closed = True
        for farewell in list(self._open):
            self._end(farewell)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on(self, farewell: _Farewell) -> None:
        if farewell not in self._open:
            return
        fd, interest = farewell.sock.fileno(), farewell.interest
        if farewell.ended():
            self._end(farewell)
        elif not farewell.dry:
            self._loop.call_soon(self._go_on, farewell)
        elif farewell.interest != interest or interest & WRITE:
            self._watch.modify(fd, farewell.interest)
        else:
            self._watch.dry(fd)

    def _end(self, farewell: _Farewell) -> None:
        del self._open[farewell]
        self._watch.unregister(farewell.sock.fileno())
        farewell.close()
        if not self._closed:
            self.ended()

    def _time_over(self) -> None:
        now = self._loop.time()
        self._timer = None
        while self._open:
            farewell, deadline = next(iter(self._open.items()))
            if deadline > now:
                self._timer = self._loop.call_at(deadline, self._time_over)
                return
            self.cut_short += 1
            self._end(farewell)


class _Farewell:
    """One caller that is being told."""

    __slots__ = ("_discarded", "_rest", "_said", "dry", "over", "sock")

    def __init__(self, sock: RawSocket, data: bytes) -> None:
        self.sock = sock
        self.dry = False
        self.over = False
        self._rest = memoryview(data)
        self._said = False
        self._discarded = 0

    @property
    def interest(self) -> int:
        return READ if self._said else READ | WRITE

    def advance(self) -> bool:
        """Do what can be done at once; if that was all, close and return True."""
        if self.ended():
            self.close()
            return True
        return False

    def ended(self) -> bool:
        """Send and discard what can be; True if the caller has closed, or is lost."""
        try:
            if not self._said:
                self._send()
            return self._discard()
        except OSError:
            # The caller is gone, and with it whoever could have read the data.
            return True

    def close(self) -> None:
        if self.over:
            self.sock.close()
        else:
            reset(self.sock)

    def _send(self) -> None:
        try:
            while self._rest:
                self._rest = self._rest[self.sock.send(self._rest, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return
        self.sock.shutdown(socket.SHUT_WR)
        self._said = True

    def _discard(self) -> bool:
        # MSG_TRUNC: TCP throws the bytes away without copying them.
        flags = socket.MSG_DONTWAIT | socket.MSG_TRUNC
        self.dry = False
        for _ in range(PER_TURN):
            try:
                n = self.sock.recv_into(_scratch, CHUNK, flags)
            except BlockingIOError:
                self.dry = True
                return False
            self._discarded += n
            self.over = n == 0 and self._said
            if n == 0:
                self.dry = True
                return self.over
            if self._discarded > DISCARD:
                return True
        return False
