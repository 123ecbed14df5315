"""Both ends of a stream at random, by seed; the model is two byte strings."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import random
import socket
import termios
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs
import pytest

from condaccept import Event, Listener, Stream
from condaccept._watch import EpollWatch, ReaderWatch
from condaccept.gates import HandshakeGate
from tests.support import LIMIT, caught_up, descriptors, reset, turns, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SEEDS: Final = 25
STEPS: Final = 120
TASKS: Final = 6
ALL: Final = Event.READ | Event.WRITE | Event.CLOSE
FAMILIES: Final = {"tcp": socket.AF_INET, "unix": socket.AF_UNIX}
WATCHES: Final[dict[str, type[EpollWatch | ReaderWatch]]] = {
    "epoll": EpollWatch,
    "reader": ReaderWatch,
}
KINDS: Final[list[Callable[[bytes], bytes | bytearray | memoryview]]] = [
    bytes,
    bytearray,
    memoryview,
]


@attrs.frozen
class Read:
    """read(n)."""

    n: int

    def __call__(self, stream: Stream) -> Awaitable[bytes]:
        """Make the call."""
        return stream.read(self.n)

    def is_last(self, data: bytes) -> bool:
        """Whether what it returned tells of the end of the stream."""
        return self.n < 0 or (self.n > 0 and not data)

    def check(self, data: bytes) -> None:
        """Check what it returned before the end of the stream."""
        assert len(data) <= self.n


@attrs.frozen
class ReadExactly:
    """readexactly(n)."""

    n: int

    def __call__(self, stream: Stream) -> Awaitable[bytes]:
        """Make the call."""
        return stream.readexactly(self.n)

    def is_last(self, _data: bytes) -> bool:
        """Whether what it returned tells of the end of the stream."""
        return False

    def check(self, data: bytes) -> None:
        """Check what it returned before the end of the stream."""
        assert len(data) == self.n


@attrs.frozen
class ReadUntil:
    """readuntil(separator)."""

    separator: bytes
    limit: int

    def __call__(self, stream: Stream) -> Awaitable[bytes]:
        """Make the call."""
        return stream.readuntil(self.separator, limit=self.limit)

    def is_last(self, _data: bytes) -> bool:
        """Whether what it returned tells of the end of the stream."""
        return False

    def check(self, data: bytes) -> None:
        """Check what it returned before the end of the stream."""
        assert data.find(self.separator) == len(data) - len(self.separator) <= self.limit


@attrs.frozen
class ReadLine:
    """readline(), without a limit: what that drops could not be counted."""

    def __call__(self, stream: Stream) -> Awaitable[bytes]:
        """Make the call."""
        return stream.readline(limit=2**30)

    def is_last(self, data: bytes) -> bool:
        """Whether what it returned tells of the end of the stream."""
        return not data.endswith(b"\n")

    def check(self, data: bytes) -> None:
        """Check what it returned before the end of the stream."""
        assert data.count(b"\n") == 1


Call: TypeAlias = Read | ReadExactly | ReadUntil | ReadLine
AMOUNTS: Final = [0, 1, 3, 100, 5000, 70_000]
LIMITS: Final = [1, 2, 3, 5, 8, 13, 50, 200_000]
SEPARATORS: Final = [b"\n", b"\r\n", b"ba", b"aab"]
READS: Final[dict[str, Callable[[random.Random], Call]]] = {
    "read": lambda rng: Read(rng.choice(AMOUNTS)),
    "all": lambda _: Read(-1),
    "readexactly": lambda rng: ReadExactly(rng.choice(AMOUNTS)),
    "readuntil": lambda rng: ReadUntil(rng.choice(SEPARATORS), rng.choice(LIMITS)),
    "readline": lambda _: ReadLine(),
}


class Havoc:
    """One connection, its two ends, and the byte string of each direction."""

    def __init__(self, stream: Stream, client: socket.socket, rng: random.Random) -> None:
        self.stream = stream
        self.client = client
        self.rng = rng
        self.tasks: list[asyncio.Task[None]] = []
        # What the client has sent, and how many bytes of it were read here.
        self.theirs = bytearray()
        self.read = 0
        self.at_end = False
        # What was written here, and how many bytes of it the client has read.
        self.ours = bytearray()
        self.got = 0
        self.client_at_end = False
        # What the ends have done to the connection:
        self.shut = False  # the client sends no more
        self.gone = False  # the client has reset or closed
        self.wrote_eof = False
        self.closed = False
        self.whole = True  # nothing has happened that may cost bytes on their way
        self.draining = 0  # calls that wait for room
        # Who subscribed is owed a READ for what waits, once after each read.
        self.told: list[tuple[Event, OSError | None]] = []
        self.subscribed = False
        self.knows = False

    def data(self, sizes: list[int]) -> bytes:
        """Return some bytes, with separators in them if they are few."""
        size = self.rng.choice(sizes)
        if size > 200:
            return self.rng.randbytes(size)
        return bytes(self.rng.choices(b"ab\r\n", [6, 6, 1, 2], k=size))

    # -- the client

    def client_sends(self) -> None:
        """Send what the kernel takes of a random piece."""
        if self.shut or self.gone:
            return
        data = self.data([1, 1, 2, 2, 5, 5, 30, 100, 1000, 30_000])
        try:
            sent = self.client.send(data)
        except BlockingIOError:
            return
        except ConnectionError:
            assert self.closed
            self.whole = False
            return
        self.theirs += data[:sent]
        if self.closed:
            self.whole = False  # nobody will read it: the kernel may reset

    def client_receives(self) -> None:
        """Receive a random amount, and compare it."""
        if self.gone or self.client_at_end:
            return
        try:
            data = self.client.recv(self.rng.choice([1, 10, 1000, 100_000]))
        except BlockingIOError:
            return
        except ConnectionResetError:
            assert self.closed
            assert not self.whole
            self.client_at_end = True
            return
        assert data == self.ours[self.got : self.got + len(data)]
        self.got += len(data)
        if not data:
            assert self.wrote_eof or self.closed
            assert not self.whole or self.got == len(self.ours)
            self.client_at_end = True

    def client_shuts(self) -> None:
        """Send the end of the stream."""
        if not self.gone:
            with contextlib.suppress(OSError):
                self.client.shutdown(socket.SHUT_WR)
            self.shut = True

    def client_leaves(self) -> None:
        """Reset, or close."""
        if not self.gone:
            self.gone, self.whole = True, False
            reset(self.client) if self.rng.random() < 0.6 else self.client.close()

    # -- this side

    def start(self, operation: Callable[[], Awaitable[None]]) -> None:
        """Have a task do something, in no time at all now and then."""
        task = asyncio.ensure_future(self.does(operation))
        self.tasks.append(task)

    async def does(self, operation: Callable[[], Awaitable[None]]) -> None:
        """Do something; by a timeout it ends as by a cancellation."""
        if self.rng.random() < 0.1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await operation()
        else:
            await operation()

    def failed(self, task: asyncio.Task[None]) -> bool:
        """Raise what a task has met that is against the model."""
        if not task.cancelled():
            task.result()
        return False

    def judge(self, error: OSError) -> None:
        """Check that an error blames who did it."""
        if isinstance(error, ConnectionAbortedError):
            assert self.closed
            assert error.__cause__ is None
        else:
            assert self.gone
            assert error.errno in (errno.ECONNRESET, errno.EPIPE)
            assert isinstance(error.__cause__, OSError)
            assert error.__cause__.__traceback__ is None

    def starts_to_read(self) -> None:
        """Start one of the calls that read; another one may be under way."""
        name = self.rng.choices([*READS], [4, 1 if self.shut else 0.3, 2, 2, 2])[0]
        self.start(lambda: self.reads(name))

    async def reads(self, name: str) -> None:
        """Read, and compare."""
        busy = self.stream._reading
        call = READS[name](self.rng)
        complete = True
        try:
            data = await call(self.stream)
        except asyncio.IncompleteReadError as error:
            data, complete = error.partial, False
        except asyncio.LimitOverrunError as error:
            self.check_overrun(call, error)
            return
        except RuntimeError:
            assert busy
            return
        except OSError as error:
            self.judge(error)
            return
        assert not busy
        assert data == self.theirs[self.read : self.read + len(data)]
        self.read += len(data)
        self.knows = self.knows and call == Read(0)
        if not complete or call.is_last(data):
            self.at_end = True
            assert self.shut or self.gone
            assert self.read == len(self.theirs)
        else:
            call.check(data)

    def check_overrun(self, call: Call, error: asyncio.LimitOverrunError) -> None:
        """Check that so many bytes are there, and no separator in them."""
        assert isinstance(call, ReadUntil)
        assert call.limit < error.consumed <= len(self.theirs) - self.read
        assert call.separator not in self.theirs[self.read : self.read + error.consumed]

    def writable(self) -> bool:
        """Whether a write is to be tried; one that cannot be is to say why."""
        if not (self.wrote_eof or self.closed):
            return True
        with pytest.raises((OSError, RuntimeError)) as caught:
            self.stream.write(b"refused")
        if isinstance(caught.value, OSError):
            self.judge(caught.value)
        return False

    def writes(self) -> None:
        """Write, be it nothing."""
        if self.writable():
            data = self.data([0, 1, 100, 5000, 100_000])
            self.ours += data  # before: of what raises a part may have gone
            try:
                self.stream.write(self.rng.choice(KINDS)(data))
            except OSError as error:
                self.judge(error)

    def starts_to_send(self) -> None:
        """Start a send()."""
        self.start(self.sends)

    async def sends(self) -> None:
        """Send: once and whole, though cancelled."""
        if self.writable():
            data = self.data([0, 1, 5000, 100_000, 400_000])
            self.ours += data
            await self.drains(lambda: self.stream.send(data))

    def starts_to_drain(self) -> None:
        """Start a drain()."""
        self.start(lambda: self.drains(self.stream.drain))

    def starts_to_wait(self) -> None:
        """Start a wait_closed()."""
        self.start(lambda: self.waits(self.stream.wait_closed))

    async def drains(self, call: Callable[[], Awaitable[None]]) -> None:
        """Wait for room, for as long as there is none."""
        self.draining += 1
        try:
            await self.waits(call)
        finally:
            self.draining -= 1

    async def waits(self, call: Callable[[], Awaitable[None]]) -> None:
        """Wait for this side."""
        try:
            await call()
        except OSError as error:
            self.judge(error)

    def writes_eof(self) -> None:
        """Half-close."""
        try:
            self.stream.write_eof()
        except OSError as error:
            self.judge(error)
        else:
            self.wrote_eof = True

    def closes(self) -> None:
        """Close; the kernel resets if something waits there that nobody has read."""
        if self.read + len(self.stream._inbox) < len(self.theirs):
            self.whole = False
        self.closed = True
        self.stream.close()
        assert self.stream.is_closing()

    def aborts(self) -> None:
        """Abort."""
        self.closed, self.whole = True, False
        self.stream.abort()

    def subscribes(self) -> None:
        """Subscribe, once."""
        if not (self.subscribed or self.closed):
            self.subscribed = True
            self.stream.on(ALL, self.tell)

    def tell(self, _stream: Stream, event: Event, error: OSError | None) -> None:
        """Note an event."""
        self.told.append((event, error))
        self.knows = self.knows or event is Event.READ

    def cancels(self) -> None:
        """Cancel a task."""
        if self.tasks:
            self.rng.choice(self.tasks).cancel()

    async def settles(self) -> None:
        """See go on whoever can: the flush, who waits for it, a read, who is to be told."""
        stream = self.stream

        def over() -> bool:
            return self.closed or self.gone

        def flushed() -> bool:
            self.client_receives()
            return not stream._buffer or self.gone or stream._sock.fileno() < 0

        await until(flushed)
        await until(lambda: over() or not self.draining)
        await until(lambda: over() or not stream._reading or not unread(stream))

        def owed() -> bool:
            # A call that was started before may begin to read only now.
            waits = bool(stream._inbox or unread(stream)) and not stream._reading
            return self.subscribed and waits and not (self.knows or self.at_end)

        await until(lambda: over() or not owed())

    async def run(self) -> None:
        """Do all that, then end it."""
        actions: dict[Callable[[], None], float] = {
            self.client_sends: 8,
            self.client_receives: 8,
            self.client_shuts: 0.3,
            self.client_leaves: 0.2,
            self.starts_to_read: 10,
            self.writes: 4,
            self.starts_to_send: 3,
            self.starts_to_drain: 1,
            self.starts_to_wait: 0.3,
            self.writes_eof: 0.2,
            self.closes: 0.2,
            self.aborts: 0.2,
            self.subscribes: 1,
            self.cancels: 5,
        }
        weights = [weight * self.rng.choice([0.5, 1, 2]) for weight in actions.values()]
        for _ in range(STEPS):
            (action,) = self.rng.choices([*actions], weights)
            if len(self.tasks) < TASKS or not action.__name__.startswith("starts"):
                action()
            self.tasks = [each for each in self.tasks if not each.done() or self.failed(each)]
            await turns(self.rng.randrange(3))
            if self.rng.random() < 0.1:
                await self.settles()
        await self.finish()

    async def finish(self) -> None:
        """Have both sides end the connection in peace, if they still can."""
        self.client_shuts()

        def heard() -> bool:
            self.client_receives()
            return self.gone or self.client_at_end

        hearing = asyncio.ensure_future(until(heard))
        if self.rng.random() < 0.5:
            self.writes_eof()
        if not self.closed:
            if self.rng.random() < 0.5:
                for task in self.tasks:
                    task.cancel()
            await until(lambda: not (self.draining or self.stream._reading))
            await self.reads("all")
            if self.wrote_eof:
                await hearing
            assert self.at_end or self.gone
            self.closes()
        await self.waits(self.stream.wait_closed)
        await hearing
        await until(lambda: all(task.done() for task in self.tasks))
        for task in self.tasks:
            self.failed(task)
        assert not self.whole or self.got == len(self.ours)
        await caught_up()
        self.check_events()

    def check_events(self) -> None:
        """The end was told at most once, and blames nobody for a clean one."""
        closes = [error for event, error in self.told if event is Event.CLOSE]
        assert len(closes) <= 1
        if self.subscribed and self.at_end and not self.gone:
            assert closes == [None]
        for error in closes:
            assert error is None or self.gone


def unread(stream: Stream) -> int:
    """Return how many bytes the kernel has for *stream*; none if it is closed."""
    count = array.array("i", [0])
    if stream._sock.fileno() >= 0:
        fcntl.ioctl(stream._sock.fileno(), termios.FIONREAD, count)
    return count[0]


def callbacks(listener: Listener[Stream]) -> dict[int, Any]:
    """Return what a listener's watch has registered, by descriptor."""
    registered: dict[int, Any] = vars(listener._watch)["_callbacks"]
    return registered


