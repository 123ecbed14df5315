"""`condaccept._pending`: what a condition sees, the table of transitions, and the deque."""

from __future__ import annotations

import gc
import ipaddress
import itertools
import os
import weakref
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from condaccept import (
    ACCEPT,
    AnyVerdict,
    CalleeData,
    CalleeDataError,
    Condition,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Credentials,
    Defer,
    InvalidVerdictError,
    Listener,
    Outcome,
    PendingTransport,
    Reject,
    Status,
    Stream,
)
from condaccept._pending import PEEK_LIMIT, TRANSITIONS, PendingDeque
from condaccept.testing import pending_transport
from tests.support import Dial, accept, defer, queued, reject, until, wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from ipaddress import IPv4Address, IPv6Address

QUEUED = Status.QUEUED
DECIDING = Status.DECIDING
DEFERRED = Status.DEFERRED
ADMITTED = Status.ADMITTED
READY = Status.READY
ACCEPTED = Status.ACCEPTED
REJECTED = Status.REJECTED
RESET = Status.RESET
EXPIRED = Status.EXPIRED
FAILED = Status.FAILED
CLOSED = Status.CLOSED

ENDS = frozenset({ACCEPTED, REJECTED, RESET, EXPIRED, FAILED, CLOSED})
LOSSES = frozenset({RESET, EXPIRED})

# Written down once more, so that a change of the table has to be made twice.
LEGAL: dict[Status, set[Status]] = {
    QUEUED: {DECIDING, DEFERRED, ADMITTED, ACCEPTED, REJECTED, RESET, EXPIRED, FAILED, CLOSED},
    DECIDING: {QUEUED, DEFERRED, ADMITTED, ACCEPTED, REJECTED, RESET, EXPIRED, FAILED, CLOSED},
    DEFERRED: {DECIDING, RESET, EXPIRED, CLOSED},
    ADMITTED: {READY, RESET, CLOSED},
    READY: {ACCEPTED, FAILED, RESET, CLOSED},
    **{end: set() for end in ENDS},
}


def at(status: Status) -> PendingTransport:
    """Return a connection that stands at *status*."""
    pending = pending_transport()
    pending._status = status
    return pending


# -- the address


@pytest.mark.parametrize(
    ("caller_id", "ip"),
    [
        (("192.0.2.7", 4242), ipaddress.IPv4Address("192.0.2.7")),
        (("2001:db8::7", 4242, 0, 0), ipaddress.IPv6Address("2001:db8::7")),
        (("::ffff:192.0.2.7", 4242, 0, 0), ipaddress.IPv4Address("192.0.2.7")),
        (("::ffff:0.0.0.0", 4242, 0, 0), ipaddress.IPv4Address("0.0.0.0")),  # noqa: S104 - an address, nothing is bound
        (("::1", 4242, 0, 0), ipaddress.IPv6Address("::1")),
        (("fe80::7%eth0", 4242, 0, 2), ipaddress.IPv6Address("fe80::7%eth0")),
        ("/run/caller", None),
        (b"\0abstract", None),
        ("", None),
    ],
)
def test_ip(caller_id: Any, ip: IPv4Address | IPv6Address | None) -> None:
    """`ip` is the caller's address, a mapped IPv4 one unwrapped, and None for Unix."""
    pending = pending_transport(caller_id)

    assert pending.ip == ip
    assert type(pending.ip) is type(ip)
    assert pending.caller_id == caller_id


def test_ip_keeps_the_scope() -> None:
    """The scope of a link-local address stays in `ip`, and a plain one equals none."""
    ip = pending_transport(("fe80::7%eth0", 4242, 0, 2)).ip

    assert isinstance(ip, ipaddress.IPv6Address)
    assert ip.scope_id == "eth0"
    assert ip.is_link_local
    assert ip != ipaddress.IPv6Address("fe80::7")


# -- what came and what is known


def test_attributes_of_a_fresh_one() -> None:
    """A fresh pending transport is queued, never deferred, and tells its addresses."""
    token = object()
    pending = pending_transport(callee_id=("192.0.2.9", 80), callback_data=token)

    assert pending.status is QUEUED
    assert pending.deferrals == 0
    assert pending.callee_id == ("192.0.2.9", 80)
    assert pending.callback_data is token
    assert pending.state is None
    assert pending.group is None
    assert pending.credentials is None
    assert not pending.peer_closed
    assert repr(pending) == f"<PendingTransport queued caller={pending.caller_id!r}>"


def test_the_order_of_taking() -> None:
    """Of two pending transports the one that was taken first is the lesser one."""
    times = iter([1.0, 2.0])
    first, second = (pending_transport(clock=lambda: next(times)) for _ in range(2))

    assert first < second
    assert not second < first
    assert not first < first  # noqa: PLR0124 - nobody comes before himself
    assert first != second


def test_credentials_and_peer_closed() -> None:
    """What the other end is and whether it has closed comes from the arrival."""
    who = Credentials(pid=1, uid=2, gid=3)
    pending = pending_transport("", credentials=who, peer_closed=True)

    assert pending.credentials == who
    assert pending.peer_closed


def test_age_follows_the_clock() -> None:
    """`age` counts from the taking, by the clock that was given."""
    now = [100.0]
    pending = pending_transport(clock=lambda: now[0])

    assert pending.age == 0.0
    now[0] = 102.5
    assert pending.age == 2.5


def test_get_extra_info() -> None:
    """`get_extra_info()` knows asyncio's names, and gives the default for others."""
    pending = pending_transport(extra_info={"cipher": "none"})

    assert pending.get_extra_info("peername") == pending.caller_id
    assert pending.get_extra_info("sockname") == pending.callee_id
    assert pending.get_extra_info("cipher") == "none"
    assert pending.get_extra_info("compression") is None
    assert pending.get_extra_info("compression", 7) == 7


