"""From ACCEPT to a stream, and to the end of its descriptor."""

from __future__ import annotations

import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from condaccept._capacity import Place
from condaccept._group import Groups, OpenStreams
from condaccept._moving import IN_HAND, LOSSES, closed_error
from condaccept._pending import ACCEPTED, Peer, PendingTransport, Status
from condaccept._sockets import OwnedSocket, apply_flow, inherit_options, peer, reset
from condaccept._stream import Stream
from condaccept._taking import Taking
from condaccept.exceptions import AcceptError, InvalidGroupError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from condaccept._capacity import Capacity
    from condaccept._delivery import Delivery
    from condaccept._events import Signals
    from condaccept._group import StreamGroup
    from condaccept._ledger import Ledger
    from condaccept._moving import OnEof, OnFull
    from condaccept._pending import PendingDeque, Release
    from condaccept._qos import FlowSpec
    from condaccept._sockets import Option
    from condaccept._verdict import Accept
    from condaccept._watch import Watch
    from condaccept.gates._gate import Gate

__all__ = ("TO_COME", "Admitting")

T = TypeVar("T")

TO_COME: Final = object()
"""In the place of a stream: it is on the deque, accepted, and has still to come or to be
given out."""


class Admitting(Taking, Generic[T]):
    """Makes streams of accepted connections, and knows which of them are open.

    Attributes:
        groups: The listener's groups of streams.
        options: Socket options set after the listener began.
        aborted: Whether the streams were aborted.
    """

    __slots__ = (
        "_delivery",
        "_signals",
        "_stream_factory",
        "_streams",
        "_thread",
        "_watch",
        "aborted",
        "groups",
        "options",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        gate: Gate[Any],
        *,
        pending: PendingDeque,
        ledger: Ledger,
        signals: Signals,
        delivery: Delivery,
        stream_factory: Callable[[Stream], T] | None,
        on_full: OnFull | None,
        on_eof: OnEof,
        capacity: Capacity,
    ) -> None:
        super().__init__(
            loop, gate, pending, ledger, on_full=on_full, on_eof=on_eof, capacity=capacity
        )
        self._watch = watch
        self._signals = signals
        self._delivery = delivery
        self._stream_factory = stream_factory
        self._streams = OpenStreams()
        self._thread = threading.get_ident()
        self.groups = Groups(sock.family for sock in self._gate.sockets)
        self.options: list[Option] = []
        self.aborted = False
        capacity.freed = self._freed

    def _accept(self, pending: PendingTransport, accept: Accept, *, deliver: bool) -> object:
        if pending.group is not None and self.groups.find(pending.group) is None:
            raise _no_group(pending)
        admission = self._gate.admit(pending._arrival)
        pending._offered = False
        pending._reason = accept.reason
        # Counted from here, until the descriptor is closed or what is held is released.
        place = pending._place = Place(self.capacity)
        if self.capacity.limited:
            self._limit_reached()
        if isinstance(admission, OwnedSocket):
            if deliver or self.closed:
                return self._deliver(pending, admission, place)
            self._to(pending, Status.ADMITTED)
            pending._stay.socket = admission
            self._to(pending, Status.READY)
            self.consumer.became_due(pending)
            return TO_COME
        self._to(pending, Status.ADMITTED)
        pending._stay.socket = admission
        if self.closed:
            self._drop(pending)
            raise closed_error(pending)
        admission.add_done_callback(partial(self._came, pending))
        self.consumer.left_place()
        return TO_COME

    def _limit_reached(self) -> None:
        full = self.capacity.overflow()
        if full is not None and full[0] != "queue":
            self._loop.call_soon(self._overflow)

    # -- admissions that take time

    def _came(self, pending: PendingTransport, admission: asyncio.Future[OwnedSocket]) -> None:
        """Note what has become of an admission."""
        lost = admission.cancelled() or admission.exception() is not None
        if pending._status is not Status.ADMITTED:
            if not lost:
                reset(admission.result())
            return
        if lost:
            pending._stay.socket = None
            self._book(pending, Status.RESET, "the caller left before the connection was complete")
            self._freed()
        else:
            pending._stay.socket = admission.result()
            self._to(pending, Status.READY)
        if pending._stay.taker is None:
            self.consumer.became_due(pending)
        elif not pending._stay.taker.done():
            pending._stay.taker.set_result(None)

    async def completed(self, pending: PendingTransport) -> object:
        """Wait until the gate has produced the socket of an accepted connection."""
        taker = pending._stay.taker = self._loop.create_future()
        try:
            await taker
        except BaseException:
            pending._stay.taker = None
            if pending._status is Status.READY or pending._status in LOSSES:
                # It came in the very turn of the cancellation: somebody else has to know.
                self.consumer.became_due(pending)
            raise
        pending._stay.taker = None
        if self.closed:
            raise closed_error(pending)
        return self.unasked(pending)

    def still_there(self, ready: PendingTransport) -> bool:
        """Whether the caller of an accepted connection that nobody has taken yet is there."""
        sock = ready._stay.socket
        if peer(sock, tcp=sock.proto == socket.IPPROTO_TCP) is not Peer.GONE:
            return True
        ready._stay.socket = None
        reset(sock)
        self._book(ready, Status.RESET, "the peer reset the connection before it was taken")
        self._freed()
        return False

    def unasked(self, pending: PendingTransport) -> object:
        """Act on what needs no condition: a loss to report, a connection that is ready."""
        if pending._status in LOSSES:
            raise self._report(pending)
        sock, pending._stay.socket = pending._stay.socket, None
        return self._deliver(pending, sock, pending._place)

    # -- the stream

    def _deliver(
        self, pending: PendingTransport, sock: OwnedSocket, place: Place
    ) -> tuple[Stream, object]:
        """Make the stream of an accepted connection; also return what becomes of it."""
        if pending._kept:
            pending._stay.taker = IN_HAND
        pending._place = group = None
        holds: list[Release] = [] if pending._holds is None else pending._release_holds()
        if pending.group is not None and (group := self.groups.find(pending.group)) is not None:
            # First, so that what is released can count on the place in the group.
            holds.insert(0, partial(group._discard, place))
        sock.own(partial(self._over, place, holds), self._forgotten)
        if self.options:
            inherit_options(sock, self.options)
        if pending._sqos is not None or pending.group is not None:
            self._apply_qos(pending, sock, group)
        try:
            stream = Stream(
                sock,
                self._loop,
                self._watch,
                self._delivery,
                pending._arrival.caller_id,
                inherited=self._signals.subscriptions,
            )
        except OSError as error:
            # The watch has no room for it.
            self._fail(pending, f"the stream could not be made: {error}")
            sock.close()
            raise
        stream.state = pending.state
        stream._place = place
        self._streams._add(place, stream)
        if group is not None:
            group._add(place, stream)
        if pending._callee_data:
            _send_callee_data(stream, bytes(pending._callee_data))
        factory = self._stream_factory
        result = stream if factory is None else self._made(factory, stream, pending)
        if pending._kept:
            self._to(pending, ACCEPTED)
        else:
            pending._status = ACCEPTED  # a newcomer may go anywhere
        self._ledger.settle(pending, ACCEPTED, pending._reason)
        return stream, result

    def _made(
        self, factory: Callable[[Stream], object], stream: Stream, pending: PendingTransport
    ) -> object:
        """Return what ``stream_factory`` makes of a new stream."""
        try:
            return factory(stream)
        except BaseException as error:
            self._fail(pending, f"stream_factory raised {error!r}")
            stream.abort()
            raise

    def _apply_qos(
        self, pending: PendingTransport, sock: OwnedSocket, group: StreamGroup | None
    ) -> None:
        """Apply the flow spec that the condition asked for, or else its group's."""
        try:
            if group is None and pending.group is not None:
                # Named between the verdict and the end of a slow admission.
                raise _no_group(pending)
            flow = None if pending._sqos is None else pending._sqos.sending
            if flow is None and group is not None:
                flow = group.qos
            if flow is not None:
                apply_flow(sock, flow, pending.ip)
        except AcceptError as error:
            error.caller_id = pending.caller_id
            self._fail(pending, error.reason)
            reset(sock)
            raise

    def _fail(self, pending: PendingTransport, reason: str) -> None:
        self._to(pending, Status.FAILED)
        self._ledger.settle(pending, Status.FAILED, reason)

    def group_qos(self, name: object) -> FlowSpec | None:
        """See `PendingTransport.gqos`."""
        return self.groups.qos(name)

    # -- its end

    def _over(self, place: Place, holds: Sequence[Release]) -> None:
        """Note that an accepted connection's descriptor is gone."""
        if threading.get_ident() != self._thread and not self._loop.is_closed():
            # Collected as garbage, wherever the collector ran: releases are for this thread.
            self._loop.call_soon_threadsafe(self._over, place, holds)
            return
        self._streams._discard(place)
        place.give_back()
        try:
            if holds:
                self._ledger.release(holds)
        finally:
            # Also when a release raises SystemExit: somebody waits for the place.
            self._freed()
            if self.closed:
                self._delivery.look_over()

    def _forgotten(self, sock: OwnedSocket) -> None:
        """Close the socket of a stream that was collected as garbage, in whatever thread."""
        if self._loop.is_closed():
            sock.close()
        else:
            self._loop.call_soon_threadsafe(self._close_forgotten, sock)

    def _close_forgotten(self, sock: OwnedSocket) -> None:
        # In this order: the number of the descriptor may come back at once.
        self._watch.unregister(sock.fileno())
        sock.close()

    # -- those that are open

    def streams(self) -> tuple[Stream, ...]:
        """Return the streams that are open, and those whose transports are."""
        return self._streams.streams

    @property
    def open_streams(self) -> int:
        """How many accepted connections are open."""
        return len(self._streams)

    def abort_streams(self, own: Stream | None = None) -> None:
        """Abort every stream that is open, but for *own*."""
        self.aborted = True
        self._streams._abort(own)

    def is_over(self) -> bool:
        """Whether nothing can happen any more: closed, and no accepted connection is open."""
        return self.closed and not len(self._streams) and not self.deciders

    def done_with_fresh(self) -> None:
        """Note that the call which took a connection has nothing in its hands any more."""
        self._fresh = None
        if self.closed:
            self._delivery.look_over()


def _send_callee_data(stream: Stream, data: bytes) -> None:
    try:
        stream.write(data)
    except OSError:
        # The caller has left: the stream remembers, and says so when it is used.
        pass


def _no_group(pending: PendingTransport) -> InvalidGroupError:
    return InvalidGroupError(f"the listener has no group {pending.group!r}", pending.caller_id)
