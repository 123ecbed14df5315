"""`Listener`: the face of the library, over the rooms that do the work."""

from __future__ import annotations

import asyncio
import logging
import socket
import warnings
import weakref
from asyncio.trsock import TransportSocket
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, overload

from condaccept._accepting import Accepting
from condaccept._arguments import check_limits, check_timeout
from condaccept._capacity import Capacity, Limit, as_limit
from condaccept._consumption import Policy
from condaccept._delivery import Delivery, EventRecord
from condaccept._events import Event, EventCallback, Outcome, Signals, Subscription
from condaccept._ledger import Ledger, Statistics
from condaccept._open import unlink
from condaccept._pending import Condition, PendingDeque, PendingTransport, Status, check_plain
from condaccept._serving import Serve, Streams
from condaccept._shutdown import Leftovers, shutdown
from condaccept._sockets import (
    Option,
    apply_options,
    check_listening,
    check_options,
    descriptor_limit,
)
from condaccept._watch import Watch, open_watch
from condaccept.exceptions import ListenerClosedError
from condaccept.gates import Gate, HandshakeGate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from condaccept._exhaustion import Episode, OnExhausted
    from condaccept._group import StreamGroup
    from condaccept._moving import OnEof, OnFull
    from condaccept._pending import Address
    from condaccept._qos import FlowSpec
    from condaccept._serving import Handler
    from condaccept._stream import Stream

__all__ = ("Listener",)

T = TypeVar("T")

REJECTING: Final = 64
"""Descriptors that rejections in the background may hold; see `Farewells`."""

logger = logging.getLogger("condaccept")