async def test_get_extra_info_of_a_real_one(listener: Listener[Stream], dial: Dial) -> None:
    """A real connection tells both addresses and shows its socket, which has them too."""
    client = dial(listener)
    seen: list[tuple[Any, ...]] = []

    def look(pending: PendingTransport) -> AnyVerdict:
        sock = pending.get_extra_info("socket")
        seen.append(
            (
                pending.get_extra_info("peername"),
                pending.get_extra_info("sockname"),
                sock.getpeername(),
                sock.getsockname(),
                pending.get_extra_info("nothing", "else"),
            )
        )
        return ACCEPT

    stream = await listener.accept(look)
    ours, theirs = client.getsockname(), client.getpeername()
    stream.close()

    assert seen == [(ours, theirs, ours, theirs, "else")]


# -- caller data


def test_caller_data_is_none_without_any() -> None:
    """A caller that has sent nothing has no caller data; a peek is empty."""
    pending = pending_transport()

    assert pending.caller_data is None
    assert pending.peek(10) == b""


def test_caller_data_stays() -> None:
    """Caller data can be looked at again and again."""
    pending = pending_transport(caller_data=b"hello")

    assert pending.caller_data == b"hello"
    assert pending.caller_data == b"hello"
    assert pending.peek(2) == b"he"
    assert pending.peek(0) == b""
    assert pending.peek(100) == b"hello"


def test_peek_is_bounded() -> None:
    """No peek returns more than 16 KiB, whatever was asked for."""
    data = bytes(range(256)) * 65
    assert len(data) > PEEK_LIMIT == 16384
    pending = pending_transport(caller_data=data)

    assert pending.caller_data == data[:PEEK_LIMIT]
    assert pending.peek(1 << 40) == data[:PEEK_LIMIT]


@pytest.mark.parametrize("name", ["peek", "consume"])
def test_a_negative_number_of_bytes(name: str) -> None:
    """A negative number of bytes is a ValueError, and nothing is taken."""
    pending = pending_transport(caller_data=b"hello")
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        getattr(pending, name)(-1)

    assert pending.caller_data == b"hello"


def test_consume_takes_the_front() -> None:
    """What is consumed is gone from the front, exactly as many bytes as were asked for."""
    pending = pending_transport(caller_data=b"PROXY rest")

    assert pending.consume(0) == b""
    assert pending.consume(6) == b"PROXY "
    assert pending.caller_data == b"rest"
    assert pending.consume(4) == b"rest"
    assert pending.caller_data is None


def test_consume_all_or_nothing() -> None:
    """With fewer bytes there than were asked for, nothing is consumed."""
    pending = pending_transport(caller_data=b"abc")
    with pytest.raises(ValueError, match="4 bytes were to be consumed, but 3 can be peeked"):
        pending.consume(4)

    assert pending.caller_data == b"abc"


def test_consume_is_bounded_by_the_peek() -> None:
    """16 KiB can be consumed at once, and not one byte more."""
    pending = pending_transport(caller_data=bytes(PEEK_LIMIT + 2))
    with pytest.raises(ValueError, match="can be peeked"):
        pending.consume(PEEK_LIMIT + 1)

    assert len(pending.consume(PEEK_LIMIT)) == PEEK_LIMIT
    assert pending.caller_data == b"\0\0"


async def test_consumed_bytes_are_not_in_the_stream(listener: Listener[Stream], dial: Dial) -> None:
    """The stream begins behind what the condition has consumed; a peek changes nothing."""
    dial(listener, data=b"preamble|rest")
    seen: list[bytes | None] = []

    def strip(pending: PendingTransport) -> AnyVerdict:
        seen.extend([pending.caller_data, pending.consume(9), pending.caller_data])
        with pytest.raises(ValueError, match="can be peeked"):
            pending.consume(5)
        return ACCEPT

    stream = await listener.accept(strip)
    rest = await stream.read(100)
    stream.close()

    assert seen == [b"preamble|rest", b"preamble|", b"rest"]
    assert rest == b"rest"


async def test_nothing_to_consume_never_waits(listener: Listener[Stream], dial: Dial) -> None:
    """A silent caller has no caller data, and consuming from it is a ValueError."""
    dial(listener)
    seen: list[bytes | None] = []

    def look(pending: PendingTransport) -> AnyVerdict:
        seen.extend([pending.caller_data, pending.peek(1), pending.consume(0)])
        with pytest.raises(ValueError, match="1 bytes were to be consumed, but 0"):
            pending.consume(1)
        return ACCEPT

    (await listener.accept(look)).close()

    assert seen == [None, b"", b""]


# -- callee data


def test_callee_data_collects() -> None:
    """Callee data is empty at first, appended to by write() and replaced by set()."""
    data = CalleeData(8)
    assert bytes(data) == b""
    assert len(data) == 0

    data.write(b"abc")
    data.write(bytearray(b"def"))
    data.write(memoryview(b"gh"))
    assert bytes(data) == b"abcdefgh"
    assert len(data) == 8
    assert repr(data) == "<CalleeData 8 of 8 bytes>"

    data.set(b"x")
    assert bytes(data) == b"x"


def test_callee_data_is_a_copy() -> None:
    """What was put in does not change with the buffer it came from."""
    source = bytearray(b"abc")
    data = CalleeData(8)
    data.set(source)
    source[:] = b"xyz"

    assert bytes(data) == b"abc"


