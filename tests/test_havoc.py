"""Everything at random, by seed, over real sockets; then the books are checked."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptError,
    Defer,
    InvalidVerdictError,
    Listener,
    Outcome,
    PendingExpiredError,
    PendingResetError,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from condaccept._watch import ReaderWatch
from condaccept.gates import HandshakeGate
from condaccept.testing import MemoryGate, memory_listener
from tests.support import descriptors, reset, until, wire_end

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 1500
CALLS = 5
CLIENTS = 300
OPTIONS: dict[str, Any] = {
    "max_pending": 6,
    "max_deciding": 3,
    "defer_timeout": 0.005,
    "reject_timeout": 0.005,
}
SAID = [
    ACCEPT,
    ACCEPT,
    REJECT,
    Reject(data=b"bye" * 100),
    Reject(data=bytes(5000)),
    DEFER,
    DEFER,
    Defer(after=1.0),
    7,
]
OURS = {Status.ACCEPTED, Status.REJECTED, Status.FAILED}


class MishapError(Exception):
    """What conditions and factories raise here."""


@attrs.define(eq=False)
class Caller:
    """A client, and what it knows."""

    name: Any
    sock: socket.socket
    disturbed: bool = False
    """It has shut, closed or reset, or met an error: what it reads at the end is open."""


class Books:
    """What was offered, held, told and returned."""

    def __init__(self) -> None:
        self.offered: list[Any] = []
        self.deciding: set[Any] = set()
        self.farewells: set[Any] = set()
        self.holds: list[int] = []
        self.settled: collections.Counter[Any] = collections.Counter()
        self.watched: set[Any] = set()
        self.outcomes: list[Outcome] = []
        self.losses: collections.Counter[Any] = collections.Counter()
        self.streams: list[Stream] = []
        self.wrong: list[str] = []

    def hold(self, pending: PendingTransport) -> None:
        """Hold something for the offer under way."""
        n = len(self.holds)
        self.holds.append(0)
        pending.hold(partial(self._release, n))

    def _release(self, n: int) -> None:
        self.holds[n] += 1


class Havoc:
    """One run."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.is_tcp = kind in ("tcp", "reader")
        self.rng = random.Random(f"{kind} {seed}")  # noqa: S311 - a seeded sequence, no secret
        self.books = Books()
        self.callers: list[Caller] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.gate: MemoryGate | None = None
        self.ending = False
        self.listener: Listener[Stream]

    async def open(self) -> None:
        """Open a listener of the kind that is asked for."""
        options = {**OPTIONS, "stream_factory": self.make_stream}
        if self.rng.random() < 0.5:
            options["on_eof"] = "withdraw"
        if self.kind == "tcp":
            self.listener = await listen("127.0.0.1", 0, **options)
        elif self.kind == "reader":
            timeout = options.pop("reject_timeout")
            sock = socket.create_server(("127.0.0.1", 0), backlog=CLIENTS)
            self.listener = Listener(
                lambda loop, watch: HandshakeGate(loop, watch, [sock], reject_timeout=timeout),
                watch=ReaderWatch,
                **options,
            )
        elif self.kind == "unix":
            self.listener = await listen(path=f"\0condaccept havoc {id(self)}", **options)
        else:
            self.listener, self.gate = memory_listener(slow=True, **options)
        self.listener.on_outcome(self.books.outcomes.append)

    def make_stream(self, stream: Stream) -> Stream:
        """Refuse some streams."""
        if self.rng.random() < 0.1:
            raise MishapError
        return stream

    @property
    def closed(self) -> bool:
        """Whether the listener is."""
        return self.gate.closed if self.gate is not None else not self.listener.sockets

    # -- what callers do

    def connect(self) -> None:
        """One more caller, with a name of its own that the listener sees."""
        n = len(self.callers)
        if self.closed or sum(each.sock.fileno() >= 0 for each in self.callers) >= CLIENTS:
            return
        name: Any
        if self.gate is not None:
            name = ("192.0.2.1", n)
            sock = self.gate.dial(name)
        elif self.is_tcp:
            name = f"127.0.{n // 200 + 1}.{n % 200 + 1}"
            sock = socket.socket()
            sock.bind((name, 0))
            sock.connect(self.listener.sockname)
        else:
            name = b"\0condaccept caller %d %d" % (id(self), n)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(name)
            sock.connect(self.listener.sockname)
        sock.setblocking(False)
        self.callers.append(Caller(name, sock))

    def caller(self) -> Caller | None:
        """Choose a caller that is open."""
        there = [each for each in self.callers if each.sock.fileno() >= 0]
        return self.rng.choice(there) if there else None

    def talk(self) -> None:
        """Send, or read."""
        if (caller := self.caller()) is None:
            return
        try:
            if self.rng.random() < 0.7:
                caller.sock.send(b"x" * self.rng.choice([1, 100, 5000]))
            elif not caller.sock.recv(4096):
                caller.disturbed = True
        except BlockingIOError:
            pass
        except OSError:
            caller.disturbed = True

    def leave(self) -> None:
        """Shut one side, close, or reset."""
        if (caller := self.caller()) is None:
            return
        caller.disturbed = True
        how = self.rng.randrange(3)
        if how == 0:
            with contextlib.suppress(OSError):
                caller.sock.shutdown(socket.SHUT_WR)
        elif how == 1:
            caller.sock.close()
        else:
            reset(caller.sock)

    # -- what conditions do

    def begin(self, pending: PendingTransport) -> Any:
        """Note an offer, look around, and choose what to say."""
        books, name = self.books, self.name(pending)
        index = [each.name for each in self.callers].index(name)
        if name in books.deciding:
            books.wrong.append(f"{name} is under decision twice")
        earlier = {each.name for each in self.callers[:index]}
        for other in self.listener.pending:
            if self.name(other) in earlier and other.status in (Status.QUEUED, Status.DEFERRED):
                books.wrong.append(f"{name} was offered before {self.name(other)}")
        books.offered.append(name)
        self.use(pending, name)
        said = self.rng.choice([*SAID, MishapError()])
        if isinstance(said, Reject) or pending.callee_data:
            books.farewells.add(name)
        pending.group = "nobody's" if self.rng.random() < 0.05 else None
        return said

    def use(self, pending: PendingTransport, name: Any) -> None:
        """Do what conditions do besides deciding; towards the end, close the listener."""
        books = self.books
        for _ in range(self.rng.randrange(3)):
            books.hold(pending)
        if name not in books.watched and self.rng.random() < 0.5:
            books.watched.add(name)
            pending.on_settled(lambda _: books.settled.update([name]))
        if self.rng.random() < 0.3:
            pending.callee_data = b"told"
        if self.rng.random() < 0.3 and pending.peek(1):
            pending.consume(1)
        if self.ending and self.rng.random() < 0.3:
            if self.rng.random() < 0.5:
                self.listener.close()
            else:
                pending.hold(self.listener.close)

    def plain(self, pending: PendingTransport) -> Any:
        """Decide at once."""
        said = self.begin(pending)
        if self.rng.random() < 0.1:
            self.leave()
        if isinstance(said, MishapError):
            raise said
        return said

    async def slow(self, pending: PendingTransport) -> Any:
        """Decide after a while; now and then against a cancellation."""
        name = self.name(pending)
        said = self.begin(pending)
        self.books.deciding.add(name)
        try:
            for _ in range(self.rng.randrange(8)):
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    if self.rng.random() < 0.8:
                        raise
        finally:
            self.books.deciding.discard(name)
        if isinstance(said, MishapError):
            raise said
        return said

    def name(self, pending: PendingTransport | Outcome | AcceptError) -> Any:
        """Return the name of the caller that something is about."""
        return pending.caller_id[0] if self.is_tcp else pending.caller_id

    def told(self, error: AcceptError | MishapError) -> None:
        """Note what a call has raised."""
        if isinstance(error, (PendingResetError, PendingExpiredError)):
            self.books.losses[self.name(error)] += 1

    # -- what the service does

    async def call(self) -> None:
        """Accept, once or several times."""
        for _ in range(self.rng.randrange(1, 4)):
            condition = self.rng.choice([None, self.plain, self.slow, self.slow])
            try:
                self.books.streams.append(await self.listener.accept(condition))
            except (AcceptError, MishapError) as error:
                self.told(error)

    async def watch(self) -> None:
        """Wait for something that is due."""
        with contextlib.suppress(AcceptError):
            await self.listener.wait_pending()

    def call_at_once(self) -> None:
        """Accept without waiting; now and then with a condition that cannot be."""
        condition = self.rng.choice([None, self.plain, self.plain, self.impossible])
        try:
            self.books.streams.append(self.listener.accept_nowait(condition))
        except (AcceptError, MishapError) as error:
            self.told(error)

    async def impossible(self, _pending: PendingTransport) -> Any:
        """Never run: `accept_nowait()` cannot wait for it."""
        raise InvalidVerdictError("it ran")

    def start(self) -> None:
        """Start another call."""
        self.tasks = [each for each in self.tasks if not each.done()]
        if len(self.tasks) < CALLS:
            work = self.call if self.rng.random() < 0.85 else self.watch
            self.tasks.append(asyncio.ensure_future(work()))

    def cancel(self) -> None:
        """Cancel a call, or interrupt all that wait."""
        if self.rng.random() < 0.2:
            self.listener.cancel_accept()
        elif self.tasks:
            self.rng.choice(self.tasks).cancel()

    def admit(self) -> None:
        """Let an admission of the slow gate end."""
        if self.gate is not None and self.gate.admitting:
            self.gate.complete() if self.rng.random() < 0.8 else self.gate.fail()

    def end_stream(self) -> None:
        """Use a stream a little, and close or abort it."""
        if self.books.streams:
            stream = self.rng.choice(self.books.streams)
            with contextlib.suppress(OSError):
                stream.write(b"y" * self.rng.choice([1, 100, 100_000]))
            stream.close() if self.rng.random() < 0.7 else stream.abort()

    async def run(self) -> None:
        """Do all that, and close somewhere in the last part."""
        actions: dict[Callable[[], None], int] = {
            self.connect: 6,
            self.talk: 6,
            self.leave: 2,
            self.start: 8,
            self.call_at_once: 2,
            self.cancel: 3,
            self.admit: 4,
            self.end_stream: 3,
        }
        weights = [weight * self.rng.choice([0.5, 1, 2]) for weight in actions.values()]
        for n in range(STEPS):
            (action,) = self.rng.choices([*actions], weights)
            action()
            for _ in range(self.rng.randrange(3)):
                await asyncio.sleep(0)
            # Towards the end, conditions and releases may close the listener.
            self.ending = n > STEPS * 0.95
        for _ in range(3):
            self.connect()
            self.start()
        await asyncio.sleep(0)
        for act in self.rng.sample([self.cancel, self.listener.close, self.leave], 3):
            act()
        await self.listener.wait_closed()
        for task in self.tasks:
            if self.rng.random() < 0.3:
                task.cancel()
        await until(lambda: all(task.done() for task in self.tasks))
        for stream in self.books.streams:
            stream.abort()

    # -- what must hold

    def check(self) -> None:
        """Check the books against the statistics and against the callers."""
        books, statistics = self.books, self.listener.statistics()
        for task in self.tasks:
            assert task.cancelled() or task.exception() is None
        assert books.wrong == []
        outcomes = {self.name(each): each.status for each in books.outcomes}
        assert len(outcomes) == len(books.outcomes) == statistics.taken
        counts = collections.Counter(outcomes.values())
        for status in (*OURS, Status.RESET, Status.EXPIRED, Status.CLOSED):
            assert counts[status] == getattr(statistics, status.value)
        assert sum(counts.values()) == statistics.taken
        assert len(books.streams) == statistics.accepted
        assert self.listener.pending == ()
        now = (statistics.pending, statistics.deciding, statistics.rejecting, statistics.streams)
        assert now == (0, 0, 0, 0)
        # Taken in the order in which they came; the others were nobody's.
        assert set(outcomes) == {each.name for each in self.callers[: statistics.taken]}
        # Each loss was told once at most, and only a loss.
        assert set(books.losses.values()) <= {1}
        assert {outcomes[name] for name in books.losses} <= {Status.RESET, Status.EXPIRED}
        assert set(books.holds) == {1}
        assert books.settled == dict.fromkeys(books.watched, 1)

    def check_that_enough_happened(self) -> None:
        """Check that the run was one to learn from."""
        statistics = self.listener.statistics()
        assert statistics.taken > STEPS // 20
        assert min(statistics.accepted, statistics.rejected, statistics.failed) > 0
        assert statistics.deferrals > 0

    async def check_callers(self) -> None:
        """Check that each caller that waits reads its end, and the right one."""
        outcomes = {self.name(each): each.status for each in self.books.outcomes}
        for caller in self.callers:
            if caller.disturbed:
                continue
            seen = await wire_end(caller.sock)
            while isinstance(seen, bytes):
                assert outcomes[caller.name] in OURS
                seen = await wire_end(caller.sock)
            if self.is_tcp and caller.name not in self.books.farewells:
                status = outcomes.get(caller.name)
                assert seen == "reset" or status is Status.ACCEPTED
            caller.sock.close()

    def close(self) -> None:
        """Close the callers."""
        for caller in self.callers:
            caller.sock.close()


def handles(loop: Any) -> tuple[int, int]:
    """Return how many timers and how many descriptors asyncio's own loop has."""
    if not hasattr(loop, "_scheduled"):
        return 0, 0
    return sum(not each.cancelled() for each in loop._scheduled), len(loop._selector.get_map())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["tcp", "reader", "unix", "slow"])
async def test_havoc(kind: str, seed: int) -> None:
    """After all kinds of trouble each connection has one end and nothing is left."""
    loop = asyncio.get_running_loop()
    before = descriptors(), handles(loop), asyncio.all_tasks()
    havoc = Havoc(kind, seed)
    await havoc.open()
    try:
        await havoc.run()
        # Outcomes are told soon after.
        await asyncio.sleep(0)
        havoc.check()
        havoc.check_that_enough_happened()
        await havoc.check_callers()
    finally:
        havoc.listener.close()
        havoc.close()
    assert (descriptors(), handles(loop), asyncio.all_tasks()) == before
