"""The gate interface: the same scenarios over every gate and every watch there is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from condaccept import (
    ACCEPT,
    REJECT,
    AnyVerdict,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Listener,
    ListenerClosedError,
    NoPendingError,
    Outcome,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    Reject,
    Status,
    Stream,
)
from condaccept._sockets import RawSocket
from condaccept._watch import EpollWatch, ReaderWatch
from condaccept.gates import HandshakeGate
from condaccept.gates._farewell import Farewells
from condaccept.testing import MemoryGate, memory_listener
from tests.support import (
    LIMIT,
    Condition,
    Dial,
    accept,
    caught_up,
    defer,
    descriptors,
    reject,
    reset,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

CAPACITY = 4096
WATCHES: dict[str, Any] = {"epoll": EpollWatch, "reader": ReaderWatch}


@attrs.frozen
class Place:
    """A listener, and how to call it."""

    listener: Listener[Stream]
    dial: Callable[[bytes], socket.socket]
    refused: str
    """What a caller that has sent nothing reads after a rejection."""


async def handshake_place(dial: Dial, watch: Any, **options: Any) -> Place:
    """Return a listener on a TCP socket."""
    sock = socket.create_server(("127.0.0.1", 0))
    for option in options.pop("sockopts", ()):
        sock.setsockopt(*option)
    reject_timeout = options.pop("reject_timeout", 5.0)
    listener: Listener[Stream] = Listener(
        lambda loop, watch: HandshakeGate(loop, watch, [sock], reject_timeout=reject_timeout),
        watch=watch,
        **options,
    )
    return Place(listener, lambda data: dial(listener, data=data), "reset")


async def memory_place(stack: contextlib.ExitStack, watch: Any, **options: Any) -> Place:
    """Return a listener without a network."""
    listener, gate = memory_listener(watch=watch, **options)
    callers = iter(range(50001, 60000))

    def call(data: bytes) -> socket.socket:
        client = gate.dial(("192.0.2.1", next(callers)))
        client.settimeout(LIMIT)
        stack.callback(client.close)
        client.sendall(data)
        return client

    return Place(listener, call, "eof")


@pytest.fixture(params=["handshake", "memory"])
def gate_kind(request: pytest.FixtureRequest) -> str:
    """Which gate."""
    kind: str = request.param
    return kind


@pytest.fixture(params=list(WATCHES))
def watch(request: pytest.FixtureRequest) -> Any:
    """Which watch, as a class."""
    return WATCHES[request.param]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What is closed at the end of the test."""
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
async def open_place(
    gate_kind: str, watch: Any, dial: Dial, stack: contextlib.ExitStack
) -> AsyncIterator[Any]:
    """How to open a place with options of its own."""
    places = []

    async def opened(**options: Any) -> Place:
        if gate_kind == "handshake":
            place = await handshake_place(dial, watch, **options)
        else:
            place = await memory_place(stack, watch, **options)
        places.append(place)
        return place

    yield opened
    for place in places:
        place.listener.close()


@pytest.fixture
async def place(open_place: Any) -> Place:
    """A gate behind a watch."""
    opened: Place = await open_place()
    return opened


@pytest.fixture
async def tcp(watch: Any, dial: Dial) -> AsyncIterator[Place]:
    """The handshake gate behind a watch."""
    opened = await handshake_place(dial, watch)
    yield opened
    opened.listener.close()


async def ended(task: asyncio.Task[Any]) -> BaseException | None:
    """Wait for a task; return what it raised, if it did."""
    await asyncio.wait([task], timeout=LIMIT)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def status(pending: PendingTransport) -> Status:
    """Return where a connection stands, now."""
    return pending.status


async def heard(client: socket.socket) -> tuple[bytes, str]:
    """Read from *client* to the end: the bytes, and which end it was."""
    data = b""
    while isinstance(seen := await wire_end(client), bytes):
        data += seen
    return data, seen


# -- every gate, every watch


async def test_accept(place: Place) -> None:
    """ACCEPT gives a stream; both ends can use it, and close it."""
    client = place.dial(b"ping")
    stream = await place.listener.accept(accept)
    assert await stream.read(10) == b"ping"
    reading = asyncio.ensure_future(stream.read(10))
    await asyncio.sleep(0)
    client.sendall(b"more")
    assert await reading == b"more"
    stream.write(b"pong")
    assert wire(client) == b"pong"
    client.shutdown(socket.SHUT_WR)
    assert await stream.read(10) == b""
    assert place.listener.statistics().streams == 1
    stream.close()
    assert wire(client) == "eof"
    assert place.listener.statistics().streams == 0