@pytest.mark.parametrize("name", ["set", "write"])
def test_callee_data_over_its_capacity(name: str) -> None:
    """More than the capacity is an error that leaves the buffer as it was."""
    data = CalleeData(4)
    data.set(b"abcd")
    with pytest.raises(CalleeDataError, match="5 bytes is over the capacity of 4"):
        getattr(data, name)(b"abcde" if name == "set" else b"e")

    assert bytes(data) == b"abcd"


@pytest.mark.parametrize("name", ["set", "write"])
def test_callee_data_counts_bytes(name: str) -> None:
    """A view of wider items is measured in bytes, as the capacity is."""
    data = CalleeData(4)
    with pytest.raises(CalleeDataError, match="over the capacity of 4"):
        getattr(data, name)(memoryview(array("I", [1, 2])))

    assert bytes(data) == b""


def test_no_capacity_takes_nothing() -> None:
    """Where no data can go with the verdict, only none can be put in."""
    pending = pending_transport(callee_data_capacity=0)
    pending.callee_data = b""
    with pytest.raises(CalleeDataError, match="1 bytes is over the capacity of 0"):
        pending.callee_data.write(b"x")

    assert pending.callee_data.capacity == 0
    assert bytes(pending.callee_data) == b""


def test_callee_data_can_be_assigned() -> None:
    """Assigning bytes replaces the content of the one buffer; 4096 bytes fit, no more."""
    pending = pending_transport()
    buffer = pending.callee_data
    pending.callee_data = b"first"
    pending.callee_data = bytes(4096)
    assert len(buffer) == buffer.capacity == 4096
    with pytest.raises(CalleeDataError):
        pending.callee_data = bytes(4097)

    assert pending.callee_data is buffer
    assert bytes(buffer) == bytes(4096)


# -- holds and settlement


def test_holds_are_handed_over_once() -> None:
    """Holds come out last held first, once."""
    pending = pending_transport()
    names: list[str] = []
    for name in "abc":
        pending.hold(partial(names.append, name))

    for release in pending._release_holds():
        release()
    assert names == ["c", "b", "a"]
    assert pending._release_holds() == []


def test_hold_outside_an_offer() -> None:
    """Without an offer under way, hold() raises and keeps nothing."""
    pending = pending_transport()
    pending._release_holds()
    with pytest.raises(RuntimeError, match="belongs to an offer"):
        pending.hold(lambda: None)

    assert pending._release_holds() == []


def nonsense(_pending: PendingTransport) -> Any:
    """Return something that is no verdict."""
    return 7


def name_a_group(pending: PendingTransport) -> AnyVerdict:
    """Accept into a group that the listener does not have."""
    pending.group = "none such"
    return ACCEPT


def fail(_pending: PendingTransport) -> AnyVerdict:
    """Raise."""
    raise ZeroDivisionError


def farewell(_pending: PendingTransport) -> AnyVerdict:
    """Reject with callee data."""
    return Reject(data=b"bye")


def too_long_a_farewell(_pending: PendingTransport) -> AnyVerdict:
    """Reject with more callee data than there is room for."""
    return Reject(data=bytes(4097))


@pytest.mark.parametrize(
    ("decide", "stays"),
    [
        (accept, False),
        (reject, False),
        (farewell, False),
        (fail, False),
        (defer, True),
        (nonsense, True),
        (name_a_group, True),
        (too_long_a_farewell, True),
    ],
)
async def test_hold_after_the_offer(
    listener: Listener[Stream], dial: Dial, decide: Condition, *, stays: bool
) -> None:
    """However an offer ends, its hold is released once, and hold() raises afterwards."""
    dial(listener)
    kept: list[PendingTransport] = []
    released: list[int] = []

    def condition(pending: PendingTransport) -> AnyVerdict | Awaitable[AnyVerdict]:
        kept.append(pending)
        pending.hold(lambda: released.append(1))
        return decide(pending)

    stream: Stream | None = None
    try:
        stream = await listener.accept(condition)
    except (OSError, ZeroDivisionError):
        assert released == [1]
    else:
        assert released == []
    with pytest.raises(RuntimeError, match="belongs to an offer"):
        kept[0].hold(lambda: released.append(2))
    if stream is not None:
        stream.close()
    assert released == [1]
    assert listener.pending == ((kept[0],) if stays else ())


def test_on_settled_refuses_what_has_ended() -> None:
    """After the end of a connection there is nothing left to be told of."""
    for end in ENDS:
        pending = at(end)
        with pytest.raises(RuntimeError, match=f"the connection is {end.value} already"):
            pending.on_settled(lambda _: None)
    for status in set(Status) - ENDS:
        at(status).on_settled(lambda _: None)


async def test_on_settled_is_called_once(listener: Listener[Stream], dial: Dial) -> None:
    """A deferral settles nothing; the end does, once, after the call that caused it."""
    client = dial(listener)
    told: list[Outcome] = []

    def first(pending: PendingTransport) -> AnyVerdict:
        pending.on_settled(told.append)
        return Defer()

    with pytest.raises(ConnectionDeferredError):
        await listener.accept(first)
    assert told == []
    with pytest.raises(ConnectionRejectedError):
        listener.accept_nowait(lambda _: Reject("not today"))
    assert told == []

    await until(lambda: told)
    assert [(each.status, each.reason, each.deferrals) for each in told] == [
        (REJECTED, "not today", 1)
    ]
    assert told[0].caller_id == client.getsockname()


# -- kept by the condition


def drive(look: Callable[[PendingTransport], object], pending: PendingTransport) -> None:
    """Look at *pending*, which may have nothing to tell any more."""
    try:
        look(pending)
    except (OSError, ValueError):
        return


