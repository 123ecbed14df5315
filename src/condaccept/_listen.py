"""`listen()`: from an address to a `Listener`."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from condaccept._arguments import (
    check_address,
    check_limits,
    check_number,
    check_timeout,
    check_unix,
)
from condaccept._listener import Listener
from condaccept._open import absolute, open_tcp, open_unix, unlink
from condaccept._sockets import check_options
from condaccept.gates import HandshakeGate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from condaccept._capacity import Limit
    from condaccept._exhaustion import OnExhausted
    from condaccept._moving import OnEof, OnFull
    from condaccept._open import Host, UnixPath
    from condaccept._sockets import Option
    from condaccept._stream import Stream

__all__ = ("listen",)

T = TypeVar("T")

INT_MAX: Final = 2**31 - 1


@overload
async def listen(
    host: Host = None,
    port: int | str | None = None,
    *,
    path: UnixPath | None = None,
    mode: int | None = None,
    family: int = socket.AF_UNSPEC,
    backlog: int = 4096,
    options: Iterable[Option] = (),
    reuse_port: bool = False,
    defer_accept: int | None = None,
    max_pending: int | None = 1024,
    on_full: OnFull | None = None,
    max_deciding: int = 128,
    defer_timeout: float | None = 30.0,
    reject_timeout: float | None = 5.0,
    on_eof: OnEof = "keep",
    max_streams: int | Limit | None = None,
    max_starting: int | Limit | None = None,
    exhausted: OnExhausted = "pause",
    stream_factory: None = None,
    conditional_accept: bool = False,
) -> Listener[Stream]: ...
@overload
async def listen(
    host: Host = None,
    port: int | str | None = None,
    *,
    path: UnixPath | None = None,
    mode: int | None = None,
    family: int = socket.AF_UNSPEC,
    backlog: int = 4096,
    options: Iterable[Option] = (),
    reuse_port: bool = False,
    defer_accept: int | None = None,
    max_pending: int | None = 1024,
    on_full: OnFull | None = None,
    max_deciding: int = 128,
    defer_timeout: float | None = 30.0,
    reject_timeout: float | None = 5.0,
    on_eof: OnEof = "keep",
    max_streams: int | Limit | None = None,
    max_starting: int | Limit | None = None,
    exhausted: OnExhausted = "pause",
    stream_factory: Callable[[Stream], T],
    conditional_accept: bool = False,
) -> Listener[T]: ...
async def listen(
    host: Host = None,
    port: int | str | None = None,
    *,
    path: UnixPath | None = None,
    mode: int | None = None,
    family: int = socket.AF_UNSPEC,
    # asyncio's 100 and the classic 128 overflow within milliseconds of a flood; this is
    # what net.core.somaxconn has been since Linux 5.4, which cuts it down where lower.
    backlog: int = 4096,
    options: Iterable[Option] = (),
    reuse_port: bool = False,
    defer_accept: int | None = None,
    # As many as a process may have descriptors by default (RLIMIT_NOFILE, soft: 1024).
    max_pending: int | None = 1024,
    on_full: OnFull | None = None,
    # A hundred outside look-ups at once is what a connection pool holds.
    max_deciding: int = 128,
    # Apache's and HAProxy's usual time for a client that says nothing.
    defer_timeout: float | None = 30.0,
    # nginx's lingering_timeout.
    reject_timeout: float | None = 5.0,
    on_eof: OnEof = "keep",
    max_streams: int | Limit | None = None,
    max_starting: int | Limit | None = None,
    exhausted: OnExhausted = "pause",
    stream_factory: Callable[[Stream], Any] | None = None,
    conditional_accept: bool = False,
) -> Listener[Any]:
    """Listen on an address and return a `Listener`.

    Args:
        host: A name or address, several of them, or ``None`` for all addresses of the
            machine. Every address of a name is listened on.
        port: A number or the name of a service. 0: any free one, the same for all
            addresses.
        path: A Unix socket, in place of *host* and *port*; a leading NUL makes it an
            abstract name. A file left behind by a dead listener is replaced; the file is
            removed by `Listener.close()` if it is still the same.
        mode: Access bits for the file of *path*, set before anybody can connect.
        family: ``AF_INET`` or ``AF_INET6`` to use only these addresses of *host*.
        backlog: How many finished connections the kernel queues.
        options: Socket options, ``(level, name, value)`` each, set before listen(2);
            accepted connections inherit them. TCP_NODELAY is set beforehand, and, on
            Linux, TCP_SAVE_SYN, which `PendingTransport.syn` is read from.
        reuse_port: Share the port with other sockets (SO_REUSEPORT).
        defer_accept: Seconds for which the kernel keeps a connection back until its
            caller has sent something (TCP_DEFER_ACCEPT); ``None``: it does not.
        max_pending: How many connections may be on the deque; at the bound no further one
            is taken, and the kernel's backlog holds the rest. ``None``: no limit.
        on_full: What to do at that bound. ``"wait"``: nothing is taken.
            ``"expire_oldest"`` makes room by expiring the oldest deferred connection.
            ``None``: the first under `accept()`, where there never is one to expire,
            since it would be offered first; the second under `streams()` and `serve()`.
        max_deciding: How many async decisions may be under way at once.
        defer_timeout: Seconds from the first deferral to a verdict; then the connection
            is closed as expired. ``None``: no limit.
        reject_timeout: Seconds that a rejected caller is given to read callee data.
            ``None``: no limit.
        on_eof: What a FIN before the verdict means. ``"keep"``: nothing, it may be a
            half-close. ``"withdraw"``: the caller has left; the connection expires.
        max_streams: How many streams may be open; a number, or a `Limit`, which says what
            happens to the next caller. Can be changed later, as the next can.
        max_starting: How many of them may not have said `Stream.started()` yet: bounds
            those who connect and do not log in.
        exhausted: What `streams()` and `serve()` do without descriptors. ``"pause"``:
            wait for one. ``"shed_oldest_deferred"``: expire the oldest deferred connection.
        stream_factory: Called with each new `Stream`; its result is what `accept()`
            returns, and what `streams()` and `serve()` give out. If it raises, that
            connection is reset and counted as failed; `accept()` raises the same,
            `streams()` and `serve()` log it.
        conditional_accept: Ask the condition before the handshake. Not available yet.

    Raises:
        OSError: The address cannot be resolved, bound or listened on, or an option cannot
            be set; the message says which. Nothing is left open.
        TypeError, ValueError: An argument is not what it should be, which the message says.

    Source: getaddrinfo(3), bind(2), listen(2), tcp(7), unix(7).
    """
    checked = check_options(options)
    check_timeout("reject_timeout", reject_timeout)
    check_limits(
        max_pending,
        max_deciding,
        defer_timeout,
        on_full,
        on_eof=on_eof,
        max_streams=max_streams,
        max_starting=max_starting,
        exhausted=exhausted,
    )
    hosts = check_address(host, port, path)
    for name, number, most in (
        ("backlog", backlog, INT_MAX),
        ("defer_accept", defer_accept, INT_MAX),
        ("mode", mode, 0o7777),
    ):
        check_number(name, number, most)
    if conditional_accept:
        message = "conditional_accept needs a gate before the handshake, which is not there yet"
        raise NotImplementedError(message)
    loop = asyncio.get_running_loop()
    inode = lingers = None
    if path is not None:
        check_unix(host, port, family, reuse_port=reuse_port, defer_accept=defer_accept)
        sock, inode = open_unix(path, mode=mode, backlog=backlog, options=checked)
        sockets = [sock]
    else:
        if port is None:
            message = "listen() needs a port, or path= for a Unix socket"
            raise ValueError(message)
        if mode is not None:
            message = "mode is for the file of a Unix socket: give path="
            raise ValueError(message)
        sockets, lingers = await open_tcp(
            loop,
            hosts,
            port,
            family=family,
            backlog=backlog,
            options=checked,
            reuse_port=reuse_port,
            defer_accept=defer_accept,
        )
    try:
        listener: Listener[Any] = Listener(
            lambda loop, watch: HandshakeGate(
                loop, watch, sockets, reject_timeout=reject_timeout, lingers=lingers
            ),
            stream_factory=stream_factory,
            max_pending=max_pending,
            on_full=on_full,
            max_deciding=max_deciding,
            defer_timeout=defer_timeout,
            on_eof=on_eof,
            max_streams=max_streams,
            max_starting=max_starting,
            exhausted=exhausted,
        )
    except BaseException:
        for sock in sockets:
            sock.close()
        if path is not None and inode is not None:
            unlink(os.fspath(path), inode)
        raise
    if path is not None and inode is not None:
        listener._file = absolute(path), inode
    return listener
