"""Refusing new connects, and listening again: `refuse_new()` and `listen_again()` of a gate."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ConnectionDeferredError,
    ConnectionRejectedError,
    Event,
    Listener,
    NoPendingError,
    NotASocketError,
    NotListeningError,
    Stream,
    listen,
)
from condaccept._open import open_tcp
from condaccept._watch import EpollWatch, ReaderWatch
from condaccept.gates import HandshakeGate
from condaccept.gates.handshake import _before_fork
from condaccept.testing import memory_listener
from tests.support import (
    LIMIT,
    Dial,
    accept,
    caught_up,
    defer,
    descriptors,
    queued,
    reject,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux listens again")

LINGER = (socket.SOL_SOCKET, socket.SO_LINGER)
REUSE = (socket.SOL_SOCKET, socket.SO_REUSEADDR)
OFF = struct.pack("ii", 0, 0)
RESET = struct.pack("ii", 1, 0)


def gate_of(listener: Listener[Any]) -> HandshakeGate:
    """Return the gate, to be told what the listener tells it."""
    gate = listener._gate
    assert isinstance(gate, HandshakeGate)
    return gate


def has_ipv6() -> bool:
    """Whether this machine's loopback has an IPv6 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on the loopback interface")


def targets(listener: Listener[Any]) -> list[Any]:
    """Return an address to dial for each listening socket, without asking for the sockets."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what is listened on
    names = [sock.getsockname() for sock in gate_of(listener).sockets]
    return [(local.get(name[0], name[0]), *name[1:]) for name in names]


def thieves(*addresses: Any) -> list[str]:
    """Return what another process gets that tries to have the addresses, in every way."""
    script = """
        import errno, socket, sys
        for address in eval(sys.argv[1]):
            for reuse in (0, 1):
                for port in (0, 1):
                    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
                    with socket.socket(family) as thief:
                        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, port)
                        try:
                            thief.bind(address)
                            print("bound")
                        except OSError as error:
                            print(errno.errorcode[error.errno])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), repr(addresses)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


async def meets_a_stream(listener: Listener[Stream], dial: Dial, to: Any = None) -> None:
    """Assert that a caller gets in, and that nothing of the answer is lost."""
    client = dial(to or listener)
    stream = await listener.accept()
    stream.write(b"welcome")
    stream.close()
    assert await wire_end(client) == b"welcome"
    assert await wire_end(client) == "eof"
    client.close()


@pytest.fixture(params=[EpollWatch, ReaderWatch], ids=["epoll", "reader"])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[Listener[Stream]]:
    """What `listen()` makes of two addresses, over either kind of watch."""
    sockets, lingers = await open_tcp(
        asyncio.get_running_loop(),
        ["127.0.0.1", "127.0.0.2"],
        0,
        family=socket.AF_UNSPEC,
        backlog=100,
        options=(),
        reuse_port=False,
        defer_accept=None,
    )
    opened: Listener[Stream] = Listener(
        lambda loop, watch: HandshakeGate(loop, watch, sockets, lingers=lingers),
        watch=request.param,
    )
    async with opened:
        yield opened


# -- who calls meanwhile


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "0.0.0.0",  # noqa: S104 - every address is what is tested
        pytest.param("::1", marks=needs_ipv6),
        pytest.param("::", marks=needs_ipv6),
        ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
        pytest.param(["127.0.0.1", "::1"], marks=needs_ipv6),
        "localhost",
    ],
    ids=str,
)
async def test_refused_and_let_in_again(host: Any, dial: Dial) -> None:
    """A caller is refused on every address at once; later it gets in on the same port."""
    async with await listen(host, 0) as listener:
        sockname, addresses = listener.sockname, targets(listener)
        for _ in range(3):
            gate_of(listener).refuse_new()
            for address in addresses:
                with pytest.raises(ConnectionRefusedError):
                    dial(address)
            gate_of(listener).listen_again()
            assert targets(listener) == addresses
            for address in addresses:
                await meets_a_stream(listener, dial, address)
        assert listener.sockname == sockname


