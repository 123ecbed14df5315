"""What can be seen: a reason a person can read, in the log, in outcomes and in counts."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    Accept,
    AnyVerdict,
    Defer,
    Limit,
    Listener,
    Outcome,
    PendingTransport,
    Reject,
    Status,
    Stream,
    Verdict,
    listen,
)
from condaccept.testing import ScriptedSocket, memory_listener
from tests.support import LIMIT, accept, defer, logged, queued, reset, turns, until, wire_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support import Dial


async def until_eof(stream: Stream) -> None:
    """Stay until the caller leaves."""
    await stream.read()


class Scene:
    """A listener that is served, and what is told of its connections."""

    def __init__(self, dial: Dial) -> None:
        self.dial = dial
        self.outcomes: list[Outcome] = []
        self.handler: Callable[[Any], Awaitable[None]] = until_eof
        self.listener: Listener[Any]
        self.task: asyncio.Task[None]

    async def open(self, condition: Any, **options: Any) -> None:
        """Serve."""
        self.listener = await listen("127.0.0.1", 0, **options)
        self.listener.on_outcome(self.outcomes.append)
        self.task = asyncio.ensure_future(self.listener.serve(self.handler, condition))
        await turns(2)


async def accepted(scene: Scene) -> None:
    """A condition that says why."""
    await scene.open(lambda _: Accept("a friend"))
    scene.dial(scene.listener)


async def rejected(scene: Scene) -> None:
    """A condition that says why."""
    await scene.open(lambda _: Reject("an enemy"))
    scene.dial(scene.listener)


async def raised(scene: Scene) -> None:
    """A condition that raises."""

    def condition(_pending: PendingTransport) -> AnyVerdict:
        raise ZeroDivisionError("by the condition")

    await scene.open(condition)
    scene.dial(scene.listener)


async def bad_verdict(scene: Scene) -> None:
    """A condition that says something else."""
    await scene.open(lambda _: "yes")
    scene.dial(scene.listener)


async def full(scene: Scene) -> None:
    """A limit that rejects."""
    await scene.open(accept, max_streams=Limit(0, "reject"))
    scene.dial(scene.listener)


async def starting(scene: Scene) -> None:
    """The other limit."""
    await scene.open(accept, max_starting=Limit(0, "reject"))
    scene.dial(scene.listener)


async def gone(scene: Scene) -> None:
    """A caller that leaves before the verdict."""
    await scene.open(defer)
    client = scene.dial(scene.listener)
    await until(lambda: scene.listener.statistics().deferred)
    reset(client)


async def aborted(scene: Scene) -> None:
    """What BSD says of a caller that has left."""
    error = OSError(103, "Software caused connection abort")
    sock = ScriptedSocket(socket.create_server(("127.0.0.1", 0)), [error])
    scene.listener = Listener.from_socket(sock)
    scene.listener.on_outcome(scene.outcomes.append)
    scene.task = asyncio.ensure_future(scene.listener.serve(scene.handler, accept))
    await turns(2)
    scene.dial(scene.listener)
    await until(lambda: scene.listener.statistics().taken == 2)


async def withdrawn(scene: Scene) -> None:
    """A caller that says its end, where that counts."""
    await scene.open(defer, on_eof="withdraw")
    scene.dial(scene.listener).shutdown(socket.SHUT_WR)


async def expired(scene: Scene) -> None:
    """A deferral that lasts too long."""
    await scene.open(defer, defer_timeout=0.001)
    scene.dial(scene.listener)


async def newcomer(scene: Scene) -> None:
    """One that makes room for another."""
    await scene.open(defer, max_pending=1)
    scene.dial(scene.listener)
    await until(lambda: scene.listener.statistics().deferred)
    scene.dial(scene.listener)


async def failed(scene: Scene) -> None:
    """A factory that raises."""

    def fail(_stream: Stream) -> Stream:
        raise ZeroDivisionError("by the factory")

    await scene.open(accept, stream_factory=fail)
    scene.dial(scene.listener)


async def closed(scene: Scene) -> None:
    """One that is undecided when the listener closes."""
    await scene.open(defer)
    scene.dial(scene.listener)
    await until(lambda: scene.listener.statistics().deferred)
    scene.listener.close()


async def shut_down(scene: Scene) -> None:
    """The same in an orderly end."""
    await scene.open(defer)
    scene.dial(scene.listener)
    await until(lambda: scene.listener.statistics().deferred)
    assert await scene.listener.shutdown(0)


async def untaken(scene: Scene) -> None:
    """One that leaves when it is accepted already."""
    await scene.open(defer)
    client = scene.dial(scene.listener)
    await until(lambda: scene.listener.statistics().deferred)
    (pending,) = scene.listener.pending
    pending.decide(ACCEPT)
    reset(client)


SCENES: list[tuple[Callable[[Scene], Any], Status, str]] = [
    (accepted, Status.ACCEPTED, "a friend"),
    (rejected, Status.REJECTED, "an enemy"),
    (raised, Status.REJECTED, "the condition raised ZeroDivisionError('by the condition')"),
    (bad_verdict, Status.REJECTED, "returns ACCEPT, REJECT or DEFER, this one returned 'yes'"),
    (full, Status.REJECTED, "max_streams=0 is reached"),
    (starting, Status.REJECTED, "max_starting=0 is reached"),
    (gone, Status.RESET, "the peer reset the connection before the verdict"),
    (aborted, Status.RESET, "the peer reset the connection before it was taken"),
    (withdrawn, Status.EXPIRED, "the caller closed before the verdict: withdrawn"),
    (expired, Status.EXPIRED, "no verdict within 0.001 s of the first deferral"),
    (newcomer, Status.EXPIRED, "expired for a newcomer: max_pending=1 is reached"),
    (failed, Status.FAILED, "stream_factory raised ZeroDivisionError('by the factory')"),
    (closed, Status.CLOSED, "the listener was closed"),
    (shut_down, Status.CLOSED, "the listener was closed"),
    (untaken, Status.RESET, "the peer reset the connection before it was taken"),
]


@pytest.mark.parametrize(
    ("scene", "status", "reason"), SCENES, ids=[each[0].__name__ for each in SCENES]
)
async def test_every_end(
    dial: Dial, caplog: pytest.LogCaptureFixture, scene: Any, status: Status, reason: str
) -> None:
    """Every end is in the log once, with its reason and fields, as in its outcome and counts."""
    caplog.set_level(logging.DEBUG, "condaccept")
    played = Scene(dial)
    await scene(played)
    await until(lambda: played.outcomes)
    outcome = played.outcomes[0]
    assert outcome.status is status
    assert reason in outcome.reason
    records = [each for each in logged(caplog) if getattr(each, "status", None)]
    told: Any = records[0]
    assert (told.name, told.levelname) == ("condaccept", "DEBUG")
    assert told.getMessage() == f"{status.value} {outcome.caller_id!r}: {outcome.reason}"
    assert (told.status, told.caller_id, told.reason, told.deferrals) == (
        status.value,
        outcome.caller_id,
        outcome.reason,
        outcome.deferrals,
    )
    assert told.age <= outcome.age
    played.listener.abort()
    await asyncio.wait_for(played.task, LIMIT)
    statistics = played.listener.statistics()
    ends = ("accepted", "rejected", "reset", "expired", "failed", "closed")
    counts = [getattr(statistics, each) for each in ends]
    assert statistics.taken == sum(counts)
    assert getattr(statistics, status.value) >= 1
    await until(lambda: len(played.outcomes) == statistics.taken)
    records = [each for each in logged(caplog) if getattr(each, "status", None)]
    assert len(records) == statistics.taken


@pytest.mark.parametrize(
    ("status", "verdict", "loss"),
    [
        (Status.ACCEPTED, Verdict.ACCEPT, None),
        (Status.REJECTED, Verdict.REJECT, None),
        (Status.RESET, None, Status.RESET),
        (Status.EXPIRED, None, Status.EXPIRED),
        (Status.FAILED, None, Status.FAILED),
        (Status.CLOSED, None, Status.CLOSED),
    ],
)
def test_verdict_or_loss(status: Status, verdict: Verdict | None, loss: Status | None) -> None:
    """An outcome is a verdict or a loss, and never both."""
    outcome = Outcome(status, None, "because", 0.0, 0)
    assert (outcome.verdict, outcome.loss) == (verdict, loss)


async def test_quiet_by_default(dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    """At INFO and above nothing is said of what happens to single callers."""
    caplog.set_level(logging.INFO, "condaccept")
    verdicts = [ACCEPT, REJECT, DEFER]
    scene = Scene(dial)
    await scene.open(lambda _: verdicts.pop(0))
    for _ in range(3):
        dial(scene.listener)
    await until(lambda: scene.listener.statistics().deferred)
    scene.listener.abort()
    await scene.task
    assert not logged(caplog)


@pytest.mark.parametrize("scene", [raised, bad_verdict, failed])
async def test_faults_of_the_service(
    dial: Dial, caplog: pytest.LogCaptureFixture, scene: Any
) -> None:
    """What is no caller's fault is logged at ERROR, and names the caller it happened to."""
    played = Scene(dial)
    await scene(played)
    await until(lambda: played.outcomes)
    (record,) = logged(caplog)
    assert record.levelname == "ERROR"
    assert record.caller_id == played.outcomes[0].caller_id
    assert bool(record.exc_info) == (scene is not bad_verdict)
    played.listener.close()
    await played.task


