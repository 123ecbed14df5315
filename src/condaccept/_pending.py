"""Pending connections: what a condition sees, and the deque that keeps them.

Pure: no socket, no loop. What a connection can tell about itself comes from its
`Arrival`, time comes in as an argument, and what is to be done comes out as a value.
"""

from __future__ import annotations

import enum
import heapq
import inspect
import ipaddress
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Protocol, TypeAlias

import attrs

from condaccept._qos import ECN, QOS, FlowSpec, Syn, parse_syn
from condaccept._verdict import PEEK_LIMIT, AnyVerdict, Defer
from condaccept.exceptions import CalleeDataError

__all__ = (
    "ACCEPTED",
    "PEEK_LIMIT",
    "QUEUED",
    "REJECTED",
    "Address",
    "Arrival",
    "CalleeData",
    "Condition",
    "Credentials",
    "Owner",
    "Peer",
    "PendingDeque",
    "PendingTransport",
    "Release",
    "Status",
    "check_plain",
)

Address: TypeAlias = Any
"""A socket address as Python spells it: two items, four for IPv6, a path for Unix."""

Release: TypeAlias = Callable[[], object]


class Status(enum.Enum):
    """Where a connection stands. It is in exactly one of these."""

    # Enum hashes its name in Python code; members are singletons, so identity does, and
    # the table below is consulted for every connection.
    __hash__ = object.__hash__

    QUEUED = "queued"
    """Taken from the kernel, no verdict yet."""
    DECIDING = "deciding"
    """A condition is being asked about it."""
    DEFERRED = "deferred"
    """Offered, and kept undecided."""
    ADMITTED = "admitted"
    """Accepted by the condition; its gate has still to produce the socket."""
    READY = "ready"
    """Accepted and complete; nobody has taken it yet."""
    ACCEPTED = "accepted"
    """Given to a caller as a stream."""
    REJECTED = "rejected"
    """Closed because the condition said so, or raised."""
    RESET = "reset"
    """Lost: the peer reset it before a verdict."""
    EXPIRED = "expired"
    """Lost: its deadline passed, or its caller withdrew."""
    FAILED = "failed"
    """Accepted, but no stream came of it."""
    CLOSED = "closed"
    """Still undecided when the listener closed."""


# For what every connection goes through: Python 3.11 takes 70 ns to find one in its Enum.
QUEUED: Final = Status.QUEUED
ACCEPTED: Final = Status.ACCEPTED
REJECTED: Final = Status.REJECTED

_LOSSES = frozenset({Status.RESET, Status.EXPIRED})
_ENDS = _LOSSES | {Status.ACCEPTED, Status.REJECTED, Status.FAILED, Status.CLOSED}
_NEVER: Final = float("inf")
_TO_EXPIRE: Final = frozenset({Status.DECIDING, Status.DEFERRED})
"""Which of those with a deadline can still meet it."""
_DECIDED = {Status.ADMITTED, Status.ACCEPTED, Status.REJECTED, Status.FAILED}

TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    Status.QUEUED: frozenset(
        {Status.DECIDING, Status.DEFERRED, *_LOSSES, *_DECIDED, Status.CLOSED}
    ),
    # Back to QUEUED or DEFERRED without a verdict: the decision was cancelled or invalid.
    Status.DECIDING: frozenset(
        {Status.QUEUED, Status.DEFERRED, *_LOSSES, *_DECIDED, Status.CLOSED}
    ),
    Status.DEFERRED: frozenset({Status.DECIDING, *_LOSSES, Status.CLOSED}),
    Status.ADMITTED: frozenset({Status.READY, Status.RESET, Status.CLOSED}),
    Status.READY: frozenset({Status.ACCEPTED, Status.FAILED, Status.RESET, Status.CLOSED}),
    **{end: frozenset() for end in _ENDS},
}
"""Every transition there is."""