async def test_accept_waits(place: Place) -> None:
    """Calls that wait are served in the order of the callers, one each."""
    condition = Condition(ACCEPT, ACCEPT, ACCEPT)
    tasks = [asyncio.ensure_future(place.listener.accept(condition)) for _ in range(3)]
    await asyncio.sleep(0)
    for _ in range(3):
        place.dial(b"")
    for task in tasks:
        assert await ended(task) is None
        task.result().close()
    assert len(set(condition.offered)) == place.listener.statistics().accepted == 3


async def test_order(place: Place) -> None:
    """Callers are offered in the order in which they came."""
    clients = [place.dial(b"%d" % n) for n in range(5)]
    for n in range(5):
        stream = await place.listener.accept()
        assert await stream.read(10) == b"%d" % n
        stream.close()
        assert wire(clients[n]) == "eof"
    with pytest.raises(NoPendingError):
        place.listener.accept_nowait()


@pytest.mark.parametrize("sent", [b"", b"hello"], ids=["silent", "sent"])
async def test_reject(place: Place, sent: bytes) -> None:
    """REJECT closes the connection, and the next one is offered."""
    first, second = place.dial(sent), place.dial(b"")
    with pytest.raises(ConnectionRejectedError):
        await place.listener.accept(reject)
    assert wire(first) == ("reset" if sent else place.refused)
    stream = await place.listener.accept()
    stream.write(b"you")
    assert wire(second) == b"you"
    stream.close()
    assert place.listener.statistics().rejected == 1


@pytest.mark.parametrize("sent", [b"", b"x" * 100], ids=["silent", "sent"])
async def test_farewell(place: Place, sent: bytes) -> None:
    """REJECT with callee data delivers it, and ends when the caller closes."""
    client = place.dial(sent)
    before = descriptors()
    with pytest.raises(ConnectionRejectedError):
        await place.listener.accept(lambda _: Reject(data=b"d" * CAPACITY))
    assert place.listener.statistics().rejecting == 1
    assert await heard(client) == (b"d" * CAPACITY, "eof")
    client.sendall(b"y" * 100)
    await caught_up()
    assert place.listener.statistics().rejecting == 1
    client.sendall(b"z" * 100)
    client.close()
    await until(lambda: place.listener.statistics().rejecting == 0)
    assert place.listener.statistics().cut_short == 0
    assert descriptors() <= before


async def test_farewell_timeout(open_place: Any) -> None:
    """A caller that does not close in time is cut short."""
    place = await open_place(reject_timeout=0.01)
    client = place.dial(b"x")
    with pytest.raises(ConnectionRejectedError):
        await place.listener.accept(lambda _: Reject(data=b"busy"))
    await until(lambda: place.listener.statistics().rejecting == 0)
    assert place.listener.statistics().cut_short == 1
    assert wire(client) == b"busy"


async def test_farewell_to_a_flood(place: Place) -> None:
    """A caller that keeps sending while it is refused can send it all, and reads why."""
    client = place.dial(b"")
    data = bytes(2 * 1024 * 1024)
    sending = asyncio.ensure_future(asyncio.to_thread(client.sendall, data))
    with pytest.raises(ConnectionRejectedError):
        await place.listener.accept(lambda _: Reject(data=b"busy"))
    await sending
    assert await heard(client) == (b"busy", "eof")
    client.close()
    await until(lambda: place.listener.statistics().rejecting == 0)


async def test_callee_data(place: Place) -> None:
    """On ACCEPT the callee data is the first thing the caller reads."""
    client = place.dial(b"")

    def condition(pending: PendingTransport) -> AnyVerdict:
        assert pending.callee_data.capacity == CAPACITY
        pending.callee_data.write(b"hello ")
        return ACCEPT

    stream = await place.listener.accept(condition)
    stream.write(b"world")
    stream.close()
    assert await heard(client) == (b"hello world", "eof")


async def test_defer(place: Place) -> None:
    """A deferred connection is offered again before any other; its data stays."""
    first, second = place.dial(b"one"), place.dial(b"two")
    deferred = set()
    for n in range(3):
        with pytest.raises(ConnectionDeferredError) as caught:
            await place.listener.accept(defer)
        deferred.add(caught.value.caller_id)
        assert place.listener.pending[0].deferrals == n + 1
    assert len(deferred) == 1
    assert place.listener.statistics().taken == 1
    assert wire(first) == wire(second) == "open"

    for data in (b"one", b"two"):
        stream = await place.listener.accept(accept)
        assert await stream.read(10) == data
        stream.close()
    assert place.listener.pending == ()


