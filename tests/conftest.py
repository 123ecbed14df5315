"""Both loops for every async test, clients that are closed, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import uvloop
from hypothesis import settings

from condaccept import Listener, Stream, listen
from condaccept._watch import EpollWatch, ReaderWatch
from condaccept.gates import HandshakeGate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.support import Dial

# Deterministic: the same examples at every run, and no deadline, since no test is timed.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")


def pytest_asyncio_loop_factories(
    config: pytest.Config,  # noqa: ARG001 - the hook's form
    item: pytest.Item,  # noqa: ARG001 - the same
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test on both loops."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
async def _nothing_reported() -> AsyncIterator[None]:
    """Fail a test during which the loop was told of an error nobody handled."""
    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    yield
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
    assert not reported, f"reported to the loop: {reported}"


@pytest.fixture
def dial() -> Iterator[Dial]:
    """Connect blocking clients, which are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def connect(to: Listener[Any] | Any, *, data: bytes = b"") -> socket.socket:
            address = to.sockname if isinstance(to, Listener) else to
            if isinstance(address, tuple):
                client = socket.create_connection(address[:2], timeout=10)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(10)
                client.connect(address)
            stack.callback(client.close)
            if data:
                client.sendall(data)
            return client

        yield connect


@pytest.fixture
async def listener() -> AsyncIterator[Listener[Stream]]:
    """A listener on 127.0.0.1, closed at the end of the test."""
    async with await listen("127.0.0.1", 0) as opened:
        yield opened


@pytest.fixture(params=[EpollWatch, ReaderWatch], ids=["epoll", "reader"])
async def either(request: pytest.FixtureRequest) -> AsyncIterator[Listener[Stream]]:
    """A listener over either kind of watch."""
    sock = socket.create_server(("127.0.0.1", 0))
    opened: Listener[Stream] = Listener(
        lambda loop, watch: HandshakeGate(loop, watch, [sock]), watch=request.param
    )
    async with opened:
        yield opened


@pytest.fixture
async def pair(either: Listener[Stream], dial: Dial) -> AsyncIterator[tuple[Stream, socket.socket]]:
    """A stream and its client, over either kind of watch."""
    client = dial(either)
    stream = await either.accept()
    yield stream, client
    stream.abort()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """What signs the certificates of this run."""
    return trustme.CA()


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """The TLS of a server named localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """The TLS of a client that trusts it."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def exhaust() -> Iterator[Callable[[], Callable[[], None]]]:
    """Take every free descriptor of this process; the result gives them back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []

    def give_back() -> None:
        while held:
            os.close(held.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def take_all() -> Callable[[], None]:
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        for _ in range(highest + 2):
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                assert error.errno == errno.EMFILE  # noqa: PT017 - a loop that ends this way
                return give_back
        pytest.fail("there is no end of descriptors")

    yield take_all
    give_back()
