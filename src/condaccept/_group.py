"""Accepted connections that are open: all of a listener's, and named groups of them."""

from __future__ import annotations

import socket
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING

from condaccept._qos import FlowSpec
from condaccept._sockets import no_qos

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from condaccept._capacity import Place
    from condaccept._stream import Stream

__all__ = ("Groups", "OpenStreams", "StreamGroup")


class OpenStreams:
    """Connections that were accepted and are open; ``len()`` says how many.

    A connection is counted from its accept until its descriptor is closed, also when
    nobody holds its stream any more, or a transport of the loop has it.
    """

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: dict[Place, weakref.ref[Stream]] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams of these connections that are alive, in the order of their accepts."""
        found = [each() for each in self._streams.values()]
        return tuple(stream for stream in found if stream is not None)

    def close(self) -> None:
        """Close each stream, or the transport that has its connection.

        What it has not sent yet goes out first, in the background.
        """
        for stream in self.streams:
            (stream._attachment or stream).close()

    def abort(self) -> None:
        """Reset each connection; a transport that has one is aborted."""
        self._abort(None)

    def _abort(self, own: Stream | None) -> None:
        for stream in self.streams:
            if stream is not own:
                (stream._attachment or stream).abort()

    def _add(self, place: Place, stream: Stream) -> None:
        self._streams[place] = weakref.ref(stream)

    def others(self, own: Stream | None) -> bool:
        """Whether a connection is open whose stream is not *own*."""
        return any(own is None or each() is not own for each in self._streams.values())

    def _discard(self, place: Place) -> None:
        self._streams.pop(place, None)


class StreamGroup(OpenStreams):
    """A named group of a listener's streams, with what they have in common.

    Made by `Listener.group()`. A connection whose condition sets ``pending.group`` to the
    group's name is in it from its ACCEPT until its descriptor is closed.
    ``len()`` says how many are; `close()` and `abort()` end those that are in it now, also
    when the listener is closed already, and the group stays for later ones.

    Attributes:
        name: What conditions call it.
        qos: Applied to what is sent on each of its connections, unless the condition asks
            for something else; ``None``: nothing.

    Source: the parameters g and lpGQOS of WSPAccept.
    """

    __slots__ = ("name", "qos")

    def __init__(self, name: str, qos: FlowSpec | None) -> None:
        super().__init__()
        self.name = name
        self.qos = qos

    def __bool__(self) -> bool:
        """Whether there is such a group: always. ``len()`` tells whether it is empty."""
        return True

    def __repr__(self) -> str:
        return f"<StreamGroup {self.name!r} open={len(self)} qos={self.qos!r}>"


class Groups:
    """The groups of one listener, by name.

    *families* are those of the listening sockets, none for a gate without any.
    """

    def __init__(self, families: Iterable[int]) -> None:
        self._unix = set(families) == {socket.AF_UNIX}
        self._groups: dict[str, StreamGroup] = {}
        self.mapping: Mapping[str, StreamGroup] = MappingProxyType(self._groups)

    def open(self, name: str, qos: FlowSpec | None) -> StreamGroup:
        """See `Listener.group()`."""
        if not isinstance(name, str):
            message = f"the name of a group is text, got {name!r}"
            raise TypeError(message)
        if qos is not None and not isinstance(qos, FlowSpec):
            message = f"the qos of a group is a FlowSpec or None, got {qos!r}"
            raise TypeError(message)
        if not name:
            message = "the name of a group cannot be empty"
            raise ValueError(message)
        group = self._groups.get(name)
        if group is None:
            if qos is not None and self._unix:
                raise no_qos(f"a Unix socket has no quality of service: {qos!r}", qos)
            group = self._groups[name] = StreamGroup(name, qos)
        elif qos is not None and qos != group.qos:
            message = f"there is a group {name!r} with another qos: {group.qos!r}, not {qos!r}"
            raise ValueError(message)
        return group

    def find(self, name: object) -> StreamGroup | None:
        """Return the group that a condition has named, if there is one."""
        return self._groups.get(name) if isinstance(name, str) else None

    def qos(self, name: object) -> FlowSpec | None:
        """Return the flow spec of the group that a condition has named, if there is one."""
        group = self.find(name)
        return None if group is None else group.qos
