"""An arrival that has a connected socket already."""

from __future__ import annotations

import errno
import os
import socket
from asyncio.trsock import TransportSocket
from typing import TYPE_CHECKING, Any, Final

from condaccept._pending import Peer
from condaccept._sockets import (
    BareSocket,
    OwnedSocket,
    credentials,
    hung_up,
    peer,
    reset,
    saved_syn,
    set_linger,
)

if TYPE_CHECKING:
    from condaccept._pending import Address, Credentials, PendingTransport

__all__ = ("CALLEE_DATA_CAPACITY", "Connection", "Kind")

CALLEE_DATA_CAPACITY: Final = 4096
"""Bytes; what a fresh socket's send buffer takes at once, and Windows' own capacity."""


class Kind:
    """What the connections of one listening socket have in common.

    Attributes:
        tcp: Whether it is TCP.
        arguments: What a socket object over such a descriptor is made with.
        linger: The SO_LINGER that an accepted connection is to have, if it may have
            inherited another one; else ``None``.
        resets: Whether closing the descriptor is enough to reset the connection.
    """

    __slots__ = ("arguments", "linger", "resets", "tcp")

    def __init__(self, family: int) -> None:
        self.tcp = family in (socket.AF_INET, socket.AF_INET6)
        self.linger: bytes | None = None
        self.resets = False
        # proto: asyncio sets TCP_NODELAY only on what says it is IPPROTO_TCP, and an
        # accepted socket says what the listening one was made with, often 0.
        # SOCK_NONBLOCK in the type makes the object non-blocking without a system call;
        # the kernel's own flag stays off, so every recv and send says MSG_DONTWAIT.
        proto = socket.IPPROTO_TCP if self.tcp else 0
        self.arguments = family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, proto


class Connection:
    """A connected socket that nobody has decided about.

    A bare descriptor as long as nobody asks more of it: most rejected connections need no
    socket object.

    Attributes:
        pending: Who is told of what the watch has seen; ``None`` while it is not watched.
        marked: Whether the kernel was given a number of bytes to tell of.
    """

    __slots__ = ("_kind", "_sock", "_syn", "caller_id", "fd", "hangup", "marked", "pending")

    capacity = CALLEE_DATA_CAPACITY

    def __init__(self, fd: int, kind: Kind, caller_id: Address, hangup: bool) -> None:  # noqa: FBT001 - by keyword a call is a sixth dearer, and there is one per connection
        self.fd = fd
        self.caller_id = caller_id
        self.hangup = hangup
        self.marked = False
        self.pending: PendingTransport | None = None
        self._kind = kind
        self._sock: BareSocket | None = None
        self._syn: bytes | None = None

    def __call__(self, _events: int) -> None:
        """Tell that the watch has seen something."""
        if self.pending is not None:
            self.pending._changed()

    @property
    def sock(self) -> BareSocket:
        """The socket, without the Python half of `socket.socket`."""
        if self.fd < 0:
            # Whoever keeps a pending transport may ask it later; by then the descriptor's
            # number is the stream's, or somebody else's.
            raise OSError(errno.EBADF, "this connection is not pending any more")
        if self._sock is None:
            self._sock = BareSocket(*self._kind.arguments, self.fd)
        return self._sock

    @property
    def has_qos(self) -> bool:
        return self._kind.tcp

    def syn(self) -> bytes:
        if self._syn is None:
            # The kernel gives it out once.
            self._syn = saved_syn(self.sock) if self._kind.tcp else b""
        return self._syn

    def callee_id(self) -> Address:
        return self.sock.getsockname()

    def credentials(self) -> Credentials | None:
        return credentials(self.sock)

    def peer(self) -> Peer:
        # Most are there, and that is told without a socket object, which many have not.
        if self._sock is None and self.fd >= 0 and not hung_up(self.fd):
            return Peer.THERE
        return peer(self.sock, tcp=self._kind.tcp)

    def peek(self, n: int) -> bytes:
        if self.peer() is Peer.GONE:
            # A peek would take the pending error, and a later read see a plain end.
            return b""
        try:
            return self.sock.recv(n, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
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

    def mark(self, n: int) -> None:
        """Have the kernel tell of data from *n* bytes on; 0 for any number.

        A Unix socket takes the mark and does not keep to it.

        Raises:
            ValueError: The receive buffer does not hold so many; nothing has changed.

        Source: socket(7), SO_RCVLOWAT.
        """
        option = socket.SOL_SOCKET, socket.SO_RCVLOWAT
        kept, sock = self._sock, self.sock
        sock.setsockopt(*option, n or 1)
        # Where the owner has set SO_RCVBUF the kernel cuts the mark down without a word.
        most = sock.getsockopt(*option) if n else 0
        if n > most:
            sock.setsockopt(*option, 1)
        self.marked = 0 < n <= most
        if kept is None:
            # Many may wait, and for that the descriptor does.
            sock.detach()
            self._sock = None
        if n > most:
            message = f"{n} bytes cannot wait unread on this socket, {most} can (SO_RCVBUF)"
            raise ValueError(message)

    def own(self) -> OwnedSocket:
        """Give the descriptor over to a socket that tells of its end."""
        if self.marked:
            # A stream with the mark left on never sees a short message.
            self.mark(0)
        if self._sock is not None:
            self._sock.detach()
            self._sock = None
        fd, self.fd = self.fd, -1
        sock = OwnedSocket(*self._kind.arguments, fd)
        if (linger := self._kind.linger) is not None:
            set_linger(sock, linger)
        return sock

    def farewell(self) -> BareSocket:
        """Give the socket away, made so that a close sends what is unsent."""
        if self.marked:
            self.mark(0)
        sock = self.sock
        self.fd, self._sock = -1, None
        if self._kind.linger is not None:
            set_linger(sock, self._kind.linger)
        return sock

    def reset(self) -> None:
        """Reset the connection."""
        if self._kind.resets and self._sock is None:
            os.close(self.fd)
        else:
            reset(self.sock)
        self.fd, self._sock = -1, None
