"""`Stream`: bytes in, bytes out, its ends, its options and its events."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import gc
import random
import socket
import threading
import traceback
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from condaccept import ACCEPT, DEFER, Event, Listener, Stream, listen
from condaccept._channel import LOW
from condaccept._stream import HIGH
from condaccept._watch import EpollWatch, ReaderWatch
from condaccept.gates import HandshakeGate
from tests.support import (
    LIMIT,
    Condition,
    Dial,
    caught_up,
    defer,
    descriptors,
    queued,
    reset,
    turns,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from condaccept import AnyVerdict, PendingTransport

MB = 1024 * 1024
Pair: TypeAlias = tuple[Stream, socket.socket]
Told: TypeAlias = list[tuple[Stream, Event, OSError | None]]
"""What a callback was told."""


async def count(told: list[Any], n: int) -> None:
    """Check that *n* events are told, and then no more."""
    await until(lambda: len(told) >= n)
    await turns()
    assert len(told) == n


async def parked(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start *awaitable* and see it wait."""
    task = asyncio.ensure_future(awaitable)
    await turns()
    assert not task.done()
    return task


def receive(client: socket.socket, n: int, chunk: int = 65536) -> bytes:
    """Read *n* bytes, or up to the end, from a blocking client."""
    got = bytearray()
    while len(got) < n and (data := client.recv(min(chunk, n - len(got)))):
        got += data
    return bytes(got)


def pattern(n: int) -> bytes:
    """Return *n* bytes in which a lost, doubled or moved piece shows."""
    return random.Random(n).randbytes(n)  # noqa: S311 - not a secret


def fill(stream: Stream) -> int:
    """Write until the kernel takes no more; return how many bytes were written."""
    written = 0
    while not stream._buffer:
        stream.write(b"x" * 4096)
        written += 4096
    return written


