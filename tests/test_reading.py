"""`Stream`: exact amounts, separators, lines, and the bytes received in search of them."""

from __future__ import annotations

import array
import asyncio
import fcntl
import gc
import random
import socket
import termios
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import pytest

from condaccept import Event, Stream
from condaccept._channel import AT_ONCE, IN_A_ROW
from condaccept._stream import LINE
from tests.support import caught_up, descriptors, reset, turns, until, wire_end

Pair: TypeAlias = tuple[Stream, socket.socket]
Source: TypeAlias = Stream | asyncio.StreamReader
Outcome: TypeAlias = tuple[Any, ...]
Told: TypeAlias = list[tuple[Event, OSError | None]]
"""What a callback was told."""

END: Final = b"<no further line>"


async def next_line(source: Source) -> bytes:
    """Return what one turn of ``async for`` gives."""
    async for line in source:
        return line
    return END


Call: TypeAlias = Callable[[Stream], Awaitable[bytes]]
CALLS: Final[dict[str, Call]] = {
    "read": lambda stream: stream.read(100),
    "read-all": lambda stream: stream.read(-1),
    "readexactly": lambda stream: stream.readexactly(100),
    "readuntil": lambda stream: stream.readuntil(b"\r\n"),
    "readline": lambda stream: stream.readline(),
    "iteration": next_line,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
keeping = {name: call for name, call in CALLS.items() if name != "read"}
every_keeping_call = pytest.mark.parametrize("call", keeping.values(), ids=keeping)
"""Every call that may wait with bytes in hand."""


async def parked(stream: Stream, awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start *awaitable*, a reading call, and see it wait for the socket."""
    task = asyncio.ensure_future(awaitable)
    await until(lambda: task.done() or waits(stream))
    assert not task.done()
    return task


def waits(stream: Stream) -> bool:
    """Whether a call has taken all there was and waits for more."""
    return stream._reader is not None and not stream._reader.done() and not unread(stream)


def unread(stream: Stream) -> int:
    """Return how many bytes the kernel has for *stream*."""
    count = array.array("i", [0])
    fcntl.ioctl(stream._sock.fileno(), termios.FIONREAD, count)
    return count[0]


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel *task* and see it end so."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def subscribe(stream: Stream, events: Event) -> Told:
    """Return a list that grows with what is told of *events*."""
    told: Told = []
    stream.on(events, lambda _, event, error: told.append((event, error)))
    return told


async def exactly(told: Told, *events: Event) -> None:
    """Check that *events* are told, then no more; and forget them."""
    await until(lambda: len(told) >= len(events))
    await turns()
    await caught_up()
    assert [event for event, _ in told] == list(events)
    told.clear()


async def outcome(call: Callable[..., Awaitable[bytes]], *args: Any, **more: Any) -> Outcome:
    """Return what a reading call ended with, in a form that compares."""
    try:
        return ("returned", await call(*args, **more))
    except asyncio.IncompleteReadError as error:
        return ("incomplete", error.partial, error.expected)
    except asyncio.LimitOverrunError as error:
        return ("overrun", error.consumed)
    except ValueError:
        return ("value",)


# -- beside asyncio's own reader


class Beside:
    """Has a stream and asyncio's reader do the same, as the same chunks come."""

    def __init__(self, stream: Stream, client: socket.socket, chunks: list[bytes]) -> None:
        self.stream = stream
        self.reader = asyncio.StreamReader()
        self.ended = False
        self._client = client
        self._chunks = deque(chunks)

    async def feed(self) -> None:
        """Let both have the next chunk, or the end."""
        if self._chunks:
            chunk = self._chunks.popleft()
            before = unread(self.stream)
            self._client.sendall(chunk)
            self.reader.feed_data(chunk)
            if self.stream._reader is None:
                await until(lambda: unread(self.stream) == before + len(chunk))
        elif not self.ended:
            self.ended = True
            self._client.shutdown(socket.SHUT_WR)
            self.reader.feed_eof()

    async def both(self, name: str, *args: Any, limit: int = LINE) -> Outcome:
        """Make one call on each, feed them as long as they wait, and compare."""
        vars(self.reader)["_limit"] = limit  # of asyncio's, one for all calls
        limited = {"limit": limit} if name in ("readuntil", "readline") else {}
        ours = asyncio.ensure_future(outcome(method(self.stream, name), *args, **limited))
        theirs = asyncio.ensure_future(outcome(method(self.reader, name), *args))
        while True:
            if self.ended:
                async with asyncio.timeout(5):
                    await asyncio.wait([ours, theirs])
            await until(lambda: ours.done() or waits(self.stream))
            await turns(5)
            assert ours.done() == theirs.done(), f"{name}{args}: {ours} {theirs}"
            if ours.done():
                assert ours.result() == theirs.result(), f"{name}{args} {limit=}"
                return ours.result()
            await self.feed()


def method(source: Source, name: str) -> Callable[..., Awaitable[bytes]]:
    """Return a reading call of *source* by its name."""
    if name == "iteration":
        return lambda: next_line(source)
    call: Callable[..., Awaitable[bytes]] = getattr(source, name)
    return call


SEPARATORS: Final = (b"\n", b"a", b"\r\n", b"aa", b"ab", b"aba", b"aab", b"\n\n\n")


def script_step(chance: random.Random) -> tuple[str, tuple[Any, ...], int]:
    """Draw one reading call: its name, its arguments and its limit."""
    limit = chance.choice([1, 2, 3, 5, 8, 13, 1000])
    name = chance.choices(
        ["read", "readexactly", "readuntil", "readline", "iteration"], [2, 2, 5, 3, 1]
    )[0]
    if name == "read":
        return name, (chance.choice([0, 1, 2, 3, 7, 50]),), LINE
    if name == "readexactly":
        return name, (chance.choice([0, 1, 2, 3, 9, 30]),), LINE
    if name == "readuntil":
        return name, (chance.choice(SEPARATORS),), limit
    return name, (), LINE if name == "iteration" else limit


def chunked(chance: random.Random, data: bytes) -> list[bytes]:
    """Cut *data* into pieces of random lengths."""
    chunks = []
    while data:
        n = chance.choice([1, 1, 2, 3, 5, 8, 40])
        chunks.append(data[:n])
        data = data[n:]
    return chunks


@pytest.mark.parametrize("seed", range(25))
async def test_beside_asyncio(pair: Pair, seed: int) -> None:
    """Over the same chunks, every call ends as that of asyncio's reader does."""
    chance = random.Random(seed)  # noqa: S311 - a fixed sequence
    data = bytes(chance.choices(b"ab\r\n", [4, 3, 1, 2], k=150))
    beside = Beside(*pair, chunked(chance, data))
    seen = set()
    ending = 8
    while ending:
        # Bytes in hand and others in the kernel would be another chunking than asyncio's.
        while not beside.stream._inbox and chance.random() < 0.4:
            await beside.feed()
        if beside.ended:
            ending -= 1
        if chance.random() < 0.02 or ending == 4:
            seen.add((await beside.both("read", -1))[0])
        else:
            name, args, limit = script_step(chance)
            seen.add((await beside.both(name, *args, limit=limit))[0])
    assert await beside.both("read", -1) == ("returned", b"")
    assert "returned" in seen


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("limit", [1, 3, 4, 5, 6])
async def test_limit_beside_asyncio(pair: Pair, separator: bytes, limit: int) -> None:
    """Byte by byte, a limit is overrun where asyncio's reader says, and nothing is lost."""
    beside = Beside(*pair, [bytes([byte]) for byte in b"xxxx" + separator + b"yy"])
    ended = await beside.both("readuntil", separator, limit=limit)
    if limit >= 4:
        assert ended == ("returned", b"xxxx" + separator)
        assert await beside.both("read", -1) == ("returned", b"yy")
    else:
        assert ended == ("overrun", limit + 1)
        assert await beside.both("read", -1) == ("returned", b"xxxx" + separator + b"yy")


@pytest.mark.parametrize("n", [1, 4, 5, 6, 9])
async def test_incomplete_beside_asyncio(pair: Pair, n: int) -> None:
    """At the end of the stream what there was is in the error, and is read."""
    beside = Beside(*pair, [b"ab", b"cde"])
    first = await beside.both("readexactly", n)
    if n > 5:
        assert first == ("incomplete", b"abcde", n)
    await beside.both("readuntil", b"x")
    assert await beside.both("readuntil", b"x") == ("incomplete", b"", None)
    assert await beside.both("readexactly", 1) == ("incomplete", b"", 1)
    assert await beside.both("readexactly", 0) == ("returned", b"")
    assert await beside.both("readline") == ("returned", b"")
    assert await beside.both("iteration") == ("returned", END)


@pytest.mark.parametrize(
    ("data", "left"),
    [(b"abcdef\nrest", b"rest"), (b"abcdef", b""), (b"abc\ndef\n", b"def\n"), (b"\nx", b"x")],
)
async def test_long_line_beside_asyncio(pair: Pair, data: bytes, left: bytes) -> None:
    """A line beyond the limit is dropped as far as it was looked at, with its newline."""
    stream, client = pair
    beside = Beside(stream, client, [data])
    await beside.feed()
    expected = ("returned", b"\n") if data == b"\nx" else ("value",)
    assert await beside.both("readline", limit=2) == expected
    assert await beside.both("read", -1) == ("returned", left)


@pytest.mark.parametrize("name", ["readuntil", "readline"])
async def test_no_limit(pair: Pair, name: str) -> None:
    """None is no limit, a negative one is an error, and anything else at once, too."""
    stream, client = pair
    call = getattr(stream, name)
    with pytest.raises(ValueError, match=r"^limit is a number of bytes or None, got -1$"):
        await call(limit=-1)
    with pytest.raises(TypeError):
        await call(limit="much")
    line = bytes(LINE + 1) + b"\n"
    sending = asyncio.ensure_future(asyncio.to_thread(client.sendall, line))
    assert await call(limit=None) == line
    await sending


async def test_lines(pair: Pair) -> None:
    """``async for`` gives every line with its newline, and the last one without."""
    stream, client = pair
    client.sendall(b"one\n\nthree\r\nlast")
    client.shutdown(socket.SHUT_WR)
    assert [line async for line in stream] == [b"one\n", b"\n", b"three\r\n", b"last"]
    assert [line async for line in stream] == []


async def test_default_limit(pair: Pair) -> None:
    """As many bytes as asyncio's limit may come before a separator, and not one more."""
    stream, client = pair
    line = b"x" * LINE + b"\n"

    def talk() -> None:
        client.sendall(line * 4 + b"x" + line)
        client.shutdown(socket.SHUT_WR)

    talking = asyncio.to_thread(talk)
    task = asyncio.ensure_future(talking)
    assert await stream.readline() == line
    assert await stream.readuntil() == line
    assert await next_line(stream) == line
    assert await stream.readuntil(b"\n", limit=LINE) == line
    with pytest.raises(asyncio.LimitOverrunError) as caught:
        await stream.readuntil()
    assert caught.value.consumed == LINE + 1
    assert await stream.readuntil(limit=LINE + 1) == b"x" + line
    await task
    assert await stream.read() == b""


async def test_bad_arguments(pair: Pair) -> None:
    """A negative amount and an empty separator are refused, and nothing is read."""
    stream, client = pair
    client.sendall(b"abc")
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        await stream.readexactly(-1)
    with pytest.raises(ValueError, match="at least one byte"):
        await stream.readuntil(b"")
    assert await stream.read(10) == b"abc"


@pytest.mark.parametrize("separator", [3, "\n", [10], None, (b"\n", b"\r")], ids=repr)
async def test_separators_of_another_kind(pair: Pair, separator: Any) -> None:
    """A separator that is not bytes is refused, not made into some."""
    stream, client = pair
    client.sendall(b"a\0\0\0\n")
    with pytest.raises((TypeError, ValueError)):
        async with asyncio.timeout(5):
            await stream.readuntil(separator)
    assert await stream.read(10) == b"a\0\0\0\n"


async def test_separator_may_change(pair: Pair) -> None:
    """A bytearray that is changed while the call waits is searched for as it was."""
    stream, client = pair
    separator: Any = bytearray(b"\n")
    task = await parked(stream, stream.readuntil(separator))
    separator[:] = b"xx"
    client.sendall(b"xx\n")
    assert await task == b"xx\n"


async def test_read_of_a_large_inbox(pair: Pair) -> None:
    """A read of what an earlier call received returns no more than any other read."""
    stream, client = pair
    data = random.Random(1).randbytes(3 * AT_ONCE)  # noqa: S311 - not a secret
    task = asyncio.ensure_future(stream.read(-1))
    await asyncio.to_thread(client.sendall, data)
    await until(lambda: len(stream._inbox) == len(data))
    await cancelled(task)
    first = await stream.read(2**30)
    assert len(first) <= AT_ONCE
    assert first + await stream.readexactly(len(data) - len(first)) == data


# -- cancellation


@every_keeping_call
async def test_timeout(pair: Pair, call: Call) -> None:
    """A timeout in the middle of a call loses nothing and repeats nothing."""
    stream, client = pair
    client.sendall(b"abc")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await call(stream)
    assert bytes(stream._inbox) == b"abc"
    task = await parked(stream, call(stream))
    client.sendall(b"def\r")
    await until(lambda: stream._inbox == b"abcdef\r")
    await cancelled(task)
    client.sendall(b"\nrest")
    assert await stream.readuntil(b"\r\n") == b"abcdef\r\n"
    assert await stream.readexactly(4) == b"rest"
    client.shutdown(socket.SHUT_WR)
    assert await stream.read() == b""


@every_keeping_call
async def test_cancelled_when_woken(pair: Pair, call: Call) -> None:
    """A call that is cancelled between its wake-up and its step leaves what woke it."""
    stream, client = pair
    client.sendall(b"abc")
    task = await parked(stream, call(stream))
    client.sendall(b"\r\n")
    await until(lambda: stream._reader is not None and stream._reader.done())
    await cancelled(task)
    async with asyncio.timeout(5):
        assert await stream.readuntil(b"\r\n") == b"abc\r\n"


@every_keeping_call
async def test_cancelled_at_the_end(pair: Pair, call: Call) -> None:
    """A call that is cancelled as it meets the end of the stream leaves what came before."""
    stream, client = pair
    client.sendall(b"abc")
    task = await parked(stream, call(stream))
    client.shutdown(socket.SHUT_WR)
    await until(lambda: stream._eof)
    task.cancel()
    rest = b"abc"
    try:
        assert await task == rest
        rest = b""
    except asyncio.CancelledError:
        pass
    async with asyncio.timeout(5):
        assert await stream.read(10) == rest
        assert await stream.read(10) == b""


@pytest.mark.parametrize("seed", range(8))
async def test_cancelled_at_every_step(pair: Pair, seed: int) -> None:
    """However often calls of any kind are cancelled, the bytes come whole and in order."""
    stream, client = pair
    chance = random.Random(seed)  # noqa: S311 - a fixed sequence
    data = bytes(chance.choices(b"ab\r\n", [9, 9, 1, 3], k=1200))
    got = bytearray()
    sent = stopped = 0
    while len(got) < len(data):
        name, args, limit = script_step(chance)
        if chance.random() < 0.1:
            name, args = "read", (-1,)
        # No limit for a line: what it drops cannot be counted.
        limited = {"limit": limit} if name == "readuntil" else {}
        task = asyncio.ensure_future(outcome(method(stream, name), *args, **limited))
        await turns(chance.randint(0, 3))
        if chance.random() < 0.6 and sent < len(data):
            sent += client.send(data[sent : sent + chance.randint(1, 60)])
            if sent == len(data):
                client.shutdown(socket.SHUT_WR)
        await turns(chance.randint(0, 3))
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            stopped += 1
            continue
        how, what, *_ = task.result()
        if how == "overrun":
            assert limit < what <= len(stream._inbox)
            what = await stream.readexactly(what)
            assert args[0] not in what
        elif how == "incomplete":
            assert len(got) + len(what) == len(data)
        elif name == "readuntil":
            assert what.find(args[0]) == len(what) - len(args[0]) <= limit
        elif name == "readexactly":
            assert len(what) == args[0]
        got += what if what != END else b""
        assert data.startswith(got)
    assert stopped
    assert await stream.read() == b""


@every_keeping_call
async def test_end_under_a_timeout_of_nothing(pair: Pair, call: Call) -> None:
    """The end of the stream, and a reset, are told to calls that have no time to wait."""
    stream, client = pair
    client.sendall(b"abc")
    client.shutdown(socket.SHUT_WR)
    assert await next_ending(lambda: call(stream)) in (
        ("returned", b"abc"),
        ("incomplete", b"abc", None),
        ("incomplete", b"abc", 100),
    )
    stream.write(b"x")
    reset(client)
    for refused in (lambda: call(stream), lambda: stream.send(b"x"), stream.drain):
        with pytest.raises(ConnectionError):
            stream.write(b"y")
        with pytest.raises(ConnectionError):
            await next_ending(refused)


async def next_ending(call: Callable[[], Awaitable[Any]]) -> Outcome:
    """Return what a call ends with that is cancelled a few times when it waits."""
    for _ in range(3):
        try:
            async with asyncio.timeout(0):
                return await outcome(call)
        except TimeoutError:
            await turns(3)
    return ("timed out",)


# -- two readers


@every_call
async def test_two_readers(pair: Pair, call: Call) -> None:
    """While a call waits every other is refused, and the first gets all that comes."""
    stream, client = pair
    client.sendall(b"some")
    assert await stream.readexactly(2) == b"so"
    if call is CALLS["read"]:
        assert await stream.read(10) == b"me"
    first = await parked(stream, call(stream))
    others: list[Call] = [
        *CALLS.values(),
        lambda stream: stream.read(0),
        lambda stream: stream.readexactly(0),
    ]
    for other in others:
        with pytest.raises(RuntimeError, match="another task is reading"):
            await other(stream)
    gc.collect()  # a coroutine that nobody awaited would say so
    client.sendall(b"thing\r\n")
    client.shutdown(socket.SHUT_WR)
    expected: Outcome = ("returned", b"mething\r\n")
    if call is CALLS["read"]:
        expected = ("returned", b"thing\r\n")
    if call is CALLS["readexactly"]:
        expected = ("incomplete", b"mething\r\n", 100)
    assert await outcome(lambda: first) == expected
    assert await stream.read() == b""


@every_call
async def test_reader_behind_one_that_was_refused(pair: Pair, call: Call) -> None:
    """A refused call that is cancelled in its turn does not let a third one in."""
    stream, client = pair
    first = await parked(stream, stream.readexactly(3))
    refused = asyncio.ensure_future(call(stream))
    await asyncio.sleep(0)
    await cancelled(refused)
    with pytest.raises(RuntimeError, match="another task is reading"):
        await call(stream)
    client.sendall(b"abc")
    assert await first == b"abc"


@every_call
async def test_reader_after_every_end(pair: Pair, call: Call) -> None:
    """However a call ended, the next one is not taken for a second reader."""
    stream, client = pair
    client.sendall(b"abcdef")
    with pytest.raises(asyncio.LimitOverrunError):
        await stream.readuntil(limit=2)
    with pytest.raises(ValueError, match="no separator within 2 bytes"):
        await stream.readline(limit=2)
    await cancelled(await parked(stream, call(stream)))
    client.sendall(b"\r\n")
    client.shutdown(socket.SHUT_WR)
    with pytest.raises(asyncio.IncompleteReadError):
        await stream.readexactly(3)
    assert await stream.read() == b""


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


async def runs(operation: Callable[[], Awaitable[bytes]], times: int) -> int:
    """Return how often in a row *operation* was over before the loop could turn."""
    ticker = Ticker()
    longest = run = 0
    for _ in range(times):
        before = ticker.ticks
        await outcome(operation)
        run = run + 1 if ticker.ticks == before else 0
        longest = max(longest, run)
    ticker.stop()
    return longest


@pytest.mark.parametrize("name", ["read", "readexactly", "readuntil", "readline", "iteration"])
async def test_calls_from_the_inbox_let_the_loop_turn(pair: Pair, name: str) -> None:
    """No more than 32 calls in a row end at once with bytes that had been received."""
    stream, client = pair
    client.sendall(b"x\n" * 400)
    assert await stream.readline() == b"x\n"
    stream._streak = 0  # as after a wait
    calls: dict[str, Callable[[], Awaitable[bytes]]] = {
        "read": lambda: stream.read(2),
        "readexactly": lambda: stream.readexactly(2),
        "readuntil": lambda: stream.readuntil(b"x\n"),
        "readline": stream.readline,
        "iteration": lambda: next_line(stream),
    }
    assert await runs(calls[name], 200) == IN_A_ROW
    assert len(stream._inbox) == 398


async def test_calls_of_every_kind_let_the_loop_turn(pair: Pair) -> None:
    """Reads from the inbox, from the kernel and of nothing count together."""
    stream, client = pair
    client.sendall(b"x\n" * 400)
    chance = random.Random(3)  # noqa: S311 - a fixed sequence

    def some() -> Awaitable[bytes]:
        which = chance.random()
        return stream.readline() if which < 0.3 else stream.read(0 if which < 0.6 else 1)

    assert 0 < await runs(some, 300) <= IN_A_ROW


async def test_one_long_call_lets_the_loop_turn(pair: Pair) -> None:
    """A single call that receives without end from a fast peer yields."""
    stream, client = pair
    ticker = Ticker()
    most = 0
    received = 0
    last = -1
    receive = stream._sock.recv

    class Counting:
        """The stream's socket; counts what is received within one turn of the loop."""

        def recv(self, _n: int, _flags: int) -> bytes:
            nonlocal most, received, last
            received = received + 1 if ticker.ticks == last else 1
            last = ticker.ticks
            most = max(most, received)
            return receive(1, socket.MSG_DONTWAIT)

        def fileno(self) -> int:
            return sock.fileno()

    sock = stream._sock
    client.sendall(bytes(200))
    stream._sock = Counting()  # type: ignore[assignment]
    try:
        # Every receive is a short one here, which tells the stream there is no more.
        stream._end = True
        assert await stream.readexactly(200) == bytes(200)
    finally:
        stream._sock = sock
        ticker.stop()
    assert most == IN_A_ROW


async def test_failing_calls_let_the_loop_turn(pair: Pair) -> None:
    """Every call that raises has yielded, each time: a retry loop freezes nobody."""
    stream, client = pair
    client.sendall(b"abcdef\n")
    assert await runs(lambda: stream.readuntil(limit=2), 50) == 0
    assert await runs(lambda: stream.readuntil(b"x", limit=2), 50) == 0
    assert stream._inbox == b"abcdef\n"
    assert await runs(lambda: stream.readline(limit=2), 1) == 0
    assert stream._inbox == b""
    client.sendall(b"abcdef")
    assert await runs(lambda: stream.readline(limit=2), 1) == 0
    assert stream._inbox == b""
    client.shutdown(socket.SHUT_WR)
    assert await runs(lambda: stream.readexactly(1), 50) == 0
    assert await runs(stream.readuntil, 50) == 0
    assert await runs(stream.readline, 50) <= IN_A_ROW
    assert await runs(stream.read, 50) <= IN_A_ROW


@every_keeping_call
async def test_refused_calls_let_the_loop_turn(pair: Pair, call: Call) -> None:
    """Calls that are refused yield: a second reader, a closed stream, a failed one."""
    stream, client = pair

    async def refused() -> bytes:
        with pytest.raises((OSError, RuntimeError)):
            await call(stream)
        return b""

    task = await parked(stream, stream.readline())
    assert await runs(refused, 50) == 0
    reset(client)
    with pytest.raises(ConnectionResetError):
        await task
    assert await runs(refused, 50) == 0
    stream.close()
    assert await runs(refused, 50) == 0


async def test_cancelled_turn(pair: Pair) -> None:
    """A call that is cancelled in its turn before taking from the inbox takes nothing."""
    stream, client = pair
    client.sendall(b"".join(b"%03d\n" % i for i in range(200)))
    assert await stream.readline() == b"000\n"
    number = 1
    while stream._streak < IN_A_ROW:
        assert await stream.readline() == b"%03d\n" % number
        number += 1
    task = asyncio.ensure_future(stream.readline())
    await asyncio.sleep(0)
    await cancelled(task)
    assert await stream.readline() == b"%03d\n" % number


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_closed_in_the_turn(pair: Pair, end: str) -> None:
    """A stream that is closed while a call makes its turn gives no more data."""
    stream, client = pair
    client.sendall(b"x\n" * 100)
    assert await stream.readline() == b"x\n"
    while stream._streak < IN_A_ROW:
        assert await stream.readline() == b"x\n"
    task = asyncio.ensure_future(stream.readline())
    await asyncio.sleep(0)
    assert not task.done()
    getattr(stream, end)()
    with pytest.raises(ConnectionAbortedError):
        await task


# -- events


async def test_read_event_for_what_a_line_left(pair: Pair) -> None:
    """READ is told after each call that leaves something in the inbox."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    client.sendall(b"one\ntwo\nrest")
    await exactly(told, Event.READ)
    assert await stream.readline() == b"one\n"
    assert told == []
    await exactly(told, Event.READ)
    assert await stream.readexactly(2) == b"tw"
    await exactly(told, Event.READ)
    assert await stream.read(1) == b"o"
    await exactly(told, Event.READ)
    assert await stream.readuntil(b"\nrest") == b"\nrest"
    await exactly(told)
    client.sendall(b"x")
    await exactly(told, Event.READ)


async def test_read_event_is_told_once_for_the_inbox(pair: Pair) -> None:
    """While nobody reads, bytes that come behind those in the inbox are not told."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    client.sendall(b"a\nb")
    await exactly(told, Event.READ)
    assert await stream.readline() == b"a\n"
    await exactly(told, Event.READ)
    client.sendall(b"more")
    await exactly(told)
    assert await stream.read(1) == b"b"
    await exactly(told, Event.READ)
    assert await stream.read(10) == b"more"
    await exactly(told)


async def test_no_read_event_while_a_call_waits(pair: Pair) -> None:
    """What comes while a call waits for more is not told as READ."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    task = await parked(stream, stream.readline())
    for data in (b"some", b"thing"):
        client.sendall(data)
        await exactly(told)
    client.sendall(b"\n")
    assert await task == b"something\n"
    await exactly(told)


@every_keeping_call
async def test_read_event_after_a_cancelled_call(pair: Pair, call: Call) -> None:
    """What a cancelled call had received is told as READ: it waits, and nobody reads."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    task = await parked(stream, call(stream))
    client.sendall(b"abc")
    await until(lambda: stream._inbox == b"abc")
    await exactly(told)
    await cancelled(task)
    await exactly(told, Event.READ)
    assert await stream.read(10) == b"abc"
    await exactly(told)


@every_keeping_call
async def test_no_read_event_after_a_call_cancelled_with_nothing(pair: Pair, call: Call) -> None:
    """A call that is cancelled before anything came causes no READ."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    await cancelled(await parked(stream, call(stream)))
    await exactly(told)
    client.sendall(b"x")
    await exactly(told, Event.READ)


async def test_read_event_after_a_limit_overrun(pair: Pair) -> None:
    """What a call left because of its limit is told as READ."""
    stream, client = pair
    told = subscribe(stream, Event.READ)
    client.sendall(b"abcdef")
    await exactly(told, Event.READ)
    with pytest.raises(asyncio.LimitOverrunError):
        await stream.readuntil(limit=2)
    await exactly(told, Event.READ)
    with pytest.raises(ValueError, match="no separator"):
        await stream.readline(limit=2)
    await exactly(told)
    assert stream._inbox == b""


async def test_first_subscriber_and_the_inbox(pair: Pair) -> None:
    """The first to subscribe to READ is told of what is in the inbox."""
    stream, client = pair
    client.sendall(b"a\nb")
    assert await stream.readline() == b"a\n"
    told = subscribe(stream, Event.READ)
    assert told == []
    await exactly(told, Event.READ)
    assert await stream.read(10) == b"b"
    await exactly(told)


async def test_first_subscriber_while_a_call_waits(pair: Pair) -> None:
    """Bytes in the inbox that a call waits with are not told to the first subscriber."""
    stream, client = pair
    client.sendall(b"abc")
    task = await parked(stream, stream.readline())
    assert stream._inbox == b"abc"
    told = subscribe(stream, Event.READ)
    await exactly(told)
    client.sendall(b"\n")
    assert await task == b"abc\n"
    await exactly(told)


async def test_late_subscriber_and_the_inbox(pair: Pair) -> None:
    """Who subscribes to READ later is told of the inbox, and only while something is in it."""
    stream, client = pair
    first = subscribe(stream, Event.READ)
    client.sendall(b"a\nb")
    await exactly(first, Event.READ)
    assert await stream.readline() == b"a\n"
    await exactly(first, Event.READ)
    late = subscribe(stream, Event.READ)
    await exactly(late, Event.READ)
    await exactly(first)
    assert await stream.read(10) == b"b"
    later = subscribe(stream, Event.READ)
    await exactly(later)


@pytest.mark.parametrize("seen", [False, True], ids=["end-unseen", "end-seen"])
async def test_close_event_waits_for_the_inbox(pair: Pair, *, seen: bool) -> None:
    """CLOSE is told only when the inbox is empty, too; whether or not the end was seen."""
    stream, client = pair
    told = subscribe(stream, Event.CLOSE)
    client.sendall(b"one\ntwo\nrest")
    if seen:
        task = await parked(stream, stream.readexactly(100))
        client.shutdown(socket.SHUT_WR)
        await until(lambda: stream._eof)
        await cancelled(task)
        assert await stream.readline() == b"one\n"
    else:
        assert await stream.readline() == b"one\n"
        client.shutdown(socket.SHUT_WR)
    await exactly(told)
    late = subscribe(stream, Event.CLOSE)
    await exactly(late)
    assert await stream.readline() == b"two\n"
    await exactly(told)
    assert await stream.readexactly(4) == b"rest"
    await exactly(told, Event.CLOSE)
    await exactly(late, Event.CLOSE)
    assert await stream.readline() == b""
    await exactly(told)
    last = subscribe(stream, Event.CLOSE)
    await exactly(last, Event.CLOSE)


@every_keeping_call
async def test_close_event_at_the_end_of_a_call(pair: Pair, call: Call) -> None:
    """A call that takes all up to the end of the stream has CLOSE told once, without READ."""
    stream, client = pair
    told = subscribe(stream, Event.READ | Event.CLOSE)
    client.sendall(b"abc")
    await exactly(told, Event.READ)
    task = await parked(stream, call(stream))
    client.shutdown(socket.SHUT_WR)
    assert b"abc" in await outcome(lambda: task)
    await exactly(told, Event.CLOSE)
    assert stream._inbox == b""


async def test_read_event_at_the_end_with_an_inbox(pair: Pair) -> None:
    """After the end was seen, READ is told as long as something is in the inbox."""
    stream, client = pair
    client.sendall(b"a\nb\nc")
    task = await parked(stream, stream.readexactly(100))
    client.shutdown(socket.SHUT_WR)
    await until(lambda: stream._eof)
    await cancelled(task)
    told = subscribe(stream, Event.READ | Event.CLOSE)
    await exactly(told, Event.READ)
    assert await stream.readline() == b"a\n"
    await exactly(told, Event.READ)
    assert await stream.readline() == b"b\n"
    await exactly(told, Event.READ)
    assert await stream.readline() == b"c"
    await exactly(told, Event.CLOSE)


async def test_close_event_before_a_close(pair: Pair) -> None:
    """CLOSE is told of a stream that was read to its end from the inbox and closed at once."""
    stream, client = pair
    client.sendall(b"abc")
    task = await parked(stream, stream.readexactly(100))
    client.shutdown(socket.SHUT_WR)
    await until(lambda: stream._eof)
    await cancelled(task)
    told = subscribe(stream, Event.CLOSE)
    await exactly(told)
    assert await stream.readexactly(3) == b"abc"
    stream.close()
    await exactly(told, Event.CLOSE)


# -- async with


async def test_block_closes_and_waits(pair: Pair) -> None:
    """Left normally, the block has sent everything and closed the descriptor."""
    stream, client = pair
    before = descriptors()
    data = bytes(8 * 1024 * 1024)

    def listen_on() -> int:
        n = 0
        while got := client.recv(1 << 20):
            n += len(got)
        return n

    async with stream as entered:
        assert entered is stream
        client.sendall(b"a\nb")
        assert await stream.readline() == b"a\n"
        stream.write(data)
        assert stream._buffer
        # Closing with b"b" in the inbox, but nothing in the kernel, is no reset.
        hearing = asyncio.ensure_future(asyncio.to_thread(listen_on))
    assert stream.is_closing()
    assert descriptors() == before - 1
    assert await hearing == len(data)


@pytest.mark.parametrize("how", ["error", "cancellation", "while-reading"])
async def test_block_aborts_after_an_exception(pair: Pair, how: str) -> None:
    """Left by an exception, the block resets the peer and lets the exception out."""
    stream, client = pair
    before = descriptors()

    async def handler() -> None:
        async with stream:
            stream.write(b"half an answer")
            if how == "while-reading":
                await stream.readline()
            elif how == "cancellation":
                await asyncio.get_running_loop().create_future()
            else:
                raise LookupError(how)

    task = asyncio.ensure_future(handler())
    if how == "error":
        with pytest.raises(LookupError, match="error"):
            await task
    else:
        await turns()
        await cancelled(task)
    assert stream.is_closing()
    assert descriptors() == before - 1
    seen = await wire_end(client)
    assert (await wire_end(client) if seen == b"half an answer" else seen) == "reset"


async def test_block_of_a_closed_stream(pair: Pair) -> None:
    """A block in which the stream was closed or aborted ends as usual."""
    stream, client = pair
    async with stream:
        stream.close()
    assert await wire_end(client) == "eof"
    async with stream:
        stream.abort()
    assert stream._sock.fileno() < 0


async def test_cancelled_exit_still_closes(pair: Pair) -> None:
    """An exit that is cancelled while it waits has closed: the rest goes out behind it."""
    stream, client = pair
    data = bytes(8 * 1024 * 1024)

    async def handler() -> None:
        async with stream:
            stream.write(data)

    task = asyncio.ensure_future(handler())
    await turns()
    await cancelled(task)
    assert stream.is_closing()

    def listen_on() -> int:
        n = 0
        while got := client.recv(1 << 20):
            n += len(got)
        return n

    assert await asyncio.to_thread(listen_on) == len(data)
    await stream.wait_closed()
    assert stream._sock.fileno() < 0


async def test_block_over_a_reset_that_was_handled(pair: Pair) -> None:
    """A block whose body handled the peer's reset ends as usual if nothing was unsent."""
    stream, client = pair
    async with stream:
        reset(client)
        with pytest.raises(ConnectionResetError):
            await stream.readline()
    assert stream._sock.fileno() < 0


# -- the end of the connection


@every_keeping_call
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_closed_while_a_call_waits(pair: Pair, call: Call, end: str) -> None:
    """A call that waits with bytes in hand ends when this side closes."""
    stream, client = pair
    client.sendall(b"abc")
    task = await parked(stream, call(stream))
    getattr(stream, end)()
    with pytest.raises(ConnectionAbortedError):
        await task
    assert await wire_end(client) == ("eof" if end == "close" else "reset")
    await stream.wait_closed()


@pytest.mark.parametrize("subscribed", [False, True])
@every_keeping_call
async def test_reset_while_a_call_waits(pair: Pair, call: Call, *, subscribed: bool) -> None:
    """A reset by the peer ends a call that waits with bytes in hand."""
    stream, client = pair
    told = subscribe(stream, Event.CLOSE) if subscribed else None
    client.sendall(b"abc")
    task = await parked(stream, call(stream))
    reset(client)
    with pytest.raises(ConnectionResetError):
        await task
    with pytest.raises(ConnectionResetError):
        await call(stream)
    if told is not None:
        await until(lambda: told)
        assert isinstance(told[0][1], ConnectionResetError)
        await exactly(told, Event.CLOSE)


@pytest.mark.parametrize("subscribed", [False, True])
async def test_reset_behind_the_inbox(pair: Pair, *, subscribed: bool) -> None:
    """What came before a reset and is in the inbox is read first; then every call raises."""
    stream, client = pair
    client.sendall(b"one\ntwo\nrest")
    assert await stream.readline() == b"one\n"
    told = subscribe(stream, Event.CLOSE) if subscribed else None
    reset(client)
    if told is not None:
        await until(lambda: told)
        assert isinstance(told[0][1], ConnectionResetError)
    await caught_up()
    assert await stream.readline() == b"two\n"
    assert await stream.readexactly(2) == b"re"
    for call in (stream.readline, stream.readline, stream.read):
        with pytest.raises(ConnectionResetError):
            await call()
    if told is not None:
        await exactly(told, Event.CLOSE)


async def test_calls_on_a_closed_stream(pair: Pair) -> None:
    """On a stream that this side closed no call gives, drops or measures what it had."""
    stream, client = pair
    client.sendall(b"a\nabcdef\n")
    assert await stream.readline() == b"a\n"
    stream.close()
    calls: list[Callable[[], Awaitable[bytes]]] = [
        lambda: stream.read(0),
        lambda: stream.read(1),
        stream.read,
        lambda: stream.readexactly(0),
        lambda: stream.readexactly(1),
        lambda: stream.readexactly(100),
        stream.readuntil,
        lambda: stream.readuntil(limit=2),
        lambda: stream.readuntil(b"x", limit=2),
        stream.readline,
        lambda: next_line(stream),
        lambda: stream.readline(limit=2),
    ]
    wrong = [await closed_by_us(call()) for call in calls]
    assert wrong == [None] * len(calls)


async def closed_by_us(awaitable: Awaitable[bytes]) -> object:
    """Return what a call ended with, but for "closed by this side" ``None``."""
    try:
        return await awaitable
    except ConnectionAbortedError:
        return None
    except Exception as error:  # noqa: BLE001 - it is the result
        return error


async def test_forgotten_iteration(pair: Pair) -> None:
    """A loop over lines that is left early leaves the next lines to be read."""
    stream, client = pair
    client.sendall(b"one\ntwo\nthree\n")
    async for line in stream:
        assert line == b"one\n"
        break
    assert await stream.readline() == b"two\n"
    assert await next_line(stream) == b"three\n"