async def test_a_port_that_was_asked_for(dial: Dial) -> None:
    """It makes no difference who chose the port."""
    async with await listen("127.0.0.1", 0) as first:
        port = first.sockname[1]
    async with await listen("127.0.0.1", port) as listener:
        gate_of(listener).refuse_new()
        with pytest.raises(ConnectionRefusedError):
            dial(("127.0.0.1", port))
        gate_of(listener).listen_again()
        await meets_a_stream(listener, dial, ("127.0.0.1", port))


async def test_streams_live_on(either: Listener[Stream], dial: Dial) -> None:
    """Accepted streams work while their listener refuses, and after."""
    client = dial(either)
    stream = await either.accept()
    reading = asyncio.ensure_future(stream.read(10))
    await asyncio.sleep(0)
    gate_of(either).refuse_new()
    client.sendall(b"one")
    assert await reading == b"one"
    stream.write(b"two")
    assert await wire_end(client) == b"two"
    gate_of(either).listen_again()
    client.sendall(b"three")
    assert await stream.read(10) == b"three"
    stream.close()
    assert await wire_end(client) == "eof"


async def test_the_deferred_stay(either: Listener[Stream], dial: Dial) -> None:
    """What was taken before is decided while the gate refuses, and a caller's end is noticed."""
    clients = [dial(either) for _ in range(2)]
    with pytest.raises(ConnectionDeferredError):
        await either.accept(defer)
    pending = either.pending[0]
    # The other one is taken too, as whoever refuses has to do.
    second = gate_of(either).take()
    assert second is not None
    gate_of(either).refuse_new()
    clients[0].shutdown(socket.SHUT_WR)
    await caught_up()
    assert pending.peer_closed
    with pytest.raises(ConnectionRejectedError):
        await either.accept(reject)
    assert wire(clients[0]) == "reset"
    gate_of(either).refuse(second, b"")
    assert wire(clients[1]) == "reset"


async def test_whoever_is_queued_is_reset(either: Listener[Stream], dial: Dial) -> None:
    """Callers that nobody took before are reset by the kernel, and never offered."""
    clients = [dial(address) for address in targets(either)]
    gate_of(either).refuse_new()
    assert [wire(client) for client in clients] == ["reset"] * 2
    gate_of(either).listen_again()
    with pytest.raises(NoPendingError):
        either.accept_nowait()


async def test_nobody_waits_meanwhile(either: Listener[Stream], dial: Dial) -> None:
    """While it refuses, a gate finds nobody, tells of nobody and does not spin."""
    gate = gate_of(either)
    dial(either)
    assert gate.waiting()
    gate.refuse_new()
    told: list[None] = []
    arrived, gate._arrived = gate._arrived, lambda: told.append(None)
    for _ in range(3):
        await caught_up()
    assert not gate.waiting()
    assert gate.take() is None
    assert gate.backlog() == (0, 0)
    assert either.statistics().backlog == either.statistics().backlog_limit == 0
    if isinstance(either._watch, EpollWatch):
        assert either._watch._epoll is not None
        assert select.select([either._watch._epoll], [], [], 0)[0] == []
    assert told == []
    gate._arrived = arrived
    gate.listen_again()
    assert not gate.waiting()
    assert gate.backlog() == (0, 200)


async def test_waiting_calls_wait_on(either: Listener[Stream], dial: Dial) -> None:
    """Calls that waited before get the callers that come after, on every address."""
    addresses = targets(either)
    accepting = [asyncio.ensure_future(either.accept()) for _ in addresses]
    await asyncio.sleep(0)
    gate_of(either).refuse_new()
    await caught_up()
    gate_of(either).listen_again()
    await caught_up()
    for address, call in zip(addresses, accepting, strict=True):
        assert not call.done()
        client = dial(address)
        async with asyncio.timeout(LIMIT):
            stream = await call
        assert stream.caller_id == client.getsockname()
        stream.abort()


