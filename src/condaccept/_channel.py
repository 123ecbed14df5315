"""The engine of a stream: one connected socket, tried at once and waited for after EAGAIN.

Receiving and sending, the watch, events, and how all of that ends. What a stream's users
call is in `_stream`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import weakref
from typing import TYPE_CHECKING, Any, Final, cast

from condaccept._events import Event, Signals, Subscription
from condaccept._watch import HANGUP, READ, URGENT, WRITE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from condaccept._capacity import Place
    from condaccept._delivery import Delivery
    from condaccept._pending import Address
    from condaccept._sockets import OwnedSocket
    from condaccept._transports import Attachment
    from condaccept._watch import Watch

__all__ = ("Channel",)

LOW: Final = 16 * 1024
"""Unsent bytes down to which `drain()` waits: asyncio's own mark."""
CHUNK: Final = 64 * 1024
AT_ONCE: Final = 256 * 1024
"""The most bytes that one read returns; recv(2) is given a buffer of that size."""
IN_A_ROW: Final = 32
"""Operations that complete at once before one yields: without it a fast peer keeps a
reading task running while every timer of the loop waits."""

NOTHING: Final = cast("bytearray", b"")
"""In place of a bytearray that most streams never need. Nobody can add to it by mistake."""

EVENTS: Final = (Event.READ, Event.WRITE, Event.CLOSE, Event.OOB)
"""What a stream can tell of."""
_ERROR: Final = 0x008  # EPOLLERR