def corked(client: socket.socket, data: bytes) -> None:
    """Send *data* and the end of the stream in one segment."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


# -- reading


async def test_read_returns_at_most_n(pair: Pair) -> None:
    """A read returns what is there, up to *n* bytes, and leaves the rest."""
    stream, client = pair
    client.sendall(b"abcdef")
    assert await stream.read(4) == b"abcd"
    assert await stream.read(4) == b"ef"


async def test_read_waits_for_data(pair: Pair) -> None:
    """With nothing there a read waits, again and again."""
    stream, client = pair
    for data in (b"one", b"two", b"three"):
        task = await parked(stream.read(100))
        client.sendall(data)
        assert await task == data


async def test_read_of_more_than_memory(pair: Pair) -> None:
    """However large *n* is, a read returns what is there."""
    stream, client = pair
    client.sendall(b"little")
    assert await stream.read(2**50) == b"little"
    task = await parked(stream.read(2**62))
    client.sendall(b"more")
    assert await task == b"more"


async def test_read_of_nothing(pair: Pair) -> None:
    """read(0) returns at once and takes nothing, whether or not something is there."""
    stream, client = pair
    assert await stream.read(0) == b""
    client.sendall(b"abc")
    assert await stream.read(0) == b""
    assert await stream.read(3) == b"abc"


async def test_read_to_the_end(pair: Pair) -> None:
    """read(-1) returns everything up to the end of the stream, over many chunks."""
    stream, client = pair
    data = pattern(MB)
    task = asyncio.ensure_future(stream.read(-1))

    def talk() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    await asyncio.to_thread(talk)
    assert await task == data
    assert await stream.read(-1) == b""


async def test_read_to_the_end_is_the_default(pair: Pair) -> None:
    """read() without an argument is read(-1)."""
    stream, client = pair
    corked(client, b"abc")
    assert await stream.read() == b"abc"


async def test_end_of_stream_stays(pair: Pair) -> None:
    """At the end of the stream every read returns nothing, and writing goes on."""
    stream, client = pair
    client.shutdown(socket.SHUT_WR)
    assert [await stream.read(10) for _ in range(3)] == [b"", b"", b""]
    stream.write(b"still here")
    assert client.recv(100) == b"still here"


async def test_end_of_stream_while_waiting(pair: Pair) -> None:
    """A read that waits ends when the peer sends no more."""
    stream, client = pair
    task = await parked(stream.read(10))
    client.close()
    assert await task == b""


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("n", [5, 6, 100])
async def test_data_and_end_in_one_segment(pair: Pair, n: int, *, waits: bool) -> None:
    """An end of the stream that comes with the last data is not missed."""
    stream, client = pair
    task = asyncio.ensure_future(stream.read(n))
    if waits:
        await turns()
    corked(client, b"hello")
    assert await task == b"hello"
    async with asyncio.timeout(5):
        assert await stream.read(n) == b""


async def test_end_behind_a_short_read(pair: Pair) -> None:
    """An end of the stream that comes after a short read ends the next read."""
    stream, client = pair
    task = await parked(stream.read(100))
    client.sendall(b"abc")
    assert await task == b"abc"
    task = await parked(stream.read(100))
    client.shutdown(socket.SHUT_WR)
    assert await task == b""


async def test_data_between_two_reads(pair: Pair) -> None:
    """What comes between a short read and the next read is there for it."""
    stream, client = pair
    task = await parked(stream.read(100))
    client.sendall(b"abc")
    assert await task == b"abc"
    client.sendall(b"def")
    await turns()
    async with asyncio.timeout(5):
        assert await stream.read(100) == b"def"


async def test_reset_before_a_read(pair: Pair) -> None:
    """After a reset by the peer every read and every write raises."""
    stream, client = pair
    reset(client)
    for _ in range(2):
        with pytest.raises(ConnectionResetError) as caught:
            await stream.read(10)
        assert caught.value.errno == errno.ECONNRESET
    with pytest.raises(ConnectionResetError):
        stream.write(b"x")
    with pytest.raises(ConnectionResetError):
        await stream.drain()


async def test_reset_behind_unread_data(pair: Pair) -> None:
    """What the peer sent before its reset is read first."""
    stream, client = pair
    client.sendall(b"last words")
    reset(client)
    assert await stream.read(4) == b"last"
    assert await stream.read(100) == b" words"
    with pytest.raises(ConnectionResetError):
        await stream.read(100)


async def test_reset_while_waiting(pair: Pair) -> None:
    """A reset by the peer ends a read that waits."""
    stream, client = pair
    task = await parked(stream.read(10))
    reset(client)
    with pytest.raises(ConnectionResetError):
        await task


async def test_reset_in_a_read_to_the_end(pair: Pair) -> None:
    """A read to the end raises when the end is a reset."""
    stream, client = pair
    client.sendall(b"some")
    task = await parked(stream.read())
    reset(client)
    with pytest.raises(ConnectionResetError):
        await task


@pytest.mark.parametrize("n", [10, 0, -1])
async def test_two_readers(pair: Pair, n: int) -> None:
    """A second reader is refused, and the first gets its data."""
    stream, client = pair
    first = await parked(stream.read(10))
    with pytest.raises(RuntimeError, match="another task"):
        await stream.read(n)
    client.sendall(b"mine")
    assert await first == b"mine"
    client.sendall(b"yours")
    assert await stream.read(10) == b"yours"


async def test_cancelled_read_loses_nothing(pair: Pair) -> None:
    """What comes after a cancelled read is there for the next."""
    stream, client = pair
    task = await parked(stream.read(10))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    client.sendall(b"abc")
    assert await stream.read(10) == b"abc"


async def test_read_cancelled_when_woken(pair: Pair) -> None:
    """A read that is cancelled between its wake-up and its step leaves the data."""
    stream, client = pair
    for data in (b"one", b"two"):
        task = await parked(stream.read(10))
        client.sendall(data)
        await until(lambda: stream._reader is not None and stream._reader.done())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            assert await stream.read(10) == data


async def test_read_cancelled_at_every_step(pair: Pair) -> None:
    """However often reads are cancelled, the bytes come whole and in order."""
    stream, client = pair
    data = pattern(3000)
    got = bytearray()
    chance = random.Random(7)  # noqa: S311 - a fixed sequence
    sent = 0
    while len(got) < len(data):
        task = asyncio.ensure_future(stream.read(chance.randint(1, 60)))
        await turns(chance.randint(0, 3))
        if chance.random() < 0.6 and sent < len(data):
            sent += client.send(data[sent : sent + chance.randint(1, 60)])
        await turns(chance.randint(0, 3))
        task.cancel()
        try:
            got += await task
        except asyncio.CancelledError:
            continue
    assert bytes(got) == data


# -- writing


async def test_write_goes_out_at_once(pair: Pair) -> None:
    """What the kernel takes is sent before write() returns."""
    stream, client = pair
    stream.write(b"now")
    assert wire(client) == b"now"
    assert not stream._buffer


@pytest.mark.slow
async def test_write_to_a_slow_reader(pair: Pair) -> None:
    """What the kernel does not take at once follows, whole and in order."""
    stream, client = pair
    data = pattern(8 * MB)
    stream.write(data[: 3 * MB])
    stream.write(data[3 * MB : 3 * MB + 1])
    stream.write(b"")
    stream.write(data[3 * MB + 1 :])
    assert stream._buffer
    assert await asyncio.to_thread(receive, client, len(data), 10_000) == data
    await stream.drain()
    stream.write(b"end")
    assert client.recv(10) == b"end"


async def test_drain_below_the_mark(pair: Pair) -> None:
    """With little unsent drain() returns at once."""
    stream, client = pair
    fill(stream)
    stream.write(b"x" * (HIGH - len(stream._buffer)))
    assert len(stream._buffer) == HIGH
    async with asyncio.timeout(5):
        await stream.drain()
    assert len(stream._buffer) == HIGH
    assert client.recv(1) == b"x"


async def test_drain_between_the_marks(pair: Pair) -> None:
    """Above the high mark drain() waits until the low mark is reached."""
    stream, client = pair
    written = fill(stream)
    more = HIGH - len(stream._buffer) + 1
    stream.write(b"x" * more)
    task = await parked(stream.drain())
    left = written + more
    while not task.done():
        if len(stream._buffer) > LOW:
            await turns(1)
            assert not task.done()
        left -= len(await asyncio.to_thread(client.recv, 16384))
        await turns()
    await task
    assert len(stream._buffer) <= LOW
    assert len(await asyncio.to_thread(receive, client, left)) == left


async def test_two_drains(pair: Pair) -> None:
    """Several tasks may wait in drain(), and all of them return."""
    stream, client = pair
    data = pattern(MB * 8)
    stream.write(data)
    first = await parked(stream.drain())
    second = await parked(stream.drain())
    assert await asyncio.to_thread(receive, client, len(data)) == data
    await first
    await second


async def test_cancelled_drain(pair: Pair) -> None:
    """A cancelled drain() changes nothing of what is sent."""
    stream, client = pair
    data = pattern(8 * MB)
    stream.write(data)
    task = await parked(stream.drain())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream._waiters == []
    assert await asyncio.to_thread(receive, client, len(data)) == data
    await stream.drain()


async def test_cancelled_send(pair: Pair) -> None:
    """A cancelled send() sends its data once and whole."""
    stream, client = pair
    # Halves that are more than Linux buffers by default (tcp_wmem: 4 MB).
    data = pattern(12 * MB)
    for part in (data[: 6 * MB], data[6 * MB :]):
        task = await parked(stream.send(part))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    stream.close()
    assert await asyncio.to_thread(receive, client, len(data) + 1) == data


async def test_send_waits_for_room(pair: Pair) -> None:
    """send() writes and then waits until little is unsent."""
    stream, client = pair
    await stream.send(b"short")
    assert client.recv(10) == b"short"
    data = pattern(8 * MB)
    task = await parked(stream.send(data))
    assert await asyncio.to_thread(receive, client, len(data)) == data
    await task


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: memoryview(data).cast("I"),
        lambda data: memoryview(data).cast("B", (len(data) // 4, 4)),
        lambda data: memoryview(array.array("d", data)),
        lambda data: memoryview(bytearray(data))[4:],
    ],
    ids=["bytes", "bytearray", "memoryview", "ints", "matrix", "doubles", "slice"],
)
async def test_write_kinds(pair: Pair, make: Callable[[bytes], Any], *, blocked: bool) -> None:
    """Every kind of bytes is sent as its bytes, at once and from the buffer."""
    stream, client = pair
    before = fill(stream) if blocked else 0
    data = make(pattern(4000))
    stream.write(data)
    expected = bytes(data) if not isinstance(data, memoryview) else data.tobytes()
    assert not blocked or stream._buffer
    stream.close()
    got = await asyncio.to_thread(receive, client, before + len(expected) + 1)
    assert got[before:] == expected


@pytest.mark.parametrize("blocked", [False, True])
async def test_written_data_may_change(pair: Pair, *, blocked: bool) -> None:
    """What is done to a bytearray after write() does not change what is sent."""
    stream, client = pair
    before = fill(stream) if blocked else 0
    data = bytearray(b"good")
    stream.write(data)
    data[:] = b"bad!!!"
    data.clear()
    stream.close()
    assert (await asyncio.to_thread(receive, client, before + 10))[before:] == b"good"


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    "data",
    ["text", None, 5, array.array("I", [1, 2]), memoryview(b"abcdef")[::2], [b"x"]],
    ids=type,
)
async def test_write_of_something_else(pair: Pair, data: Any, *, blocked: bool) -> None:
    """What is no bytes, or not in one piece, is a TypeError, and nothing of it is sent."""
    stream, client = pair
    before = fill(stream) if blocked else 0
    unsent = len(stream._buffer)
    with pytest.raises(TypeError):
        stream.write(data)
    assert len(stream._buffer) == unsent
    stream.close()
    assert len(await asyncio.to_thread(receive, client, before + 1)) == before


async def test_write_to_a_peer_that_reset(pair: Pair) -> None:
    """A write to a peer that has gone raises, and so does what follows."""
    stream, client = pair
    reset(client)
    with pytest.raises(ConnectionResetError):
        stream.write(b"x")
    with pytest.raises(ConnectionResetError):
        stream.write_eof()
    with pytest.raises(ConnectionResetError):
        await stream.send(b"x")
    with pytest.raises(ConnectionResetError):
        await stream.read(1)


async def test_each_error_is_a_new_one(pair: Pair) -> None:
    """Calls after a failure raise errors of their own, with the first as their cause."""
    stream, client = pair
    reset(client)
    caught = []
    for _ in range(2):
        with pytest.raises(ConnectionResetError) as each:
            stream.write(b"x")
        caught.append(each.value)
    assert caught[0] is not caught[1]
    assert caught[0].__cause__ is caught[1].__cause__


async def test_writes_of_nothing(pair: Pair) -> None:
    """Writing nothing, of whatever kind, sends nothing, and is refused where bytes would be."""
    stream, client = pair
    for nothing in (b"", bytearray(), memoryview(b""), memoryview(array.array("d"))):
        stream.write(nothing)
        await stream.send(nothing)
    assert wire(client) == "open"
    before = fill(stream)
    unsent = len(stream._buffer)
    stream.write(b"")
    stream.write(memoryview(b"abc")[3:])
    assert len(stream._buffer) == unsent
    stream.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        stream.write(b"")
    with pytest.raises(TypeError):
        stream.write("")  # type: ignore[arg-type]
    assert len(await asyncio.to_thread(receive, client, before + 1)) == before


@pytest.mark.parametrize("call", ["send", "drain"])
async def test_timeout_while_sending(pair: Pair, call: str) -> None:
    """A timeout in the middle of a send() or drain() loses and repeats nothing."""
    stream, client = pair
    data = pattern(8 * MB)

    async def write_and_drain() -> None:
        stream.write(data)
        await stream.drain()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await (stream.send(data) if call == "send" else write_and_drain())
    assert stream._waiters == []
    stream.write(b"more")
    hearing = asyncio.ensure_future(asyncio.to_thread(receive, client, len(data) + 5))
    await stream.drain()
    stream.close()
    assert await hearing == data + b"more"


async def test_an_event_that_took_the_reset(pair: Pair) -> None:
    """After CLOSE told of a reset, calls blame the peer's reset, not a broken pipe."""
    stream, client = pair
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    reset(client)
    await count(told, 1)
    with pytest.raises(ConnectionResetError) as caught:
        stream.write(b"x")
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    with pytest.raises(ConnectionResetError):
        await stream.read(10)
    with pytest.raises(ConnectionResetError):
        await stream.drain()
    await count(told, 1)