def tune(sock: Any, rng: random.Random) -> None:
    """Make the kernel's buffers small now and then, so that both sides are held up."""
    if rng.random() < 0.6:
        # Of a TCP that receives into a small buffer, probes of its window set the pace.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, rng.choice([10_000, 60_000]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("family", FAMILIES)
async def test_havoc(family: str, watch: str, seed: int) -> None:
    """Whatever both ends do, bytes come once, whole and in order, and nothing is left."""
    rng = random.Random(f"{family} {watch} {seed}")  # noqa: S311 - a seeded sequence, no secret
    before = descriptors()
    sock = socket.socket(FAMILIES[family])
    sock.bind(("127.0.0.1", 0) if family == "tcp" else f"\0condaccept stream havoc {id(sock)}")
    sock.listen()
    opened: Listener[Stream] = Listener(
        lambda loop, set_: HandshakeGate(loop, set_, [sock]), watch=WATCHES[watch]
    )
    async with asyncio.timeout(LIMIT), opened as listener:
        with socket.socket(FAMILIES[family]) as client:
            tune(client, rng)
            client.connect(listener.sockname)
            client.setblocking(False)
            stream = await listener.accept()
            tune(stream.get_extra_info("socket"), rng)
            registered = stream._sock.fileno()
            havoc = Havoc(stream, client, rng)
            try:
                await havoc.run()
            finally:
                stream.abort()
                for task in havoc.tasks:
                    task.cancel()
                await asyncio.gather(*havoc.tasks, return_exceptions=True)
        assert registered not in callbacks(listener)
        assert stream not in listener._watch.needed
        assert listener.statistics().streams == 0
    assert descriptors() == before