class Peer(enum.Enum):
    """What is known of the other end of a connection."""

    THERE = "there"
    SHUT = "shut"
    """Its FIN has come: it closed, or will only send no more."""
    GONE = "gone"
    """It reset the connection."""


@attrs.frozen
class Credentials:
    """Who is at the other end of a Unix socket, as of its connect (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class Arrival(Protocol):
    """A connection as its gate gave it: what a pending transport asks about itself."""

    caller_id: Address
    hangup: bool
    """Whether the other end is worth a look: set when it was taken."""

    @property
    def has_qos(self) -> bool:
        """Whether a flow spec can be applied to this kind of connection."""

    def syn(self) -> bytes:
        """Return the headers of the SYN, each time the same; ``b""`` if they are unknown."""

    @property
    def capacity(self) -> int:
        """How many bytes of callee data this kind of connection can carry."""

    def callee_id(self) -> Address:
        """Return the local address of this connection."""

    def credentials(self) -> Credentials | None:
        """Return who the peer is, where the kernel knows."""

    def peer(self) -> Peer:
        """Look at the other end, without reading anything."""

    def peek(self, n: int) -> bytes:
        """Return up to *n* waiting bytes, which stay."""

    def consume(self, n: int) -> bytes:
        """Read up to *n* waiting bytes."""

    def extra_info(self, name: str, default: Any) -> Any:
        """Look *name* up as ``transport.get_extra_info()`` does."""


class Owner(Protocol):
    """Who decides about a pending transport: what its own calls reach."""

    clock: Callable[[], float]
    """What its age is measured by, in seconds."""

    def decide(self, pending: PendingTransport, verdict: AnyVerdict) -> None:
        """See `PendingTransport.decide()`."""

    async def hand_out(self, pending: PendingTransport) -> Any:
        """See `PendingTransport.take()`."""

    def wake(self, pending: PendingTransport) -> bool:
        """See `PendingTransport.reconsider()`."""

    def changed(self, pending: PendingTransport) -> None:
        """Look at a deferred connection about which the watch has told something."""

    def group_qos(self, name: object) -> FlowSpec | None:
        """See `PendingTransport.gqos`."""


class CalleeData:
    """What the callee tells the caller together with the verdict.

    On ACCEPT it is the first thing the stream sends; on REJECT it is sent before the end
    of the stream. It belongs to one offer: empty to begin with, and then nothing is sent.

    Attributes:
        capacity: In bytes. 0 where no data can go with the verdict.

    Source: lpCalleeData of WSPAccept.
    """

    __slots__ = ("_data", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._data = b""

    def set(self, data: bytes | bytearray | memoryview) -> None:
        """Replace what is there with *data*.

        Raises:
            CalleeDataError: *data* is longer than `capacity`; nothing was replaced.
        """
        data = bytes(memoryview(data))  # bytes(5) would be five zeros
        if len(data) > self.capacity:
            reason = f"callee data of {len(data)} bytes is over the capacity of {self.capacity}"
            raise CalleeDataError(reason)
        self._data = data

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append *data*.

        Raises:
            CalleeDataError: That would be more than `capacity`; nothing was appended.
        """
        self.set(self._data + bytes(memoryview(data)))

    def __bytes__(self) -> bytes:
        return self._data

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"<CalleeData {len(self._data)} of {self.capacity} bytes>"


_NO_HINTS: Final = Defer()


