"""Listening sockets from a service manager, and passed on to a successor."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import os
import resource
import socket
import struct
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ConnectionDeferredError,
    DescriptorsExhaustedError,
    Listener,
    ListenerClosedError,
    NotASocketError,
    NotListeningError,
    NotStreamSocketError,
    Stream,
    _inherited,
    inherited_sockets,
    listen,
    receive_sockets,
    send_listener,
)
from condaccept.gates import HandshakeGate
from condaccept.testing import memory_listener
from tests.support import LIMIT, Dial, accept, caught_up, defer, descriptors, inode, until, wire_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
BASE = 700
"""The first number in place of 3, which is taken in a process that runs tests."""


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a descriptor open."""
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


# -- sockets handed down by number


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """How to hand descriptors to this process, as a service manager does."""
    monkeypatch.setattr(_inherited, "FIRST", BASE)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    placed: list[int] = []

    def hand(*given: Any, **variables: str) -> None:
        for each in given:
            fd = each if isinstance(each, int) else each.fileno()
            placed.append(BASE + len(placed))
            os.dup2(fd, placed[-1], inheritable=True)
            if not isinstance(each, int):
                each.close()
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", str(len(given)))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield hand
    for fd in placed:
        with contextlib.suppress(OSError):
            os.close(fd)


def close_all(sockets: Sequence[tuple[str, socket.socket]]) -> None:
    """Close what was handed down."""
    for _, sock in sockets:
        sock.close()


async def test_inherited(handed: Any, tmp_path: Path, dial: Dial) -> None:
    """Sockets come in the order given, with names, family and type, and can be listened on."""
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "sock"))
    unix.listen()
    udp = socket.socket(type=socket.SOCK_DGRAM)
    names = [tcp.getsockname(), unix.getsockname(), udp.getsockname()]
    handed(tcp, unix, udp, LISTEN_FDNAMES="http:admin:http")
    found = inherited_sockets()
    assert [name for name, _ in found] == ["http", "admin", "http"]
    assert [(sock.family, sock.type, sock.fileno()) for _, sock in found] == [
        (socket.AF_INET, socket.SOCK_STREAM, BASE),
        (socket.AF_UNIX, socket.SOCK_STREAM, BASE + 1),
        (socket.AF_INET, socket.SOCK_DGRAM, BASE + 2),
    ]
    assert [sock.getsockname() for _, sock in found] == names
    assert not any(sock.get_inheritable() for _, sock in found)
    for _, sock in found[:2]:
        async with Listener[Stream].from_socket(sock) as listener:
            dial(listener)
            (await listener.accept()).close()
    with pytest.raises(NotStreamSocketError):
        Listener.from_socket(found[2][1])
    close_all(found)
    assert inherited_sockets() == ()


@pytest.mark.parametrize("unset", [True, False])
def test_unset(handed: Any, *, unset: bool) -> None:
    """The variables are removed, so that no child takes them for its own, unless asked not to."""
    handed(socket.socket(), LISTEN_PIDFDID="7", LISTEN_FDNAMES="one")
    close_all(inherited_sockets(unset=unset))
    assert [name in os.environ for name in VARIABLES] == [not unset] * 4


def test_without_names(handed: Any) -> None:
    """A manager that gives no names leaves each socket unknown."""
    handed(socket.socket(), socket.socket())
    found = inherited_sockets()
    assert [name for name, _ in found] == ["unknown"] * 2
    close_all(found)


def test_an_empty_name(handed: Any) -> None:
    """A name may be empty."""
    handed(socket.socket(), socket.socket(), LISTEN_FDNAMES=":b")
    found = inherited_sockets()
    assert [name for name, _ in found] == ["", "b"]
    close_all(found)


