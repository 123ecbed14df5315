"""Suspending, going on, and every way to end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    AcceptError,
    AnyVerdict,
    ConnectionDeferredError,
    Defer,
    Leftovers,
    Limit,
    Listener,
    ListenerClosedError,
    Outcome,
    PendingResetError,
    PendingTransport,
    Reject,
    Status,
    Stream,
    listen,
)
from condaccept.testing import memory_listener
from tests.support import (
    LIMIT,
    accept,
    caught_up,
    defer,
    queued,
    reject,
    reset,
    turns,
    until,
    wire,
    wire_end,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support import Dial


async def say_hello(stream: Stream) -> None:
    """Say something, and leave."""
    await stream.send(b"hello")


async def until_eof(stream: Stream) -> None:
    """Stay until the caller leaves."""
    await stream.read()


class Server:
    """A consumer of either kind, with a handler for each stream."""

    def __init__(self, how: str, listener: Listener[Stream], handler: Any, condition: Any) -> None:
        self.listener = listener
        self.handler = handler
        self.condition = condition
        self.handlers: set[asyncio.Task[None]] = set()
        self.outcomes: list[Outcome] = []
        listener.on_outcome(self.outcomes.append)
        self.task = asyncio.ensure_future(getattr(self, how)())

    async def serve(self) -> None:
        """As services do."""
        with contextlib.suppress(ListenerClosedError):
            await self.listener.serve(self.handler, self.condition)

    async def streams(self) -> None:
        """As an iteration."""
        async for stream in self.listener.streams(self.condition):
            self._start(stream)

    async def accept(self) -> None:
        """As Winsock."""
        while True:
            try:
                self._start(await self.listener.accept(self.condition))
            except ListenerClosedError:
                return
            except AcceptError:
                await asyncio.sleep(0)

    async def none(self) -> None:
        """Nobody."""

    def _start(self, stream: Stream) -> None:
        task = asyncio.ensure_future(self._handle(stream))
        self.handlers.add(task)
        task.add_done_callback(self.handlers.discard)

    async def _handle(self, stream: Stream) -> None:
        async with stream:
            with contextlib.suppress(OSError):
                await self.handler(stream)


@contextlib.asynccontextmanager
async def serving(
    how: str, handler: Any = until_eof, condition: Any = accept, **options: Any
) -> AsyncIterator[Server]:
    """Serve on 127.0.0.1; afterwards nothing is left, and every connection accounted for."""
    listener = await listen("127.0.0.1", 0, **options)
    server = Server(how, listener, handler, condition)
    await turns(2)
    try:
        yield server
    finally:
        listener.abort()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(server.task, *server.handlers)
        check(listener)
        statistics = listener.statistics()
        assert (statistics.streams, statistics.pending, statistics.handlers) == (0, 0, 0)
        assert not listener._watch.needed
        timers = (listener._deciding._timer, listener._deciding._relisten)
        assert all(timer is None or timer.cancelled() for timer in timers)


def check(listener: Listener[Any]) -> None:
    """Check that every connection is in exactly one place."""
    s = listener.statistics()
    assert s.taken == sum(
        (s.accepted, s.rejected, s.reset, s.expired, s.failed, s.closed, s.pending)
    )


each_consumer = pytest.mark.parametrize("how", ["serve", "streams", "accept"])
everyone = pytest.mark.parametrize("how", ["serve", "streams", "accept", "none"])

# -- suspend, resume


@each_consumer
async def test_suspend(dial: Dial, how: str) -> None:
    """Suspended, the listener takes nobody, and streams and the deferred go on; then it resumes."""
    verdicts: list[AnyVerdict] = [ACCEPT, DEFER] if how != "accept" else [ACCEPT]

    def condition(_pending: PendingTransport) -> AnyVerdict:
        return verdicts.pop(0) if verdicts else ACCEPT

    async with serving(how, until_eof, condition) as server:
        listener = server.listener
        first = dial(listener)
        await until(lambda: listener.statistics().streams == 1)
        if how != "accept":
            dial(listener)
            await until(lambda: listener.statistics().deferred == 1)
        listener.suspend()
        listener.suspend()
        assert listener.statistics().suspended
        late = dial(listener)
        await queued(listener, 1)
        await caught_up()
        if how != "accept":
            (pending,) = listener.pending
            assert pending.reconsider()
            await until(lambda: listener.statistics().streams == 2)
        assert listener.statistics().backlog == 1
        first.close()
        await until(lambda: listener.statistics().streams == (1 if how != "accept" else 0))
        assert wire(late) == "open"
        listener.resume()
        listener.resume()
        assert not listener.statistics().suspended
        await until(lambda: listener.statistics().backlog == 0)
        await until(lambda: listener.statistics().accepted == (3 if how != "accept" else 2))


@each_consumer
async def test_suspend_and_refuse(dial: Dial, how: str) -> None:
    """With refuse, the queued are taken and decided, and newcomers get ECONNREFUSED."""
    async with serving(how) as server:
        listener = server.listener
        listener.suspend()
        early = [dial(listener) for _ in range(3)]
        await queued(listener, 3)
        listener.suspend(refuse=True)
        listener.suspend(refuse=True)
        statistics = listener.statistics()
        assert (statistics.suspended, statistics.refusing) == (True, True)
        with pytest.raises(ConnectionRefusedError):
            dial(listener)
        await until(lambda: listener.statistics().streams == 3)
        for client in early:
            client.close()
        await until(lambda: listener.statistics().streams == 0)
        with pytest.raises(ConnectionRefusedError):
            dial(listener)
        listener.suspend()
        assert listener.statistics().refusing
        listener.resume()
        statistics = listener.statistics()
        assert (statistics.suspended, statistics.refusing) == (False, False)
        dial(listener)
        await until(lambda: listener.statistics().streams == 1)


async def test_suspended_at_a_limit(dial: Dial) -> None:
    """Room alone ends no refusal that was asked for, and resume() none that a limit wants."""
    async with serving("serve", max_streams=Limit(2, "refuse", low=1)) as server:
        listener = server.listener
        clients = [dial(listener) for _ in range(2)]
        await until(lambda: listener.statistics().refusing)
        listener.suspend(refuse=True)
        clients[0].close()
        await until(lambda: listener.statistics().streams == 1)
        assert listener.statistics().refusing
        listener.resume()
        assert not listener.statistics().refusing
        clients.append(dial(listener))
        await until(lambda: listener.statistics().refusing)
        listener.suspend()
        listener.resume()
        assert listener.statistics().refusing
        # Suspended without refuse, callers are queued as soon as there is room.
        listener.suspend()
        clients[1].close()
        await until(lambda: not listener.statistics().refusing)
        dial(listener)
        await queued(listener, 1)
        listener.resume()
        await until(lambda: listener.statistics().streams == 2)


async def test_refusing_needs_sockets_of_its_own(dial: Dial) -> None:
    """Where the kernel cannot refuse, suspend(refuse=True) says so and suspends nothing."""
    sock = socket.create_server(("127.0.0.1", 0))
    listener: Listener[Stream] = Listener.from_socket(sock)
    async with listener:
        client = dial(listener)
        await queued(listener, 1)
        with pytest.raises(OSError, match="suspend"):
            listener.suspend(refuse=True)
        statistics = listener.statistics()
        assert (statistics.suspended, statistics.refusing, statistics.taken) == (False, False, 0)
        assert wire(client) == "open"


async def test_taken_in_and_gone(listener: Listener[Stream], dial: Dial) -> None:
    """Whoever was taken in and leaves before anybody asks is noticed at once."""
    leaves, stays = dial(listener), dial(listener)
    await queued(listener, 2)
    listener.suspend(refuse=True)
    assert listener.statistics().pending == 2
    reset(leaves)
    await until(lambda: listener.statistics().reset == 1)
    with pytest.raises(PendingResetError):
        await listener.accept()
    (await listener.accept()).close()
    assert await wire_end(stays) == "eof"


async def test_a_condition_that_refuses(listener: Listener[Stream], dial: Dial) -> None:
    """The connection a condition is asked about stays in front of those it has taken in."""
    clients = [dial(listener) for _ in range(3)]
    names = [each.getsockname() for each in clients]
    await queued(listener, 3)

    def condition(_pending: PendingTransport) -> AnyVerdict:
        listener.suspend(refuse=True)
        return DEFER

    with pytest.raises(ConnectionDeferredError):
        await listener.accept(condition)
    assert [each.caller_id for each in listener.pending] == names


async def test_resume_fails(listener: Listener[Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the kernel does not listen again, resume() raises and the listener is as it was."""
    listener.suspend(refuse=True)

    def fail() -> None:
        raise OSError(98, "Address already in use")

    with monkeypatch.context() as patch:
        patch.setattr(listener._gate, "listen_again", fail)
        with pytest.raises(OSError, match="already in use"):
            listener.resume()
    statistics = listener.statistics()
    assert (statistics.suspended, statistics.refusing) == (True, True)
    listener.resume()
    statistics = listener.statistics()
    assert (statistics.suspended, statistics.refusing) == (False, False)