class Channel:
    """A connected socket, what is unsent and unread of it, and who waits for it.

    Attributes:
        caller_id: The caller's address, as accept(2) gave it.
        state: What the condition put into `PendingTransport.state`.
    """

    __slots__ = (
        "__weakref__",
        "_attachment",
        "_blocked",
        "_broken",
        "_buffer",
        "_closing",
        "_delivery",
        "_dry",
        "_end",
        "_ended",
        "_eof",
        "_fd",
        "_inbox",
        "_loop",
        "_paused",
        "_peer_error",
        "_place",
        "_plain",
        "_reader",
        "_reading",
        "_registered",
        "_signals",
        "_sock",
        "_streak",
        "_tcp",
        "_turned",
        "_unsent",
        "_waiters",
        "_watch",
        "_write_eof",
        "caller_id",
        "state",
    )

    def __init__(
        self,
        sock: OwnedSocket,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        delivery: Delivery,
        caller_id: Address,
        *,
        inherited: Sequence[Subscription] = (),
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._watch = watch
        self._delivery = delivery
        self.caller_id = caller_id
        self.state: Any = None
        self._buffer = NOTHING  # unsent
        self._inbox = NOTHING  # received in search of a separator, unread
        # Wait for the socket, in the watch:
        self._registered = False
        self._plain = False  # registered, and so far nothing but bytes came and went
        self._dry = False  # the last read took all there was
        self._end = False  # a hangup or an urgent byte was told: short reads prove nothing
        self._blocked = False  # a send met EAGAIN
        self._reader: asyncio.Future[None] | None = None
        self._waiters: list[asyncio.Future[None]] = []  # in drain() and wait_closed()
        # Where the stream stands:
        self._reading = False
        self._eof = False
        self._paused = False
        self._write_eof = False
        self._closing = False
        self._unsent = False  # something was when the connection failed
        self._broken: OSError | None = None
        self._peer_error: OSError | None = None  # SO_ERROR, once taken
        self._ended = False  # CLOSE was told, or would have been
        self._place: Place | None = None  # in the listener's capacity
        self._attachment: Attachment | None = None  # where the connection went
        self._streak = 0
        self._turned = False  # a call was cancelled in the turn it gave the loop
        self._signals: Signals | None = None
        if inherited:
            mine = [each for each in inherited if any(map(each.wants, EVENTS))]
            if mine:
                self._signals = Signals(mine)
                for each in mine:
                    if each.at_once:  # the others are copies, which nobody can cancel
                        each.keep(self)
                self._subscribe(self._signals)

    def __repr__(self) -> str:
        how = "closed" if self._sock.fileno() < 0 else "closing" if self._closing else "open"
        if self._attachment is not None:
            how = "handed over"
        return f"<{type(self).__name__} {how} caller={self.caller_id!r}>"

    # -- receiving

    async def _read(self, n: int) -> bytes:
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        return await self._read_on(n)

    async def _read_on(self, n: int) -> bytes:
        while True:
            if self._broken is not None or self._closing:
                raise await self._refusal()
            if n == 0:
                return b""
            if self._dry:
                await self._readable()
            elif (data := self._receive(n)) is not None:
                return data

    def _receive(self, n: int) -> bytes | None:
        """Read what is there; ``None``: nothing is, or it takes another look."""
        if self._eof:
            return b""
        n = min(n, AT_ONCE)
        if self._signals is not None and self._signals.subscribed(Event.OOB):
            self._set_urgent_aside(self._signals)
        try:
            data = self._sock.recv(n, socket.MSG_DONTWAIT)
        except OSError as error:
            self._receive_nothing(error)
            return None
        if not data:
            return self._receive_end()
        # A short read has taken all there was, unless it stopped for another reason: at an
        # urgent byte, or, on a Unix socket, at descriptors that were sent along. And a FIN
        # that came with the data gives no further edge.
        if self._registered and len(data) < n and not self._end and self._tcp:
            self._dry = True
            if not self._watch.tells_edges:
                self._watch.dry(self._sock.fileno())
        if self._signals is not None:
            self._signals.arm(Event.READ)
            self._look_again()
        return data

    def _receive_nothing(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):
            self._break(error)
        elif self._registered:
            self._dry = True
            self._watch.dry(self._sock.fileno())
        else:
            # No edge is told of what came before it, so once more.
            self._register_or_break()

    def _receive_end(self) -> bytes | None:
        if self._peer_error is not None:
            self._break(self._peer_error)
            return None
        self._eof = True
        self._plain = False
        if not self._inbox:
            self._tell_end()
        return b""

    async def _readable(self) -> None:
        self._reader = reader = self._loop.create_future()
        self._streak = 0
        self._watch.needed.add(self)
        if self._plain:
            self._watch.waiting[self._fd] = reader
        try:
            await reader
        finally:
            self._reader = None
            self._dry = False
            self._let_go()

    def _look_again(self) -> None:
        """Have the watch tell once more what there is, for those who subscribed."""
        if self._signals is not None and self._registered:
            self._watch.modify(self._sock.fileno(), self._interest())

    # -- events

    def _subscribe(self, signals: Signals) -> None:
        """Tell new subscribers what is so, and have them told of what comes."""
        if self._ended:
            self._fire(signals, Event.CLOSE, self._failure())
        else:
            self._watch.needed.add(self)
        if signals.wanted(Event.WRITE) and self._is_so(Event.WRITE):
            self._fire(signals, Event.WRITE)
        if self._inbox and not self._reading:
            self._fire(signals, Event.READ)
        if any(map(signals.wanted, (Event.READ, Event.CLOSE, Event.OOB))):
            if self._registered:
                self._look_again()
            else:
                self._register()

    def _is_so(self, event: Event) -> bool:
        """Whether what *event* tells still holds."""
        if event is Event.CLOSE:
            return self._ended
        if event is Event.WRITE:
            return not (self._buffer or self._write_eof or self._failure())
        if event is Event.OOB:
            return self._signals is not None and bool(self._signals.urgent)
        if self._reading:
            return False
        if self._inbox or self._eof:
            return bool(self._inbox)
        # The end of the stream counts, while nobody has read it.
        return self._peek() is not None

    def _signal(self, signals: Signals, events: int) -> None:
        """Tell what an edge of the watch means to the subscribers."""
        if events & URGENT and signals.subscribed(Event.OOB):
            self._set_urgent_aside(signals)
        # For a Unix socket the urgent byte alone is something to read, which no read returns.
        unread = not events & URGENT or self._is_so(Event.READ)
        if events & (READ | HANGUP) and unread and not self._reading and not self._eof:
            self._fire(signals, Event.READ)
        if events & _ERROR and self._peer_error is None:
            # Taking SO_ERROR clears it: a later read is told by what is kept here.
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            code = code or errno.ECONNRESET
            self._peer_error = OSError(code, os.strerror(code))
            self._tell_end()
        elif (events & HANGUP or not self._watch.tells_hangup) and signals.wanted(Event.CLOSE):
            self._look_for_end()

    def _look_for_end(self) -> None:
        if self._peek() == b"" and not self._inbox:
            self._tell_end()

    def _peek(self) -> bytes | None:
        """Return the first unread byte, ``b""`` at the end; ``None``: there is nothing."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._watch.dry(self._sock.fileno())
        except OSError as error:
            # The look has cleared it, as above.
            self._peer_error = error.with_traceback(None)
            self._tell_end()
        return None

    def _set_urgent_aside(self, signals: Signals) -> None:
        """Keep an urgent byte for who subscribed: the next read would pass over it.

        The kernel drops an urgent byte that a read has passed, and a task that reads is
        woken before any callback is called.
        """
        if self._watch.tells_hangup and (urgent := self._urgent()):
            signals.urgent = urgent
            self._fire(signals, Event.OOB)

    def _urgent(self) -> bytes:
        """Take the urgent byte from the kernel; ``b""``: there is none."""
        try:
            urgent = self._sock.recv(1, socket.MSG_OOB | socket.MSG_DONTWAIT)
        except OSError:
            # EINVAL: none; EAGAIN: announced, and not here yet; ENOTCONN: the peer has
            # reset, which a read will tell.
            return b""
        # A read still stops where it was.
        self._end = True
        self._plain = False
        return urgent

    def _failure(self) -> OSError | None:
        return self._broken or self._peer_error

    def _tell_end(self) -> None:
        self._ended = True
        if self._signals is not None:
            self._fire(self._signals, Event.CLOSE, self._failure())
            self._let_go()

    def _fire(self, signals: Signals, event: Event, error: OSError | None = None) -> None:
        for subscription in signals.fire(event):
            self._deliver(subscription, event, error)

    def _deliver(self, subscription: Subscription, event: Event, error: OSError | None) -> None:
        self._delivery.post(subscription, self, event, error)

    def _still_tells(self, event: Event) -> bool:
        # Of a stream that this side has closed by now, only that it ended is still true.
        return event is Event.CLOSE or not self._closing

    # -- the socket

    def _interest(self) -> int:
        return READ | WRITE if self._blocked else READ

    def _register(self) -> None:
        # Not a reference: a stream that everybody has forgotten has to end.
        mine = weakref.ref(self)

        def ready(events: int) -> None:
            stream = mine()
            if stream is not None:
                stream._ready(events)

        self._fd = self._sock.fileno()
        self._watch.register(self._fd, self._interest(), ready)
        self._registered = True
        self._tcp = self._sock.proto == socket.IPPROTO_TCP
        # One test in `read()` and `write()` in place of eight.
        self._plain = (
            self._watch.tells_edges
            and self._signals is None
            and self._broken is None
            and not (self._end or self._eof or self._write_eof or self._closing)
        )

    def _register_or_break(self) -> None:
        try:
            self._register()
        except OSError as error:
            # The watch of a closed listener may need a new descriptor, and none is free.
            # Without it nothing would be sent, nor anybody woken, any more.
            self._break(error)

    def _unregister(self) -> None:
        self._registered = self._plain = False
        self._watch.unregister(self._fd)

    def _ready(self, events: int) -> None:
        """Act on an edge of the watch: a hint, nothing is decided by it."""
        if events & (HANGUP | URGENT):
            self._end = True
            self._plain = False
        if events & (READ | HANGUP):
            self._dry = False
            self._wake_reader()
        if self._blocked and events & (WRITE | HANGUP):
            self._flush()
        # Closing by this side is no event, nor is what comes while that is under way.
        if self._signals is not None and self._registered and not self._closing:
            self._signal(self._signals, events)
            self._let_go()

    def _block(self) -> None:
        if self._blocked:
            return
        self._blocked = True
        self._watch.needed.add(self)
        if self._signals is not None:
            self._signals.arm(Event.WRITE)
        if self._registered:
            self._watch.modify(self._sock.fileno(), self._interest())
        else:
            self._register_or_break()

    def _flush(self) -> None:
        try:
            while self._buffer:
                sent = self._sock.send(self._buffer[:CHUNK], socket.MSG_DONTWAIT)
                del self._buffer[:sent]
        except BlockingIOError:
            self._watch.full(self._sock.fileno())
        except OSError as error:
            self._break(error)
            if self._closing:
                self._finish()
            return
        if self._paused and len(self._buffer) <= LOW:
            self._paused = False
            self._wake_waiters()
        if self._buffer:
            return
        self._blocked = False
        self._wake_waiters()
        self._let_go()
        if self._closing:
            self._finish()
            return
        self._watch.modify(self._sock.fileno(), self._interest())
        if self._write_eof:
            self._shut()
        elif self._signals is not None:
            self._fire(self._signals, Event.WRITE)

    def _shut(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            # ENOTCONN: the peer was faster, and a read will tell how.
            if error.errno != errno.ENOTCONN:
                self._break(error)

    def _break(self, error: OSError) -> None:
        """Note that the connection failed; every later call raises *error*."""
        # A reset that an event took from the socket leaves EPIPE for the next call. And the
        # traceback would keep the callers' frames, with this stream in them, for later.
        self._broken = (self._peer_error or error).with_traceback(None)
        self._plain = False
        self._unsent = bool(self._buffer)
        self._buffer = NOTHING
        self._blocked = False
        self._let_go()
        self._wake_reader()
        self._wake_waiters()
        if not self._closing:
            self._tell_end()

    def _finish(self) -> None:
        if self._sock.fileno() >= 0:
            if self._registered:
                self._unregister()
            try:
                self._sock.close()
            finally:
                # Also when a release raises SystemExit: somebody waits for the end.
                self._watch.needed.discard(self)
                if self._waiters:
                    self._wake_waiters()

    def _why_not(self) -> OSError:
        broken = self._broken
        if broken is not None:
            # A new one each time: tracebacks would pile up on a single one.
            fresh = OSError(broken.errno, broken.strerror)
            fresh.__cause__ = broken
            return fresh
        return self._gone()

    def _gone(self) -> ConnectionAbortedError:
        if self._attachment is not None:
            reason = "the stream was handed over to a transport of the loop"
            return ConnectionAbortedError(errno.ECONNABORTED, reason)
        return ConnectionAbortedError(errno.ECONNABORTED, "the stream was closed by this side")

    async def _refusal(self) -> OSError:
        await self._turn()
        return self._why_not()

    # -- waiting

    async def _turn(self) -> None:
        self._streak = 0
        if self._turned:
            self._turned = False
            return
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            # Its turn counts for the next call: under a timeout of nothing, none would
            # ever come to raise.
            self._turned = True
            raise

    async def _wait(self) -> None:
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        self._streak = 0
        self._watch.needed.add(self)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            self._let_go()

    def _let_go(self) -> None:
        """Be collected as garbage when nobody has this stream any more, if nothing is on."""
        if self._sock.fileno() < 0 or not (
            self._reader is not None
            or self._waiters
            or self._blocked
            # After the end there is nothing more to tell.
            or (self._signals is not None and not self._ended and self._signals.heard())
        ):
            self._watch.needed.discard(self)

    def _wake_reader(self) -> None:
        reader = self._reader
        # After the loop was closed there is nobody to wake.
        if reader is not None and not reader.done() and not self._loop.is_closed():
            reader.set_result(None)

    def _wake_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done() and not self._loop.is_closed():
                waiter.set_result(None)
