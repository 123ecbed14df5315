"""An accepted connection as a lean stream over its own non-blocking socket.

Reads and writes try the socket at once and wait only after EAGAIN, in the listener's
watch. Nothing is read before it is asked for, so backpressure is the kernel's, and a
connection that never has to wait never meets a selector.
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from condaccept._channel import AT_ONCE, CHUNK, EVENTS, IN_A_ROW, NOTHING, Channel
from condaccept._events import Event, EventCallback, Signals, Subscription
from condaccept._pending import PEEK_LIMIT
from condaccept._sockets import reset
from condaccept._transports import (
    READER_LIMIT,
    Attachment,
    attach,
    check_tls,
    checked,
    streams_protocol,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from ssl import SSLContext
    from types import TracebackType

    from condaccept._pending import Address
    from condaccept._transports import TlsOptions

__all__ = ("Stream",)

P = TypeVar("P", bound=asyncio.BaseProtocol)
R = TypeVar("R")

HIGH: Final = 64 * 1024
"""Unsent bytes above which `drain()` waits: asyncio's own mark."""
LINE: Final = 64 * 1024
"""Bytes before a separator: asyncio's own limit."""


def checked_limit(limit: int | None) -> int:
    """Return how many bytes may come before a separator; ``None``: as many as there can be."""
    if limit is None:
        return sys.maxsize
    if limit < 0:
        message = f"limit is a number of bytes or None, got {limit!r}"
        raise ValueError(message)
    return limit