@pytest.mark.parametrize("missing", ["LISTEN_PID", "LISTEN_FDS"])
def test_not_activated(handed: Any, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Without both variables there is nothing, and the other one is removed."""
    handed(socket.socket())
    monkeypatch.delenv(missing)
    assert inherited_sockets() == ()
    assert not any(name in os.environ for name in VARIABLES)


def test_for_another_process(handed: Any) -> None:
    """What is for another process is left alone: its descriptors are not looked at."""
    handed(socket.socket(), LISTEN_PID=str(os.getppid()))
    assert inherited_sockets(unset=False) == ()
    assert os.get_inheritable(BASE)
    assert inherited_sockets() == ()
    assert "LISTEN_PID" not in os.environ


@pytest.mark.parametrize("value", ["", "0", "-1", "x", "1.0", " 1", "1_0", "٣", str(2**31)])
@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
def test_malformed_numbers(handed: Any, name: str, value: str) -> None:
    """A number that is none is an error that names the variable and the value."""
    handed(socket.socket(), **{name: value})
    with pytest.raises(ValueError, match=f"^{name} is a positive number, got '{value}'$"):
        inherited_sockets()
    assert os.get_inheritable(BASE)


@pytest.mark.parametrize("names", ["", "a", "a:b:c"])
def test_names_for_other_than_the_sockets(handed: Any, names: str) -> None:
    """There is a name for each socket or an error."""
    handed(socket.socket(), socket.socket(), LISTEN_FDNAMES=names)
    with pytest.raises(ValueError, match=r"^LISTEN_FDNAMES has \d names for the 2 sockets"):
        inherited_sockets()
    assert os.get_inheritable(BASE)


def test_a_descriptor_that_is_no_socket(handed: Any) -> None:
    """A descriptor that is no socket is named; nothing is closed, nor changed."""
    read, write = os.pipe()
    handed(socket.socket(), read, socket.socket())
    os.close(read)
    os.close(write)
    with pytest.raises(NotASocketError, match=f"descriptor {BASE + 1} is not a socket"):
        inherited_sockets()
    assert all(os.get_inheritable(BASE + n) for n in range(3))


def test_a_descriptor_that_is_closed(handed: Any) -> None:
    """More descriptors announced than there are is an error that names the first missing."""
    handed(socket.socket(), LISTEN_FDS="1000000")
    with pytest.raises(NotASocketError, match=f"descriptor {BASE + 1} is not a socket"):
        inherited_sockets()
    assert os.get_inheritable(BASE)


ACTIVATE = """
    import os, sys
    fd = int(sys.argv[1])
    if fd != 3:
        os.dup2(fd, 3)
    os.set_inheritable(3, True)
    os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[2]))
    os.environ["LISTEN_FDS"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "dev", "-W", "error", "-c", sys.argv[3]])