@attrs.define(eq=False, weakref_slot=False)
class Stay:
    """What is known of a connection from the time it is put on the deque.

    Most are decided at once, and need none of it.

    Attributes:
        older: The one before it on the deque; ``None`` also when it has left.
        newer: The one behind it.
        deadline: Of the deferral, counted from the first; infinite without a limit.
        overdue: Its deadline has come while it was under decision.
        hints: What the deferral waits for; ``None`` when it waits no more.
        wake_at: When the time in them is over.
        alarm: When the deque will look at that time.
        told: The bytes waited for, the bytes there, and whether no more will come, when it
            was last woken for that: the same again is no news.
        in_line: It is among those that wait for a place.
        by_free: It is due because a place was given back, which it has to use or pass on.
        frees: How many places nobody had waited for before the decision about it began.
        taker: The call that waits for it, once it is accepted, or has it in its hands.
        socket: Once it is accepted; a future of it while it has still to come.
    """

    older: PendingTransport | None = None
    newer: PendingTransport | None = None
    deadline: float | None = None
    overdue: bool = False
    hints: Defer | None = _NO_HINTS
    wake_at: float | None = None
    alarm: float | None = None
    told: tuple[int, int, bool] | None = None
    in_line: bool = False
    by_free: bool = False
    frees: int = 0
    taker: Any = None
    socket: Any = None

    @property
    def due(self) -> bool:
        """Whether it is to be offered again, if it is deferred."""
        return self.hints is None


_NO_STAY: Final = Stay()
"""Of those that are not on the deque; nothing is ever written here."""


