"""An accepted connection as a lean stream over its own non-blocking socket.

Reads and writes try the socket at once and wait only after EAGAIN, in the listener's
watch. Nothing is read before it is asked for, so backpressure is the kernel's, and a
connection that never has to wait never meets a selector.
"""

from __future__ import annotations

import asyncio
import socket
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, Final, Self

from condaccept._channel import AT_ONCE, CHUNK, EVENTS, IN_A_ROW, Channel, check_callback
from condaccept._events import Event, EventCallback, Signals, Subscription
from condaccept._sockets import reset

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from condaccept._pending import Address

__all__ = ("Stream",)

HIGH: Final = 64 * 1024
"""Unsent bytes above which `drain()` waits: asyncio's own mark."""
LINE: Final = 64 * 1024
"""Bytes before a separator: asyncio's own limit."""


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
        if self._reading:
            raise await self._two_readers()
        self._reading = True
        try:
            if n < 0:
                while await self._fill():
                    pass
                return self._take(len(self._inbox))
            if self._inbox:
                return await self._from_inbox(min(n, AT_ONCE))
            return await self._read(n)
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

    async def readuntil(self, separator: bytes = b"\n", *, limit: int = LINE) -> bytes:
        """Return everything up to and including *separator*.

        Args:
            separator: Bytes, at least one.
            limit: How many bytes may come before the separator.

        Raises:
            asyncio.IncompleteReadError: The stream ended before; `partial` has what there
                was, which is read now.
            asyncio.LimitOverrunError: More than *limit* bytes come before the separator;
                they stay to be read, and `consumed` says how many of them cannot be part
                of a separator.
            ValueError: *separator* is empty.
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
        return await self._exclusively(self._until(bytes(separator), limit))

    async def readline(self, *, limit: int = LINE) -> bytes:
        """Return a line with its newline; what is left at the end of the stream, or ``b""``.

        Raises:
            ValueError: The line is longer than *limit*. As with asyncio's streams, what
                was looked at is dropped, with the newline if that was found.
            RuntimeError, OSError: As `read()`.

        Cancellation:
            Safe: what has come stays to be read.
        """
        return await self._exclusively(self._line(limit))

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
        if self._inbox and self._signals is not None:
            self._fire(self._signals, Event.READ)
        else:
            self._look_again()

    async def _two_readers(self) -> RuntimeError:
        await self._turn()
        return RuntimeError("another task is reading this stream already")

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
        self._inbox += data
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

    # -- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*: at once what the kernel takes, the rest as it makes room.

        Never waits; `drain()` does when too much is unsent.

        Raises:
            RuntimeError: After `write_eof()`.
            ConnectionAbortedError: The stream was closed by this side.
            OSError: The connection failed, now or when earlier data was sent.
        """
        if isinstance(data, memoryview):
            data = data.cast("B")
        elif not isinstance(data, (bytes, bytearray)):
            message = f"write() takes bytes, a bytearray or a memoryview, got {data!r:.50}"
            raise TypeError(message)
        if self._broken is not None or self._closing:
            raise self._why_not()
        if self._write_eof:
            message = "write() was called after write_eof()"
            raise RuntimeError(message)
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
            self._buffer += memoryview(data)[sent:]
            self._paused = self._paused or len(self._buffer) > HIGH
            self._block()
            if self._broken is not None:
                raise self._why_not()

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
        await self.drain()

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
            if not self._buffer:
                self._shut()

    # -- ending

    def close(self) -> None:
        """Close: what is unsent goes out in the background, then the end of the stream.

        A second call does nothing. If something has come that nobody read, the kernel
        resets the peer, which may lose what was still on its way there: read up to the end
        of the stream first where that matters.
        """
        if self._closing:
            return
        self._closing = True
        if self._reader is not None:
            self._wake_reader()
        if not self._buffer or self._broken is not None:
            self._finish()

    async def wait_closed(self) -> None:
        """Wait until the descriptor is closed.

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
        """Reset the connection; what is unsent is dropped."""
        self._closing = True
        self._wake_reader()
        self._buffer.clear()
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
        """Whether `close()` or `abort()` was called."""
        return self._closing

    # -- besides

    @property
    def callee_id(self) -> Address:
        """The local address of this connection."""
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
        """Have ``callback(stream, event, error)`` called for each of *events*.

        It is called from the loop, never inside the call that caused the event; of what
        is so already, it is told soon. *error* is ``None`` but for a CLOSE after a
        failure.
        """
        check_callback(callback)
        if self._signals is None:
            self._signals = Signals()
        signals = self._signals
        told = [each for each in EVENTS if not signals.armed(each)]
        subscription = signals.add(events, callback)
        if self._sock.fileno() < 0:
            return subscription
        self._subscribe(signals)
        for event in told:
            # Told to the others before; to this one if it is still so.
            if subscription.wants(event) and self._is_so(event):
                error = self._failure() if event is Event.CLOSE else None
                self._deliver(subscription, event, error)
        return subscription
