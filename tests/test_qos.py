"""Quality of service: what a SYN tells, and what is applied to what is sent."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condaccept import (
    ACCEPT,
    DEFER,
    QOS,
    REJECT,
    AnyVerdict,
    ConnectionDeferredError,
    ConnectionRejectedError,
    FlowSpec,
    Listener,
    PendingTransport,
    QualityOfServiceError,
    Status,
    Stream,
    Syn,
    _sockets,
    listen,
)
from condaccept._qos import parse_syn
from condaccept.testing import memory_listener, pending_transport
from tests.support import LIMIT, accept, until, wire_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from condaccept import Outcome
    from tests.support import Dial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux saves a SYN, and paces")

TOS = (socket.IPPROTO_IP, socket.IP_TOS)
TCLASS = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
PACING = (socket.SOL_SOCKET, 47)
SAVE_SYN = (socket.IPPROTO_TCP, 27)
EF = 0xB8  # RFC 3246: expedited forwarding, 46 << 2

# What Linux 6.18 has saved on loopback, from callers that had set EF.
V4 = bytes.fromhex(
    "45b8003c3a424000400601c07f0000017f000001"
    "c038e5f3a4cddfdf00000000a002ffd7fe300000"
    "0204ffd70402080ad7cc8343000000000103030a"
)
V6 = bytes.fromhex(
    "6b82c44300280640"
    "0000000000000000000000000000000100000000000000000000000000000001"
    "b48cc4953e6ea92100000000a002ffc400300000"
    "0204ffc40402080a128bdea7000000000103030a"
)
ETHERNET = bytes(12)
TCP = V4[20:40]


def has_ipv6() -> bool:
    """Whether there is an IPv6 loopback."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@attrs.frozen
class Place:
    """A listener, and how the clients of a test reach it."""

    listener: Listener[Stream]
    family: socket.AddressFamily
    option: tuple[int, int]
    """What a side of this kind of connection sets its DS field with."""
    other: tuple[int, int] | None
    """What it could set, too, without any effect."""

    def client(self, service_type: int = 0, ttl: int | None = None) -> socket.socket:
        """Return a socket that is to be connected, with what its SYN is to say."""
        client = socket.socket(self.family)
        client.settimeout(LIMIT)
        client.setsockopt(*self.option, service_type)
        if ttl is not None and self.family is socket.AF_INET:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        elif ttl is not None:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        return client

    def dial(self, service_type: int = 0, ttl: int | None = None) -> socket.socket:
        """Connect."""
        client = self.client(service_type, ttl)
        host = "127.0.0.1" if self.family is socket.AF_INET else "::1"
        client.connect((host, self.listener.sockname[1]))
        return client


def dual_stack() -> socket.socket:
    """Return a socket that listens for both families."""
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(*SAVE_SYN, 1)
    sock.bind(("::", 0))
    sock.listen()
    return sock


@pytest.fixture(
    params=[
        "v4",
        pytest.param("v6", marks=needs_ipv6),
        pytest.param("v4-mapped", marks=needs_ipv6),
        pytest.param("v6-dual", marks=needs_ipv6),
    ]
)
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """IPv4; IPv6; and both kinds of caller of one socket."""
    if request.param == "v4":
        kind: Any = (await listen("127.0.0.1", 0), socket.AF_INET, TOS, None)
    elif request.param == "v6":
        kind = (await listen("::1", 0), socket.AF_INET6, TCLASS, TOS)
    elif request.param == "v4-mapped":
        kind = (Listener.from_socket(dual_stack()), socket.AF_INET, TOS, TCLASS)
    else:
        kind = (Listener.from_socket(dual_stack()), socket.AF_INET6, TCLASS, TOS)
    async with kind[0]:
        yield Place(*kind)


def option_of(stream: Stream, option: tuple[int, int]) -> int:
    """Read an option of an accepted connection, of eight bytes if it has them."""
    value: bytes = stream.get_extra_info("socket").getsockopt(*option, 8)
    return int.from_bytes(value, sys.byteorder)


