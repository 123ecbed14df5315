"""Groups of streams: who is in one, what they have in common, how they end together."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AnyVerdict,
    ConnectionDeferredError,
    ConnectionRejectedError,
    FlowSpec,
    InvalidGroupError,
    Listener,
    ListenerClosedError,
    PendingTransport,
    QualityOfServiceError,
    Status,
    Stream,
    StreamGroup,
    listen,
)
from condaccept.testing import memory_listener
from tests.support import accept, until, wire, wire_end

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support import Dial

GOLD = FlowSpec(token_rate=2**33, service_type=0xB8)


def into(
    name: Any, verdict: AnyVerdict = ACCEPT, flow: FlowSpec | None = None
) -> Callable[[PendingTransport], AnyVerdict]:
    """Return a condition that names a group."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        assert pending.group is None
        assert pending.gqos is None
        pending.group = name
        if flow is not None:
            assert pending.sqos is not None
            pending.sqos.sending = flow
        return verdict

    return condition


def flow_of(stream: Stream) -> tuple[int, int]:
    """Return rate and service type of what an IPv4 stream sends."""
    sock = stream.get_extra_info("socket")
    rate = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 47, 8), "little")
    return rate, sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)


# -- making them


async def test_group(listener: Listener[Stream]) -> None:
    """A group is made at the first call, and later ones give the same."""
    group = listener.group("gold", qos=GOLD)

    assert isinstance(group, StreamGroup)
    assert (group.name, group.qos, len(group), group.streams) == ("gold", GOLD, 0, ())
    assert listener.group("gold") is group
    assert listener.group("gold", qos=FlowSpec(GOLD.token_rate, GOLD.service_type)) is group
    lead = listener.group("lead")
    assert (lead.qos, lead is group) == (None, False)
    assert listener.group("lead") is lead
    assert group, "a group that is empty is still a group"
    assert "'gold' open=0 qos=FlowSpec(" in repr(group)


async def test_groups(listener: Listener[Stream]) -> None:
    """The mapping shows the groups as they are, and cannot be changed."""
    groups = listener.groups
    assert dict(groups) == {}
    group = listener.group("gold")
    assert dict(groups) == {"gold": group}
    with pytest.raises(TypeError):
        groups["lead"] = group  # type: ignore[index]


async def test_a_group_keeps_its_flow_spec(listener: Listener[Stream]) -> None:
    """The same name with another flow spec is an error, and nothing has changed."""
    gold, lead = listener.group("gold", qos=GOLD), listener.group("lead")
    for name in ("gold", "lead"):
        with pytest.raises(ValueError, match=f"there is a group '{name}' with another qos"):
            listener.group(name, qos=FlowSpec(1))
    assert (gold.qos, lead.qos) == (GOLD, None)


@pytest.mark.parametrize(
    ("name", "qos", "error", "says"),
    [
        ("", None, ValueError, "cannot be empty"),
        (b"gold", None, TypeError, "name of a group is text, got b'gold'"),
        (None, None, TypeError, "name of a group is text, got None"),
        ("gold", 5000, TypeError, "qos of a group is a FlowSpec or None, got 5000"),
    ],
)
async def test_no_such_group_can_be(
    listener: Listener[Stream], name: Any, qos: Any, error: type[Exception], says: str
) -> None:
    """A group has a name, and a flow spec or none; otherwise it is not made."""
    with pytest.raises(error, match=says):
        listener.group(name, qos=qos)
    assert dict(listener.groups) == {}


async def test_a_closed_listener_makes_no_group(listener: Listener[Stream]) -> None:
    """Once the listener is closed there are no further groups; those it had can be seen."""
    group = listener.group("gold")
    listener.close()
    with pytest.raises(ListenerClosedError):
        listener.group("gold")
    assert dict(listener.groups) == {"gold": group}


async def test_unix_groups(tmp_path: Path, dial: Dial) -> None:
    """Unix sockets can be grouped, but have no quality of service that a group could have."""
    async with await listen(path=tmp_path / "s") as listener:
        with pytest.raises(QualityOfServiceError, match="a Unix socket has no") as caught:
            listener.group("gold", qos=GOLD)
        assert (caught.value.flow, caught.value.caller_id) == (GOLD, None)
        assert dict(listener.groups) == {}
        group = listener.group("gold")
        dial(listener)
        async with await listener.accept(into("gold")) as stream:
            assert group.streams == (stream,)
        assert len(group) == 0


# -- who is in one


