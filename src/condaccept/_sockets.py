"""What the kernel is told and asked about a socket: options, the reset, errno.

The only room with numbers of the kernel's in it.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import struct
import sys
import warnings
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from condaccept._pending import Credentials, Peer
from condaccept._qos import FlowSpec
from condaccept.exceptions import (
    AcceptError,
    BuffersExhaustedError,
    DescriptorsExhaustedError,
    NetworkDownError,
    NotASocketError,
    NotListeningError,
    NotStreamSocketError,
    PendingResetError,
    QualityOfServiceError,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence
    from ipaddress import IPv4Address

    from condaccept._pending import Address, Release

__all__ = (
    "BareSocket",
    "HandedSocket",
    "Option",
    "OwnedSocket",
    "RawSocket",
    "apply_flow",
    "apply_options",
    "backlog",
    "check_listening",
    "check_options",
    "classify",
    "credentials",
    "descriptor_free",
    "descriptor_limit",
    "hung_up",
    "inherit_options",
    "inherit_reset",
    "linger",
    "no_qos",
    "peer",
    "raw_accept",
    "reset",
    "save_syn",
    "saved_syn",
    "set_linger",
)

RawSocket: TypeAlias = socket.SocketType
"""The C class under `socket.socket`: the same calls without the Python half."""

Option: TypeAlias = tuple[int, int, int | bytes]
"""A socket option: ``(level, name, value)`` as for setsockopt(2)."""

LINGER_RESET: Final = struct.pack("ii", 1, 0)
_TCP_CLOSE: Final = 7
_TCP_CLOSE_WAIT: Final = 8
_TCP_INFO: Final[int | None] = getattr(socket, "TCP_INFO", None)
# Python's socket module has none of them before 3.13, and not the last one there either;
# elsewhere than on Linux the numbers mean something else.
_TCP_SAVE_SYN, _TCP_SAVED_SYN, _SO_MAX_PACING_RATE = 27, 28, 47
_LINUX: Final = sys.platform == "linux"
_SYN_ROOM: Final = 1024
"""Bytes; the most getsockopt() of Python has room for. Two headers have up to 120, and
what stands between them in IPv6 is not bounded otherwise."""
_POLLRDHUP: Final[int] = getattr(select, "POLLRDHUP", 0)

# accept(2), "Error handling": errors already pending on the new connection, which a
# reliable server treats like EAGAIN. EPERM is netfilter's way of saying the same.
_NETWORK_ERRORS: Final = frozenset(
    {
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        getattr(errno, "ENONET", errno.ENETDOWN),
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EPERM,
    }
)

_LEAVES: Final[dict[int, tuple[type[AcceptError], str]]] = {
    **dict.fromkeys(
        _NETWORK_ERRORS, (NetworkDownError, "a network error came with the connection")
    ),
    # Linux gives such a connection out, readable as reset; BSD and macOS say it here.
    errno.ECONNABORTED: (PendingResetError, "the peer reset the connection before it was taken"),
    errno.EMFILE: (
        DescriptorsExhaustedError,
        "no descriptor is free in this process (RLIMIT_NOFILE): close some, then accept again",
    ),
    errno.ENFILE: (
        DescriptorsExhaustedError,
        "no descriptor is free on this machine (fs.file-max): close some, then accept again",
    ),
    errno.ENOBUFS: (BuffersExhaustedError, "the kernel has no memory for another socket"),
    errno.ENOMEM: (BuffersExhaustedError, "the kernel has no memory for another socket"),
    errno.EINVAL: (NotListeningError, "the socket does not listen any more: it was shut down"),
    errno.ENOTSOCK: (NotASocketError, "the descriptor is not a socket"),
    errno.EBADF: (NotASocketError, "the descriptor was closed behind the listener's back"),
    errno.EOPNOTSUPP: (NotStreamSocketError, "the socket is not of a connection-oriented type"),
}


def classify(error: OSError) -> AcceptError:
    """Return what an accept call raises for *error* of accept(2), which is its cause.

    Source: accept(2), "ERRORS"; the error table of WSPAccept.
    """
    leaf, reason = _LEAVES.get(error.errno or 0, (AcceptError, f"accept(2) failed: {error}"))
    classified = leaf(reason)
    classified.__cause__ = error
    return classified


class BareSocket(RawSocket):
    """The C class, and what asyncio's TransportSocket asks of a socket besides."""

    __slots__ = ()

    def dup(self) -> socket.socket:
        """Return a plain socket over a duplicate of the descriptor, non-blocking as this is."""
        twin = socket.fromfd(self.fileno(), self.family, self.type, self.proto)
        twin.settimeout(self.gettimeout())
        return twin

    def get_inheritable(self) -> bool:
        """Whether child processes get the descriptor."""
        return os.get_inheritable(self.fileno())