async def test_not_after_the_end() -> None:
    """A listener that has ended can neither be suspended nor resumed."""
    listener: Listener[Stream] = await listen("127.0.0.1", 0)
    listener.close()
    for call in (listener.suspend, listener.resume):
        with pytest.raises(ListenerClosedError):
            call()


async def test_wait_pending_while_suspended(listener: Listener[Stream], dial: Dial) -> None:
    """Suspended, nobody is due; after resume() whoever waits is."""
    waiting = asyncio.ensure_future(listener.wait_pending())
    await asyncio.sleep(0)
    listener.suspend()
    dial(listener)
    await queued(listener, 1)
    await caught_up()
    assert not waiting.done()
    with pytest.raises(BlockingIOError):
        listener.accept_nowait()
    listener.resume()
    await asyncio.wait_for(waiting, LIMIT)
    listener.accept_nowait().close()


# -- shutdown


@everyone
async def test_nobody_there(how: str) -> None:
    """A shutdown of an idle listener leaves nothing and closes it."""
    async with serving(how) as server:
        left = await server.listener.shutdown()
        assert left == Leftovers(undecided=(), aborted=(), queued=0, rejecting=0)
        assert not left
        await asyncio.wait_for(server.task, LIMIT)
        assert server.listener.sockname is None
        again = await server.listener.shutdown()
        assert not again


