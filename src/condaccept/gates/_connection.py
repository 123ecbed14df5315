"""An arrival that has a connected socket already."""

from __future__ import annotations

import socket
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, Final

from condaccept._sockets import OwnedSocket, RawSocket, credentials, peer

if TYPE_CHECKING:
    from condaccept._pending import Address, Credentials, Peer

__all__ = ("CALLEE_DATA_CAPACITY", "Connection")

CALLEE_DATA_CAPACITY: Final = 4096
"""Bytes; what a fresh socket's send buffer takes at once, and Windows' own capacity."""


class Connection:
    """A connected socket that nobody has decided about."""

    __slots__ = ("caller_id", "sock", "watched")

    capacity = CALLEE_DATA_CAPACITY

    def __init__(self, sock: RawSocket, caller_id: Address) -> None:
        self.sock = sock
        self.caller_id = caller_id
        self.watched = False

    def callee_id(self) -> Address:
        return self.sock.getsockname()

    def credentials(self) -> Credentials | None:
        return credentials(self.sock)

    def peer(self) -> Peer:
        return peer(self.sock, tcp=self.sock.proto == socket.IPPROTO_TCP)

    def peek(self, n: int) -> bytes:
        try:
            return self.sock.recv(n, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            # Reset: the next look at the peer says so, by the state and not by an error.
            return b""

    def consume(self, n: int) -> bytes:
        return self.sock.recv(n, socket.MSG_DONTWAIT)

    def extra(self, name: str, default: Any) -> Any:
        if name == "peername":
            return self.caller_id
        if name == "sockname":
            return self.callee_id()
        if name == "socket":
            return TransportSocket(self.sock)  # type: ignore[arg-type]
        return default

    def own(self) -> OwnedSocket:
        """Give the descriptor over to a socket that tells of its end."""
        sock = self.sock
        # proto too: asyncio sets TCP_NODELAY only on what says it is IPPROTO_TCP, and an
        # accepted socket gets 0 from a listening one that was made without.
        kind = sock.type | socket.SOCK_NONBLOCK
        return OwnedSocket(sock.family, kind, sock.proto, sock.detach())

    @classmethod
    def of_descriptor(cls, fd: int, family: int, caller_id: Address) -> Connection:
        """Wrap an accepted descriptor."""
        proto = socket.IPPROTO_TCP if family in (socket.AF_INET, socket.AF_INET6) else 0
        # SOCK_NONBLOCK in the type makes the object non-blocking without a system call;
        # the kernel's own flag stays off, so every recv and send says MSG_DONTWAIT.
        raw = RawSocket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, proto, fd)
        return cls(raw, caller_id)