"""

ACTIVATED = """
    import asyncio, os, subprocess, sys
    import condaccept

    CHILD = "import condaccept; print(condaccept.inherited_sockets())"

    found = condaccept.inherited_sockets()
    print([name for name, _ in found], 'LISTEN_FDS' in os.environ, flush=True)

    async def main():
        for name, sock in found:
            async with condaccept.Listener.from_socket(sock) as listener:
                async with await listener.accept() as stream:
                    await stream.send(b'activated')

    asyncio.run(main())
    subprocess.run([sys.executable, '-c', CHILD], check=True, timeout=60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("other", [0, 1], ids=["ours", "another's"])
def test_activated_as_a_service_manager_does(other: int) -> None:
    """A process started with a socket as number 3 serves who was queued; its children do not."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=LIMIT) as client,
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(ACTIVATE),
                str(server.fileno()),
                str(other),
                textwrap.dedent(ACTIVATED),
            ],
            pass_fds=[server.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == ""
        if other:
            assert done.stdout == "[] False\n()\n"
        else:
            assert done.stdout == "['unknown'] False\n()\n"
            assert client.recv(100) == b"activated"


# -- passed on to a successor


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a control connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


@contextlib.asynccontextmanager
async def succeeding(sockets: Sequence[socket.socket]) -> AsyncIterator[list[Listener[Stream]]]:
    """Listen on every socket that was passed on."""
    listeners = [Listener[Stream].from_socket(sock) for sock in sockets]
    try:
        yield listeners
    finally:
        for each in listeners:
            each.close()


def is_there(path: str) -> bool:
    """Whether there is such a file."""
    return os.path.exists(path)


async def pass_on(
    listener: Listener[Any], ends: tuple[socket.socket, socket.socket]
) -> tuple[socket.socket, ...]:
    """Pass a listener's sockets on, and return what the other end got."""
    async with asyncio.timeout(LIMIT):
        _, sockets = await asyncio.gather(
            send_listener(listener, ends[0]), receive_sockets(ends[1])
        )
    return sockets


async def failing(call: Any) -> BaseException:
    """Return what *call* raises."""
    task = asyncio.ensure_future(call)
    await asyncio.wait([task], timeout=LIMIT)
    error: BaseException | None = task.exception()
    assert error is not None
    return error


async def serves(listener: Listener[Stream], dial: Dial, to: Any = None) -> None:
    """Assert that a caller gets in, and gets what it is sent whole."""
    client = dial(to or listener)
    async with asyncio.timeout(LIMIT):
        stream = await listener.accept()
    stream.write(b"x" * 1000)
    stream.close()
    assert await wire_end(client) == b"x" * 1000
    assert await wire_end(client) == "eof"
    client.close()


async def test_passed_on(ends: Any, dial: Dial) -> None:
    """The successor has the same sockets, serves who was queued, and nobody is reset."""
    listener = await listen(["127.0.0.1", "127.0.0.2"], 0, options=[(1, socket.SO_KEEPALIVE, 1)])
    names = [sock.getsockname() for sock in listener._gate.sockets]
    early = [dial(name) for name in names]
    sockets = await pass_on(listener, ends)
    assert [sock.getsockname() for sock in sockets] == names
    assert not any(sock.get_inheritable() for sock in sockets)
    late = [dial(name) for name in names]
    listener.close()
    async with succeeding(sockets) as successors:
        for each, client, other in zip(successors, early, late, strict=True):
            for caller in (client, other):
                stream = await each.accept()
                assert stream.caller_id == caller.getsockname()
                assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                # Those queued before had inherited that a close is a reset.
                stream.write(b"x" * 1000)
                stream.close()
                assert await wire_end(caller) == b"x" * 1000
                assert await wire_end(caller) == "eof"
            await serves(each, dial)


async def test_both_serve_until_the_sender_closes(
    listener: Listener[Stream], ends: Any, dial: Dial
) -> None:
    """After passing them on, the sender can still take; its deferred and streams are its own."""
    dial(listener)
    stream = await listener.accept()
    waiting = dial(listener)
    with pytest.raises(ConnectionDeferredError):
        await listener.accept(defer)
    sockets = await pass_on(listener, ends)
    await serves_deferred(listener, waiting)
    await serves(listener, dial)
    async with succeeding(sockets) as (successor,):
        listener.close()
        await serves(successor, dial)
    stream.write(b"still here")
    stream.abort()


async def serves_deferred(listener: Listener[Stream], client: socket.socket) -> None:
    """Assert that a deferred caller is let in."""
    stream = await listener.accept(accept)
    stream.write(b"at last")
    stream.close()
    assert await wire_end(client) == b"at last"


async def test_marked_as_shared(listener: Listener[Stream], ends: Any) -> None:
    """A listener whose sockets another process may have cannot shut them any more."""
    for sock in await pass_on(listener, ends):
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 0, 0)
        sock.close()
    with pytest.raises(OSError, match="are shared"):
        listener._gate.refuse_new()


async def test_the_file_goes_to_the_successor(tmp_path: Path, ends: Any, dial: Dial) -> None:
    """The sender's close() leaves the file of a Unix socket, and so does the successor's."""
    path = str(tmp_path / "sock")
    listener = await listen(path=path)
    before = inode(path)
    early = dial(path)
    sockets = await pass_on(listener, ends)
    listener.close()
    assert inode(path) == before
    async with succeeding(sockets) as (successor,):
        (await successor.accept()).close()
        assert await wire_end(early) == "eof"
        await serves(successor, dial, path)
    assert inode(path) == before
    async with await listen(path=path) as third:
        await serves(third, dial, path)