async def test_members(listener: Listener[Stream], dial: Dial) -> None:
    """A stream is in the group that its condition named until it is closed, and in no other."""
    gold, lead = listener.group("gold"), listener.group("lead")
    streams = []
    for name in ("gold", "gold", "lead", None):
        dial(listener)
        streams.append(await listener.accept(into(name)))
    first, second, third, fourth = streams

    assert (len(gold), gold.streams) == (2, (first, second))
    assert (len(lead), lead.streams) == (1, (third,))
    assert listener.statistics().streams == 4
    first.close()
    assert gold.streams == (second,)
    second.abort()
    assert not gold.streams
    assert len(gold) == 0
    third.close()
    fourth.close()
    assert listener.statistics().streams == 0


async def test_only_accept_counts(listener: Listener[Stream], dial: Dial) -> None:
    """A deferral and a rejection put nobody into the group, and the next offer names none."""
    group = listener.group("gold")
    dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(into("gold", DEFER))
    assert len(group) == 0
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(into("gold", REJECT))
    assert len(group) == 0


@pytest.mark.parametrize("name", ["gold", "", 5, ["gold"], b"lead"], ids=repr)
async def test_unknown_group(listener: Listener[Stream], dial: Dial, name: object) -> None:
    """A group that was not made is none, whatever the name; the connection stays undecided."""
    group = listener.group("lead")
    client = dial(listener)
    with pytest.raises(InvalidGroupError, match="the listener has no group") as caught:
        await listener.accept(into(name))
    assert caught.value.caller_id == client.getsockname()
    assert [each.status for each in listener.pending] == [Status.QUEUED]
    async with await listener.accept(into("lead")) as stream:
        assert group.streams == (stream,)


async def test_a_place_is_free_before_it_is_given_back(
    listener: Listener[Stream], dial: Dial
) -> None:
    """What is held for a connection is released when the group is already one fewer."""
    group = listener.group("gold")
    seen: list[tuple[str, int]] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: seen.append(("first", len(group))))
        pending.hold(lambda: seen.append(("last", len(group))))
        pending.group = "gold"
        return ACCEPT

    dial(listener)
    stream = await listener.accept(condition)
    assert (len(group), seen) == (1, [])
    stream.close()
    assert seen == [("last", 0), ("first", 0)]


async def test_a_stream_that_was_forgotten(listener: Listener[Stream], dial: Dial) -> None:
    """A stream that nobody holds any more leaves the group when its descriptor is closed."""
    group = listener.group("gold")
    client = dial(listener)
    held = [await listener.accept(into("gold"))]

    def forget() -> None:
        held.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed"):
        forget()
    assert (len(group), group.streams) == (1, ())
    group.abort()
    group.close()
    await until(lambda: not len(group))
    assert await wire_end(client) == "eof"


async def test_a_factory_that_raises(dial: Dial) -> None:
    """The factory finds its stream in the group; if it raises, nobody is left there."""
    seen: list[int] = []

    def factory(stream: Stream) -> Stream:
        seen.append(len(listener.groups["gold"]))
        raise LookupError(stream.caller_id)

    async with await listen("127.0.0.1", 0, stream_factory=factory) as listener:
        group = listener.group("gold")
        dial(listener)
        with pytest.raises(LookupError):
            await listener.accept(into("gold"))
        assert (seen, len(group)) == ([1], 0)