LOOKS: dict[str, Callable[[PendingTransport], object]] = {
    "callee_id": lambda pending: pending.callee_id,
    "peek": lambda pending: pending.peek(1),
    "peer_closed": lambda pending: pending.peer_closed,
    "consume": lambda pending: pending.consume(1),
    "credentials": lambda pending: pending.credentials,
    "socket": lambda pending: pending.get_extra_info("socket"),
    "sockname": lambda pending: pending.get_extra_info("sockname"),
}


@pytest.mark.parametrize("name", LOOKS)
async def test_a_kept_one_is_harmless_after_accept(
    listener: Listener[Stream], dial: Dial, name: str
) -> None:
    """A pending transport that is looked at after ACCEPT takes nothing from the stream."""
    client = dial(listener, data=b"abc")
    kept: list[PendingTransport] = []
    stream = await listener.accept(lambda pending: kept.append(pending) or ACCEPT)  # type: ignore[func-returns-value]
    drive(LOOKS[name], kept[0])
    kept.clear()
    gc.collect()

    stream.write(b"still here")
    assert wire(client) == b"still here"
    assert await stream.read(10) == b"abc"
    stream.close()
    assert wire(client) == "eof"


@pytest.mark.parametrize("name", LOOKS)
async def test_a_kept_one_is_harmless_after_reject(
    listener: Listener[Stream], dial: Dial, name: str
) -> None:
    """A pending transport that is looked at after REJECT never meets its number's next owner."""
    dial(listener)
    kept: list[PendingTransport] = []
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(lambda pending: kept.append(pending) or Reject())  # type: ignore[func-returns-value]
    # Any descriptor opened now may get the number that was closed.
    ends = [os.pipe() for _ in range(4)]
    drive(LOOKS[name], kept[0])
    kept.clear()
    gc.collect()

    for reader, writer in ends:
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"
        os.close(reader)
        os.close(writer)


# -- the table of transitions


def test_the_table_is_complete() -> None:
    """Every state has its row, and an end leads nowhere."""
    assert set(TRANSITIONS) == set(Status)
    assert {status for status, to in TRANSITIONS.items() if not to} == ENDS


@pytest.mark.parametrize("was", Status, ids=lambda status: status.value)
def test_every_transition(was: Status) -> None:
    """A legal transition is made; an illegal one raises and changes nothing."""
    for to in Status:
        pending = at(was)
        if to in LEGAL[was]:
            pending._move(to)
            assert pending.status is to
        else:
            with pytest.raises(RuntimeError, match=f"from {was.value} to {to.value}"):
                pending._move(to)
            assert pending.status is was


def test_every_state_can_be_reached_and_left() -> None:
    """From QUEUED every state can be reached, and from every one some end."""
    reached = {QUEUED}
    while more := {to for was in reached for to in TRANSITIONS[was]} - reached:
        reached |= more
    assert reached == set(Status)
    for status in set(Status) - ENDS:
        assert TRANSITIONS[status] & ENDS


# -- the deque, step by step


def deque_of(
    *statuses: Status,
    max_pending: int | None = None,
    max_deciding: int = 8,
    defer_timeout: float | None = 10,
) -> tuple[PendingDeque, list[PendingTransport]]:
    """Return a deque with connections at *statuses*, entered at time 0."""
    pending = PendingDeque(max_pending, max_deciding, defer_timeout)
    entered = [pending_transport((f"192.0.2.{n}", n)) for n in range(len(statuses))]
    for each, status in zip(entered, statuses, strict=True):
        if status is READY:
            pending.enter(each, ADMITTED, 0)
            pending.move(each, READY, 0)
        else:
            pending.enter(each, status, 0)
    return pending, entered


def test_an_empty_deque() -> None:
    """An empty deque has no head, nothing due and no deadline."""
    pending, _ = deque_of()

    assert len(pending) == 0
    assert pending.undecided() == ()
    assert pending.head() is None
    assert not pending.due()
    assert not pending.full
    assert pending.alarms(1e9, 1000)[0] == []
    assert pending.next_alarm is None


@pytest.mark.parametrize(
    ("statuses", "head", "due"),
    [
        ((DEFERRED, DEFERRED), 0, False),
        ((DEFERRED, RESET), 0, False),
        ((RESET, DEFERRED), 0, True),
        ((EXPIRED, DEFERRED), 0, True),
        ((DECIDING, DEFERRED), 1, False),
        ((DECIDING, RESET), 1, True),
        ((ADMITTED, DEFERRED), 1, False),
        ((ADMITTED, READY), 1, True),
        ((READY, RESET), 0, True),
        ((DECIDING, ADMITTED, DECIDING), None, False),
    ],
)
def test_head(statuses: tuple[Status, ...], head: int | None, due: bool) -> None:  # noqa: FBT001 - a table of expectations
    """The head is the oldest that can be acted on; it is due unless it was deferred."""
    pending, entered = deque_of(*statuses)

    assert pending.head() is (None if head is None else entered[head])
    assert pending.due() is due


def test_head_passes_by_one_that_is_waited_for() -> None:
    """A connection that another call waits for is nobody else's head."""
    pending, entered = deque_of(READY, DEFERRED)
    entered[0]._stay.taker = object()
    assert pending.head() is entered[1]
    entered[0]._stay.taker = None
    assert pending.head() is entered[0]