async def test_generations(ends: Any, dial: Dial) -> None:
    """Sockets can be passed on again and again over one control connection."""
    listener: Listener[Stream] = await listen("127.0.0.1", 0)
    for _ in range(5):
        (sock,) = await pass_on(listener, ends)
        listener.close()
        listener = Listener.from_socket(sock)
        await serves(listener, dial)
    listener.close()


async def test_nothing_else_is_read(listener: Listener[Stream], ends: Any) -> None:
    """What the application says on control before and after stays in its place."""
    ours, theirs = ends
    ours.send(b"before")
    assert theirs.recv(6) == b"before"
    sending = asyncio.ensure_future(send_listener(listener, ours))
    receiving = asyncio.ensure_future(receive_sockets(theirs))
    await sending
    ours.send(b"after")
    (sock,) = await receiving
    sock.close()
    theirs.send(b"thanks")
    assert (theirs.recv(100), ours.recv(100)) == (b"after", b"thanks")


@contextlib.contextmanager
def many(n: int) -> Iterator[Listener[Stream]]:
    """Listen on *n* sockets."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    listener: Listener[Stream] = Listener(
        lambda loop, watch: HandshakeGate(loop, watch, sockets, lingers=[b"\0" * 8] * n)
    )
    try:
        yield listener
    finally:
        listener.close()


async def test_as_many_as_one_message_takes(ends: Any) -> None:
    """253 sockets go at once; one more is an error, and then nothing was sent or marked."""
    with many(253) as listener:
        names = [sock.getsockname() for sock in listener._gate.sockets]
        sockets = await pass_on(listener, ends)
        assert [sock.getsockname() for sock in sockets] == names
        for sock in sockets:
            sock.close()
    with many(254) as listener:
        with pytest.raises(ValueError, match="at most 253 sockets; the listener has 254"):
            await send_listener(listener, ends[0])
        with pytest.raises(BlockingIOError):
            ends[1].recv(1)
        listener._gate.refuse_new()


async def relay(source: socket.socket, target: socket.socket) -> None:
    """Pass everything on, byte by byte; descriptors travel with the byte they came with."""
    while True:
        try:
            data, rights, _, _ = source.recvmsg(1, 1024)
        except BlockingIOError:
            await asyncio.sleep(0)
            continue
        if not data:
            return
        target.sendmsg([data], [(level, kind, bytes(raw)) for level, kind, raw in rights])
        for _, _, raw in rights:
            for fd in array.array("i", raw):
                os.close(fd)


async def test_in_pieces(listener: Listener[Stream], ends: Any, dial: Dial) -> None:
    """However few bytes control takes at once, the sockets come over whole."""
    ours, theirs = ends
    far, near = socket.socketpair()
    with far, near:
        far.setblocking(False)
        near.setblocking(False)
        relaying = asyncio.gather(relay(theirs, near), relay(near, theirs))
        (sock,) = await pass_on(listener, (ours, far))
        ours.shutdown(socket.SHUT_WR)
        far.shutdown(socket.SHUT_WR)
        await relaying
    listener.close()
    async with succeeding([sock]) as (successor,):
        await serves(successor, dial)


async def test_a_control_that_is_full(listener: Listener[Stream], ends: Any, dial: Dial) -> None:
    """With no room on control the sender waits, and a listener closed meanwhile sends nothing."""
    ours, theirs = ends
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += ours.send(bytes(65536))

    def drain(n: int) -> None:
        while n:
            n -= len(theirs.recv(min(n, 65536)))

    sending = asyncio.ensure_future(send_listener(listener, ours))
    await caught_up()
    assert not sending.done()
    drain(filled)
    (sock,) = await receive_sockets(theirs)
    await sending
    sock.close()
    await serves(listener, dial)

    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += ours.send(bytes(65536))
    sending = asyncio.ensure_future(send_listener(listener, ours))
    await caught_up()
    listener.close()
    drain(filled)
    assert isinstance(await failing(sending), OSError)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


# -- what can go wrong


async def test_a_receiver_without_descriptors(ends: Any, dial: Dial) -> None:
    """Too few descriptors for all: the receiver keeps none, the sender is told and serves on."""
    async with await listen(["127.0.0.1", "127.0.0.2", "127.0.0.3"], 0) as listener:
        sending = asyncio.ensure_future(send_listener(listener, ends[0]))
        await caught_up()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(ends[0].fileno())
        os.close(free)
        before = descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
        try:
            error = await failing(receive_sockets(ends[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(error, DescriptorsExhaustedError)
        assert "1 of 3 sockets could be received" in str(error)
        assert "127.0.0.3" in str(error)
        assert descriptors() == before
        told = await failing(sending)
        assert isinstance(told, ConnectionAbortedError)
        assert "1 of 3 sockets could be received" in str(told)
        for name in [each.getsockname() for each in listener.sockets]:
            await serves(listener, dial, name)
        # The same connection will do for another try.
        for sock in await pass_on(listener, ends):
            sock.close()


@pytest.mark.parametrize("when", ["before", "behind the sockets"])
async def test_a_receiver_that_dies(tmp_path: Path, ends: Any, dial: Dial, when: str) -> None:
    """A receiver that goes away leaves the sender with everything, its file included."""
    ours, theirs = ends
    path = str(tmp_path / "sock")
    listener = await listen(path=path)
    if when == "before":
        theirs.close()
        error = await failing(send_listener(listener, ours))
    else:
        sending = asyncio.ensure_future(send_listener(listener, ours))
        await caught_up()
        theirs.close()
        error = await failing(sending)
    assert isinstance(error, ConnectionError)
    await serves(listener, dial)
    listener.close()
    assert not is_there(path)


@pytest.mark.parametrize("acknowledged", [False, True])
async def test_a_sender_that_is_cancelled(
    tmp_path: Path, ends: Any, dial: Dial, *, acknowledged: bool
) -> None:
    """A cancelled sender owns everything, and a receiver never takes itself for its successor."""
    ours, theirs = ends
    path = str(tmp_path / "sock")
    listener = await listen(path=path)
    before = descriptors()
    sending = asyncio.ensure_future(send_listener(listener, ours))
    await caught_up()
    receiving = asyncio.ensure_future(receive_sockets(theirs))
    if acknowledged:
        # One step: it has received and answered. The sender was not told yet.
        await asyncio.sleep(0)
        assert descriptors() == before + 1
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await caught_up()
    assert not receiving.done()
    ours.close()
    assert isinstance(await failing(receiving), ConnectionResetError)
    await serves(listener, dial)
    listener.close()
    assert not is_there(path)


@pytest.mark.parametrize("sent", [False, True])
async def test_a_receiver_that_is_cancelled(ends: Any, *, sent: bool) -> None:
    """A receiver cancelled before the sender's last word keeps nothing, and takes no more."""
    ours, theirs = ends
    receiving = asyncio.ensure_future(receive_sockets(theirs))
    await asyncio.sleep(0)
    before = descriptors()
    if sent:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ours.fileno()]))]
        ours.sendmsg([frame(1, 1, "x")], rights)
        await until(lambda: descriptors() == before + 1)
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert descriptors() == before
    ours.send(b"something else")
    await caught_up()
    assert theirs.recv(100) == b"something else"