def wants(flow: FlowSpec | None) -> Callable[[PendingTransport], AnyVerdict]:
    """Return a condition that accepts with *flow*."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        assert pending.sqos is not None
        pending.sqos.sending = flow
        return ACCEPT

    return condition


# -- values


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"token_rate": 0}, ValueError, "from 1 to 2"),
        ({"token_rate": -1}, ValueError, "from 1 to 2"),
        ({"token_rate": 2**64}, ValueError, "from 1 to 2"),
        ({"token_rate": 1.0}, TypeError, "token_rate is an integer or None, got 1.0"),
        ({"token_rate": True}, TypeError, "token_rate is an integer or None, got True"),
        ({"service_type": -4}, ValueError, "service_type is a byte"),
        ({"service_type": 256}, ValueError, "service_type is a byte"),
        ({"service_type": 0xB9}, ValueError, "ECN: pass 184, or DSCP << 2; got 185"),
        ({"service_type": 2}, ValueError, "pass 0, or DSCP"),
        ({"service_type": "ef"}, TypeError, "service_type is an integer or None, got 'ef'"),
        ({"service_type": False}, TypeError, "service_type is an integer or None, got False"),
    ],
)
def test_flow_spec_refuses(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    """A flow spec that cannot be applied cannot be made, and the message says what would do."""
    with pytest.raises(error, match=says.replace("(", r"\(").replace("<<", "<<")):
        FlowSpec(**arguments)


def test_flow_spec() -> None:
    """A flow spec is a value: its bounds are included, it compares, and it cannot be changed."""
    assert FlowSpec() == FlowSpec(token_rate=None, service_type=None)
    for rate in (1, 2**64 - 1):
        assert FlowSpec(rate).token_rate == rate
    for service_type in (0, 0xFC):
        assert FlowSpec(service_type=service_type).service_type == service_type
    assert len({FlowSpec(1, 4), FlowSpec(1, 4), FlowSpec(2, 4)}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        FlowSpec().token_rate = 5  # type: ignore[misc]


def test_qos() -> None:
    """What is received can only be looked at, and what is sent is a flow spec or nothing."""
    qos = QOS()
    assert (qos.sending, qos.receiving) == (None, FlowSpec())
    qos.sending = FlowSpec(5)
    qos.sending = None
    with pytest.raises(TypeError, match=r"^sending is a FlowSpec or None, got 5$"):
        qos.sending = 5  # type: ignore[assignment]
    with pytest.raises(attrs.exceptions.FrozenAttributeError):
        qos.receiving = FlowSpec(5)
    with pytest.raises(TypeError):
        QOS(receiving=None)  # type: ignore[arg-type]
    assert qos == QOS()


# -- the headers of a SYN


def test_parse_ipv4() -> None:
    """The headers of an IPv4 SYN say all of this."""
    assert parse_syn(V4) == Syn(
        ttl=64,
        traffic_class=EF,
        flow_label=None,
        window=0xFFD7,
        mss=0xFFD7,
        window_scale=10,
        sack_permitted=True,
        timestamps=True,
        options=(
            (2, b"\xff\xd7"),
            (4, b""),
            (8, bytes.fromhex("d7cc834300000000")),
            (1, b""),
            (3, b"\x0a"),
        ),
    )


def test_parse_ipv6() -> None:
    """Those of an IPv6 SYN say the same, and a flow label."""
    syn = parse_syn(V6)

    assert syn is not None
    assert (syn.ttl, syn.traffic_class, syn.flow_label) == (64, EF, 0x2C443)
    assert (syn.window, syn.mss, syn.window_scale) == (0xFFC4, 0xFFC4, 10)


def test_parse_keeps_the_bits_of_ecn() -> None:
    """The traffic class is the whole byte, as it came."""
    for raw in (bytes([0x45, 0x03]) + V4[2:], b"\x60\x30" + V6[2:]):
        syn = parse_syn(raw)
        assert syn is not None
        assert syn.traffic_class == 3


def test_parse_behind_a_link_header() -> None:
    """The header of Ethernet that TCP_SAVE_SYN puts in front for a 2 is passed over."""
    assert parse_syn(ETHERNET + b"\x08\x00" + V4) == parse_syn(V4) is not None
    assert parse_syn(ETHERNET + b"\x86\xdd" + V6) == parse_syn(V6) is not None
    assert parse_syn(ETHERNET + b"\x08\x06" + V4) is None
    # 8.0.0.0 as a source does not look like one.
    odd = V4[:12] + b"\x08\x00" + V4[14:]
    assert parse_syn(odd) == parse_syn(V4)


def test_parse_passes_over_what_stands_between() -> None:
    """Options of IPv4 and extension headers of IPv6 move the TCP header, and no more."""
    assert parse_syn(bytes([0x46]) + V4[1:20] + bytes(4) + V4[20:]) == parse_syn(V4)
    for kind in (0, 43, 60):
        first = bytes([60, 0]) + bytes(6)
        second = bytes([6, 1]) + bytes(14)
        raw = V6[:6] + bytes([kind]) + V6[7:40] + first + second + V6[40:]
        assert parse_syn(raw) == parse_syn(V6)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        V4 + b"\0",
        V6 + b"\0",
        bytes([0x55]) + V4[1:],
        bytes([0x44]) + V4[1:],
        V4[:9] + bytes([17]) + V4[10:],
        V4[:33] + bytes([0x10]) + V4[34:],
        V4[:32] + bytes([0x40]) + V4[33:],
        V6[:6] + bytes([0]) + V6[7:40],
        V6[:6] + bytes([0]) + V6[7:40] + bytes([6]),
        V6[:6] + bytes([60]) + V6[7:40] + bytes([6, 255]) + V6[40:],
        # Headers that lie over each other: 16 bytes of IPv4, whose last four are TCP's first.
        b"\x44\0\0\0\0\0\0\0\x40\x06" + bytes(6) + V4[20:],
    ],
    ids=[
        "nothing",
        "longer-v4",
        "longer-v6",
        "version",
        "overlap",
        "udp",
        "no-syn",
        "short-tcp",
        "cut-extension",
        "half-extension",
        "long-extension",
        "short-ip",
    ],
)
def test_parse_refuses(raw: bytes) -> None:
    """What is not the headers of one SYN, and only them, is nothing."""
    assert parse_syn(raw) is None


@pytest.mark.parametrize("raw", [V4, V6])
def test_parse_refuses_what_was_cut(raw: bytes) -> None:
    """No beginning of the headers is taken for the whole."""
    assert not any(parse_syn(raw[:n]) for n in range(len(raw)))


def with_options(options: bytes) -> Syn:
    """Return a SYN of IPv4 with these TCP options, which are a multiple of four bytes."""
    offset = (20 + len(options)) // 4
    syn = parse_syn(V4[:20] + TCP[:12] + bytes([offset << 4]) + TCP[13:] + options)
    assert syn is not None
    return syn


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (b"", ()),
        (b"\x00\x02\x04\x05", ()),  # behind the end of the list
        (b"\x01\x01\x01\x00", ((1, b""),) * 3),
        (b"\x04\x02\x02\x00", ((4, b""),)),  # a length below the shortest
        (b"\x04\x02\x02\x01", ((4, b""),)),
        (b"\x04\x02\x02\x04", ((4, b""),)),  # a length beyond the end
        (b"\x01\x01\x01\x02", ((1, b""),) * 3),  # a kind without its length
        (b"\xfd\x04ab", ((253, b"ab"),)),
    ],
)
def test_options(options: bytes, found: tuple[tuple[int, bytes], ...]) -> None:
    """Options are listed up to the end of their list, or to the first that is malformed."""
    assert with_options(options).options == found


def test_options_that_say_nothing() -> None:
    """A SYN without options says neither size nor scale, and offers nothing."""
    syn = with_options(b"")
    assert (syn.mss, syn.window_scale, syn.sack_permitted, syn.timestamps) == (
        *(None, None),
        *(False, False),
    )


def test_options_of_the_wrong_length_are_not_read() -> None:
    """A segment size of one byte is none."""
    assert with_options(b"\x02\x03\x05\x01").mss is None
    assert with_options(b"\x03\x04\x05\x05").window_scale is None


def test_the_last_of_two_options_counts() -> None:
    """Said twice, the later word holds, as it does for the kernel."""
    assert with_options(b"\x02\x04\x00\x01\x02\x04\x00\x02").mss == 2


@given(st.binary(max_size=160))
def test_parse_takes_any_bytes(raw: bytes) -> None:
    """Whatever the bytes, the result is a SYN or nothing."""
    assert isinstance(parse_syn(raw), (Syn, type(None)))


@given(st.data())
def test_parse_takes_any_change(data: st.DataObject) -> None:
    """So it is for bytes that are nearly a SYN."""
    raw = bytearray(data.draw(st.sampled_from([V4, V6, ETHERNET + b"\x08\x00" + V4])))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    assert isinstance(parse_syn(bytes(raw[:cut])), (Syn, type(None)))
    assert isinstance(parse_syn(bytes(raw)), (Syn, type(None)))


@given(
    ttl=st.integers(0, 255),
    traffic_class=st.integers(0, 255),
    flow_label=st.none() | st.integers(0, 2**20 - 1),
    window=st.integers(0, 65535),
    mss=st.integers(0, 65535),
    more=st.lists(st.tuples(st.integers(5, 255), st.binary(max_size=6)), max_size=3),
)
def test_parse_finds_what_was_written(  # noqa: PLR0917 - Hypothesis passes by name
    ttl: int,
    traffic_class: int,
    flow_label: int | None,
    window: int,
    mss: int,
    more: list[tuple[int, bytes]],
) -> None:
    """Headers that were put together by hand are read as what they say."""
    said = ((2, struct.pack(">H", mss)), *more)
    options = b"".join(bytes([kind, len(data) + 2]) + data for kind, data in said)
    options += bytes(-len(options) % 4)
    if flow_label is None:
        ip = struct.pack(">BBHHHBBHII", 0x45, traffic_class, 0, 0, 0, ttl, 6, 0, 0, 0)
    else:
        word = 6 << 28 | traffic_class << 20 | flow_label
        ip = struct.pack(">IHBB32x", word, 0, 6, ttl)
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 0, (20 + len(options)) // 4 << 4, 0x02, window, 0, 0)

    syn = parse_syn(ip + tcp + options)

    assert syn is not None
    assert (syn.ttl, syn.traffic_class, syn.flow_label) == (ttl, traffic_class, flow_label)
    assert (syn.window, syn.options) == (window, said)
    assert syn.mss == mss
    assert syn.timestamps == any(kind == 8 for kind, _ in more)


# -- what a condition sees


def test_pending_by_hand() -> None:
    """A pending transport made for a test has the quality of service it was given."""
    pending = pending_transport(syn=V4[:1] + b"\xbb" + V4[2:], groups={"gold": FlowSpec(7)})

    assert pending.sqos == QOS(None, FlowSpec(None, EF))
    assert pending.sqos is pending.sqos
    assert pending.syn == parse_syn(V4[:1] + b"\xbb" + V4[2:]) != parse_syn(V4)
    assert pending.gqos is None
    pending.group = "gold"
    assert pending.gqos == FlowSpec(7)
    pending.group = "lead"
    assert pending.gqos is None


def test_pending_by_hand_without() -> None:
    """Without a SYN nothing is known of it, and a Unix caller has no quality of service."""
    pending = pending_transport()
    assert (pending.sqos, pending.syn) == (QOS(), None)

    unix = pending_transport("/run/caller")
    assert (unix.sqos, unix.syn, unix.gqos) == (None, None, None)


async def test_receiving(place: Place) -> None:
    """What the caller asked for before it connected stands in its SYN, for both families."""
    seen: list[tuple[QOS | None, Syn | None]] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.append((pending.sqos, pending.syn))
        return ACCEPT

    for service_type in (EF, 0, 0x20):
        with place.dial(service_type, ttl=33):
            async with await place.listener.accept(condition):
                qos, syn = seen.pop()
                assert qos == QOS(None, FlowSpec(None, service_type))
                assert syn is not None
                assert (syn.ttl, syn.traffic_class & 0xFC) == (33, service_type)
                assert (syn.flow_label is None) == (place.family is socket.AF_INET)
                assert syn.mss is not None
                assert (2, struct.pack(">H", syn.mss)) in syn.options


async def test_receiving_can_be_asked_again(place: Place) -> None:
    """The kernel tells once; here it can be asked at every offer, and after the last."""
    kept: list[PendingTransport] = []
    seen: list[tuple[QOS | None, Syn | None]] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        kept.append(pending)
        seen.append((pending.sqos, pending.syn))
        return ACCEPT if len(seen) == 2 else DEFER

    with place.dial(EF):
        with pytest.raises(ConnectionDeferredError):
            await place.listener.accept(condition)
        async with await place.listener.accept(condition):
            assert kept[0] is kept[1]
            assert kept[0].syn == seen[0][1] == seen[1][1] is not None
            assert seen[0][0] == seen[1][0] == kept[0].sqos == QOS(None, FlowSpec(None, EF))


async def test_too_late_to_ask(listener: Listener[Stream], dial: Dial) -> None:
    """First asked after the verdict, the descriptor is somebody else's, and nothing is read."""
    kept: list[PendingTransport] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        kept.append(pending)
        return ACCEPT

    client = dial(listener)
    async with await listener.accept(condition):
        for ask in (lambda: kept[0].sqos, lambda: kept[0].syn):
            with pytest.raises(OSError, match="not pending any more"):
                ask()
        client.close()