@each_consumer
async def test_the_queued_are_decided(dial: Dial, how: str) -> None:
    """Whoever the kernel had queued is taken and decided, and nobody after them."""
    async with serving(how, say_hello) as server:
        listener = server.listener
        address = listener.sockname
        listener.suspend()
        clients = [dial(listener) for _ in range(5)]
        await queued(listener, 5)
        shutdown = asyncio.ensure_future(listener.shutdown())
        await asyncio.sleep(0)
        with pytest.raises(ConnectionRefusedError):
            dial(address)
        for client in clients:
            assert await wire_end(client) == b"hello"
            client.close()
        assert not await asyncio.wait_for(shutdown, LIMIT)
        assert listener.statistics().accepted == 5
        await asyncio.wait_for(server.task, LIMIT)


@each_consumer
async def test_streams_are_waited_for(dial: Dial, how: str) -> None:
    """A shutdown lasts until the last stream has ended, and statistics say how it stands."""
    async with serving(how) as server:
        listener = server.listener
        clients = [dial(listener) for _ in range(3)]
        await until(lambda: listener.statistics().streams == 3)
        shutdown = asyncio.ensure_future(listener.shutdown())
        for client in clients:
            await caught_up()
            assert not shutdown.done()
            client.close()
        assert not await asyncio.wait_for(shutdown, LIMIT)