async def test_pending_is_told_after(listener: Listener[Stream], dial: Dial) -> None:
    """PENDING is told of the first caller after, and of nothing before."""
    told: list[Any] = []
    listener.on(Event.PENDING, lambda *args: told.append(args))
    gate_of(listener).refuse_new()
    await caught_up()
    gate_of(listener).listen_again()
    await caught_up()
    assert told == []
    dial(listener)
    await until(lambda: told)
    assert told == [(listener, Event.PENDING, None)]


async def test_twice_is_once(listener: Listener[Stream], dial: Dial) -> None:
    """Refusing again does nothing, nor does listening again without having refused."""
    gate = gate_of(listener)
    client = dial(listener)
    gate.listen_again()
    stream = await listener.accept()
    assert stream.caller_id == client.getsockname()
    stream.close()
    gate.refuse_new()
    gate.refuse_new()
    with pytest.raises(ConnectionRefusedError):
        dial(listener)
    gate.listen_again()
    client = dial(listener)
    gate.listen_again()
    stream = await listener.accept()
    assert stream.caller_id == client.getsockname()
    stream.close()


# -- the port


@pytest.mark.slow
@pytest.mark.parametrize("lives", [False, True], ids=["nobody", "a stream"])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "0.0.0.0", pytest.param("::1", marks=needs_ipv6)],  # noqa: S104
)
async def test_nobody_gets_the_port(host: str, dial: Dial, *, lives: bool) -> None:
    """Another process cannot have the port meanwhile, whatever options it has."""
    async with await listen(host, 0) as listener:
        (to,) = targets(listener)
        stream = None
        if lives:
            dial(to)
            stream = await listener.accept()
        gate_of(listener).refuse_new()
        assert await asyncio.to_thread(thieves, listener.sockname, to) == ["EADDRINUSE"] * 8
        gate_of(listener).listen_again()
        await meets_a_stream(listener, dial, to)
        if stream is not None:
            stream.abort()


async def test_a_chosen_port_was_never_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port the kernel chose is held without a gap until the listener has it."""
    bound: list[Any] = []
    still_held: list[bool] = []
    bind = socket.socket.bind
    choosers: list[socket.socket] = []

    def watched(sock: socket.socket, address: Any) -> None:
        still_held.append(all(each.fileno() >= 0 for each in choosers))
        bind(sock, address)
        if address[1] == 0:
            choosers.append(sock)
        bound.append(sock.getsockname())

    monkeypatch.setattr(socket.socket, "bind", watched)
    async with await listen("127.0.0.1", 0) as listener:
        assert bound == [listener.sockname] * 2
        assert still_held == [True, True]
        assert [each.fileno() for each in choosers] == [-1]


async def test_without_reuse_a_port_is_chosen_too(dial: Dial) -> None:
    """Who turns SO_REUSEADDR off can listen on a free port, and not refuse."""
    async with await listen("127.0.0.1", 0, options=[(*REUSE, 0)]) as listener:
        with pytest.raises(OSError, match="SO_REUSEADDR is off") as caught:
            gate_of(listener).refuse_new()
        assert caught.value.errno == errno.EOPNOTSUPP
        await meets_a_stream(listener, dial)


# -- options


async def test_options_stay(dial: Dial) -> None:
    """Options, the backlog and what connections inherit are the same afterwards."""
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 20000),
        (socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5),
        (socket.IPPROTO_IP, socket.IP_TOS, 0x20),
    ]
    names = [option[:2] for option in options]
    names += [REUSE, (socket.IPPROTO_TCP, socket.TCP_NODELAY)]
    names += [(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)]
    async with await listen("127.0.0.1", 0, backlog=7, options=options, defer_accept=3) as listener:
        before = [listener.getsockopt(*name) for name in names]
        limit = listener.statistics().backlog_limit
        gate_of(listener).refuse_new()
        gate_of(listener).listen_again()
        assert [listener.getsockopt(*name) for name in names] == before
        assert listener.statistics().backlog_limit == limit == 7
        dial(listener, data=b"x")
        stream = await listener.accept()
        inherited = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_IP, socket.IP_TOS)]
        sock = stream.get_extra_info("socket")
        assert [sock.getsockopt(*name) for name in inherited] == [1, 0x20]
        stream.abort()


async def test_connections_still_inherit_the_reset(listener: Listener[Stream], dial: Dial) -> None:
    """After listening again closing a connection is a reset still; a stream's close is none."""
    gate_of(listener).refuse_new()
    gate_of(listener).listen_again()
    client = dial(listener)
    arrival = gate_of(listener).take()
    assert arrival is not None
    assert arrival.sock.getsockopt(*LINGER, 8) == RESET
    gate_of(listener).forget(arrival)
    assert wire(client) == "reset"
    client = dial(listener)
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(reject)
    assert wire(client) == "reset"
    await meets_a_stream(listener, dial)


