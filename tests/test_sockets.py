"""What the kernel is told and asked about a socket."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import ConnectionRejectedError, Listener, Stream, _open, listen
from condaccept._pending import Peer
from condaccept._sockets import OwnedSocket, backlog, credentials, linger, peer, raw_accept
from tests.support import Dial, queued, reject, until, wire

if TYPE_CHECKING:
    from collections.abc import Callable

OFF = struct.pack("ii", 0, 0)
FIVE = struct.pack("ii", 1, 5)
LINGER = (socket.SOL_SOCKET, socket.SO_LINGER)


class PublicOnly:
    """A listening socket that has only the public half of socket.socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.accept: Callable[[], tuple[socket.socket, Any]] = sock.accept


def linger_of(stream: Stream) -> bytes:
    """Return SO_LINGER of an accepted connection."""
    found: bytes = stream.get_extra_info("socket").getsockopt(*LINGER, 8)
    return found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_both_ways_of_accepting_agree(family: socket.AddressFamily) -> None:
    """The fast way to accept and the public one give the same: a descriptor, an address."""
    host = "127.0.0.1" if family is socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as server:
        for taken_from in (server, PublicOnly(server)):
            with socket.create_connection(server.getsockname()[:2]) as client:
                fd, address = raw_accept(taken_from)()  # type: ignore[arg-type]
                with socket.socket(fileno=fd) as accepted:
                    assert address == client.getsockname()
                    assert accepted.getpeername() == client.getsockname()
                    assert not os.get_inheritable(fd)


