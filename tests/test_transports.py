"""Handing a stream over: `Stream.into_transport()` and `Stream.into_streams()`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import select
import socket
import ssl
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest
import uvloop

from condaccept import ACCEPT, AnyVerdict, Event, Listener, PendingTransport, Stream, listen
from condaccept._sockets import HandedSocket
from condaccept._transports import Attachment, Relay
from tests.support import (
    LIMIT,
    Dial,
    caught_up,
    descriptors,
    queued,
    reset,
    turns,
    until,
    wire_end,
)
from tests.test_stream import fill, parked, pattern, receive

if TYPE_CHECKING:
    from pathlib import Path

MB: Final = 1024 * 1024
UNSENT: Final = 8 * MB
"""More than Linux takes at once where nobody reads: 4 MB by default (tcp_wmem), and some more
that the receiver holds."""
KINDS: Final = ("v4", "v6", "unix")
every_kind = pytest.mark.parametrize("kind", KINDS)
Action: TypeAlias = Callable[["Recorder"], object]
Log: TypeAlias = list[str | bytes]
"""What became of a connection, in order; bytes that came in a row are one entry."""


class Line:
    """An accepted connection with a hold, and what its protocols see.

    Attributes:
        log: What the protocols saw, and the release of the hold.
    """

    def __init__(self, listener: Listener[Stream], client: socket.socket) -> None:
        self.listener = listener
        self.client = client
        self.log: Log = []
        self.stream: Stream
        self.fd = -1

    def condition(self, pending: PendingTransport) -> AnyVerdict:
        """Hold something for the connection."""
        pending.hold(self._released)
        return ACCEPT

    def _released(self) -> None:
        try:
            os.fstat(self.fd)
        except OSError:
            self.log.append("release")
        else:
            self.log.append("release of an open descriptor")

    def on(self, made: Action | None = None, data: Action | None = None) -> Recorder:
        """Return a protocol that writes into the log."""
        return Recorder(self.log, made, data)

    async def leave(self, unread: bytes) -> None:
        """Have the stream receive *unread* without reading it."""
        self.client.sendall(b"\n" + unread)
        assert await self.stream.readline() == b"\n"
        assert self.stream._inbox == unread

    async def over(self) -> Log:
        """Wait for the release; return the log."""
        await until(lambda: "release" in self.log)
        await turns()
        return self.log


Accept: TypeAlias = Callable[..., Awaitable[Line]]


class Recorder(asyncio.Protocol):
    """Writes down what it is told."""

    __slots__ = ("_data", "_made", "keep", "log", "transport")

    def __init__(self, log: Log, made: Action | None = None, data: Action | None = None) -> None:
        self.log = log
        self._made = made
        self._data = data
        self.keep: bool | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note it, and do what was asked."""
        self.transport = transport
        self.log.append("made")
        if self._made is not None:
            self._made(self)

    def data_received(self, data: bytes) -> None:
        """Note it, and do what was asked, once."""
        assert type(data) is bytes
        note(self.log, data)
        action, self._data = self._data, None
        if action is not None:
            action(self)

    def eof_received(self) -> bool | None:
        """Note it."""
        self.log.append("eof")
        return self.keep

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self.log.append("lost" if exc is None else f"lost {type(exc).__name__}")


class Buffered(asyncio.BufferedProtocol):
    """Writes down what comes into a buffer of *size* bytes."""

    __slots__ = ("_action", "_buffer", "log", "transport")

    def __init__(self, log: Log, size: int, action: Action | None = None) -> None:
        self.log = log
        self._action = action
        self._buffer = bytearray(size)
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note it."""
        self.transport = transport
        self.log.append("made")

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return the buffer."""
        assert sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Note what came, and do what was asked, once."""
        note(self.log, bytes(self._buffer[:nbytes]))
        action, self._action = self._action, None
        if action is not None:
            action(self)  # type: ignore[arg-type]  # for its transport and its log

    def eof_received(self) -> bool | None:
        """Note it."""
        self.log.append("eof")
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self.log.append("lost" if exc is None else f"lost {type(exc).__name__}")


def note(log: Log, data: bytes) -> None:
    """Add *data* to the log."""
    if log and isinstance(log[-1], bytes):
        log[-1] += data
    else:
        log.append(data)


def tls_order(log: Log) -> bool:
    """Whether the log ends as with TLS: a loop tells the protocol a turn behind the transport."""
    return log[-2] == "release" and str(log[-1]).startswith("lost")


def seen(log: Log) -> bytes:
    """Return all bytes of a log."""
    return b"".join(each for each in log if isinstance(each, bytes))


def boom(_: object) -> None:
    """Raise."""
    raise ZeroDivisionError("boom")


def on_uvloop() -> bool:
    """Return which loop runs."""
    return isinstance(asyncio.get_running_loop(), uvloop.Loop)


def reports() -> list[dict[str, Any]]:
    """Return a list that grows with what is reported to the loop, which then fails no test."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


@pytest.fixture
async def accepted(dial: Dial, tmp_path: Path) -> AsyncIterator[Accept]:
    """Accept connections; at the end each has been released once and nothing is left."""
    # The first transport of a loop of uvloop makes it open a reserve.
    one, other = socket.socketpair()
    with other:
        first, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, one)
        first.close()
    await turns()
    before = descriptors()
    lines: list[Line] = []
    async with contextlib.AsyncExitStack() as stack:

        async def accept(kind: str = "v4") -> Line:
            if kind == "unix":
                opening = listen(path=str(tmp_path / f"{len(lines)}.sock"))
            else:
                opening = listen("127.0.0.1" if kind == "v4" else "::1", 0)
            listener = await stack.enter_async_context(await opening)
            line = Line(listener, dial(listener))
            line.stream = await listener.accept(line.condition)
            line.fd = line.stream._sock.fileno()
            lines.append(line)
            return line

        yield accept
        for line in lines:
            line.client.close()
            if line.stream._attachment is None:
                line.stream.close()
        for line in lines:
            await line.over()
            assert line.log.count("release") == 1
            assert line.log[-1] == "release" or tls_order(line.log)
            assert "lost" not in "".join(map(str, line.log)) or "made" in line.log
            assert line.listener.statistics().streams == 0
            assert line.stream not in line.stream._watch.needed
            assert line.fd not in line.stream._watch._callbacks  # type: ignore[attr-defined]
    await until(lambda: descriptors() == before)