async def test_tracebacks_do_not_pile_up(pair: Pair) -> None:
    """However often calls raise, what they raise has no more to show than the first time."""
    stream, client = pair
    reset(client)

    async def depth() -> int:
        with pytest.raises(ConnectionResetError) as caught:
            await stream.read(10)
        formatted = traceback.format_exception(caught.value)
        assert "direct cause" in "".join(formatted)
        return len(formatted)

    await depth()  # the one that meets the reset
    assert await depth() == await depth() == await depth()
    with pytest.raises(ConnectionResetError) as caught:
        stream.write(b"x")
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert caught.value.__cause__.__traceback__ is None


@pytest.mark.parametrize("how", ["read", "write", "event"])
async def test_failed_stream_keeps_nobody_alive(pair: Pair, how: str) -> None:
    """What a call had at hand when the connection failed is free when the call is over."""
    stream, client = pair
    told: Told = []
    if how == "event":
        stream.on(Event.CLOSE, lambda *_: told.append(None))  # type: ignore[arg-type]
    reset(client)
    if how == "event":
        await count(told, 1)

    class Thing:
        """What a handler has."""

    async def handler() -> weakref.ref[Thing]:
        mine = Thing()
        with contextlib.suppress(ConnectionResetError):
            stream.write(b"x") if how == "write" else await stream.read(10)
        return weakref.ref(mine)

    gc.disable()
    try:
        assert (await handler())() is None
    finally:
        gc.enable()


# -- half-close


async def test_half_close_while_the_peer_sends(pair: Pair) -> None:
    """After write_eof() this side goes on reading, however much comes."""
    stream, client = pair
    data = pattern(2 * MB)
    stream.write(b"question")
    stream.write_eof()

    def answer() -> None:
        assert receive(client, 100) == b"question"
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    answering = asyncio.ensure_future(asyncio.to_thread(answer))
    assert await stream.read() == data
    await answering


async def test_half_close_by_the_peer_while_this_side_sends(pair: Pair) -> None:
    """What is unsent when the peer ends its direction follows, whole and in order."""
    stream, client = pair
    data = pattern(8 * MB)
    client.sendall(b"question")
    task = await parked(stream.send(data))
    client.shutdown(socket.SHUT_WR)
    assert await stream.read() == b"question"
    await turns()
    assert not task.done()
    stream.close()
    assert await asyncio.to_thread(receive, client, len(data) + 1) == data
    await task
    await stream.wait_closed()


async def test_half_close_by_this_side(pair: Pair) -> None:
    """After write_eof() the peer reads the end, and this side goes on reading."""
    stream, client = pair
    stream.write(b"question")
    stream.write_eof()
    stream.write_eof()
    assert receive(client, 100) == b"question"
    client.sendall(b"answer")
    assert await stream.read(100) == b"answer"
    with pytest.raises(RuntimeError, match="write_eof"):
        stream.write(b"more")
    with pytest.raises(RuntimeError, match="write_eof"):
        await stream.send(b"more")
    assert wire(client) == "eof"


async def test_half_close_waits_for_the_buffer(pair: Pair) -> None:
    """The end that write_eof() sends comes behind all that was written."""
    stream, client = pair
    data = pattern(8 * MB)
    stream.write(data)
    stream.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        stream.write(b"more")
    assert await asyncio.to_thread(receive, client, len(data) + 1) == data
    client.sendall(b"thanks")
    assert await stream.read(100) == b"thanks"


async def test_half_close_both_ways(pair: Pair) -> None:
    """Each side may end its own direction, and close() ends the rest."""
    stream, client = pair
    client.sendall(b"all")
    client.shutdown(socket.SHUT_WR)
    assert await stream.read() == b"all"
    stream.write(b"right")
    stream.write_eof()
    assert receive(client, 100) == b"right"
    stream.close()
    await stream.wait_closed()


async def test_half_close_after_a_reset(pair: Pair) -> None:
    """write_eof() to a peer that has gone does not hide the reset."""
    stream, client = pair
    reset(client)
    stream.write_eof()
    with pytest.raises(ConnectionResetError):
        await stream.read(10)


# -- closing


async def test_close(pair: Pair, either: Listener[Stream]) -> None:
    """close() sends what was written and then the end, and gives the descriptor back."""
    stream, client = pair
    assert not stream.is_closing()
    stream.write(b"bye")
    stream.close()
    stream.close()
    assert stream.is_closing()
    await stream.wait_closed()
    assert receive(client, 100) == b"bye"
    assert either.statistics().streams == 0
    assert repr(stream) == f"<Stream closed caller={client.getsockname()!r}>"


async def test_calls_after_close(pair: Pair) -> None:
    """After close() every call but an ending one says that this side closed."""
    stream, client = pair
    stream.close()
    for call in (stream.write_eof, lambda: stream.write(b"x")):
        with pytest.raises(ConnectionAbortedError, match="closed by this side"):
            call()
    for each in (stream.read(1), stream.read(0), stream.read(), stream.drain(), stream.send(b"x")):
        with pytest.raises(ConnectionAbortedError, match="closed by this side"):
            await each
    stream.abort()
    await stream.wait_closed()
    assert wire(client) == "eof"


async def test_close_flushes_in_the_background(pair: Pair, either: Listener[Stream]) -> None:
    """What is unsent at close() goes out first; the descriptor is closed behind it."""
    stream, client = pair
    data = pattern(8 * MB)
    stream.write(data)
    stream.close()
    assert "closing" in repr(stream)
    assert either.statistics().streams == 1
    task = await parked(stream.wait_closed())
    with pytest.raises(ConnectionAbortedError):
        stream.write(b"more")
    with pytest.raises(ConnectionAbortedError):
        await stream.drain()
    assert await asyncio.to_thread(receive, client, len(data) + 1) == data
    await task
    assert either.statistics().streams == 0


async def test_close_behind_write_eof(pair: Pair) -> None:
    """write_eof() and close() with something unsent lose nothing."""
    stream, client = pair
    data = pattern(8 * MB)
    stream.write(data)
    stream.write_eof()
    stream.close()
    assert await asyncio.to_thread(receive, client, len(data) + 1) == data
    await stream.wait_closed()


async def test_close_while_a_read_waits(pair: Pair) -> None:
    """close() ends a read that waits."""
    stream, client = pair
    task = await parked(stream.read(10))
    stream.close()
    with pytest.raises(ConnectionAbortedError):
        await task
    assert wire(client) == "eof"


async def test_close_while_a_drain_waits(pair: Pair) -> None:
    """A drain() under way at close() returns when enough was flushed."""
    stream, client = pair
    data = pattern(8 * MB)
    stream.write(data)
    task = await parked(stream.drain())
    stream.close()
    assert await asyncio.to_thread(receive, client, len(data) + 1) == data
    await task
    await stream.wait_closed()


async def test_wait_closed_waits_for_close(pair: Pair) -> None:
    """wait_closed() does not close; several tasks may wait, and one may be cancelled."""
    stream, _ = pair
    tasks = [await parked(stream.wait_closed()) for _ in range(3)]
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert not stream.is_closing()
    stream.close()
    await tasks[0]
    await tasks[2]


async def test_failed_flush(pair: Pair) -> None:
    """A flush that fails in the background is raised by every next call."""
    stream, client = pair
    stream.write(bytes(8 * MB))
    task = await parked(stream.drain())
    reset(client)
    with pytest.raises(ConnectionError):
        await task
    with pytest.raises(ConnectionError):
        stream.write(b"x")
    with pytest.raises(ConnectionError):
        stream.write_eof()
    with pytest.raises(ConnectionError):
        await stream.drain()
    with pytest.raises(ConnectionError):
        await stream.read(1)
    stream.close()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await stream.wait_closed()


async def test_failed_flush_after_close(pair: Pair, either: Listener[Stream]) -> None:
    """A flush that fails after close() is raised by wait_closed(); nothing is left open."""
    stream, client = pair
    stream.write(bytes(8 * MB))
    stream.close()
    task = await parked(stream.wait_closed())
    reset(client)
    with pytest.raises(ConnectionError):
        await task
    assert either.statistics().streams == 0


async def test_failed_flush_ends_a_waiting_read(pair: Pair) -> None:
    """A reset ends both a read and a drain() that wait."""
    stream, client = pair
    stream.write(bytes(8 * MB))
    reading = await parked(stream.read(10))
    draining = await parked(stream.drain())
    reset(client)
    for task in (reading, draining):
        with pytest.raises(ConnectionError):
            await task


