"""Everything at once, at random: ``python -m tests.soak --seconds 120``, or ``make soak``.

Callers that talk, stall, half-close and reset; verdicts of every kind; and faults: no
descriptors, suspensions, refusals, limits changed, cancellations, handlers that raise.
Afterwards nothing may be left, and every connection has to be accounted for. A failure
names its seed, which repeats the choices, though not the kernel's timing.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import logging
import os
import random
import resource
import socket
import sys
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import uvloop

from condaccept import (
    ACCEPT,
    DEFER,
    REJECT,
    AcceptError,
    Defer,
    Limit,
    Listener,
    ListenerClosedError,
    Outcome,
    PendingTransport,
    Reject,
    Stream,
    listen,
)
from tests.support import reset

if TYPE_CHECKING:
    from collections.abc import Callable

CLIENTS = 60
SAID: list[Any] = [
    ACCEPT,
    ACCEPT,
    ACCEPT,
    REJECT,
    Reject(data=b"bye" * 100),
    Reject(data=bytes(5000)),
    DEFER,
    Defer(after=0.002),
    Defer(until_bytes=10, within=0.003),
    Defer(until_free=True),
    7,
]


class MishapError(Exception):
    """What conditions, factories, handlers and callbacks raise here."""


def opened() -> set[str]:
    """What this process has open."""
    with os.scandir("/proc/self/fd") as entries:
        numbers = [entry.name for entry in entries]
    names = set()
    for number in numbers:
        with contextlib.suppress(OSError):  # that of the folder
            names.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return names


class Soak:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a seeded sequence, no secret
        self.clients: list[socket.socket] = []
        self.spare: list[socket.socket] = []
        self.outcomes: list[Outcome] = []
        self.settled: collections.Counter[PendingTransport] = collections.Counter()
        self.offered: set[PendingTransport] = set()
        self.deciding: set[PendingTransport] = set()
        self.holds: list[int] = []
        self.wrong: list[str] = []
        self.handlers: set[asyncio.Task[Any]] = set()
        self.consumer: asyncio.Task[None] | None = None
        self.taken: list[int] = []
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.listener: Listener[Stream]
        self.address: Any

    # -- what is asked, made and served

    def condition(self, pending: PendingTransport) -> Any:
        """Say anything, at once or later."""
        if pending in self.deciding:
            self.wrong.append(f"two decisions at once about {pending!r}")
        if self.rng.random() < 0.5:
            n = len(self.holds)
            self.holds.append(0)
            pending.hold(partial(self.release, n))
        if pending not in self.offered:
            self.offered.add(pending)
            pending.on_settled(lambda _: self.settled.update([pending]))
        roll = self.rng.random()
        if roll < 0.05:
            raise MishapError
        if roll < 0.3:
            return self.later(pending)
        return self.rng.choice(SAID)

    async def later(self, pending: PendingTransport) -> Any:
        """Say anything, later."""
        self.deciding.add(pending)
        try:
            for _ in range(self.rng.randrange(5)):
                await asyncio.sleep(0)
            if self.rng.random() < 0.1:
                await asyncio.sleep(0.002)
            if self.rng.random() < 0.05:
                raise MishapError
            return self.rng.choice(SAID)
        finally:
            self.deciding.discard(pending)

    def release(self, n: int) -> None:
        """Count, and sometimes raise."""
        self.holds[n] += 1
        if self.rng.random() < 0.02:
            raise MishapError

    def make(self, stream: Stream) -> Stream:
        """Sometimes make nothing of it."""
        if self.rng.random() < 0.05:
            raise MishapError
        return stream

    async def handle(self, stream: Stream) -> None:
        """Serve in one way or another."""
        roll = self.rng.random()
        if roll < 0.1:
            raise MishapError
        if roll < 0.2:
            return
        if roll < 0.3:
            transport, _ = await stream.into_transport(asyncio.Protocol)
            await asyncio.sleep(0.001)
            transport.close()
            return
        stream.started()
        if roll < 0.4:
            stream.write(bytes(100_000))
            return
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(0.02):
                while data := await stream.read(100):
                    await stream.send(data)

    async def run_handler(self, stream: Stream) -> None:
        """Do as serve() does."""
        async with stream:
            with contextlib.suppress(MishapError, OSError):
                await self.handle(stream)

    async def consume(self, how: str) -> None:
        """Accept in one of three ways until cancelled or closed."""
        with contextlib.suppress(ListenerClosedError):
            if how == "serve":
                await self.listener.serve(self.handle, self.condition)
            elif how == "streams":
                streams = self.listener.streams(self.condition)
                try:
                    async for stream in streams:
                        self.start(stream)
                finally:
                    await streams.aclose()
            else:
                while True:
                    try:
                        self.start(await self.listener.accept(self.condition))
                    except ListenerClosedError:
                        return
                    except (AcceptError, MishapError):
                        await asyncio.sleep(0)

    def start(self, stream: Stream) -> None:
        """Handle a stream."""
        task = asyncio.ensure_future(self.run_handler(stream))
        self.handlers.add(task)
        task.add_done_callback(self.handlers.discard)

    # -- what happens

    def connect(self) -> None:
        """One caller more."""
        self.clients = [each for each in self.clients if each.fileno() >= 0]
        if not self.spare and not self.taken:
            self.spare = [socket.socket() for _ in range(4)]
        if not self.spare or len(self.clients) >= CLIENTS:
            return
        client = self.spare.pop()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(self.address)
        self.clients.append(client)

    def talk(self) -> None:
        """A caller sends, or reads."""
        if self.clients:
            client = self.rng.choice(self.clients)
            with contextlib.suppress(OSError):
                if self.rng.random() < 0.6:
                    client.send(b"x" * self.rng.choice([1, 9, 5000]))
                else:
                    client.recv(100_000)

    def leave(self) -> None:
        """A caller half-closes, closes or resets."""
        if self.clients:
            client = self.rng.choice(self.clients)
            how = self.rng.randrange(3)
            with contextlib.suppress(OSError):
                if how == 0:
                    client.shutdown(socket.SHUT_WR)
                elif how == 1:
                    client.close()
                else:
                    reset(client)

    def exhaust(self) -> None:
        """Take all descriptors but a few, or give them back."""
        if self.taken:
            self.replenish()
            return
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, self.limits[1]))
        with contextlib.suppress(OSError):
            while True:
                self.taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(min(len(self.taken) - 1, self.rng.randrange(4))):
            os.close(self.taken.pop())

    def replenish(self) -> None:
        """End the shortage."""
        for fd in self.taken:
            os.close(fd)
        self.taken.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)

    def pause(self) -> None:
        """Suspend, refuse, or go on."""
        with contextlib.suppress(OSError):
            if self.rng.random() < 0.7:
                self.listener.resume()
            else:
                self.listener.suspend(refuse=self.rng.random() < 0.5)

    def limit(self) -> None:
        """Change a limit."""
        n = self.rng.randrange(12)
        limit = self.rng.choice(
            [
                None,
                None,
                None,
                Limit(n),
                Limit(n, "reject"),
                Limit(n, "refuse"),
                Limit(n + 2, "refuse", 1),
            ]
        )
        setattr(self.listener, self.rng.choice(["max_streams", "max_starting"]), limit)

    def wake(self) -> None:
        """Have the deferred offered again, or decide one by handle."""
        pending = self.listener.pending
        if not pending or self.rng.random() < 0.3:
            self.listener.reconsider(lambda _: self.rng.random() < 0.7)
            return
        with contextlib.suppress(AcceptError, RuntimeError, MishapError):
            self.rng.choice(pending).decide(self.rng.choice([ACCEPT, REJECT, DEFER]))

    def switch(self) -> None:
        """Cancel the consumer; another one begins with the next turn."""
        if self.consumer is not None:
            self.consumer.cancel()

    def cancel(self) -> None:
        """Cancel a handler."""
        if self.handlers:
            self.rng.choice(sorted(self.handlers, key=lambda task: task.get_name())).cancel()

    async def step(self) -> None:
        """Let one thing happen."""
        what: Callable[[], None] = self.rng.choices(
            [
                self.connect,
                self.talk,
                self.leave,
                self.exhaust,
                self.pause,
                self.limit,
                self.wake,
                self.switch,
                self.cancel,
            ],
            [40, 20, 20, 2, 3, 4, 8, 2, 1],
        )[0]
        what()
        if self.taken and self.rng.random() < 0.1:
            self.replenish()
        if self.consumer is None or self.consumer.done():
            how = self.rng.choice(["serve", "streams", "accept"])
            self.consumer = asyncio.ensure_future(self.consume(how))
        for _ in range(self.rng.choice([0, 1, 1, 3])):
            await asyncio.sleep(0)

    # -- the books

    def check(self) -> None:
        """Check what holds at any moment."""
        s = self.listener.statistics()
        ends = (s.accepted, s.rejected, s.reset, s.expired, s.failed, s.closed)
        if s.taken != sum(ends) + s.pending:
            self.wrong.append(f"the counts do not add up: {s}")
        capacity = self.listener._deciding.capacity
        if not s.streams <= capacity.streams.taken <= s.streams + s.ready:
            self.wrong.append(f"{capacity.streams.taken} places taken: {s}")
        if capacity.starting.taken > capacity.streams.taken:
            self.wrong.append("more are starting than are open")

    def run_on(self, factory: Callable[[], asyncio.AbstractEventLoop], steps: int) -> None:
        """Run on a loop of its own, which may keep descriptors as long as it lives."""
        factory().close()  # libuv keeps a pipe from its first loop on
        before = opened()
        with asyncio.Runner(loop_factory=factory, debug=False) as runner:
            runner.run(self.run(steps))
        if left := opened() - before:
            self.wrong.append(f"descriptors are left: {left}")

    async def run(self, steps: int) -> None:
        """Run, end, and check."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.reported)
        async with await listen(
            "127.0.0.1",
            0,
            max_pending=12,
            max_deciding=5,
            defer_timeout=0.01,
            reject_timeout=0.01,
            stream_factory=self.make,
            exhausted=self.rng.choice(["pause", "shed_oldest_deferred"]),
            on_eof=self.rng.choice(["keep", "withdraw"]),
        ) as self.listener:
            self.address = self.listener.sockname
            self.listener.on_outcome(self.outcomes.append)
            try:
                for _ in range(steps):
                    await self.step()
                    self.check()
            finally:
                self.replenish()
            await self.end()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.check_end()
        for client in (*self.clients, *self.spare):
            client.close()
        gc.collect()
        await asyncio.sleep(0)

    async def end(self) -> None:
        """End in order."""
        left = await self.listener.shutdown(self.rng.choice([0, 0.01, 0.05]))
        if not left and self.listener.statistics().streams:
            self.wrong.append("streams were left and not named")
        if self.consumer is not None:
            self.consumer.cancel()
            await asyncio.wait([self.consumer])
            if not self.consumer.cancelled() and (error := self.consumer.exception()):
                self.wrong.append(f"the consumer ended with {error!r}")
        if self.handlers:
            await asyncio.wait(self.handlers)

    def check_end(self) -> None:
        """Check what holds afterwards."""
        self.check()
        s = self.listener.statistics()
        if (s.pending, s.streams, s.handlers, s.rejecting, s.exhausted) != (0, 0, 0, 0, False):
            self.wrong.append(f"something is left: {s}")
        if len(self.outcomes) != s.taken:
            self.wrong.append(f"{len(self.outcomes)} outcomes of {s.taken} connections")
        if any(self.settled[each] != 1 for each in self.offered):
            self.wrong.append("not every connection was settled once")
        if set(self.holds) - {1}:
            self.wrong.append("not everything held was released once")
        deciding = self.listener._deciding
        timers = [deciding._timer, deciding._relisten]
        if any(timer is not None and not timer.cancelled() for timer in timers):
            self.wrong.append("a timer is left")
        if deciding._idle or deciding.deciders or self.listener._watch.needed:
            self.wrong.append("something is waited for")
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            self.wrong.append(f"tasks are left: {others}")

    def reported(self, _loop: Any, context: dict[str, Any]) -> None:
        """Note what the loop is told of, but for what was raised to be reported."""
        if not isinstance(context.get("exception"), MishapError):
            self.wrong.append(f"reported: {context}")