def test_owned_socket_releases_once() -> None:
    """The release is called once, when the descriptor has gone, whichever way it goes."""
    released: list[int] = []

    def owned() -> OwnedSocket:
        ours, theirs = socket.socketpair()
        theirs.close()
        sock = OwnedSocket(socket.AF_UNIX, socket.SOCK_STREAM, 0, ours.detach())
        fd = sock.fileno()
        sock.own(lambda: released.append(fd), OwnedSocket.close)
        return sock

    def gone(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError as error:
            return error.errno == errno.EBADF
        return False

    sock = owned()
    fd = sock.fileno()
    sock.close()
    sock.close()
    assert released == [fd]
    assert gone(fd)

    sock = owned()
    fd = sock.detach()
    sock.close()
    assert released[1:] == [fd]
    assert not gone(fd)
    os.close(fd)

    sock = owned()
    fd = sock.fileno()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del sock
    assert released[2:] == [fd]
    assert gone(fd)


def test_owned_socket_without_an_owner() -> None:
    """One that nobody owns yet can be closed all the same."""
    sock = OwnedSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.close()
    assert sock.fileno() == -1


def test_peer_of_a_unix_socket() -> None:
    """A Unix peer is there, shut once it has closed, gone if it left bytes unread."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer(ours, tcp=False) is Peer.THERE
        theirs.shutdown(socket.SHUT_WR)
        assert peer(ours, tcp=False) is Peer.SHUT
        ours.send(b"unread")
        theirs.close()
        assert peer(ours, tcp=False) is Peer.GONE


def test_what_is_known_of_unix_sockets_alone() -> None:
    """Credentials are known of Unix sockets, the depth of the queue is not."""
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as server:
        found = credentials(ours)
        assert found is not None
        assert (found.pid, found.uid, found.gid) == (os.getpid(), os.getuid(), os.getgid())
        assert credentials(server) is None
        assert backlog(ours) is None
        assert backlog(server) is not None


async def test_a_stream_has_the_linger_asked_for(dial: Dial) -> None:
    """Connections of the listener's own sockets reset when closed, but never an accepted one."""
    async with await listen("127.0.0.1", 0) as listener:
        assert listener.getsockopt(*LINGER, 8) == OFF
        dial(listener)
        stream = await listener.accept()
        assert linger_of(stream) == OFF
        stream.close()

        dial(listener)
        await queued(listener, 1)
        listener.setsockopt(*LINGER, FIVE)
        assert listener.getsockopt(*LINGER, 8) == FIVE
        assert listener.getsockopt(*LINGER) == 1
        for _ in range(2):
            stream = await listener.accept()
            assert linger_of(stream) == FIVE
            stream.abort()
            dial(listener)
        client = dial(listener)
        for _ in range(2):
            with pytest.raises(ConnectionRejectedError):
                await listener.accept(reject)
        assert wire(client) == "reset"


async def test_linger_among_the_options(dial: Dial) -> None:
    """SO_LINGER given to listen() is what a stream has."""
    async with await listen("127.0.0.1", 0, options=[(*LINGER, FIVE)]) as listener:
        dial(listener)
        stream = await listener.accept()
        assert linger_of(stream) == FIVE
        stream.abort()


async def test_a_socket_handed_in_keeps_its_linger(dial: Dial) -> None:
    """A socket that others may share is not changed, and rejections from it reset too."""
    server = socket.create_server(("127.0.0.1", 0))
    async with Listener[Stream].from_socket(server) as listener:
        assert server.getsockopt(*LINGER, 8) == OFF
        client = dial(listener)
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(reject)
        assert wire(client) == "reset"


async def test_a_rejected_caller_that_was_looked_at(listener: Listener[Stream], dial: Dial) -> None:
    """A rejection resets whether or not the condition asked anything of the socket."""
    client = dial(listener, data=b"x")

    def look(pending: Any) -> Any:
        assert pending.callee_id == listener.sockname
        return reject(pending)

    await until(lambda: listener.statistics().backlog == 1)
    with pytest.raises(ConnectionRejectedError):
        await listener.accept(look)
    assert wire(client) == "reset"


async def test_connections_inherit_the_reset_from_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reset is set before listen(2): it is fixed when the handshake completes."""
    seen: list[bytes] = []
    listen_on = _open._listen

    def look(sock: socket.socket, backlog: int) -> None:
        seen.append(linger(sock))
        listen_on(sock, backlog)

    monkeypatch.setattr(_open, "_listen", look)
    async with await listen("127.0.0.1", 0):
        assert seen == [struct.pack("ii", 1, 0)]


async def test_a_descriptor_that_may_leave_the_process(dial: Dial) -> None:
    """Who asks for the listening sockets gets plain ones; rejections reset all the same."""
    async with await listen("127.0.0.1", 0) as listener:
        early = dial(listener)
        (sock,) = listener.sockets
        assert sock.getsockopt(*LINGER, 8) == OFF
        late = dial(listener)
        for _ in range(2):
            with pytest.raises(ConnectionRejectedError):
                await listener.accept(reject)
        assert wire(early) == wire(late) == "reset"
        listener.setsockopt(*LINGER, FIVE)
        assert sock.getsockopt(*LINGER, 8) == FIVE
        dial(listener)
        stream = await listener.accept()
        assert linger_of(stream) == FIVE
        stream.abort()


async def test_options_of_the_first_socket(dial: Dial) -> None:
    """getsockopt() reads the first listening socket, whoever was served last."""
    async with await listen(["127.0.0.1", "::1"], 0) as listener:
        for _ in range(3):
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET
            dial(listener)
            (await listener.accept()).close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_shares_a_plain_socket() -> None:
    """A child that accepts from an inherited socket loses no data; the parent still resets."""
    script = """
        import asyncio, os, socket
        import condaccept

        SIZE = 3_000_000

        def everything(client):
            got = 0
            while data := client.recv(65536):
                got += len(data)
            return got

        def serve_one(fd):
            # As a server that knows nothing of condaccept would.
            server = socket.socket(fileno=fd)
            server.setblocking(True)
            connection, _ = server.accept()
            connection.sendall(b"x" * SIZE)
            connection.close()
            os._exit(0)

        async def main():
            closed = await condaccept.listen("127.0.0.1", 0)
            closed.close()
            listener = await condaccept.listen("127.0.0.1", 0)
            fd = listener._gate.sockets[0].fileno()
            if not (child := os.fork()):
                serve_one(fd)
            client = socket.create_connection(listener.sockname)
            assert await asyncio.to_thread(everything, client) == SIZE
            client.close()
            os.waitpid(child, 0)
            client = socket.create_connection(listener.sockname)
            try:
                await listener.accept(lambda pending: condaccept.REJECT)
            except condaccept.ConnectionRejectedError:
                pass
            try:
                client.recv(1)
            except ConnectionResetError:
                print("reset")
            client.close()
            client = socket.create_connection(listener.sockname)
            stream = await listener.accept()
            stream.write(b"whole")
            stream.close()
            print(client.recv(10), client.recv(10))
            client.close()
            listener.close()

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("reset\nb'whole' b''\n", "")