async def test_a_listener_closed_during_the_call(tmp_path: Path, ends: Any) -> None:
    """Who closes the listener before the receiver has answered passes nothing on."""
    ours, theirs = ends
    listener = await listen(path=tmp_path / "sock")
    sending = asyncio.ensure_future(send_listener(listener, ours))
    await caught_up()
    listener.close()
    receiving = asyncio.ensure_future(receive_sockets(theirs))
    assert isinstance(await failing(sending), ListenerClosedError)
    ours.close()
    assert isinstance(await failing(receiving), ConnectionResetError)


def frame(
    kind: int, count: int, text: str = "", *, magic: bytes = b"CAcc", version: int = 1
) -> bytes:
    """Return a message of the hand-over."""
    return struct.pack("!4sBBHI", magic, version, kind, count, len(text)) + text.encode()


BAD_FRAMES = {
    "not ours": (b"GET / HTTP/1.1\r\n", "not from send_listener"),
    "version": (frame(1, 1, "x", version=2), "speaks version 2 of the hand-over, not 1"),
    "kind": (frame(2, 1), "expected sockets, got 'received'"),
    "unknown kind": (frame(77, 1), "expected sockets, got 77"),
    "no sockets": (frame(1, 0), "0 sockets with 0 names"),
    "names": (frame(1, 1, "a\nb"), "1 sockets with 2 names"),
    "too long": (struct.pack("!4sBBHI", b"CAcc", 1, 1, 1, 2**31), "are allowed"),
    "not text": (struct.pack("!4sBBHI", b"CAcc", 1, 1, 1, 1) + b"\xff", "decode"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_receiver_of_nonsense(ends: Any, name: str) -> None:
    """What is no message of ours is an error; the descriptors in it are closed; the sender told."""
    ours, theirs = ends
    data, reason = BAD_FRAMES[name]
    before = descriptors()
    ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 0]))])
    error = await failing(receive_sockets(theirs))
    assert isinstance(error, ValueError)
    assert reason in str(error)
    assert descriptors() == before
    told = ours.recv(1000)
    assert told[:6] == frame(4, 0)[:6]
    assert reason.encode() in told