@contextlib.contextmanager
def quiet() -> Any:
    """Keep what is meant to go wrong out of the log, and forgotten streams out of warnings."""
    logger = logging.getLogger("condaccept")
    was = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            # What is cancelled with a stream in hand has forgotten it.
            warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
            yield
    finally:
        logger.disabled = was


def main() -> int:
    """Run on both loops by turns until the time is over; return how many failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="when to stop; %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="of a run; %(default)s")
    parser.add_argument("--seed", type=int, help="one run with this seed, on each loop")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    first = arguments.seed if arguments.seed is not None else random.randrange(10**6)  # noqa: S311
    runs, ends = 0, collections.Counter[str]()
    with quiet():
        for seed in range(first, first + 10**6):
            for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
                soak = Soak(seed)
                soak.run_on(factory, arguments.steps)
                if soak.wrong:
                    print(f"seed {seed}, {factory.__module__}:", *soak.wrong, sep="\n  ")  # noqa: T201
                    return 1
                runs += 1
                ends.update(outcome.status.value for outcome in soak.outcomes)
            if arguments.seed is not None or time.monotonic() >= end:
                break
    print(  # noqa: T201
        f"{runs} runs (seeds {first} to {seed}), {ends.total()} connections, all accounted for:",
        ", ".join(f"{n} {end}" for end, n in ends.most_common()),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