@pytest.fixture
async def line(accepted: Accept) -> Line:
    """An accepted connection on 127.0.0.1."""
    return await accepted()


async def tls_client(client: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Have *client* make the handshake of TLS, in a thread; it is closed by what is returned."""
    return await asyncio.to_thread(context.wrap_socket, client, server_hostname="localhost")


# -- plain


@every_kind
async def test_transport(accepted: Accept, kind: str) -> None:
    """The protocol is told of the connection, the data and the end; then comes the release."""
    line = await accepted(kind)
    transport, protocol = await line.stream.into_transport(line.on)
    assert isinstance(protocol, Recorder)
    assert transport is protocol.transport
    assert transport.get_protocol() is protocol
    assert line.log == ["made"]
    assert line.listener.statistics().streams == 1
    line.client.sendall(b"question")
    await until(lambda: len(line.log) > 1)
    transport.write(b"answer")
    assert await wire_end(line.client) == b"answer"
    line.client.shutdown(socket.SHUT_WR)
    assert await line.over() == ["made", b"question", "eof", "lost", "release"]
    assert line.listener.statistics().streams == 0
    assert await wire_end(line.client) == "eof"


@every_kind
@pytest.mark.parametrize("size", [1, 3, 65536])
async def test_buffered_protocol(accepted: Accept, kind: str, size: int) -> None:
    """A buffered protocol gets unread and new bytes, however small its buffer."""
    line = await accepted(kind)
    await line.leave(b"unread")
    transport, protocol = await line.stream.into_transport(lambda: Buffered(line.log, size))
    assert transport.get_protocol() is protocol
    assert line.log == ["made", b"unread"]
    line.client.sendall(b" and new")
    await until(lambda: seen(line.log) == b"unread and new")
    line.client.close()
    assert await line.over() == ["made", b"unread and new", "eof", "lost", "release"]


@every_kind
async def test_streams(accepted: Accept, kind: str) -> None:
    """The streams of asyncio begin with what was unread, then read and write on."""
    line = await accepted(kind)
    await line.leave(b"one\ntw")
    reader, writer = await line.stream.into_streams()
    assert await reader.readline() == b"one\n"
    line.client.sendall(b"o\n")
    assert await reader.readline() == b"two\n"
    writer.write(b"answer")
    await writer.drain()
    assert await wire_end(line.client) == b"answer"
    line.client.shutdown(socket.SHUT_WR)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert await line.over() == ["release"]
    assert await wire_end(line.client) == "eof"


@every_kind
@pytest.mark.parametrize(
    ("then", "rest"),
    [
        ("nothing", [b"unread"]),
        ("more", [b"unread and more"]),
        ("eof", [b"unread", "eof", "lost", "release"]),
        ("more and eof", [b"unread and more", "eof", "lost", "release"]),
        ("reset", [b"unread", "lost ConnectionResetError", "release"]),
    ],
)
@pytest.mark.parametrize("size", [0, 2])
async def test_unread_bytes_come_first(
    accepted: Accept, kind: str, size: int, then: str, rest: Log
) -> None:
    """Bytes that were unread are delivered once, before what the kernel has by then."""
    line = await accepted(kind)
    await line.leave(b"unread")
    if "more" in then:
        line.client.sendall(b" and more")
    if "eof" in then:
        line.client.shutdown(socket.SHUT_WR)
    if then == "reset":
        if kind == "unix":
            # Its peer is reset if something that was sent to it is unread when it closes.
            line.stream.write(b"x")
        reset(line.client)
    factory = (lambda: Buffered(line.log, size)) if size else line.on
    await line.stream.into_transport(factory)
    await until(lambda: line.log == ["made", *rest])
    await turns()
    assert line.log == ["made", *rest]


async def test_own_protocol_from_the_first_moment(line: Line) -> None:
    """A protocol with unread bytes finds itself as the transport's, from the first moment."""
    found: list[object] = []
    await line.leave(b"unread")
    _, protocol = await line.stream.into_transport(
        lambda: line.on(
            made=lambda self: found.append(self.transport.get_protocol()),
            data=lambda self: found.append(self.transport.get_protocol()),
        )
    )
    assert found == [protocol, protocol]


async def test_unread_bytes_come_before_the_end_on_any_loop() -> None:
    """A loop that told of the end first would find the bytes delivered before it, once."""

    class Hasty(asyncio.Transport):
        """A transport without a connection."""

        protocol: asyncio.BaseProtocol

        def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
            self.protocol = protocol

        def get_protocol(self) -> asyncio.BaseProtocol:
            return self.protocol

        def is_closing(self) -> bool:
            return False

    log: Log = []
    with HandedSocket() as sock:
        relay = Relay(Attachment(sock), Recorder(log), b"unread")
        relay.connection_made(Hasty())
        relay.connection_lost(None)
        await turns()
    assert log == ["made", b"unread", "lost"]


# -- what a protocol may do meanwhile


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("soon", [False, True])
async def test_set_protocol_when_made(line: Line, *, buffered: bool, soon: bool) -> None:
    """Another protocol put in place in connection_made(), or soon after, gets unread bytes."""
    other_log: Log = []
    other = Buffered(other_log, 2) if buffered else Recorder(other_log)

    def made(first: Recorder) -> None:
        if soon:
            asyncio.get_running_loop().call_soon(first.transport.set_protocol, other)
        else:
            first.transport.set_protocol(other)

    await line.leave(b"unread")
    transport, first = await line.stream.into_transport(lambda: line.on(made))
    assert isinstance(first, Recorder)
    assert transport.get_protocol() is other
    assert (line.log, other_log) == (["made"], [b"unread"])
    line.client.sendall(b" new")
    line.client.shutdown(socket.SHUT_WR)
    await line.over()
    assert other_log == [b"unread new", "eof", "lost"]


@pytest.mark.parametrize("size", [0, 2])
async def test_set_protocol_on_unread_bytes(line: Line, size: int) -> None:
    """A protocol that leaves in the midst of unread bytes leaves the rest to the next."""
    other_log: Log = []
    other = Recorder(other_log)

    def leave(first: Recorder) -> None:
        first.transport.set_protocol(other)

    await line.leave(b"unread")
    factory = (lambda: Buffered(line.log, size, leave)) if size else lambda: line.on(data=leave)
    transport, _ = await line.stream.into_transport(factory)
    assert transport.get_protocol() is other
    line.client.sendall(b" new")
    line.client.shutdown(socket.SHUT_WR)
    await line.over()
    n = size or len(b"unread")
    assert line.log == ["made", b"unread"[:n], "release"]
    assert other_log == [b"unread"[n:] + b" new", "eof", "lost"]


@pytest.mark.parametrize("when", ["made", "data"])
async def test_pause_reading(line: Line, when: str) -> None:
    """Reading paused on unread bytes stays so; in connection_made(), as the loop has it."""
    await line.leave(b"unread")
    line.client.sendall(b" new")
    pause: Action = lambda self: self.transport.pause_reading()  # noqa: E731 - for its type
    transport, _ = await line.stream.into_transport(lambda: line.on(**{when: pause}))
    await caught_up()
    await turns()
    if on_uvloop():
        # It ignores a pause in connection_made(), and may read before unread bytes are fed.
        assert seen(line.log) in (b"unread", b"unread new")
    else:
        assert line.log == ["made", b"unread"]
    if when == "data":
        line.client.sendall(b" newer")
        await caught_up()
        await turns()
        assert b"newer" not in seen(line.log)
        transport.resume_reading()
        await until(lambda: seen(line.log) == b"unread new newer")
    transport.close()


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("unread", [b"", b"unread"])
@pytest.mark.parametrize("when", ["made", "data"])
async def test_end_by_the_protocol(line: Line, when: str, unread: bytes, how: str) -> None:
    """A protocol that closes or aborts gets no byte after that, and its end is an end."""
    end: Action = lambda self: getattr(self.transport, how)()  # noqa: E731 - for its type
    await line.leave(unread)
    if not unread:
        line.client.sendall(b"new")
    transport, _ = await line.stream.into_transport(lambda: line.on(**{when: end}))
    log = await line.over()
    got = [] if when == "made" else [unread or b"new"]
    assert log == ["made", *got, "lost", "release"]
    assert transport.is_closing()


async def test_end_in_the_midst_of_unread_bytes(line: Line) -> None:
    """A buffered protocol that closes is not given the rest of the unread bytes."""
    end: Action = lambda self: self.transport.close()  # noqa: E731 - for its type
    await line.leave(b"unread")
    line.client.sendall(b" new")
    await line.stream.into_transport(lambda: Buffered(line.log, 4, end))
    assert await line.over() == ["made", b"unre", "lost", "release"]


@pytest.mark.parametrize("unread", [b"", b"unread"])
async def test_raise_when_made(line: Line, unread: bytes) -> None:
    """What connection_made() raises is raised by the hand-over, and the connection is closed."""
    await line.leave(unread)
    with pytest.raises(ZeroDivisionError):
        await line.stream.into_transport(lambda: line.on(boom))
    assert await line.over() == ["made", "lost", "release"]
    assert await wire_end(line.client) in ("eof", "reset")


@pytest.mark.parametrize("size", [0, 4])
async def test_raise_on_unread_bytes(line: Line, size: int) -> None:
    """What a protocol raises on unread bytes is reported, and the connection is closed."""
    told = reports()
    await line.leave(b"unread")
    factory = (lambda: Buffered(line.log, size, boom)) if size else lambda: line.on(data=boom)
    transport, protocol = await line.stream.into_transport(factory)
    assert transport.is_closing()
    assert await line.over() == ["made", b"unread"[: size or None], "lost", "release"]
    [context] = told
    assert isinstance(context["exception"], ZeroDivisionError)
    assert (context["protocol"], context["transport"]) == (protocol, transport)
    assert "read before it" in context["message"]


@pytest.mark.parametrize("more", [b"", b" new"])
async def test_raise_on_unread_bytes_before_the_end(line: Line, more: bytes) -> None:
    """A protocol that raised on unread bytes is told of no end of the stream, of the loss only."""
    told = reports()
    await line.leave(b"unread")
    line.client.sendall(more)
    line.client.shutdown(socket.SHUT_WR)
    await line.stream.into_transport(lambda: line.on(data=boom))
    assert await line.over() == ["made", b"unread", "lost", "release"]
    assert len(told) == 1


async def test_empty_buffer(line: Line) -> None:
    """A buffered protocol without room is told as the loop tells it, and does not spin."""
    told = reports()
    await line.leave(b"unread")
    await line.stream.into_transport(lambda: Buffered(line.log, 0))
    assert await line.over() == ["made", "lost", "release"]
    assert "empty buffer" in str(told[0]["exception"])


@pytest.mark.parametrize("unread", [b"", b"unread"])
async def test_raise_on_the_end(line: Line, unread: bytes) -> None:
    """What eof_received() raises ends the connection."""

    class Raising(Recorder):
        __slots__ = ()

        def eof_received(self) -> bool | None:
            self.log.append("eof")
            raise ZeroDivisionError

    told = reports()
    await line.leave(unread)
    line.client.shutdown(socket.SHUT_WR)
    await line.stream.into_transport(lambda: Raising(line.log))
    log = await line.over()
    assert log[: len(log) - 2] == ["made", *([unread] if unread else []), "eof"]
    assert len(told) == 1


@pytest.mark.parametrize("unread", [b"", b"unread"])
async def test_half_closed_by_the_peer(line: Line, unread: bytes) -> None:
    """A protocol that keeps a half-closed connection goes on writing to it."""
    await line.leave(unread)
    line.client.shutdown(socket.SHUT_WR)

    def keep(self: Recorder) -> None:
        self.keep = True

    transport, _ = await line.stream.into_transport(lambda: line.on(keep))
    await until(lambda: "eof" in line.log)
    await caught_up()
    assert not transport.is_closing()
    transport.write(b"still here")
    assert await wire_end(line.client) == b"still here"
    transport.close()
    assert await line.over() == ["made", *([unread] if unread else []), "eof", "lost", "release"]


async def test_backpressure_while_unread_bytes_wait(line: Line) -> None:
    """A protocol that writes more than the kernel takes is paused and resumed as ever."""

    class Writing(Recorder):
        __slots__ = ()

        def pause_writing(self) -> None:
            self.log.append("pause")

        def resume_writing(self) -> None:
            self.log.append("resume")

    data = pattern(UNSENT)
    await line.leave(b"unread")
    transport, _ = await line.stream.into_transport(
        lambda: Writing(line.log, made=lambda self: self.transport.write(data))
    )
    await until(lambda: "pause" in line.log)
    assert await asyncio.to_thread(receive, line.client, len(data)) == data
    await until(lambda: "resume" in line.log)
    assert [each for each in line.log if isinstance(each, bytes)] == [b"unread"]
    transport.close()


async def test_limit_of_streams(line: Line) -> None:
    """A reader that begins above twice its limit takes no more until it is read from."""
    await line.leave(b"u" * 1000)
    reader, writer = await line.stream.into_streams(limit=100)
    more = pattern(UNSENT)
    sending = asyncio.to_thread(line.client.sendall, more)
    task = asyncio.ensure_future(sending)
    await until(lambda: not select.select([], [line.client], [], 0)[1])
    await caught_up()
    held = len(vars(reader)["_buffer"])
    # uvloop may have been reading when the unread bytes came, asyncio never is.
    assert held == 1000 or (on_uvloop() and held < MB)
    assert await reader.readexactly(1000 + len(more)) == b"u" * 1000 + more
    await task
    writer.close()
    await writer.wait_closed()


# -- what was written before


@every_kind
@pytest.mark.slow
async def test_unsent_bytes_go_first(accepted: Accept, kind: str) -> None:
    """What was written is sent, whole and first; only then is a protocol made."""
    line = await accepted(kind)
    data = pattern(UNSENT + 3)
    made: list[int] = []

    def factory() -> Recorder:
        made.append(len(line.stream._buffer))
        return line.on()

    line.stream.write(data)
    task = await parked(line.stream.into_transport(factory))
    assert not made
    line.stream.write(b"late")  # the stream is still ours
    got = asyncio.ensure_future(asyncio.to_thread(receive, line.client, len(data) + 8))
    transport, _ = await task
    assert made == [0]
    transport.write(b"next")
    assert await got == data + b"latenext"
    transport.close()


async def test_waiting_calls_end(line: Line) -> None:
    """Calls that wait for what is unsent, or for the end, return when that is done."""
    size = fill(line.stream) + MB
    line.stream.write(b"x" * MB)
    draining = await parked(line.stream.drain())
    closing = await parked(line.stream.wait_closed())
    task = await parked(line.stream.into_transport(line.on))
    assert len(await asyncio.to_thread(receive, line.client, size)) == size
    async with asyncio.timeout(LIMIT):
        transport, _ = await task
        await draining
        await closing
    transport.close()


async def test_factory_that_writes(line: Line) -> None:
    """What a factory writes to the stream is sent before anything of its protocol's."""
    data = pattern(UNSENT)

    def factory() -> Recorder:
        line.stream.write(data)
        return line.on(made=lambda self: self.transport.write(b"next"))

    task = await parked(line.stream.into_transport(factory))
    assert line.log == []
    assert await asyncio.to_thread(receive, line.client, len(data)) == data
    transport, _ = await task
    assert await wire_end(line.client) == b"next"
    transport.close()


@pytest.mark.parametrize("what", ["transport", "streams"])
async def test_cancelled_while_sending(line: Line, what: str) -> None:
    """A hand-over cancelled while earlier data is sent leaves the stream as it was."""
    told: list[Event] = []
    line.stream.on(Event.READ, lambda _, event, __: told.append(event))
    size = fill(line.stream)
    call = (
        line.stream.into_transport(line.on) if what == "transport" else line.stream.into_streams()
    )
    task = await parked(call)
    line.client.sendall(b"question")
    await turns()
    assert not told  # the hand-over counts as reading
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: told)
    assert line.log == []
    assert await line.stream.read(100) == b"question"
    assert len(await asyncio.to_thread(receive, line.client, size)) == size
    await line.stream.send(b"answer")
    assert await wire_end(line.client) == b"answer"
    transport, _ = await line.stream.into_transport(line.on)
    transport.close()


