"""`listen()` and `Listener.from_socket()`: from arguments to sockets, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    Accept,
    AnyVerdict,
    ConnectionDeferredError,
    ConnectionRejectedError,
    Credentials,
    Listener,
    ListenerClosedError,
    NotASocketError,
    NotListeningError,
    NotStreamSocketError,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    Reject,
    Stream,
    listen,
)
from tests.support import (
    LIMIT,
    Condition,
    Dial,
    accept,
    defer,
    descriptors,
    inode,
    queued,
    reject,
    somaxconn,
    until,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a descriptor open."""
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


def drop(things: list[Any]) -> None:
    """Forget what is in the list."""
    things.clear()
    gc.collect()


def listing(folder: Path) -> list[str]:
    """Return the names of the files in *folder*."""
    return sorted(each.name for each in folder.iterdir())


def names(listener: Listener[Any]) -> list[Any]:
    """Return the addresses that are listened on."""
    return [sock.getsockname() for sock in listener.sockets]


def resolving(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]
) -> Callable[..., object]:
    """Have names resolve to *answers*, numeric addresses."""
    loop = asyncio.get_running_loop()

    async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        found = []
        for address in answers.get(host, [host]):
            found += socket.getaddrinfo(address, port, **options)
        return found

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    return getaddrinfo


def has_ipv6() -> bool:
    """Whether this machine's loopback has an IPv6 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on the loopback interface")


# -- addresses


async def test_ipv4(dial: Dial) -> None:
    """An IPv4 address is listened on; callers have two-item addresses."""
    async with await listen("127.0.0.1", 0) as listener:
        assert listener.sockname == listener.sockets[0].getsockname()
        assert listener.sockname[0] == "127.0.0.1"
        assert listener.sockname[1] > 0
        client = dial(listener)
        stream = await listener.accept()
        assert stream.caller_id == client.getsockname()
        stream.close()


@needs_ipv6
async def test_ipv6(dial: Dial) -> None:
    """An IPv6 address is listened on; all addresses have four items."""
    seen: list[Any] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.extend([pending.caller_id, pending.callee_id, str(pending.ip)])
        return ACCEPT

    async with await listen("::1", 0) as listener:
        assert len(listener.sockname) == 4
        client = dial(listener)
        stream = await listener.accept(condition)
        assert stream.caller_id == client.getsockname()
        assert seen == [client.getsockname(), client.getpeername(), "::1"]
        assert stream.callee_id == client.getpeername()
        stream.close()


async def test_name_with_several_addresses(dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of a name is listened on, all with one port number."""
    resolving(monkeypatch, {"here.test": ["127.0.0.1", "127.0.0.2", "127.0.0.1"]})
    async with await listen("here.test", 0) as listener:
        port = listener.sockname[1]
        assert names(listener) == [("127.0.0.1", port), ("127.0.0.2", port)]
        for name in names(listener):
            client = dial(name)
            stream = await listener.accept()
            assert stream.callee_id == client.getpeername() == name
            stream.close()