class Listener(Generic[T]):
    """Takes connections and asks a condition about each before it lets it in.

    Made by `listen()`, or by `Listener.from_socket()`. Belongs to the event loop it was
    made in, to that loop's thread and process: a forked child must not touch it, nor its
    streams. ``async with`` closes it at the end.
    """

    def __init__(
        self,
        gate: Callable[[asyncio.AbstractEventLoop, Watch], Gate[Any]],
        *,
        stream_factory: Callable[[Stream], T] | None = None,
        max_pending: int | None = 1024,
        on_full: OnFull | None = None,
        max_deciding: int = 128,
        defer_timeout: float | None = 30.0,
        on_eof: OnEof = "keep",
        max_streams: int | Limit | None = None,
        max_starting: int | Limit | None = None,
        exhausted: OnExhausted = "pause",
        watch: Callable[[asyncio.AbstractEventLoop], Watch] = open_watch,
    ) -> None:
        """Use `listen()` or `from_socket()`; this is for a gate of your own.

        Args:
            gate: Makes the gate, given the loop and the listener's watch.
            stream_factory: See `listen()`, as for all that follows.
            max_pending: -
            on_full: -
            max_deciding: -
            defer_timeout: -
            on_eof: -
            max_streams: -
            max_starting: -
            exhausted: -
            watch: Makes the watch, given the loop.
        """
        check_limits(
            max_pending,
            max_deciding,
            defer_timeout,
            on_full,
            on_eof=on_eof,
            max_streams=max_streams,
            max_starting=max_starting,
            exhausted=exhausted,
        )
        capacity = Capacity(
            as_limit("max_streams", max_streams), as_limit("max_starting", max_starting)
        )
        if stream_factory is not None and not callable(stream_factory):
            message = f"stream_factory cannot be called: {stream_factory!r}"
            raise TypeError(message)
        loop = self._loop = asyncio.get_running_loop()
        self._watch = watch(loop)
        try:
            self._gate = gate(loop, self._watch)
            if capacity.refuses:
                self._gate.check_refusable()
        except BaseException:
            self._watch.release()
            raise
        sockets = self._gate.sockets
        self._sockname: Address = sockets[0].getsockname() if sockets else None
        self._pending = PendingDeque(max_pending, max_deciding, defer_timeout)
        self._ledger = Ledger(partial(_call_soon, loop), partial(_report, loop))
        self._delivery = Delivery(loop)
        self._file: tuple[str | bytes, tuple[int, int]] | None = None
        self._serving: set[Serve[T]] = set()
        self._accepting: Accepting[T] = Accepting(
            loop,
            self._watch,
            self._gate,
            pending=self._pending,
            ledger=self._ledger,
            signals=Signals(),
            delivery=self._delivery,
            source=weakref.ref(self),
            stream_factory=stream_factory,
            on_full=on_full,
            on_eof=on_eof,
            capacity=capacity,
        )
        self._deciding = self._accepting.deciding
        self._policy = Policy(exhausted)
        self._warn_of_descriptors()

    @classmethod
    def from_socket(
        cls,
        sock: socket.socket,
        *,
        stream_factory: Callable[[Stream], T] | None = None,
        options: Iterable[Option] = (),
        max_pending: int | None = 1024,
        on_full: OnFull | None = None,
        max_deciding: int = 128,
        defer_timeout: float | None = 30.0,
        reject_timeout: float | None = 5.0,
        on_eof: OnEof = "keep",
        max_streams: int | Limit | None = None,
        max_starting: int | Limit | None = None,
        exhausted: OnExhausted = "pause",
    ) -> Listener[T]:
        """Return a listener on a socket that listens already, and own that socket.

        For sockets made by systemd, by another process or by a test. The file of a Unix
        socket is left alone.

        Raises:
            NotASocketError: *sock* is closed.
            NotStreamSocketError: *sock* is not of type SOCK_STREAM.
            NotListeningError: listen(2) was not called on it.
            OSError: The kernel refused one of *options*, which the message names.
            TypeError, ValueError: An argument is not what it should be.

            After an error *sock* is still open, and the caller's.
        """
        if not isinstance(sock, socket.socket):
            message = f"from_socket() takes a socket.socket, got {sock!r}"
            raise TypeError(message)
        check_listening(sock)
        checked = check_options(options)
        check_timeout("reject_timeout", reject_timeout)
        check_limits(
            max_pending,
            max_deciding,
            defer_timeout,
            on_full,
            on_eof=on_eof,
            max_streams=max_streams,
            max_starting=max_starting,
            exhausted=exhausted,
        )
        apply_options(sock, checked)
        listener = cls(
            lambda loop, watch: HandshakeGate(loop, watch, [sock], reject_timeout=reject_timeout),
            stream_factory=stream_factory,
            max_pending=max_pending,
            on_full=on_full,
            max_deciding=max_deciding,
            defer_timeout=defer_timeout,
            on_eof=on_eof,
            max_streams=max_streams,
            max_starting=max_starting,
            exhausted=exhausted,
        )
        # Those the kernel has queued already have the options of before.
        listener._deciding.options.extend(checked)
        return listener

    def __repr__(self) -> str:
        how = "closed" if self._deciding.closed else repr(self.sockname)
        return f"<Listener {how} pending={len(self.pending)}>"

    # -- accepting

    async def accept(self, condition: Condition | None = None, callback_data: object = None) -> T:
        """Offer the oldest pending connection to *condition*; return its stream on ACCEPT.

        One call makes one offer and has one outcome. Where nobody is pending it waits.
        A connection that was deferred before is the oldest, and offered again. Several
        tasks may call: each decides another connection.

        Args:
            condition: Called as ``condition(pending)`` with a `PendingTransport`, in the
                loop's thread; plain or ``async``. Returns a verdict. ``None`` accepts.
            callback_data: Becomes ``pending.callback_data``.

        Returns:
            The `Stream`, or what ``stream_factory`` made of it.

        Raises:
            ConnectionRejectedError: The verdict was REJECT; the connection is closed.
            ConnectionDeferredError: The verdict was DEFER; it keeps its place.
            PendingResetError: The peer had reset it; *condition* was not asked.
            PendingExpiredError: Its deadline has passed, or its caller withdrew; closed.
            InvalidVerdictError: *condition* returned something else. The connection keeps
                its place, undecided; so with the next two.
            InvalidGroupError: *condition* named a group the listener does not have.
            CalleeDataError: The callee data of a `Reject` is over the capacity.
            QualityOfServiceError: The verdict was ACCEPT, and the flow spec of the
                connection or of its group could not be applied; the connection is reset.
            AcceptInterruptedError: `cancel_accept()` ended the wait.
            AcceptInProgressError: The call came from a condition of this listener.
            ConditionNotCallableError: *condition* cannot be called.
            ListenerClosedError: The listener was closed, before or during the call.
            DescriptorsExhaustedError: No descriptor is free and somebody waits; the
                caller stays in the kernel's queue, as with the next two.
            BuffersExhaustedError: The kernel has no memory for a socket.
            NetworkDownError: accept(2) passed on a network error.
            Exception: Whatever *condition* raised, unchanged. The connection is rejected.

        Cancellation:
            Safe before the verdict: the connection keeps its place, undecided.

        Source: WSPAccept, "Remarks"; accept(2).
        """
        return await self._accepting.accept(condition, callback_data)

    def accept_nowait(self, condition: Condition | None = None, callback_data: object = None) -> T:
        """Do as `accept()` does, without ever waiting.

        *condition* is a plain one.

        Raises:
            NoPendingError: Nobody is pending.
            Exception: As `accept()`. An awaitable verdict is an `InvalidVerdictError`.
        """
        return self._accepting.accept_nowait(condition, callback_data)

    async def wait_pending(self) -> None:
        """Wait until there is something new for an accept call to act on.

        That is a connection never offered, a deferred one whose hints are fulfilled or that
        is to be reconsidered, or a loss to report. A deferral is nothing new by itself,
        so ``wait_pending()`` and ``accept()`` in turn are a retry loop that does not spin:
        behind a deferred connection it returns at most once for each that comes, which the
        next call cannot reach, and not again and again. It takes nothing, and is a hint
        only: with several tasks, another may be faster.

        Raises:
            AcceptInterruptedError: `cancel_accept()` ended the wait.
            ListenerClosedError: The listener was closed, before or during the call.

        Cancellation:
            Safe.

        Source: WSPSelect.
        """
        await self._accepting.wait_pending()

    def cancel_accept(self) -> int:
        """End the waiting `accept()` and `wait_pending()` calls; return how many.

        They raise `AcceptInterruptedError`. Calls that have found a connection go on.

        Source: WSPCancelBlockingCall.
        """
        return self._accepting.cancel_accept()

    # -- serving

    def streams(
        self, condition: Condition | None = None, callback_data: object = None
    ) -> Streams[T]:
        """Return an asynchronous iterator over accepted connections; deferral blocks nobody.

        ``async for stream in listener.streams(condition)``. Whoever is deferred waits for
        the hints of its `Defer` while those behind it are decided. A plain condition is
        asked in the loop's callback; async ones run side by side, up to ``max_deciding``.
        What happens to a caller who does not get in never raises here: it is counted,
        logged at DEBUG, and told to `on_outcome()`. A condition that raises, or says
        something that is no verdict, is logged at ERROR; that connection is rejected.

        Nothing is taken while no iteration waits. Several tasks may iterate over one such
        object. The iteration ends when the listener is closed; it does not keep a listener
        that nobody else refers to. When it begins, everybody who is undecided is offered,
        those deferred before by another condition, too.

        Args:
            condition: As for `accept()`.
            callback_data: Becomes ``pending.callback_data``.

        Raises:
            ConditionNotCallableError: *condition* cannot be called.

            The iteration raises `AcceptInProgressError` while `accept()` calls wait, or
            another `streams()` or `serve()` is at work.
        """
        return Streams(
            self._deciding,
            self._policy,
            condition,
            callback_data,
        )

    async def serve(
        self,
        handler: Handler[T],
        condition: Condition | None = None,
        callback_data: object = None,
    ) -> None:
        """Run *handler* for each accepted connection, as a task; deferral blocks nobody.

        The condition is asked as by `streams()`. A handler's stream is closed when it
        returns, and aborted when it raises, which is logged at ERROR, or is cancelled.
        Returns when the listener is closed, or was shut down, and the handlers are done.

        Args:
            handler: Called as ``handler(stream)``, with what ``stream_factory`` made of
                the stream if there is one; ``async``.
            condition: As for `accept()`.
            callback_data: Becomes ``pending.callback_data``.

        Raises:
            ListenerClosedError: The listener was closed before.
            AcceptInProgressError: Another kind of consumer is at work, or the call comes
                from a condition of this listener.
            ConditionNotCallableError: *condition* cannot be called.
            NotListeningError, NotASocketError: Somebody else has shut or closed the
                listening socket; the handlers have ended.

        Cancellation:
            Nothing is taken any more, the handlers and the decisions under way are
            cancelled and waited for; undecided connections stay.
        """
        serve = Serve(
            handler,
            self._deciding,
            self._policy,
            condition,
            callback_data,
        )
        # One that was cancelled and still waits for its handlers leaves room for another.
        self._serving.add(serve)
        try:
            await serve.run()
        finally:
            self._serving.discard(serve)

    def reconsider(self, predicate: Callable[[PendingTransport], object] | None = None) -> None:
        """Have deferred connections offered again, those for which *predicate* is true.

        In the order they came; a few hundred in a turn of the loop, so *predicate* may be
        asked later. May be called from a condition. What *predicate* raises ends it.

        Each call looks at every deferred connection. Where thousands wait, keep those whose
        turn may come in an index of your own, and call their `PendingTransport.reconsider()`.

        Raises:
            TypeError: *predicate* cannot be called.
        """
        if predicate is not None and not callable(predicate):
            message = f"the predicate cannot be called: {predicate!r}"
            raise TypeError(message)
        self._deciding.wake_all(predicate)

    def on_exhausted(self, callback: Callable[[Episode], object]) -> None:
        """Have ``callback(episode)`` called when `streams()` or `serve()` runs out of descriptors.

        Once for each such time, soon after it began. The callback may close what can be
        spared: as soon as a stream of this listener is, accepting goes on.

        Raises:
            TypeError: *callback* cannot be called, or is ``async``: nobody would await it.
        """
        check_plain(callback)
        self._policy.on_exhausted.append(callback)

    # -- capacity

    @property
    def max_streams(self) -> Limit | None:
        """How many streams may be open; ``None`` for any number. Can be set, to a number too.

        Set lower than what is open it closes none of them, and decisions that are under
        way may still let somebody in. `PendingTransport.decide()` and ``take()`` do not ask
        for room; what they let in counts.

        Raises:
            OSError: It is to refuse, and the kernel cannot be made to; nothing has changed.
        """
        return self._deciding.capacity.get("max_streams")

    @max_streams.setter
    def max_streams(self, limit: int | Limit | None) -> None:
        self._set_limit("max_streams", limit)

    @property
    def max_starting(self) -> Limit | None:
        """How many streams may not have said `Stream.started()` yet; see `max_streams`."""
        return self._deciding.capacity.get("max_starting")

    @max_starting.setter
    def max_starting(self, limit: int | Limit | None) -> None:
        self._set_limit("max_starting", limit)

    # -- events

    def on(self, events: Event, callback: EventCallback) -> Subscription:
        """Have ``callback(source, event, error)`` called for *events*, one event a call.

        `Event.PENDING` is about the listener itself. The others are inherited by the
        streams accepted from now on, which are the *source* then; streams accepted before
        keep what they have. The callback is called from the loop, never inside the call
        that caused the event; of what is so already, it is told soon. PENDING is told once
        and then not before the next accept call that looked at the deque and did not
        defer; the others as `Stream.on()` says.

        What the callback returns is awaited if it can be, in a task: during one for the
        same subscription, source and event, a further event is kept, once, until that has
        ended. `close()` cancels the tasks for PENDING and `wait_closed()` waits for them,
        apart from one that makes the call itself; `abort()` cancels those about streams
        too, and after it nobody is called. A callback that raises is reported to the
        loop's exception handler, and called for later events all the same.

        Returns:
            A handle; its ``cancel()`` ends the subscription of the listener.

        Raises:
            TypeError: *events* is none, or *callback* cannot be called.

        Source: WSPAsyncSelect.
        """
        return self._accepting.on(events, callback)

    def watch(self, events: Event) -> EventRecord:
        """Record *events* of this listener, and of the streams accepted from now on.

        One object for all of them, to be read when it suits: the same events as `on()`
        tells, without a callback. What is so already is recorded at once.

        Raises:
            TypeError: *events* is none.

        Source: WSPEventSelect.
        """
        return self._accepting.watch(events)

    def on_outcome(self, callback: Callable[[Outcome], object]) -> None:
        """Have ``callback(outcome)`` called once for every connection, soon after its end.

        Raises:
            TypeError: *callback* cannot be called, or is ``async``: nobody would await it.
        """
        self._ledger.on_outcome(callback)

    # -- groups

    def group(self, name: str, *, qos: FlowSpec | None = None) -> StreamGroup:
        """Return the group of that name; make it, if it is the first time.

        A condition puts the stream of its ACCEPT into it by ``pending.group = name``.
        A group lasts as long as the listener; there is no limit to their number.

        Args:
            name: Anything but the empty string.
            qos: Applied to what is sent on each connection of the group, unless the
                condition asks for something else. ``None``: nothing; or, for a group that
                is there already, what it has.

        Raises:
            QualityOfServiceError: All sockets are Unix sockets, which have no quality of
                service; no group was made.
            ListenerClosedError: The listener is closed.
            ValueError: *name* is empty, or there is such a group with another *qos*.
            TypeError: *name* is not text, or *qos* not a `FlowSpec`.

        Source: the parameters g and lpGQOS of WSPAccept.
        """
        self._check_open()
        return self._deciding.groups.open(name, qos)

    @property
    def groups(self) -> Mapping[str, StreamGroup]:
        """The groups by name, as of whenever it is looked at; cannot be changed."""
        return self._deciding.groups.mapping

    # -- options and facts

    def setsockopt(self, level: int, name: int, value: int | bytes) -> None:
        """Set a socket option on the listener and on what it accepts from now on.

        Also on connections that the kernel has queued already, which a plain
        setsockopt(2) would not reach.

        Raises:
            OSError: The kernel refused it; the message names the option.
        """
        self._check_open()
        options = check_options([(level, name, value)])
        self._gate.setsockopt(options[0])
        kept = [each for each in self._deciding.options if each[:2] != (level, name)]
        self._deciding.options[:] = [*kept, *options]

    @overload
    def getsockopt(self, level: int, name: int) -> int: ...
    @overload
    def getsockopt(self, level: int, name: int, buflen: int) -> bytes: ...
    def getsockopt(self, level: int, name: int, buflen: int = 0) -> int | bytes:
        """Read a socket option of the first listening socket.

        Source: WSPGetSockOpt.
        """
        self._check_open()
        return self._gate.getsockopt(level, name, buflen)

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening sockets; ``()`` once the listener is closed.

        Asking for them makes them fit to be shared with another process, which costs each
        later rejection a system call.
        """
        if self._deciding.stopped:
            return ()
        self._gate.share()
        return tuple(TransportSocket(sock) for sock in self._gate.sockets)

    @property
    def sockname(self) -> Address:
        """The address of the first listening socket; ``None`` once the listener is closed.

        ``(host, port)`` for IPv4, four items for IPv6, a path for Unix.
        """
        return None if self._deciding.closed else self._sockname

    @property
    def pending(self) -> tuple[PendingTransport, ...]:
        """The connections that were taken and have no verdict yet, oldest first."""
        return self._deciding.undecided()

    def statistics(self) -> Statistics:
        """Return counts, and how things stand now."""
        pending = self._deciding.undecided()
        counts = self._ledger.counts
        backlog = None if self._deciding.stopped else self._gate.backlog()
        return Statistics(
            taken=self._ledger.taken,
            offers=self._ledger.offers,
            deferrals=self._ledger.deferrals,
            accepted=counts[Status.ACCEPTED],
            rejected=counts[Status.REJECTED],
            reset=counts[Status.RESET],
            expired=counts[Status.EXPIRED],
            failed=counts[Status.FAILED],
            closed=counts[Status.CLOSED],
            pending=len(pending),
            deciding=self._pending.deciding,
            deferred=self._pending.deferred,
            ready=sum(each.status in (Status.ADMITTED, Status.READY) for each in pending),
            oldest_age=pending[0].age if pending else None,
            rejecting=self._gate.rejecting,
            cut_short=self._gate.cut_short,
            streams=self._deciding.open_streams,
            starting=self._deciding.capacity.starting.taken,
            handlers=sum(each.handlers for each in self._serving),
            backlog=None if backlog is None else backlog[0],
            backlog_limit=None if backlog is None else backlog[1],
            suspended=self._deciding.suspended,
            refusing=self._deciding.refusing,
            exhausted=self._policy.exhaustion.under_way,
        )

    # -- pausing

    def suspend(self, *, refuse: bool = False) -> None:
        """Take nobody until `resume()`; the kernel queues newcomers, up to the backlog.

        What was taken before is decided all the same, and streams go on. With *refuse*,
        those the kernel has queued are taken first, as far as ``max_pending`` allows, and
        from then on it refuses: ``connect()`` fails with ECONNREFUSED. Whoever is just in
        the handshake at that moment is reset. A second call does nothing, or adds *refuse*.

        Raises:
            ListenerClosedError: The listener is closed.
            OSError: The kernel cannot be made to refuse, since the sockets are no TCP
                sockets, or not made by `listen()`, or shared with somebody; nothing has
                changed.
            DescriptorsExhaustedError: There is no descriptor to take those with that the
                kernel has queued; they wait there, and nothing is suspended.
        """
        self._check_open()
        self._deciding.suspend(refuse=refuse)

    def resume(self) -> None:
        """Take newcomers again, after `suspend()`. A second call does nothing.

        Raises:
            ListenerClosedError: The listener is closed.
            OSError: The kernel does not listen again; the listener is as it was.
        """
        self._check_open()
        if self._deciding.suspended:
            self._deciding.resume()

    # -- ending

    async def shutdown(self, timeout: float | None = None) -> Leftovers:  # noqa: ASYNC109
        """End in order, in up to *timeout* seconds; return what was left, and why.

        Those the kernel has queued are taken and decided, as far as ``max_pending``
        allows, and nobody after them: the listening sockets are closed. Then the open
        streams are waited for, and rejected callers that read their callee data. Whatever
        is undecided or open after *timeout* is reset, and the listener is closed. ``None``:
        no limit, so a deferred connection may keep it until ``defer_timeout``, one that
        nobody accepts or a stream for as long as it likes.

        Closing a listening socket resets whoever comes at that moment. A restart that
        loses nobody needs a successor that has the same socket.

        Handlers of `serve()` are not cancelled. Called from such a handler this waits for
        the other streams; its own is left to it, and is not aborted. So with a connection
        whose ``async`` condition calls this: it keeps its verdict. A second call waits,
        too; the shorter *timeout* counts.

        Returns:
            `Leftovers`, which is false if there were none.

        Raises:
            TypeError, ValueError: *timeout* is no number of seconds; nothing has changed.

        Cancellation:
            Nobody is taken any more; nothing else is ended. Call it again, or `close()`.
        """
        check_timeout("timeout", timeout)
        task = asyncio.current_task()
        own = next(filter(None, (serve.stream_of(task) for serve in self._serving)), None)
        left = await shutdown(self._deciding, timeout, own)
        self.close()
        self._deciding.abort_streams(own)
        return left

    def close(self) -> None:
        """Stop; reset what is undecided. Streams go on. A second call does nothing.

        Waiting calls end at once with `ListenerClosedError`, decisions under way are
        cancelled. The kernel resets those it had queued. A condition that closes the
        listener that asks it keeps its verdict, if it does so itself and not by a task.
        """
        if not self._deciding.closed:
            consumer = self._deciding.consumer
            self._deciding.close()
            self._delivery.close()
            self._accepting.closed()
            consumer.closed()
            if self._file is not None:
                unlink(*self._file)

    async def wait_closed(self) -> None:
        """Wait until the listener is closed, and neither decision nor task of it is under way.

        The tasks are those of async callbacks for PENDING; not those about streams.

        Cancellation:
            Safe; does not close the listener.
        """
        await self._accepting.wait_closed()

    def abort(self) -> None:
        """Close, abort the streams that were accepted, and cancel the tasks about them.

        Those that were handed over are aborted, too.
        """
        self.close()
        self._delivery.abort()
        self._deciding.abort_streams()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        await self.wait_closed()

    def __del__(self) -> None:
        deciding = getattr(self, "_deciding", None)
        if deciding is not None and not deciding.closed:
            warnings.warn(f"unclosed listener {self!r}", ResourceWarning, source=self, stacklevel=2)
            if not self._loop.is_closed():
                # The collector may run in any thread; closing belongs to the loop's.
                self._loop.call_soon_threadsafe(self.close)

    def _still_tells(self, _event: Event) -> bool:
        return not self._deciding.closed

    def _check_open(self) -> None:
        if self._deciding.stopped:
            reason = "the listener is closed"
            raise ListenerClosedError(reason)

    def _set_limit(self, name: str, limit: int | Limit | None) -> None:
        self._deciding.set_limit(name, as_limit(name, limit))
        self._warn_of_descriptors()

    def _warn_of_descriptors(self) -> None:
        """Say beforehand if the limits promise more than the process may open."""
        allowed = descriptor_limit()
        limits = [
            (name, limit.n)
            for name in ("max_streams", "max_starting")
            if (limit := self._deciding.capacity.get(name)) is not None
        ]
        if not limits or allowed is None:
            return
        name, most = max(limits, key=lambda each: each[1])
        needed = most + (self._pending.max_pending or 0) + REJECTING
        if needed > allowed:
            logger.warning(
                "RLIMIT_NOFILE allows %d descriptors, and %s=%d with max_pending=%r and"
                " %d rejections may need %d: raise it, or lower them",
                allowed,
                name,
                most,
                self._pending.max_pending,
                REJECTING,
                needed,
            )


def _call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any
) -> None:
    # A listener may be closed after its loop; then there is nobody left to call.
    if not loop.is_closed():
        loop.call_soon(callback, *args)


def _report(loop: asyncio.AbstractEventLoop, message: str, error: BaseException) -> None:
    loop.call_exception_handler({"message": message, "exception": error})