@pytest.mark.parametrize("how", ["close", "abort", "reset", "write_eof"])
async def test_ended_while_sending(line: Line, how: str) -> None:
    """A stream that ends while earlier data is sent is not handed over."""
    size = fill(line.stream)
    task = await parked(line.stream.into_transport(line.on))
    if how == "reset":
        reset(line.client)
    else:
        getattr(line.stream, how)()
    if how in ("close", "write_eof"):
        assert len(await asyncio.to_thread(receive, line.client, size)) == size
    expected = {"reset": ConnectionResetError, "write_eof": RuntimeError}
    with pytest.raises(expected.get(how, ConnectionAbortedError)):
        await task
    assert "made" not in line.log


# -- what cannot be handed over


@pytest.mark.parametrize("what", ["transport", "streams"])
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closed_stream(line: Line, what: str, how: str) -> None:
    """A closed stream is not handed over."""
    getattr(line.stream, how)()
    with pytest.raises(ConnectionAbortedError, match="closed by this side"):
        await hand_over(line, what)
    assert line.log == ["release"]


@pytest.mark.parametrize("what", ["transport", "streams"])
async def test_broken_stream(line: Line, what: str) -> None:
    """A stream whose connection failed is not handed over, and says why."""
    reset(line.client)
    with pytest.raises(ConnectionResetError):
        await line.stream.read(10)
    with pytest.raises(ConnectionResetError):
        await hand_over(line, what)
    assert line.log == []