async def test_abort(pair: Pair, either: Listener[Stream]) -> None:
    """abort() resets the peer, and wait_closed() then has nothing to wait for."""
    stream, client = pair
    stream.write(b"lost?")
    stream.abort()
    stream.abort()
    assert stream.is_closing()
    await stream.wait_closed()
    assert either.statistics().streams == 0
    assert wire(client) in (b"lost?", "reset")
    assert wire(client) in ("reset", "eof")
    with pytest.raises(ConnectionAbortedError):
        await stream.read(1)


async def test_abort_resets(pair: Pair) -> None:
    """The peer of an aborted stream reads a reset, though nothing was unread."""
    stream, client = pair
    stream.abort()
    assert wire(client) == "reset"


async def test_abort_ends_what_waits(pair: Pair) -> None:
    """abort() ends a read, a drain() and a wait_closed() that wait; the rest is dropped."""
    stream, client = pair
    written = 8 * MB
    stream.write(bytes(written))
    reading = await parked(stream.read(10))
    draining = await parked(stream.drain())
    closed = await parked(stream.wait_closed())
    stream.abort()
    for task in (reading, draining):
        with pytest.raises(ConnectionAbortedError):
            await task
    await closed
    with pytest.raises(ConnectionResetError):
        await asyncio.to_thread(receive, client, written)


async def test_abort_during_the_flush(pair: Pair, either: Listener[Stream]) -> None:
    """abort() after close() ends the flush."""
    stream, client = pair
    stream.write(bytes(8 * MB))
    stream.close()
    task = await parked(stream.wait_closed())
    stream.abort()
    await task
    assert either.statistics().streams == 0
    with pytest.raises(ConnectionResetError):
        await asyncio.to_thread(receive, client, 8 * MB)


async def test_forgotten_stream(listener: Listener[Stream], dial: Dial) -> None:
    """A stream that is dropped without close() warns, and its descriptor is closed."""
    client = dial(listener)
    streams = [await listener.accept()]
    with pytest.warns(ResourceWarning, match="unclosed"):
        streams.clear()
    gc.collect()
    await asyncio.sleep(0)
    assert wire(client) == "eof"
    assert listener.statistics().streams == 0


def collect(things: list[Any]) -> None:
    """Forget everything in a list."""
    things.clear()
    gc.collect()


async def test_forgotten_stream_that_has_waited(listener: Listener[Stream], dial: Dial) -> None:
    """Nor does one stay that the watch knows: a handler that raises leaves nothing behind."""
    released: list[None] = []

    def hold(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: released.append(None))
        return ACCEPT

    async def handler() -> None:
        stream = await listener.accept(hold)
        await stream.read(10)
        message = "a handler that fails"
        raise ValueError(message)

    before = descriptors()
    for _ in range(3):
        task = asyncio.ensure_future(handler())
        client = dial(listener)
        await until(lambda: listener.statistics().streams)
        await caught_up()
        client.sendall(b"x")
        await asyncio.wait([task])
        assert isinstance(task.exception(), ValueError)
        tasks = [task]
        del task
        with pytest.warns(ResourceWarning, match="unclosed"):
            collect(tasks)
        await until(lambda: not listener.statistics().streams)
        assert wire(client) == "eof"
        client.close()
    assert len(released) == 3
    assert descriptors() == before


async def test_collected_in_another_thread(listener: Listener[Stream], dial: Dial) -> None:
    """A forgotten stream that another thread collects is closed in the loop's own."""
    threads: list[int] = []

    def hold(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: threads.append(threading.get_ident()))
        return ACCEPT

    dial(listener)
    cycle: list[Any] = [await listener.accept(hold)]
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        with pytest.warns(ResourceWarning, match="unclosed"):
            await asyncio.to_thread(gc.collect)
    finally:
        gc.enable()
    await until(lambda: threads)
    assert threads == [threading.get_ident()]


async def test_a_waiting_task_keeps_its_stream(listener: Listener[Stream], dial: Dial) -> None:
    """A task that nobody else refers to is not collected while it waits for its stream."""
    got: list[bytes] = []

    async def handler(stream: Stream) -> None:
        got.append(await stream.read(10))
        stream.close()

    client = dial(listener)
    stream = await listener.accept()
    asyncio.get_running_loop().call_soon(asyncio.ensure_future, handler(stream))
    del stream
    await caught_up()
    gc.collect()
    client.sendall(b"still there")
    await until(lambda: got)
    assert got == [b"still ther"]
    await until(lambda: not listener.statistics().streams)


async def test_a_stream_is_kept_while_something_is_on(pair: Pair) -> None:
    """The watch keeps a stream while a read waits or data is unsent, and no longer."""
    stream, client = pair
    needed = stream._watch.needed
    task = await parked(stream.read(10))
    assert stream in needed
    client.sendall(b"x")
    assert await task == b"x"
    assert stream not in needed

    fill(stream)
    task = await parked(stream.read(10))
    client.sendall(b"y")
    assert await task == b"y"
    assert stream in needed

    task = await parked(stream.read(10))
    stream.abort()
    with pytest.raises(ConnectionAbortedError):
        await task
    assert stream not in needed


async def test_short_reads_of_a_unix_stream(tmp_path: Path) -> None:
    """A read that stops at descriptors sent along does not hide what comes behind them."""
    async with await listen(path=tmp_path / "s") as listener:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            stream = await listener.accept()
            first = asyncio.ensure_future(stream.read(100))
            await caught_up()
            client.sendall(b"x")
            assert await first == b"x"
            socket.send_fds(client, [b"abc"], [client.fileno()])
            client.sendall(b"def")
            await caught_up()  # the edge of both is spent
            got = b""
            async with asyncio.timeout(LIMIT):
                while len(got) < 6:
                    got += await stream.read(100)
            assert got == b"abcdef"
            stream.close()


async def test_short_reads_at_an_urgent_byte(pair: Pair) -> None:
    """A read that stops at an urgent byte does not hide what comes behind it."""
    stream, client = pair
    first = asyncio.ensure_future(stream.read(100))
    await caught_up()
    client.sendall(b"x")
    assert await first == b"x"
    client.sendall(b"abc")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"def")
    got = b""
    async with asyncio.timeout(LIMIT):
        while len(got) < 6:
            got += await stream.read(100)
    assert got == b"abcdef"
    stream.close()


# -- both directions at once


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_ping_pong(pair: Pair, seed: int) -> None:
    """Echoed back in pieces of any size, all bytes come back, whole and in order."""
    stream, client = pair
    chance = random.Random(seed)  # noqa: S311 - a fixed sequence
    sizes = [chance.choice([1, 2, 63, 64, 1000, 65536, 100_000]) for _ in range(40)]

    async def echo() -> None:
        while data := await stream.read(chance.choice([1000, 64, 65536])):
            await stream.send(data)
        stream.close()

    def play() -> None:
        for size in sizes:
            data = pattern(size)
            client.sendall(data)
            assert receive(client, size) == data
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""

    task = asyncio.ensure_future(echo())
    await asyncio.to_thread(play)
    await task
    await stream.wait_closed()


@pytest.mark.slow
async def test_both_ways_at_once(pair: Pair) -> None:
    """A stream reads and writes megabytes at the same time."""
    stream, client = pair
    ours, theirs = pattern(2 * MB), pattern(2 * MB + 1)

    async def send() -> None:
        for start in range(0, len(ours), 50_000):
            await stream.send(ours[start : start + 50_000])
        stream.write_eof()

    def talk() -> None:
        client.sendall(theirs)
        client.shutdown(socket.SHUT_WR)

    sending = asyncio.ensure_future(send())
    reading = asyncio.ensure_future(stream.read())
    _, got = await asyncio.gather(
        asyncio.to_thread(talk), asyncio.to_thread(receive, client, len(ours) + 1)
    )
    await sending
    assert got == ours
    assert await reading == theirs


@pytest.mark.slow
async def test_many_streams(either: Listener[Stream], dial: Dial) -> None:
    """Many streams that come and go keep their bytes apart."""

    async def serve(stream: Stream) -> None:
        while data := await stream.read(7):
            await stream.send(data)
        stream.close()

    for _ in range(3):
        clients = [dial(either) for _ in range(30)]
        tasks = [asyncio.ensure_future(serve(await either.accept())) for _ in clients]
        for turn in range(5):
            for number, client in enumerate(clients):
                client.sendall(b"%03d-%02d" % (number, turn))
            await turns(4)
            for number, client in enumerate(clients):
                text = b"%03d-%02d" % (number, turn)
                assert await asyncio.to_thread(receive, client, len(text)) == text
        for client in clients:
            client.close()
        await asyncio.gather(*tasks)
    assert either.statistics().streams == 0