async def test_options_set_meanwhile(listener: Listener[Stream], dial: Dial) -> None:
    """An option set while the gate refuses is inherited afterwards."""
    gate_of(listener).refuse_new()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    gate_of(listener).listen_again()
    dial(listener)
    arrival = gate_of(listener).take()
    assert arrival is not None
    assert arrival.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    gate_of(listener).forget(arrival)


async def test_a_linger_of_ones_own_is_no_sharing(listener: Listener[Stream], dial: Dial) -> None:
    """Setting SO_LINGER on the listener leaves refusing possible."""
    five = struct.pack("ii", 1, 5)
    listener.setsockopt(*LINGER, five)
    gate_of(listener).refuse_new()
    gate_of(listener).listen_again()
    dial(listener)
    arrival = gate_of(listener).take()
    assert arrival is not None
    assert arrival.sock.getsockopt(*LINGER, 8) == five
    gate_of(listener).forget(arrival)


# -- where it cannot be


async def test_not_on_a_unix_socket(tmp_path: Path, dial: Dial) -> None:
    """A Unix socket cannot listen again, so it is not shut."""
    async with await listen(path=tmp_path / "sock") as listener:
        with pytest.raises(OSError, match=r"Unix socket.* suspend") as caught:
            gate_of(listener).refuse_new()
        assert caught.value.errno == errno.EOPNOTSUPP
        await meets_a_stream(listener, dial)


async def test_not_on_a_socket_handed_in(dial: Dial) -> None:
    """A socket that somebody else made is not shut."""
    sock = socket.create_server(("127.0.0.1", 0))
    async with Listener[Stream].from_socket(sock) as listener:
        with pytest.raises(OSError, match=r"sockets that listen\(\) made") as caught:
            gate_of(listener).refuse_new()
        assert caught.value.errno == errno.EOPNOTSUPP
        await meets_a_stream(listener, dial)


async def test_not_when_shared(listener: Listener[Stream], dial: Dial) -> None:
    """Who has asked for the listening sockets cannot have them shut, for good."""
    assert len(listener.sockets) == 1
    with pytest.raises(OSError, match=r"are shared.* suspend") as caught:
        gate_of(listener).refuse_new()
    assert caught.value.errno == errno.EOPNOTSUPP
    await meets_a_stream(listener, dial)


async def test_not_with_reuse_port(dial: Dial) -> None:
    """Where others share the port, they would get everybody: nothing is shut."""
    async with await listen("127.0.0.1", 0, reuse_port=True) as listener:
        with pytest.raises(OSError, match="with reuse_port the others") as caught:
            gate_of(listener).refuse_new()
        assert caught.value.errno == errno.EOPNOTSUPP
        await meets_a_stream(listener, dial)
    async with await listen("127.0.0.1", 0) as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="with reuse_port the others"):
            gate_of(late).refuse_new()


async def test_not_on_a_socket_that_was_shut_or_closed(either: Listener[Stream]) -> None:
    """What happened behind the listener's back is said, and the others go on listening."""
    sockets = gate_of(either).sockets
    sockets[1].shutdown(socket.SHUT_RDWR)
    with pytest.raises(NotListeningError):
        gate_of(either).refuse_new()
    sockets[1].close()
    with pytest.raises(NotASocketError):
        gate_of(either).refuse_new()
    with socket.create_connection(sockets[0].getsockname(), timeout=LIMIT):
        (await either.accept()).abort()


