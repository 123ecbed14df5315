"""REJECT with callee data: the caller reads it, whatever it was doing, and it is bounded."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AnyVerdict,
    CalleeDataError,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Listener,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from tests.support import Dial, descriptors, reset, until, wire, wire_end

if TYPE_CHECKING:
    from pathlib import Path

    from condaccept import Condition

CAPACITY = 4096
AT_ONCE = 64
ESTABLISHED, CLOSED, CLOSE_WAIT = 1, 7, 8
MEGABYTES = bytes(2 * 1024 * 1024)


def by_verdict(data: bytes) -> Condition:
    """Return a condition that rejects with *data* in its verdict."""
    return lambda _pending: Reject(data=data)


def by_pending(data: bytes) -> Condition:
    """Return a condition that rejects with *data* as the connection's callee data."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data = data
        return REJECT

    return condition


both_ways = pytest.mark.parametrize("say", [by_verdict, by_pending])


def text(size: int) -> bytes:
    """Return *size* bytes, each place of which can be told from its neighbours."""
    return (b"%05d;" * (size // 6 + 1) % tuple(range(size // 6 + 1)))[:size]


async def refuse(listener: Listener[Stream], condition: Condition) -> None:
    """Reject one caller."""
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(condition)


async def heard(client: socket.socket) -> tuple[bytes, str]:
    """Read from *client* to the end: the bytes, and which end it was."""
    data = b""
    while isinstance(seen := await wire_end(client), bytes):
        data += seen
    return data, seen


def state(client: socket.socket) -> int:
    """Return the state of a TCP connection: CLOSE_WAIT after a FIN, CLOSED after a reset."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


# -- it is delivered


@both_ways
@pytest.mark.parametrize("sent", [b"", b"x" * 100], ids=["silent", "sent"])
@pytest.mark.parametrize("size", [1, CAPACITY])
async def test_delivered(
    listener: Listener[Stream], dial: Dial, say: Any, size: int, sent: bytes
) -> None:
    """The caller reads the callee data and then the end, also if it had sent something."""
    before = descriptors()
    client = dial(listener, data=sent)
    await refuse(listener, say(text(size)))

    assert listener.statistics().rejected == 1
    assert listener.statistics().rejecting == 1
    assert await heard(client) == (text(size), "eof")
    assert state(client) == CLOSE_WAIT
    client.close()
    await until(lambda: listener.statistics().rejecting == 0)
    assert listener.statistics().cut_short == 0
    assert descriptors() == before


@both_ways
async def test_delivered_to_a_slow_reader(listener: Listener[Stream], dial: Dial, say: Any) -> None:
    """A caller that reads little by little, and goes on sending, reads all of it."""
    client = dial(listener, data=b"x" * 100)
    await refuse(listener, say(text(CAPACITY)))

    got = b""
    while len(got) < CAPACITY:
        client.sendall(b"y" * 100)
        await asyncio.sleep(0)
        got += client.recv(150)
    client.sendall(b"z")
    assert got == text(CAPACITY)
    assert await heard(client) == (b"", "eof")
    assert listener.statistics().rejecting == 1
    client.close()
    await until(lambda: listener.statistics().rejecting == 0)


@both_ways
async def test_delivered_to_who_is_still_sending(dial: Dial, say: Any) -> None:
    """A caller in the middle of sending 2 MB sends them all, and reads all of the data."""
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)]
    async with await listen("127.0.0.1", 0, options=small) as listener:
        client = dial(listener)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sending = asyncio.ensure_future(asyncio.to_thread(client.sendall, MEGABYTES))
        await refuse(listener, say(text(CAPACITY)))

        await sending
        assert await heard(client) == (text(CAPACITY), "eof")
        client.close()
        await until(lambda: listener.statistics().rejecting == 0)
        assert listener.statistics().cut_short == 0


@both_ways
@pytest.mark.parametrize("sent", [b"", b"x" * 100, MEGABYTES], ids=["silent", "sent", "sending"])
async def test_delivered_to_asyncio(listener: Listener[Stream], say: Any, sent: bytes) -> None:
    """A client of asyncio's streams, which drop everything at a reset, reads all of it."""
    reader, writer = await asyncio.open_connection(*listener.sockname)
    writer.write(sent)
    await refuse(listener, say(text(CAPACITY)))

    assert await reader.read() == text(CAPACITY)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await until(lambda: listener.statistics().rejecting == 0)
    assert listener.statistics().cut_short == 0


async def test_delivered_to_who_has_shut_its_side(listener: Listener[Stream], dial: Dial) -> None:
    """A caller that had half-closed reads the data, and nothing has to be waited for."""
    client = dial(listener, data=b"x" * 100)
    client.shutdown(socket.SHUT_WR)
    await refuse(listener, by_verdict(text(CAPACITY)))

    assert listener.statistics().rejecting == 0
    assert await heard(client) == (text(CAPACITY), "eof")
    assert listener.statistics().cut_short == 0


@pytest.mark.parametrize("shut", [False, True], ids=["open", "shut"])
@pytest.mark.parametrize("sent", [b"", b"x" * 100], ids=["silent", "sent"])
async def test_delivered_through_a_tiny_buffer(sent: bytes, shut: bool) -> None:  # noqa: FBT001 - a parameter
    """Where the kernel takes a part only, the rest follows as the caller reads."""
    tiny = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)]
    async with await listen("127.0.0.1", 0, options=tiny) as listener:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(listener.sockname)
            client.sendall(sent)
            if shut:
                client.shutdown(socket.SHUT_WR)
            await refuse(listener, by_verdict(text(CAPACITY)))

            first = client.recv(CAPACITY, socket.MSG_PEEK)
            assert len(first) < CAPACITY
            assert listener.statistics().rejecting == 1
            assert await heard(client) == (text(CAPACITY), "eof")
        await until(lambda: listener.statistics().rejecting == 0)
        assert listener.statistics().cut_short == 0


