"""What is refused of the arguments of `listen()` and `Listener`, before anything is opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from condaccept._capacity import as_limit

if TYPE_CHECKING:
    from condaccept._capacity import Limit
    from condaccept._exhaustion import OnExhausted
    from condaccept._moving import OnEof, OnFull
    from condaccept._open import Host

__all__ = ("check_address", "check_limits", "check_number", "check_timeout", "check_unix")


def check_address(host: object, port: object, path: object) -> list[str | None]:
    hosts = [host] if host is None or isinstance(host, str) else host
    if isinstance(hosts, bytes) or not isinstance(hosts, Iterable):
        message = f"host is a name, an address, a sequence of them or None; got {host!r}"
        raise TypeError(message)
    hosts = list(hosts)
    for each in hosts:
        if each is not None and not isinstance(each, str):
            message = f"host is a name, an address, a sequence of them or None; got {host!r}"
            raise TypeError(message)
    if port is not None and not isinstance(port, str):
        # getaddrinfo(3) would take the number modulo 65536.
        check_number("port", port, 65535)
    if path is not None and not isinstance(path, (str, bytes, os.PathLike)):
        message = f"path is the name of a Unix socket, got {path!r}"
        raise TypeError(message)
    return hosts


def check_number(name: str, value: object, most: int) -> None:
    if value is None and name != "backlog":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name} is an integer, got {value!r}"
        raise TypeError(message)
    if not 0 <= value <= most:
        message = f"{name} is between 0 and {most}, got {value!r}"
        raise ValueError(message)


def check_unix(
    host: Host, port: int | str | None, family: int, *, reuse_port: bool, defer_accept: int | None
) -> None:
    if host is not None or port is not None:
        message = "path is instead of host and port: give one or the other"
        raise ValueError(message)
    if family not in (socket.AF_UNSPEC, socket.AF_UNIX):
        message = f"path is the name of a Unix socket, whose family is not {family!r}"
        raise ValueError(message)
    if reuse_port or defer_accept is not None:
        message = "reuse_port and defer_accept are for TCP: a Unix socket has neither"
        raise ValueError(message)


def check_timeout(name: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        message = f"{name} is a number of seconds, or None for no limit; got {value!r}"
        raise TypeError(message)
    if not value >= 0:
        message = f"{name} cannot be negative, got {value!r}"
        raise ValueError(message)


def check_limits(
    max_pending: int | None,
    max_deciding: int,
    defer_timeout: float | None,
    on_full: OnFull | None,
    *,
    on_eof: OnEof,
    max_streams: int | Limit | None,
    max_starting: int | Limit | None,
    exhausted: OnExhausted,
) -> None:
    """Check what `listen()`, `from_socket()` and `Listener` have in common."""
    check_timeout("defer_timeout", defer_timeout)
    for name, limit in (("max_pending", max_pending), ("max_deciding", max_deciding)):
        if limit is None and name == "max_pending":
            continue
        if isinstance(limit, bool) or not isinstance(limit, int):
            message = f"{name} is a number of connections, got {limit!r}"
            raise TypeError(message)
        if limit < 1:
            message = f"{name} is at least 1, or nothing could ever be decided; got {limit!r}"
            raise ValueError(message)
    if on_full not in (None, "wait", "expire_oldest"):
        message = f"on_full is 'wait' or 'expire_oldest', got {on_full!r}"
        raise ValueError(message)
    if on_eof not in ("keep", "withdraw"):
        message = f"on_eof is 'keep' or 'withdraw', got {on_eof!r}"
        raise ValueError(message)
    if exhausted not in ("pause", "shed_oldest_deferred"):
        message = f"exhausted is 'pause' or 'shed_oldest_deferred', got {exhausted!r}"
        raise ValueError(message)
    as_limit("max_streams", max_streams)
    as_limit("max_starting", max_starting)