async def test_descriptors_nobody_announced(ends: Any) -> None:
    """More descriptors than the message names are an error, and closed."""
    ours, theirs = ends
    before = descriptors()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ours.fileno()] * 3))]
    ours.sendmsg([frame(1, 1, "x")], rights)
    error = await failing(receive_sockets(theirs))
    assert isinstance(error, ValueError)
    assert "3 descriptors came, the message names 1" in str(error)
    assert descriptors() == before
    ours.recv(1000)
    whole = frame(1, 1, "x")
    for n in range(3):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))]
        ours.sendmsg([whole[n : n + 1]], rights)
    error = await failing(receive_sockets(theirs))
    assert isinstance(error, ValueError)
    assert "more than 253 descriptors" in str(error)
    assert descriptors() == before


async def test_a_descriptor_that_comes_and_is_no_socket(ends: Any) -> None:
    """A receiver that is sent something else than sockets keeps nothing of it."""
    ours, theirs = ends
    before = descriptors()
    rights = array.array("i", [ours.fileno(), os.open(os.devnull, os.O_RDONLY)])
    ours.sendmsg([frame(1, 2, "a\nb")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    os.close(rights[1])
    error = await failing(receive_sockets(theirs))
    assert isinstance(error, NotASocketError)
    assert descriptors() == before
    assert b"is not a socket" in ours.recv(1000)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (frame(2, 7), "expected 'received 1', got 'received' 7"),
        (frame(3, 1), "expected 'received 1', got 'yours' 1"),
        (b"HTTP/1.1 400 ", "not from send_listener"),
    ],
)
async def test_a_sender_that_hears_nonsense(
    listener: Listener[Stream], ends: Any, dial: Dial, answer: bytes, reason: str
) -> None:
    """An answer that is none is an error; descriptors in it are closed, the listener serves on."""
    ours, theirs = ends
    before = descriptors()
    theirs.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    error = await failing(send_listener(listener, ours))
    assert isinstance(error, ValueError)
    assert reason in str(error)
    assert descriptors() == before
    await serves(listener, dial)


async def test_a_receiver_that_is_not_told(listener: Listener[Stream], ends: Any) -> None:
    """Without the sender's last word the receiver keeps nothing."""
    ours, theirs = ends
    before = descriptors()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ours.fileno()]))]
    ours.sendmsg([frame(1, 1, "x")], rights)
    ours.send(frame(3, 2))
    error = await failing(receive_sockets(theirs))
    assert isinstance(error, ValueError)
    assert "expected 'yours 1', got 'yours' 2" in str(error)
    assert descriptors() == before
    assert not listener._deciding.closed


