"""What services use: `streams()` and `serve()`, where a deferral blocks nobody."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from condaccept._consumption import Consumption
from condaccept._delivery import current_task
from condaccept._moving import closed_error
from condaccept._pending import Status
from condaccept.exceptions import AcceptError, ListenerClosedError

if TYPE_CHECKING:
    from condaccept._pending import PendingTransport
    from condaccept._stream import Stream

__all__ = ("Handler", "Serve", "Streams")

T = TypeVar("T")

IN_A_ROW: Final = 64
"""Iterations that complete at once before one yields to the loop."""

logger = logging.getLogger("condaccept")

Handler: TypeAlias = Callable[[T], Awaitable[object]]
"""Called with each stream, or with what ``stream_factory`` made of it; usually ``async``."""


class Streams(Consumption[T]):
    """An asynchronous iterator over the streams of accepted connections; see `Listener.streams()`.

    Several tasks may iterate over one such object; each stream goes to one of them.
    Nothing is taken while none of them waits for the next one. What happens to a caller
    that does not get in is told by `Listener.on_outcome()` and counted.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._iterating = 0
        self._given: deque[T] = deque()
        self._direct = False  # a task is in the pump itself, and takes what comes
        self._over = False
        self._streak = 0
        self._error: AcceptError | None = None

    def __aiter__(self) -> Streams[T]:
        return self

    async def __anext__(self) -> T:
        """Return the next accepted connection's stream.

        Raises:
            StopAsyncIteration: The listener was closed.
            AcceptInProgressError: The call comes from a condition of this listener, or
                another kind of consumer is at work.
            AcceptError: The listening socket was closed or shut down by somebody else.

        Cancellation:
            Safe: an accepted connection waits for the next iteration.
        """
        if self._streak >= IN_A_ROW:
            await self._turn()
        self._streak += 1
        self._iterating += 1
        deciding = self._deciding
        try:
            deciding.check_reentry()
            while not self._given:
                if self._error is not None:
                    raise self._error
                if self._over or (deciding.stopped and self._finished()):
                    raise closed_error()
                self._begin()
                self._try()
                if not self._given and not self._finished() and self._error is None:
                    await self._wait()
            return self._given.popleft()
        except ListenerClosedError:
            await self._turn()
            raise StopAsyncIteration from None
        except Exception:
            await self._turn()
            raise
        finally:
            self._iterating -= 1

    async def aclose(self) -> None:
        """End the iterations. Decisions under way are cancelled.

        Their connections stay, undecided; so do accepted ones that nobody has taken: the
        next consumer gets them.

        Cancellation:
            The iterations have ended; decisions under way are cancelled all the same.
        """
        self._over = True
        self.closed()
        for task in list(self._deciders):
            task.cancel()
        try:
            while self._deciders:
                await asyncio.wait(self._deciders)
        finally:
            self._end()

    def busy(self) -> bool:
        """Whether an iteration waits, or a decision is under way."""
        return self._iterating > 0 or not all(task.done() for task in self._deciders)

    async def _turn(self) -> None:
        self._streak = 0
        await asyncio.sleep(0)

    def _finished(self) -> bool:
        """Whether nobody will come any more.

        The decision in which the listener was closed keeps its verdict: that one may come.
        """
        return self._deciding.finished() and all(task.cancelling() for task in self._deciders)

    def _decided(
        self, pending: PendingTransport, awaitable: Awaitable[Any], task: asyncio.Task[None]
    ) -> None:
        super()._decided(pending, awaitable, task)
        if self._deciding.finished():
            self.closed()

    def _try(self) -> None:
        """Take and decide in the step of the iteration itself, for it alone."""
        self._direct = True
        try:
            self._pump()
        finally:
            self._direct = False

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        self._streak = 0
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # woken, and ended before it could look: somebody else has to
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done() and not self._loop.is_closed():
                waiter.set_result(None)
                return

    def became_due(self, pending: PendingTransport | None) -> None:
        super().became_due(pending)
        if pending is not None and pending._status is Status.READY:
            self._wake()

    def left_place(self) -> None:
        if self._deciding.stopped and self._deciding.finished():
            self.closed()
        self._later()

    def closed(self) -> None:
        super().closed()
        while self._waiters:
            self._wake()

    def _wants(self) -> bool:
        if self._direct:
            return not self._given
        # A cancelled one is here until its task has had its turn.
        return any(not waiter.done() for waiter in self._waiters)

    def _wants_stream(self) -> bool:
        return self._direct and not self._given

    def _give(self, _stream: Stream, result: T) -> None:
        self._given.append(result)

    def _broken(self, error: AcceptError) -> None:
        self._error = error
        self.closed()