@pytest.mark.parametrize("end", ["shutdown", "refuse"])
async def test_those_who_left_have_no_places(dial: Dial, end: str) -> None:
    """Callers who left in the kernel's queue take no place of those who are there."""
    async with serving("serve", say_hello, max_pending=2) as server:
        listener = server.listener
        await caught_up()
        listener.suspend()
        for _ in range(3):
            reset(dial(listener))
        callers = [dial(listener) for _ in range(2)]
        if end == "refuse":
            listener.suspend(refuse=True)
            assert [await wire_end(caller) for caller in callers] == [b"hello"] * 2
        assert not await listener.shutdown(LIMIT)
        assert len(server.outcomes) == 5
        if end == "shutdown":
            assert [wire(caller) for caller in callers] == [b"hello"] * 2


@everyone
async def test_what_is_left(dial: Dial, how: str) -> None:
    """After the timeout all that is left is named, with the reason, and reset."""
    async with serving(how, max_pending=2) as server:
        listener = server.listener
        first = dial(listener)
        stream = await listener.accept() if how == "none" else None
        await until(lambda: listener.statistics().streams == 1)
        listener.max_streams = 0
        others = [dial(listener) for _ in range(5)]
        await queued(listener, 5)
        left = await listener.shutdown(0.01)
        assert left
        assert [caller for caller, _ in left.aborted] == [first.getsockname()]
        assert left.aborted[0][1] == "open, still there 0.01 s after the shutdown began"
        assert {why for _, why in left.undecided} == {
            "queued, still there 0.01 s after the shutdown began"
        }
        assert [caller for caller, _ in left.undecided] == [
            each.getsockname() for each in others[:2]
        ]
        assert left.queued == 3
        for client in (first, *others):
            assert await wire_end(client) == "reset"
        await asyncio.wait_for(server.task, LIMIT)
        await until(lambda: len(server.outcomes) == 3)
        assert [each.status for each in server.outcomes[1:]] == [Status.CLOSED] * 2
        del stream


async def test_the_deferred(dial: Dial) -> None:
    """A shutdown gives the deferred the time their hints need, and then decides them."""
    async with serving("serve", say_hello, Asked(Defer(after=0.001), ACCEPT)) as server:
        client = dial(server.listener)
        await until(lambda: server.listener.statistics().deferrals)
        assert not await server.listener.shutdown(LIMIT)
        assert await wire_end(client) == b"hello"


class Asked:
    """A condition that says one verdict after the other, and the last one again and again."""

    def __init__(self, *verdicts: AnyVerdict) -> None:
        self._verdicts = list(verdicts)

    def __call__(self, _pending: PendingTransport) -> AnyVerdict:
        """Say the next."""
        return self._verdicts.pop(0) if len(self._verdicts) > 1 else self._verdicts[0]


async def test_expired_in_a_shutdown(dial: Dial) -> None:
    """Without a timeout the deferred keep a shutdown until they expire."""
    async with serving("serve", say_hello, defer, defer_timeout=0.001) as server:
        dial(server.listener)
        await until(lambda: server.listener.statistics().deferrals)
        assert not await asyncio.wait_for(server.listener.shutdown(), LIMIT)
        assert server.listener.statistics().expired == 1


@each_consumer
async def test_decisions_under_way(dial: Dial, how: str) -> None:
    """Decisions under way are waited for; what they let in is served."""
    go = asyncio.Event()

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        await go.wait()
        return ACCEPT

    async with serving(how, say_hello, condition) as server:
        client = dial(server.listener)
        await until(lambda: server.listener.statistics().deciding)
        shutdown = asyncio.ensure_future(server.listener.shutdown())
        await caught_up()
        assert not shutdown.done()
        go.set()
        assert await wire_end(client) == b"hello"
        client.close()
        assert not await asyncio.wait_for(shutdown, LIMIT)


async def test_a_decision_that_does_not_end(dial: Dial) -> None:
    """A decision that does not end is cancelled after the timeout, and named."""
    cancelled: list[bool] = []

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return ACCEPT

    async with serving("serve", say_hello, condition) as server:
        client = dial(server.listener)
        await until(lambda: server.listener.statistics().deciding)
        left = await server.listener.shutdown(0)
        assert [why.split(",")[0] for _, why in left.undecided] == ["deciding"]
        await asyncio.wait_for(server.task, LIMIT)
        assert cancelled
        assert await wire_end(client) == "reset"


