"""Out of descriptors: no storm, no silent close, no dead loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from condaccept import (
    ACCEPT,
    AcceptError,
    AnyVerdict,
    Defer,
    Episode,
    Limit,
    Listener,
    NotASocketError,
    NotListeningError,
    Outcome,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from condaccept._exhaustion import FIRST, LONGEST, Exhaustion
from condaccept.testing import ScriptedSocket
from tests.support import LIMIT, accept, caught_up, logged, queued, turns, until, wire_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from tests.support import Dial

# -- pure


class ExhaustionMachine(RuleBasedStateMachine):
    """Attempts that fail and succeed, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.exhaustion = Exhaustion()
        self.now = 0.0
        self.since: float | None = None
        self.most: int | None = None
        self.last = 0.0

    @rule(waiting=st.none() | st.integers(0, 300), passed=st.floats(0, 10))
    def fail(self, waiting: int | None, passed: float) -> None:
        """Only the first failure is a beginning."""
        self.now += passed
        begun = self.exhaustion.failed(self.now, "none left", waiting)
        if self.since is None:
            assert begun == Episode("none left", waiting, 0.0)
            self.since, self.most, self.last = self.now, waiting, 0.0
        else:
            assert begun is None
            known = [n for n in (self.most, waiting) if n is not None]
            self.most = max(known, default=None)

    @rule()
    def pause(self) -> None:
        """Pauses double, between two bounds."""
        pause = self.exhaustion.pause()
        assert pause == (min(2 * self.last, LONGEST) if self.last else FIRST)
        self.last = pause

    @rule()
    def succeed(self) -> None:
        """A success is no end, but the next pause is short."""
        self.exhaustion.succeeded()
        self.last = 0.0

    @rule(passed=st.floats(0, 10))
    def catch_up(self, passed: float) -> None:
        """One end for each beginning."""
        self.now += passed
        ended = self.exhaustion.caught_up(self.now)
        if self.since is None:
            assert ended is None
        else:
            assert ended == Episode("none left", self.most, self.now - self.since)
            self.since = None

    @invariant()
    def known(self) -> None:
        """It is under way between the two."""
        assert self.exhaustion.under_way == (self.since is not None)


TestExhaustion = ExhaustionMachine.TestCase
TestExhaustion.settings = settings(max_examples=12, stateful_step_count=25)

# -- without descriptors, really


SPARE = 40
"""Descriptors that a test takes, and can give back, besides those it leaves."""


class Descriptors:
    """Leaves this process as many descriptors as a test wants."""

    def __init__(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._held: list[int] = []

    def leave(self, n: int) -> None:
        """Take all that are free but *n*."""
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + n + SPARE, self._limits[1]))
        with contextlib.suppress(OSError):
            while True:
                self._held.append(os.open(os.devnull, os.O_RDONLY))
        self.give(n)

    def take(self, n: int) -> None:
        """Take *n* more."""
        self._held += [os.open(os.devnull, os.O_RDONLY) for _ in range(n)]

    def give(self, n: int) -> None:
        """Close up to *n* of those that were taken."""
        for _ in range(min(n, len(self._held))):
            os.close(self._held.pop())

    def give_all(self) -> None:
        """End the shortage."""
        self.give(len(self._held))
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


@pytest.fixture
def shortage() -> Iterator[Descriptors]:
    """Lower the limit in a test, and put it back."""
    descriptors = Descriptors()
    yield descriptors
    descriptors.give_all()


