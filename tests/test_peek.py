"""`Stream.peek()`: looking at bytes and leaving them where they are."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

from condaccept import Event, Listener, Stream, listen
from condaccept._channel import IN_A_ROW
from condaccept._pending import PEEK_LIMIT
from tests.support import Dial, caught_up, queued, reset, turns, until, wire_end
from tests.test_reading import cancelled, exactly, parked, subscribe, unread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

Pair: TypeAlias = tuple[Stream, socket.socket]
WHOLE: Final = PEEK_LIMIT


@pytest.fixture
async def unix(dial: Dial, tmp_path: Path) -> AsyncIterator[Pair]:
    """A stream over a Unix socket and its client."""
    async with await listen(path=str(tmp_path / "sock")) as listener:
        client = dial(listener)
        stream = await listener.accept()
        yield stream, client
        stream.abort()


@pytest.fixture(params=["tcp", "unix"])
def any_pair(request: pytest.FixtureRequest, pair: Pair, unix: Pair) -> Pair:
    """A stream and its client, over TCP or a Unix socket."""
    return pair if request.param == "tcp" else unix


def mark(stream: Stream) -> int:
    """Return how many bytes the kernel wants to have before it tells of them."""
    return stream._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


async def looking(stream: Stream, n: int) -> asyncio.Future[bytes]:
    """Start a peek and see it wait, whatever the kernel has by now."""
    task = asyncio.ensure_future(stream.peek(n))
    await until(lambda: task.done() or stream._reader is not None)
    assert not task.done()
    return task


class Looks:
    """Counts how often a stream looked at its socket while it waited."""

    def __init__(self, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        look = Stream._look_ahead

        def counted(self_: Stream, n: int, *, last: bool = False) -> bytes | None:
            self.n += self_ is stream and not last
            return look(self_, n, last=last)

        monkeypatch.setattr(Stream, "_look_ahead", counted)


# -- what it returns


async def test_peek_leaves_the_bytes(any_pair: Pair) -> None:
    """What is there is returned, as often as one asks, and read later."""
    stream, client = any_pair
    client.sendall(b"hello")
    assert await stream.peek(5) == b"hello"
    assert await stream.peek(2) == b"he"
    assert await stream.peek(5) == b"hello"
    assert await stream.read(100) == b"hello"
    assert mark(stream) == 1


async def test_peek_waits_for_all(any_pair: Pair) -> None:
    """A peek waits until as many bytes are there as it was asked for."""
    stream, client = any_pair
    task = await looking(stream, 5)
    client.sendall(b"he")
    await caught_up()
    await turns()
    assert not task.done()
    client.sendall(b"llo world")
    assert await task == b"hello"
    assert mark(stream) == 1
    task = await looking(stream, 20)
    client.sendall(b", once more")
    assert await task == b"hello world, once mo"
    assert await stream.read(100) == b"hello world, once more"
    task = await looking(stream, 3)
    client.sendall(b"abc")
    assert await task == b"abc"


async def test_peek_at_everything(any_pair: Pair) -> None:
    """As much as a TLS record can be peeked, also of more than that."""
    stream, client = any_pair
    data = bytes(range(256)) * 80
    task = await looking(stream, WHOLE)
    client.sendall(data)
    assert await task == data[:WHOLE]
    assert await stream.readexactly(len(data)) == data


@pytest.mark.parametrize("n", [-1, WHOLE + 1])
async def test_peek_out_of_bounds(pair: Pair, n: int) -> None:
    """More than a TLS record, or less than nothing, is refused."""
    stream, client = pair
    with pytest.raises(ValueError, match=f"between 0 and 16384 bytes can be peeked, got {n}"):
        await stream.peek(n)
    client.sendall(b"x")
    assert await stream.peek(1) == b"x"


async def test_peek_at_nothing(pair: Pair) -> None:
    """peek(0) returns at once."""
    stream, client = pair
    assert await stream.peek(0) == b""
    client.sendall(b"x")
    assert await stream.peek(0) == b""
    assert await stream.read(10) == b"x"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("data", [b"", b"abc"])
async def test_peek_at_the_end(any_pair: Pair, data: bytes, *, before: bool) -> None:
    """Fewer bytes are returned when no more will come, again and again."""
    stream, client = any_pair
    task = None if before else await looking(stream, 10)
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(5):
        if task is not None:
            assert await task == data
        assert await stream.peek(10) == data
        assert await stream.peek(10) == data
        assert await stream.read() == data
        assert await stream.peek(10) == b""
    assert mark(stream) == 1


async def test_peek_after_write_eof(pair: Pair) -> None:
    """On a stream that is half-closed by this side a peek sees the end, too."""
    stream, client = pair
    stream.write_eof()
    task = await looking(stream, 10)
    client.sendall(b"abc")
    await turns()
    client.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(5):
        assert await task == b"abc"
        assert await stream.peek(10) == b"abc"


async def test_peek_behind_unread_bytes(any_pair: Pair) -> None:
    """Bytes received in search of a separator come first, and stay as well."""
    stream, client = any_pair
    client.sendall(b"head\nbo")
    assert await stream.readline() == b"head\n"
    assert await stream.peek(2) == b"bo"
    task = await looking(stream, 4)
    client.sendall(b"dy and more")
    assert await task == b"body"
    assert await stream.peek(1) == b"b"
    client.shutdown(socket.SHUT_WR)
    assert await stream.peek(100) == b"body and more"
    assert await stream.read() == b"body and more"


@pytest.mark.parametrize("before", [True, False])
async def test_peek_at_a_reset(pair: Pair, *, before: bool) -> None:
    """A reset by the peer is raised, by every call from then on."""
    stream, client = pair
    if before:
        reset(client)
        task: asyncio.Future[bytes] = asyncio.ensure_future(stream.peek(10))
    else:
        task = await looking(stream, 10)
        reset(client)
    with pytest.raises(ConnectionResetError):
        await task
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await stream.peek(10)
    with pytest.raises(ConnectionResetError):
        await stream.read(10)
    assert mark(stream) == 1


async def test_peek_at_a_reset_that_an_event_told(pair: Pair) -> None:
    """A reset that was taken from the kernel to tell subscribers is no end of the stream."""
    stream, client = pair
    told = subscribe(stream, Event.CLOSE)
    reset(client)
    await until(lambda: told)
    with pytest.raises(ConnectionResetError):
        await stream.peek(10)


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_peek_at_a_closed_stream(pair: Pair, how: str) -> None:
    """Closing the stream ends a peek, and none begins after that."""
    stream, _ = pair
    task = await looking(stream, 10)
    getattr(stream, how)()
    with pytest.raises(ConnectionAbortedError):
        await task
    with pytest.raises(ConnectionAbortedError):
        await stream.peek(0)


async def test_two_lookers(pair: Pair) -> None:
    """A peek and a read do not go together; the one that waits goes on."""
    stream, client = pair
    task = await looking(stream, 5)
    for call in (stream.peek(1), stream.read(1), stream.readline()):
        with pytest.raises(RuntimeError, match="another task"):
            await call
    client.sendall(b"hello")
    assert await task == b"hello"
    await stream.read(5)
    reading = await parked(stream, stream.read(5))
    with pytest.raises(RuntimeError, match="another task"):
        await stream.peek(1)
    client.sendall(b"hello")
    assert await reading == b"hello"


# -- what is left behind


@pytest.mark.parametrize("ahead", [b"", b"ab"])
async def test_cancelled_peek(any_pair: Pair, ahead: bytes) -> None:
    """A cancelled peek loses nothing, and what it waited above wakes the next read."""
    stream, client = any_pair
    client.sendall(ahead)
    task = await looking(stream, 10)
    client.sendall(b"cd")
    await caught_up()
    await turns()
    await cancelled(task)
    assert mark(stream) == 1
    async with asyncio.timeout(5):
        assert await stream.read(100) == ahead + b"cd"
    reading = await parked(stream, stream.read(100))
    client.sendall(b"e")
    assert await reading == b"e"


async def test_bytes_below_the_mark_wake_a_read(pair: Pair) -> None:
    """What came below the mark before a cancellation is told to a read that begins after it."""
    stream, client = pair
    reading = await parked(stream, stream.read(2))
    client.sendall(b"x")
    assert await reading == b"x"
    assert stream._dry
    task = await looking(stream, 10)
    client.sendall(b"below")
    await caught_up()
    await turns()
    await cancelled(task)
    async with asyncio.timeout(5):
        assert await stream.readexactly(5) == b"below"


@pytest.mark.parametrize("event", [Event.READ, Event.CLOSE])
async def test_subscribers_are_told_of_what_is_left(pair: Pair, event: Event) -> None:
    """What a peek has left is told to the subscribers, like the end behind it."""
    stream, client = pair
    told = subscribe(stream, event)
    task = await looking(stream, 4)
    client.sendall(b"data")
    if event is Event.CLOSE:
        client.shutdown(socket.SHUT_WR)
    assert await task == b"data"
    if event is Event.READ:
        await exactly(told, Event.READ)
    else:
        await exactly(told)  # the data is to be read first
    assert await stream.read(4) == b"data"
    if event is Event.CLOSE:
        assert await stream.peek(4) == b""
        assert await stream.read(4) == b""
        await exactly(told, Event.CLOSE)


async def test_subscribers_are_told_after_a_cancelled_peek(pair: Pair) -> None:
    """What a cancelled peek waited above is told to the subscribers."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    task = await looking(stream, 4)
    client.sendall(b"ab")
    await caught_up()
    await turns()
    assert not told
    await cancelled(task)
    await exactly(told, Event.READ)


