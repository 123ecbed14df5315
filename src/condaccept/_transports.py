"""Handing a connection over to the loop's own transports."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from condaccept._sockets import Released

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

__all__ = ("HandedSocket", "attach")


class HandedSocket(Released, socket.socket):
    """A connected socket for a transport; it tells when its descriptor is gone, once.

    asyncio's transports end it with `close()`, uvloop's with `detach()`, and who just drops
    it with neither. Nothing on the way of the data is overridden.
    """

    __slots__ = ("_release",)


class _Preface(asyncio.Protocol):
    """Delivers what was read before the hand-over, ahead of everything else."""

    def __init__(self, protocol: asyncio.BaseProtocol, data: bytes) -> None:
        self.protocol = protocol
        self._data = data

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.set_protocol(self.protocol)
        self.protocol.connection_made(transport)
        if not transport.is_closing():
            _feed(self.protocol, self._data)


def _feed(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    if isinstance(protocol, asyncio.BufferedProtocol):
        rest = memoryview(data)
        while rest:
            buffer = memoryview(protocol.get_buffer(len(rest))).cast("B")
            n = min(len(buffer), len(rest))
            if not n:
                message = "get_buffer() returned an empty buffer"
                raise RuntimeError(message)
            buffer[:n] = rest[:n]
            protocol.buffer_updated(n)
            rest = rest[n:]
    else:
        receiver: Any = protocol
        receiver.data_received(data)


async def attach(
    loop: asyncio.AbstractEventLoop,
    sock: HandedSocket,
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    data: bytes,
    context: ssl.SSLContext | None,
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """Make a transport over *sock*; *data* goes to its protocol before all that comes.

    Whatever happens, *sock* is the transport's from now on, or closed.
    """
    handed = False

    def factory() -> asyncio.BaseProtocol:
        nonlocal handed
        protocol = protocol_factory()
        handed = True
        return _Preface(protocol, data) if data else protocol

    try:
        transport, protocol = await loop.connect_accepted_socket(factory, sock, ssl=context)
    except BaseException:
        # A transport closes its socket itself, after what is unsent; but where the factory
        # raised there is none, and no loop closes it.
        if not handed:
            sock.close()
        raise
    return transport, protocol.protocol if isinstance(protocol, _Preface) else protocol
