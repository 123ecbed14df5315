"""`Event.OOB` and `Stream.read_oob()`: the urgent byte."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from condaccept import Event, Listener, Stream, listen
from condaccept._watch import ReaderWatch
from condaccept.gates import HandshakeGate
from tests.support import Dial, caught_up, reset, turns, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="EPOLLPRI is Linux's")

Pair: TypeAlias = tuple[Stream, socket.socket]
KINDS = ["v4", "v6", "unix"]


class Log:
    """A callback that keeps the events it is told."""

    def __init__(self) -> None:
        self.told: list[Event] = []

    def __call__(self, _source: Any, event: Event, error: OSError | None) -> None:
        """Keep it."""
        assert error is None
        self.told.append(event)


@pytest.fixture(params=KINDS)
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Listener[Stream]]:
    """A listener of each family that has urgent bytes."""
    if request.param == "unix":
        where: Awaitable[Listener[Stream]] = listen(path=tmp_path / "socket")
    else:
        where = listen("127.0.0.1" if request.param == "v4" else "::1", 0)
    async with await where as listener:
        yield listener


@pytest.fixture
async def each(opened: Listener[Stream], dial: Dial) -> AsyncIterator[Pair]:
    """A stream of each family, and its client."""
    client = dial(opened)
    stream = await opened.accept()
    yield stream, client
    stream.abort()


def urge(client: socket.socket, data: bytes) -> None:
    """Send *data*, of which the last byte is urgent."""
    client.send(data, socket.MSG_OOB)


async def parked(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start *awaitable* and see it wait."""
    task = asyncio.ensure_future(awaitable)
    await turns()
    assert not task.done()
    return task


# -- reading it


async def test_read_oob(each: Pair) -> None:
    """The urgent byte is read once, out of its order; the stream goes on around it."""
    stream, client = each
    assert stream.read_oob() == b""
    client.sendall(b"ab")
    assert stream.read_oob() == b""
    urge(client, b"X")
    client.sendall(b"cd")
    assert stream.read_oob() == b"X"
    assert stream.read_oob() == b""
    assert await stream.readexactly(4) == b"abcd"
    assert stream.read_oob() == b""


async def test_read_oob_after_a_wait(each: Pair) -> None:
    """So on a stream whose reads have waited: none of them stops short of what follows."""
    stream, client = each
    task = await parked(stream.read(100))
    client.sendall(b"a")
    assert await task == b"a"
    client.sendall(b"b")
    urge(client, b"X")
    client.sendall(b"c")
    assert stream.read_oob() == b"X"
    assert await stream.readexactly(2) == b"bc"
    task = await parked(stream.read(100))
    client.sendall(b"d")
    assert await task == b"d"


async def test_reads_go_on_after_an_urgent_byte(each: Pair) -> None:
    """Reads that wait when an urgent byte has come, or came, get what comes besides it."""
    stream, client = each
    task = await parked(stream.read(10))
    urge(client, b"a!")
    assert await task == b"a"
    await until(lambda: stream.read_oob() == b"!")
    for data in (b"b", b"c"):
        task = await parked(stream.read(10))
        client.sendall(data)
        assert await task == data


async def test_an_urgent_byte_that_a_read_has_passed(each: Pair) -> None:
    """Without a subscriber the kernel drops an urgent byte that a read has passed."""
    stream, client = each
    urge(client, b"X")
    client.sendall(b"cd")
    assert await stream.readexactly(2) == b"cd"
    assert stream.read_oob() == b""


async def test_an_urgent_byte_in_the_stream(each: Pair) -> None:
    """With SO_OOBINLINE the byte is in the stream, and read_oob() never finds one."""
    stream, client = each
    options = stream.get_extra_info("socket")
    options.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    log = Log()
    stream.on(Event.OOB, log)
    urge(client, b"abX")
    client.sendall(b"cd")
    await caught_up()
    assert stream.read_oob() == b""
    assert await stream.readexactly(5) == b"abXcd"
    assert log.told == []


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_read_oob_after_close(each: Pair, how: str) -> None:
    """A stream that this side has closed has no urgent byte; the call says why."""
    stream, client = each
    stream.on(Event.OOB, Log())
    urge(client, b"X")
    await caught_up()
    getattr(stream, how)()
    with pytest.raises(ConnectionAbortedError):
        stream.read_oob()


async def test_read_oob_of_a_connection_that_failed(pair: Pair) -> None:
    """After a reset there is none; once a read has met the reset, the call raises it."""
    stream, client = pair
    reset(client)
    assert stream.read_oob() == b""
    with pytest.raises(ConnectionResetError):
        await stream.read(1)
    with pytest.raises(ConnectionResetError):
        stream.read_oob()


async def test_read_oob_at_the_end(each: Pair) -> None:
    """An urgent byte right before the end is there, also when the end was read."""
    stream, client = each
    log = Log()
    stream.on(Event.OOB | Event.CLOSE, log)
    urge(client, b"X")
    client.close()
    await until(lambda: Event.CLOSE in log.told)
    assert log.told == [Event.OOB, Event.CLOSE]
    assert await stream.read(10) == b""
    assert stream.read_oob() == b"X"
    assert stream.read_oob() == b""


# -- being told


async def test_oob_is_told_once(each: Pair) -> None:
    """OOB is told when the byte comes, and again for the next one once that was read."""
    stream, client = each
    log = Log()
    stream.on(Event.OOB, log)
    client.sendall(b"ab")
    await caught_up()
    assert log.told == []
    urge(client, b"X")
    assert log.told == []
    await until(lambda: log.told)
    client.sendall(b"cd")
    assert await stream.readexactly(4) == b"abcd"
    await caught_up()
    assert log.told == [Event.OOB]
    assert stream.read_oob() == b"X"
    await caught_up()
    assert log.told == [Event.OOB]
    urge(client, b"Y")
    await until(lambda: len(log.told) == 2)
    assert stream.read_oob() == b"Y"


