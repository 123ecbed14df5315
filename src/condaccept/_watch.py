"""One place that tells when a descriptor has something new.

The loop's own readers are level-triggered: between waking a task and that task's read
they report the same bytes again, and a reader left on a queue that nobody may take from
spins. What is here is edge-triggered: *callback(events)* is called when something new has
come, and not again before the consumer has met EAGAIN and said so with `dry()`.

Goals: nothing spins; nothing is lost between two calls; what a callback does to other
registrations of the same batch is safe.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

if TYPE_CHECKING:
    import asyncio

__all__ = ("HANGUP", "READ", "URGENT", "WRITE", "EpollWatch", "ReaderWatch", "Watch", "open_watch")

URGENT: Final = 0x002
"""An urgent byte has come: EPOLLPRI. Always watched for."""
READ: Final = 0x001
"""Something to read, or to accept: EPOLLIN."""
WRITE: Final = 0x004
"""Room to send: EPOLLOUT."""
HANGUP: Final = 0x2000 | 0x008 | 0x010
"""The peer sends no more, or is gone: EPOLLRDHUP, EPOLLERR, EPOLLHUP."""

_ALWAYS: Final[int] = (
    getattr(select, "EPOLLPRI", 0)
    | getattr(select, "EPOLLRDHUP", 0)
    | getattr(select, "EPOLLET", 0)
)
BATCH: Final = 64
"""Events handled before the loop's other readers have their turn; `select.epoll` asks for
at least as many by itself, libuv for 1024."""

Callback: TypeAlias = Callable[[int], object]


class Watch(Protocol):
    """Tells of descriptors; shared by a listener, its undecided connections, its streams."""

    tells_hangup: bool
    """Whether a hangup, or an urgent byte, can be watched for by itself, without reading."""
    tells_edges: bool
    """Whether the next edge comes by itself: then `dry()` has nothing to do."""
    needed: set[object]
    """What has to live as long as the watch does, though nobody else may have it: streams
    that somebody waits on, that have something to send or someone to tell. asyncio has but
    weak references to tasks; one that waits would be collected together with its stream."""
    waiting: dict[int, asyncio.Future[None]]
    """Who is to be woken by an edge of READ and nothing else, in place of the callback, where
    `tells_edges`: a call less for each edge. Taken out by that; one that is done is ignored."""

    def release(self) -> None:
        """Note that its listener is gone: it closes itself while nothing is registered."""

    def register(self, fd: int, events: int, callback: Callback) -> None:
        """Call *callback* with what is new on *fd*, beginning with what is there."""

    def modify(self, fd: int, events: int) -> None:
        """Watch for *events* instead, beginning with what is there."""

    def unregister(self, fd: int) -> None:
        """Forget *fd*; before its descriptor is closed or given away."""

    def dry(self, fd: int) -> None:
        """Note that a read, or an accept, has met EAGAIN."""

    def full(self, fd: int) -> None:
        """Note that a send has met EAGAIN, on a descriptor that is watched for WRITE."""


class EpollWatch:
    """An epoll set of our own, whose descriptor is what the loop sees.

    Source: epoll(7), "Level-triggered and edge-triggered".
    """

    tells_hangup = True
    tells_edges = True

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.needed: set[object] = set()
        self.waiting: dict[int, asyncio.Future[None]] = {}
        self._owned = True
        self._callbacks: dict[int, Callback] = {}
        # Made at once: without a free descriptor it could not be made later.
        self._epoll: select.epoll | None = None
        self._open()

    def release(self) -> None:
        self._owned = False
        self._close_if_idle()

    def register(self, fd: int, events: int, callback: Callback) -> None:
        self._open().register(fd, events | _ALWAYS)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        self._open().modify(fd, events | _ALWAYS)

    def unregister(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is None or self._epoll is None:
            return
        self.waiting.pop(fd, None)
        try:
            self._epoll.unregister(fd)
        except OSError:
            # Closed behind our back: the kernel has taken it out by itself.
            pass
        self._close_if_idle()

    def dry(self, fd: int) -> None:
        """Nothing to do: the next edge comes by itself."""

    def full(self, fd: int) -> None:
        """Nothing to do, as above.

        A `modify()` would tell at once of a peer that sends no more: of that for ever.
        """

    def _open(self) -> select.epoll:
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop.add_reader(self._epoll.fileno(), self._dispatch)
        return self._epoll

    def _close_if_idle(self) -> None:
        if not self._owned and not self._callbacks and self._epoll is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _dispatch(self) -> None:
        if self._epoll is None:
            return
        callbacks = self._callbacks
        waiting = self.waiting
        # The whole batch is mapped to callbacks before the first is called: one of them
        # may close a descriptor whose number the next connection gets. Waking a future calls
        # nobody yet.
        batch = []
        for fd, events in self._epoll.poll(0, BATCH):
            if (
                events == READ
                and (reader := waiting.pop(fd, None)) is not None
                and not reader.done()
            ):
                reader.set_result(None)
            else:
                batch.append((fd, events, callbacks.get(fd)))
        for fd, events, callback in batch:
            if callback is not None and callbacks.get(fd) is callback:
                callback(events)


class ReaderWatch:
    """The same over the loop's own readers and writers, where there is no epoll.

    Each is taken off when it has fired, and put back by `dry()` or `modify()`. A hangup
    cannot be told from data here, so watching for it alone tells nothing; an urgent byte is
    not told at all. Nor can a second
    newcomer in a queue that nobody takes from, while the first is still there.
    """

    tells_hangup = False
    tells_edges = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.needed: set[object] = set()
        self.waiting: dict[int, asyncio.Future[None]] = {}
        self._callbacks: dict[int, Callback] = {}

    def release(self) -> None:
        """Nothing to do: there is no descriptor of its own."""

    def register(self, fd: int, events: int, callback: Callback) -> None:
        self._callbacks[fd] = callback
        self.modify(fd, events)

    def modify(self, fd: int, events: int) -> None:
        if events & READ:
            self._loop.add_reader(fd, self._readable, fd)
        else:
            self._loop.remove_reader(fd)
        if events & WRITE:
            self._loop.add_writer(fd, self._writable, fd)
        else:
            self._loop.remove_writer(fd)

    def unregister(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)

    def dry(self, fd: int) -> None:
        self._loop.add_reader(fd, self._readable, fd)

    def full(self, fd: int) -> None:
        self._loop.add_writer(fd, self._writable, fd)

    def _readable(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._callbacks[fd](READ)

    def _writable(self, fd: int) -> None:
        self._loop.remove_writer(fd)
        self._callbacks[fd](WRITE)


def open_watch(loop: asyncio.AbstractEventLoop) -> Watch:
    """Return the best kind of watch for this system."""
    if sys.platform == "linux":
        return EpollWatch(loop)
    return ReaderWatch(loop)  # pragma: no cover - not Linux