async def test_peek_keeps_a_forgotten_stream(listener: Listener[Stream], dial: Dial) -> None:
    """A task that nobody else has gets what its peek waits for."""
    client = dial(listener)
    got: list[bytes] = []

    async def look(stream: Stream) -> None:
        got.append(await stream.peek(3))
        stream.close()

    task: asyncio.Task[Any] | None = asyncio.create_task(look(await listener.accept()))
    await turns()
    del task
    gc.collect()
    client.sendall(b"abc")
    await until(lambda: got)
    assert got == [b"abc"]
    await turns()


# -- what a caller cannot do


async def test_byte_by_byte(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that sends byte by byte wakes a peek on TCP once, when all is there."""
    stream, client = pair
    looks = Looks(stream, monkeypatch)
    task = await looking(stream, 50)
    before = looks.n
    for _ in range(49):
        client.sendall(b"x")
        await caught_up()
    assert looks.n == before
    client.sendall(b"x")
    assert await task == b"x" * 50
    assert looks.n == before + 1


async def test_byte_by_byte_behind_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are there when a peek begins change nothing in that."""
    stream, client = pair
    client.sendall(b"x" * 10)
    looks = Looks(stream, monkeypatch)
    task = await looking(stream, 20)
    before = looks.n
    for _ in range(9):
        client.sendall(b"x")
        await caught_up()
    assert looks.n == before
    client.sendall(b"x")
    assert await task == b"x" * 20


async def test_stale_wake_up(pair: Pair) -> None:
    """An event from before the peek does not make it return too few."""
    stream, client = pair
    reading = await parked(stream, stream.read(100))
    client.sendall(b"first")
    assert await reading == b"first"
    # Both loops have seen the byte, and nobody has acted on it, when the peek begins.
    task = asyncio.ensure_future(stream.peek(3))
    client.sendall(b"a")
    await caught_up()
    stream._ready(1)  # as a watch that was told before the mark was set
    await turns()
    assert not task.done()
    client.sendall(b"bc")
    assert await task == b"abc"


@pytest.mark.parametrize("before", [True, False])
async def test_urgent_byte(pair: Pair, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
    """An urgent byte ends what can be peeked; nothing spins around it."""
    stream, client = pair
    looks = Looks(stream, monkeypatch)
    task = None if before else await looking(stream, 5)
    client.sendall(b"ab")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"cdef")
    if task is None:
        assert await stream.peek(5) == b"ab"
    else:
        assert await task == b"ab"
    for _ in range(3):
        assert await stream.peek(5) == b"ab"
    assert looks.n < 10
    assert await stream.read(100) == b"ab"
    assert await stream.peek(4) == b"cdef"
    assert mark(stream) == 1


async def test_urgent_byte_without_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peek that an urgent byte stands in the way of waits without spinning."""
    stream, client = pair
    client.sendall(b"ab")
    client.send(b"!", socket.MSG_OOB)
    looks = Looks(stream, monkeypatch)
    task = await looking(stream, 10)
    await turns(50)
    await caught_up()
    assert looks.n <= 2
    client.shutdown(socket.SHUT_WR)
    assert await task == b"ab"


@pytest.mark.parametrize("size", [1, 2048])
async def test_small_receive_buffer(dial: Dial, size: int) -> None:
    """More than the socket's receive buffer is told to hold cannot be peeked."""
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, size)]
    async with await listen("127.0.0.1", 0, options=options) as listener:
        client = dial(listener)
        stream = await listener.accept()
        for ahead in (b"", b"some"):
            client.sendall(ahead)
            ran: list[int] = []
            asyncio.get_running_loop().call_soon(ran.append, 1)
            with pytest.raises(ValueError, match="receive buffer of this socket does not hold"):
                await stream.peek(WHOLE)
            assert ran
            assert mark(stream) == 1
        assert await stream.read(10) == b"some"
        stream.abort()


@pytest.mark.parametrize("call", ["peek", "empty"])
async def test_peeks_yield(pair: Pair, call: str) -> None:
    """However much is there, other tasks have their turn after so many peeks."""
    stream, client = pair
    client.sendall(b"x" * 10)
    await until(lambda: unread(stream) == 10)
    ran: list[int] = []
    asyncio.get_running_loop().call_soon(ran.append, 1)
    for _ in range(IN_A_ROW + 1):
        await stream.peek(5 if call == "peek" else 0)
    assert ran


async def test_peek_then_hand_over(listener: Listener[Stream], dial: Dial) -> None:
    """What a peek has left is what a transport begins with."""
    client = dial(listener, data=b"hello")
    await queued(listener, 1)
    stream = await listener.accept()
    assert await stream.peek(3) == b"hel"
    reader, writer = await stream.into_streams()
    client.sendall(b"\n")
    assert await reader.readline() == b"hello\n"
    writer.write(b"answer")
    assert await wire_end(client) == b"answer"
    writer.close()
    await writer.wait_closed()