async def test_the_verdict_s_data_instead_of_the_connection_s(
    listener: Listener[Stream], dial: Dial
) -> None:
    """`Reject(data=...)` replaces what is in callee_data, also by nothing: a reset."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.write(b"not this")
        return Reject(data=pending.callback_data)

    clients = [dial(listener), dial(listener)]
    for data in (b"this", b""):
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(condition, data)
    assert await heard(clients[0]) == (b"this", "eof")
    assert wire(clients[1]) == "reset"


async def test_the_reason_is_not_told(listener: Listener[Stream], dial: Dial) -> None:
    """The caller never sees the reason; our side does."""
    client = dial(listener)
    with pytest.raises(ConnectionRejectedError) as caught:
        await listener.accept(lambda _pending: Reject("too many of you", b"busy"))
    assert caught.value.reason == "too many of you"
    assert await heard(client) == (b"busy", "eof")


async def test_written_in_parts(listener: Listener[Stream], dial: Dial) -> None:
    """callee_data is a buffer: what is appended to it goes out as a whole."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data = b"HTTP/1.1 "
        pending.callee_data.write(memoryview(b"503 "))
        pending.callee_data.write(bytearray(b"\r\n\r\n"))
        assert len(pending.callee_data) == 17
        return REJECT

    client = dial(listener)
    await refuse(listener, condition)
    assert await heard(client) == (b"HTTP/1.1 503 \r\n\r\n", "eof")


async def test_unix(dial: Dial, tmp_path: Path) -> None:
    """On a Unix socket too: all of it and then the end, whatever the caller had sent."""
    async with await listen(path=tmp_path / "socket") as listener:
        for sent in (b"", b"x" * 100):
            for say in (by_verdict, by_pending):
                client = dial(listener, data=sent)
                await refuse(listener, say(text(CAPACITY)))
                assert listener.statistics().rejecting == 1
                assert await heard(client) == (text(CAPACITY), "eof")
                client.close()
                await until(lambda: listener.statistics().rejecting == 0)
        assert listener.statistics().cut_short == 0