async def test_a_handler_that_raises(dial: Dial, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that raises is logged with its caller, whose connection is reset."""
    scene = Scene(dial)

    async def fail(_stream: Any) -> None:
        raise ZeroDivisionError

    scene.handler = fail
    await scene.open(accept)
    client = dial(scene.listener)
    assert await wire_end(client) == "reset"
    (record,) = logged(caplog)
    assert (record.levelname, record.caller_id) == ("ERROR", client.getsockname())
    scene.listener.close()
    await scene.task


async def test_at_every_moment(dial: Dial) -> None:
    """Asked at any moment, a condition and a callback included, the counts add up."""
    sums: list[int] = []

    def check(_: object = None) -> None:
        s = scene.listener.statistics()
        ends = (s.accepted, s.rejected, s.reset, s.expired, s.failed, s.closed, s.pending)
        sums.append(s.taken - sum(ends))

    async def later(_pending: PendingTransport) -> AnyVerdict:
        check()
        await asyncio.sleep(0)
        check()
        return ACCEPT

    verdicts: list[Any] = [ACCEPT, REJECT, Defer(after=0), later, Reject(data=b"x"), later, ACCEPT]

    def condition(pending: PendingTransport) -> Any:
        check()
        pending.hold(check)
        pending.on_settled(check)
        verdict = verdicts.pop(0) if verdicts else ACCEPT
        return verdict(pending) if callable(verdict) else verdict

    def make(stream: Stream) -> Stream:
        check()
        return stream

    scene = Scene(dial)
    await scene.open(condition, stream_factory=make, max_streams=Limit(6, "reject"))
    scene.listener.on_outcome(check)
    clients = [dial(scene.listener) for _ in range(7)]
    await until(lambda: len(scene.outcomes) == 7)
    for client in clients:
        client.close()
    await until(lambda: not scene.listener.statistics().streams)
    scene.listener.close()
    await scene.task
    assert len(sums) > 30
    assert not any(sums)


async def test_in_hand(listener: Listener[Stream], dial: Dial) -> None:
    """A connection that accept() has just taken counts as pending while it is asked about."""
    seen: list[tuple[int, int]] = []

    def condition(_pending: PendingTransport) -> AnyVerdict:
        statistics = listener.statistics()
        seen.append((statistics.taken, statistics.pending))
        return REJECT

    dial(listener)
    with pytest.raises(ConnectionRefusedError):
        await listener.accept(condition)
    statistics = listener.statistics()
    assert seen == [(1, 1)]
    assert (statistics.taken, statistics.pending, statistics.rejected) == (1, 0, 1)


async def test_how_things_stand(dial: Dial) -> None:
    """Statistics say who is where: deciding, deferred, open, starting, in a handler, queued."""
    verdicts: list[Any] = [ACCEPT, ACCEPT, DEFER, None]

    def condition(_pending: PendingTransport) -> Any:
        return verdicts.pop(0) or asyncio.get_running_loop().create_future()

    scene = Scene(dial)

    async def handle(stream: Any) -> None:
        if scene.listener.statistics().handlers == 1:
            stream.started()
        await stream.read()

    scene.handler = handle
    await scene.open(condition)
    for _ in range(4):
        dial(scene.listener)
    await until(lambda: scene.listener.statistics().taken == 4)
    await until(lambda: scene.listener.statistics().handlers == 2)
    scene.listener.suspend()
    dial(scene.listener)
    await queued(scene.listener, 1)
    s = scene.listener.statistics()
    assert (s.streams, s.starting, s.handlers) == (2, 2, 2)
    assert (s.pending, s.deciding, s.deferred, s.ready) == (2, 1, 1, 0)
    assert (s.backlog, s.suspended, s.refusing, s.exhausted) == (1, True, False, False)
    assert (s.offers, s.deferrals) == (4, 1)
    assert s.oldest_age is not None
    assert s.oldest_age >= 0
    scene.listener.abort()
    await asyncio.wait_for(scene.task, LIMIT)
    s = scene.listener.statistics()
    assert (s.streams, s.starting, s.handlers, s.pending, s.oldest_age) == (0, 0, 0, 0, None)


async def test_admitted_ones() -> None:
    """Who was let in and is not complete yet is pending, and counted as ready to be."""
    listener, gate = memory_listener(slow=True)
    call = asyncio.ensure_future(listener.accept())
    with gate.dial():
        await until(lambda: gate.admitting)
        statistics = listener.statistics()
        assert (statistics.pending, statistics.ready, statistics.accepted) == (1, 1, 0)
        gate.complete()
        (await call).close()
        assert listener.statistics().accepted == 1
    listener.close()
