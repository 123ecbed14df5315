"""From the arguments of `listen()` to listening sockets."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from condaccept._sockets import Option, apply_options, inherit_reset, linger

if TYPE_CHECKING:
    import asyncio

__all__ = ("Host", "UnixPath", "absolute", "open_tcp", "open_unix", "unlink")

Host: TypeAlias = str | Iterable[str] | None
UnixPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

PORT_TRIES: Final = 16
"""How often another number is tried when the one the kernel chose for the first address
is taken on another."""

_REUSE: Final = (socket.SOL_SOCKET, socket.SO_REUSEADDR)

AddressInfo: TypeAlias = tuple[int, Any]


async def open_tcp(
    loop: asyncio.AbstractEventLoop,
    hosts: Sequence[str | None],
    port: int | str,
    *,
    family: int,
    backlog: int,
    options: Sequence[Option],
    reuse_port: bool,
    defer_accept: int | None,
) -> tuple[list[socket.socket], list[bytes] | None]:
    """Bind and listen on every address of *hosts*; all on one port number.

    On Linux connections inherit from the sockets that closing them is a reset; then the
    SO_LINGER that each socket was to have is returned, too.

    Raises:
        OSError: An address could not be resolved or bound, which the message names; what
            had been opened is closed.
    """
    addresses = await _resolve(loop, hosts, port, family)
    options = [*_tcp_options(reuse_port=reuse_port, defer_accept=defer_accept), *options]
    several = len(addresses) > 1 and addresses[0][1][1] == 0
    for attempt in range(PORT_TRIES if several else 1):
        sockets: list[socket.socket] = []
        try:
            _bind_all(sockets, addresses, options)
            lingers = None
            if sys.platform == "linux":
                lingers = [linger(sock) for sock in sockets]
                for sock in sockets:
                    inherit_reset(sock)
            for sock in sockets:
                _listen(sock, backlog)
        except BaseException as error:
            for sock in sockets:
                sock.close()
            if not isinstance(error, OSError):
                raise
            if several and error.errno == errno.EADDRINUSE and attempt < PORT_TRIES - 1:
                continue
            raise
        return sockets, lingers
    raise AssertionError


async def _resolve(
    loop: asyncio.AbstractEventLoop, hosts: Sequence[str | None], port: int | str, family: int
) -> list[AddressInfo]:
    found: dict[AddressInfo, None] = {}
    for each in hosts:
        # "" is every address, as for asyncio.
        try:
            infos = await loop.getaddrinfo(
                each or None, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except socket.gaierror as error:
            reason = f"cannot resolve host {each!r}, port {port!r}: {error.strerror}"
            raise socket.gaierror(error.errno, reason) from error
        found.update(dict.fromkeys((int(info[0]), info[4]) for info in infos))
    return list(found)


def _tcp_options(*, reuse_port: bool, defer_accept: int | None) -> list[Option]:
    # SO_REUSEADDR: a restart must not wait for the connections of the last run.
    # TCP_NODELAY is inherited, and what asyncio sets on its own connections.
    options: list[Option] = [
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ]
    if reuse_port:
        options.append((socket.SOL_SOCKET, socket.SO_REUSEPORT, 1))
    if defer_accept is not None:
        options.append((socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, defer_accept))
    return options


def _listen(sock: socket.socket, backlog: int) -> None:
    try:
        sock.listen(backlog)
    except OSError as error:
        reason = f"cannot listen on {sock.getsockname()!r}: {error.strerror}"
        raise OSError(error.errno, reason) from error


def _bind_all(
    sockets: list[socket.socket], addresses: Sequence[AddressInfo], options: Sequence[Option]
) -> None:
    number: int | None = None
    unsupported: OSError | None = None
    for family, address in addresses:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        except OSError as error:
            # A name may have addresses of a family this kernel was built without.
            if error.errno != errno.EAFNOSUPPORT:
                raise
            unsupported = error
            continue
        sockets.append(sock)
        _prepare(sock, options)
        to = address
        if number is not None and address[1] == 0:
            to = (address[0], number, *address[2:])
        try:
            _bind(sock, to, options)
        except OSError as error:
            skip = family == socket.AF_INET6 and len(addresses) > 1
            if skip and error.errno == errno.EADDRNOTAVAIL:
                # "localhost" names ::1 on machines whose loopback has no IPv6 address.
                sockets.pop().close()
                unsupported = error
                continue
            raise OSError(error.errno, f"cannot bind {to!r}: {error.strerror}") from error
        if number is None:
            number = sock.getsockname()[1]
    if not sockets:
        raise unsupported or OSError(errno.EADDRNOTAVAIL, "the name has no address")


def _bind(sock: socket.socket, to: Any, options: Sequence[Option]) -> None:
    """Bind *sock*; a number that the kernel chooses is its own as if it had been asked for.

    Linux takes a number of its own choice away again when the socket is shut down, and the
    next listen(2) would be on another one. So another socket has the kernel choose, and
    keeps the number from everybody until ours has been bound to it. Without SO_REUSEADDR
    two sockets cannot be bound to it; then ours is never shut down either.
    """
    if to[1] != 0 or sys.platform != "linux" or not sock.getsockopt(*_REUSE):
        sock.bind(to)
        return
    with socket.socket(sock.family, sock.type, sock.proto) as chooser:
        _prepare(chooser, options)
        chooser.bind(to)
        sock.bind((to[0], chooser.getsockname()[1], *to[2:]))


def _prepare(sock: socket.socket, options: Sequence[Option]) -> None:
    if sock.family == socket.AF_INET6:
        # Each family has its own socket: without this the second bind fails.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    apply_options(sock, options)


def open_unix(
    path: UnixPath, *, mode: int | None, backlog: int, options: Sequence[Option]
) -> tuple[socket.socket, tuple[int, int] | None]:
    """Bind and listen on *path*; also return device and inode of the file, if it is one.

    A file that a listener left behind is replaced if nobody answers on it.

    Raises:
        OSError: *path* is in use, is something else than a socket, or cannot be bound.
    """
    name = os.fspath(path)
    is_file = bool(name) and name[:1] not in ("\0", b"\0")
    if mode is not None and not is_file:
        message = "mode is for a file: an abstract name has no access bits, anybody can connect"
        raise ValueError(message)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    inode = None
    try:
        apply_options(sock, options)
        if is_file:
            _clear(name)
        try:
            sock.bind(name)
        except OSError as error:
            # Python's own "AF_UNIX path too long" has neither errno nor strerror.
            reason = f"cannot bind {name!r}: {error.strerror or error}"
            raise OSError(error.errno or errno.ENAMETOOLONG, reason) from error
        if is_file:
            status = os.stat(name)
            inode = status.st_dev, status.st_ino
            if mode is not None:
                # Before listen(): until then nobody can connect, whatever the umask was.
                os.chmod(name, mode)
        _listen(sock, backlog)
    except BaseException:
        sock.close()
        if inode is not None:
            unlink(name, inode)
        raise
    return sock, inode


def _clear(name: str | bytes) -> None:
    """Remove the file of a listener that is no more."""
    try:
        if not stat.S_ISSOCK(os.stat(name).st_mode):
            reason = f"cannot bind {name!r}: the file is there and is no socket"
            raise FileExistsError(errno.EEXIST, reason)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(name)
            return
        except OSError:
            # EAGAIN: it answers, its backlog is full. Anything else: not ours to remove.
            pass
    raise OSError(errno.EADDRINUSE, f"cannot bind {name!r}: somebody listens there")


def absolute(path: UnixPath) -> str | bytes:
    """Return the name of a socket's file for later, from whatever directory."""
    return os.path.abspath(os.fspath(path))


def unlink(name: str | bytes, inode: tuple[int, int]) -> None:
    """Remove a socket's file, if it is still the one that was bound."""
    try:
        status = os.stat(name)
        if (status.st_dev, status.st_ino) == inode:
            os.unlink(name)
    except OSError:
        # Gone, or not ours to remove: closing goes on.
        return