async def test_unix_client_of_asyncio(tmp_path: Path) -> None:
    """A client of asyncio's streams on a Unix socket reads all of it while it sends."""
    path = tmp_path / "socket"
    async with await listen(path=path) as listener:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(MEGABYTES)
        await refuse(listener, by_verdict(text(CAPACITY)))
        assert await reader.read() == text(CAPACITY)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await until(lambda: listener.statistics().rejecting == 0)


# -- its capacity


async def test_verdict_over_capacity(listener: Listener[Stream], dial: Dial) -> None:
    """A `Reject` with too much data decides nothing: the connection keeps its place."""
    client, other = dial(listener), dial(listener)
    with pytest.raises(CalleeDataError) as caught:
        await listener.accept(by_verdict(text(CAPACITY + 1)))

    assert caught.value.caller_id == client.getsockname()
    assert [pending.caller_id for pending in listener.pending] == [client.getsockname()]
    assert listener.pending[0].status is Status.QUEUED
    assert wire(client) == "open"
    assert listener.statistics().rejected == 0

    await refuse(listener, by_verdict(text(CAPACITY)))
    assert await heard(client) == (text(CAPACITY), "eof")
    (await listener.accept()).close()
    assert await heard(other) == (b"", "eof")


async def test_buffer_over_capacity(listener: Listener[Stream], dial: Dial) -> None:
    """What does not fit into callee_data is refused, and the buffer is as it was."""
    dial(listener)

    def condition(pending: PendingTransport) -> AnyVerdict:
        buffer = pending.callee_data
        assert buffer.capacity == CAPACITY
        buffer.write(b"a" * CAPACITY)
        with pytest.raises(CalleeDataError):
            buffer.write(b"b")
        with pytest.raises(CalleeDataError):
            buffer.set(bytes(CAPACITY + 1))
        with pytest.raises(CalleeDataError):
            pending.callee_data = bytes(CAPACITY + 1)
        assert bytes(buffer) == b"a" * CAPACITY
        return ACCEPT

    (await listener.accept(condition)).close()


# -- bounded in time


async def test_timeout(dial: Dial) -> None:
    """A caller that does not close within reject_timeout is reset, and counted."""
    async with await listen("127.0.0.1", 0, reject_timeout=0.01) as listener:
        before = descriptors()
        clients = [dial(listener, data=b"x" * n) for n in (0, 1, 100)]
        for _ in clients:
            await refuse(listener, by_verdict(b"busy"))
        assert listener.statistics().rejecting == 3
        assert [state(client) for client in clients] == [CLOSE_WAIT] * 3

        await until(lambda: listener.statistics().rejecting == 0)
        assert listener.statistics().cut_short == 3
        assert [state(client) for client in clients] == [CLOSED] * 3
        assert listener.statistics().rejected == 3
        for client in clients:
            client.close()
        assert descriptors() == before


async def test_timeout_one_after_the_other(dial: Dial) -> None:
    """Each caller has its own time; the timer goes on as long as there is one."""
    async with await listen("127.0.0.1", 0, reject_timeout=0.01) as listener:
        for n in range(1, 4):
            client = dial(listener)
            await refuse(listener, by_verdict(b"busy"))
            closing = dial(listener)
            await refuse(listener, by_verdict(b"busy"))
            closing.close()
            await until(lambda: listener.statistics().rejecting == 0)
            assert listener.statistics().cut_short == n
            assert state(client) == CLOSED


@pytest.mark.parametrize("sent", [b"", b"x" * 100], ids=["silent", "sent"])
async def test_no_time(dial: Dial, sent: bytes) -> None:
    """With reject_timeout=0 the data and the end go out, and the socket is closed at once."""
    async with await listen("127.0.0.1", 0, reject_timeout=0) as listener:
        before = descriptors()
        client = dial(listener, data=sent)
        await refuse(listener, by_verdict(text(CAPACITY)))

        assert (listener.statistics().rejecting, listener.statistics().cut_short) == (0, 1)
        assert descriptors() == before + 1
        assert await heard(client) == (text(CAPACITY), "eof")
        assert state(client) == CLOSE_WAIT