@needs_ipv6
async def test_name_with_both_families(dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have addresses of both families; *family* picks one of them."""
    answers = {"both.test": ["127.0.0.1", "::1"]}
    resolving(monkeypatch, answers)
    async with await listen("both.test", 0) as listener:
        port = listener.sockname[1]
        assert [name[:2] for name in names(listener)] == [("127.0.0.1", port), ("::1", port)]
        for name in names(listener):
            dial(name)
            (await listener.accept()).close()


@needs_ipv6
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_family(family: int) -> None:
    """With *family* only addresses of that family are listened on."""
    async with await listen(None, 0, family=family) as listener:
        assert [sock.family for sock in listener.sockets] == [family]


async def test_sequence_of_hosts(dial: Dial) -> None:
    """Several hosts may be given; one that is named twice is listened on once."""
    hosts = ["127.0.0.1", "127.0.0.3", "127.0.0.1"]
    async with await listen(hosts, 0) as listener:
        port = listener.sockname[1]
        assert names(listener) == [("127.0.0.1", port), ("127.0.0.3", port)]
        dial(("127.0.0.3", port))
        (await listener.accept()).close()


@pytest.mark.parametrize("host", [None, ""])
async def test_every_address(host: str | None, dial: Dial) -> None:
    """Without a host every address of the machine is listened on."""
    async with await listen(host, 0) as listener:
        port = listener.sockname[1]
        assert ("0.0.0.0", port) in names(listener)  # noqa: S104 - that is the point
        assert {name[1] for name in names(listener)} == {port}
        for address in ("127.0.0.1", "127.0.0.9", *(["::1"] if has_ipv6() else [])):
            dial((address, port))
            stream = await listener.accept()
            assert stream.callee_id[:2] == (address, port)
            stream.close()


async def test_port_as_text() -> None:
    """A port may be the name of a service, or a number in digits."""
    async with await listen("127.0.0.1", "0") as listener:
        assert listener.sockname[1] > 0


async def test_one_number_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is taken on the second address is given up for another."""
    taken: list[int] = []
    bind = socket.socket.bind

    def refuse(self: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.2" and len(taken) < 3:
            taken.append(address[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", refuse)
    before = descriptors()
    async with await listen(["127.0.0.1", "127.0.0.2"], 0) as listener:
        port = listener.sockname[1]
        assert names(listener) == [("127.0.0.1", port), ("127.0.0.2", port)]
        assert len(taken) == 3
        assert descriptors() == before + 3  # two sockets and the watch


@pytest.mark.usefixtures("nothing_left")
async def test_one_number_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no number is free on all addresses, the error names the address."""
    tried: list[int] = []
    bind = socket.socket.bind

    def refuse(self: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.2":
            tried.append(address[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OSError, match=r"127\.0\.0\.2") as caught:
        await listen(["127.0.0.1", "127.0.0.2"], 0)
    assert caught.value.errno == errno.EADDRINUSE
    assert 1 < len(tried) < 100


async def test_turn_about(dial: Dial) -> None:
    """With callers on several sockets these are served by turns, in order on each."""
    async with await listen(["127.0.0.1", "127.0.0.2", "127.0.0.3"], 0) as listener:
        port = listener.sockname[1]
        for host, clients in (("127.0.0.1", 4), ("127.0.0.2", 2), ("127.0.0.3", 1)):
            for _ in range(clients):
                dial((host, port))
        await queued(listener, 7)
        assert listener.statistics().backlog_limit == 3 * min(4096, somaxconn())
        served = []
        for _ in range(7):
            stream = await listener.accept()
            served.append(stream.callee_id[0][-1])
            stream.close()
        assert sorted(served[:3]) == ["1", "2", "3"]
        assert sorted(served[3:5]) == ["1", "2"]
        assert served[5:] == ["1", "1"]


async def test_waiting_on_several_sockets(dial: Dial) -> None:
    """A call that waits is woken by a caller on any of the sockets."""
    async with await listen(["127.0.0.1", "127.0.0.2"], 0) as listener:
        for name in [*names(listener), *names(listener)]:
            call = asyncio.ensure_future(listener.accept())
            await asyncio.sleep(0)
            dial(name)
            stream = await call
            assert stream.callee_id == name
            stream.close()


@pytest.mark.usefixtures("nothing_left")
async def test_missing_loopback_address(dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """An IPv6 address of a name that this machine does not have is left out."""
    resolving(monkeypatch, {"localhost": ["2001:db8::1", "127.0.0.1"]})
    async with await listen("localhost", 0) as listener:
        assert [name[0] for name in names(listener)] == ["127.0.0.1"]
        client = dial(listener)
        stream = await listener.accept()
        stream.close()
        client.close()


async def test_reuse_port(dial: Dial) -> None:
    """With reuse_port a second listener may share the port, without it not."""
    async with await listen("127.0.0.1", 0, reuse_port=True) as first:
        port = first.sockname[1]
        async with await listen("127.0.0.1", port, reuse_port=True) as second:
            assert second.sockname == first.sockname
        with pytest.raises(OSError, match=str(port)) as caught:
            await listen("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE
        dial(first)
        (await first.accept()).close()


async def test_defer_accept(dial: Dial) -> None:
    """With defer_accept a caller is offered only once it has sent something."""
    async with await listen("127.0.0.1", 0, defer_accept=10) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) > 0
        quiet = dial(listener)
        talker = dial(listener, data=b"hello")
        stream = await listener.accept()
        assert stream.caller_id == talker.getsockname()
        assert listener.statistics().backlog == 0
        quiet.sendall(b"now")
        second = await listener.accept()
        assert second.caller_id == quiet.getsockname()
        stream.close()
        second.close()


async def test_backlog(dial: Dial) -> None:
    """*backlog* is how many the kernel queues; how many it has is counted."""
    async with await listen("127.0.0.1", 0, backlog=7) as listener:
        assert listener.statistics().backlog_limit == 7
        assert listener.statistics().backlog == 0
        for n in (1, 2, 3):
            dial(listener)
            await queued(listener, n)
        with pytest.raises(ConnectionRejectedError):
            await listener.accept(reject)
        assert listener.statistics().backlog == 2


async def test_rebinding_at_once(dial: Dial) -> None:
    """A port can be listened on again at once, though its connections live on."""
    listener = await listen("127.0.0.1", 0)
    name = listener.sockname
    dial(listener)
    stream = await listener.accept()
    listener.close()
    async with await listen(*name) as again:
        assert again.sockname == name
        stream.close()


# -- errors


def shown(value: Any) -> str:
    """Return the name of a case."""
    return ascii(value)[:40] if isinstance(value, dict) else ""


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "port", {"host": "127.0.0.1"}),
    (ValueError, "port", {}),
    (ValueError, "path", {"port": 0, "path": "x"}),
    (ValueError, "path", {"host": "127.0.0.1", "path": "x"}),
    (ValueError, "mode", {"port": 0, "mode": 0o600}),
    (ValueError, "reuse_port", {"path": "x", "reuse_port": True}),
    (ValueError, "defer_accept", {"path": "x", "defer_accept": 1}),
    (TypeError, "max_pending", {"port": 0, "max_pending": "many"}),
    (TypeError, "max_pending", {"port": 0, "max_pending": True}),
    (TypeError, "max_pending", {"port": 0, "max_pending": 1.5}),
    (ValueError, "max_pending", {"port": 0, "max_pending": 0}),
    (ValueError, "max_pending", {"port": 0, "max_pending": -1}),
    (TypeError, "max_deciding", {"port": 0, "max_deciding": None}),
    (ValueError, "max_deciding", {"port": 0, "max_deciding": 0}),
    (TypeError, "defer_timeout", {"port": 0, "defer_timeout": "30"}),
    (TypeError, "defer_timeout", {"port": 0, "defer_timeout": True}),
    (ValueError, "defer_timeout", {"port": 0, "defer_timeout": -1}),
    (ValueError, "defer_timeout", {"port": 0, "defer_timeout": float("nan")}),
    (TypeError, "reject_timeout", {"port": 0, "reject_timeout": "5"}),
    (ValueError, "reject_timeout", {"port": 0, "reject_timeout": -0.1}),
    (ValueError, "on_full", {"port": 0, "on_full": "panic"}),
    (ValueError, "on_eof", {"port": 0, "on_eof": "drop"}),
    (TypeError, "stream_factory", {"port": 0, "stream_factory": 5}),
    (NotImplementedError, "conditional_accept", {"port": 0, "conditional_accept": True}),
    (TypeError, "option", {"port": 0, "options": 5}),
    (TypeError, "option", {"port": 0, "options": [5]}),
    (TypeError, "option", {"port": 0, "options": [(1, 2)]}),
    (TypeError, "option", {"port": 0, "options": [(1, 2, 3, 4)]}),
    (TypeError, "option", {"port": 0, "options": [("level", 2, 3)]}),
    (TypeError, "option", {"port": 0, "options": [(1, 2, "value")]}),
    (OSError, "9999", {"port": 0, "options": [(1, 9999, 1)]}),
    (TypeError, "host", {"host": 5, "port": 0}),
    (TypeError, "host", {"host": b"127.0.0.1", "port": 0}),
    (TypeError, "host", {"host": ["127.0.0.1", 5], "port": 0}),
    (TypeError, "port", {"port": 1.5}),
    (ValueError, "port", {"port": -1}),
    (ValueError, "port", {"port": 65536}),
    (ValueError, "port", {"port": 70000}),
    (TypeError, "backlog", {"port": 0, "backlog": "many"}),
    (ValueError, "backlog", {"port": 0, "backlog": -1}),
    (TypeError, "defer_accept", {"port": 0, "defer_accept": "long"}),
    (ValueError, "defer_accept", {"port": 0, "defer_accept": -1}),
]


@pytest.mark.parametrize(("kind", "names_it", "arguments"), BAD, ids=shown)
@pytest.mark.usefixtures("nothing_left")
async def test_bad_arguments(
    kind: type[Exception],
    names_it: str,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An argument that is not what it should be is named, and nothing is left open."""
    monkeypatch.chdir(tmp_path)
    resolving(monkeypatch, {})
    with pytest.raises(kind, match=names_it):
        (await listen(**arguments)).close()
    assert listing(tmp_path) == []


BAD_UNIX: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "path", {"path": 5}),
    (OSError, "no/such", {"path": "no/such/directory"}),
    (OSError, "too long", {"path": "x" * 200}),
    (ValueError, "null", {"path": "a\0b"}),
    (TypeError, "mode", {"path": "x", "mode": "rw"}),
    (ValueError, "mode", {"path": "\0abstract", "mode": 0o600}),
    (TypeError, "backlog", {"path": "x", "backlog": "many"}),
    (TypeError, "stream_factory", {"path": "x", "stream_factory": 5}),
    (OSError, "9999", {"path": "x", "options": [(1, 9999, 1)]}),
]


@pytest.mark.parametrize(("kind", "names_it", "arguments"), BAD_UNIX, ids=shown)
@pytest.mark.usefixtures("nothing_left")
async def test_bad_unix_arguments(
    kind: type[Exception],
    names_it: str,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an error about a Unix path neither a descriptor nor a file is left."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=names_it):
        (await listen(**arguments)).close()
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("nothing_left")
async def test_taken_address_is_named() -> None:
    """An address that somebody listens on is named, and those bound before it are closed."""
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.2.*{port}") as caught:
            await listen(["127.0.0.1", "127.0.0.2"], port)
        assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.usefixtures("nothing_left")
async def test_overlapping_addresses_are_named() -> None:
    """Two addresses that cannot be listened on together are an error that names one."""
    with pytest.raises(OSError, match=r"0\.0\.0\.0|127\.0\.0\.1") as caught:
        await listen(["127.0.0.1", "0.0.0.0"], 0)  # noqa: S104 - the overlap is the point
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.usefixtures("nothing_left")
async def test_foreign_address_is_named() -> None:
    """An address that is not this machine's is named."""
    with pytest.raises(OSError, match=r"192\.0\.2\.1") as caught:
        await listen("192.0.2.1", 0)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.usefixtures("nothing_left")
async def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve is named."""

    async def getaddrinfo(*_arguments: object, **_options: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match=r"nowhere\.test"):
        await listen(["nowhere.test"], 0)


@pytest.mark.usefixtures("nothing_left")
async def test_unknown_service() -> None:
    """A service that has no number is named."""
    with pytest.raises(OSError, match="no-such-service"):
        await listen("127.0.0.1", "no-such-service")


@pytest.mark.usefixtures("nothing_left")
async def test_no_hosts() -> None:
    """An empty sequence of hosts is an error, not a listener on nothing."""
    with pytest.raises((OSError, ValueError)):
        await listen([], 0)


@pytest.mark.usefixtures("nothing_left")
async def test_cancelled_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """listen() can be cancelled while it resolves a name; nothing is left open."""
    asked = asyncio.Event()

    async def getaddrinfo(*_arguments: object, **_options: object) -> list[Any]:
        asked.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    task = asyncio.ensure_future(listen("slow.test", 0))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- Unix sockets


@pytest.mark.parametrize("spell", [str, os.fsencode, Path], ids=["str", "bytes", "path"])
@pytest.mark.usefixtures("nothing_left")
async def test_unix_path(spell: Callable[[str], Any], tmp_path: Path, dial: Dial) -> None:
    """A Unix socket is listened on under any spelling of its path, and removed at the end."""
    path = str(tmp_path / "socket")
    async with await listen(path=spell(path)) as listener:
        assert listener.sockname == path
        assert listener.statistics().backlog is None
        assert listener.statistics().backlog_limit is None
        client = dial(path, data=b"hello")
        stream = await listener.accept()
        assert await stream.read(10) == b"hello"
        stream.write(b"world")
        assert client.recv(10) == b"world"
        stream.close()
        assert await wire_end(client) == "eof"
        client.close()
        assert listing(tmp_path) == ["socket"]
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", [str, bytes])
async def test_abstract_name(kind: type, dial: Dial, tmp_path: Path) -> None:
    """A name that begins with NUL has no file."""
    name = f"\0condaccept-test-{os.getpid()}"
    async with await listen(path=name if kind is str else name.encode()) as listener:
        assert listener.sockname == name.encode()
        client = dial(name)
        stream = await listener.accept()
        assert stream.callee_id == name.encode()
        stream.close()
        assert await wire_end(client) == "eof"
    assert listing(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o666, 0o660])
async def test_mode(mode: int, tmp_path: Path) -> None:
    """*mode* is what the file's access bits are, whatever the umask is."""
    path = tmp_path / "socket"
    before = os.umask(0o077)
    try:
        async with await listen(path=path, mode=mode):
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


async def test_stale_file_is_replaced(tmp_path: Path, dial: Dial) -> None:
    """The file of a listener that is no more is replaced."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    stale = inode(str(path))
    keep = path.with_name("keep")
    keep.hardlink_to(path)  # so that the new file cannot get the same inode number
    async with await listen(path=path) as listener:
        assert inode(str(path)) != stale
        dial(str(path))
        (await listener.accept()).close()
    assert not path.exists()


@pytest.mark.parametrize("backlog", [0, 5])
@pytest.mark.usefixtures("nothing_left")
async def test_live_socket_is_refused(tmp_path: Path, backlog: int) -> None:
    """A path on which somebody listens is refused, also if the backlog there is full."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as live, contextlib.ExitStack() as stack:
        live.bind(str(path))
        live.listen(backlog)
        if backlog == 0:
            with contextlib.suppress(BlockingIOError):
                for _ in range(10):
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect(str(path))
        before = inode(str(path))
        with pytest.raises(OSError, match="socket") as caught:
            await listen(path=path)
        assert caught.value.errno == errno.EADDRINUSE
        assert inode(str(path)) == before


async def test_our_own_live_socket_is_refused(tmp_path: Path, dial: Dial) -> None:
    """Two listeners cannot have the same path, and the first is unharmed."""
    path = tmp_path / "socket"
    async with await listen(path=path) as listener:
        with pytest.raises(OSError, match="somebody listens"):
            await listen(path=path)
        assert path.is_socket()
        client = dial(str(path), data=b"x")
        # The one before it only looked whether somebody answers.
        probe = await listener.accept()
        stream = await listener.accept()
        assert await probe.read(1) == b""
        assert await stream.read(1) == b"x"
        probe.close()
        stream.close()
        client.close()


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.usefixtures("nothing_left")
async def test_other_files_are_refused(kind: str, tmp_path: Path) -> None:
    """A file that is no socket is refused, and left as it was."""
    path = tmp_path / "precious"
    path.write_text("data") if kind == "file" else path.mkdir()
    before = inode(str(path))
    with pytest.raises(FileExistsError, match="precious"):
        await listen(path=path)
    assert inode(str(path)) == before
    assert kind == "directory" or path.read_text() == "data"


async def test_replaced_file_is_kept(tmp_path: Path) -> None:
    """A file that somebody else has put in the place of ours is not removed on close."""
    path = tmp_path / "socket"
    listener = await listen(path=path)
    path.rename(tmp_path / "moved")
    successor = await listen(path=path)
    listener.close()
    assert path.is_socket()
    successor.close()
    assert not path.exists()
    assert (tmp_path / "moved").is_socket()


async def test_removed_file_is_no_error(tmp_path: Path) -> None:
    """close() does not mind that the file has gone."""
    path = tmp_path / "socket"
    listener = await listen(path=path)
    path.unlink()
    listener.close()
    await listener.wait_closed()
    assert listing(tmp_path) == []


async def test_relative_path_after_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file given by a relative path is removed though the directory was changed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    listener = await listen(path="socket")
    monkeypatch.chdir(elsewhere)
    listener.close()
    assert listing(tmp_path) == ["elsewhere"]


# -- in front of Unix sockets


@pytest.fixture
async def unix(tmp_path: Path) -> AsyncIterator[Listener[Stream]]:
    """A listener on a Unix path."""
    async with await listen(path=tmp_path / "socket") as opened:
        yield opened


async def test_unix_caller(unix: Listener[Stream], dial: Dial) -> None:
    """A Unix caller has credentials and no IP address; its name is mostly empty."""
    seen: list[Any] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.extend([pending.caller_id, pending.credentials, pending.ip, pending.callee_id])
        seen.extend([pending.peer_closed, pending.caller_data])
        return ACCEPT

    dial(unix.sockname, data=b"data")
    stream = await unix.accept(condition)
    assert seen[:4] == [
        "",
        Credentials(os.getpid(), os.getuid(), os.getgid()),
        None,
        unix.sockname,
    ]
    assert seen[4:] == [False, b"data"]
    assert stream.caller_id == ""
    assert stream.get_extra_info("peername") == ""
    stream.close()


CONNECT_AS = """
import os, socket, sys
os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[3]))
client = socket.socket(socket.AF_UNIX)
client.connect("\\0" + sys.argv[1])
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
async def test_credentials_of_another_process(*, left: bool) -> None:
    """A Unix caller's credentials are those of the process that connected, gone or not."""
    root = os.getuid() == 0
    gid, uid = (4322, 4321) if root else (os.getgid(), os.getuid())
    name = f"condaccept-credentials-{os.getpid()}"
    seen: list[Any] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.credentials)
        return DEFER if len(seen) == 1 else ACCEPT

    async with asyncio.timeout(LIMIT), await listen(path=f"\0{name}") as listener:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", CONNECT_AS, name, str(gid), str(uid)),
            stdin=asyncio.subprocess.PIPE,
        )
        await listener.wait_pending()
        if left:
            await child.communicate(b"")
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(condition)
        if not left:
            await child.communicate(b"")
        stream = await listener.accept(condition)
        assert seen == [Credentials(child.pid, uid, gid)] * 2
        stream.close()


async def test_tcp_caller_has_no_credentials(listener: Listener[Stream], dial: Dial) -> None:
    """A TCP caller has an IP address and no credentials."""
    seen: list[Any] = []

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.extend([pending.credentials, str(pending.ip)])
        return ACCEPT

    dial(listener)
    (await listener.accept(condition)).close()
    assert seen == [None, "127.0.0.1"]


@pytest.mark.parametrize("name", ["path", "abstract"])
async def test_unix_caller_with_a_name(unix: Listener[Stream], tmp_path: Path, name: str) -> None:
    """A Unix caller that is bound is known by its name; an error carries it."""
    own = str(tmp_path / "caller") if name == "path" else f"\0caller-{os.getpid()}"
    expected = own if name == "path" else own.encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.bind(own)
        client.connect(unix.sockname)
        with pytest.raises(ConnectionDeferredError) as caught:
            await unix.accept(defer)
        assert caught.value.caller_id == expected
        stream = await unix.accept()
        assert stream.caller_id == expected
        stream.close()


@pytest.mark.parametrize(("data", "seen"), [(b"", "eof"), (b"hello", "reset")])
@pytest.mark.parametrize("deferred", [False, True])
async def test_unix_reject(
    unix: Listener[Stream], dial: Dial, data: bytes, seen: str, *, deferred: bool
) -> None:
    """A rejected Unix caller reads the end, or ECONNRESET if it had sent something."""
    client = dial(unix.sockname, data=data)
    if deferred:
        with pytest.raises(ConnectionDeferredError):
            await unix.accept(defer)
    with pytest.raises(ConnectionRejectedError):
        await unix.accept(reject)
    assert await wire_end(client) == seen
    assert unix.statistics().rejected == 1


@pytest.mark.parametrize("data", [b"", b"hello"])
async def test_unix_reject_with_callee_data(
    unix: Listener[Stream], dial: Dial, data: bytes
) -> None:
    """A Unix caller reads callee data and then the end."""
    client = dial(unix.sockname, data=data)
    with pytest.raises(ConnectionRejectedError):
        await unix.accept(lambda _: Reject(data=b"too busy"))
    assert await wire_end(client) == b"too busy"
    assert await wire_end(client) == "eof"
    client.close()
    await until(lambda: unix.statistics().rejecting == 0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
async def test_unix_caller_that_closed(
    unix: Listener[Stream], dial: Dial, *, half: bool, deferred: bool
) -> None:
    """A Unix caller that closed, or half-closed, is still offered, and known as such."""
    client = dial(unix.sockname, data=b"last")
    seen: list[bool] = []
    if deferred:
        with pytest.raises(ConnectionDeferredError):
            await unix.accept(defer)
    client.shutdown(socket.SHUT_WR) if half else client.close()

    def condition(pending: PendingTransport) -> AnyVerdict:
        seen.append(pending.peer_closed)
        return ACCEPT

    stream = await unix.accept(condition)
    assert seen == [True]
    assert await stream.read() == b"last"
    stream.close()


@pytest.mark.parametrize("deferred", [False, True])
async def test_unix_caller_that_withdrew(tmp_path: Path, dial: Dial, *, deferred: bool) -> None:
    """Under on_eof="withdraw" a Unix caller that closed expires."""
    async with await listen(path=tmp_path / "socket", on_eof="withdraw") as listener:
        client = dial(listener)
        if deferred:
            with pytest.raises(ConnectionDeferredError):
                await listener.accept(defer)
        client.close()
        with pytest.raises(PendingExpiredError):
            await listener.accept(accept)
        assert listener.statistics().expired == 1
        assert listener.pending == ()


async def test_unix_caller_that_reset(unix: Listener[Stream], dial: Dial) -> None:
    """A Unix caller that closed without reading what it was sent counts as a reset."""

    def condition(pending: PendingTransport) -> AnyVerdict:
        os.write(pending.get_extra_info("socket").fileno(), b"unread")
        return DEFER

    client = dial(unix.sockname)
    with pytest.raises(ConnectionDeferredError):
        await unix.accept(condition)
    client.close()
    await until(lambda: unix.pending == ())
    assert unix.statistics().reset == 1
    with pytest.raises(PendingResetError):
        await unix.accept(accept)
    assert unix.statistics().offers == 1


async def test_unix_listener_closed(unix: Listener[Stream], dial: Dial) -> None:
    """Whoever is deferred or queued when a Unix listener closes reads an end."""
    deferred, waiting = dial(unix.sockname), dial(unix.sockname)
    with pytest.raises(ConnectionDeferredError):
        await unix.accept(defer)
    unix.close()
    assert await wire_end(deferred) == "eof"
    assert await wire_end(waiting) in ("eof", "reset")


# -- from_socket


@pytest.mark.usefixtures("nothing_left")
async def test_from_socket(dial: Dial) -> None:
    """A listener made from a socket owns it, and takes whoever is queued already."""
    sock = socket.create_server(("127.0.0.1", 0))
    name = sock.getsockname()
    early = dial(name)
    listener: Listener[Stream] = Listener.from_socket(sock)
    assert listener.sockname == name
    assert not sock.getblocking()
    stream = await listener.accept(accept, None)
    assert stream.caller_id == early.getsockname()
    stream.close()
    listener.close()
    assert sock.fileno() == -1
    early.close()
    with pytest.raises(ConnectionRefusedError):
        dial(name)


async def test_from_socket_options(dial: Dial) -> None:
    """Options given to from_socket() reach those who were queued before it."""
    sock = socket.create_server(("127.0.0.1", 0))
    early = dial(sock.getsockname())
    await until(lambda: len(early.getpeername()) == 2)
    options: list[tuple[int, int, int | bytes]] = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7)),
    ]
    opened: Listener[Stream] = Listener.from_socket(sock, options=options)
    async with opened as listener:
        stream = await listener.accept()
        of = stream.get_extra_info("socket").getsockopt
        assert of(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert of(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 7)
        stream.abort()


async def test_from_unix_socket(tmp_path: Path, dial: Dial) -> None:
    """The file of a Unix socket that somebody else made is left alone."""
    path = tmp_path / "socket"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    opened: Listener[Stream] = Listener.from_socket(sock)
    async with opened as listener:
        dial(listener)
        (await listener.accept()).close()
    assert path.is_socket()


@contextlib.contextmanager
def replaced_by_a_pipe() -> Iterator[socket.socket]:
    """Give a socket object whose descriptor is a pipe's."""
    sock = socket.create_server(("127.0.0.1", 0))
    reader, writer = os.pipe()
    os.dup2(reader, sock.fileno())
    os.close(reader)
    try:
        yield sock
    finally:
        os.close(writer)
        os.close(sock.detach())


@pytest.mark.usefixtures("nothing_left")
async def test_from_a_pipe() -> None:
    """A descriptor that is no socket is a NotASocketError."""
    with replaced_by_a_pipe() as sock:
        with pytest.raises(NotASocketError) as caught:
            Listener.from_socket(sock)
        assert caught.value.errno == errno.ENOTSOCK
        assert sock.fileno() >= 0


async def test_from_a_closed_socket() -> None:
    """A closed socket is a NotASocketError."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.close()
    with pytest.raises(NotASocketError):
        Listener.from_socket(sock)


@pytest.mark.usefixtures("nothing_left")
async def test_from_something_else() -> None:
    """What is no socket object is a TypeError that shows it."""
    for bad in (5, None, "socket"):
        with pytest.raises(TypeError, match=repr(bad)):
            Listener.from_socket(bad)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_left")
async def test_from_a_socket_that_cannot_accept() -> None:
    """Datagram sockets, and stream sockets that do not listen, are refused and left open."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        with pytest.raises(NotStreamSocketError) as wrong:
            Listener.from_socket(datagram)
        assert wrong.value.errno == errno.EOPNOTSUPP
        assert datagram.fileno() >= 0
    ours, theirs = socket.socketpair()
    with socket.socket() as fresh, ours, theirs:
        for sock in (fresh, ours):
            with pytest.raises(NotListeningError) as idle:
                Listener.from_socket(sock)
            assert idle.value.errno == errno.EINVAL
            assert sock.fileno() >= 0


BAD_FOR_A_SOCKET = [
    (kind, names_it, {k: v for k, v in arguments.items() if k != "port"})
    for kind, names_it, arguments in BAD
    if set(arguments) - {"port"}
    and not set(arguments)
    & {"host", "path", "mode", "conditional_accept", "backlog", "reuse_port", "defer_accept"}
]


@pytest.mark.parametrize(("kind", "names_it", "arguments"), BAD_FOR_A_SOCKET, ids=shown)
@pytest.mark.usefixtures("nothing_left")
async def test_bad_arguments_of_from_socket(
    kind: type[Exception], names_it: str, arguments: dict[str, Any], dial: Dial
) -> None:
    """After an error from_socket() leaves the socket to its caller, usable."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with pytest.raises(kind, match=names_it):
            Listener.from_socket(sock, **arguments)
        with dial(sock.getsockname()):
            sock.accept()[0].close()
            assert sock.getblocking()


# -- the end


@pytest.mark.usefixtures("nothing_left")
async def test_close(dial: Dial) -> None:
    """close() ends everything but the streams; facts of a closed listener are empty."""
    listener = await listen("127.0.0.1", 0)
    name = listener.sockname
    assert name is not None
    assert str(name[1]) in repr(listener)
    listener.close()
    listener.close()
    assert listener.sockets == ()
    assert listener.sockname is None
    assert listener.pending == ()
    assert "closed" in repr(listener)
    now = listener.statistics()
    assert (now.backlog, now.backlog_limit, now.taken) == (None, None, 0)
    with pytest.raises(ListenerClosedError):
        listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    with pytest.raises(ListenerClosedError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with pytest.raises(ListenerClosedError):
        await listener.accept()
    with pytest.raises(ListenerClosedError):
        listener.accept_nowait()
    with pytest.raises(ListenerClosedError):
        await listener.wait_pending()
    assert listener.cancel_accept() == 0
    await listener.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        dial(name)


async def test_sockets_are_to_look_at(listener: Listener[Stream]) -> None:
    """The sockets that a listener shows can be asked, not used up."""
    (sock,) = listener.sockets
    assert sock.getsockname() == listener.sockname
    assert sock.family == socket.AF_INET
    assert not hasattr(sock, "accept")
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    assert len(listener.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == 8


@pytest.mark.usefixtures("nothing_left")
async def test_async_with(dial: Dial) -> None:
    """``async with`` closes at its end, also when its body raises."""
    listener = await listen("127.0.0.1", 0)

    async def serve() -> None:
        async with listener as same:
            assert same is listener
            with dial(listener):
                with pytest.raises(ConnectionDeferredError):
                    await listener.accept(Condition(DEFER))
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await serve()
    assert listener.sockets == ()
    assert listener.pending == ()


async def test_wait_closed() -> None:
    """wait_closed() waits for close(), for several tasks, and does not close by itself."""
    listener = await listen("127.0.0.1", 0)
    tasks = [asyncio.ensure_future(listener.wait_closed()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert listener.sockname is not None
    listener.close()
    await tasks[1]
    await tasks[2]


async def test_wait_closed_waits_for_decisions(dial: Dial) -> None:
    """wait_closed() returns only when the decisions that close() cancelled have ended."""
    listener = await listen("127.0.0.1", 0)
    dial(listener)
    ended: list[str] = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            ended.append("condition")
        return ACCEPT

    call = asyncio.ensure_future(listener.accept(condition))
    await until(lambda: listener.statistics().deciding)
    listener.close()
    await listener.wait_closed()
    assert ended == ["condition"]
    with pytest.raises(ListenerClosedError):
        await call


@pytest.mark.usefixtures("nothing_left")
async def test_forgotten_listener() -> None:
    """A listener that is dropped without close() warns, and its sockets are closed."""
    listeners = [await listen("127.0.0.1", 0)]
    with pytest.warns(ResourceWarning, match="unclosed listener"):
        drop(listeners)


async def test_closed_listener_does_not_warn(dial: Dial, recwarn: pytest.WarningsRecorder) -> None:
    """A listener that was closed is dropped in silence."""
    listener = await listen("127.0.0.1", 0)
    dial(listener)
    (await listener.accept(lambda _: Accept())).close()
    listener.close()
    del listener
    gc.collect()
    assert [str(each.message) for each in recwarn] == []


async def test_a_family_for_a_path(tmp_path: Path) -> None:
    """A family that is not that of Unix sockets is refused beside a path."""
    with pytest.raises(ValueError, match="family"):
        await listen(path=tmp_path / "s", family=socket.AF_INET6)
    async with await listen(path=tmp_path / "s", family=socket.AF_UNIX):
        pass


async def test_hosts_from_a_generator() -> None:
    """The hosts may come from anything that can be iterated, once."""
    async with await listen((each for each in ("127.0.0.1", "::1")), 0) as listener:
        assert len(listener.sockets) == 2


def test_closed_after_its_loop(tmp_path: Path) -> None:
    """A listener can be closed when its loop is closed already; nothing of it stays open."""
    path = tmp_path / "s"

    async def main() -> tuple[Listener[Stream], socket.socket]:
        listener = await listen(path=path)
        listener.on_outcome(lambda _: None)
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        with pytest.raises(ConnectionDeferredError):
            await listener.accept(lambda _: DEFER)
        return listener, client

    with socket.socket() as probe:
        before = descriptors()
        assert probe.fileno() >= 0
        loop = asyncio.new_event_loop()
        listener, client = loop.run_until_complete(main())
        loop.close()
        listener.close()
        assert client.recv(1) == b""
        client.close()
        assert not path.exists()
        assert descriptors() == before