async def test_reset_told_by_an_event(line: Line) -> None:
    """A reset that the watch has told of, and so taken from the kernel, is raised."""
    told: list[Event] = []
    line.stream.on(Event.CLOSE, lambda _, event, __: told.append(event))
    reset(line.client)
    await until(lambda: told)
    with pytest.raises(ConnectionResetError):
        await line.stream.into_transport(line.on)
    assert line.log == []


@pytest.mark.parametrize("what", ["transport", "streams"])
async def test_half_closed_stream(line: Line, what: str) -> None:
    """After write_eof() a stream is not handed over, and can be read on."""
    line.stream.write_eof()
    with pytest.raises(RuntimeError, match="half-closed"):
        await hand_over(line, what)
    line.client.sendall(b"question")
    assert await line.stream.read(100) == b"question"


async def test_stream_at_its_end(line: Line) -> None:
    """A protocol is told of an end of the stream that the stream had read already."""
    line.client.shutdown(socket.SHUT_WR)
    assert await line.stream.read(10) == b""
    await line.stream.into_transport(line.on)
    assert await line.over() == ["made", "eof", "lost", "release"]


@pytest.mark.parametrize("what", ["transport", "streams", "read", "peek"])
async def test_another_task_at_work(line: Line, what: str) -> None:
    """While a task reads there is no hand-over, and during a hand-over nobody reads."""
    reading = await parked(line.stream.read(100))
    with pytest.raises(RuntimeError, match="another task"):
        await hand_over(line, "transport")
    line.client.sendall(b"question")
    assert await reading == b"question"
    size = fill(line.stream)
    task = await parked(line.stream.into_transport(line.on))
    call: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: line.stream.read(1),
        "peek": lambda: line.stream.peek(1),
        "transport": lambda: line.stream.into_transport(line.on),
        "streams": line.stream.into_streams,
    }
    with pytest.raises(RuntimeError, match="another task"):
        await call[what]()
    assert len(await asyncio.to_thread(receive, line.client, size)) == size
    transport, _ = await task
    transport.close()
    assert (await line.over())[0] == "made"