async def test_no_limit(dial: Dial) -> None:
    """With reject_timeout=None the caller has the time it takes, until close()."""
    async with await listen("127.0.0.1", 0, reject_timeout=None) as listener:
        client, other = dial(listener), dial(listener)
        await refuse(listener, by_verdict(b"busy"))
        await refuse(listener, by_verdict(b"busy"))
        assert await heard(client) == (b"busy", "eof")
        client.close()
        await until(lambda: listener.statistics().rejecting == 1)
        assert listener.statistics().cut_short == 0
        listener.close()
        assert state(other) == CLOSED


async def test_unix_timeout(dial: Dial, tmp_path: Path) -> None:
    """On a Unix socket the time is bounded too."""
    async with await listen(path=tmp_path / "socket", reject_timeout=0.01) as listener:
        client = dial(listener, data=b"x")
        await refuse(listener, by_verdict(b"busy"))
        await until(lambda: listener.statistics().rejecting == 0)
        assert listener.statistics().cut_short == 1
        assert await heard(client) == (b"busy", "eof")


# -- bounded in number


@both_ways
async def test_64_at_once(listener: Listener[Stream], dial: Dial, say: Any) -> None:
    """Beyond 64 at once a caller is given no time, but still reads its data."""
    clients = [dial(listener, data=b"x" * 100) for _ in range(AT_ONCE + 2)]
    for n in range(AT_ONCE + 2):
        await refuse(listener, say(text(CAPACITY)))
        assert listener.statistics().rejecting == min(n + 1, AT_ONCE)
        assert listener.statistics().cut_short == max(n + 1 - AT_ONCE, 0)
    for client in clients:
        assert await heard(client) == (text(CAPACITY), "eof")
        assert state(client) == CLOSE_WAIT

    clients.pop(0).close()
    await until(lambda: listener.statistics().rejecting == AT_ONCE - 1)
    client = dial(listener)
    await refuse(listener, say(b"busy"))
    assert listener.statistics().rejecting == AT_ONCE
    assert listener.statistics().cut_short == 2
    assert await heard(client) == (b"busy", "eof")


async def test_endless_sender(listener: Listener[Stream], dial: Dial) -> None:
    """A caller that never stops sending is reset after a bounded number of bytes."""
    client = dial(listener)

    def send() -> int:
        sent = 0
        try:
            while sent < 64:
                client.sendall(bytes(1024 * 1024))
                sent += 1
        except ConnectionError:
            pass
        return sent

    sending = asyncio.ensure_future(asyncio.to_thread(send))
    await refuse(listener, by_verdict(b"busy"))
    assert 15 <= await sending < 64
    assert listener.statistics().rejecting == 0
    assert state(client) == CLOSED


# -- ended


async def test_close_ends_it(listener: Listener[Stream], dial: Dial) -> None:
    """close() resets who has not closed yet; nothing is left."""
    before = descriptors()
    clients = [dial(listener, data=b"x" * 100) for _ in range(3)]
    for _ in clients:
        await refuse(listener, by_verdict(b"busy"))
    listener.close()

    assert listener.statistics().rejecting == 0
    assert [state(client) for client in clients] == [CLOSED] * 3
    assert listener.statistics().rejected == 3
    # The listening socket and its epoll set are gone as well.
    assert descriptors() == before - 2 + len(clients)