class OwnedSocket(BareSocket):
    """A connected socket that tells when its descriptor is gone, once.

    Nothing on the way of the data is overridden. It is made of the C class: the Python
    half of `socket.socket` costs as much as a system call.
    """

    __slots__ = ("_forgotten", "_release")
    _forgotten: Callable[[OwnedSocket], object] | None
    _release: Release | None

    def own(self, release: Release, forgotten: Callable[[OwnedSocket], object]) -> None:
        """Have *release* called when the descriptor is closed or given away.

        ``forgotten(self)`` is called, in any thread, when this is collected while it is
        open, and has to see to the closing.
        """
        self._release = release
        self._forgotten = forgotten

    def close(self) -> None:
        """Close the descriptor; then release."""
        RawSocket.close(self)
        self._over()

    def detach(self) -> int:
        """Give the descriptor to the caller; then release."""
        fd = RawSocket.detach(self)
        self._over()
        return fd

    def hand_over(
        self, caller_id: Address, owner: object, loop: asyncio.AbstractEventLoop
    ) -> HandedSocket:
        """Give the descriptor, and the release with it, to a socket for a transport of *loop*.

        *owner* lives as long as the descriptor is open there.
        """
        release, self._release = self._release, None
        handed = HandedSocket(self.family, socket.SOCK_STREAM, self.proto, RawSocket.detach(self))
        handed.caller_id = caller_id
        handed.owner = owner
        handed.release = release
        handed.loop = loop
        # Ours never needed the kernel's own flag; a transport's recv does.
        handed.setblocking(False)
        return handed

    def __del__(self) -> None:
        if self.fileno() < 0:
            return  # as nearly always, and there is nothing else to finalize
        forgotten = getattr(self, "_forgotten", None)
        if forgotten is None:
            # The C finalizer warns of an open descriptor and closes it.
            super().__del__()  # type: ignore[misc]
        else:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            forgotten(self)

    def _over(self) -> None:
        release: Release | None = getattr(self, "_release", None)
        if release is not None:
            self._release = None
            release()


class HandedSocket(socket.socket):
    """A connected socket for a transport of the loop, which tells of its end as ours does.

    asyncio's transports call `close()`, uvloop's `detach()`, both when the connection is
    over and behind `connection_lost()`. Neither looks at the class of the socket, and
    nothing on the way of the data is overridden; wrapping the transport or the protocol in
    its place would fail `loop.start_tls()`, `loop.sendfile()` or `set_protocol()`.
    """

    caller_id: Address = None
    owner: object = None
    release: Release | None = None
    loop: asyncio.AbstractEventLoop

    def close(self) -> None:
        """Close the descriptor; then release."""
        super().close()
        if self.fileno() < 0:
            self._over()

    def detach(self) -> int:
        """Give the descriptor to the caller; then release."""
        fd = super().detach()
        self._over()
        return fd

    def dup(self) -> socket.socket:  # type: ignore[override]
        """Return a plain socket: what becomes of a duplicate is no end of this connection."""
        twin = socket.fromfd(self.fileno(), self.family, self.type, self.proto)
        twin.settimeout(self.gettimeout())
        return twin

    def getpeername(self) -> Address:
        """Return the caller's address, also after a reset: ENOTCONN is what that gives."""
        return self.caller_id

    def __del__(self) -> None:
        # In place of the C finalizer, which would close the descriptor: when uvloop's
        # transport and this are collected together, libuv still has it and aborts. Either
        # loop's transport closes it in the same collection, which may be behind this: so
        # the release comes later.
        release, self.release = self.release, None
        if release is None:
            return
        if self.loop.is_closed():
            release()
        else:
            self.loop.call_soon_threadsafe(release)

    def _over(self) -> None:
        if (release := self.release) is not None:
            self.release = self.owner = None
            release()