# -- facts


async def test_extra_info(pair: Pair) -> None:
    """get_extra_info() knows the names that asyncio's transports know."""
    stream, client = pair
    assert stream.get_extra_info("peername") == stream.caller_id == client.getsockname()
    assert stream.get_extra_info("sockname") == stream.callee_id == client.getpeername()
    sock = stream.get_extra_info("socket")
    assert sock.fileno() >= 0
    assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert sock.getpeername() == client.getsockname()
    assert stream.get_extra_info("cipher") is None
    assert stream.get_extra_info("cipher", "none") == "none"
    assert repr(stream) == f"<Stream open caller={client.getsockname()!r}>"

    stream.close()
    assert stream.get_extra_info("peername") == client.getsockname()
    assert stream.get_extra_info("sockname", "gone") == "gone"
    with pytest.raises(ConnectionAbortedError, match="closed by this side"):
        _ = stream.callee_id


async def test_socket_of_a_stream_and_of_a_pending_connection(
    listener: Listener[Stream], dial: Dial
) -> None:
    """The socket of get_extra_info() can be duplicated, as that of asyncio's transports."""
    found: list[socket.socket] = []

    def look(pending: PendingTransport) -> AnyVerdict:
        found.append(pending.get_extra_info("socket").dup())
        return ACCEPT

    client = dial(listener, data=b"x")
    stream = await listener.accept(look)
    sock = stream.get_extra_info("socket")
    assert not sock.get_inheritable()
    found.append(sock.dup())
    for twin in found:
        with twin:
            assert type(twin) is socket.socket
            assert twin.gettimeout() == 0
            assert twin.getpeername() == client.getsockname()
    assert await stream.read(1) == b"x"
    stream.close()
    assert wire(client) == "eof"


async def test_peername_after_an_early_reset(listener: Listener[Stream], dial: Dial) -> None:
    """The caller's address is known even if it reset right after the verdict."""
    client = dial(listener)
    name = client.getsockname()
    stream = await listener.accept()
    reset(client)
    assert stream.get_extra_info("peername") == name
    stream.close()


# -- taking turns with the loop


class Ticker:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.ticks = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self.ticks += 1
        self._handle = self._loop.call_soon(self._tick)

    def stop(self) -> None:
        """End the counting."""
        self._handle.cancel()


async def longest_run(operation: Callable[[], Awaitable[object]], times: int = 200) -> int:
    """Return how often in a row *operation* was over before the loop could turn."""
    ticker = Ticker()
    longest = run = 0
    for _ in range(times):
        before = ticker.ticks
        try:
            await operation()
        except (OSError, RuntimeError):
            pass
        run = run + 1 if ticker.ticks == before else 0
        longest = max(longest, run)
    ticker.stop()
    return longest


async def test_reading_lets_the_loop_turn(pair: Pair) -> None:
    """No more than 32 reads in a row complete without yielding."""
    stream, client = pair
    client.sendall(bytes(200))
    assert await longest_run(lambda: stream.read(1)) == 32


async def test_other_calls_let_the_loop_turn(pair: Pair) -> None:
    """Reads of nothing, at the end of the stream, drains and sends yield as well."""
    stream, client = pair
    client.shutdown(socket.SHUT_WR)
    assert await stream.read(1) == b""
    operations: list[Callable[[], Awaitable[object]]] = [
        lambda: stream.read(0),
        lambda: stream.read(1),
        stream.read,
        stream.drain,
        lambda: stream.send(b"x"),
    ]
    for operation in operations:
        assert 0 < await longest_run(operation) <= 32


async def test_mixed_calls_let_the_loop_turn(pair: Pair) -> None:
    """Reads and sends in turn count together."""
    stream, client = pair
    client.sendall(bytes(200))

    async def exchange() -> None:
        await stream.send(await stream.read(1))

    assert await longest_run(exchange) <= 16


async def test_failing_calls_let_the_loop_turn(pair: Pair) -> None:
    """Every call that raises has yielded, so that a retry loop stops nobody."""
    stream, client = pair
    reset(client)
    operations: list[Callable[[], Awaitable[object]]] = [
        lambda: stream.read(1),
        stream.drain,
        lambda: stream.send(b"x"),
    ]
    for operation in operations:
        assert await longest_run(operation) == 0
    stream.close()
    for operation in operations:
        assert await longest_run(operation) == 0
    assert await longest_run(stream.wait_closed) <= 32


async def test_refused_reader_lets_the_loop_turn(pair: Pair) -> None:
    """A reader that is refused because another one reads has yielded."""
    stream, client = pair
    first = await parked(stream.read(1))
    assert await longest_run(lambda: stream.read(1)) == 0
    client.sendall(b"x")
    assert await first == b"x"


async def test_send_after_write_eof_lets_the_loop_turn(pair: Pair) -> None:
    """A send() that is refused after write_eof() has yielded."""
    stream, _ = pair
    stream.write_eof()
    assert await longest_run(lambda: stream.send(b"x")) == 0


async def test_wait_closed_lets_the_loop_turn(pair: Pair) -> None:
    """Waiting for a stream that is closed already yields now and then."""
    stream, _ = pair
    stream.close()
    assert await longest_run(stream.wait_closed) <= 32


async def test_cancelled_turn(pair: Pair) -> None:
    """A call that is cancelled in the turn it gives the loop loses and repeats nothing."""
    stream, client = pair
    client.sendall(bytes(range(200)))
    got = bytearray()
    cancelled = 0
    while len(got) < 200:
        task = asyncio.ensure_future(stream.read(1))
        await asyncio.sleep(0)
        task.cancel()
        try:
            got += await task
        except asyncio.CancelledError:
            cancelled += 1
    assert bytes(got) == bytes(range(200))
    assert cancelled


# -- beside its listener


async def test_stream_outlives_its_listener(dial: Dial) -> None:
    """A stream reads and writes on, waiting both ways, when its listener is closed."""
    before = descriptors()
    listener = await listen("127.0.0.1", 0)
    client, quiet = dial(listener), dial(listener)
    stream = await listener.accept()
    other = await listener.accept()
    waiting = await parked(other.read(10))
    listener.close()
    await listener.wait_closed()

    reading = await parked(stream.read(10))
    client.sendall(b"ping")
    assert await reading == b"ping"
    quiet.sendall(b"pong")
    assert await waiting == b"pong"
    data = pattern(8 * MB)
    draining = await parked(stream.send(data))
    assert await asyncio.to_thread(receive, client, len(data)) == data
    await draining

    stream.close()
    other.close()
    client.close()
    quiet.close()
    await until(lambda: descriptors() == before)


async def test_stream_of_a_closed_listener_registers_late(dial: Dial) -> None:
    """A stream that first has to wait after its listener was closed leaves nothing open."""
    before = descriptors()
    listener = await listen("127.0.0.1", 0)
    client = dial(listener)
    stream = await listener.accept()
    listener.close()
    for data in (b"one", b"two"):
        reading = await parked(stream.read(10))
        client.sendall(data)
        assert await reading == data
    stream.close()
    client.close()
    assert descriptors() == before


@pytest.mark.parametrize("watch", [EpollWatch, ReaderWatch])
async def test_forgotten_while_it_flushes(
    dial: Dial, watch: type[EpollWatch | ReaderWatch]
) -> None:
    """What is unsent at close() goes out though listener and stream are both forgotten."""
    before = descriptors()
    sock = socket.create_server(("127.0.0.1", 0))
    data = pattern(8 * MB)

    async def serve() -> tuple[socket.socket, weakref.ref[Stream]]:
        listener: Listener[Stream] = Listener(
            lambda loop, watch: HandshakeGate(loop, watch, [sock]), watch=watch
        )
        client = dial(listener)
        stream = await listener.accept()
        stream.write(data)
        stream.close()
        listener.close()
        await listener.wait_closed()
        return client, weakref.ref(stream)

    client, stream = await serve()
    gc.collect()
    assert receive(client, 1000) == data[:1000]
    assert await asyncio.to_thread(receive, client, len(data)) == data[1000:]
    client.close()
    await until(lambda: descriptors() == before)
    gc.collect()
    assert stream() is None