class Counted:
    """What a listener does, counted: attempts to accept, timers, turns of its pump."""

    def __init__(self, listener: Listener[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.attempts = self.timers = self.arrivals = 0
        gate, consumer = listener._gate, listener._deciding.consumer
        take, retry, arrived = gate.take, consumer._set_retry, consumer.arrived  # type: ignore[attr-defined]

        def counted_take() -> Any:
            self.attempts += 1
            return take()

        def counted_retry() -> None:
            self.timers += consumer._retry is None  # type: ignore[attr-defined]
            retry()

        def counted_arrived() -> None:
            self.arrivals += 1
            arrived()

        monkeypatch.setattr(gate, "take", counted_take)
        monkeypatch.setattr(consumer, "_set_retry", counted_retry)
        monkeypatch.setattr(consumer, "arrived", counted_arrived)


@contextlib.asynccontextmanager
async def serving(
    listener: Listener[Stream], handler: Any, condition: Any = accept
) -> AsyncIterator[asyncio.Task[None]]:
    """Serve while the context lasts."""
    task = asyncio.ensure_future(listener.serve(handler, condition))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        listener.abort()
        async with asyncio.timeout(LIMIT):
            with contextlib.suppress(AcceptError):
                await task


@pytest.fixture
def episodes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log says of episodes."""
    caplog.set_level(logging.INFO, "condaccept")
    return lambda: [
        record.getMessage() for record in logged(caplog) if record.levelno == logging.WARNING
    ]


async def say_hello(stream: Stream) -> None:
    """Say something, and leave."""
    await stream.send(b"hello")


CALLERS = 200

CROWD = f"""
import socket, sys
port = int(sys.argv[1])
clients = [socket.create_connection(("127.0.0.1", port)) for _ in range({CALLERS})]
print("there", flush=True)
print([client.recv(100) for client in clients].count(b"hello"), flush=True)
"""
"""Its callers take none of our descriptors."""


@pytest.mark.slow
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("how", ["serve", "streams"])
async def test_a_crowd(
    shortage: Descriptors,
    episodes: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    *,
    hook: bool,
) -> None:
    """All of a crowd are served with four descriptors, in one episode, without a storm."""
    told: list[Episode] = []
    gate = asyncio.Event()
    most = 0

    async def handler(stream: Stream) -> None:
        nonlocal most
        most = max(most, listener.statistics().streams)
        async with stream:
            await gate.wait()
            await say_hello(stream)

    async def iterate() -> None:
        async with asyncio.TaskGroup() as group:
            async for stream in listener.streams(accept):
                group.create_task(handler(stream))

    def spare(episode: Episode) -> None:
        told.append(episode)
        shortage.give(4)

    async with await listen("127.0.0.1", 0, max_pending=8) as listener:
        if hook:
            listener.on_exhausted(spare)
        crowd = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CROWD, str(listener.sockname[1]), stdout=asyncio.subprocess.PIPE
        )
        assert crowd.stdout is not None
        assert await crowd.stdout.readline() == b"there\n"
        await queued(listener, CALLERS)
        shortage.leave(4)
        consuming = asyncio.ensure_future(
            listener.serve(handler, accept) if how == "serve" else iterate()
        )
        await asyncio.sleep(0)
        await until(lambda: listener._deciding.consumer.busy())  # noqa: PLW0108 - whoever that is by then
        counted = Counted(listener, monkeypatch)
        await until(lambda: listener.statistics().exhausted)
        assert len(episodes()) == 1
        await until(lambda: listener.statistics().streams == (8 if hook else 4))
        gate.set()
        assert await asyncio.wait_for(crowd.stdout.readline(), LIMIT) == b"%d\n" % CALLERS
        await until(lambda: not listener.statistics().exhausted)
        await crowd.wait()
        begin, end = episodes()
        assert "no descriptor is free" in begin
        assert "nobody waits" in end
        statistics = listener.statistics()
        assert (statistics.accepted, statistics.taken) == (CALLERS, CALLERS)
        assert most == (8 if hook else 4)
        assert len(told) == hook
        # One for each caller, one for each descriptor that came free, and the timer's few.
        assert counted.attempts <= 3 * CALLERS
        assert counted.timers <= 20
        assert counted.arrivals <= CALLERS
        listener.close()
        await asyncio.wait_for(consuming, LIMIT)


async def test_established_streams_go_on(
    shortage: Descriptors, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no descriptor is free, those who are in are served, and nothing turns in vain."""

    async def echo(stream: Stream) -> None:
        async for line in stream:
            await stream.send(line)

    async with await listen("127.0.0.1", 0) as listener, serving(listener, echo):
        first = dial(listener)
        await until(lambda: listener.statistics().streams)
        second = dial_before(shortage, dial, listener)
        await until(lambda: listener.statistics().exhausted)
        counted = Counted(listener, monkeypatch)
        for n in range(50):
            first.sendall(b"%d\n" % n)
            assert await wire_end(first) == b"%d\n" % n
        # A turn of the loop makes no attempt; only the timer may have.
        assert counted.attempts <= counted.timers + 1
        shortage.give(1)
        first.close()
        second.sendall(b"me too\n")
        assert await wire_end(second) == b"me too\n"
        await until(lambda: not listener.statistics().exhausted)


def dial_before(
    shortage: Descriptors, dial: Dial, listener: Listener[Any], n: int = 1
) -> socket.socket:
    """Connect when there is no descriptor to accept with; return the last client."""
    listener.suspend()
    for _ in range(n):
        client = dial(listener)
    shortage.leave(0)
    listener.resume()
    return client


async def test_one_after_the_other(
    shortage: Descriptors, episodes: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that come one by one while no descriptor is free are one episode together."""
    async with await listen("127.0.0.1", 0) as listener, serving(listener, say_hello):
        callers = [socket.socket() for _ in range(20)]
        shortage.leave(0)
        for n, client in enumerate(callers):
            client.connect(listener.sockname)
            await until(lambda: listener.statistics().exhausted)
            if n == 0:
                counted = Counted(listener, monkeypatch)
            await turns()
        assert listener.statistics().exhausted
        assert len(episodes()) == 1
        assert counted.attempts <= counted.timers + 1
        for client in callers:
            shortage.give(1)
            assert await wire_end(client) == b"hello"
            client.close()
        await until(lambda: not listener.statistics().exhausted)
        assert len(episodes()) == 2
        assert "waited at once" in episodes()[1]


async def test_no_free_descriptor_and_nobody(
    shortage: Descriptors, episodes: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The episode goes on while the queue is empty and still no descriptor is free."""
    monkeypatch.setattr("condaccept._exhaustion.FIRST", 0.0001)
    monkeypatch.setattr("condaccept._exhaustion.LONGEST", 0.0001)

    async def handler(stream: Stream) -> None:
        await say_hello(stream)
        stream.close()
        shortage.take(1)  # before the listener can see that one was free

    async with await listen("127.0.0.1", 0) as listener, serving(listener, handler):
        callers = [socket.socket() for _ in range(3)]
        shortage.leave(0)
        for client in callers:
            client.connect(listener.sockname)
            await until(lambda: listener.statistics().exhausted)
            shortage.give(1)
            assert await wire_end(client) == b"hello"
            client.close()
            shortage.take(1)
            await turns(100)
            assert listener.statistics().exhausted
        assert len(episodes()) == 1
        shortage.give_all()
        await until(lambda: not listener.statistics().exhausted)
        assert len(episodes()) == 2


async def test_a_failed_hook(
    shortage: Descriptors,
    dial: Dial,
    episodes: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hook that raises is reported, the others are called, and accepting goes on at once."""
    monkeypatch.setattr("condaccept._exhaustion.FIRST", 60.0)
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    told: list[Episode] = []

    def fail(_episode: Episode) -> None:
        raise ZeroDivisionError

    def spare(episode: Episode) -> None:
        told.append(episode)
        shortage.give_all()

    async with await listen("127.0.0.1", 0) as listener:
        listener.on_exhausted(fail)
        listener.on_exhausted(spare)
        with pytest.raises(TypeError, match="cannot be called"):
            listener.on_exhausted(None)  # type: ignore[arg-type]
        async with serving(listener, say_hello):
            client = dial_before(shortage, dial, listener, 3)
            assert await wire_end(client) == b"hello"
            await until(lambda: len(episodes()) == 2)
    assert [(type(each["exception"])) for each in reported] == [ZeroDivisionError]
    assert [(each.waiting, each.seconds) for each in told] == [(3, 0.0)]
    assert "no descriptor is free" in told[0].reason


async def test_shedding(
    shortage: Descriptors, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """With shed_oldest_deferred, deferred callers make room for new ones, the oldest first."""
    full = [True]

    def condition(_pending: PendingTransport) -> AnyVerdict:
        return Defer(after=60) if full[0] else ACCEPT

    outcomes: list[Outcome] = []
    async with await listen("127.0.0.1", 0, exhausted="shed_oldest_deferred") as listener:
        listener.on_outcome(outcomes.append)
        async with serving(listener, say_hello, condition):
            old = [dial(listener) for _ in range(3)]
            await until(lambda: listener.statistics().deferred == 3)
            names = [each.getsockname() for each in old]
            full[0] = False
            client = dial_before(shortage, dial, listener)
            assert await wire_end(client) == b"hello"
            await until(lambda: not listener.statistics().exhausted)
            assert await wire_end(old[0]) == "reset"
            assert listener.statistics().deferred == 2
            await until(lambda: len(outcomes) == 2)
            expired, accepted = outcomes
            assert (expired.status, expired.caller_id) == (Status.EXPIRED, names[0])
            assert expired.reason.startswith("expired for a newcomer: no descriptor is free")
            assert accepted.status is Status.ACCEPTED
            assert len(logged(caplog)) == 2


async def test_pausing_keeps_the_deferred(shortage: Descriptors, dial: Dial) -> None:
    """By default the deferred stay, and newcomers wait in the kernel's queue."""
    full = [True]

    def condition(_pending: PendingTransport) -> AnyVerdict:
        return Defer(after=60) if full[0] else ACCEPT

    async with await listen("127.0.0.1", 0) as listener, serving(listener, say_hello, condition):
        old = dial(listener)
        await until(lambda: listener.statistics().deferred == 1)
        full[0] = False
        client = dial_before(shortage, dial, listener)
        await until(lambda: listener.statistics().exhausted)
        statistics = listener.statistics()
        assert (statistics.deferred, statistics.backlog) == (1, 1)
        # Deciding goes on: what that frees is the newcomer's.
        listener.reconsider()
        assert await wire_end(old) == b"hello"
        assert await wire_end(client) == b"hello"


async def test_a_farewell_frees_one(
    shortage: Descriptors, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor of a rejected caller that has read why is used at once, without the timer."""
    monkeypatch.setattr("condaccept._exhaustion.FIRST", 60.0)
    verdicts: list[AnyVerdict] = [Reject("full", b"full"), ACCEPT]
    async with (
        await listen("127.0.0.1", 0) as listener,
        serving(listener, say_hello, lambda _: verdicts.pop(0)),
    ):
        rejected = dial(listener)
        assert await wire_end(rejected) == b"full"
        assert listener.statistics().rejecting == 1
        client = dial_before(shortage, dial, listener)
        await until(lambda: listener.statistics().exhausted)
        rejected.shutdown(socket.SHUT_RDWR)
        assert await wire_end(client) == b"hello"
        assert listener.statistics().rejecting == 0


async def test_suspended_meanwhile(
    shortage: Descriptors, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After suspend() and resume() in an episode accepting goes on."""
    monkeypatch.setattr("condaccept._exhaustion.FIRST", 0.0001)
    monkeypatch.setattr("condaccept._exhaustion.LONGEST", 0.0001)
    async with await listen("127.0.0.1", 0) as listener, serving(listener, say_hello):
        client = dial_before(shortage, dial, listener)
        await until(lambda: listener.statistics().exhausted)
        listener.suspend()
        consumer: Any = listener._deciding.consumer
        await until(lambda: consumer._retry is None)
        shortage.give_all()
        listener.resume()
        assert await wire_end(client) == b"hello"
        await until(lambda: not listener.statistics().exhausted)


@pytest.mark.parametrize("way", ["close", "cancel", "shutdown", "aclose"])
async def test_ended_meanwhile(
    shortage: Descriptors, dial: Dial, episodes: Callable[[], list[str]], way: str
) -> None:
    """Whatever ends the accepting ends the episode and its timer, with the second line."""
    async with await listen("127.0.0.1", 0) as listener:
        streams = listener.streams()
        task = asyncio.ensure_future(
            anext(streams) if way == "aclose" else listener.serve(say_hello)
        )
        await turns(3)
        consumer: Any = listener._deciding.consumer
        dial_before(shortage, dial, listener)
        await until(lambda: listener.statistics().exhausted)
        assert consumer._retry is not None
        if way == "close":
            listener.close()
        elif way == "shutdown":
            left = await listener.shutdown()
            assert left.queued == 1
        else:
            task.cancel()
            await asyncio.wait([task])
            await streams.aclose()
        assert consumer._retry is None
        assert not listener.statistics().exhausted
        assert "nobody is accepted any more" in episodes()[-1]
        assert len(episodes()) == (3 if way == "shutdown" else 2)
        shortage.give_all()
        await asyncio.wait([task])


async def test_the_next_consumer(
    shortage: Descriptors, dial: Dial, episodes: Callable[[], list[str]]
) -> None:
    """A serve() that ends without descriptors leaves the callers to the next one."""
    async with await listen("127.0.0.1", 0) as listener:
        task = asyncio.ensure_future(listener.serve(say_hello))
        await turns(3)
        client = dial_before(shortage, dial, listener)
        await until(lambda: listener.statistics().exhausted)
        task.cancel()
        await asyncio.wait([task])
        shortage.give_all()
        async with serving(listener, say_hello):
            assert await wire_end(client) == b"hello"
        assert len(episodes()) == 2


# -- what accept(2) says, by script


@contextlib.asynccontextmanager
async def scripted(
    *script: OSError | None, how: str = "serve", **options: Any
) -> AsyncIterator[tuple[Listener[Stream], asyncio.Task[None]]]:
    """Serve on a socket whose accept(2) fails by script."""
    sock = ScriptedSocket(socket.create_server(("127.0.0.1", 0)), script)
    listener: Listener[Stream] = Listener.from_socket(sock, **options)

    async def iterate() -> None:
        async for stream in listener.streams():
            await say_hello(stream)
            stream.close()

    task = asyncio.ensure_future(listener.serve(say_hello) if how == "serve" else iterate())
    await turns(3)
    async with listener:
        yield listener, task
    await asyncio.wait([task])


def errors(*codes: int) -> Iterable[OSError]:
    """Make them."""
    return [OSError(code, os.strerror(code)) for code in codes]


both = pytest.mark.parametrize("how", ["serve", "streams"])


@both
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_an_episode(
    dial: Dial, episodes: Callable[[], list[str]], code: int, how: str
) -> None:
    """Whatever is missing, it is one episode of two lines, and the callers are served."""
    async with scripted(*errors(code, code), None, *errors(code), how=how) as (listener, task):
        clients = [dial(listener) for _ in range(3)]
        for client in clients:
            assert await wire_end(client) == b"hello"
        await until(lambda: not listener.statistics().exhausted)
        begin, end = episodes()
        assert begin.startswith("cannot accept: ")
        assert end.startswith("accepting again")
        listener.close()
        await asyncio.wait_for(task, LIMIT)


TRANSIENT = [
    errno.ECONNABORTED,
    errno.ENETDOWN,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    errno.EPERM,
]


@both
async def test_goes_on(dial: Dial, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """An error that is about one connection ends nothing, and only a lost one counts."""
    async with scripted(*errors(*TRANSIENT), how=how) as (listener, task):
        client = dial(listener)
        assert await wire_end(client) == b"hello"
        statistics = listener.statistics()
        assert (statistics.taken, statistics.reset, statistics.accepted) == (2, 1, 1)
        assert not task.done()
        assert not logged(caplog)


async def test_no_end_of_errors(dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """When every accept(2) fails so, it is tried by the timer, and not at every turn."""
    monkeypatch.setattr("condaccept._exhaustion.FIRST", 0.0001)
    async with scripted(*errors(*[errno.EPERM] * 100)) as (listener, _):
        consumer: Any = listener._deciding.consumer
        client = dial(listener)
        await until(lambda: consumer._errors == 32)
        assert consumer._retry is not None
        assert await wire_end(client) == b"hello"
        assert consumer._errors == 0


@both
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EINVAL, NotListeningError),
        (errno.EBADF, NotASocketError),
        (errno.ELOOP, AcceptError),
    ],
)
async def test_ends(
    dial: Dial,
    caplog: pytest.LogCaptureFixture,
    code: int,
    kind: type[AcceptError],
    how: str,
) -> None:
    """An error that every further accept(2) would meet ends the consumer, and is logged."""
    async with scripted(*errors(code), how=how) as (listener, task):
        dial(listener)
        with pytest.raises(kind) as caught:
            await asyncio.wait_for(task, LIMIT)
        assert type(caught.value) is kind
        assert [record.levelname for record in logged(caplog)] == ["ERROR"]
        assert caught.value.reason in caplog.text


async def test_rejecting_without_descriptors(shortage: Descriptors, dial: Dial) -> None:
    """Whom a limit would reject waits when there is no descriptor to do it with."""
    async with (
        await listen("127.0.0.1", 0, max_streams=Limit(0, "reject")) as listener,
        serving(listener, say_hello),
    ):
        client = dial_before(shortage, dial, listener)
        await turns()
        assert (listener.statistics().backlog, listener.statistics().taken) == (1, 0)
        shortage.give_all()
        assert await wire_end(dial(listener)) == "reset"
        assert await wire_end(client) == "reset"


async def test_refusing_without_descriptors(shortage: Descriptors, dial: Dial) -> None:
    """suspend(refuse=True) resets nobody for want of descriptors: it raises, nothing changes."""
    async with await listen("127.0.0.1", 0) as listener:
        client = dial(listener)
        await queued(listener, 1)
        shortage.leave(0)
        with pytest.raises(AcceptError, match="no descriptor is free"):
            listener.suspend(refuse=True)
        statistics = listener.statistics()
        assert (statistics.suspended, statistics.refusing, statistics.backlog) == (False, False, 1)
        shortage.give_all()
        listener.suspend(refuse=True)
        assert listener.statistics().pending == 1
        client.close()


# -- beforehand


@pytest.mark.parametrize(
    ("allowed", "options", "warned"),
    [
        (500, {"max_streams": 400, "max_pending": 36}, False),
        (500, {"max_streams": 401, "max_pending": 36}, True),
        (500, {"max_pending": 4000}, False),
        (500, {"max_streams": Limit(500, "reject"), "max_pending": None}, True),
    ],
)
async def test_a_low_limit(
    caplog: pytest.LogCaptureFixture, *, allowed: int, options: dict[str, Any], warned: bool
) -> None:
    """Limits that RLIMIT_NOFILE cannot hold are warned of at start, with the numbers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        async with await listen("127.0.0.1", 0, **options) as listener:
            assert len(logged(caplog)) == warned
            if warned:
                assert f"allows {allowed} descriptors" in caplog.text
            listener.max_streams = 5000
            assert len(logged(caplog)) == warned + 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await caught_up()