def test_an_illegal_move_leaves_the_deque_as_it_was() -> None:
    """An illegal transition raises and changes neither the deque nor its books."""
    pending, entered = deque_of(DEFERRED, DECIDING, ADMITTED, RESET)
    before = [each.status for each in entered]
    for each, to in itertools.product(entered, Status):
        if to in LEGAL[each.status]:
            continue
        with pytest.raises(RuntimeError, match="cannot go from"):
            pending.move(each, to, 5)
    for each in (entered[0], entered[2], entered[3]):
        with pytest.raises(RuntimeError, match="cannot go from"):
            pending.resume(each, 5)

    assert [each.status for each in entered] == before
    assert len(pending) == 4
    assert pending.deciding == 1
    assert pending.undecided() == tuple(entered[:3])
    assert pending.next_alarm == 10


def test_an_illegal_entry_leaves_the_deque_as_it_was() -> None:
    """What has found its end cannot be put on the deque."""
    pending, _ = deque_of()
    for end in ENDS:
        gone = at(end)
        with pytest.raises(RuntimeError, match="cannot go from"):
            pending.enter(gone, DEFERRED, 0)
        assert gone.status is end
        assert not gone._kept
    assert len(pending) == 0
    assert pending.next_alarm is None


@pytest.mark.parametrize("before", [QUEUED, DEFERRED], ids=lambda status: status.value)
def test_resume_gives_back_what_was(before: Status) -> None:
    """A decision without a verdict puts its connection back in its state and place."""
    pending, entered = deque_of(DECIDING, DEFERRED)
    if before is DEFERRED:
        pending.move(entered[0], DEFERRED, 1)
        pending.move(entered[0], DECIDING, 2)
    pending.resume(entered[0], 3)

    assert entered[0].status is before
    assert pending.head() is entered[0]
    assert pending.deciding == 0
    assert pending.next_alarm == 10


async def test_a_fresh_one_can_be_kept_undecided(listener: Listener[Stream], dial: Dial) -> None:
    """A first offer without a verdict leaves the connection first in line, queued and due."""
    first = dial(listener)
    await queued(listener, 1)
    dial(listener)
    await queued(listener, 2)
    for _ in range(2):
        with pytest.raises(InvalidVerdictError):
            listener.accept_nowait(lambda _: 7)  # type: ignore[arg-type,return-value]

        assert [(each.status, each.caller_id) for each in listener.pending] == [
            (QUEUED, first.getsockname())
        ]
    assert listener.statistics().pending == 1
    (await listener.accept()).close()
    assert listener.statistics().pending == 0


def test_a_loss_stays_until_it_is_reported() -> None:
    """A loss keeps its place, counts for the bound, and leaves when it was reported."""
    pending, entered = deque_of(DEFERRED, DEFERRED, max_pending=2)
    pending.move(entered[0], RESET, 1)

    assert pending.full
    assert pending.head() is entered[0]
    assert pending.undecided() == (entered[1],)
    pending.report(entered[0])
    assert not pending.full
    assert not entered[0]._kept
    assert pending.head() is entered[1]


def test_the_deadline_counts_from_the_first_deferral() -> None:
    """Later deferrals do not put the deadline off."""
    pending, entered = deque_of(DEFERRED)
    for now in range(1, 10):
        pending.move(entered[0], DECIDING, now)
        pending.move(entered[0], DEFERRED, now)
    assert pending.next_alarm == 10
    assert pending.alarms(9.99, 1000)[0] == []
    assert pending.alarms(10, 1000)[0] == entered
    assert entered[0].status is DEFERRED


def test_a_deadline_while_deciding() -> None:
    """One under decision at its deadline expires after it was deferred again, once."""
    pending, entered = deque_of(DEFERRED)
    pending.move(entered[0], DECIDING, 9)
    assert pending.alarms(11, 1000)[0] == []
    pending.move(entered[0], DEFERRED, 12)
    assert pending.next_alarm == 10
    assert pending.alarms(12, 1000)[0] == entered
    assert pending.alarms(12, 1000)[0] == []


def test_a_deadline_while_deciding_that_nobody_asked_about() -> None:
    """Deferred again after its deadline, before expired() was asked, one expires once."""
    pending, entered = deque_of(DEFERRED)
    pending.move(entered[0], DECIDING, 9)
    pending.move(entered[0], DEFERRED, 12)

    assert pending.alarms(13, 1000)[0] == entered


def test_a_deadline_while_deciding_that_was_given_back() -> None:
    """One under decision at its deadline expires after the decision was cancelled, too."""
    pending, entered = deque_of(DEFERRED)
    pending.move(entered[0], DECIDING, 9)
    assert pending.alarms(11, 1000)[0] == []
    pending.resume(entered[0], 12)

    assert pending.alarms(12, 1000)[0] == entered


def test_several_deadlines_while_deciding() -> None:
    """Those under decision at their deadline expire once each, in whatever order they end."""
    pending, entered = deque_of(DEFERRED, DEFERRED, DEFERRED)
    for n, each in enumerate(entered):
        pending.move(each, DECIDING, 9 + n)
    later = pending_transport(("192.0.2.9", 9))
    pending.enter(later, DEFERRED, 5)
    assert pending.alarms(14, 1000) == ([], [])
    pending.move(entered[2], DEFERRED, 14)
    pending.resume(entered[0], 14)
    pending.move(entered[1], REJECTED, 14)

    assert pending.next_alarm == 10
    assert serials(pending.alarms(14, 1000)[0]) == [0, 2]
    assert pending.next_alarm == 15
    assert pending.alarms(15, 1000) == ([later], [])


def test_a_deadline_comes_before_a_hint() -> None:
    """One whose deadline has come is expired, and not woken as well."""
    pending, entered = deque_of(DEFERRED, DEFERRED)
    for each in entered:
        each._stay.wake_at = 10
        pending.set_alarm(each)

    assert pending.alarms(10, 1) == (entered[:1], [])
    assert pending.alarms(10, 1) == (entered[1:], [])
    assert pending.alarms(10, 1) == ([], [])