@pytest.mark.parametrize("how", ["write", "read"])
async def test_no_descriptor_for_a_stream_that_waits(
    dial: Dial, exhaust: Callable[[], Callable[[], None]], how: str
) -> None:
    """A stream of a closed listener that cannot wait fails, and says that no descriptor is free."""
    before = descriptors()
    listener = await listen("127.0.0.1", 0)
    client = dial(listener)
    stream = await listener.accept()
    listener.close()
    await listener.wait_closed()
    assert descriptors() == before + 2
    give_back = exhaust()
    with pytest.raises(OSError, match="Too many open files"):
        stream.write(bytes(8 * MB)) if how == "write" else await stream.read(10)
    assert await longest_run(lambda: stream.read(10)) == 0
    for call in (stream.drain, stream.read):
        with pytest.raises(OSError, match="Too many open files"):
            await call()
    give_back()
    stream.close()
    assert stream._sock.fileno() < 0
    if how == "write":
        with pytest.raises(OSError, match="Too many open files"):
            await stream.wait_closed()
    await stream_is_forgotten(stream)
    client.close()
    assert descriptors() == before


async def stream_is_forgotten(stream: Stream) -> None:
    """Check that the watch keeps nothing of a stream that is closed."""
    await turns()
    assert not stream._watch.needed
    assert not stream._watch._callbacks  # type: ignore[attr-defined]


async def test_no_descriptor_for_others(
    pair: Pair, exhaust: Callable[[], Callable[[], None]]
) -> None:
    """A stream of an open listener goes on, waiting too, while no descriptor is free."""
    stream, client = pair
    give_back = exhaust()
    try:
        reading = await parked(stream.read(10))
        client.sendall(b"ping")
        assert await reading == b"ping"
        written = fill(stream)
        stream.close()
        client.setblocking(False)
        got = 0

        def hear() -> bool:
            nonlocal got
            with contextlib.suppress(BlockingIOError):
                got += len(client.recv(65536))
            return got == written and stream._sock.fileno() < 0

        await until(hear)
    finally:
        give_back()
    await stream.wait_closed()


async def test_listener_abort(either: Listener[Stream], dial: Dial) -> None:
    """Listener.abort() closes the listener and resets its streams and its pending ones."""
    clients = [dial(either) for _ in range(5)]
    idle, reading, writing, closing = [await either.accept() for _ in range(4)]
    with pytest.raises(BlockingIOError):
        await either.accept(defer)
    task = await parked(reading.read(10))
    writing.write(bytes(8 * MB))
    closing.write(bytes(8 * MB))
    closing.close()
    either.abort()
    either.abort()

    with pytest.raises(ConnectionAbortedError):
        await task
    assert idle.is_closing()
    assert wire(clients[0]) == "reset"
    assert wire(clients[1]) == "reset"
    for client in clients[2:4]:
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(receive, client, 8 * MB)
    assert wire(clients[4]) == "reset"
    now = either.statistics()
    assert (now.streams, now.closed, now.pending) == (0, 1, 0)


async def test_abort_after_close(either: Listener[Stream], dial: Dial) -> None:
    """abort() ends the streams of a listener that was closed before."""
    client = dial(either)
    stream = await either.accept()
    either.close()
    assert wire(client) == "open"
    either.abort()
    assert wire(client) == "reset"
    assert stream.is_closing()


def option(stream: Stream, level: int, name: int) -> int:
    """Read a socket option of a stream."""
    value = stream.get_extra_info("socket").getsockopt(level, name)
    assert isinstance(value, int)
    return value


async def test_inherited_options(dial: Dial) -> None:
    """A stream has the options of its listener, and TCP_NODELAY unless told otherwise."""
    keepalive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    async with await listen("127.0.0.1", 0, options=[keepalive]) as listener:
        dial(listener)
        stream = await listener.accept()
        assert option(stream, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(stream, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        stream.close()

    nagle = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    async with await listen("127.0.0.1", 0, options=[nagle]) as listener:
        dial(listener)
        stream = await listener.accept()
        assert not option(stream, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not option(stream, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        stream.close()


OPTIONS = [
    (socket.SOL_SOCKET, getattr(socket, name))
    for name in (
        *("SO_RCVLOWAT", "SO_SNDLOWAT", "SO_SNDBUF", "SO_KEEPALIVE", "SO_OOBINLINE"),
        *("SO_REUSEADDR", "SO_REUSEPORT", "SO_PRIORITY", "SO_MARK", "SO_DONTROUTE"),
    )
] + [
    (socket.IPPROTO_TCP, getattr(socket, name))
    for name in (
        *("TCP_CORK", "TCP_DEFER_ACCEPT", "TCP_KEEPCNT", "TCP_KEEPIDLE", "TCP_KEEPINTVL"),
        *("TCP_LINGER2", "TCP_SYNCNT", "TCP_USER_TIMEOUT", "TCP_NOTSENT_LOWAT", "TCP_NODELAY"),
    )
]


async def test_other_options_are_untouched(pair: Pair) -> None:
    """Waiting, reading and writing leave every option of the socket as the user set it."""
    stream, client = pair
    sock = stream.get_extra_info("socket")
    chosen = [
        (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 3),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, 2),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 0),
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 90_000),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 7000),
    ]
    for each in chosen:
        sock.setsockopt(*each)
    before = [sock.getsockopt(*each) for each in OPTIONS]
    linger = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
    task = await parked(stream.read(10))
    client.sendall(b"abc")
    assert await task == b"abc"
    data = pattern(MB)
    task = await parked(stream.send(data))
    assert await asyncio.to_thread(receive, client, len(data)) == data
    await task
    client.shutdown(socket.SHUT_WR)
    assert await stream.readline() == b""
    assert [sock.getsockopt(*each) for each in OPTIONS] == before
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger


async def test_option_set_after_clients_were_queued(listener: Listener[Stream], dial: Dial) -> None:
    """setsockopt() reaches whoever is queued or deferred, but no stream there is already."""
    for _ in range(3):
        dial(listener)
    await queued(listener, 3)
    before = await listener.accept()
    with pytest.raises(BlockingIOError):
        await listener.accept(defer)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    deferred, behind = await listener.accept(), await listener.accept()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    dial(listener)
    after = await listener.accept()

    streams = (before, deferred, behind, after)
    keepalive = [option(each, socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in streams]
    nodelay = [option(each, socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in streams]
    assert list(map(bool, keepalive)) == [False, True, True, False]
    assert list(map(bool, nodelay)) == [True, False, False, False]
    for stream in streams:
        stream.close()


async def test_refused_option_is_not_inherited(listener: Listener[Stream], dial: Dial) -> None:
    """An option that the kernel refuses raises, named, and harms no later accept."""
    with pytest.raises(OSError, match=r"socket option \(1, 9999, 1\)"):
        listener.setsockopt(socket.SOL_SOCKET, 9999, 1)
    with pytest.raises(TypeError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, "on")  # type: ignore[arg-type]
    dial(listener)
    (await listener.accept()).close()


# -- events


def teller(told: Told) -> Callable[[Stream, Event, OSError | None], None]:
    """Return a callback that keeps what it is told."""

    def callback(stream: Stream, event: Event, error: OSError | None) -> None:
        told.append((stream, event, error))

    return callback


def events(told: Told) -> list[Event]:
    """Return the events alone."""
    return [event for _, event, _ in told]


ALL = Event.READ | Event.WRITE | Event.CLOSE


async def test_stream_events_are_inherited(either: Listener[Stream], dial: Dial) -> None:
    """Callbacks of the listener are told of a new stream: WRITE once, READ, CLOSE once."""
    told: Told = []
    either.on(ALL, teller(told))
    client = dial(either)
    stream = await either.accept()
    assert told == []
    await count(told, 1)
    assert told == [(stream, Event.WRITE, None)]

    client.sendall(b"abc")
    assert events(told) == [Event.WRITE]
    await count(told, 2)
    assert told[1:] == [(stream, Event.READ, None)]
    assert await stream.read(10) == b"abc"
    client.shutdown(socket.SHUT_WR)
    await until(lambda: len(told) > 2)
    assert await stream.read(10) == b""
    await count(told, 4)
    assert sorted(map(str, events(told)[2:])) == ["Event.CLOSE", "Event.READ"]
    assert {error for _, _, error in told} == {None}
    stream.close()
    await count(told, 4)


async def test_events_as_of_the_accept(either: Listener[Stream], dial: Dial) -> None:
    """A stream inherits what is subscribed when it is accepted, not before or after."""
    first: Told = []
    second: Told = []
    third: Told = []
    subscription = either.on(Event.WRITE, teller(first))
    dial(either)
    with pytest.raises(BlockingIOError):
        await either.accept(defer)
    either.on(Event.WRITE, teller(second))
    subscription.cancel()
    stream = await either.accept()
    either.on(Event.WRITE, teller(third))
    await count(first, 0)
    assert first == []
    assert second == [(stream, Event.WRITE, None)]
    assert third == []
    stream.close()


async def test_inherited_events_outlive_the_subscription(
    either: Listener[Stream], dial: Dial
) -> None:
    """A stream keeps what it inherited when the listener's subscription is cancelled."""
    told: Told = []
    subscription = either.on(Event.READ, teller(told))
    client = dial(either)
    stream = await either.accept()
    subscription.cancel()
    client.sendall(b"x")
    await until(lambda: told)
    assert told == [(stream, Event.READ, None)]
    stream.close()


async def test_no_event_before_the_verdict(either: Listener[Stream], dial: Dial) -> None:
    """Nobody is told of a connection that is deferred, rejected or reset."""
    told: Told = []
    either.on(ALL, teller(told))
    for verdict in (Condition(DEFER), lambda _: 1 / 0):
        client = dial(either, data=b"data")
        with pytest.raises((BlockingIOError, ZeroDivisionError)):
            await either.accept(verdict)  # type: ignore[arg-type]
        client.close()
        await count(told, 0)
    assert told == []


async def test_read_event_is_armed_by_reading(pair: Pair) -> None:
    """READ is told once until something is read, and again if more is there."""
    stream, client = pair
    told: Told = []
    stream.on(Event.READ, teller(told))
    client.sendall(b"abcdef")
    await until(lambda: told)
    client.sendall(b"ghi")
    await count(told, 1)
    assert await stream.read(3) == b"abc"
    assert len(told) == 1
    await count(told, 2)
    assert await stream.read(100) == b"defghi"
    await count(told, 2)
    client.sendall(b"j")
    await count(told, 3)


async def test_no_read_event_while_a_read_waits(pair: Pair) -> None:
    """What goes to a waiting read is not told as READ."""
    stream, client = pair
    told: Told = []
    stream.on(Event.READ, teller(told))
    task = await parked(stream.read(10))
    client.sendall(b"abc")
    assert await task == b"abc"
    await count(told, 0)
    assert told == []
    client.sendall(b"def")
    await count(told, 1)
    assert events(told) == [Event.READ]


async def test_read_event_for_what_a_waiting_read_left(pair: Pair) -> None:
    """What a read did not take is told as READ."""
    stream, client = pair
    told: Told = []
    stream.on(Event.READ, teller(told))
    task = await parked(stream.read(2))
    client.sendall(b"abc")
    assert await task == b"ab"
    await count(told, 1)
    assert events(told) == [Event.READ]
    assert await stream.read(10) == b"c"


async def test_read_event_after_a_cancelled_read(pair: Pair) -> None:
    """Data for which a read was woken that is then cancelled is told as READ."""
    stream, client = pair
    told: Told = []
    stream.on(Event.READ, teller(told))
    task = await parked(stream.read(10))
    client.sendall(b"abc")
    await until(lambda: stream._reader is not None and stream._reader.done())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await count(told, 1)
    assert events(told) == [Event.READ]
    assert await stream.read(10) == b"abc"


async def test_no_read_event_after_the_end(pair: Pair) -> None:
    """Once the end of the stream was read there is no READ, whatever else happens."""
    stream, client = pair
    told: Told = []
    stream.on(ALL, teller(told))
    await turns()
    told.clear()
    task = await parked(stream.read(10))
    client.shutdown(socket.SHUT_WR)
    assert await task == b""
    await count(told, 1)
    assert events(told) == [Event.CLOSE]
    for _ in range(3):
        assert await stream.read(10) == b""
    data = pattern(8 * MB)
    task = await parked(stream.send(data))
    assert await asyncio.to_thread(receive, client, len(data)) == data
    await task
    await count(told, 2)
    assert events(told) == [Event.CLOSE, Event.WRITE]


async def test_unread_end_is_told_once(pair: Pair) -> None:
    """An end of the stream that nobody reads is told once, not again and again."""
    stream, client = pair
    told: Told = []
    stream.on(Event.READ, teller(told))
    client.shutdown(socket.SHUT_WR)
    await turns(200)
    assert events(told) == [Event.READ]


async def test_write_event(pair: Pair) -> None:
    """WRITE is told after the accept, and when there is room again after there was none."""
    stream, client = pair
    told: Told = []
    stream.on(Event.WRITE, teller(told))
    assert told == []
    await count(told, 1)
    assert told == [(stream, Event.WRITE, None)]
    stream.write(b"small")
    assert client.recv(10) == b"small"
    await count(told, 1)
    for n in (2, 3):
        written = fill(stream)
        await count(told, n - 1)
        assert len(await asyncio.to_thread(receive, client, written)) == written
        await count(told, n)


async def test_late_subscriber_to_write(pair: Pair) -> None:
    """Who subscribes to WRITE later is told if there is room, else when there is."""
    stream, client = pair
    first: Told = []
    stream.on(Event.WRITE, teller(first))
    await count(first, 1)
    late: Told = []
    stream.on(Event.WRITE, teller(late))
    await count(late, 1)
    assert events(late) == [Event.WRITE]

    written = fill(stream)
    later: Told = []
    stream.on(Event.WRITE, teller(later))
    await count(later, 0)
    assert later == []
    assert len(await asyncio.to_thread(receive, client, written)) == written
    await count(later, 1)
    assert events(later) == [Event.WRITE]
    assert events(late) == [Event.WRITE] * 2


async def test_late_subscriber_to_read(pair: Pair) -> None:
    """Who subscribes to READ later is told of what waits, and only if something does."""
    stream, client = pair
    first: Told = []
    stream.on(Event.READ, teller(first))
    client.sendall(b"abc")
    await until(lambda: first)
    late: Told = []
    stream.on(Event.READ, teller(late))
    assert late == []
    await count(late, 1)
    assert events(late) == events(first) == [Event.READ]

    assert await stream.read(10) == b"abc"
    later: Told = []
    stream.on(Event.READ, teller(later))
    await count(later, 0)
    assert later == []


async def test_first_subscriber_to_read(pair: Pair) -> None:
    """The first to subscribe is told of what came before, too."""
    stream, client = pair
    task = await parked(stream.read(10))
    client.sendall(b"one")
    assert await task == b"one"
    client.sendall(b"two")
    await turns()
    told: Told = []
    stream.on(Event.READ, teller(told))
    await count(told, 1)
    assert events(told) == [Event.READ]
    assert await stream.read(10) == b"two"


async def test_close_event_at_the_end(pair: Pair) -> None:
    """CLOSE is told when the peer has closed, though nobody reads."""
    stream, client = pair
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    client.close()
    await count(told, 1)
    assert told == [(stream, Event.CLOSE, None)]
    assert await stream.read(1) == b""
    await count(told, 1)


async def test_close_event_waits_for_the_data(pair: Pair) -> None:
    """CLOSE is told only after all data was read."""
    stream, client = pair
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    corked(client, b"abcdef")
    await count(told, 0)
    assert told == []
    assert await stream.read(3) == b"abc"
    await count(told, 0)
    assert told == []
    assert await stream.read(3) == b"def"
    await count(told, 1)
    assert told == [(stream, Event.CLOSE, None)]
    assert await stream.read(3) == b""
    await count(told, 1)


@pytest.mark.parametrize("reads", [False, True])
async def test_close_event_after_a_reset(pair: Pair, *, reads: bool) -> None:
    """CLOSE after a reset is told once, with the error; a read says the same."""
    stream, client = pair
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    task = await parked(stream.read(10)) if reads else None
    reset(client)
    await count(told, 1)
    assert events(told) == [Event.CLOSE]
    assert isinstance(told[0][2], ConnectionResetError)
    for waiting in (task or stream.read(10), stream.read(10)):
        with pytest.raises(ConnectionResetError):
            await waiting
    await count(told, 1)


async def test_reset_behind_data_with_events(pair: Pair) -> None:
    """With subscribers too, data before a reset is read first, and then the error."""
    stream, client = pair
    told: Told = []
    stream.on(ALL, teller(told))
    client.sendall(b"data")
    reset(client)
    await turns()
    assert await stream.read(2) == b"da"
    assert await stream.read(10) == b"ta"
    with pytest.raises(ConnectionResetError):
        await stream.read(10)
    await until(lambda: Event.CLOSE in events(told))
    await turns()
    closes = [error for _, event, error in told if event is Event.CLOSE]
    assert len(closes) == 1
    assert isinstance(closes[0], ConnectionResetError)


async def test_close_event_after_a_failed_flush(pair: Pair) -> None:
    """CLOSE tells of a flush that failed in the background."""
    stream, client = pair
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    stream.write(bytes(8 * MB))
    reset(client)
    await until(lambda: told)
    await count(told, 1)
    assert events(told) == [Event.CLOSE]
    assert isinstance(told[0][2], ConnectionError)


async def test_late_subscriber_to_close(pair: Pair) -> None:
    """Who subscribes to CLOSE after it was told to others is told as well."""
    stream, client = pair
    first: Told = []
    stream.on(Event.CLOSE, teller(first))
    client.close()
    await count(first, 1)
    late: Told = []
    stream.on(Event.CLOSE, teller(late))
    assert late == []
    await count(late, 1)
    assert late == [(stream, Event.CLOSE, None)]


async def test_first_subscriber_to_close_at_the_end(pair: Pair) -> None:
    """The first to subscribe to CLOSE after the end was read is told."""
    stream, client = pair
    client.close()
    assert await stream.read() == b""
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    await count(told, 1)
    assert told == [(stream, Event.CLOSE, None)]


@pytest.mark.parametrize("waited", [False, True])
async def test_first_subscriber_to_close_after_a_reset(pair: Pair, *, waited: bool) -> None:
    """The first to subscribe to CLOSE after a call met the reset is told the error."""
    stream, client = pair
    task = asyncio.ensure_future(stream.read(10))
    if waited:
        await turns()
    reset(client)
    with pytest.raises(ConnectionResetError):
        await task
    told: Told = []
    stream.on(Event.CLOSE, teller(told))
    await count(told, 1)
    assert events(told) == [Event.CLOSE]
    assert isinstance(told[0][2], ConnectionResetError)


async def test_late_subscriber_to_close_after_a_reset(pair: Pair) -> None:
    """A late subscriber to CLOSE is told the error before anybody has read it."""
    stream, client = pair
    first: Told = []
    stream.on(Event.CLOSE, teller(first))
    reset(client)
    await count(first, 1)
    late: Told = []
    stream.on(Event.CLOSE, teller(late))
    await count(late, 1)
    assert events(late) == [Event.CLOSE]
    assert isinstance(late[0][2], ConnectionResetError)


async def test_cancelled_subscription(pair: Pair) -> None:
    """A cancelled subscription is not told, not even of an event under way."""
    stream, client = pair
    told: Told = []
    kept: Told = []
    subscription = stream.on(ALL, teller(told))
    stream.on(ALL, teller(kept))
    assert subscription is not None
    subscription.cancel()
    subscription.cancel()
    client.sendall(b"x")
    await count(told, 0)
    assert told == []
    assert set(events(kept)) == {Event.READ, Event.WRITE}


async def test_subscribers_are_told_each(pair: Pair) -> None:
    """on() adds: each callback is told of its own events, one a call."""
    stream, client = pair
    first: Told = []
    second: Told = []
    stream.on(Event.READ, teller(first))
    stream.on(Event.READ | Event.WRITE, teller(second))
    client.sendall(b"x")
    await count(first, 1)
    await count(second, 2)
    assert events(first) == [Event.READ]
    assert sorted(map(str, events(second))) == ["Event.READ", "Event.WRITE"]


async def test_callback_that_raises(pair: Pair) -> None:
    """A callback that raises is reported, and neither the others nor the stream suffer."""
    stream, client = pair
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: reported.append(each))
    told: Told = []

    def raises(_stream: Stream, _event: Event, _error: OSError | None) -> None:
        raise ZeroDivisionError

    stream.on(Event.READ, raises)
    stream.on(Event.READ, teller(told))
    client.sendall(b"x")
    await until(lambda: told)
    assert await stream.read(1) == b"x"
    assert [type(each["exception"]) for each in reported] == [ZeroDivisionError]


async def test_callback_that_closes(either: Listener[Stream], dial: Dial) -> None:
    """A callback may close or abort the stream it is told of."""
    told: Told = []

    def ends(stream: Stream, event: Event, error: OSError | None) -> None:
        told.append((stream, event, error))
        stream.close() if len(told) == 1 else stream.abort()

    either.on(Event.READ, ends)
    clients = [dial(either, data=b"x") for _ in range(2)]
    streams = [await either.accept() for _ in clients]
    await count(told, 2)
    assert events(told) == [Event.READ] * 2
    assert either.statistics().streams == 0
    assert [stream.is_closing() for stream in streams] == [True, True]
    assert [wire(client) for client in clients] == ["reset", "reset"]  # with unread data


async def test_subscribing_to_a_closed_stream(pair: Pair) -> None:
    """Nothing is told of a stream that this side has closed, and nothing breaks."""
    stream, _ = pair
    told: Told = []
    stream.close()
    stream.on(ALL, teller(told))
    await count(told, 0)
    assert told == []


async def test_bad_subscriptions(pair: Pair, either: Listener[Stream]) -> None:
    """What is no event or cannot be called is refused with a TypeError."""
    stream, _ = pair
    for source in (stream, either):
        for bad in (5, Event(0), "READ", None):
            with pytest.raises(TypeError, match="Event"):
                source.on(bad, teller([]))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="cannot be called"):
            source.on(Event.READ, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [EpollWatch, ReaderWatch])