async def test_defer_then_reject(place: Place) -> None:
    """A deferred connection can be rejected."""
    client = place.dial(b"")
    with pytest.raises(ConnectionDeferredError):
        await place.listener.accept(defer)
    with pytest.raises(ConnectionRejectedError):
        await place.listener.accept(reject)
    assert wire(client) == place.refused


async def test_defer_timeout(open_place: Any) -> None:
    """A deferred connection without a verdict in time expires, once, and is closed."""
    place = await open_place(defer_timeout=0.01)
    client = place.dial(b"")
    with pytest.raises(ConnectionDeferredError):
        await place.listener.accept(defer)
    async with asyncio.timeout(LIMIT):
        await place.listener.wait_pending()
    assert wire(client) == place.refused
    with pytest.raises(PendingExpiredError):
        await place.listener.accept(accept)
    with pytest.raises(NoPendingError):
        place.listener.accept_nowait()
    assert place.listener.statistics().expired == 1


async def test_half_closed_while_deferred(place: Place) -> None:
    """A FIN while deferred is visible and nothing more: the caller can be accepted."""
    client = place.dial(b"request")
    with pytest.raises(ConnectionDeferredError):
        await place.listener.accept(defer)
    (pending,) = place.listener.pending
    assert not pending.peer_closed
    client.shutdown(socket.SHUT_WR)
    await caught_up()
    assert pending.peer_closed
    stream = await place.listener.accept()
    assert await stream.read() == b"request"
    stream.write(b"answer")
    stream.close()
    assert await heard(client) == (b"answer", "eof")


async def test_withdrawn(open_place: Any, watch: Any) -> None:
    """Under on_eof="withdraw" a deferred caller's FIN ends it; epoll notices by itself."""
    place = await open_place(on_eof="withdraw")
    client = place.dial(b"request")
    with pytest.raises(ConnectionDeferredError):
        await place.listener.accept(defer)
    client.shutdown(socket.SHUT_WR)
    if watch is EpollWatch:
        await until(lambda: place.listener.statistics().expired)
        await place.listener.wait_pending()
    condition = Condition()
    with pytest.raises(PendingExpiredError):
        await place.listener.accept(condition)
    assert condition.offered == []
    assert place.listener.statistics().expired == 1
    assert wire(client) == "reset"


async def test_wait_pending(place: Place) -> None:
    """wait_pending() returns for each newcomer, and takes nobody."""
    for _ in range(3):
        watching = asyncio.ensure_future(place.listener.wait_pending())
        await asyncio.sleep(0)
        assert not watching.done()
        place.dial(b"")
        assert await ended(watching) is None
        place.listener.accept_nowait().close()
    assert place.listener.statistics().taken == 3


async def test_wait_pending_behind_a_deferral(place: Place, watch: Any) -> None:
    """Behind a deferred connection wait_pending() tells of a newcomer, once."""
    place.dial(b"")
    with pytest.raises(ConnectionDeferredError):
        await place.listener.accept(defer)
    # Without epoll a second newcomer looks like the first one, who is still in the backlog.
    newcomers = 1 if watch is ReaderWatch and place.refused == "reset" else 3
    for _ in range(newcomers):
        watching = asyncio.ensure_future(place.listener.wait_pending())
        await caught_up()
        assert not watching.done()
        place.dial(b"")
        assert await ended(watching) is None
        with pytest.raises(ConnectionDeferredError):
            await place.listener.accept(defer)
    for _ in range(newcomers + 1):
        place.listener.accept_nowait().close()


async def test_close(place: Place, watch: Any) -> None:
    """close() ends the queued, the deferred, the decided-about and the waiting."""
    before = descriptors()
    clients = [place.dial(b"") for _ in range(4)]
    with pytest.raises(ConnectionDeferredError):
        await place.listener.accept(defer)
    asked: list[PendingTransport] = []

    async def never(pending: PendingTransport) -> AnyVerdict:
        asked.append(pending)
        await asyncio.get_running_loop().create_future()
        return ACCEPT

    tasks = [asyncio.ensure_future(place.listener.accept(never)) for _ in range(2)]
    await until(lambda: len(asked) == 2)
    place.listener.close()
    for task in tasks:
        assert isinstance(await ended(task), ListenerClosedError)
    await place.listener.wait_closed()
    with pytest.raises(ListenerClosedError):
        await place.listener.accept()
    # Those the kernel has are reset by it, those of the memory gate read the end.
    assert [wire(client) for client in clients] == [place.refused] * 4
    assert (place.listener.statistics().closed, place.listener.statistics().pending) == (2, 0)
    gone = {("handshake", EpollWatch): 2, ("handshake", ReaderWatch): 1}
    kind = "handshake" if place.refused == "reset" else "memory"
    expected = gone.get((kind, watch), 1 if watch is EpollWatch else 0)
    assert descriptors() == before + len(clients) - expected