class Serve(Consumption[T]):
    """A handler for each accepted connection, as a task."""

    def __init__(self, handler: Callable[[T], Awaitable[object]], *args: Any) -> None:
        if not callable(handler):
            message = f"the handler cannot be called: {handler!r}"
            raise TypeError(message)
        super().__init__(*args)
        self._handler = handler
        self._is_async = inspect.iscoroutinefunction(handler)
        self._handlers: dict[asyncio.Task[None], Stream] = {}
        self._ending: asyncio.Future[None] | None = None
        self._error: AcceptError | None = None

    async def run(self) -> None:
        """See `Listener.serve()`."""
        await asyncio.sleep(0)
        if self._deciding.finished():
            raise closed_error()
        self._begin()
        self._ending = self._loop.create_future()
        try:
            self._later()  # from the loop, as at any later time: no condition runs in this task
            await self._ending
            await self._finished(cancel=False)
        except BaseException:
            await self._finished(cancel=True)
            raise
        finally:
            self._end()
            self._ending = None
        if self._error is not None:
            raise self._error

    @property
    def handlers(self) -> int:
        """How many handlers are running."""
        return len(self._handlers)

    def stream_of(self, task: asyncio.Task[Any] | None) -> Stream | None:
        """Return the stream that *task* is the handler of."""
        return None if task is None else self._handlers.get(task)

    def busy(self) -> bool:
        """Whether it is running."""
        return self._ending is not None

    def closed(self) -> None:
        super().closed()
        self._after()

    async def _finished(self, *, cancel: bool) -> None:
        """Wait for decisions and handlers; a cancellation meanwhile cancels them."""
        if cancel:
            self._end()
            self._cancel()
        while tasks := self._deciders | self._handlers.keys():
            try:
                await asyncio.wait(tasks)
            except asyncio.CancelledError:
                if not cancel:
                    raise
                self._cancel()

    def _cancel(self) -> None:
        for task in self._deciders | self._handlers.keys():
            task.cancel()

    def _after(self) -> None:
        if self._ending is None or self._ending.done() or self._loop.is_closed():
            return
        if self._deciding.finished() or self._error is not None:
            self._ending.set_result(None)

    def _wants(self) -> bool:
        return self._error is None and self._ending is not None and not self._ending.done()

    def _wants_stream(self) -> bool:
        # Not what a decision comes to after the cancellation: the next consumer gets that.
        return self._deciding.consumer is self

    def _give(self, stream: Stream, result: T) -> None:
        task: asyncio.Task[Any] = self._loop.create_task(self._running(stream, result))
        self._handlers[task] = stream
        # Not in the task: one that is cancelled before its first step runs nothing of it.
        task.add_done_callback(self._handled)

    def _running(self, stream: Stream, result: T) -> Coroutine[Any, Any, object]:
        """Return what the task of a handler runs: the handler's own coroutine if that can be.

        One that is no async function does its work when it is called, which is for its task
        to do; and where tasks are eager, it begins before its task is known here.
        """
        if self._is_async and self._loop.get_task_factory() is None:
            try:
                running = self._handler(result)
            except Exception:  # noqa: BLE001 - in the task it is the handler's
                return self._handle(stream, result)
            if type(running) is CoroutineType:
                return running
            return self._handle(stream, result, running)
        return self._handle(stream, result)

    async def _handle(
        self, stream: Stream, result: T, running: Awaitable[object] | None = None
    ) -> None:
        if (task := current_task()) is not None:
            self._handlers[task] = stream  # an eager one runs before its maker has it
        if running is None:
            running = self._handler(result)
        if not inspect.isawaitable(running):
            message = f"a handler is async, or returns an awaitable: {self._handler!r}"
            raise TypeError(message)
        await running

    def _handled(self, task: asyncio.Task[None]) -> None:
        stream = self._handlers.pop(task)
        if task.cancelled():
            stream.abort()
        elif (error := task.exception()) is None:
            stream.close()
        else:
            stream.abort()
            # What a handler makes of its stream being aborted, or reset by the peer, is no
            # fault of it.
            expected = (self._deciding.aborted and isinstance(error, ConnectionAbortedError)) or (
                isinstance(error, OSError) and stream._failure() is not None
            )
            logger.log(
                logging.DEBUG if expected else logging.ERROR,
                "the handler of %r raised",
                stream.caller_id,
                exc_info=error,
                extra={"caller_id": stream.caller_id},
            )

    def _broken(self, error: AcceptError) -> None:
        self._error = error
