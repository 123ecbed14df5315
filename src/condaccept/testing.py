"""Fakes for the tests of code that uses condaccept, and of condaccept itself.

A pending transport made by hand to ask a condition about, an in-memory gate whose
admissions take as long as a test wants, and a listening socket that fails by script.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import attrs

from condaccept._listener import Listener
from condaccept._pending import Address, Credentials, Peer, PendingTransport
from condaccept._verdict import Verdict
from condaccept.gates._connected import ConnectedGate
from condaccept.gates._connection import CALLEE_DATA_CAPACITY, Connection, Kind

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping

    from condaccept._qos import FlowSpec
    from condaccept._sockets import Option, OwnedSocket
    from condaccept._stream import Stream
    from condaccept._verdict import AnyVerdict
    from condaccept._watch import Watch

__all__ = ("MemoryGate", "ScriptedSocket", "memory_listener", "pending_transport")

_CALLER: Address = ("192.0.2.1", 50000)  # RFC 5737, TEST-NET-1
_CALLEE: Address = ("192.0.2.2", 7)

_PAIR = Kind(socket.AF_UNIX)


@attrs.define
class _FakeArrival:
    caller_id: Address
    callee: Address
    data: bytes
    capacity: int
    who: Credentials | None
    other_end: Peer
    info: dict[str, Any]
    headers: bytes
    hangup: bool = True

    @property
    def has_qos(self) -> bool:
        return isinstance(self.caller_id, tuple)

    def syn(self) -> bytes:
        return self.headers

    def callee_id(self) -> Address:
        return self.callee

    def credentials(self) -> Credentials | None:
        return self.who

    def peer(self) -> Peer:
        return self.other_end

    def peek(self, n: int) -> bytes:
        return self.data[:n]

    def consume(self, n: int) -> bytes:
        taken, self.data = self.data[:n], self.data[n:]
        return taken

    def extra_info(self, name: str, default: Any) -> Any:
        known = {"peername": self.caller_id, "sockname": self.callee, **self.info}
        return known.get(name, default)


@attrs.define
class _FakeOwner:
    clock: Callable[[], float]
    groups: dict[Any, FlowSpec | None]

    def decide(self, pending: PendingTransport, _verdict: AnyVerdict) -> None:
        message = f"no listener knows {pending!r}: it was made for a test"
        raise RuntimeError(message)

    async def hand_out(self, pending: PendingTransport) -> Any:
        self.decide(pending, Verdict.ACCEPT)

    def wake(self, _pending: PendingTransport) -> bool:
        return False

    def changed(self, pending: PendingTransport) -> None:
        self.decide(pending, Verdict.ACCEPT)

    def group_qos(self, name: object) -> FlowSpec | None:
        return self.groups.get(name)


def pending_transport(
    caller_id: Address = _CALLER,
    *,
    callee_id: Address = _CALLEE,
    caller_data: bytes = b"",
    callback_data: object = None,
    callee_data_capacity: int = CALLEE_DATA_CAPACITY,
    credentials: Credentials | None = None,
    peer_closed: bool = False,
    extra_info: dict[str, Any] | None = None,
    syn: bytes = b"",
    groups: Mapping[Any, FlowSpec | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> PendingTransport:
    """Return a pending transport that no listener knows, to call a condition with.

    An offer of it is under way, so `hold()` can be called; nothing is ever released.
    *syn* is what TCP_SAVED_SYN would give: the IP and the TCP header of a SYN. *groups* are
    the flow specs that groups of the listener would have, by name.
    """
    arrival = _FakeArrival(
        caller_id,
        callee_id,
        caller_data,
        callee_data_capacity,
        credentials,
        Peer.SHUT if peer_closed else Peer.THERE,
        extra_info or {},
        syn,
    )
    pending = PendingTransport(arrival, _FakeOwner(clock, dict(groups or {})))
    pending.callback_data = callback_data
    pending._offered = True
    return pending


class MemoryGate(ConnectedGate):
    """A gate without a network: connections are pairs of connected sockets.

    With *slow*, an accepted connection is complete only when the test says so: each waits
    in `admitting` as a future, for `complete()` or `fail()`.
    """

    sockets: tuple[socket.socket, ...] = ()

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watch: Watch,
        *,
        slow: bool = False,
        reject_timeout: float | None = 5.0,
    ) -> None:
        super().__init__(loop, watch, reject_timeout)
        self._loop = loop
        self._slow = slow
        self._queue: deque[Connection] = deque()
        self._ready: Callable[[], object] = lambda: None
        self.closed = False
        self.refusing = False
        self.admitting: list[tuple[Connection, asyncio.Future[OwnedSocket]]] = []

    def dial(self, caller_id: Address = _CALLER) -> socket.socket:
        """Connect, and return the caller's end: a blocking socket, which the test closes.

        Raises:
            ConnectionRefusedError: The gate refuses, or is closed.
        """
        if self.closed or self.refusing:
            raise ConnectionRefusedError
        theirs, ours = socket.socketpair()
        self._queue.append(Connection(ours.detach(), _PAIR, caller_id, True))
        self._ready()
        return theirs

    def complete(self) -> None:
        """Complete the oldest admission, unless the listener has dropped it meanwhile.

        Raises:
            IndexError: There is none.
        """
        connection, admission = self.admitting.pop(0)
        if not admission.cancelled():
            admission.set_result(connection.own())

    def fail(self) -> None:
        """Let the oldest admission come to nothing: its caller has left.

        Raises:
            IndexError: There is none.
        """
        connection, admission = self.admitting.pop(0)
        if not admission.cancelled():
            connection.own().close()
            admission.set_exception(ConnectionResetError())

    def share(self) -> None:
        """There is nothing to share."""

    def check_refusable(self) -> None:
        """Nothing to check: `dial()` can always be refused."""

    def refuse_new(self) -> None:
        """Have `dial()` refused; whoever was not taken reads the end of the stream."""
        self.refusing = True
        while self._queue:
            self._queue.popleft().reset()

    def listen_again(self) -> None:
        """Let `dial()` connect again."""
        self.refusing = False

    def setsockopt(self, option: Option) -> None:
        """Refuse: there is no listening socket."""
        raise OSError(errno.ENOTSOCK, f"there is no socket to set {option!r} on")

    def getsockopt(self, level: int, name: int, buflen: int) -> int | bytes:
        """Refuse: there is no listening socket."""
        raise OSError(errno.ENOTSOCK, f"there is no socket to read {(level, name, buflen)!r} of")

    def start(self, ready: Callable[[], object], told: Callable[[], object]) -> None:
        """Begin; *ready* is called by `dial()`."""
        self._farewells.ended = told
        self._ready = ready

    def waiting(self) -> bool:
        """Whether somebody waits to be taken."""
        return bool(self._queue)

    def backlog(self) -> tuple[int, int] | None:
        """How many wait to be taken; there is no limit."""
        return None

    @property
    def more(self) -> bool:
        """Whether somebody waits to be taken."""
        return bool(self._queue)

    def take(self) -> Connection | None:
        """Take the connection that came first."""
        return self._queue.popleft() if self._queue else None

    def admit(self, arrival: Connection) -> OwnedSocket | asyncio.Future[OwnedSocket]:
        """Let a connection in, at once or when the test says so."""
        if arrival.pending is not None:
            self._unwatch(arrival)
        if not self._slow:
            return arrival.own()
        admission: asyncio.Future[OwnedSocket] = self._loop.create_future()
        self.admitting.append((arrival, admission))
        admission.add_done_callback(lambda _: self._dropped(arrival, admission))
        return admission

    def stop(self) -> None:
        """Take no more; whoever was not taken reads the end of the stream."""
        self.closed = True
        while self._queue:
            self._queue.popleft().reset()

    def close(self) -> None:
        """Take no more, and complete nothing any more."""
        self.stop()
        self._farewells.close()
        for _, admission in self.admitting:
            admission.cancel()

    def _dropped(self, arrival: Connection, admission: asyncio.Future[OwnedSocket]) -> None:
        if admission.cancelled():
            arrival.reset()
            if (arrival, admission) in self.admitting:
                self.admitting.remove((arrival, admission))


def memory_listener(
    *, slow: bool = False, reject_timeout: float | None = 5.0, **options: Any
) -> tuple[Listener[Stream], MemoryGate]:
    """Return a listener in front of a `MemoryGate`, and that gate.

    *options* are those of `listen()` that are not about addresses.
    """
    made: list[MemoryGate] = []

    def gate(loop: asyncio.AbstractEventLoop, watch: Watch) -> MemoryGate:
        made.append(MemoryGate(loop, watch, slow=slow, reject_timeout=reject_timeout))
        return made[0]

    listener: Listener[Stream] = Listener(gate, **options)
    return listener, made[0]


class ScriptedSocket(socket.socket):
    """A listening socket whose accept(2) fails by script.

    Takes over *sock*. Each step of *script* is an error that one accept raises in place
    of accepting, or ``None`` to let one through; after the last, all are let through. The
    caller that was to be accepted stays queued, so somebody has to have connected for
    accept to be tried at all.
    """

    def __init__(self, sock: socket.socket, script: Iterable[OSError | None]) -> None:
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self._script = deque(script)

    def _accept(self) -> tuple[int, Address]:
        step = self._script.popleft() if self._script else None
        if step is not None:
            raise step
        accepted: tuple[int, Address] = super()._accept()  # type: ignore[misc]
        return accepted