async def test_factory_raises(line: Line) -> None:
    """What a factory raises is raised, and the stream is as it was."""

    def factory() -> Recorder:
        raise ZeroDivisionError

    await line.leave(b"unread")
    with pytest.raises(ZeroDivisionError):
        await line.stream.into_transport(factory)
    assert line.log == []
    line.client.sendall(b" new")
    assert await line.stream.readexactly(10) == b"unread new"
    await line.stream.send(b"answer")
    assert await wire_end(line.client) == b"answer"


@pytest.mark.parametrize("unread", [b"", b"unread"])
async def test_factory_of_no_protocol(line: Line, unread: bytes) -> None:
    """A factory that returns no protocol is an error, and the stream is as it was."""
    await line.leave(unread)
    with pytest.raises(TypeError, match=r"^protocol_factory returned None, which is no protocol$"):
        await line.stream.into_transport(lambda: None)  # type: ignore[type-var]
    assert not line.stream.is_closing()
    transport, _ = await line.stream.into_transport(line.on)
    transport.abort()
    assert (await line.over())[0] == "made"


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_factory_closes(line: Line, how: str) -> None:
    """A factory that closes the stream has its way."""

    def factory() -> Recorder:
        getattr(line.stream, how)()
        return line.on()

    with pytest.raises(ConnectionAbortedError):
        await line.stream.into_transport(factory)
    assert line.log == ["release"]


async def test_refused_hand_overs_yield(line: Line) -> None:
    """No loop over hand-overs that fail can freeze the event loop."""
    line.stream.write_eof()
    ran: list[int] = []
    asyncio.get_running_loop().call_soon(ran.append, 1)
    with pytest.raises(RuntimeError):
        await line.stream.into_transport(line.on)
    assert ran


