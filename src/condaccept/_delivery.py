"""How events reach those who subscribed: by a call from the loop, a task, or a record.

One `Delivery` serves a listener and the streams it accepted. It knows neither: a source
is asked only whether what happened to it is still worth telling.
"""

from __future__ import annotations

import asyncio
import inspect
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from condaccept._events import Event, SharedSubscription, check_events
from condaccept.exceptions import ListenerClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from condaccept._events import Subscription

__all__ = ("Delivery", "EventRecord", "Source", "current_task")

IN_A_ROW: Final = 32
"""Calls of `EventRecord.wait()` that complete at once before one yields to the loop."""

_AT_WORK: Final[set[Delivery]] = set()
"""Those with a task that runs. asyncio has but weak references to tasks, and what they wait
on may be known to nobody else."""


class Source(Protocol):
    """What events are about: a listener or a stream."""

    def _still_tells(self, event: Event) -> bool:
        """Whether *event*, which has happened before, is still worth telling."""


class Delivery:
    """Calls the callbacks, keeps the tasks of async ones, and knows the records.

    Of one subscription and event there is one run at a time. What happens during it is
    kept, once, until it has ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[tuple[Subscription, Event], asyncio.Future[Any]] = {}
        self._kept: dict[tuple[Subscription, Event], tuple[Source, OSError | None]] = {}
        self._records: list[EventRecord] = []
        self._aborted = False

    def post(
        self, subscription: Subscription, source: Source, event: Event, error: OSError | None
    ) -> None:
        """Tell soon, from the loop; a record notes it at once."""
        if subscription.at_once:
            subscription.callback(source, event, error)
        elif not self._loop.is_closed():
            # In the subscriber's context: that of whoever caused the event is no concern of its.
            self._loop.call_soon(
                self._deliver, subscription, source, event, error, context=subscription.context
            )

    def _deliver(
        self, subscription: Subscription, source: Source, event: Event, error: OSError | None
    ) -> None:
        if subscription.cancelled or self._aborted or not source._still_tells(event):
            return
        key = subscription, event
        if key in self._running:
            self._kept[key] = source, error
            return
        try:
            result = subscription.callback(source, event, error)
            if result is None or not inspect.isawaitable(result):
                return
            task = asyncio.ensure_future(result, loop=self._loop)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:  # noqa: BLE001 - whatever it is, it is the callback's
            self._report(subscription, event, failure)
            return
        self._running[key] = task
        _AT_WORK.add(self)
        task.add_done_callback(partial(self._done, key))

    def _done(self, key: tuple[Subscription, Event], task: asyncio.Future[Any]) -> None:
        del self._running[key]
        if not self._running:
            _AT_WORK.discard(self)
        failure = None if task.cancelled() else task.exception()
        # The loop has raised these two itself.
        if failure is not None and not isinstance(failure, (KeyboardInterrupt, SystemExit)):
            self._report(*key, failure)
        if key in self._kept:
            source, error = self._kept.pop(key)
            self._deliver(key[0], source, key[1], error)

    def _report(self, subscription: Subscription, event: Event, failure: BaseException) -> None:
        message = f"the callback of {event} raised: {subscription.callback!r}"
        self._loop.call_exception_handler({"message": message, "exception": failure})

    # -- the end

    def close(self) -> None:
        """Cancel the tasks about the listener, but for the one that closes it."""
        self._cancel(self._about_listener())

    def abort(self) -> None:
        """Cancel all tasks, but for the one that does this, and call nobody any more."""
        self._aborted = True
        self._kept.clear()
        self._cancel(self._running.values())

    async def wait_closed(self) -> None:
        """Wait until no task about the listener is left, but for the caller's own."""
        while others := {*self._about_listener()} - {current_task()}:
            await asyncio.wait(others)

    def _about_listener(self) -> list[asyncio.Future[Any]]:
        return [task for (_, event), task in self._running.items() if event is Event.PENDING]

    def _cancel(self, tasks: Iterable[asyncio.Future[Any]]) -> None:
        if self._loop.is_closed():
            return
        for task in {*tasks} - {current_task()}:
            task.cancel()

    # -- records

    def record(self, events: Event, is_over: Callable[[], bool]) -> EventRecord:
        """Return a new record of *events*; *is_over* says that nothing can come any more."""
        check_events(events)
        record = EventRecord(events, self._loop, is_over)
        self._records = [each for each in self._records if not each._subscription.cancelled]
        self._records.append(record)
        return record

    def look_over(self) -> None:
        """Have those who wait at a record see for themselves whether all is over."""
        for record in self._records:
            record._wake()