@pytest.mark.parametrize("situation", ["data", "end", "data and end", "end was read", "reset"])
@pytest.mark.parametrize("blocked", [False, True])
async def test_nothing_spins(
    dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[EpollWatch | ReaderWatch],
    situation: str,
    *,
    blocked: bool,
) -> None:
    """What nobody reads, and an end that was read, wake the loop a few times and no more."""
    wakes: list[int] = []
    name = "_dispatch" if kind is EpollWatch else "_readable"
    original = getattr(kind, name)

    def counting(self: Any, *descriptor: int) -> None:
        wakes.append(1)
        original(self, *descriptor)

    monkeypatch.setattr(kind, name, counting)
    sock = socket.create_server(("127.0.0.1", 0))
    opened: Listener[Stream] = Listener(
        lambda loop, watch: HandshakeGate(loop, watch, [sock]), watch=kind
    )
    async with opened as listener:
        told: Told = []
        listener.on(ALL, teller(told))
        client = dial(listener)
        stream = await listener.accept()
        await count(told, 1)
        if blocked:
            # More than all buffers on the way hold: it has to stay blocked.
            stream.write(bytes(16 * MB))
        if "data" in situation:
            client.sendall(b"data")
        if "end" in situation:
            client.shutdown(socket.SHUT_WR)
        if situation == "end was read":
            assert await stream.read(10) == b""
        if situation == "reset":
            reset(client)
        await until(lambda: len(told) > 1)
        await turns(300)
        assert len(wakes) < 10
        assert len(told) <= 4
        stream.abort()


async def test_events_over_both_loops_drive_an_echo(either: Listener[Stream], dial: Dial) -> None:
    """A server made of event callbacks alone echoes everything and learns of the end."""
    tasks: list[asyncio.Future[None]] = []
    ended: list[Stream] = []

    async def echo(stream: Stream) -> None:
        try:
            await stream.send(await stream.read(1000))
        except ConnectionAbortedError:
            assert ended  # READ told of the end as well, and CLOSE was faster

    def ready(stream: Stream, event: Event, _error: OSError | None) -> None:
        if event is Event.READ:
            tasks.append(asyncio.ensure_future(echo(stream)))
        else:
            ended.append(stream)
            stream.close()

    either.on(Event.READ | Event.CLOSE, ready)
    client = dial(either)
    stream = await either.accept(lambda _: ACCEPT)
    for size in (1, 999, 1000, 1001, 5000):
        data = pattern(size)
        client.sendall(data)
        assert await asyncio.to_thread(receive, client, size) == data
    client.shutdown(socket.SHUT_WR)
    await until(lambda: ended)
    assert ended == [stream]
    assert await wire_end(client) == "eof"
    await asyncio.gather(*tasks)
