"""`Stream.into_transport()` and `into_streams()`: an accepted connection for the loop."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import uvloop

from condaccept import ACCEPT, AnyVerdict, Event, Listener, PendingTransport, Stream
from tests.support import Dial, caught_up, descriptors, reset, until, wire, wire_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

MB = 1024 * 1024


class Talk(asyncio.Protocol):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.told: list[Any] = []
        self.data = bytearray()
        self.answer = True
        """What eof_received() returns."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self.transport = transport
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        """Note the bytes."""
        self.told.append(data)
        self.data += data

    def eof_received(self) -> bool:
        """Note the end, and perhaps stay half open."""
        self.told.append("eof")
        return self.answer

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end and its error."""
        self.told.append(("lost", exc))

    @property
    def lost(self) -> bool:
        """Whether connection_lost() was called."""
        return isinstance(self.told[-1], tuple)


class Slots(asyncio.Protocol):
    """A protocol to which nothing can be added."""

    __slots__ = ("told",)

    def __init__(self) -> None:
        self.told: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: ARG002 - the form
        """Note it."""
        self.told.append("made")

    def data_received(self, data: bytes) -> None:
        """Note the bytes."""
        self.told.append(data)


class Three(asyncio.BufferedProtocol):
    """Has room for three bytes."""

    def __init__(self) -> None:
        self.room = bytearray(3)
        self.told: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: ARG002 - the form
        """Note it."""
        self.told.append("made")

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 - the form
        """Give the room."""
        return self.room

    def buffer_updated(self, nbytes: int) -> None:
        """Note what it was filled with."""
        self.told.append(bytes(self.room[:nbytes]))


class Caller:
    """An accepted connection with a hold, and its client."""

    def __init__(self, listener: Listener[Stream], dial: Dial) -> None:
        self.listener = listener
        self.released: list[bool] = []
        """For each release, whether the descriptor was still open."""
        self.before = descriptors()
        self.client = dial(listener)
        self.stream: Stream
        self.fd = -1

    def condition(self, pending: PendingTransport) -> AnyVerdict:
        """Hold something for the connection."""
        pending.hold(self.release)
        return ACCEPT

    def release(self) -> None:
        """Note whether the descriptor is gone."""
        try:
            os.fstat(self.fd)
        except OSError:
            self.released.append(False)
        else:
            self.released.append(True)

    async def accept(self) -> None:
        """Accept it."""
        self.stream = await self.listener.accept(self.condition)
        self.fd = self.stream.get_extra_info("socket").fileno()

    async def line(self, rest: bytes) -> None:
        """Leave *rest* in the stream's inbox."""
        self.client.sendall(b"line\n" + rest)
        assert await self.stream.readline() == b"line\n"

    def kept(self) -> None:
        """Check that the connection is open and counted."""
        assert not self.released
        assert self.listener.statistics().streams == 1

    async def over(self) -> None:
        """Check that it ended, once, and that nothing is left of it."""
        await until(lambda: self.released)
        await caught_up()
        assert self.released == [False]
        assert self.listener.statistics().streams == 0
        self.client.close()
        gc.collect()
        assert self.released == [False]
        assert descriptors() == self.before


@pytest.fixture
async def caller(listener: Listener[Stream], dial: Dial) -> AsyncIterator[Caller]:
    """A connection to hand over; at the end, all that belongs to it has to be gone."""
    # The first stream that waits may open what the listener then keeps.
    with dial(listener):
        first = await listener.accept()
        first.on(Event.CLOSE, lambda *_: None)
        first.abort()
    one = Caller(listener, dial)
    await one.accept()
    yield one
    if not one.released:
        one.stream.abort()
    await one.over()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Make a certificate authority."""
    return trustme.CA()


@pytest.fixture(scope="module")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Make the server's side of TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Make the client's side of TLS."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def in_thread(function: Callable[[], Any]) -> Any:
    """Let a blocking client work in a thread, which is gone afterwards."""
    result: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    await until(lambda: not thread.is_alive())
    thread.join()
    if failed:
        raise failed[0]
    return result[0]


def is_uvloop() -> bool:
    """Whether this test runs on uvloop."""
    return isinstance(asyncio.get_running_loop(), uvloop.Loop)


@pytest.fixture
async def reported() -> list[dict[str, Any]]:
    """Take what is reported to the loop, instead of failing the test."""
    found: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: found.append(context))
    return found


# -- what the protocol sees


async def test_nothing_received(caller: Caller) -> None:
    """Without bytes from before, nothing of condaccept's is between transport and protocol."""
    transport, protocol = await caller.stream.into_transport(Talk)

    assert transport.get_protocol() is protocol
    assert protocol.told == ["made"]
    assert protocol.transport is transport
    caller.client.sendall(b"ping")
    await until(lambda: protocol.data == b"ping")
    transport.write(b"pong")
    assert caller.client.recv(10) == b"pong"
    caller.kept()
    transport.close()
    await caller.over()
    assert protocol.told == ["made", b"ping", ("lost", None)]