def test_times_that_come_at_once() -> None:
    """At one time those that were taken first are woken first, whenever that was asked for."""
    pending, entered = deque_of(*[DEFERRED] * 5)
    for each in (entered[3], entered[0], entered[4], entered[1], entered[2]):
        each._stay.wake_at = 3
        pending.set_alarm(each)

    assert pending.alarms(3, 1000) == ([], entered)


def test_leaving_forgets_the_neighbours() -> None:
    """One that is kept by somebody does not keep those that were beside it on the deque."""
    pending, entered = deque_of(*[DEFERRED] * 4)
    kept = entered.pop(2)
    witness = _Witness()
    entered[1].state = witness
    weak = weakref.ref(witness)
    pending.move(kept, RESET, 1)
    pending.report(kept)
    assert list(pending) == entered
    del pending, entered, witness
    gc.collect()

    assert kept.status is RESET
    assert weak() is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_leaving_in_any_order(order: tuple[int, ...]) -> None:
    """Whoever leaves, those who stay keep their order, and the next goes behind them."""
    pending, entered = deque_of(*[DEFERRED] * 4)
    staying = list(entered)
    for n in order:
        staying.remove(entered[n])
        pending.move(entered[n], CLOSED, 1)
        assert list(pending) == staying
        assert len(pending) == len(staying)
        assert pending.oldest_deferred() is (staying[0] if staying else None)
    last = pending_transport()
    pending.enter(last, DEFERRED, 2)
    assert list(pending) == [last]


def test_no_deadline() -> None:
    """Without a limit nothing expires."""
    pending, _ = deque_of(DEFERRED, defer_timeout=None)

    assert pending.next_alarm is None
    assert pending.alarms(1e12, 1000)[0] == []


def test_a_limit_of_zero_expires_at_once() -> None:
    """Zero means zero: a deferred connection is over its deadline at once."""
    pending, entered = deque_of(DEFERRED, defer_timeout=0)

    assert pending.next_alarm == 0
    assert pending.alarms(0, 1000)[0] == entered


def test_decided_ones_leave_no_deadline() -> None:
    """The next deadline is that of a connection that can still expire."""
    pending, entered = deque_of(DEFERRED, DEFERRED)
    pending.move(entered[0], DECIDING, 1)
    pending.move(entered[0], REJECTED, 2)
    pending.move(entered[1], RESET, 3)

    assert pending.next_alarm is None


def test_alarms_of_the_decided_are_bounded() -> None:
    """Ten thousand deferred and decided connections do not pile up behind a waiting one."""
    pending, entered = deque_of(DEFERRED)
    entered[0]._stay.wake_at = 5
    pending.set_alarm(entered[0])
    for n in range(10_000):
        each = pending_transport(("192.0.2.9", n))
        pending.enter(each, DEFERRED, 1)
        each._stay.wake_at = 6
        pending.set_alarm(each)
        pending.move(each, DECIDING, 1)
        pending.move(each, REJECTED, 1)

    assert len(pending) == 1
    assert len(pending._alarms) < 100
    assert len(pending._deadlines) < 100
    assert pending.alarms(5, 1000) == ([], entered)
    assert pending.alarms(10, 1000) == (entered, [])


def test_many_deferrals_of_one_are_bounded() -> None:
    """Ten thousand deferrals of one connection keep one deadline."""
    pending, entered = deque_of(DEFERRED)
    for n in range(10_000):
        now = n / 500  # twice as long as the deadline
        pending.move(entered[0], DECIDING, now)
        pending.move(entered[0], DEFERRED, now)

    assert len(pending._deadlines) < 100
    assert pending.alarms(20, 1000)[0] == entered


def test_many_waits_of_one_are_bounded() -> None:
    """Ten thousand times, each sooner than the one before, leave few entries behind."""
    pending, entered = deque_of(DEFERRED)
    for n in range(10_000):
        entered[0]._stay.wake_at = 9 - n / 10_000
        pending.set_alarm(entered[0])

    assert len(pending._alarms) < 100
    assert pending.alarms(9, 1000) == ([], entered)


def test_a_hint_rings_once_and_the_deadline_after_it() -> None:
    """One that was woken at its time is not woken again, and expires at its deadline."""
    pending, entered = deque_of(DEFERRED)
    entered[0]._stay.wake_at = 3
    pending.set_alarm(entered[0])

    assert pending.next_alarm == 3
    assert pending.alarms(3, 1000) == ([], entered)
    assert pending.alarms(9, 1000) == ([], [])
    assert pending.next_alarm == 10
    assert pending.alarms(10, 1000) == (entered, [])


def test_a_sooner_time_rings_first() -> None:
    """A time set later, and sooner than the one before, rings at its own time."""
    pending, entered = deque_of(DEFERRED)
    for when in (8, 5, 7):
        entered[0]._stay.wake_at = when
        pending.set_alarm(entered[0])

    assert pending.alarms(5, 1000) == ([], [])
    assert pending.next_alarm == 7
    assert pending.alarms(7, 1000) == ([], entered)


def test_a_decided_one_is_not_kept_alive_for_ever() -> None:
    """A decided connection is forgotten at its deadline at the latest."""
    pending, entered = deque_of(DEFERRED, DEFERRED)
    weak = weakref.ref(_Witness())
    witness = _Witness()
    entered[1].state = witness
    weak = weakref.ref(witness)
    pending.move(entered[1], DECIDING, 1)
    pending.move(entered[1], REJECTED, 1)
    pending.alarms(10, 1000)[0]
    del entered[:], witness
    gc.collect()

    assert weak() is None