async def test_close_spares_streams(place: Place) -> None:
    """Streams go on after close(); the watch goes with the last of them."""
    before = descriptors()
    clients = [place.dial(b""), place.dial(b"")]
    streams = [await place.listener.accept(), await place.listener.accept()]
    place.listener.close()
    for client, stream in zip(clients, streams, strict=True):
        reading = asyncio.ensure_future(stream.read(10))
        await asyncio.sleep(0)
        client.sendall(b"still")
        assert await ended(reading) is None
        assert reading.result() == b"still"
        stream.close()
        assert wire(client) == "eof"
        client.close()
    assert descriptors() <= before


async def test_echo(place: Place) -> None:
    """A megabyte goes through a stream and back, past both sides' buffers."""
    client = place.dial(b"")
    stream = await place.listener.accept()
    data = b"".join(b"%07d;" % n for n in range(131072))

    async def echo() -> None:
        while chunk := await stream.read(65536):
            await stream.send(chunk)
        stream.close()

    def talk() -> bytes:
        got = b""
        step = 32768
        for at in range(0, len(data), step):
            client.sendall(data[at : at + step])
            while len(got) < at:
                got += client.recv(65536)
        client.shutdown(socket.SHUT_WR)
        while chunk := client.recv(65536):
            got += chunk
        return got

    echoing = asyncio.ensure_future(echo())
    assert await asyncio.to_thread(talk) == data
    assert await ended(echoing) is None
    await stream.wait_closed()


async def test_flush(place: Place) -> None:
    """What the kernel does not take at once follows, in order, also after close()."""
    client = place.dial(b"")
    stream = await place.listener.accept()
    data = bytes(range(256)) * 16384
    stream.write(data)
    stream.close()
    draining = asyncio.ensure_future(stream.wait_closed())
    assert await heard(client) == (data, "eof")
    assert await ended(draining) is None


async def test_outcomes(place: Place) -> None:
    """Each connection has one outcome, whichever gate it came through."""
    outcomes: list[Outcome] = []
    place.listener.on_outcome(outcomes.append)
    for _ in range(4):
        place.dial(b"")
    place.listener.accept_nowait().close()
    with pytest.raises(ConnectionRejectedError):
        place.listener.accept_nowait(reject)
    with pytest.raises(ConnectionDeferredError):
        place.listener.accept_nowait(defer)
    place.listener.close()
    await until(lambda: len(outcomes) == 3)
    assert [each.status for each in outcomes] == [
        Status.ACCEPTED,
        Status.REJECTED,
        Status.CLOSED,
    ]


# -- the handshake gate alone


async def test_reset(tcp: Place) -> None:
    """A caller that has reset is reported, once, without an offer."""
    reset(tcp.dial(b"data"))
    condition = Condition(ACCEPT)
    with pytest.raises(PendingResetError):
        await tcp.listener.accept(condition)
    tcp.dial(b"")
    (await tcp.listener.accept(condition)).close()
    assert len(condition.offered) == 1
    assert tcp.listener.statistics().reset == 1


async def test_reset_while_deferred(tcp: Place, watch: Any) -> None:
    """A reset while deferred is reported in its place; epoll notices by itself."""
    client, other = tcp.dial(b""), tcp.dial(b"")
    with pytest.raises(ConnectionDeferredError):
        await tcp.listener.accept(defer)
    reset(client)
    if watch is EpollWatch:
        await until(lambda: tcp.listener.statistics().reset)
        await tcp.listener.wait_pending()
    condition = Condition(ACCEPT)
    with pytest.raises(PendingResetError):
        await tcp.listener.accept(condition)
    stream = await tcp.listener.accept(condition)
    assert condition.offered == [other.getsockname()]
    stream.close()


async def test_reset_while_decided_about(tcp: Place) -> None:
    """A reset during an async decision is reported in place of the verdict."""
    client = tcp.dial(b"")
    released: list[str] = []

    async def condition(pending: PendingTransport) -> AnyVerdict:
        pending.hold(partial(released.append, "hold"))
        await asyncio.sleep(0)
        reset(client)
        return ACCEPT

    with pytest.raises(PendingResetError):
        await tcp.listener.accept(condition)
    assert released == ["hold"]
    assert tcp.listener.pending == ()