@pytest.mark.parametrize("kind", [Talk, Slots])
async def test_received_before(caller: Caller, kind: type[Talk | Slots]) -> None:
    """Bytes in the inbox come right after connection_made(), before anything newer."""
    await caller.line(b"abcdefgh")
    caller.client.sendall(b"newer")
    transport, protocol = await caller.stream.into_transport(kind)

    assert protocol.told[:2] == ["made", b"abcdefgh"]
    await until(lambda: len(protocol.told) == 3)
    assert protocol.told[2] == b"newer"
    assert transport.get_protocol() is protocol
    transport.abort()


async def test_received_before_in_a_small_buffer(caller: Caller) -> None:
    """A buffered protocol gets the bytes from before in as many pieces as it has room for."""
    await caller.line(b"abcdefgh")
    caller.client.sendall(b"ijk")
    transport, protocol = await caller.stream.into_transport(Three)

    await until(lambda: b"ijk" in protocol.told)
    assert protocol.told == ["made", b"abc", b"def", b"gh", b"ijk"]
    transport.abort()


async def test_buffered_protocol(caller: Caller) -> None:
    """A buffered protocol is one for the transport too."""
    transport, protocol = await caller.stream.into_transport(Three)
    assert transport.get_protocol() is protocol
    caller.client.sendall(b"ab")
    await until(lambda: b"ab" in protocol.told)
    transport.close()


@pytest.mark.parametrize("how", ["abort", "close"])
async def test_closed_in_connection_made(caller: Caller, how: str) -> None:
    """A protocol that ends the transport in connection_made() is told of no bytes."""

    class Refusing(Talk):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            getattr(transport, how)()

    await caller.line(b"rest")
    _, protocol = await caller.stream.into_transport(Refusing)
    await caller.over()
    assert protocol.told == ["made", ("lost", None)]


async def test_paused_by_the_bytes_before(caller: Caller) -> None:
    """Bytes from before that are too many for the reader's limit pause the transport."""
    await caller.line(b"x" * 100)
    reader, writer = await caller.stream.into_streams(limit=4)
    transport: Any = writer.transport
    assert not transport.is_reading()
    caller.client.sendall(b"more")
    await caught_up()
    assert len(reader._buffer) == 100  # type: ignore[attr-defined]
    assert await reader.readexactly(104) == b"x" * 100 + b"more"
    writer.close()
    await writer.wait_closed()


async def test_data_received_raises(caller: Caller, reported: list[dict[str, Any]]) -> None:
    """A protocol that fails over the bytes from before is ended like over any others."""

    class Failing(Talk):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            raise ZeroDivisionError

    await caller.line(b"rest")
    _, protocol = await caller.stream.into_transport(Failing)
    await caller.over()
    assert protocol.data == b"rest"
    assert isinstance(protocol.told[-1][1], ZeroDivisionError)
    assert [type(each["exception"]) for each in reported] == [ZeroDivisionError]


async def test_streams(caller: Caller) -> None:
    """A pair of asyncio's streams goes on where the stream was."""
    await caller.line(b"two\nthr")
    reader, writer = await caller.stream.into_streams()
    caller.client.sendall(b"ee\n")
    assert await reader.readline() == b"two\n"
    assert await reader.readline() == b"three\n"
    writer.write(b"pong")
    await writer.drain()
    assert caller.client.recv(10) == b"pong"
    caller.client.shutdown(socket.SHUT_WR)
    assert await reader.read() == b""
    caller.kept()
    writer.close()
    await writer.wait_closed()
    assert await wire_end(caller.client) == "eof"