@pytest.mark.slow
def test_not_after_a_fork() -> None:
    """After a fork the child's copy would be shut too; a fork while refusing undoes nothing."""
    script = """
        import asyncio, os, socket
        import condaccept

        def fork():
            if not (child := os.fork()):
                os._exit(0)
            os.waitpid(child, 0)

        def call(listener):
            try:
                socket.create_connection(listener.sockname).close()
                return "in"
            except ConnectionRefusedError:
                return "refused"

        async def main():
            async with await condaccept.listen("127.0.0.1", 0) as listener:
                listener._gate.refuse_new()
                fork()
                print(call(listener))
                listener._gate.listen_again()
                print(call(listener))
                (await listener.accept()).close()
                try:
                    listener._gate.refuse_new()
                except OSError as error:
                    print(error.strerror)
                print(call(listener))
                (await listener.accept()).close()

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stderr == ""
    first, second, third, fourth = done.stdout.splitlines()
    assert (first, second, fourth) == ("refused", "in", "in")
    assert third.startswith("the listening sockets are shared")


async def test_shared_while_refusing(listener: Listener[Stream], dial: Dial) -> None:
    """A gate shared while it refuses listens again with plain sockets, and is then shared."""
    gate_of(listener).refuse_new()
    _before_fork()
    with pytest.raises(ConnectionRefusedError):
        dial(listener)
    gate_of(listener).listen_again()
    dial(listener)
    arrival = gate_of(listener).take()
    assert arrival is not None
    assert arrival.sock.getsockopt(*LINGER, 8) == OFF
    gate_of(listener).forget(arrival)
    with pytest.raises(OSError, match="are shared"):
        gate_of(listener).refuse_new()


# -- all or none


async def test_refused_on_all_or_on_none(
    either: Listener[Stream], dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one socket cannot be shut, those before it listen again."""
    addresses = targets(either)
    calls: list[int] = []
    shutdown = socket.socket.shutdown

    def second_fails(sock: socket.socket, how: int) -> None:
        calls.append(how)
        if len(calls) == 2:
            raise OSError(errno.ENOBUFS, "no")
        shutdown(sock, how)

    monkeypatch.setattr(socket.socket, "shutdown", second_fails)
    with pytest.raises(OSError, match="no") as caught:
        gate_of(either).refuse_new()
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOBUFS
    assert not hasattr(caught.value, "__notes__")
    for address in addresses * 2:
        accepting = asyncio.ensure_future(either.accept(accept))
        await asyncio.sleep(0)
        client = dial(address)
        async with asyncio.timeout(LIMIT):
            (await accepting).close()
        assert await wire_end(client) == "eof"
    gate_of(either).refuse_new()
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            dial(address)


@pytest.mark.parametrize("failing", ["listen", "register"])
async def test_listened_on_again_all_or_none(
    either: Listener[Stream], dial: Dial, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """When one socket cannot listen again, all go on refusing, and a later call can succeed."""
    addresses = targets(either)
    before = descriptors()
    gate_of(either).refuse_new()
    calls: list[Any] = []
    where: Any = socket.socket if failing == "listen" else type(either._watch)
    original = getattr(where, failing)

    def second_fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOBUFS, "no")
        original(*args)

    monkeypatch.setattr(where, failing, second_fails)
    with pytest.raises(OSError, match="no") as caught:
        gate_of(either).listen_again()
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOBUFS
    assert not hasattr(caught.value, "__notes__")
    for sock, address in zip(gate_of(either).sockets, addresses, strict=True):
        assert sock.getsockopt(*REUSE) == 0
        with pytest.raises(ConnectionRefusedError):
            dial(address)
    await caught_up()
    assert not gate_of(either).waiting()
    gate_of(either).listen_again()
    for address in addresses:
        await meets_a_stream(either, dial, address)
    assert descriptors() == before