def descriptor_free() -> bool:
    """Whether this process can open another descriptor.

    An accept(2) that says EAGAIN would tell as well, and costs a caller who came meanwhile.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True


def descriptor_limit() -> int | None:
    """Return how many descriptors this process may have (RLIMIT_NOFILE); ``None``: any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raw_accept(sock: socket.socket) -> Callable[[], tuple[int, Address]]:
    """Return a call that accepts from *sock*, giving a descriptor and an address.

    The public `socket.accept()` spends a third of its time on making enums of family and
    type for an object that a rejected connection never needs; what it calls underneath
    has kept its form through all supported versions. Where it is missing, the public one
    serves.
    """
    accept: Callable[[], tuple[int, Address]] | None = getattr(sock, "_accept", None)
    if accept is not None:
        return accept

    def public() -> tuple[int, Address]:
        connection, address = sock.accept()
        return connection.detach(), address

    return public


def check_listening(sock: socket.socket) -> None:
    """Check that connections can be accepted from *sock*.

    Raises:
        NotASocketError: Its descriptor is closed or no socket.
        NotStreamSocketError: It is not of type SOCK_STREAM.
        NotListeningError: listen(2) was not called on it.
    """
    try:
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise classify(error) from error
    if kind != socket.SOCK_STREAM:
        reason = "only stream sockets take connections: this one is not of type SOCK_STREAM"
        raise NotStreamSocketError(reason)
    if not listening:
        reason = "the socket does not listen: call its listen() first"
        raise NotListeningError(reason)


def peer(sock: RawSocket, *, tcp: bool) -> Peer:
    """Look at the other end of *sock* without reading.

    A peek would eat the pending error, and the next read would then see a plain end.
    """
    if tcp and _TCP_INFO is not None:
        state = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0]
        if state == _TCP_CLOSE:
            return Peer.GONE
        return Peer.SHUT if state == _TCP_CLOSE_WAIT else Peer.THERE
    events = hung_up(sock.fileno())
    if not events:
        return Peer.THERE
    return Peer.GONE if events & select.POLLERR else Peer.SHUT


def hung_up(fd: int) -> int:
    """Return what poll(2) says of a hangup of *fd*: 0 if the other end is there."""
    poll = select.poll()
    poll.register(fd, _POLLRDHUP)
    events = poll.poll(0)
    return events[0][1] if events else 0