@pytest.mark.parametrize("completes", [True, False])
async def test_slow_admissions(*, completes: bool) -> None:
    """Who was let in and is not complete yet is waited for, and named if it does not come."""
    listener, gate = memory_listener(slow=True)
    serving = asyncio.ensure_future(listener.serve(say_hello))
    await asyncio.sleep(0)
    with gate.dial() as client:
        await until(lambda: gate.admitting)
        shutdown = asyncio.ensure_future(listener.shutdown(None if completes else 0.001))
        await turns()
        if completes:
            assert not shutdown.done()
            gate.complete()
            assert not await asyncio.wait_for(shutdown, LIMIT)
            assert client.recv(100) == b"hello"
        else:
            left = await asyncio.wait_for(shutdown, LIMIT)
            assert [why.split(",")[0] for _, why in left.undecided] == ["admitted"]
        await asyncio.wait_for(serving, LIMIT)


async def test_ready_ones(dial: Dial) -> None:
    """Who was accepted by handle and taken by nobody is named as that."""
    async with await listen("127.0.0.1", 0) as listener:
        client = dial(listener)
        with pytest.raises(BlockingIOError):
            await listener.accept(defer)
        listener.pending[0].decide(ACCEPT)
        left = await listener.shutdown(0)
        assert [why.split(",")[0] for _, why in left.undecided] == ["ready"]
        assert await wire_end(client) == "reset"


async def test_unreported_losses(listener: Listener[Stream], dial: Dial) -> None:
    """A lost connection that no accept() call has told of keeps no shutdown."""
    client = dial(listener)
    with pytest.raises(BlockingIOError):
        await listener.accept(defer)
    reset(client)
    await until(lambda: listener.statistics().reset == 1)
    assert not await asyncio.wait_for(listener.shutdown(), LIMIT)


async def test_a_call_after_it_began(listener: Listener[Stream], dial: Dial) -> None:
    """Whoever was taken in can still be accepted by a call that is made during the shutdown."""
    client = dial(listener)
    await queued(listener, 1)
    shutdown = asyncio.ensure_future(listener.shutdown())
    await caught_up()
    stream = await listener.accept()
    assert stream.caller_id == client.getsockname()
    with pytest.raises(ListenerClosedError):
        await listener.accept()
    stream.close()
    assert not await asyncio.wait_for(shutdown, LIMIT)


async def test_farewells_are_waited_for(dial: Dial) -> None:
    """A caller rejected in a shutdown is given the time to read why."""
    async with serving("serve", say_hello, Asked(Reject("closing", b"closing"))) as server:
        listener = server.listener
        listener.suspend()
        client = dial(listener)
        await queued(listener, 1)
        shutdown = asyncio.ensure_future(listener.shutdown())
        await until(lambda: listener.statistics().rejecting)
        await caught_up()
        assert not shutdown.done()
        assert await wire_end(client) == b"closing"
        assert await wire_end(client) == "eof"
        client.close()
        assert not await asyncio.wait_for(shutdown, LIMIT)


async def test_a_farewell_is_left(dial: Dial) -> None:
    """One that does not read is counted, and reset."""
    async with serving("serve", say_hello, Asked(Reject("closing", b"closing"))) as server:
        client = dial(server.listener)
        await until(lambda: server.listener.statistics().rejecting)
        left = await server.listener.shutdown(0)
        assert (left.rejecting, bool(left)) == (1, True)
        client.close()


async def test_handlers_that_stay(dial: Dial) -> None:
    """A handler that ignores the end of its stream keeps serve(), and not the shutdown."""
    go = asyncio.Event()

    async def handler(stream: Stream) -> None:
        with contextlib.suppress(OSError):
            await stream.read()
        await go.wait()

    async with serving("serve", handler) as server:
        client = dial(server.listener)
        await until(lambda: server.listener.statistics().streams)
        left = await server.listener.shutdown(0.001)
        assert len(left.aborted) == 1
        assert await wire_end(client) == "reset"
        await turns()
        assert not server.task.done()
        assert server.listener.statistics().handlers == 1
        go.set()
        await asyncio.wait_for(server.task, LIMIT)