async def test_limit_of_the_reader(caller: Caller) -> None:
    """The limit is the reader's."""
    reader, writer = await caller.stream.into_streams(limit=4)
    caller.client.sendall(b"longer\n")
    with pytest.raises(ValueError, match="limit"):
        await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_what_was_written_goes_first(caller: Caller) -> None:
    """All that was written reaches a slow reader before what the transport writes."""
    written = bytes(range(256)) * (8 * MB // 256)
    caller.stream.write(written)
    call = asyncio.ensure_future(caller.stream.into_transport(Talk))
    await caught_up()
    assert not call.done()

    def read() -> bytes:
        return b"".join(iter(lambda: caller.client.recv(65536), b""))

    reading = asyncio.ensure_future(in_thread(read))
    transport, _ = await call
    transport.write(b"last")
    transport.close()
    assert await reading == written + b"last"


async def test_cancelled_while_unsent_bytes_go_out(caller: Caller) -> None:
    """Cancelled while unsent bytes go out, nothing has changed."""
    caller.stream.write(bytes(8 * MB))
    call = asyncio.ensure_future(caller.stream.into_transport(Talk))
    await caught_up()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    caller.kept()
    caller.client.sendall(b"still")
    assert await caller.stream.read(10) == b"still"
    caller.stream.close()
    got = await in_thread(lambda: sum(map(len, iter(lambda: caller.client.recv(65536), b""))))
    assert got == 8 * MB


async def test_closed_while_unsent_bytes_go_out(caller: Caller) -> None:
    """Aborted while unsent bytes go out, the hand-over says so."""
    caller.stream.write(bytes(8 * MB))
    call = asyncio.ensure_future(caller.stream.into_transport(Talk))
    await caught_up()
    caller.stream.abort()
    with pytest.raises(ConnectionAbortedError, match="closed by this side"):
        await call


async def test_reset_while_unsent_bytes_go_out(caller: Caller) -> None:
    """Reset while unsent bytes go out, the hand-over raises that."""
    caller.stream.write(bytes(8 * MB))
    call = asyncio.ensure_future(caller.stream.into_transport(Talk))
    await caught_up()
    reset(caller.client)
    with pytest.raises(ConnectionResetError):
        await call
    caller.stream.close()


# -- the transport


async def test_extra_info_and_options(caller: Caller) -> None:
    """Names, socket, TCP_NODELAY and O_NONBLOCK are those of a transport of the loop."""
    transport, _ = await caller.stream.into_transport(Talk)
    sock = transport.get_extra_info("socket")
    assert transport.get_extra_info("peername") == caller.client.getsockname()
    assert transport.get_extra_info("sockname") == caller.client.getpeername()
    assert sock.fileno() == caller.fd
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert fcntl.fcntl(caller.fd, fcntl.F_GETFL) & os.O_NONBLOCK
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)
    transport.close()
    assert await wire_end(caller.client) == "eof"


async def test_abort(caller: Caller) -> None:
    """An aborted transport lets go of everything."""
    transport, protocol = await caller.stream.into_transport(Talk)
    transport.abort()
    await caller.over()
    assert protocol.told == ["made", ("lost", None)]


@pytest.mark.parametrize("rest", [b"", b"rest"])
async def test_reset_by_the_peer(caller: Caller, rest: bytes) -> None:
    """A reset after the hand-over ends the transport, and the holds with it."""
    await caller.line(rest)
    _, protocol = await caller.stream.into_transport(Talk)
    reset(caller.client)
    await caller.over()
    assert protocol.data == rest
    assert isinstance(protocol.told[-1][1], ConnectionResetError)


@pytest.mark.parametrize("rest", [b"", b"rest"])
async def test_reset_before(caller: Caller, rest: bytes) -> None:
    """A reset that nobody has seen before the hand-over ends the transport."""
    await caller.line(rest)
    reset(caller.client)
    _, protocol = await caller.stream.into_transport(Talk)
    await caller.over()
    assert protocol.data == rest
    assert protocol.lost


async def test_half_close(caller: Caller) -> None:
    """The peer's end of the stream leaves the other direction open."""
    transport, protocol = await caller.stream.into_transport(Talk)
    caller.client.shutdown(socket.SHUT_WR)
    await until(lambda: "eof" in protocol.told)
    caller.kept()
    transport.write(b"late")
    transport.write_eof()
    assert caller.client.recv(10) == b"late"
    assert caller.client.recv(10) == b""
    transport.close()


async def test_end_that_was_read_before(caller: Caller) -> None:
    """The end of the stream, read before the hand-over, is told to the protocol too."""
    caller.client.shutdown(socket.SHUT_WR)
    assert await caller.stream.read(10) == b""
    transport, protocol = await caller.stream.into_transport(Talk)
    await until(lambda: "eof" in protocol.told)
    transport.close()


async def test_set_protocol(caller: Caller) -> None:
    """After set_protocol() the holds are released as before."""
    transport, first = await caller.stream.into_transport(Talk)
    second = Talk()
    transport.set_protocol(second)
    caller.client.sendall(b"ping")
    await until(lambda: second.data == b"ping")
    caller.client.close()
    second.answer = False
    await until(lambda: "eof" in second.told)
    await caller.over()
    assert first.told == ["made"]


async def test_sendfile(caller: Caller, tmp_path: Path) -> None:
    """Files can be sent where the loop can."""
    content = bytes(range(256)) * 1024
    path = tmp_path / "file"
    path.write_bytes(content)
    transport, _ = await caller.stream.into_transport(Talk)
    loop = asyncio.get_running_loop()
    with path.open("rb") as file:  # noqa: ASYNC230 - a small local file
        if is_uvloop():
            with pytest.raises(NotImplementedError):
                await loop.sendfile(transport, file)
            transport.abort()
            return
        reading = asyncio.ensure_future(
            in_thread(lambda: b"".join(iter(lambda: caller.client.recv(65536), b"")))
        )
        assert await loop.sendfile(transport, file) == len(content)
    transport.close()
    assert await reading == content