BAD: Final[dict[str, tuple[dict[str, Any], type[Exception], str]]] = {
    "flag": ({"ssl": True}, TypeError, "SSLContext or None, got True"),
    "module": ({"ssl": ssl}, TypeError, "SSLContext or None"),
    "client": ({"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}, ValueError, "for clients"),
    "handshake": ({"ssl_handshake_timeout": 1}, ValueError, "give ssl too"),
    "shutdown": ({"ssl_shutdown_timeout": 1}, ValueError, "give ssl too"),
    "zero": ({"ssl_handshake_timeout": 0}, ValueError, "more than 0"),
    "negative": ({"ssl_shutdown_timeout": -1}, ValueError, "more than 0"),
    "nan": ({"ssl_shutdown_timeout": float("nan")}, ValueError, "more than 0"),
    "text": ({"ssl_handshake_timeout": "1"}, TypeError, "number of seconds"),
    "truth": ({"ssl_handshake_timeout": True}, TypeError, "number of seconds"),
    "limit": ({"limit": 0}, ValueError, "at least 1, got 0"),
    "limit-type": ({"limit": 1.5}, ValueError, "number of bytes"),
    "limit-truth": ({"limit": True}, ValueError, "number of bytes"),
}


@pytest.mark.parametrize("bad", BAD)
async def test_bad_arguments(line: Line, server_tls: ssl.SSLContext, bad: str) -> None:
    """An argument that is not what it should be is refused, and the stream is as it was."""
    arguments, error, match = BAD[bad]
    if error is TypeError or "more" in match:
        arguments = {"ssl": server_tls, **arguments}
    with pytest.raises(error, match=match):
        await hand_over(line, "streams" if "limit" in arguments else "transport", **arguments)
    assert line.log == []
    line.client.sendall(b"question")
    assert await line.stream.read(100) == b"question"


async def hand_over(line: Line, what: str, **arguments: Any) -> Any:
    """Hand over in one of the two ways."""
    if what == "transport":
        return await line.stream.into_transport(line.on, **arguments)
    return await line.stream.into_streams(**arguments)


# -- cancelled


@pytest.mark.parametrize("unread", [b"", b"unread"])
@pytest.mark.parametrize("steps", range(1, 5))
@pytest.mark.parametrize("what", ["transport", "streams"])
async def test_cancelled_while_attached(line: Line, what: str, steps: int, unread: bytes) -> None:
    """A hand-over that is cancelled closes the connection, whenever that is."""
    await line.leave(unread)
    task = asyncio.ensure_future(hand_over(line, what))
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.done():
        (await task)[what == "streams"].close()
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    log = await line.over()
    got = [unread] if unread and unread in log else []
    assert what == "streams" or log in (["made", *got, "lost", "release"], ["release"])
    assert await wire_end(line.client) in ("eof", "reset")


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
@pytest.mark.parametrize("steps", range(1, 6))
async def test_cancelled_in_the_handshake(
    line: Line, server_tls: ssl.SSLContext, steps: int, sent: bytes
) -> None:
    """A hand-over that is cancelled during the TLS handshake closes the connection."""
    line.client.sendall(sent)
    task = asyncio.ensure_future(line.stream.into_transport(line.on, server_tls))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await line.over() == ["release"]
    assert await wire_end(line.client) in ("eof", "reset")


async def test_everything_cancelled(line: Line, server_tls: ssl.SSLContext) -> None:
    """Nothing is reported when all tasks are cancelled at once, as asyncio.run() does."""
    task = asyncio.ensure_future(line.stream.into_transport(line.on, server_tls))
    await turns()
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await line.over() == ["release"]


# -- TLS


@every_kind
async def test_tls(
    accepted: Accept, server_tls: ssl.SSLContext, trusting: ssl.SSLContext, kind: str
) -> None:
    """TLS from the start: the protocol is made when it is agreed, and speaks over it."""
    line = await accepted(kind)
    client = asyncio.ensure_future(tls_client(line.client, trusting))
    transport, protocol = await line.stream.into_transport(line.on, server_tls)
    assert isinstance(protocol, Recorder)
    assert transport is protocol.transport
    assert transport.get_extra_info("sslcontext") is server_tls
    with await client as talking:
        talking.sendall(b"question")
        await until(lambda: len(line.log) == 2)
        transport.write(b"answer")
        assert await asyncio.to_thread(talking.recv, 100) == b"answer"
        assert line.listener.statistics().streams == 1
    log = await line.over()
    assert log[:2] == ["made", b"question"]
    assert tls_order(log)


@pytest.mark.parametrize("kind", ["v4", "unix"])
async def test_peek_before_tls(
    accepted: Accept, server_tls: ssl.SSLContext, trusting: ssl.SSLContext, kind: str
) -> None:
    """A ClientHello that comes in pieces is looked at whole, and TLS begins with it."""
    line = await accepted(kind)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    looking = await parked(line.stream.peek(5))
    line.client.sendall(hello[:3])
    await turns()
    line.client.sendall(hello[3:100])
    header = await looking
    assert header == hello[:5]
    n = 5 + int.from_bytes(header[3:])
    looking = await parked(line.stream.peek(n))
    line.client.sendall(hello[100:])
    assert await looking == hello
    assert b"localhost" in hello
    assert n == len(hello)

    def handshake() -> None:
        while True:
            try:
                client.do_handshake()
            except ssl.SSLWantReadError:
                incoming.write(line.client.recv(65536))
            else:
                line.client.sendall(outgoing.read())
                return

    shaking = asyncio.ensure_future(asyncio.to_thread(handshake))
    reader, writer = await line.stream.into_streams(server_tls)
    await shaking
    client.write(b"question\n")
    line.client.sendall(outgoing.read())
    assert await reader.readline() == b"question\n"
    assert line.log == []
    writer.transport.abort()


async def test_tls_garbage(line: Line, server_tls: ssl.SSLContext) -> None:
    """A caller that does not speak TLS fails the hand-over, and is let go."""
    line.client.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(ssl.SSLError):
        await line.stream.into_transport(line.on, server_tls)
    assert await line.over() == ["release"]


@pytest.mark.parametrize("what", ["transport", "streams"])
async def test_tls_handshake_timeout(line: Line, server_tls: ssl.SSLContext, what: str) -> None:
    """A caller that is silent in the handshake is let go after the time given for it."""
    with pytest.raises((ConnectionError, TimeoutError)):
        await hand_over(line, what, ssl=server_tls, ssl_handshake_timeout=0.01)
    assert await line.over() == ["release"]
    assert await wire_end(line.client) in ("eof", "reset")


@pytest.mark.parametrize("how", ["eof", "reset", "reset before"])
async def test_tls_caller_leaves(line: Line, server_tls: ssl.SSLContext, how: str) -> None:
    """A caller that leaves in the handshake fails the hand-over."""
    if how == "reset before":
        reset(line.client)
    task = asyncio.ensure_future(line.stream.into_transport(line.on, server_tls))
    if how != "reset before":
        await turns()
        assert not task.done()
    if how == "reset":
        reset(line.client)
    elif how == "eof":
        line.client.shutdown(socket.SHUT_WR)
    with pytest.raises((ConnectionError, ssl.SSLError)):
        await task
    assert await line.over() == ["release"]


@pytest.mark.parametrize("what", ["transport", "streams"])
async def test_tls_after_bytes_were_read(line: Line, server_tls: ssl.SSLContext, what: str) -> None:
    """With unread bytes in the stream TLS is refused, and the stream goes on."""
    await line.leave(b"unread")
    with pytest.raises(RuntimeError, match="6 bytes were received before TLS: peek"):
        await hand_over(line, what, ssl=server_tls)
    assert line.log == []
    line.client.sendall(b" new")
    assert await line.stream.readexactly(10) == b"unread new"


async def test_tls_raise_when_made(
    line: Line, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    """Over TLS, too, what connection_made() raises is raised and the connection closed."""
    client = asyncio.ensure_future(tls_client(line.client, trusting))
    with pytest.raises(ZeroDivisionError):
        await line.stream.into_transport(lambda: line.on(boom), server_tls)
    assert await line.over() == ["made", "release", "lost"]
    with contextlib.suppress(OSError):
        (await client).close()


async def test_start_tls_of_streams(
    line: Line, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    """`StreamWriter.start_tls()` takes the server's part."""
    line.client.sendall(b"STARTTLS\n")
    assert await line.stream.readline() == b"STARTTLS\n"
    reader, writer = await line.stream.into_streams()
    client = asyncio.ensure_future(tls_client(line.client, trusting))
    await writer.start_tls(server_tls)
    with await client as talking:
        talking.sendall(b"question\n")
        assert await reader.readline() == b"question\n"
        writer.write(b"answer")
        await writer.drain()
        assert await asyncio.to_thread(talking.recv, 100) == b"answer"
        assert line.log == []
        writer.transport.abort()


async def test_start_tls_with_another_protocol(
    line: Line, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    """`loop.start_tls()` takes the transport, also for another protocol."""
    transport, _ = await line.stream.into_transport(line.on)
    other_log: Log = []
    other = Recorder(other_log)
    transport.pause_reading()
    client = asyncio.ensure_future(tls_client(line.client, trusting))
    loop = asyncio.get_running_loop()
    secure = await loop.start_tls(transport, other, server_tls, server_side=True)
    assert secure is not None
    with await client as talking:
        talking.sendall(b"question")
        await until(lambda: other_log == [b"question"])
        secure.write(b"answer")
        assert await asyncio.to_thread(talking.recv, 100) == b"answer"
        assert line.log == ["made"]
        secure.abort()
    await line.over()
    assert other_log[-1] == "lost"


@pytest.mark.parametrize("tls", [False, True])
async def test_sendfile(
    line: Line,
    server_tls: ssl.SSLContext,
    trusting: ssl.SSLContext,
    tmp_path: Path,
    *,
    tls: bool,
) -> None:
    """`loop.sendfile()` works where the loop has it."""
    data = pattern(MB // 2)
    path = tmp_path / "file"
    path.write_bytes(data)
    loop = asyncio.get_running_loop()
    client: socket.socket = line.client
    if tls:
        task = asyncio.ensure_future(tls_client(line.client, trusting))
        transport, _ = await line.stream.into_transport(line.on, server_tls)
        client = await task
    else:
        transport, _ = await line.stream.into_transport(line.on)
    with client, path.open("rb") as file:
        if on_uvloop():
            with pytest.raises(NotImplementedError):
                await loop.sendfile(transport, file)
        else:
            got = asyncio.ensure_future(asyncio.to_thread(receive, client, len(data)))
            assert await loop.sendfile(transport, file) == len(data)
            assert await got == data
        transport.abort()
    await line.over()


# -- ends


@every_kind
async def test_abort(accepted: Accept, kind: str) -> None:
    """The transport's abort() ends the connection at once."""
    line = await accepted(kind)
    transport, _ = await line.stream.into_transport(line.on)
    transport.write(b"x" * UNSENT)
    transport.abort()
    assert await line.over() == ["made", "lost", "release"]


async def test_close_sends_the_rest(line: Line) -> None:
    """The transport's close() sends what was written; the release waits for that."""
    transport, _ = await line.stream.into_transport(line.on)
    data = pattern(UNSENT)
    transport.write(data)
    transport.close()
    await turns()
    assert line.log == ["made"]
    assert await asyncio.to_thread(receive, line.client, len(data) + 1) == data
    assert await line.over() == ["made", "lost", "release"]


@pytest.mark.parametrize("before", [False, True])
async def test_reset_by_the_peer(line: Line, *, before: bool) -> None:
    """A reset by the peer, before the hand-over or after, ends in one release."""
    if before:
        reset(line.client)
    await line.stream.into_transport(line.on)
    if not before:
        reset(line.client)
    assert await line.over() == ["made", "lost ConnectionResetError", "release"]


@pytest.mark.parametrize("how", ["abort", "close", "peer"])
async def test_descriptor_is_free_at_the_release(accepted: Accept, how: str) -> None:
    """What is held for a connection is given back when its descriptor is."""
    line = await accepted()
    number: list[int] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        def given_back() -> None:
            twin = os.dup(0)  # the lowest that is free
            number.append(twin)
            os.close(twin)

        pending.hold(given_back)
        return ACCEPT

    with socket.create_connection(line.listener.sockname[:2]) as client:
        await queued(line.listener, 1)
        stream = await line.listener.accept(condition)
        fd = stream._sock.fileno()
        transport, _ = await stream.into_transport(asyncio.Protocol)
        if how == "peer":
            client.close()
        else:
            getattr(transport, how)()
        await until(lambda: number)
        assert number[0] <= fd


# -- what the transport knows


@every_kind
async def test_extra_info(accepted: Accept, kind: str) -> None:
    """The transport knows both addresses and its socket."""
    line = await accepted(kind)
    caller, callee, fd = line.stream.caller_id, line.stream.callee_id, line.fd
    transport, _ = await line.stream.into_transport(line.on)
    assert (transport.get_extra_info("peername") or "") == (caller or "")
    assert transport.get_extra_info("sockname") == callee
    found = transport.get_extra_info("socket")
    assert found.fileno() == fd
    if kind != "unix":
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert found.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    assert not os.get_blocking(fd)
    transport.close()


async def test_name_of_a_peer_that_has_left(line: Line) -> None:
    """The caller's address is known after a reset too; on uvloop that has none to give."""
    caller = line.stream.caller_id
    reset(line.client)
    names: list[object] = []
    await line.stream.into_transport(
        lambda: line.on(lambda self: names.append(self.transport.get_extra_info("peername")))
    )
    assert names == [None if on_uvloop() else caller]
    await line.over()


async def test_duplicate_releases_nothing(line: Line) -> None:
    """What becomes of a duplicate of the socket is no end of the connection."""
    transport, _ = await line.stream.into_transport(line.on)
    attachment = line.stream._attachment
    assert attachment is not None
    twin = attachment.sock.dup()
    assert type(twin) is socket.socket
    assert twin.gettimeout() == 0
    twin.sendall(b"from the twin")
    twin.close()
    if not on_uvloop():
        transport.get_extra_info("socket").dup().close()
    await turns()
    assert line.log == ["made"]
    assert await wire_end(line.client) == b"from the twin"
    assert attachment.sock.getpeername() == line.client.getsockname()
    transport.close()


# -- the stream afterwards


async def test_stream_afterwards(line: Line) -> None:
    """After the hand-over no call on the stream touches the transport."""
    stream = line.stream
    await line.leave(b"unread")
    told: list[Event] = []
    subscription = stream.on(Event.READ | Event.WRITE | Event.CLOSE, lambda *_: told.append(_[1]))
    transport, _ = await stream.into_transport(line.on)
    await turns()
    told.clear()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: stream.read(10),
        stream.read,
        lambda: stream.readexactly(3),
        stream.readline,
        lambda: stream.peek(3),
        lambda: stream.send(b"x"),
        stream.drain,
        lambda: stream.into_transport(line.on),
        stream.into_streams,
    ]
    for call in calls:
        with pytest.raises(ConnectionAbortedError, match="handed over"):
            await call()
    with pytest.raises(ConnectionAbortedError, match="handed over"):
        stream.write(b"x")
    with pytest.raises(ConnectionAbortedError, match="handed over"):
        stream.write_eof()
    async with asyncio.timeout(LIMIT):
        await stream.wait_closed()
    with pytest.raises(ConnectionAbortedError, match="handed over"):
        _ = stream.callee_id
    assert stream.get_extra_info("peername") == stream.caller_id == line.client.getsockname()
    assert stream.get_extra_info("sockname") is None
    assert stream.get_extra_info("socket").fileno() == -1
    assert repr(stream) == f"<Stream handed over caller={stream.caller_id!r}>"
    assert stream.is_closing()
    stream.on(Event.READ | Event.WRITE | Event.CLOSE, lambda *_: told.append(_[1]))
    stream.close()
    stream.abort()
    async with stream:
        pass
    line.client.sendall(b" new")
    await until(lambda: seen(line.log) == b"unread new")
    transport.write(b"answer")
    assert await wire_end(line.client) == b"answer"
    line.client.close()
    await line.over()
    assert not told
    subscription.cancel()


@pytest.mark.slow
async def test_stream_dropped(accepted: Accept) -> None:
    """A transport lives without the stream it came from, and the listener still reaches it."""
    line = await accepted()
    released: list[int] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: released.append(1))
        return ACCEPT

    with socket.create_connection(line.listener.sockname[:2]) as client:
        await queued(line.listener, 1)
        stream = await line.listener.accept(condition)
        gone = weakref.ref(stream)
        log: Log = []
        transport, _ = await stream.into_transport(lambda: Recorder(log))
        del stream
        gc.collect()
        assert not released
        client.sendall(b"question")
        await until(lambda: log == ["made", b"question"])
        assert line.listener.statistics().streams == 2
        line.listener.abort()
        await until(lambda: released)
        assert log == ["made", b"question", "lost"]
        del transport
        gc.collect()
        await until(lambda: gone() is None)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_transport_dropped(accepted: Accept, *, elsewhere: bool) -> None:
    """A transport that is collected as garbage is released in the loop's thread."""
    line = await accepted()
    released: list[tuple[int, bool]] = []
    collecting = threading.Event()

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(lambda: released.append((threading.get_ident(), collecting.is_set())))
        return ACCEPT

    def collect() -> None:
        collecting.set()
        gc.collect()
        collecting.clear()

    with socket.create_connection(line.listener.sockname[:2], timeout=LIMIT) as client:
        await queued(line.listener, 1)
        stream = await line.listener.accept(condition)
        transport, _ = await stream.into_transport(asyncio.Protocol)
        # While a transport reads, the loop has it.
        transport.pause_reading()
        await turns()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del transport, _, stream
            if elsewhere:
                await asyncio.to_thread(collect)
            else:
                collect()
        await until(lambda: released)
        [(thread, amidst)] = released
        assert thread == threading.get_ident()
        # asyncio's transport may be the first to be collected; it closes its socket then.
        assert elsewhere or not amidst or not on_uvloop()
        assert await wire_end(client) == "eof"


# -- the listener


async def test_listener_closed(line: Line) -> None:
    """Closing the listener leaves transports alone."""
    transport, _ = await line.stream.into_transport(line.on)
    line.listener.close()
    await line.listener.wait_closed()
    line.client.sendall(b"question")
    await until(lambda: len(line.log) > 1)
    transport.close()
    assert await line.over() == ["made", b"question", "lost", "release"]


@pytest.mark.parametrize("tls", [False, True])
async def test_listener_aborted(
    line: Line, server_tls: ssl.SSLContext, trusting: ssl.SSLContext, *, tls: bool
) -> None:
    """Aborting the listener aborts transports, those with TLS too."""
    if tls:
        client = asyncio.ensure_future(tls_client(line.client, trusting))
        await line.stream.into_transport(line.on, server_tls)
        line.client = await client
    else:
        await line.stream.into_transport(line.on)
    line.listener.abort()
    log = await line.over()
    assert log == (["made", "release", "lost"] if tls else ["made", "lost", "release"])


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("steps", range(1, 5))
async def test_listener_aborted_meanwhile(
    line: Line, server_tls: ssl.SSLContext, steps: int, *, tls: bool
) -> None:
    """Aborting the listener ends a hand-over that is under way, in the TLS handshake too."""
    task = asyncio.ensure_future(line.stream.into_transport(line.on, server_tls if tls else None))
    for _ in range(steps):
        await asyncio.sleep(0)
    line.listener.abort()
    if tls:
        with pytest.raises(ConnectionAbortedError, match="aborted"):
            await task
        assert await line.over() == ["release"]
    else:
        try:
            await task
        except ConnectionAbortedError:
            assert await line.over() == ["release"]
        else:
            assert await line.over() == ["made", "lost", "release"]
    assert await wire_end(line.client) in ("eof", "reset")


async def test_without_descriptors(line: Line) -> None:
    """A stream is handed over when no descriptor is free."""
    await line.leave(b"unread")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            socket.socket()
        transport, _ = await line.stream.into_transport(line.on)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert line.log == ["made", b"unread"]
    transport.close()


# -- the socket by itself


def test_handed_socket_is_a_socket() -> None:
    """A loop that looks at the class finds a socket, and files made of it keep it open."""
    ours, theirs = socket.socketpair()
    released: list[int] = []
    with theirs:
        handed = HandedSocket(ours.family, ours.type, ours.proto, ours.detach())
        handed.release = lambda: released.append(1)
        file = handed.makefile("rb")
        handed.close()
        assert not released
        file.close()
        assert released == [1]
        handed.close()
        assert released == [1]
        assert handed.detach() == -1
        assert released == [1]


async def test_another_loop(line: Line) -> None:
    """A loop that the stream does not belong to cannot have it, and nothing has changed."""

    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            asyncio.run(line.stream.into_streams())

    await asyncio.to_thread(elsewhere)
    line.stream.write(b"still here")
    assert line.client.recv(100) == b"still here"
    line.stream.abort()