async def test_handed_over(dial: Dial) -> None:
    """A stream that was handed to a transport is waited for, and aborted, like any other."""
    async with await listen("127.0.0.1", 0) as listener:
        client = dial(listener)
        stream = await listener.accept()
        transport, _ = await stream.into_transport(asyncio.Protocol)
        left = await listener.shutdown(0.001)
        assert [caller for caller, _ in left.aborted] == [client.getsockname()]
        assert transport.is_closing()
        assert await wire_end(client) == "eof"  # that is how transports abort


# -- from where it may be called


async def test_from_a_handler(dial: Dial) -> None:
    """A handler may shut down: it waits for the others, keeps its own stream, and answers."""
    lefts: list[Leftovers] = []

    async def handler(stream: Stream) -> None:
        if await stream.readline() == b"shutdown\n":
            lefts.append(await server.listener.shutdown())
            await stream.send(b"done")
        else:
            await stream.read()

    async with serving("serve", handler) as server:
        other = dial(server.listener)
        operator = dial(server.listener)
        await until(lambda: server.listener.statistics().streams == 2)
        operator.sendall(b"shutdown\n")
        await until(lambda: server.listener.sockets == ())
        await caught_up()
        assert not lefts
        other.close()
        assert await wire_end(operator) == b"done"
        assert lefts == [Leftovers(undecided=(), aborted=(), queued=0, rejecting=0)]
        await asyncio.wait_for(server.task, LIMIT)


async def test_from_a_handler_in_time(dial: Dial) -> None:
    """With a timeout the others are aborted, and the handler's own stream is not."""

    async def handler(stream: Stream) -> None:
        if await stream.readline() == b"shutdown\n":
            left = await server.listener.shutdown(0.001)
            await stream.send(b"%d left" % len(left.aborted))
        else:
            await stream.read()

    async with serving("serve", handler) as server:
        other = dial(server.listener)
        operator = dial(server.listener)
        await until(lambda: server.listener.statistics().streams == 2)
        operator.sendall(b"shutdown\n")
        assert await wire_end(operator) == b"1 left"
        assert await wire_end(other) == "reset"
        await asyncio.wait_for(server.task, LIMIT)


@each_consumer
@pytest.mark.parametrize("verdict", [ACCEPT, DEFER, Reject("the last", b"the last")], ids=str)
async def test_from_a_condition(dial: Dial, how: str, verdict: AnyVerdict) -> None:
    """An async condition may shut down: its own connection keeps its verdict."""

    async def condition(_pending: PendingTransport) -> AnyVerdict:
        assert not await server.listener.shutdown()
        await turns(3)
        return verdict

    async with serving(how, say_hello, condition) as server:
        client = dial(server.listener)
        ends: dict[AnyVerdict, str | bytes] = {ACCEPT: b"hello", DEFER: "reset"}
        assert await wire_end(client) == ends.get(verdict, b"the last")
        await asyncio.wait_for(server.task, LIMIT)


async def test_from_a_task_of_a_condition(dial: Dial) -> None:
    """A plain condition may start a shutdown: its connection is decided, and served."""
    shutdowns: list[asyncio.Task[Leftovers]] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        shutdowns.append(asyncio.ensure_future(server.listener.shutdown()))
        return ACCEPT

    async with serving("serve", say_hello, condition) as server:
        client = dial(server.listener)
        assert await wire_end(client) == b"hello"
        await asyncio.wait_for(server.task, LIMIT)
        assert not await asyncio.wait_for(shutdowns[0], LIMIT)


# -- more than one end at once