async def test_the_newest_urgent_byte(each: Pair) -> None:
    """An urgent byte that comes before the last was read takes its place; OOB is told once."""
    stream, client = each
    log = Log()
    stream.on(Event.OOB, log)
    for byte in (b"X", b"Y"):
        urge(client, byte)
        await caught_up()
    assert log.told == [Event.OOB]
    urge(client, b"Z")  # nobody had the time to set this one aside
    assert stream.read_oob() == b"Z"
    assert stream.read_oob() == b""
    await caught_up()
    urge(client, b"W")
    await until(lambda: len(log.told) == 2)
    assert stream.read_oob() == b"W"


async def test_oob_before_a_waiting_read(each: Pair) -> None:
    """A task that reads is woken by the same bytes, and does not take the urgent one away."""
    stream, client = each
    log = Log()
    stream.on(Event.OOB, log)
    task = await parked(stream.readexactly(4))
    urge(client, b"abX")
    client.sendall(b"cd")
    assert await task == b"abcd"
    await until(lambda: log.told)
    assert stream.read_oob() == b"X"


async def test_oob_while_nobody_turns_the_loop(each: Pair) -> None:
    """Reads that never wait pass no urgent byte by, though the loop had no time to look."""
    stream, client = each
    log = Log()
    stream.on(Event.OOB, log)
    await turns()
    urge(client, b"abX")
    client.sendall(b"cd")
    assert await stream.read(2) == b"ab"
    assert await stream.read(2) == b"cd"
    assert log.told == []
    await until(lambda: log.told)
    assert stream.read_oob() == b"X"
    assert log.told == [Event.OOB]


async def test_no_read_for_an_urgent_byte_alone(each: Pair) -> None:
    """An urgent byte alone is no data: OOB is told and READ is not."""
    stream, client = each
    log = Log()
    stream.on(Event.OOB | Event.READ, log)
    urge(client, b"X")
    await caught_up()
    await turns()
    assert log.told == [Event.OOB]
    client.sendall(b"a")
    await until(lambda: len(log.told) == 2)
    assert log.told == [Event.OOB, Event.READ]


async def test_no_read_for_an_urgent_byte_nobody_subscribed_to(each: Pair) -> None:
    """So for who did not subscribe to OOB; and the byte is left where it is."""
    stream, client = each
    log = Log()
    stream.on(Event.READ, log)
    urge(client, b"X")
    await caught_up()
    await turns()
    assert log.told == []
    late = Log()
    stream.on(Event.OOB, late)
    await until(lambda: late.told)
    assert stream.read_oob() == b"X"


async def test_oob_is_inherited(opened: Listener[Stream], dial: Dial) -> None:
    """Streams inherit OOB, for callbacks and for records."""
    told: list[tuple[Any, Event, OSError | None]] = []
    opened.on(Event.OOB, lambda *each: told.append(each))
    record = opened.watch(Event.OOB)
    client = dial(opened)
    stream = await opened.accept()
    urge(client, b"X")
    assert await record.wait() == [(stream, Event.OOB, None)]
    await until(lambda: told)
    assert told == [(stream, Event.OOB, None)]
    assert stream.read_oob() == b"X"
    stream.close()


async def test_late_subscriber_to_oob(each: Pair) -> None:
    """Who subscribes late is told while the byte is unread, and not afterwards."""
    stream, client = each
    urge(client, b"X")
    first, second, third = Log(), Log(), Log()
    stream.on(Event.OOB, first)
    assert first.told == []
    await until(lambda: first.told)
    stream.on(Event.OOB, second)
    assert second.told == []
    await until(lambda: second.told)
    assert stream.read_oob() == b"X"
    stream.on(Event.OOB, third)
    await caught_up()
    assert (first.told, second.told, third.told) == ([Event.OOB], [Event.OOB], [])


async def test_unread_oob_spins_nothing(each: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An urgent byte that nobody reads wakes the loop a few times and no more."""
    stream, client = each
    edges: list[int] = []
    original = Stream._ready

    def counting(self: Stream, events: int) -> None:
        edges.append(events)
        original(self, events)

    monkeypatch.setattr(Stream, "_ready", counting)
    stream.on(Event.OOB | Event.READ | Event.CLOSE, Log())
    urge(client, b"aX")
    await until(lambda: edges)
    await turns(200)
    assert len(edges) <= 3


async def test_without_epoll(dial: Dial) -> None:
    """Without epoll OOB is never told, early or late, while read_oob() works."""
    sock = socket.create_server(("127.0.0.1", 0))
    async with Listener[Stream](
        lambda loop, watch: HandshakeGate(loop, watch, [sock]), watch=ReaderWatch
    ) as listener:
        log = Log()
        listener.on(Event.OOB | Event.READ, log)
        client = dial(listener)
        stream = await listener.accept()
        urge(client, b"aX")
        await until(lambda: log.told)
        stream.on(Event.OOB, log)
        await caught_up()
        assert log.told == [Event.READ]
        assert stream.read_oob() == b"X"
        assert await stream.read(10) == b"a"
        urge(client, b"bY")
        client.sendall(b"c")
        assert await stream.readexactly(2) == b"bc"
        assert stream.read_oob() == b""  # passed by
        assert Event.OOB not in log.told
        stream.close()
