"""What tests of `streams()` and `serve()` share: conditions, handlers, starting, ending."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.support import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

    from condaccept import AnyVerdict, Listener, Outcome, PendingTransport, Stream


class Held:
    """An async condition that says its verdicts when the test says so."""

    def __init__(self) -> None:
        self.offered: list[PendingTransport] = []
        self.verdicts: list[asyncio.Future[Any]] = []
        self.released: list[PendingTransport] = []

    async def __call__(self, pending: PendingTransport) -> AnyVerdict:
        """Hold something, and wait for the verdict of this offer."""
        pending.hold(partial(self.released.append, pending))
        verdict: asyncio.Future[AnyVerdict] = asyncio.get_running_loop().create_future()
        self.offered.append(pending)
        self.verdicts.append(verdict)
        return await verdict

    async def asked(self, n: int) -> None:
        """Wait until *n* offers have been made."""
        await until(lambda: len(self.offered) == n)


class Handler:
    """A handler that keeps its streams until the test says so."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.go = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, stream: Stream) -> None:
        """Keep the stream, wait."""
        self.streams.append(stream)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def has(self, n: int) -> None:
        """Wait until *n* streams have come."""
        await until(lambda: len(self.streams) == n)


async def keep(stream: Stream) -> None:
    """Handle a stream until its caller closes."""
    await stream.read()


def start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a task."""
    return asyncio.ensure_future(coroutine)


async def result(task: Awaitable[Any]) -> Any:
    """Wait for a task; return its result."""
    async with asyncio.timeout(LIMIT):
        return await task


async def ended(task: asyncio.Task[Any]) -> BaseException | None:
    """Wait for a task; return what it raised, if it did."""
    await asyncio.wait([task], timeout=LIMIT)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    assert isinstance(await ended(task), asyncio.CancelledError)


async def serving(
    listener: Listener[Any], condition: Any = None, handler: Any = keep, data: object = None
) -> asyncio.Task[Any]:
    """Start `serve()`, and wait until it is the consumer."""
    task = start(listener.serve(handler, condition, data))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def iterating(streams: Any) -> asyncio.Task[Any]:
    """Start one iteration, and wait until it waits."""
    task = start(anext(streams))
    await asyncio.sleep(0)
    assert not task.done()
    return task


def add_up(listener: Listener[Any]) -> None:
    """Check that every connection that was taken is counted once."""
    now = listener.statistics()
    ends = now.accepted, now.rejected, now.reset, now.expired, now.failed, now.closed
    assert now.taken == sum(ends) + now.pending


def outcomes(listener: Listener[Any]) -> list[Outcome]:
    """Collect the outcomes of a listener."""
    seen: list[Outcome] = []
    listener.on_outcome(seen.append)
    return seen
