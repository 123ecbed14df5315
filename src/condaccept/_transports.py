"""Handing a connected socket over to a transport of the loop.

From then on the connection is the transport's, with nothing of ours on the way of its
data: `start_tls()`, `sendfile()` and `set_protocol()` work as on any other.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from condaccept._sockets import HandedSocket

__all__ = (
    "READER_LIMIT",
    "Attachment",
    "TlsOptions",
    "attach",
    "check_tls",
    "checked",
    "streams_protocol",
)

P = TypeVar("P")

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
    if context is not None and context.protocol is ssl.PROTOCOL_TLS_CLIENT:
        # The loop would find out with the descriptor in nobody's hands.
        message = "ssl is a context for clients: use PROTOCOL_TLS_SERVER or Purpose.CLIENT_AUTH"
        raise ValueError(message)
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


def checked(protocol: P) -> P:
    """Refuse what is no protocol while the stream still has the connection.

    uvloop would keep it for ever, and say nothing to who asked for it.
    """
    if not callable(getattr(protocol, "connection_made", None)):
        message = f"protocol_factory returned {protocol!r}, which is no protocol"
        raise TypeError(message)
    return protocol


class Attachment:
    """A connection in the hands of a transport, as far as it can be ended from here."""

    __slots__ = ("aborted", "attaching", "sock", "transport")

    def __init__(self, sock: HandedSocket) -> None:
        self.sock = sock
        self.aborted = False
        self.attaching: asyncio.Task[Any] | None = None  # a loop has only weak references
        self.transport: Any = None

    def close(self) -> None:
        """Close the transport; while there is none yet, as `abort()`."""
        if self.transport is not None:
            self.transport.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Abort the transport; while there is none yet, see to it that there will be none."""
        self.aborted = True
        if self.transport is not None:
            self.transport.abort()
            return
        # In the TLS handshake there is one underneath, which will close the descriptor, and
        # which nobody gives to us. It sees an end of the stream.
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
    relay = Relay(attachment, protocol, data)
    # A task of its own, which nobody cancels: uvloop would close the transport and leave a
    # protocol that was told of the connection without a word of its end.
    attaching = attachment.attaching = loop.create_task(
        loop.connect_accepted_socket(lambda: relay, attachment.sock, **tls)
    )
    try:
        await asyncio.wait([attaching])
    except asyncio.CancelledError:
        attachment.abort()
        attaching.add_done_callback(disregard)
        raise
    finally:
        attachment.attaching = None
    if attachment.aborted and (error := attaching.exception()) is not None:
        # TLS has seen an end that was none of the caller's making.
        raise aborted() from error
    # What comes back as the protocol is not used: uvloop's is its own when there is TLS.
    transport: asyncio.Transport = attaching.result()[0]
    if relay.refused is not None:
        raise relay.refused
    return transport


def aborted() -> ConnectionAbortedError:
    """Return what a hand-over raises that this side has ended."""
    return ConnectionAbortedError(
        errno.ECONNABORTED, "the connection was aborted while it was handed over"
    )


def disregard(attaching: asyncio.Task[Any]) -> None:
    """Take note of what nobody waits for any more: an exception, mostly that of TLS."""
    if not attaching.cancelled():
        attaching.exception()


class Relay(asyncio.Protocol):
    """Stands in for a protocol until that has got the bytes which were read before.

    They are delivered outside `connection_made()`, since uvloop ignores a
    ``pause_reading()`` inside it, and before anything else is.

    Attributes:
        refused: What `connection_made()` of the protocol raised, or why it was not called.
    """

    def __init__(self, attachment: Attachment, protocol: asyncio.BaseProtocol, data: bytes) -> None:
        self._attachment = attachment
        self._protocol = protocol
        self._data = data
        self._transport: Any = None
        self.refused: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._attachment.transport = self._transport = transport
        if self._attachment.aborted:
            self.refused = aborted()
            self._transport.set_protocol(asyncio.Protocol())  # one that need not know
            self._transport.abort()
            return
        # So that the protocol finds itself where it would be without this.
        self._transport.set_protocol(self._protocol)
        try:
            self._protocol.connection_made(transport)
        except Exception as error:  # noqa: BLE001 - raised again by attach()
            # asyncio would go on with a protocol that does not know its transport; uvloop
            # would keep the connection, unread, until somebody collects the garbage.
            self.refused = error
            self._transport.abort()
            return
        if transport.is_closing():
            self._data = b""
        if self._data:
            # It may have put another one there, which then is the one to get the bytes.
            self._protocol = self._transport.get_protocol()
            self._transport.set_protocol(self)
            asyncio.get_running_loop().call_soon(self.deliver)

    def deliver(self) -> None:
        """Give the bytes to the protocol and leave; does nothing a second time."""
        data, self._data = self._data, b""
        if not data:
            return
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._protocol)
        try:
            feed(self._transport, data)
        except Exception as error:  # noqa: BLE001 - as a transport does with what a protocol raises
            asyncio.get_running_loop().call_exception_handler(
                {
                    "message": "a protocol raised on the bytes that were read before it",
                    "exception": error,
                    "transport": self._transport,
                    "protocol": self._protocol,
                }
            )
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.deliver()
        if not self._transport.is_closing():
            feed(self._transport, data)

    def eof_received(self) -> bool | None:
        self.deliver()
        if self._transport.is_closing():
            return None
        kept: bool | None = self._transport.get_protocol().eof_received()
        return kept

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        # Whatever ended it came behind the bytes.
        self.deliver()
        self._transport.get_protocol().connection_lost(exc)


def feed(transport: Any, data: bytes) -> None:
    """Give *data* to the protocol of *transport* as that would, until it closes."""
    rest = memoryview(data)
    closing = transport.is_closing()  # by the other end, or by the listener's abort()
    while rest and transport.is_closing() is closing:
        protocol = transport.get_protocol()
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(bytes(rest))
            return
        room = memoryview(protocol.get_buffer(len(rest))).cast("B")
        n = min(len(room), len(rest))
        if not n:
            message = "get_buffer() returned an empty buffer"
            raise RuntimeError(message)
        room[:n] = rest[:n]
        protocol.buffer_updated(n)
        rest = rest[n:]


def streams_protocol(
    limit: int, made: list[asyncio.StreamWriter]
) -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    """Return a reader and its protocol, which puts the writer into *made*."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    # With a callback, since without one `StreamWriter.start_tls()` takes the client's part.
    protocol = asyncio.StreamReaderProtocol(
        reader, lambda _, writer: made.append(writer), loop=loop
    )
    return reader, protocol