class Stream(Channel):
    """A connection that a condition accepted.

    Bytes in, bytes out, with the names of asyncio's streams. Not for several tasks in
    `read()` at once.

    Attributes:
        caller_id: The caller's address, as accept(2) gave it.
        state: What the condition put into `PendingTransport.state`.
    """

    __slots__ = ()

    # -- reading

    async def read(self, n: int = -1) -> bytes:
        """Return up to *n* bytes as soon as there are any; ``b""`` at the end of the stream.

        At most 256 KiB at once. With a negative *n*, everything up to the end of the stream.

        Raises:
            RuntimeError: Another task is reading this stream.
            ConnectionAbortedError: The stream was closed by this side.
            OSError: The connection failed; ConnectionResetError if the peer reset it.

        Cancellation:
            Safe: what has come stays to be read.
        """
        if n <= 0 or self._inbox:
            return await self._exclusively(self._gather(n))
        if self._reading:
            raise await self._two_readers()
        self._reading = True
        n = n if n < AT_ONCE else AT_ONCE  # noqa: FURB136 - a call of min() costs 1 % of an echo
        try:
            if self._streak >= IN_A_ROW:
                await self._turn()
            self._streak += 1
            # `_read_on()`, `_readable()` and `_receive()` written out for a plain stream. The
            # calls that an arrival is spared, two of them into coroutines, are 7 % of what an
            # echo of 64 bytes costs the server.
            while self._plain:
                if self._dry:
                    self._reader = reader = self._loop.create_future()
                    self._streak = 0
                    self._watch.waiting[self._fd] = reader
                    self._watch.needed.add(self)
                    try:
                        await reader
                    finally:
                        self._reader = None
                        self._dry = False
                        if self._plain and not self._waiters and not self._blocked:
                            self._watch.needed.discard(self)
                        else:
                            self._let_go()
                    continue
                try:
                    data = self._sock.recv(n, socket.MSG_DONTWAIT)
                except OSError as error:
                    self._receive_nothing(error)
                    continue
                if data:
                    self._dry = self._tcp and len(data) < n
                    return data
                self._receive_end()
            return await self._read_on(n)
        except BaseException:
            self._gave_up()
            raise
        finally:
            self._reading = False

    async def readexactly(self, n: int) -> bytes:
        """Return exactly *n* bytes.

        Raises:
            asyncio.IncompleteReadError: The stream ended before; `partial` has what there
                was, which is read now.
            ValueError: *n* is negative.
            RuntimeError, OSError: As `read()`.

        Cancellation:
            Safe: what has come stays to be read.
        """
        if n < 0:
            message = f"the number of bytes to read cannot be negative, got {n}"
            raise ValueError(message)
        return await self._exclusively(self._exactly(n))

    async def readuntil(self, separator: bytes = b"\n", *, limit: int | None = LINE) -> bytes:
        """Return everything up to and including *separator*.

        Args:
            separator: Bytes, at least one.
            limit: How many bytes may come before the separator; ``None``: any number.

        Raises:
            asyncio.IncompleteReadError: The stream ended before; `partial` has what there
                was, which is read now.
            asyncio.LimitOverrunError: More than *limit* bytes come before the separator;
                they stay to be read, and `consumed` says how many of them cannot be part
                of a separator.
            ValueError: *separator* is empty, or *limit* negative.
            RuntimeError, OSError: As `read()`.

        Cancellation:
            Safe: what has come stays to be read.
        """
        if not isinstance(separator, (bytes, bytearray, memoryview)):
            message = f"the separator is bytes, got {separator!r}"
            raise TypeError(message)
        if not separator:
            message = "the separator is at least one byte"
            raise ValueError(message)
        return await self._exclusively(self._until(bytes(separator), checked_limit(limit)))

    async def readline(self, *, limit: int | None = LINE) -> bytes:
        """Return a line with its newline; what is left at the end of the stream, or ``b""``.

        Raises:
            ValueError: The line is longer than *limit*. As with asyncio's streams, what
                was looked at is dropped, with the newline if that was found. Or *limit* is
                negative; ``None`` is no limit.
            RuntimeError, OSError: As `read()`.

        Cancellation:
            Safe: what has come stays to be read.
        """
        return await self._exclusively(self._line(checked_limit(limit)))

    def read_oob(self) -> bytes:
        """Return the urgent byte that has come, or ``b""`` if none is unread; never waits.

        There is one at most: another that comes before it was read takes its place. The
        kernel drops it when a read passes its place in the stream, unless somebody is
        subscribed to `Event.OOB` and epoll tells of it; then it is kept until this call.
        With SO_OOBINLINE it is a byte of the stream, which `read()` returns, and never
        found here.

        Raises:
            ConnectionAbortedError: The stream was closed by this side.
            OSError: The connection failed.

        Source: tcp(7), "Sockets API"; unix(7), "Sockets API".
        """
        if self._broken is not None or self._closing:
            raise self._why_not()
        urgent = self._urgent()
        if self._signals is not None:
            urgent = urgent or self._signals.urgent
            self._signals.urgent = b""
            self._signals.arm(Event.OOB)
        return urgent

    def __aiter__(self) -> Self:
        """Iterate over the lines up to the end of the stream, as `readline()` gives them."""
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def _exclusively(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        if self._reading:
            reading.close()
            raise await self._two_readers()
        self._reading = True
        try:
            return await reading
        except BaseException:
            self._gave_up()
            raise
        finally:
            self._reading = False

    def _gave_up(self) -> None:
        """Tell the subscribers of what woke, or was received by, a call that is no more."""
        if self._registered:
            self._watch.waiting.pop(self._fd, None)
        if self._inbox and self._signals is not None:
            self._fire(self._signals, Event.READ)
        else:
            self._look_again()

    async def _two_readers(self) -> RuntimeError:
        await self._turn()
        return RuntimeError("another task is reading this stream already")

    async def _gather(self, n: int) -> bytes:
        """Read what `read()` does not take from the socket in one go."""
        if n >= 0:
            return await (self._from_inbox(min(n, AT_ONCE)) if self._inbox else self._read(n))
        while await self._fill():
            pass
        return self._take(len(self._inbox))

    async def _exactly(self, n: int) -> bytes:
        while len(self._inbox) < n:
            if not await self._fill():
                await self._turn()
                raise asyncio.IncompleteReadError(self._take(len(self._inbox)), n)
        return await self._from_inbox(n)

    async def _until(self, separator: bytes, limit: int) -> bytes:
        if self._closing or self._broken is not None:
            raise await self._refusal()
        searched = 0  # no separator begins before
        while (found := self._inbox.find(separator, searched)) < 0:
            searched = max(0, len(self._inbox) + 1 - len(separator))
            if searched > limit:
                await self._turn()
                message = f"no separator within {limit} bytes"
                raise asyncio.LimitOverrunError(message, searched)
            if not await self._fill():
                await self._turn()
                raise asyncio.IncompleteReadError(self._take(len(self._inbox)), None)
        if found > limit:
            await self._turn()
            message = f"the separator comes later than after {limit} bytes"
            raise asyncio.LimitOverrunError(message, found)
        return await self._from_inbox(found + len(separator))

    async def _line(self, limit: int) -> bytes:
        try:
            return await self._until(b"\n", limit)
        except asyncio.IncompleteReadError as error:
            return error.partial
        except asyncio.LimitOverrunError as error:
            newline = self._inbox.startswith(b"\n", error.consumed)
            self._take(error.consumed + 1 if newline else len(self._inbox))
            raise ValueError(error.args[0]) from error

    async def _fill(self) -> bool:
        """Receive more; False at the end of the stream. Cancelled, it has lost nothing."""
        data = await self._read(CHUNK)
        if self._inbox:
            self._inbox += data
        else:
            self._inbox = bytearray(data)
        return bool(data)

    async def _from_inbox(self, n: int) -> bytes:
        """Take bytes that have been received before."""
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        if self._closing or self._broken is not None:
            raise await self._refusal()
        return self._take(n)

    def _take(self, n: int) -> bytes:
        taken = bytes(self._inbox[:n])
        if taken:
            del self._inbox[:n]
        if self._eof and not self._inbox and not self._ended:
            self._tell_end()
        elif self._signals is not None:
            self._signals.arm(Event.READ)
            if self._inbox:
                self._fire(self._signals, Event.READ)
            else:
                self._look_again()
        return taken

    async def peek(self, n: int) -> bytes:
        """Return the next *n* bytes and leave them unread; fewer only at the end of the stream.

        What was not read yet stays with the kernel, so that TLS can still begin with it.

        Args:
            n: From 0 to 16384, which is a TLS record. Fewer are returned in front of an
                urgent byte, too, and when a receive buffer made small is full of them.

        Raises:
            ValueError: *n* is out of these bounds, or more than the receive buffer of the
                socket holds.
            RuntimeError, OSError: As `read()`.

        Cancellation:
            Safe.

        Source: recv(2), MSG_PEEK; socket(7), SO_RCVLOWAT.
        """
        if not 0 <= n <= PEEK_LIMIT:
            message = f"between 0 and {PEEK_LIMIT} bytes can be peeked, got {n}"
            raise ValueError(message)
        return await self._exclusively(self._ahead(n))

    async def _ahead(self, n: int) -> bytes:
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        marked = False
        try:
            while True:
                if self._broken is not None or self._closing:
                    raise await self._refusal()
                data = self._look_ahead(n)
                if data is None and self._broken is None:
                    marked = True
                    await self._mark(n - len(self._inbox))
                    if self._no_more():
                        data = self._look_ahead(n, last=True)
                if data is not None:
                    # The watch may have told of it, and nobody but this call.
                    self._look_again()
                    return data
                if self._broken is None:
                    await self._until_marked()
        finally:
            if marked:
                self._unmark()

    def _look_ahead(self, n: int, *, last: bool = False) -> bytes | None:
        """Return *n* bytes; ``None``: there are fewer, and not the *last*, or it failed."""
        data = bytes(self._inbox[:n])
        missing = n - len(data)
        if self._eof or not missing:
            return data
        try:
            more = self._sock.recv(missing, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            self._break(error)
            return None
        if not more and self._peer_error is not None:
            self._break(self._peer_error)
            return None
        return data + more if last or not 0 < len(more) < missing else None

    async def _mark(self, n: int) -> None:
        """Have the kernel tell of *n* bytes only, or of the end.

        Without it a caller who sends byte by byte would wake a peek for each. A Unix socket
        takes the mark and does not keep to it.
        """
        if self._sock.proto == socket.IPPROTO_TCP:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)
            if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) < n:
                await self._turn()
                message = f"the receive buffer of this socket does not hold {n} bytes"
                raise ValueError(message)

    def _unmark(self) -> None:
        # What has come below the mark is told of by this.
        if self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _no_more(self) -> bool:
        """Whether fewer bytes than the mark are all that there will be.

        If so, a TCP socket is readable in spite of it: at the end of the stream, with a full
        receive buffer, or when enough has come but an urgent byte stands in front of it.
        """
        tcp = self._sock.proto == socket.IPPROTO_TCP
        poll = select.poll()
        poll.register(self._sock, select.POLLIN if tcp else getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    async def _until_marked(self) -> None:
        if not self._registered:
            self._register()
        self._watch.dry(self._sock.fileno())
        await self._readable()

    # -- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*: at once what the kernel takes, the rest as it makes room.

        Never waits; `drain()` does when too much is unsent.

        Raises:
            RuntimeError: After `write_eof()`.
            ConnectionAbortedError: The stream was closed by this side.
            OSError: The connection failed, now or when earlier data was sent.
        """
        if not isinstance(data, (bytes, bytearray)):
            if not isinstance(data, memoryview):
                message = f"write() takes bytes, a bytearray or a memoryview, got {data!r:.50}"
                raise TypeError(message)
            data = data.cast("B")
        if not self._plain:
            self._check_writable()
        sent = 0
        if not self._buffer:
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                self._break(error)
                raise self._why_not() from self._broken
        if sent < len(data):
            if self._buffer:
                self._buffer += data
            else:
                self._buffer = bytearray(memoryview(data)[sent:])
            self._paused = self._paused or len(self._buffer) > HIGH
            self._block()
            if self._broken is not None:
                raise self._why_not()

    def _check_writable(self) -> None:
        if self._broken is not None or self._closing:
            raise self._why_not()
        if self._write_eof:
            message = "write() was called after write_eof()"
            raise RuntimeError(message)

    async def drain(self) -> None:
        """Wait until little enough is unsent: from above 64 KiB down to 16 KiB.

        Raises:
            ConnectionAbortedError: The stream was closed by this side.
            OSError: The connection failed.

        Cancellation:
            Safe: what was written is sent all the same.
        """
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        if self._closing:
            raise await self._refusal()
        while self._paused and self._broken is None and self._sock.fileno() >= 0:
            await self._wait()
        # Still paused: the rest was dropped by abort().
        if self._broken is not None or self._paused:
            raise await self._refusal()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Write *data* and drain.

        Cancellation:
            Safe: *data* is sent once and whole.
        """
        try:
            self.write(data)
        except (OSError, RuntimeError):
            await self._turn()
            raise
        # `drain()`, without the coroutine where there is nothing to wait for.
        if self._buffer or self._streak >= IN_A_ROW:
            await self.drain()
        else:
            self._streak += 1

    def write_eof(self) -> None:
        """Half-close: the peer reads the end of the stream behind what was written.

        Reading goes on. A second call does nothing.

        Raises:
            ConnectionAbortedError: The stream was closed by this side.
            OSError: The connection failed.
        """
        if self._broken is not None or self._closing:
            raise self._why_not()
        if not self._write_eof:
            self._write_eof = True
            self._plain = False
            if not self._buffer:
                self._shut()

    # -- handing over

    async def into_transport(
        self,
        protocol_factory: Callable[[], P],
        ssl: SSLContext | None = None,
        *,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.Transport, P]:
        """Hand the connection over to a transport of the loop; return that and its protocol.

        What was written is sent first. What was received and not read yet goes to the
        protocol right behind its ``connection_made()``, even if that pauses reading, unless
        it closes. What was held for the connection is released when the transport has closed
        it. This stream counts as closed from now on, and neither its `close()` nor its
        `abort()` reaches the transport; `Listener.abort()` does.

        Args:
            protocol_factory: Makes the protocol, plain or buffered; called once, when
                nothing is unsent.
            ssl: Begin with the server's side of TLS. Bytes that were received by this
                stream are too late for that: use `peek()` to look at them before.
            ssl_handshake_timeout: Seconds; ``None`` is the loop's own.
            ssl_shutdown_timeout: Seconds; ``None`` is the loop's own.

        Returns:
            ``(transport, protocol)``.

        Raises:
            RuntimeError: Another task is reading this stream; or `write_eof()` was called;
                or *ssl* is given and bytes were received. The stream is as it was.
            ConnectionAbortedError: The stream was closed by this side, or handed over; or
                the connection was ended meanwhile with the listener or the group.
            OSError: The connection failed.
            ssl.SSLError, ConnectionError, TimeoutError: The TLS handshake failed; the
                connection is closed.
            TypeError, ValueError: An argument is not what it should be.
            Exception: Whatever *protocol_factory* raised, or TypeError if what it returned
                is no protocol; the stream is as it was. Or
                whatever ``connection_made()`` raised; the connection is closed.

        Cancellation:
            As long as earlier data is being sent the stream stays as it was; after that
            the connection is closed.

        Source: `loop.connect_accepted_socket()`.
        """
        tls = check_tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        protocol, data = await self._prepared(lambda: checked(protocol_factory()), tls)
        return await self._attach(protocol, data, tls), protocol

    async def into_streams(
        self,
        ssl: SSLContext | None = None,
        *,
        limit: int = READER_LIMIT,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Hand the connection over to asyncio's streams; return ``(reader, writer)``.

        The reader begins with what was received and not read yet; *limit* is its limit in
        bytes. The rest is as with `into_transport()`.
        """
        tls = check_tls(ssl, ssl_handshake_timeout, ssl_shutdown_timeout)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            message = f"limit is a number of bytes, at least 1, got {limit!r}"
            raise ValueError(message)
        made: list[asyncio.StreamWriter] = []
        (reader, protocol), data = await self._prepared(lambda: streams_protocol(limit, made), tls)
        await self._attach(protocol, data, tls)
        return reader, made[0]

    async def _prepared(self, factory: Callable[[], R], tls: TlsOptions) -> tuple[R, bytes]:
        """Make ready for another owner; return what *factory* made and what was not read."""
        if asyncio.get_running_loop() is not self._loop:
            message = "the stream belongs to another event loop, which alone can have it"
            raise RuntimeError(message)
        if self._reading:
            raise await self._two_readers()
        self._reading = True
        try:
            if tls["ssl"] is not None and self._inbox:
                await self._turn()
                message = f"{len(self._inbox)} bytes were received before TLS: peek() at them"
                raise RuntimeError(message)
            await self._all_sent()
            try:
                made = factory()
            except Exception:
                await self._turn()
                raise
            # It may have written, or closed.
            await self._all_sent()
        except BaseException:
            self._gave_up()
            raise
        finally:
            self._reading = False
        return made, bytes(self._inbox)

    async def _all_sent(self) -> None:
        """Wait until nothing is unsent; raise if the stream cannot be handed over."""
        while self._buffer and not self._closing and not self._write_eof:
            await self._wait()
        if self._peer_error is not None and self._broken is None:
            self._break(self._peer_error)
        if self._closing or self._broken is not None:
            raise await self._refusal()
        if self._write_eof:
            await self._turn()
            message = "a half-closed stream cannot be handed over: write_eof() was called"
            raise RuntimeError(message)

    async def _attach(
        self, protocol: asyncio.BaseProtocol, data: bytes, tls: TlsOptions
    ) -> asyncio.Transport:
        """Let go of the socket and have a transport take it."""
        if self._registered:
            self._unregister()
        self._closing = True
        self._plain = False
        self._attachment = Attachment(self._sock.hand_over(self.caller_id, self, self._loop))
        self._watch.needed.discard(self)
        self._wake_waiters()
        return await attach(self._attachment, protocol, data, tls)

    # -- ending

    def close(self) -> None:
        """Close: what is unsent goes out in the background, then the end of the stream.

        A second call does nothing; nor does one on a stream that was handed over. If
        something has come that nobody read, the kernel resets the peer, which may lose what
        was still on its way there: read up to the end of the stream first where that
        matters.
        """
        if self._closing:
            return
        self._closing = True
        self._plain = False
        if self._reader is not None:
            self._wake_reader()
        if not self._buffer or self._broken is not None:
            self._finish()

    async def wait_closed(self) -> None:
        """Wait until the descriptor is closed, or handed over.

        Raises:
            OSError: Not all that was written could be sent.
        """
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        while self._sock.fileno() >= 0:
            await self._wait()
        if self._unsent:
            await self._turn()
            raise self._why_not()

    def abort(self) -> None:
        """Reset the connection; what is unsent is dropped.

        Does nothing to a connection that was handed over.
        """
        self._closing = True
        self._plain = False
        self._wake_reader()
        self._buffer = NOTHING
        if self._sock.fileno() >= 0:
            if self._registered:
                self._unregister()
            reset(self._sock)
            self._watch.needed.discard(self)
            self._wake_waiters()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close and wait until that is done; after an exception, abort."""
        if exc_type is None:
            self.close()
            await self.wait_closed()
        else:
            self.abort()

    def is_closing(self) -> bool:
        """Whether `close()` or `abort()` was called, or the connection handed over."""
        return self._closing

    # -- besides

    def started(self) -> None:
        """Say that the beginning is over: the stream counts no more as starting.

        For the listener's ``max_starting``, which limits those that have not logged in yet,
        say. A second call does nothing, and without that limit none does.
        """
        if self._place is not None:
            self._place.started()

    @property
    def callee_id(self) -> Address:
        """The local address of this connection.

        Raises:
            ConnectionAbortedError: The stream is closed by now, or was handed over.
        """
        if self._sock.fileno() < 0:
            raise self._gone()
        return self._sock.getsockname()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncio's transports do under *name*: peername, sockname, socket."""
        if name == "peername":
            return self.caller_id
        if name == "socket":
            return TransportSocket(self._sock)  # type: ignore[arg-type]
        if name == "sockname" and self._sock.fileno() >= 0:
            return self._sock.getsockname()
        return default

    def on(self, events: Event, callback: EventCallback) -> Subscription:
        """Have ``callback(stream, event, error)`` called for *events*, one event a call.

        It is called from the loop, never inside the call that caused the event; of what
        is so already, it is told soon. *error* is ``None`` but for a CLOSE after a
        failure. What it returns is awaited if it can be, in a task: during one for the
        same subscription and event, a further event is kept, once, until that has ended.
        A callback that raises is reported to the loop's exception handler, and called for
        later events all the same. It runs in a copy of the context of this call.

        An event says how things stood: somebody may have acted on it since. READ is told
        again after a read, WRITE after a send that the kernel had no room for, OOB after
        `read_oob()`, CLOSE never. Closing by this side is no event, and of a stream that
        this side has closed only the CLOSE of before is told. OOB is told where there is
        epoll, not elsewhere.

        Returns:
            A handle; its ``cancel()`` ends the subscription.

        Raises:
            TypeError: *events* is none, or *callback* cannot be called.
            OSError: The listener is closed and no descriptor is free for an epoll set, or
                the kernel's room for watches is used up; nothing has changed.
        """
        if self._signals is None:
            self._signals = Signals()
            self._plain = False
        signals = self._signals
        told = [each for each in EVENTS if not signals.armed(each)]
        subscription = signals.add(events, callback)
        if self._closing:
            if self._ended and subscription.wants(Event.CLOSE):
                self._deliver(subscription, Event.CLOSE, self._failure())
            return subscription
        subscription.keep(self)
        try:
            self._subscribe(signals)
        except OSError:
            subscription.cancel()
            raise
        for event in told:
            # Told to the others before; to this one if it is still so.
            if subscription.wants(event) and self._is_so(event):
                error = self._failure() if event is Event.CLOSE else None
                self._deliver(subscription, event, error)
        return subscription