class EventRecord:
    """What has happened to a listener and its streams, until somebody reads it.

    Made by `Listener.watch()`. Each event of each source is in it once, in the order of
    recording. It grows with what is left unread, by one entry for every connection that
    ended for one: a record that nobody wants any more is to be cancelled.

    Source: WSPEventSelect, WSPEnumNetworkEvents.
    """

    def __init__(
        self, events: Event, loop: asyncio.AbstractEventLoop, is_over: Callable[[], bool]
    ) -> None:
        self._loop = loop
        self._is_over = is_over
        # A listener is held weakly: one that is forgotten has to end, whatever is recorded.
        self._entries: dict[tuple[Source | weakref.ref[Source], Event], OSError | None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._waiting = False
        self._streak = 0
        self._subscription: Final = SharedSubscription(events, self._note)

    def __repr__(self) -> str:
        gone = " cancelled" if self._subscription.cancelled else ""
        events = Event(self._subscription._events)
        return f"<EventRecord {events!r} recorded={len(self._entries)}{gone}>"

    def read(self) -> list[tuple[Any, Event, OSError | None]]:
        """Return what is recorded, as ``(source, event, error)``, and clear it.

        Never waits; the list may be empty. *error* is ``None`` but for a CLOSE after a
        failure. A stream that is closed by now is reported for CLOSE alone, a closed
        listener not at all.
        """
        entries, self._entries = self._entries, {}
        told = []
        for (source, event), error in entries.items():
            about = source() if isinstance(source, weakref.ref) else source
            if about is not None and about._still_tells(event):
                told.append((about, event, error))
        return told

    async def wait(self) -> list[tuple[Any, Event, OSError | None]]:
        """Wait until something is recorded, then do as `read()`; ``[]`` once cancelled.

        What is returned is as it was when it was recorded: somebody may have acted on it
        since.

        Raises:
            ListenerClosedError: Nothing is recorded, and nothing can be any more: the
                listener is closed and, unless the record is of PENDING alone, no
                connection that it accepted is open.
            RuntimeError: Another task waits here.

        Cancellation:
            Safe: what is recorded stays.
        """
        if self._waiting:
            await asyncio.sleep(0)
            message = "another task waits for this record already"
            raise RuntimeError(message)
        self._waiting = True
        try:
            turned = self._streak >= IN_A_ROW
            if turned:
                await self._turn()
            self._streak += 1
            while not (told := self.read()) and not self._subscription.cancelled:
                if not self._is_over():
                    await self._recorded()
                elif turned:
                    reason = "the listener is closed"
                    raise ListenerClosedError(reason)
                else:
                    await self._turn()
                turned = True
            return told
        finally:
            self._waiting = False

    def cancel(self) -> None:
        """Record nothing more, of no source, and forget what is unread.

        A waiting `wait()` returns ``[]``.
        """
        self._subscription.cancel()
        self._entries.clear()
        self._wake()

    def _note(self, source: Source, event: Event, error: OSError | None) -> None:
        entry = weakref.ref(source) if event is Event.PENDING else source
        self._entries.setdefault((entry, event), error)
        self._wake()

    async def _turn(self) -> None:
        self._streak = 0
        await asyncio.sleep(0)

    async def _recorded(self) -> None:
        self._streak = 0
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and not self._loop.is_closed():
            waiter.set_result(None)


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task; ``None`` in a callback, or where no loop runs."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