@pytest.mark.parametrize("sent", [b"", b"x" * 100], ids=["silent", "sent"])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_close_before_it(
    listener: Listener[Stream],
    dial: Dial,
    is_async: bool,  # noqa: FBT001 - a parameter
    sent: bytes,
) -> None:
    """A condition that closes the listener and rejects with data leaves nothing open."""
    before = descriptors()
    client = dial(listener, data=sent)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.close()
        return Reject(data=b"bye")

    async def slow_condition(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        return condition(pending)

    await refuse(listener, slow_condition if is_async else condition)
    await listener.wait_closed()
    assert listener.statistics().rejecting == 0
    assert descriptors() == before - 2 + 1
    assert await heard(client) == (b"bye", "eof")


async def test_reset_before_it(listener: Listener[Stream], dial: Dial) -> None:
    """A caller that resets while it is being decided about is rejected all the same."""
    before = descriptors()
    client = dial(listener, data=b"x" * 100)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        reset(client)
        return Reject(data=text(CAPACITY))

    await refuse(listener, condition)
    statistics = listener.statistics()
    assert (statistics.rejected, statistics.rejecting, statistics.cut_short) == (1, 0, 0)
    assert descriptors() == before


@pytest.mark.parametrize("read", [0, 100], ids=["unread", "reading"])
async def test_reset_in_the_middle(listener: Listener[Stream], dial: Dial, read: int) -> None:
    """A caller that resets instead of reading ends it."""
    before = descriptors()
    client, other = dial(listener, data=b"x" * 100), dial(listener)
    await refuse(listener, by_verdict(text(CAPACITY)))
    await refuse(listener, by_verdict(b"busy"))
    assert len(client.recv(read)) == read
    reset(client)

    await until(lambda: listener.statistics().rejecting == 1)
    assert await heard(other) == (b"busy", "eof")
    other.close()
    await until(lambda: listener.statistics().rejecting == 0)
    assert listener.statistics().cut_short == 0
    assert descriptors() == before


async def test_closed_without_reading(listener: Listener[Stream], dial: Dial) -> None:
    """A caller that closes with the data unread ends it."""
    client = dial(listener)
    await refuse(listener, by_verdict(text(CAPACITY)))
    client.close()
    await until(lambda: listener.statistics().rejecting == 0)
    assert listener.statistics().cut_short == 0


# -- on ACCEPT


@pytest.mark.parametrize("tiny", [False, True], ids=["buffer", "tiny-buffer"])
async def test_first_thing_sent(tiny: bool) -> None:  # noqa: FBT001 - a parameter
    """On ACCEPT the callee data goes out before anything that is written to the stream."""
    options = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)] if tiny else []

    def factory(stream: Stream) -> Stream:
        stream.write(b"factory;")
        return stream

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.set(text(CAPACITY))
        return ACCEPT

    async with await listen("127.0.0.1", 0, options=options, stream_factory=factory) as listener:
        with socket.socket() as client:
            if tiny:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(listener.sockname)
            stream = await listener.accept(condition)
            stream.write(b"handler")
            stream.close()
            assert await heard(client) == (text(CAPACITY) + b"factory;handler", "eof")


async def test_first_thing_sent_by_an_idle_stream(listener: Listener[Stream], dial: Dial) -> None:
    """On ACCEPT the callee data goes out by itself."""
    client = dial(listener)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data = b"220 ready"
        return ACCEPT

    stream = await listener.accept(condition)
    assert wire(client) == b"220 ready"
    stream.close()


async def test_accepted_but_gone(listener: Listener[Stream], dial: Dial) -> None:
    """Callee data for a caller that resets just then: the stream says so when it is used."""
    client = dial(listener)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.set(b"hello")
        reset(client)
        return ACCEPT

    stream = await listener.accept(condition)
    with pytest.raises(ConnectionError):
        await stream.read(1)
    stream.close()
    assert listener.statistics().accepted == 1


async def test_kept_over_a_deferral(listener: Listener[Stream], dial: Dial) -> None:
    """Nothing is sent by a DEFER."""
    client = dial(listener)

    def condition(pending: PendingTransport) -> AnyVerdict:
        pending.callee_data.set(b"early")
        return DEFER

    with pytest.raises(ConnectionDeferredError):
        await listener.accept(condition)
    assert wire(client) == "open"
    (await listener.accept()).abort()
