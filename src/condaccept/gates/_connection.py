"""An arrival that has a connected socket already."""

from __future__ import annotations

import os
import socket
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, Final

from condaccept._sockets import OwnedSocket, RawSocket, credentials, peer, reset

if TYPE_CHECKING:
    from condaccept._pending import Address, Credentials, Peer

__all__ = ("CALLEE_DATA_CAPACITY", "Connection")

CALLEE_DATA_CAPACITY: Final = 4096
"""Bytes; what a fresh socket's send buffer takes at once, and Windows' own capacity."""

_INTERNET: Final = frozenset({int(socket.AF_INET), int(socket.AF_INET6)})


class Connection:
    """A connected socket that nobody has decided about.

    A bare descriptor as long as nobody asks more of it: most rejected connections need no
    socket object.
    """

    __slots__ = ("_family", "_sock", "caller_id", "fd", "hangup", "watched")

    capacity = CALLEE_DATA_CAPACITY

    def __init__(self, fd: int, family: int, caller_id: Address, *, hangup: bool) -> None:
        self.fd = fd
        self.caller_id = caller_id
        self.hangup = hangup
        self.watched = False
        self._family = family
        self._sock: RawSocket | None = None

    @property
    def sock(self) -> RawSocket:
        """The socket, without the Python half of `socket.socket`."""
        if self._sock is None:
            self._sock = RawSocket(*self._kind(), self.fd)
        return self._sock

    def callee_id(self) -> Address:
        return self.sock.getsockname()

    def credentials(self) -> Credentials | None:
        return credentials(self.sock)

    def peer(self) -> Peer:
        return peer(self.sock, tcp=self._family in _INTERNET)

    def peek(self, n: int) -> bytes:
        try:
            return self.sock.recv(n, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            # Reset: the next look at the peer says so, by the state and not by an error.
            return b""

    def consume(self, n: int) -> bytes:
        return self.sock.recv(n, socket.MSG_DONTWAIT)

    def extra_info(self, name: str, default: Any) -> Any:
        if name == "peername":
            return self.caller_id
        if name == "sockname":
            return self.callee_id()
        if name == "socket":
            return TransportSocket(self.sock)  # type: ignore[arg-type]
        return default

    def own(self) -> OwnedSocket:
        """Give the descriptor over to a socket that tells of its end."""
        if self._sock is not None:
            self._sock.detach()
        return OwnedSocket(*self._kind(), self.fd)

    def reset(self, *, lingers: bool) -> None:
        """Reset the connection; *lingers* if the socket was made so that a close does."""
        if lingers and self._sock is None:
            os.close(self.fd)
        else:
            reset(self.sock)

    def _kind(self) -> tuple[int, int, int]:
        # proto: asyncio sets TCP_NODELAY only on what says it is IPPROTO_TCP, and an
        # accepted socket says what the listening one was made with, often 0.
        # SOCK_NONBLOCK in the type makes the object non-blocking without a system call;
        # the kernel's own flag stays off, so every recv and send says MSG_DONTWAIT.
        proto = socket.IPPROTO_TCP if self._family in _INTERNET else 0
        return self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, proto
