"""Everything at random, by seed, under `serve()`, `streams()` and handles; then the books."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptError,
    Defer,
    PendingTransport,
    Reject,
    Stream,
)
from tests.support import descriptors, until
from tests.test_havoc import Havoc, MishapError, handles

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 1000
SAID: list[Any] = [
    ACCEPT,
    ACCEPT,
    REJECT,
    Reject(data=b"bye" * 100),
    Reject(data=bytes(5000)),
    DEFER,
    Defer(after=0),
    Defer(after=0.002),
    Defer(until_bytes=3),
    Defer(until_bytes=50, within=0.002),
    Defer(until_free=True),
    Defer(until_free=True, after=0.003, until_bytes=1000),
    7,
]


class ServingHavoc(Havoc):
    """One run, in which whoever consumes changes now and then."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__(kind, seed)
        self.served: asyncio.Task[None] | None = None
        self.known: list[PendingTransport] = []

    def make_stream(self, stream: Stream) -> Stream:
        """Refuse some streams, and note the others: nobody else sees all of them."""
        stream = super().make_stream(stream)
        self.books.streams.append(stream)
        return stream

    def begin(self, pending: PendingTransport) -> Any:
        """Note an offer, look around, and choose what to say."""
        name = self.name(pending)
        if name in self.books.deciding:
            self.books.wrong.append(f"{name} is under decision twice")
        self.known.append(pending)
        self.use(pending, name)
        said = self.rng.choice([*SAID, MishapError()])
        if isinstance(said, Reject) or pending.callee_data:
            self.books.farewells.add(name)
        pending.group = "nobody's" if self.rng.random() < 0.05 else None
        if self.rng.random() < 0.05:
            pending.reconsider()
        if self.rng.random() < 0.05:
            self.listener.reconsider(lambda _: self.rng.random() < 0.5)
        return said

    def condition(self) -> Any:
        """Choose a condition."""
        return self.rng.choice([None, self.plain, self.plain, self.slow, self.slow])

    # -- who consumes

    async def handle(self, stream: Stream) -> None:
        """Do something with a stream, or nothing."""
        how = self.rng.randrange(3)
        if how == 0:
            raise MishapError
        if how == 1:
            return
        try:
            if how == 2:
                stream.write(b"z" * 100)
            await asyncio.wait_for(stream.read(1), 0.002)
        except (OSError, TimeoutError):
            stream.close()
        except asyncio.CancelledError:
            if self.rng.random() < 0.7:
                raise

    async def iterate(self) -> None:
        """Iterate in several tasks over one object, and leave it now and then."""
        streams = self.listener.streams(self.condition())

        async def one() -> None:
            async for stream in streams:
                if self.rng.random() < 0.5:
                    stream.close()
                if self.rng.random() < 0.2:
                    break

        tasks = [asyncio.ensure_future(one()) for _ in range(self.rng.randrange(1, 4))]
        try:
            await asyncio.wait(tasks)
            if self.rng.random() < 0.5:
                await streams.aclose()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def consume(self) -> None:
        """Be the consumer for a while, in one of three ways."""
        with contextlib.suppress(AcceptError):
            how = self.rng.randrange(3)
            if how < 2:
                await self.listener.serve(self.handle, self.condition())
            elif how < 4:
                await self.iterate()
            else:
                try:
                    await self.listener.accept(self.condition())
                except (AcceptError, MishapError) as error:
                    self.told(error)

    def start(self) -> None:
        """Let somebody consume, unless somebody does."""
        self.tasks = [each for each in self.tasks if not each.done()]
        if len(self.tasks) < 2:
            self.tasks.append(asyncio.ensure_future(self.consume()))

    def cancel(self) -> None:
        """Cancel a consumer, or any task of the listener."""
        if self.rng.random() < 0.5:
            super().cancel()
            return
        tasks = asyncio.all_tasks() - {asyncio.current_task()} - set(self.tasks)
        if tasks:
            self.rng.choice(sorted(tasks, key=lambda task: task.get_name())).cancel()

    # -- by handle

    def by_handle(self) -> None:
        """Decide, take or reconsider one that is pending, or one that is gone."""
        known = [*self.listener.pending, *self.known[-3:]]
        if not known:
            return
        pending = self.rng.choice(known)
        how = self.rng.randrange(4)
        if how == 0:
            pending.reconsider()
        elif how == 1:
            self.listener.reconsider(lambda _: self.rng.random() < 0.5)
        elif how == 2:
            self.tasks.append(asyncio.ensure_future(self.take(pending)))
        else:
            said: Any = self.rng.choice(SAID)
            if isinstance(said, Reject):
                self.books.farewells.add(self.name(pending))
            with contextlib.suppress(AcceptError, RuntimeError):
                pending.decide(said)

    async def take(self, pending: PendingTransport) -> None:
        """Take one out of turn."""
        with contextlib.suppress(AcceptError, RuntimeError, MishapError):
            await pending.take()

    async def run(self) -> None:
        """Do all that, and close somewhere in the last part."""
        actions: dict[Callable[[], None], int] = {
            self.connect: 6,
            self.talk: 6,
            self.leave: 2,
            self.start: 8,
            self.by_handle: 3,
            self.cancel: 1,
            self.admit: 4,
            self.end_stream: 3,
        }
        weights = [weight * self.rng.choice([0.5, 1, 2]) for weight in actions.values()]
        for n in range(STEPS):
            (action,) = self.rng.choices([*actions], weights)
            action()
            for _ in range(self.rng.randrange(3)):
                await asyncio.sleep(0)
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

    def check_that_enough_happened(self) -> None:
        """Check that the run was one to learn from; how many are taken depends on timers."""
        statistics = self.listener.statistics()
        assert statistics.taken > STEPS // 100
        assert min(statistics.accepted, statistics.rejected, statistics.deferrals) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["tcp", "reader", "unix", "slow"])
async def test_havoc(kind: str, seed: int) -> None:
    """After all kinds of trouble each connection has one end and nothing is left."""
    loop = asyncio.get_running_loop()
    before = descriptors(), handles(loop), asyncio.all_tasks()
    havoc = ServingHavoc(kind, seed)
    await havoc.open()
    try:
        await havoc.run()
        await asyncio.sleep(0)
        havoc.check()
        havoc.check_that_enough_happened()
        await havoc.check_callers()
    finally:
        havoc.listener.close()
        havoc.close()
    await asyncio.sleep(0)
    assert (descriptors(), handles(loop), asyncio.all_tasks()) == before