class _Witness:
    """Something that can be referred to weakly."""


def test_full_by_deciding() -> None:
    """At either bound nothing further may be taken; `None` is no bound."""
    pending, entered = deque_of(DECIDING, DECIDING, max_deciding=2)
    assert pending.full
    pending.resume(entered[0], 1)
    assert not pending.full
    assert deque_of(*[DEFERRED] * 3, max_pending=3)[0].full
    assert not deque_of(*[DEFERRED] * 2, max_pending=3)[0].full
    assert not deque_of(*[DEFERRED] * 500)[0].full


# -- the deque, against a plain list


@attrs.define(eq=False)
class Row:
    """What the model knows of a connection on the deque."""

    pending: PendingTransport
    status: Status
    before: Status = QUEUED
    deadline: int | None = None
    wake_at: int | None = None
    decisions: int = 0


def serials(several: list[PendingTransport]) -> list[int]:
    """Return the callers of *several* connections, in the order of taking."""
    return sorted(each.caller_id[1] for each in several)


class DequeMachine(RuleBasedStateMachine):
    """The deque beside a plain list that does the same in the simplest way."""

    max_pending: ClassVar[int | None] = 6
    max_deciding: ClassVar[int] = 3
    defer_timeout: ClassVar[int | None] = 5

    def __init__(self) -> None:
        super().__init__()
        self.deque = PendingDeque(self.max_pending, self.max_deciding, self.defer_timeout)
        self.rows: list[Row] = []
        self.left: list[tuple[PendingTransport, Status]] = []
        self.now = 0
        self.serial = 0

    # The model.

    def _any(self, *statuses: Status) -> list[Row]:
        return [row for row in self.rows if row.status in statuses]

    def _full(self) -> bool:
        few = self.max_pending is None or len(self.rows) < self.max_pending
        return not (few and len(self._any(DECIDING)) < self.max_deciding)

    def _move(self, row: Row, status: Status) -> None:
        self.deque.move(row.pending, status, self.now)
        self._moved(row, status)

    def _moved(self, row: Row, status: Status) -> None:
        row.status = status
        if status is DEFERRED:
            row.before = DEFERRED
            row.wake_at = row.pending._stay.wake_at  # type: ignore[assignment]
            if row.deadline is None and self.defer_timeout is not None:
                row.deadline = self.now + self.defer_timeout
        if status in ENDS - LOSSES:
            self.rows.remove(row)
            self.left.append((row.pending, status))

    def _offered_next(self) -> Row | None:
        rows = [row for row in self.rows if row.status not in {DECIDING, ADMITTED}]
        return rows[0] if rows else None

    # What can happen.

    @rule(seconds=st.integers(0, 4))
    def wait(self, seconds: int) -> None:
        """Let time pass; nobody asks about deadlines."""
        self.now += seconds

    @precondition(lambda self: not self._full())
    @rule(status=st.sampled_from([QUEUED, DECIDING, DEFERRED, ADMITTED, RESET, EXPIRED]))
    def take(self, status: Status) -> None:
        """Take a connection that is not decided at once."""
        self.serial += 1
        row = Row(pending_transport(("192.0.2.1", self.serial)), QUEUED)
        self.deque.enter(row.pending, status, self.now)
        self.rows.append(row)
        self._moved(row, status)
        row.decisions += status is DECIDING

    @rule()
    def act(self) -> None:
        """Do what an accept call does: offer the head, hand it out, or report the loss."""
        row = self._offered_next()
        head = self.deque.head()
        assert head is (None if row is None else row.pending)
        if row is None or head is None:
            return
        if row.status in LOSSES:
            self.deque.report(head)
            self.rows.remove(row)
            self.left.append((head, row.status))
        elif row.status is READY:
            self._move(row, ACCEPTED)
        elif len(self._any(DECIDING)) < self.max_deciding:
            self._move(row, DECIDING)
            row.decisions += 1

    @precondition(lambda self: self._any(DECIDING))
    @rule(
        data=st.data(),
        status=st.sampled_from([ACCEPTED, REJECTED, ADMITTED, FAILED, RESET, EXPIRED]),
    )
    def decide(self, data: st.DataObject, status: Status) -> None:
        """End any of the decisions under way; they finish in any order."""
        self._move(data.draw(st.sampled_from(self._any(DECIDING))), status)

    @precondition(lambda self: self._any(DECIDING))
    @rule(data=st.data(), wait=st.sampled_from([None, 0, 1, 2, 4, 8]))
    def put_off(self, data: st.DataObject, wait: int | None) -> None:
        """Defer one that is under decision, until it is woken or for a time."""
        row = data.draw(st.sampled_from(self._any(DECIDING)))
        row.pending._stay.wake_at = None if wait is None else self.now + wait
        self._move(row, DEFERRED)

    @precondition(lambda self: self._any(DEFERRED))
    @rule(data=st.data(), wait=st.sampled_from([None, 0, 1, 2, 4, 8]))
    def wait_for_something_else(self, data: st.DataObject, wait: int | None) -> None:
        """Change what a deferred one waits for: another time, or none."""
        row = data.draw(st.sampled_from(self._any(DEFERRED)))
        row.wake_at = None if wait is None else self.now + wait
        row.pending._stay.wake_at = row.wake_at
        self.deque.set_alarm(row.pending)

    @precondition(lambda self: self._any(DECIDING))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a decision: back to what was."""
        row = data.draw(st.sampled_from(self._any(DECIDING)))
        self.deque.resume(row.pending, self.now)
        self._moved(row, row.before)

    @precondition(lambda self: self._any(ADMITTED))
    @rule(data=st.data(), status=st.sampled_from([READY, RESET]))
    def complete(self, data: st.DataObject, status: Status) -> None:
        """Let the gate produce the socket of an accepted one, or lose it."""
        self._move(data.draw(st.sampled_from(self._any(ADMITTED))), status)

    @precondition(lambda self: self._any(DEFERRED, QUEUED))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Let the peer of one that waits reset it."""
        self._move(data.draw(st.sampled_from(self._any(DEFERRED, QUEUED))), RESET)

    @rule(limit=st.sampled_from([1, 3, 1000]))
    def ring(self, limit: int) -> None:
        """Expire and wake whoever's time has come: exactly those, each once, as they are."""
        expired: list[PendingTransport] = []
        woken: list[PendingTransport] = []
        while (alarm := self.deque.next_alarm) is not None and alarm <= self.now:
            some = self.deque.alarms(self.now, limit)
            assert sum(map(len, some)) <= limit
            expired += some[0]
            woken += some[1]
        assert self.deque.alarms(self.now, limit) == ([], [])
        rows = self._any(DEFERRED)
        over = [row for row in rows if row.deadline is not None and row.deadline <= self.now]
        due = [
            row
            for row in rows
            if row not in over and row.wake_at is not None and row.wake_at <= self.now
        ]
        assert serials(expired) == serials([row.pending for row in over])
        assert serials(woken) == serials([row.pending for row in due])
        assert all(each.status is DEFERRED for each in (*expired, *woken))
        for row in due:
            row.wake_at = None
        for row in over:
            self._move(row, EXPIRED)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), status=st.sampled_from(Status))
    def break_the_rules(self, data: st.DataObject, status: Status) -> None:
        """Try a transition that there is none of; the invariants see that nothing changed."""
        row = data.draw(st.sampled_from(self.rows))
        if status not in LEGAL[row.status]:
            with pytest.raises(RuntimeError, match="cannot go from"):
                self.deque.move(row.pending, status, self.now)

    @precondition(lambda self: self.left)
    @rule(data=st.data(), status=st.sampled_from(Status))
    def come_back(self, data: st.DataObject, status: Status) -> None:
        """Try to put one back that has found its end."""
        pending, end = data.draw(st.sampled_from(self.left))
        with pytest.raises(RuntimeError, match=f"cannot go from {end.value}"):
            self.deque.enter(pending, status, self.now)

    # What must always hold.

    @invariant()
    def each_is_in_one_state(self) -> None:
        """Every connection is where the model has it, and those that left stay gone."""
        assert [row.pending.status for row in self.rows] == [row.status for row in self.rows]
        assert all(row.pending._kept for row in self.rows)
        assert all(each.status is status for each, status in self.left)
        assert not any(each._kept for each, _ in self.left)
        assert len(self.deque) == len(self.rows)

    @invariant()
    def order_of_taking(self) -> None:
        """The undecided are in the order of taking, whatever happened to them."""
        assert list(self.deque.undecided()) == [
            row.pending for row in self.rows if row.status not in LOSSES
        ]
        serials = [row.pending.caller_id[1] for row in self.rows]
        assert serials == sorted(serials)

    @invariant()
    def the_oldest_is_next(self) -> None:
        """The head is the oldest that is neither under decision nor to come."""
        row = self._offered_next()
        assert self.deque.head() is (None if row is None else row.pending)
        assert self.deque.due() == (row is not None and row.status is not DEFERRED)

    @invariant()
    def bounded(self) -> None:
        """The books of the bounds are right, and nothing grows beyond them."""
        assert self.deque.deciding == len(self._any(DECIDING))
        assert self.deque.deciding <= self.max_deciding
        assert self.deque.full == self._full()
        for entries in (self.deque._alarms, self.deque._deadlines):
            assert len(entries) <= 2 * max(len(self.rows), 6) + 65

    @invariant()
    def deadlines(self) -> None:
        """Nobody that can expire is forgotten, and nobody who has left is waited for."""
        waiting = [
            when
            for row in self._any(DEFERRED)
            for when in (row.deadline, row.wake_at)
            if when is not None
        ]
        alarm = self.deque.next_alarm
        if waiting:
            assert alarm is not None
            assert alarm <= min(waiting)
        if alarm is not None:
            # It may ring in vain, for a time that somebody waits for no more.
            assert alarm in {
                when for row in self.rows for when in (row.deadline, row.pending._stay.alarm)
            }


class UnlimitedMachine(DequeMachine):
    """The same without a limit of number or time."""

    max_pending: ClassVar[int | None] = None
    defer_timeout: ClassVar[int | None] = None


class ImpatientMachine(DequeMachine):
    """The same with places for two, one decision at a time, and no patience at all."""

    max_pending: ClassVar[int | None] = 2
    max_deciding: ClassVar[int] = 1
    defer_timeout: ClassVar[int | None] = 0


MACHINE = settings(max_examples=100, stateful_step_count=40)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [DequeMachine, UnlimitedMachine, ImpatientMachine])
def test_the_deque_against_a_list(machine: type[DequeMachine]) -> None:
    """Whatever is done to it, the deque is the plain list that it claims to be."""
    run_state_machine_as_test(machine, settings=MACHINE)


@pytest.mark.parametrize("data", [5, "text", None, [1, 2]])
def test_callee_data_is_bytes(data: Any) -> None:
    """What is no bytes is no callee data; what was there stays."""
    callee_data = CalleeData(10)
    callee_data.set(b"abc")
    with pytest.raises(TypeError):
        callee_data.set(data)
    with pytest.raises(TypeError):
        callee_data.write(data)
    assert bytes(callee_data) == b"abc"
