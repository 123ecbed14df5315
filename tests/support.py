"""What several test modules need: conditions, waiting for events, and the wire's view."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from condaccept import ACCEPT, DEFER, REJECT, AnyVerdict, Listener, PendingTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

LIMIT = 10.0
"""Seconds after which an event that has to come counts as missing."""


class Dial(Protocol):
    """The `dial` fixture."""

    def __call__(self, to: Listener[Any] | Any, *, data: bytes = b"") -> socket.socket:
        """Connect to a listener, or to an address, and send *data*."""


def accept(_pending: PendingTransport) -> AnyVerdict:
    """Say ACCEPT."""
    return ACCEPT


def reject(_pending: PendingTransport) -> AnyVerdict:
    """Say REJECT."""
    return REJECT


def defer(_pending: PendingTransport) -> AnyVerdict:
    """Say DEFER."""
    return DEFER


class Condition:
    """Says one verdict after the other, and keeps what it was offered."""

    def __init__(self, *verdicts: AnyVerdict) -> None:
        self._verdicts = list(verdicts)
        self.offered: list[Any] = []

    def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Note the offer and say the next verdict."""
        self.offered.append(pending.caller_id)
        return self._verdicts.pop(0)


async def until(predicate: Callable[[], object]) -> None:
    """Let the loop turn until *predicate* holds."""
    async with asyncio.timeout(LIMIT):
        while not predicate():  # noqa: ASYNC110 - kernels and loops set no Event
            await asyncio.sleep(0)


async def queued(listener: Listener[Any], n: int) -> None:
    """Wait until the kernel has queued *n* finished connections for a TCP listener."""
    await until(lambda: listener.statistics().backlog == n)


def reset(client: socket.socket) -> None:
    """Close *client* so that the other end is reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def wire(client: socket.socket) -> str | bytes:
    """Read once from *client*: the bytes, or ``"eof"``, ``"reset"`` or ``"open"`` (nothing yet).

    Never waits. Loopback delivers while the other side's call is still running, so after
    that call what it sent has come.
    """
    timeout = client.gettimeout()
    client.settimeout(0)  # with another, recv() waits whatever its flags say
    try:
        return client.recv(65536) or "eof"
    except BlockingIOError:
        return "open"
    except ConnectionResetError:
        return "reset"
    finally:
        client.settimeout(timeout)


async def wire_end(client: socket.socket) -> str | bytes:
    """Wait until *client* has something to read, or the end; then see `wire()`."""
    seen: list[str | bytes] = []

    def arrived() -> bool:
        seen[:] = [wire(client)]
        return seen[0] != "open"

    await until(arrived)
    return seen[0]


async def turns(n: int = 20) -> None:
    """Let the loop turn *n* times: what loopback has delivered is told within three."""
    for _ in range(n):
        await asyncio.sleep(0)


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def inode(path: str | bytes) -> int:
    """Return the inode of a file."""
    return os.stat(path).st_ino


async def caught_up() -> None:
    """Return when the loop has acted on everything the kernel had to tell by now.

    For what must *not* happen: an event that had to come would have come before this.
    """
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    with ours, theirs:
        loop.add_reader(ours, told.set)
        theirs.send(b"x")
        await told.wait()
        loop.remove_reader(ours)
    # What others were told in the same turn has been scheduled, and runs in this one.
    await asyncio.sleep(0)


def logged(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """What this library has logged; in debug mode asyncio tells of a slow machine, too."""
    return [record for record in caplog.records if record.name == "condaccept"]


def somaxconn() -> int:
    """Return the longest backlog that the kernel grants."""
    return int(Path("/proc/sys/net/core/somaxconn").read_text())