def reset(sock: RawSocket) -> None:
    """Close *sock* so that the peer is reset, whether or not it has sent anything.

    A Unix socket knows no reset: the peer reads the end of the stream, or, if it had sent
    something nobody read, ECONNRESET.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    except OSError:
        # Not on Linux, where even a socket that was reset takes it; elsewhere the close
        # that follows is all that is left to do.
        pass
    sock.close()


def set_linger(sock: RawSocket, linger: bytes) -> None:
    """Set SO_LINGER to the two integers of struct linger."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def linger(sock: socket.socket) -> bytes:
    """Return the two integers of SO_LINGER."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(LINGER_RESET))


def inherit_reset(sock: socket.socket) -> None:
    """Have connections accepted from *sock* reset when closed.

    Linux copies SO_LINGER when the handshake completes, so this is for before listen(2).
    It saves a system call for each rejection, and it destroys unsent data on every
    connection whose linger nobody puts right again: whoever else accepts from this socket
    has to be kept from it.
    """
    set_linger(sock, LINGER_RESET)


def credentials(sock: RawSocket) -> Credentials | None:
    """Return who connected a Unix socket, as of its connect(2); ``None`` elsewhere."""
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return Credentials(*struct.unpack("iII", raw))


def backlog(sock: socket.socket) -> tuple[int, int] | None:
    """Return how many connections the kernel has queued and how many it would.

    ``None`` where it does not tell: elsewhere than on Linux, and for Unix sockets.

    Source: tcp(7), TCP_INFO; for a listening socket tcpi_unacked and tcpi_sacked.
    """
    if _TCP_INFO is None or sock.family == socket.AF_UNIX:
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 32)
    depth, limit = struct.unpack_from("II", info, 24)
    return depth, limit


def save_syn(sock: socket.socket) -> None:
    """Have the kernel keep the SYN of each connection, for `saved_syn()`; if it can.

    Before listen(2). It costs an allocation of some hundred bytes for each connection,
    which lasts as long as the connection unless the SYN is read: with and without it
    ``make bench`` shows no difference above its noise.
    """
    if _LINUX:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_SAVE_SYN, 1)
        except OSError:
            # A sandbox that is not quite Linux: then it is not known.
            return


def saved_syn(sock: RawSocket) -> bytes:
    """Return the IP and TCP headers of the SYN of a connection, once; ``b""``: unknown.

    Source: tcp(7), TCP_SAVED_SYN.
    """
    if not _LINUX:
        return b""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, _TCP_SAVED_SYN, _SYN_ROOM)
    except OSError:
        # An unknown option; or headers of more than that, which only a caller sends who
        # means it.
        return b""


def apply_flow(sock: RawSocket, flow: FlowSpec, ip: IPv4Address | IPv6Address | None) -> None:
    """Apply *flow* to what *sock* sends to *ip*, and check that it is so.

    Raises:
        QualityOfServiceError: A part cannot be applied; what was, stays.

    Source: socket(7), SO_MAX_PACING_RATE; ip(7), IP_TOS; RFC 3542, 6.5.
    """
    if sock.family == socket.AF_UNIX:
        # It takes SO_MAX_PACING_RATE without a word, and paces nothing.
        raise no_qos(f"a Unix socket has no quality of service: {flow!r}", flow)
    if flow.token_rate is not None:
        part = FlowSpec(token_rate=flow.token_rate)
        if not _LINUX:
            raise no_qos(f"this system cannot pace what it sends: {part!r}", part)
        # In the form of four bytes, 2**32 - 1 would mean no limit.
        _apply(sock, part, (socket.SOL_SOCKET, _SO_MAX_PACING_RATE), flow.token_rate, "@Q")
    if flow.service_type is not None:
        part = FlowSpec(service_type=flow.service_type)
        option = socket.IPPROTO_IP, socket.IP_TOS
        # An IPv6 socket takes either. With an IPv4 caller IPV6_TCLASS does nothing, and
        # with an IPv6 caller IP_TOS does nothing.
        if isinstance(ip, IPv6Address):
            option = socket.IPPROTO_IPV6, socket.IPV6_TCLASS
        _apply(sock, part, option, flow.service_type, "@i")


def _apply(sock: RawSocket, part: FlowSpec, option: tuple[int, int], value: int, form: str) -> None:
    try:
        sock.setsockopt(*option, struct.pack(form, value))
        found = sock.getsockopt(*option, struct.calcsize(form))
    except OSError as error:
        raise no_qos(f"{part!r} cannot be applied: {error.strerror}", part) from error
    now = int.from_bytes(found, sys.byteorder)
    if now != value:
        # Linux before 4.20 keeps four bytes of a rate.
        raise no_qos(f"{part!r} cannot be applied: the kernel made {now} of it", part)


def no_qos(reason: str, flow: FlowSpec) -> QualityOfServiceError:
    """Return the error that says of *flow* that it cannot be applied."""
    error = QualityOfServiceError(reason)
    error.flow = flow
    return error


def apply_options(sock: RawSocket, options: Iterable[Option]) -> None:
    """Set *options* on a socket that connections will be accepted from.

    Raises:
        OSError: The kernel refused one; the message names it.
    """
    for level, name, value in options:
        try:
            sock.setsockopt(level, name, value)
        except OSError as error:
            reason = f"{error.strerror}: socket option {(level, name, value)!r}"
            raise OSError(error.errno, reason) from error
        except OverflowError as error:
            reason = f"{error}: socket option {(level, name, value)!r}"
            raise ValueError(reason) from error


def inherit_options(sock: RawSocket, options: Sequence[Option]) -> None:
    """Set *options*, changed since the handshake, on an accepted socket.

    One that the kernel refuses here is about listening alone (TCP_FASTOPEN: EINVAL).
    """
    for level, name, value in options:
        try:
            sock.setsockopt(level, name, value)
        except OSError:
            continue


def check_options(options: Any) -> tuple[Option, ...]:
    """Return *options* as a tuple, or say what is wrong with them."""
    checked = []
    try:
        options = list(options)
    except TypeError:
        message = f"options are tuples (level, name, value), got {options!r}"
        raise TypeError(message) from None
    for option in options:
        if not isinstance(option, tuple) or len(option) != len(("level", "name", "value")):
            message = f"a socket option is a tuple (level, name, value), got {option!r}"
            raise TypeError(message)
        level, name, value = option
        if not isinstance(level, int) or not isinstance(name, int):
            message = f"level and name of a socket option are integers, got {option!r}"
            raise TypeError(message)
        if not isinstance(value, (int, bytes)):
            message = f"the value of a socket option is an integer or bytes, got {option!r}"
            raise TypeError(message)
        checked.append((level, name, value))
    return tuple(checked)