@pytest.mark.parametrize("shut", [False, True], ids=["open", "shut"])
async def test_farewell_through_a_tiny_buffer(watch: Any, dial: Dial, shut: bool) -> None:  # noqa: FBT001 - a parameter
    """Where the kernel takes a part only, the rest follows as the caller reads."""
    tiny = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)]
    place = await handshake_place(dial, watch, sockopts=tiny)
    async with place.listener:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(place.listener.sockname)
            if shut:
                client.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionRejectedError):
                await place.listener.accept(lambda _: Reject(data=b"d" * CAPACITY))
            assert len(client.recv(CAPACITY, socket.MSG_PEEK)) < CAPACITY
            assert await heard(client) == (b"d" * CAPACITY, "eof")
        await until(lambda: place.listener.statistics().rejecting == 0)
        assert place.listener.statistics().cut_short == 0


async def test_farewell_in_parts(watch: Any) -> None:
    """Data that goes out in many parts, since there is always only a little room, is sent."""
    loop = asyncio.get_running_loop()
    watched = watch(loop)
    farewells = Farewells(loop, watched, None)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.connect(server.getsockname())
        connection, _ = server.accept()
        connection.setblocking(False)
        before = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                before += connection.send(b"-" * 64)
        kind = connection.family, connection.type, connection.proto
        farewells.say(RawSocket(*kind, connection.detach()), b"d" * CAPACITY)

        got = b""
        while len(got) < before + CAPACITY:
            part = await wire_end(client)
            assert isinstance(part, bytes)
            got += part
        assert got == b"-" * before + b"d" * CAPACITY
        assert await wire_end(client) == "eof"
        assert len(farewells) == 1
        client.close()
        await until(lambda: not farewells)
    watched.release()


async def test_two_sockets_turn_about(watch: Any, dial: Dial) -> None:
    """Of two listening sockets with callers, each has its turn."""
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    names = [sock.getsockname() for sock in socks]
    listener: Listener[Stream] = Listener(
        lambda loop, watch: HandshakeGate(loop, watch, socks), watch=watch
    )
    async with listener:
        for name in (names[0],) * 3 + (names[1],) * 3:
            dial(name)
        served = []
        for _ in range(6):
            stream = await listener.accept()
            served.append(stream.callee_id)
            stream.close()
        assert served[:2] != served[1:3]
        assert sorted(served) == sorted(names * 3)
        assert served in ([*names] * 3, [*reversed(names)] * 3)

        # Nobody is left; a newcomer on either is noticed.
        for name in (*names, *names):
            (waiting,) = [asyncio.ensure_future(listener.accept())]
            await asyncio.sleep(0)
            dial(name)
            assert await ended(waiting) is None
            assert waiting.result().callee_id == name
            waiting.result().close()


class CountedEpoll(EpollWatch):
    """Counts how often the loop calls it."""

    calls = 0

    def _dispatch(self) -> None:
        self.calls += 1
        super()._dispatch()


class CountedReader(ReaderWatch):
    """Counts how often the loop calls it."""

    calls = 0

    def _readable(self, fd: int) -> None:
        self.calls += 1
        super()._readable(fd)


@pytest.mark.parametrize("deferred", [False, True], ids=["idle", "deferred"])
@pytest.mark.parametrize("kind", [CountedEpoll, CountedReader])
async def test_nothing_spins(dial: Dial, kind: Any, deferred: bool) -> None:  # noqa: FBT001 - a parameter
    """While nobody may take those who wait, the loop is told of each at most once."""
    place = await handshake_place(dial, kind, max_pending=1)
    counted = place.listener._watch
    assert isinstance(counted, (CountedEpoll, CountedReader))
    async with place.listener:
        if deferred:
            dial(place.listener)
            with pytest.raises(ConnectionDeferredError):
                await place.listener.accept(defer)
        before = counted.calls
        for _ in range(5):
            dial(place.listener, data=b"hello")
        for _ in range(20):
            await caught_up()
        assert counted.calls - before <= 5
        for _ in range(5 + deferred):
            place.listener.accept_nowait().close()
        with pytest.raises(NoPendingError):
            place.listener.accept_nowait()


# -- a gate whose admissions take time


@pytest.fixture
async def slow() -> AsyncIterator[tuple[Listener[Stream], MemoryGate]]:
    """A listener whose accepted connections are complete when the test says so."""
    listener, gate = memory_listener(slow=True)
    async with listener:
        yield listener, gate