async def test_no_room_in_the_watch(
    listener: Listener[Stream], dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection of which no stream came was never in the group."""
    group = listener.group("gold")

    def no_stream(*_: object, **_options: object) -> Stream:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("condaccept._admitting.Stream", no_stream)
    dial(listener)
    with pytest.raises(OSError, match="No space"):
        await listener.accept(into("gold"))
    assert (len(group), listener.statistics().failed) == (0, 1)


# -- how they end together


async def test_close(listener: Listener[Stream], dial: Dial) -> None:
    """Closing a group ends its streams behind what they still have to send; others go on."""
    group = listener.group("gold")
    clients = [dial(listener) for _ in range(3)]
    first = await listener.accept(into("gold"))
    second = await listener.accept(into("gold"))
    other = await listener.accept(accept)
    big = bytes(8_000_000)
    first.write(big)

    group.close()

    assert group.streams == (first,), "it has not sent everything"
    assert await wire_end(clients[1]) == "eof"
    received = 0
    while received < len(big):
        chunk = await wire_end(clients[0])
        assert isinstance(chunk, bytes)
        received += len(chunk)
    assert await wire_end(clients[0]) == "eof"
    await until(lambda: not len(group))
    assert wire(clients[2]) == "open"
    other.close()
    second.close()


async def test_abort(listener: Listener[Stream], dial: Dial) -> None:
    """Aborting a group resets its connections, and those accepted later are not concerned."""
    group = listener.group("gold")
    clients = [dial(listener) for _ in range(4)]
    streams = [await listener.accept(into("gold")) for _ in range(2)]
    other = await listener.accept(accept)

    group.abort()

    assert len(group) == 0
    assert [await wire_end(client) for client in clients[:2]] == ["reset", "reset"]
    assert wire(clients[2]) == "open"
    async with await listener.accept(into("gold")) as later:
        assert group.streams == (later,)
    other.close()
    assert all("closed" in repr(stream) for stream in streams)


async def test_a_group_outlives_its_listener(listener: Listener[Stream], dial: Dial) -> None:
    """Closing the listener leaves the streams of a group, which can still end them."""
    group = listener.group("gold")
    client = dial(listener)
    stream = await listener.accept(into("gold"))
    listener.close()

    assert group.streams == (stream,)
    group.close()
    assert (len(group), await wire_end(client)) == (0, "eof")


async def test_aborting_the_listener(listener: Listener[Stream], dial: Dial) -> None:
    """Aborting the listener resets all streams, in groups and outside."""
    group = listener.group("gold")
    clients = [dial(listener), dial(listener)]
    streams = [await listener.accept(into("gold")), await listener.accept(accept)]

    listener.abort()

    assert [await wire_end(client) for client in clients] == ["reset", "reset"]
    assert (len(group), listener.statistics().streams) == (0, 0)
    assert all("closed" in repr(stream) for stream in streams)


# -- quality of service


async def test_the_flow_spec_of_a_group(listener: Listener[Stream], dial: Dial) -> None:
    """It is applied to the streams of the group, and the condition can see it before."""
    listener.group("gold", qos=GOLD)
    listener.group("lead")
    seen: list[FlowSpec | None] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        for name in ("gold", "lead", "tin", ["gold"], None, "gold"):
            pending.group = name  # type: ignore[assignment]
            seen.append(pending.gqos)
        return ACCEPT

    dial(listener)
    async with await listener.accept(condition) as stream:
        assert seen == [GOLD, None, None, None, None, GOLD]
        assert flow_of(stream) == (2**33, 0xB8)
    dial(listener)
    async with await listener.accept(into("lead")) as stream:
        assert flow_of(stream) == (2**64 - 1, 0)
    dial(listener)
    async with await listener.accept(into(None)) as stream:
        assert flow_of(stream) == (2**64 - 1, 0)


async def test_the_condition_wins_over_the_group(listener: Listener[Stream], dial: Dial) -> None:
    """A flow spec for the one connection replaces that of its group, as a whole."""
    listener.group("gold", qos=GOLD)
    dial(listener)
    async with await listener.accept(into("gold", flow=FlowSpec(token_rate=7000))) as stream:
        assert flow_of(stream) == (7000, 0)
    dial(listener)
    async with await listener.accept(into(None, flow=FlowSpec(service_type=0x20))) as stream:
        assert flow_of(stream) == (2**64 - 1, 0x20)


# -- a gate that takes its time


async def test_a_slow_gate() -> None:
    """A stream whose admission takes time is in the group when there is a stream."""
    listener, gate = memory_listener(slow=True)
    group = listener.group("gold")
    async with listener:
        with gate.dial():
            task = asyncio.create_task(listener.accept(into("gold")))
            await until(lambda: gate.admitting)
            assert len(group) == 0
            gate.complete()
            async with await task as stream:
                assert group.streams == (stream,)
            assert len(group) == 0


async def test_a_group_named_after_the_verdict() -> None:
    """No group that was named while the admission went on lets a stream escape its group."""
    listener, gate = memory_listener(slow=True)
    group = listener.group("gold")
    async with listener:
        with gate.dial() as client:
            task = asyncio.create_task(listener.accept(into("gold")))
            await until(lambda: gate.admitting)
            listener.pending[0].group = "tin"
            gate.complete()
            with pytest.raises(InvalidGroupError, match="'tin'") as caught:
                await task
            assert caught.value.caller_id == ("192.0.2.1", 50000)
            assert await wire_end(client) == "eof"
        assert (len(group), listener.statistics().failed) == (0, 1)
        assert listener.statistics().streams == 0


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_end_of_those_handed_over(listener: Listener[Stream], dial: Dial, how: str) -> None:
    """A group's close() and abort() reach the transports that its streams were handed to."""
    group = listener.group("tenant")
    client = dial(listener)
    stream = await listener.accept(into("tenant"))
    transport, _ = await stream.into_transport(asyncio.Protocol)
    assert len(group) == 1

    getattr(group, how)()

    assert transport.is_closing()
    # Not a reset: to abort a transport of the loops is to close it without sending the rest.
    assert await wire_end(client) == "eof"
    await until(lambda: not len(group))