class PendingTransport:
    """A connection without a verdict: Winsock's connection request.

    A condition gets it as its only argument and may keep it. What is asked of the
    connection itself is looked up when asked for.

    Attributes:
        callback_data: What the caller of `accept()` passed along, untouched.
        state: Anything; becomes `Stream.state`. How a condition tells what it learned.
        group: The name of a stream group of the listener that the stream of an ACCEPT is
            to be in, or ``None``, as at the beginning of each offer.
        deferrals: How often it has been deferred.
        timed_out: Whether the wait of ``Defer(until_bytes=…, within=…)`` is over and the
            bytes have not come.

    Source: the parameters of the condition function of WSPAccept.
    """

    __slots__ = (
        "_again",
        "_arrival",
        "_callee_data",
        "_holds",
        "_kept",
        "_offered",
        "_owner",
        "_place",
        "_reason",
        "_settled",
        "_sqos",
        "_status",
        "_stay",
        "_taken",
        "callback_data",
        "deferrals",
        "group",
        "state",
        "timed_out",
    )

    # Set later, and read only then: why it was accepted or lost.
    _reason: str

    def __init__(self, arrival: Arrival, owner: Owner) -> None:
        self._arrival = arrival
        self._owner = owner
        self._taken = owner.clock()
        self._status: Status = QUEUED
        self._offered = False
        self._kept = False  # on the deque
        self._stay = _NO_STAY
        self._again = False  # reconsidered while it was being decided about
        self._callee_data: CalleeData | None = None
        self._sqos: QOS | None = None
        self._holds: list[Release] | None = None
        self._settled: list[Callable[[Any], object]] | None = None
        self._place: Any = None  # of an accepted one without a stream, in the capacity
        self.callback_data: Any = None
        self.state: Any = None
        self.group: str | None = None
        self.deferrals = 0
        self.timed_out = False

    def __repr__(self) -> str:
        return f"<PendingTransport {self._status.value} caller={self.caller_id!r}>"

    def __lt__(self, other: PendingTransport) -> bool:
        """Whether it was taken before *other*, which settles what comes at one time."""
        return self._taken < other._taken

    @property
    def status(self) -> Status:
        """Where the connection stands."""
        return self._status

    @property
    def caller_id(self) -> Address:
        """The caller's address, as accept(2) gave it; right even after a reset.

        ``(host, port)`` for IPv4, ``(host, port, flowinfo, scope_id)`` for IPv6, for Unix
        a path, bytes for an abstract name, or ``""`` for a caller without a name.
        """
        return self._arrival.caller_id

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The caller's IP address, an IPv4-mapped one unwrapped; ``None`` for Unix."""
        caller = self._arrival.caller_id
        if not isinstance(caller, tuple):
            return None
        ip = ipaddress.ip_address(caller[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        return ip

    @property
    def credentials(self) -> Credentials | None:
        """Process, user and group of a Unix caller; ``None`` for TCP."""
        return self._arrival.credentials()

    @property
    def caller_data(self) -> bytes | None:
        """What the caller has sent so far, up to 16 KiB, or ``None``. It stays unread."""
        return self.peek(PEEK_LIMIT) or None

    @property
    def callee_id(self) -> Address:
        """The local address of this connection, a definite one for wildcard binds too."""
        return self._arrival.callee_id()

    @property
    def callee_data(self) -> CalleeData:
        """What goes to the caller with the verdict; bytes can be assigned."""
        if self._callee_data is None:
            self._callee_data = CalleeData(self._arrival.capacity)
        return self._callee_data

    @callee_data.setter
    def callee_data(self, data: bytes | bytearray | memoryview) -> None:
        self.callee_data.set(data)

    @property
    def sqos(self) -> QOS | None:
        """The quality of service of this connection; ``None`` where there is none, for Unix.

        Its ``receiving`` is what the caller's SYN asked for. A `FlowSpec` assigned to its
        ``sending`` is applied on ACCEPT, before anybody sees the stream, in place of the
        one of the group, and read back; if that fails, the connection is reset and the
        accept call raises `QualityOfServiceError`. Parts that are ``None`` stay as the
        listener's socket options have them. It belongs to one offer: at the next one
        ``sending`` is ``None`` again.

        Raises:
            OSError: Asked for the first time when the connection is not pending any more.

        Source: lpSQOS of WSPAccept; socket(7), SO_MAX_PACING_RATE; ip(7), IP_TOS; RFC 3542,
        6.5, for IPV6_TCLASS.
        """
        if self._sqos is None and self._arrival.has_qos:
            syn = self.syn
            service_type = None if syn is None else syn.traffic_class & ~ECN
            self._sqos = QOS(receiving=FlowSpec(service_type=service_type))
        return self._sqos

    @property
    def gqos(self) -> FlowSpec | None:
        """The flow spec of the group that `group` names; ``None`` if there is none.

        Source: lpGQOS of WSPAccept.
        """
        return self._owner.group_qos(self.group)

    @property
    def syn(self) -> Syn | None:
        """What the segment that opened the connection said; ``None`` if that is unknown.

        Linux keeps it for the sockets of `listen()`, and for others with TCP_SAVE_SYN
        among their options; not for Unix sockets, nor for a connection made by a SYN
        cookie, when the kernel was flooded.

        Raises:
            OSError: Asked for the first time when the connection is not pending any more.

        Source: tcp(7), TCP_SAVE_SYN and TCP_SAVED_SYN.
        """
        return parse_syn(self._arrival.syn())

    @property
    def age(self) -> float:
        """Seconds since the connection was taken from the kernel."""
        return self._owner.clock() - self._taken

    @property
    def peer_closed(self) -> bool:
        """Whether the caller will send no more: it closed, or half-closed."""
        return self._arrival.peer() is not Peer.THERE

    def peek(self, n: int) -> bytes:
        """Return up to *n* bytes that the caller has sent; they stay unread.

        Never waits: ``b""`` if nothing is there. At most 16 KiB are returned.
        """
        if n < 0:
            message = f"the number of bytes to peek cannot be negative, got {n}"
            raise ValueError(message)
        return self._arrival.peek(min(n, PEEK_LIMIT))

    def consume(self, n: int) -> bytes:
        """Take exactly *n* bytes off the front of the stream: a preamble, say.

        The stream of a later ACCEPT begins behind them.

        Raises:
            ValueError: Fewer than *n* bytes can be peeked, or *n* is over 16 KiB;
                nothing was taken.
        """
        waiting = len(self.peek(n))
        if waiting < n:
            message = f"{n} bytes were to be consumed, but {waiting} can be peeked: peek first"
            raise ValueError(message)
        return self._arrival.consume(n)

    def hold(self, release: Release) -> None:
        """Keep something for this connection as long as it lasts.

        The hold belongs to the offer under way. If it ends in ACCEPT, *release* is called
        when the connection's descriptor is closed, otherwise as soon as the offer ends;
        once in either case, the last held first.

        Raises:
            RuntimeError: No offer of this connection is under way.
        """
        if not self._offered:
            message = "hold() belongs to an offer: call it from the condition that is being asked"
            raise RuntimeError(message)
        if self._holds is None:
            self._holds = []
        self._holds.append(release)

    def on_settled(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn(outcome)`` once, soon after the connection has found its end.

        It has when it is accepted, rejected, reset, expired, failed or closed; a deferral
        is no end.

        Raises:
            RuntimeError: It has found its end already.
            TypeError: *fn* cannot be called, or is ``async``: nobody would await it.
        """
        check_plain(fn)
        if self._status in _ENDS:
            message = f"the connection is {self._status.value} already"
            raise RuntimeError(message)
        if self._settled is None:
            self._settled = []
        self._settled.append(fn)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncio's transports do under *name*: peername, sockname, socket."""
        return self._arrival.extra_info(name, default)

    def reconsider(self) -> bool:
        """Have it offered again soon, in its turn; return whether that will be.

        False if it has found its end. Under decision already: asked again if the verdict
        is DEFER.
        """
        return self._owner.wake(self)

    def decide(self, verdict: AnyVerdict) -> None:
        """Give the verdict now, as if the condition had said so; out of order.

        With ACCEPT the stream goes to whoever takes the listener's streams, in its turn.

        Raises:
            RuntimeError: It was accepted, rejected or closed already; the sentence says which.
            PendingResetError: The peer has reset it, which may have been found just now.
            PendingExpiredError: It has expired, or was withdrawn.
            AcceptInProgressError: A condition is being asked about it.
            InvalidVerdictError, InvalidGroupError, CalleeDataError: As for a condition; it
                keeps its place, undecided.
        """
        self._owner.decide(self, verdict)

    async def take(self) -> Any:
        """Accept it and return its stream, or what ``stream_factory`` makes of that.

        One that was accepted and that nobody has taken yet can be taken, too.

        Raises:
            Exception: As `decide()`, or what ``stream_factory`` raised.

        Cancellation:
            Before it is accepted, at the first step, it stays undecided. Afterwards the
            stream goes to whoever takes the listener's streams.
        """
        return await self._owner.hand_out(self)

    def _changed(self) -> None:
        """Have its owner look: the watch of its gate has told something."""
        self._owner.changed(self)

    def _move(self, status: Status) -> None:
        """Make one transition of the table, or raise and change nothing."""
        if status not in TRANSITIONS[self._status]:
            message = f"a connection cannot go from {self._status.value} to {status.value}"
            raise RuntimeError(message)
        self._status = status

    def _release_holds(self) -> list[Release]:
        """Hand over what the offer under way holds, in the order of release; it ends."""
        self._offered = False
        holds, self._holds = self._holds or [], None
        holds.reverse()
        if self._place is not None:
            holds.insert(0, self._place.give_back)
            self._place = None
        return holds


Condition: TypeAlias = Callable[[PendingTransport], AnyVerdict | Awaitable[AnyVerdict]]
"""Asked once per offer, in the loop's thread; plain or ``async``, told by its result."""


class PendingDeque:
    """The connections that were taken and are not decided, oldest first.

    Also here, in their old place: connections lost before a verdict, until that is
    reported, and those that are accepted and have still to be given out. A connection that
    is decided at once is never here.

    Goals: the oldest in O(1), removal from anywhere in O(1), the next alarm in O(1), setting
    one in O(log n); and little memory, since many may wait.
    """

    def __init__(
        self, max_pending: int | None, max_deciding: int, defer_timeout: float | None
    ) -> None:
        self.max_pending = max_pending
        self.max_deciding = max_deciding
        self.defer_timeout = defer_timeout
        self.deciding = 0
        self.deferred = 0
        # Linked through their stays. `deque` removes from the middle in O(n), `dict` walks
        # over what was deleted at its front each time the first one is asked for, and
        # `OrderedDict` takes 130 bytes for each.
        self._oldest: PendingTransport | None = None
        self._newest: PendingTransport | None = None
        self._length = 0
        # Those with a deadline, which comes in this order: all have the same time from
        # their first deferral on. And for the times in hints a heap, of the time and the
        # connection. Entries of either that do not count any more stay until their time
        # comes or until they are the majority.
        self._deadlines: deque[PendingTransport] = deque()
        self._alarms: list[tuple[float, PendingTransport]] = []

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[PendingTransport]:
        """Iterate, oldest first, as long as nobody leaves; make a list for anything else."""
        pending = self._oldest
        while pending is not None:
            yield pending
            pending = pending._stay.newer

    def undecided(self) -> tuple[PendingTransport, ...]:
        """Return the connections without a verdict, oldest first."""
        return tuple(pending for pending in self if pending._status not in _LOSSES)

    @property
    def crowded(self) -> bool:
        """Whether `max_pending` is reached."""
        return self.max_pending is not None and self._length >= self.max_pending

    @property
    def full(self) -> bool:
        """Whether no further connection may be taken."""
        return self.crowded or self.deciding >= self.max_deciding

    def head(self) -> PendingTransport | None:
        """Return the oldest that an accept call can do something about.

        That is one to be offered, one that is ready, or a loss to be reported; not one
        under decision, nor one that another call waits for.
        """
        for pending in self:
            status = pending._status
            if (
                status is not Status.DECIDING
                and status is not Status.ADMITTED
                and pending._stay.taker is None
            ):
                return pending
        return None

    def oldest_deferred(self) -> PendingTransport | None:
        """Return the deferred connection that came first."""
        for pending in self if self.deferred else ():
            if pending._status is Status.DEFERRED:
                return pending
        return None

    def due(self) -> bool:
        """Whether `head()` is more than a connection that waits for its hints."""
        head = self.head()
        return head is not None and (head._status is not Status.DEFERRED or head._stay.due)

    def enter(self, pending: PendingTransport, status: Status, now: float) -> None:
        """Put a connection that was just taken at the end of the deque."""
        if status is not pending._status or status is not Status.QUEUED:
            pending._move(status)
        pending._kept = True
        newest = self._newest
        pending._stay = Stay(newest)
        if newest is None:
            self._oldest = pending
        else:
            newest._stay.newer = pending
        self._newest = pending
        self._length += 1
        self._count(pending, status, now)

    def move(self, pending: PendingTransport, status: Status, now: float) -> None:
        """Make a transition of a connection of the deque; an end takes it off.

        A loss stays, in its place, until `report()`.
        """
        was = pending._status
        pending._move(status)
        if was is Status.DECIDING:
            self.deciding -= 1
        elif was is Status.DEFERRED:
            self.deferred -= 1
        if status in _ENDS and status not in _LOSSES:
            self._leave(pending)
        else:
            self._count(pending, status, now)

    def resume(self, pending: PendingTransport, now: float) -> None:
        """Give a connection under decision back, undecided, as it was before."""
        deferred = pending._stay.deadline is not None
        self.move(pending, Status.DEFERRED if deferred else Status.QUEUED, now)

    def report(self, loss: PendingTransport) -> None:
        """Take a loss off the deque: somebody was told."""
        self._leave(loss)

    def alarms(
        self, now: float, limit: int
    ) -> tuple[list[PendingTransport], list[PendingTransport]]:
        """Return up to *limit* deferred connections whose time has come: ``(expired, to wake)``.

        They stay as they are. One under decision at its deadline is returned after it was
        deferred again.
        """
        expired: list[PendingTransport] = []
        woken: list[PendingTransport] = []
        deadlines, alarms = self._deadlines, self._alarms
        for _ in range(limit):
            if deadlines and _deadline(deadlines[0]) <= now:
                pending = deadlines.popleft()
                if pending._status is Status.DEFERRED:
                    expired.append(pending)
                else:
                    pending._stay.overdue = True
            elif alarms and alarms[0][0] <= now:
                when, pending = heapq.heappop(alarms)
                stay = pending._stay
                if when != stay.alarm:
                    continue
                stay.alarm = None
                if pending._status is not Status.DEFERRED or stay.wake_at is None:
                    continue
                if stay.wake_at > now:
                    self.set_alarm(pending)
                elif _deadline(pending) > now:  # else it is among the expired
                    stay.wake_at = None
                    woken.append(pending)
            else:
                break
        return expired, woken

    @property
    def next_alarm(self) -> float | None:
        """When `alarms()` is to be asked next."""
        while self._deadlines and self._deadlines[0]._status not in _TO_EXPIRE:
            self._deadlines.popleft()
        while self._alarms and not _counts(self._alarms[0]):
            heapq.heappop(self._alarms)
        deadline = _deadline(self._deadlines[0]) if self._deadlines else _NEVER
        when = min(deadline, self._alarms[0][0]) if self._alarms else deadline
        return None if when == _NEVER else when

    def set_alarm(self, pending: PendingTransport) -> None:
        """Have *pending* looked at when its hint's time comes."""
        stay = pending._stay
        when = stay.wake_at
        if when is None or (stay.alarm is not None and stay.alarm <= when):
            return
        if len(self._alarms) > 2 * self._length + 64:
            self._alarms = [entry for entry in self._alarms if _counts(entry)]
            heapq.heapify(self._alarms)
        stay.alarm = when
        heapq.heappush(self._alarms, (when, pending))

    def _set_deadline(self, pending: PendingTransport, now: float) -> None:
        """Begin to count, at the first deferral."""
        if self.defer_timeout is None:
            pending._stay.deadline = _NEVER
            return
        if len(self._deadlines) > 2 * self._length + 64:
            self._deadlines = deque(each for each in self._deadlines if each._status in _TO_EXPIRE)
        pending._stay.deadline = now + self.defer_timeout
        self._deadlines.append(pending)

    def _leave(self, pending: PendingTransport) -> None:
        stay = pending._stay
        older, newer = stay.older, stay.newer
        if older is None:
            self._oldest = newer
        else:
            older._stay.newer = newer
        if newer is None:
            self._newest = older
        else:
            newer._stay.older = older
        # It may be kept by others, and must not keep those that were beside it.
        stay.older = stay.newer = None
        self._length -= 1
        pending._kept = False

    def _count(self, pending: PendingTransport, status: Status, now: float) -> None:
        if status is Status.DECIDING:
            self.deciding += 1
        elif status is Status.DEFERRED:
            self.deferred += 1
            stay = pending._stay
            if stay.deadline is None:
                self._set_deadline(pending, now)
            elif stay.overdue:
                stay.overdue = False
                self._deadlines.appendleft(pending)
            self.set_alarm(pending)


def check_plain(callback: object) -> None:
    """Refuse a callback that the loop cannot call, or whose result somebody had to await."""
    if not callable(callback):
        message = f"the callback cannot be called: {callback!r}"
        raise TypeError(message)
    if inspect.iscoroutinefunction(callback):
        message = f"the callback is async, and nobody would await it: {callback!r}"
        raise TypeError(message)


def _deadline(pending: PendingTransport) -> float:
    deadline = pending._stay.deadline
    return _NEVER if deadline is None else deadline


def _counts(entry: tuple[float, PendingTransport]) -> bool:
    """Whether an entry of the alarms is still the one that its connection waits for."""
    when, pending = entry
    return pending._status not in _ENDS and when == pending._stay.alarm