async def test_nothing_is_made_for_who_does_not_ask(
    listener: Listener[Stream], dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose quality of service nobody asks for costs no object and no system call."""
    monkeypatch.setattr("condaccept._pending.QOS", None)
    monkeypatch.setattr("condaccept.gates._connection.saved_syn", None)
    monkeypatch.setattr("condaccept._admitting.apply_flow", None)
    dial(listener)
    async with await listener.accept(accept):
        pass


async def test_unix(tmp_path: Path, dial: Dial) -> None:
    """A Unix socket has no SYN and no quality of service."""
    seen: list[object] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.extend((pending.sqos, pending.syn, pending.gqos))
        return ACCEPT

    async with await listen(path=tmp_path / "s") as listener:
        dial(listener)
        (await listener.accept(condition)).close()
    assert seen == [None, None, None]


# -- where the SYN is kept


async def saved(listener: Listener[Stream], dial: Dial) -> Syn | None:
    """Return what a new connection's SYN says."""
    seen: list[Syn | None] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        assert pending.sqos is not None
        known = pending.sqos.receiving.service_type is not None
        seen.append(pending.syn)
        assert known == (pending.syn is not None)
        return REJECT

    dial(listener)
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(condition)
    return seen[0]


@pytest.mark.parametrize("mode", [None, 0, 1, 2])
async def test_saved_by_a_socket_handed_in(dial: Dial, mode: int | None) -> None:
    """On a socket that was handed in it is known if its owner, or *options*, has it saved."""
    sock = socket.create_server(("127.0.0.1", 0))
    options = [] if mode is None else [(*SAVE_SYN, mode)]
    listener: Listener[Stream] = Listener.from_socket(sock, options=options)
    async with listener:
        syn = await saved(listener, dial)
    assert (syn is not None) == bool(mode)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
async def test_saved_by_listen(host: str, dial: Dial) -> None:
    """On the sockets of `listen()` it is known, unless *options* say otherwise."""
    async with await listen(host, 0) as listener:
        assert await saved(listener, dial) is not None
    async with await listen(host, 0, options=[(*SAVE_SYN, 0)]) as listener:
        assert await saved(listener, dial) is None


@pytest.mark.parametrize(
    ("name", "value"), [("_TCP_SAVE_SYN", 9999), ("_TCP_SAVED_SYN", 9999), ("_LINUX", False)]
)
async def test_not_saved(
    dial: Dial, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """A kernel that cannot save it is listened on all the same; then it is not known."""
    monkeypatch.setattr(_sockets, name, value)
    async with await listen("127.0.0.1", 0) as listener:
        assert await saved(listener, dial) is None


# -- what is sent


@pytest.mark.parametrize("rate", [1, 10**6, 2**31 + 5, 2**32 - 1, 2**40])
async def test_token_rate(place: Place, rate: int) -> None:
    """The rate is that of the accepted socket, also where it is beyond 32 bits."""
    with place.dial():
        async with await place.listener.accept(wants(FlowSpec(token_rate=rate))) as stream:
            assert option_of(stream, PACING) == rate
            assert option_of(stream, place.option) == 0


async def test_service_type(place: Place) -> None:
    """The DS field is set by the option that matters for this caller, and by no other."""
    with place.dial(0x20):
        async with await place.listener.accept(wants(FlowSpec(service_type=EF))) as stream:
            assert option_of(stream, place.option) == EF
            if place.other is not None:
                assert option_of(stream, place.other) == 0
            assert option_of(stream, PACING) == 2**64 - 1


async def test_nothing_to_apply(place: Place) -> None:
    """No flow spec, and one without parts, leave everything as it is."""
    for flow in (None, FlowSpec()):
        with place.dial(EF):
            async with await place.listener.accept(wants(flow)) as stream:
                assert option_of(stream, place.option) == 0
                assert option_of(stream, PACING) == 2**64 - 1


async def test_it_is_so_for_everybody_who_sees_the_stream(dial: Dial) -> None:
    """The flow spec is in force before callee data is sent and before the factory is called."""
    seen: list[int] = []

    def factory(stream: Stream) -> Stream:
        seen.append(option_of(stream, TOS))
        return stream

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.set(b"hello")
        return wants(FlowSpec(5000, EF))(pending)

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        client = dial(listener)
        async with await listener.accept(condition):
            assert seen == [EF]
            assert await wire_end(client) == b"hello"


async def test_it_wins_over_the_options_of_the_listener(dial: Dial) -> None:
    """Parts that are given replace what the listener's options say; the others leave it."""
    rate = struct.pack("@Q", 4000)
    async with await listen("127.0.0.1", 0, options=[(*PACING, rate)]) as listener:
        listener.setsockopt(*TOS, 0x20)
        for flow, found in (
            (FlowSpec(service_type=EF), (4000, EF)),
            (FlowSpec(token_rate=9000), (9000, 0x20)),
        ):
            dial(listener)
            async with await listener.accept(wants(flow)) as stream:
                assert (option_of(stream, PACING), option_of(stream, TOS)) == found


async def test_it_belongs_to_an_offer(listener: Listener[Stream], dial: Dial) -> None:
    """What an offer that was deferred had asked for is forgotten; the SYN's word is not."""
    kept: list[QOS] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        assert pending.sqos is not None
        assert pending.sqos.sending is None
        assert pending.sqos.receiving == FlowSpec(None, 0)
        kept.append(pending.sqos)
        if len(kept) == 1:
            pending.sqos.sending = FlowSpec(5000)
            return DEFER
        kept[0].sending = FlowSpec(6000)
        return ACCEPT

    dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(condition)
    async with await listener.accept(condition) as stream:
        assert option_of(stream, PACING) == 2**64 - 1


async def test_an_async_condition(listener: Listener[Stream], dial: Dial) -> None:
    """A condition that takes its time asks for it all the same."""

    async def condition(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        assert pending.sqos is not None
        pending.sqos.sending = FlowSpec(5000)
        return ACCEPT

    dial(listener)
    async with await listener.accept(condition) as stream:
        assert option_of(stream, PACING) == 5000


# -- what cannot be applied


@attrs.frozen
class Refused:
    """A flow spec, a kernel that does not take it, and what the error then says."""

    change: Callable[[pytest.MonkeyPatch], None]
    part: FlowSpec
    says: str
    cause: int | None


def no_pacing(patch: pytest.MonkeyPatch) -> None:
    """Have the kernel asked for an option that it does not know."""
    patch.setattr(_sockets, "_SO_MAX_PACING_RATE", 9999)


def short_pacing(patch: pytest.MonkeyPatch) -> None:
    """Have the kernel asked for one of four bytes, as the rate was before Linux 4.20."""
    patch.setattr(_sockets, "_SO_MAX_PACING_RATE", socket.SO_RCVLOWAT)


def no_service_type(patch: pytest.MonkeyPatch) -> None:
    """The same for the DS field."""
    patch.setattr(socket, "IP_TOS", 250)


def not_linux(patch: pytest.MonkeyPatch) -> None:
    """Be on a system that does not pace."""
    patch.setattr(_sockets, "_LINUX", False)


ASKED = FlowSpec(2**32 + 5, EF)


@pytest.fixture(
    params=[
        Refused(no_pacing, FlowSpec(2**32 + 5), "cannot be applied: Proto", errno.ENOPROTOOPT),
        Refused(short_pacing, FlowSpec(2**32 + 5), "the kernel made 5 of it", None),
        Refused(
            no_service_type,
            FlowSpec(service_type=EF),
            "cannot be applied: Proto",
            errno.ENOPROTOOPT,
        ),
        Refused(not_linux, FlowSpec(2**32 + 5), "this system cannot pace", None),
    ],
    ids=["pacing", "short-pacing", "service-type", "not-linux"],
)
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    """Be on a kernel that does not take everything."""
    request.param.change(monkeypatch)
    yield request.param
    monkeypatch.undo()


async def attempt(
    listener: Listener[Stream], how: str, condition: Callable[[PendingTransport], AnyVerdict]
) -> Stream:
    """Make either call."""
    if how == "accept":
        return await listener.accept(condition)
    return listener.accept_nowait(condition)


@pytest.mark.parametrize("how", ["accept", "accept_nowait"])
async def test_refused(listener: Listener[Stream], dial: Dial, refused: Refused, how: str) -> None:
    """What cannot be applied resets the connection and is told; the listener goes on."""
    released: list[str] = []
    outcomes: list[Outcome] = []
    turned: list[bool] = []
    listener.on_outcome(outcomes.append)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: released.append("held"))
        pending.callee_data.set(b"hello")
        return wants(ASKED)(pending)

    client = dial(listener)
    asyncio.get_running_loop().call_soon(turned.append, True)
    with pytest.raises(QualityOfServiceError, match=refused.says) as caught:
        await attempt(listener, how, condition)
    error = caught.value
    assert bool(turned) == (how == "accept"), "whether the call has yielded"
    assert (error.caller_id, error.flow) == (client.getsockname(), refused.part)
    assert (error.errno, error.winsock) == (errno.EOPNOTSUPP, "WSAEOPNOTSUPP")
    cause = error.__cause__
    assert (cause.errno if isinstance(cause, OSError) else None) == refused.cause
    assert released == ["held"]
    assert await wire_end(client) == "reset"
    statistics = listener.statistics()
    assert (statistics.failed, statistics.accepted, statistics.streams) == (1, 0, 0)
    await until(lambda: outcomes)
    assert [(each.status, each.reason) for each in outcomes] == [(Status.FAILED, error.reason)]

    # The next one asks for nothing.
    dial(listener)
    (await listener.accept(accept)).close()


async def test_a_gate_of_unix_sockets() -> None:
    """A gate whose connections have none says so, and a group's flow spec fails there."""
    listener, gate = memory_listener()
    listener.group("gold", qos=ASKED)
    seen: list[object] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.extend((pending.sqos, pending.syn))
        pending.group = "gold"
        return ACCEPT

    async with listener:
        with gate.dial() as client:
            with pytest.raises(QualityOfServiceError, match="a Unix socket has no") as caught:
                await listener.accept(condition)
            assert caught.value.flow == ASKED
            assert caught.value.caller_id == ("192.0.2.1", 50000)
            assert seen == [None, None]
            assert await wire_end(client) == "eof"
        assert len(listener.groups["gold"]) == 0
        assert listener.statistics().failed == 1


async def test_a_slow_gate() -> None:
    """An admission that takes time ends in the same error."""
    listener, gate = memory_listener(slow=True)
    listener.group("gold", qos=ASKED)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.group = "gold"
        return ACCEPT

    async with listener:
        with gate.dial() as client:
            task = asyncio.create_task(listener.accept(condition))
            await until(lambda: gate.admitting)
            gate.complete()
            with pytest.raises(QualityOfServiceError):
                await task
            assert await wire_end(client) == "eof"
        assert listener.pending == ()