async def test_a_connection_that_keeps_the_port(listener: Listener[Stream], dial: Dial) -> None:
    """A connection without SO_REUSEADDR delays listening again, which names the address."""
    listener.setsockopt(*REUSE, 0)
    dial(listener)
    stream = await listener.accept()
    listener.setsockopt(*REUSE, 1)
    gate_of(listener).refuse_new()
    with pytest.raises(OSError, match=str(listener.sockname[1])) as caught:
        gate_of(listener).listen_again()
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(ConnectionRefusedError):
        dial(listener)
    stream.abort()
    gate_of(listener).listen_again()
    await meets_a_stream(listener, dial)


# -- the end


async def test_close_while_refusing() -> None:
    """close() ends a listener that refuses, and leaves nothing: the port is free."""
    before = descriptors()
    listener = await listen("127.0.0.1", 0)
    address = listener.sockname
    accepting = asyncio.ensure_future(listener.accept())
    await asyncio.sleep(0)
    gate_of(listener).refuse_new()
    listener.close()
    await listener.wait_closed()
    assert isinstance((await asyncio.gather(accepting, return_exceptions=True))[0], OSError)
    async with await listen(*address) as another:
        assert another.sockname == address
    assert descriptors() <= before


# -- without a network


async def test_the_memory_gate_refuses_too() -> None:
    """The in-memory gate refuses who dials, ends who was queued, and lets in again."""
    listener, gate = memory_listener()
    async with listener:
        early = gate.dial()
        gate.refuse_new()
        gate.refuse_new()
        assert wire(early) == "eof"
        assert not gate.waiting()
        with pytest.raises(ConnectionRefusedError):
            gate.dial()
        gate.listen_again()
        gate.listen_again()
        with gate.dial() as late, early:
            stream = await listener.accept()
            stream.write(b"hello")
            stream.close()
            assert wire(late) == b"hello"
            assert wire(late) == "eof"


# -- under load


class Callers:
    """Callers in threads, each with one connection at a time, and how those ended."""

    def __init__(self, address: Any) -> None:
        self.ends = {"served": 0, "refused": 0, "reset": 0}
        self.other: list[str] = []
        self._address = address
        self._lock = threading.Lock()
        self._over = threading.Event()

    def call(self) -> None:
        """Call again and again."""
        while not self._over.is_set():
            end = self._once()
            with self._lock:
                if end in self.ends:
                    self.ends[end] += 1
                else:
                    self.other.append(end)

    def stop(self) -> None:
        """Let the calls under way be the last."""
        self._over.set()

    async def one_more(self, end: str) -> None:
        """Wait until one more has ended like that."""
        seen = self.ends[end]
        await until(lambda: self.ends[end] > seen or self.other)

    def _once(self) -> str:
        try:
            with socket.create_connection(self._address, timeout=LIMIT) as client:
                got = b""
                while chunk := client.recv(100):
                    got += chunk
        except ConnectionRefusedError:
            return "refused"
        except ConnectionResetError:
            return "reset"
        except OSError as error:
            return repr(error)
        return "served" if got == b"hi" else repr(got)


@pytest.mark.slow
async def test_hammer(listener: Listener[Stream]) -> None:
    """Under load every caller is served, refused or, in the moment of refusal, reset."""
    threads, refusals = 4, 20
    callers = Callers(listener.sockname)

    def serve_all() -> None:
        while True:
            try:
                stream = listener.accept_nowait()
            except NoPendingError:
                return
            stream.write(b"hi")
            stream.close()

    async def serve() -> None:
        while True:
            await listener.wait_pending()
            serve_all()

    serving = asyncio.ensure_future(serve())
    calling = [asyncio.ensure_future(asyncio.to_thread(callers.call)) for _ in range(threads)]
    try:
        for _ in range(refusals):
            await callers.one_more("served")
            serve_all()
            gate_of(listener).refuse_new()
            await callers.one_more("refused")
            gate_of(listener).listen_again()
        await callers.one_more("served")
    finally:
        callers.stop()
        await asyncio.gather(*calling)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert callers.other == []
    # A caller has one connection at a time, and only a refusal resets it.
    assert callers.ends["reset"] <= threads * refusals
    assert callers.ends["refused"] >= refusals
    assert listener.statistics().accepted == callers.ends["served"]
    await queued(listener, 0)
