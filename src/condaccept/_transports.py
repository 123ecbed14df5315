"""Handing a connected socket over to a transport of the loop.

From then on the connection is the transport's, with nothing of ours on the way of its
data: `start_tls()`, `sendfile()` and `set_protocol()` work as on any other.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from condaccept._sockets import HandedSocket

__all__ = (
    "READER_LIMIT",
    "Attachment",
    "TlsOptions",
    "attach",
    "check_tls",
    "streams_protocol",
)

READER_LIMIT: Final = 64 * 1024
"""The limit of a StreamReader: asyncio's own."""

TlsOptions = dict[str, Any]
"""The arguments of `loop.connect_accepted_socket()` about TLS."""


def check_tls(
    context: ssl.SSLContext | None,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> TlsOptions:
    """Refuse here what the loop would refuse when it has the socket already."""
    if context is not None and not isinstance(context, ssl.SSLContext):
        message = f"ssl is an SSLContext or None, got {context!r}"
        raise TypeError(message)
    options = {
        "ssl_handshake_timeout": handshake_timeout,
        "ssl_shutdown_timeout": shutdown_timeout,
    }
    for name, timeout in options.items():
        if timeout is None:
            continue
        if context is None:
            message = f"{name} is for TLS: give ssl too"
            raise ValueError(message)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            message = f"{name} is a number of seconds or None, got {timeout!r}"
            raise TypeError(message)
        if not timeout > 0:
            message = f"{name} is more than 0 seconds, got {timeout!r}"
            raise ValueError(message)
    return {"ssl": context, **options}


class Attachment:
    """A connection in the hands of a transport, as far as it can be ended from here."""

    __slots__ = ("sock", "transport")

    def __init__(self, sock: HandedSocket) -> None:
        self.sock = sock
        self.transport: asyncio.BaseTransport | None = None

    def close(self) -> None:
        """Close the transport; while TLS is being agreed upon, end that."""
        if self.transport is not None:
            self.transport.close()
        else:
            self._hang_up()

    def abort(self) -> None:
        """Abort the transport; while TLS is being agreed upon, end that."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
        else:
            self.close()

    def _hang_up(self) -> None:
        # The descriptor is the transport's to close, which nobody has yet: it sees an end.
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The peer was faster, or it is over.
            return


async def attach(
    attachment: Attachment, protocol: asyncio.BaseProtocol, data: bytes, tls: TlsOptions
) -> asyncio.Transport:
    """Have a transport of the running loop take a socket; *data* was read from it before.

    The socket is the transport's, whatever happens.

    Cancellation:
        The connection is closed.
    """
    loop = asyncio.get_running_loop()
    relay = Relay(protocol, data) if data else None
    # What comes back as the protocol is not used: uvloop's is its own when there is TLS.
    transport, _ = await loop.connect_accepted_socket(
        lambda: relay or protocol, attachment.sock, **tls
    )
    attachment.transport = transport
    if relay is not None:
        relay.deliver()
    return transport


class Relay(asyncio.Protocol):
    """Stands in for a protocol until that has got the bytes which were read before.

    They are delivered outside `connection_made()`, since uvloop ignores a
    ``pause_reading()`` inside it, and before anything else is.
    """

    def __init__(self, inner: asyncio.BaseProtocol, data: bytes) -> None:
        self._inner = inner
        self._data = data
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        # So that the protocol finds itself where it would be without this.
        self._transport.set_protocol(self._inner)
        try:
            self._inner.connection_made(transport)
        finally:
            # It may have put another one there, which then is the one to get the bytes.
            self._inner = self._transport.get_protocol()
            self._transport.set_protocol(self)
            asyncio.get_running_loop().call_soon(self.deliver)

    def deliver(self) -> None:
        """Give the bytes to the protocol and leave; a second call does nothing."""
        data, self._data = self._data, b""
        if not data:
            return
        self._transport.set_protocol(self._inner)
        try:
            feed(self._inner, data)
        except Exception as error:  # noqa: BLE001 - as a transport does with what a protocol raises
            asyncio.get_running_loop().call_exception_handler(
                {
                    "message": "a protocol raised on the bytes that were read before it",
                    "exception": error,
                    "transport": self._transport,
                    "protocol": self._inner,
                }
            )
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.deliver()
        if not self._transport.is_closing():
            feed(self._transport.get_protocol(), data)

    def eof_received(self) -> bool | None:
        self.deliver()
        kept: bool | None = self._transport.get_protocol().eof_received()
        return kept

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.deliver()
        self._transport.get_protocol().connection_lost(exc)


def feed(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    """Give *data* to a protocol of either kind."""
    if not isinstance(protocol, asyncio.BufferedProtocol):
        cast("asyncio.Protocol", protocol).data_received(data)
        return
    rest = memoryview(data)
    while rest:
        buffer = protocol.get_buffer(len(rest))
        room = memoryview(buffer).cast("B")
        n = min(len(room), len(rest))
        if not n:
            message = "get_buffer() returned an empty buffer"
            raise RuntimeError(message)
        room[:n] = rest[:n]
        protocol.buffer_updated(n)
        rest = rest[n:]


def streams_protocol(
    data: bytes, limit: int, made: list[asyncio.StreamWriter]
) -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    """Return a reader that begins with *data*, and its protocol.

    When the connection is made the protocol puts the writer into *made*.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    if data:
        # Before there is a transport: no Relay is needed, and none that could be paused.
        reader.feed_data(data)
    # With a callback, since without one `StreamWriter.start_tls()` takes the client's part.
    protocol = asyncio.StreamReaderProtocol(
        reader, lambda _, writer: made.append(writer), loop=loop
    )
    return reader, protocol