async def test_control_is_checked(listener: Listener[Stream], ends: Any) -> None:
    """Control is a non-blocking Unix stream socket; else both calls say what is wrong."""
    ours, _ = ends
    blocking, other = socket.socketpair()
    datagram, another = socket.socketpair(type=socket.SOCK_DGRAM)
    with blocking, other, datagram, another, socket.socket() as tcp:
        for control, kind, reason in (
            (7, TypeError, "control is a socket.socket"),
            (tcp, ValueError, "control is a Unix stream socket"),
            (datagram, ValueError, "control is a Unix stream socket"),
            (blocking, ValueError, "setblocking"),
        ):
            bad: Any = control
            for call in (receive_sockets(bad), send_listener(listener, bad)):
                error = await failing(call)
                assert isinstance(error, kind)
                assert reason in str(error)
    # A closed one is an error of the kernel's.
    closed, end = socket.socketpair()
    closed.setblocking(False)
    closed.close()
    end.close()
    assert isinstance(await failing(receive_sockets(closed)), OSError)
    listener._gate.refuse_new()  # nothing was marked by calls that could not be made
    assert ours.fileno() >= 0


async def test_listeners_that_cannot_be_passed_on(ends: Any) -> None:
    """A closed listener, one without sockets and one that refuses are errors; nothing is sent."""
    listener = await listen("127.0.0.1", 0)
    listener._gate.refuse_new()
    assert isinstance(await failing(send_listener(listener, ends[0])), NotListeningError)
    listener._gate.listen_again()
    listener._gate.refuse_new()
    listener.close()
    assert isinstance(await failing(send_listener(listener, ends[0])), ListenerClosedError)
    memory, _ = memory_listener()
    error = await failing(send_listener(memory, ends[0]))
    assert isinstance(error, ValueError)
    assert "no listening sockets" in str(error)
    memory.close()
    with pytest.raises(BlockingIOError):
        ends[1].recv(1)


# -- another process


SUCCESSOR = """
    import asyncio, socket, sys
    import condaccept

    async def main():
        control = socket.socket(fileno=int(sys.argv[1]))
        control.setblocking(False)
        with control:
            (sock,) = await condaccept.receive_sockets(control)
        async with condaccept.Listener.from_socket(sock) as listener:
            for _ in range(int(sys.argv[2])):
                async with await listener.accept() as stream:
                    await stream.send(b"x" * 1000)

    asyncio.run(main())
"""


@contextlib.contextmanager
def another_process(*command: str, control: socket.socket) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python with *control*, which is closed here; end it, whatever happens."""
    strict = (sys.executable, "-X", "dev", "-W", "error", "-c")
    with control:
        process = subprocess.Popen(
            [*strict, *command], stdin=subprocess.PIPE, pass_fds=[control.fileno()]
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_successor_in_another_process(
    tmp_path: Path, ends: Any, dial: Dial, *, unix: bool
) -> None:
    """Another process serves those queued here, and those who come when this one has closed."""
    where: dict[str, Any] = {"path": tmp_path / "sock"} if unix else {"port": 0}
    listener = await listen(None if unix else "127.0.0.1", **where)
    address = listener.sockname
    clients = [dial(address) for _ in range(3)]
    ours, theirs = ends
    command = (textwrap.dedent(SUCCESSOR), str(theirs.fileno()), "6")
    with another_process(*command, control=theirs) as successor:
        async with asyncio.timeout(LIMIT):
            await send_listener(listener, ours)
        listener.close()
        clients += [dial(address) for _ in range(3)]
        for client in clients:
            assert await wire_end(client) == b"x" * 1000
            assert await wire_end(client) == "eof"
        assert await asyncio.to_thread(successor.wait, LIMIT) == 0


@pytest.mark.slow
async def test_a_successor_that_is_killed(
    listener: Listener[Stream], ends: Any, dial: Dial
) -> None:
    """A successor that dies before it has answered costs nobody anything."""
    early = dial(listener)
    ours, theirs = ends
    with another_process("input()", control=theirs) as successor:
        sending = asyncio.ensure_future(send_listener(listener, ours))
        await caught_up()
        assert not sending.done()
        successor.kill()
        assert isinstance(await failing(sending), ConnectionError)
    stream = await listener.accept()
    assert stream.caller_id == early.getsockname()
    stream.close()
    await serves(listener, dial)