Slow = tuple[Listener[Stream], MemoryGate]


class Asked:
    """Accepts everybody, holds something, and keeps what it was offered."""

    def __init__(self) -> None:
        self.offered: list[PendingTransport] = []
        self.released: list[PendingTransport] = []

    def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Say ACCEPT."""
        self.offered.append(pending)
        pending.hold(partial(self.released.append, pending))
        return ACCEPT


async def test_slow_accept(slow: Slow) -> None:
    """ACCEPT waits for the connection: ADMITTED, then READY, then a stream."""
    listener, gate = slow
    asked = Asked()
    with gate.dial() as client:
        client.sendall(b"early")
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        (pending,) = asked.offered
        assert status(pending) is Status.ADMITTED
        assert not task.done()
        assert listener.statistics().pending == 1
        assert listener.statistics().deciding == 0

        gate.complete()
        await until(lambda: status(pending) is Status.READY)
        assert not task.done()
        assert await ended(task) is None
        stream = task.result()
        assert await stream.read(10) == b"early"
        assert (status(pending), asked.released) == (Status.ACCEPTED, [])
        assert listener.pending == ()
        stream.close()
        assert asked.released == asked.offered
    assert listener.statistics().accepted == listener.statistics().offers == 1


async def test_slow_accept_async(slow: Slow) -> None:
    """The same after an async condition."""
    listener, gate = slow
    asked = Asked()

    async def condition(pending: PendingTransport) -> AnyVerdict:
        await asyncio.sleep(0)
        return asked(pending)

    with gate.dial():
        task = asyncio.ensure_future(listener.accept(condition))
        await until(lambda: gate.admitting)
        assert status(asked.offered[0]) is Status.ADMITTED
        assert listener.statistics().deciding == 0
        gate.complete()
        assert await ended(task) is None
        task.result().close()
    assert asked.released == asked.offered


async def test_slow_side_by_side(slow: Slow) -> None:
    """Connections that are being completed hold up nobody; each call gets its own."""
    listener, gate = slow
    callers = [("192.0.2.1", n) for n in range(1, 5)]
    with contextlib.ExitStack() as clients:
        tasks = []
        for caller in callers:
            clients.enter_context(gate.dial(caller))
            tasks.append(asyncio.ensure_future(listener.accept()))
            await until(lambda: len(gate.admitting) == len(tasks))
        gate.admitting.reverse()
        for n in (3, 2, 1, 0):
            gate.complete()
            assert await ended(tasks[n]) is None
            assert tasks[n].result().caller_id == callers[n]
            assert [task.done() for task in tasks] == [m >= n for m in range(4)]
            tasks[n].result().close()
    assert listener.statistics().accepted == 4


async def test_slow_order_for_those_behind(slow: Slow) -> None:
    """While the head is being completed, the next call is offered the next caller."""
    listener, gate = slow
    with gate.dial(("192.0.2.1", 1)), gate.dial(("192.0.2.1", 2)) as second:
        first = asyncio.ensure_future(listener.accept())
        await until(lambda: gate.admitting)
        with pytest.raises(ConnectionRejectedError) as caught:
            await listener.accept(reject)
        assert caught.value.caller_id == ("192.0.2.1", 2)
        assert wire(second) == "eof"
        gate.complete()
        assert await ended(first) is None
        first.result().close()


@pytest.mark.parametrize("complete_first", [False, True], ids=["before", "after"])
async def test_slow_cancelled(slow: Slow, complete_first: bool) -> None:  # noqa: FBT001 - a parameter
    """Cancelled while the connection is completed: the next call gets it, without an offer."""
    listener, gate = slow
    asked, other = Asked(), Asked()
    with gate.dial() as client:
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        if complete_first:
            gate.complete()
            await until(lambda: status(asked.offered[0]) is Status.READY)
        task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        assert asked.released == []
        assert wire(client) == "open"

        waiting = asyncio.ensure_future(listener.accept(other))
        if not complete_first:
            await asyncio.sleep(0)
            assert not waiting.done()
            gate.complete()
        assert await ended(waiting) is None
        assert other.offered == []
        assert status(asked.offered[0]) is Status.ACCEPTED
        waiting.result().close()
        assert asked.released == asked.offered
    statistics = listener.statistics()
    assert (statistics.offers, statistics.accepted, statistics.taken) == (1, 1, 1)


@pytest.mark.parametrize("cancel_first", [False, True], ids=["woken", "cancelled"])
async def test_slow_cancelled_when_complete(slow: Slow, cancel_first: bool) -> None:  # noqa: FBT001 - a parameter
    """Cancelled in the turn of the completion: a call that waits gets the connection."""
    listener, gate = slow
    asked = Asked()
    with gate.dial():
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        waiting = asyncio.ensure_future(listener.accept())
        watching = asyncio.ensure_future(listener.wait_pending())
        await asyncio.sleep(0)
        if cancel_first:
            task.cancel()
            gate.complete()
        else:
            gate.complete()
            await until(lambda: status(asked.offered[0]) is Status.READY)
            task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        assert await ended(waiting) is None
        waiting.result().close()
        assert asked.released == asked.offered
        watching.cancel()
        await ended(watching)
    assert (listener.statistics().offers, listener.statistics().accepted) == (1, 1)


async def test_slow_cancelled_is_due(slow: Slow) -> None:
    """A connection that is complete and that nobody waits for is due."""
    listener, gate = slow
    with gate.dial():
        task = asyncio.ensure_future(listener.accept())
        await until(lambda: gate.admitting)
        task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        watching = asyncio.ensure_future(listener.wait_pending())
        await asyncio.sleep(0)
        assert not watching.done()
        gate.complete()
        assert await ended(watching) is None
        listener.accept_nowait().close()


async def test_slow_cancelled_keeps_its_place(slow: Slow) -> None:
    """A connection whose call was cancelled is given out before newer callers."""
    listener, gate = slow
    with gate.dial(("192.0.2.1", 1)), gate.dial(("192.0.2.1", 2)):
        task = asyncio.ensure_future(listener.accept())
        await until(lambda: gate.admitting)
        task.cancel()
        await ended(task)
        gate.complete()
        await until(lambda: listener.pending[0].status is Status.READY)
        stream = await listener.accept()
        assert stream.caller_id == ("192.0.2.1", 1)
        stream.close()
        task = asyncio.ensure_future(listener.accept())
        await until(lambda: gate.admitting)
        gate.complete()
        assert await ended(task) is None
        assert task.result().caller_id == ("192.0.2.1", 2)
        task.result().close()


async def test_slow_caller_leaves(slow: Slow) -> None:
    """A caller that leaves before its connection is complete is a reset; holds are released."""
    listener, gate = slow
    outcomes: list[Outcome] = []
    listener.on_outcome(outcomes.append)
    asked = Asked()
    with gate.dial(("192.0.2.1", 9)):
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        gate.fail()
        error = await ended(task)
    assert isinstance(error, PendingResetError)
    assert error.caller_id == ("192.0.2.1", 9)
    assert asked.released == asked.offered
    assert status(asked.offered[0]) is Status.RESET
    assert listener.pending == ()
    with pytest.raises(NoPendingError):
        listener.accept_nowait()
    assert [each.status for each in outcomes] == [Status.RESET]
    assert listener.statistics().reset == 1


async def test_slow_caller_leaves_after_the_cancellation(slow: Slow) -> None:
    """If nobody waits for the connection, its loss is told to the next call, once."""
    listener, gate = slow
    asked = Asked()
    with gate.dial():
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        task.cancel()
        await ended(task)
        waiting = asyncio.ensure_future(listener.accept(asked))
        await asyncio.sleep(0)
        gate.fail()
        assert isinstance(await ended(waiting), PendingResetError)
    assert asked.released == asked.offered
    assert len(asked.offered) == 1
    with pytest.raises(NoPendingError):
        listener.accept_nowait()


async def test_slow_caller_leaves_in_the_turn_of_the_cancellation(slow: Slow) -> None:
    """A loss whose call was cancelled before it could tell is told by the next."""
    listener, gate = slow
    asked = Asked()
    with gate.dial():
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        waiting = asyncio.ensure_future(listener.accept())
        await asyncio.sleep(0)
        gate.fail()
        await until(lambda: status(asked.offered[0]) is Status.RESET)
        task.cancel()
        assert isinstance(await ended(task), asyncio.CancelledError)
        assert isinstance(await ended(waiting), PendingResetError)
    assert asked.released == asked.offered


async def test_slow_nowait(slow: Slow) -> None:
    """accept_nowait() there finds nobody until the connection is complete."""
    listener, gate = slow
    asked = Asked()
    with gate.dial() as client:
        for n in range(3):
            with pytest.raises(NoPendingError) as caught:
                listener.accept_nowait(asked)
            # The first call has made the offer, and knows whom it was about.
            assert (caught.value.caller_id is None) == (n > 0)
        assert len(asked.offered) == 1
        assert status(asked.offered[0]) is Status.ADMITTED
        watching = asyncio.ensure_future(listener.wait_pending())
        await asyncio.sleep(0)
        assert not watching.done()

        gate.complete()
        assert await ended(watching) is None
        assert status(asked.offered[0]) is Status.READY
        stream = listener.accept_nowait(asked)
        stream.write(b"in")
        assert wire(client) == b"in"
        assert len(asked.offered) == 1
        assert asked.released == []
        stream.close()
    assert asked.released == asked.offered


async def test_slow_nowait_caller_leaves(slow: Slow) -> None:
    """accept_nowait() tells once that the caller left before it was complete."""
    listener, gate = slow
    asked = Asked()
    with gate.dial():
        with pytest.raises(NoPendingError):
            listener.accept_nowait(asked)
        gate.fail()
        async with asyncio.timeout(LIMIT):
            await listener.wait_pending()
        with pytest.raises(PendingResetError):
            listener.accept_nowait(asked)
        with pytest.raises(NoPendingError):
            listener.accept_nowait(asked)
    assert asked.released == asked.offered


@pytest.mark.parametrize("how", ["admitted", "ready", "cancelled", "completing", "failing"])
async def test_slow_close(slow: Slow, how: str) -> None:
    """close() ends what is accepted and not complete; its holds are released."""
    listener, gate = slow
    before = descriptors()
    asked = Asked()
    with gate.dial() as client:
        task = asyncio.ensure_future(listener.accept(asked))
        await until(lambda: gate.admitting)
        if how in ("cancelled", "ready"):
            task.cancel()
            await ended(task)
        if how in ("completing", "ready"):
            gate.complete()
        if how == "failing":
            gate.fail()
        if how == "ready":
            await until(lambda: status(asked.offered[0]) is Status.READY)
        listener.close()
        error = await ended(task)
        if how in ("cancelled", "ready"):
            assert isinstance(error, asyncio.CancelledError)
        else:
            assert isinstance(error, ListenerClosedError)
        await listener.wait_closed()
        await asyncio.sleep(0)
        assert status(asked.offered[0]) is Status.CLOSED
        assert asked.released == asked.offered
        assert await wire_end(client) == "eof"
        assert listener.pending == ()
        assert listener.statistics().closed == 1
    # The listener's epoll set is gone.
    assert descriptors() == before - 1


@pytest.mark.parametrize("verdict", [ACCEPT, REJECT])
async def test_slow_close_from_the_condition(slow: Slow, verdict: AnyVerdict) -> None:
    """After a close() in its condition there is no connection to wait for any more."""
    listener, gate = slow
    asked = Asked()

    def condition(pending: PendingTransport) -> AnyVerdict:
        asked(pending)
        listener.close()
        return verdict

    with gate.dial() as client:
        task = asyncio.ensure_future(listener.accept(condition))
        error = await ended(task)
        expected = ListenerClosedError if verdict is ACCEPT else ConnectionRejectedError
        assert isinstance(error, expected)
        assert asked.released == asked.offered
        assert await wire_end(client) == "eof"
    assert gate.admitting == []


async def test_slow_max_pending(stack: contextlib.ExitStack) -> None:
    """Connections that are being completed count for max_pending."""
    listener, gate = memory_listener(slow=True, max_pending=2)
    async with listener:
        for n in range(3):
            stack.enter_context(gate.dial(("192.0.2.1", n)))
        tasks = [asyncio.ensure_future(listener.accept()) for _ in range(3)]
        await until(lambda: len(gate.admitting) == 2)
        await asyncio.sleep(0)
        assert listener.statistics().taken == 2
        gate.complete()
        await until(lambda: listener.statistics().taken == 3)
        for _ in range(2):
            gate.complete()
        for n, task in enumerate(tasks):
            assert await ended(task) is None
            assert task.result().caller_id == ("192.0.2.1", n)
            task.result().close()


async def test_slow_reject_and_defer(slow: Slow) -> None:
    """Only ACCEPT takes time there."""
    listener, gate = slow
    with gate.dial() as client:
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(defer)
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(reject)
        assert wire(client) == "eof"
    assert gate.admitting == []


async def test_slow_interrupted(slow: Slow) -> None:
    """cancel_accept() is for calls that wait for a caller, not for a connection."""
    listener, gate = slow
    with gate.dial():
        task = asyncio.ensure_future(listener.accept())
        await until(lambda: gate.admitting)
        assert listener.cancel_accept() == 0
        gate.complete()
        assert await ended(task) is None
        task.result().close()