async def test_a_more_impatient_one(dial: Dial) -> None:
    """A second shutdown with a shorter timeout ends the first, too; both say what was queued."""
    async with serving("serve", max_pending=1) as server:
        listener = server.listener
        client = dial(listener)
        await until(lambda: listener.statistics().streams)
        listener.max_streams = 0
        for _ in range(3):
            dial(listener)
        await queued(listener, 3)
        patient = asyncio.ensure_future(listener.shutdown())
        await caught_up()
        left = await listener.shutdown(0)
        assert (len(left.aborted), len(left.undecided), left.queued) == (1, 1, 2)
        first = await asyncio.wait_for(patient, LIMIT)
        assert (first.aborted, first.undecided, first.queued) == ((), (), 2)
        assert await wire_end(client) == "reset"


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closed_meanwhile(dial: Dial, how: str) -> None:
    """After close() a shutdown under way still waits for the streams, after abort() for nothing."""
    async with serving("serve") as server:
        listener = server.listener
        client = dial(listener)
        await until(lambda: listener.statistics().streams)
        shutdown = asyncio.ensure_future(listener.shutdown())
        await caught_up()
        getattr(listener, how)()
        await caught_up()
        if how == "close":
            assert not shutdown.done()
            client.close()
        assert not await asyncio.wait_for(shutdown, LIMIT)


async def test_after_close(dial: Dial) -> None:
    """A shutdown after close() waits for the streams, and aborts those that stay."""
    async with serving("serve") as server:
        client = dial(server.listener)
        await until(lambda: server.listener.statistics().streams)
        server.listener.close()
        left = await server.listener.shutdown(0.001)
        assert len(left.aborted) == 1
        assert await wire_end(client) == "reset"


@pytest.mark.parametrize("when", range(6))
async def test_cancelled(dial: Dial, when: int) -> None:
    """Cancelled at any moment, a shutdown has stopped the taking and ended nothing else."""
    async with serving("serve", max_streams=1) as server:
        listener = server.listener
        client = dial(listener)
        await until(lambda: listener.statistics().streams)
        other = dial(listener)
        await queued(listener, 1)
        shutdown = asyncio.ensure_future(listener.shutdown(60))
        await turns(when)
        shutdown.cancel()
        await asyncio.wait([shutdown])
        assert shutdown.cancelled()
        await turns()
        assert wire(client) == wire(other) == "open"
        if when:
            assert listener.sockets == ()
            assert not listener._deciding._idle
        else:
            assert listener.sockets
        client.close()
        other.close()
        assert not await asyncio.wait_for(listener.shutdown(), LIMIT)


@pytest.mark.parametrize("seconds", ["1", True, -1, float("nan")])
async def test_no_timeout(listener: Listener[Stream], seconds: Any) -> None:
    """A timeout that is none changes nothing."""
    with pytest.raises((TypeError, ValueError), match="timeout"):
        await listener.shutdown(seconds)
    assert listener.sockets


async def test_it_yields(listener: Listener[Stream]) -> None:
    """Shutting down again and again freezes nothing: each call gives the loop a turn."""
    for _ in range(5):
        turned: list[bool] = []
        asyncio.get_running_loop().call_soon(turned.append, True)
        await listener.shutdown()
        assert turned


@pytest.mark.parametrize("unix", [False, True])
async def test_without_a_number(dial: Dial, *, unix: bool) -> None:
    """Whether or not the kernel tells how many it has queued, all of them are taken in."""
    address: Any = (
        {"path": f"\0condaccept life {id(dial)}"} if unix else {"host": "127.0.0.1", "port": 0}
    )
    async with await listen(**address) as listener:
        clients = [dial(listener.sockname) for _ in range(4)]
        listener.suspend()
        left = await listener.shutdown(0)
        assert (len(left.undecided), left.queued) == (4, 0)
        check(listener)
        for client in clients:
            assert await wire_end(client) in ("reset", "eof")


@each_consumer
async def test_rejected_in_a_shutdown(dial: Dial, how: str) -> None:
    """Whoever waits when a shutdown begins may be rejected as always."""
    async with serving(how, say_hello, reject) as server:
        server.listener.suspend()
        client = dial(server.listener)
        await queued(server.listener, 1)
        assert not await asyncio.wait_for(server.listener.shutdown(), LIMIT)
        assert await wire_end(client) == "reset"
        assert server.listener.statistics().rejected == 1
