"""`listen()` and `Listener`: the face of the library, over the rooms that do the work."""

from __future__ import annotations

import asyncio
import os
import socket
import warnings
import weakref
from asyncio.trsock import TransportSocket
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar, overload

from condaccept._accepting import Accepting
from condaccept._events import Event, EventCallback, Outcome, Signals, Subscription
from condaccept._ledger import Ledger, Statistics
from condaccept._open import Host, UnixPath, absolute, open_tcp, open_unix, unlink
from condaccept._pending import Condition, PendingDeque, PendingTransport, Status
from condaccept._sockets import Option, apply_options, check_listening, check_options
from condaccept._watch import Watch, open_watch
from condaccept.exceptions import ListenerClosedError
from condaccept.gates import Gate, HandshakeGate

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from condaccept._deciding import OnEof
    from condaccept._pending import Address
    from condaccept._stream import Stream

__all__ = ("Listener", "listen")

T = TypeVar("T")

INT_MAX: Final = 2**31 - 1

OnFull = Literal["wait", "expire_oldest"]


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
            watch: Makes the watch, given the loop.
        """
        _check_limits(max_pending, max_deciding, defer_timeout, on_full, on_eof)
        if stream_factory is not None and not callable(stream_factory):
            message = f"stream_factory cannot be called: {stream_factory!r}"
            raise TypeError(message)
        loop = self._loop = asyncio.get_running_loop()
        self._watch = watch(loop)
        try:
            self._gate = gate(loop, self._watch)
        except BaseException:
            self._watch.release()
            raise
        sockets = self._gate.sockets
        self._sockname: Address = sockets[0].getsockname() if sockets else None
        self._pending = PendingDeque(max_pending, max_deciding, defer_timeout)
        self._ledger = Ledger(partial(_call_soon, loop), partial(_report, loop))
        self._file: tuple[str | bytes, tuple[int, int]] | None = None
        self._accepting: Accepting[T] = Accepting(
            loop,
            self._watch,
            self._gate,
            pending=self._pending,
            ledger=self._ledger,
            signals=Signals(),
            source=weakref.ref(self),
            stream_factory=stream_factory,
            on_eof=on_eof,
        )
        self._deciding = self._accepting.deciding

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
        _check_timeout("reject_timeout", reject_timeout)
        _check_limits(max_pending, max_deciding, defer_timeout, on_full, on_eof)
        apply_options(sock, checked)
        listener = cls(
            lambda loop, watch: HandshakeGate(loop, watch, [sock], reject_timeout=reject_timeout),
            stream_factory=stream_factory,
            max_pending=max_pending,
            on_full=on_full,
            max_deciding=max_deciding,
            defer_timeout=defer_timeout,
            on_eof=on_eof,
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

        That is a connection never offered, or a loss to report. A deferral is nothing new,
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

    # -- events

    def on(self, events: Event, callback: EventCallback) -> Subscription:
        """Have ``callback(source, event, error)`` called for *events*, one event a call.

        `Event.PENDING` is about the listener itself. The others are inherited by the
        streams accepted from now on, which are the *source* then; streams accepted before
        keep what they have. The callback is called from the loop, never inside the call
        that caused the event. PENDING is told once and then not before the next accept
        call that looked at the deque and did not defer.

        Returns:
            A handle; its ``cancel()`` ends the subscription of the listener.

        Source: WSPAsyncSelect.
        """
        return self._accepting.on(events, callback)

    def on_outcome(self, callback: Callable[[Outcome], object]) -> None:
        """Have ``callback(outcome)`` called once for every connection, soon after its end."""
        self._ledger.on_outcome(callback)

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
        if self._deciding.closed:
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
        backlog = None if self._deciding.closed else self._gate.backlog()
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
            oldest_age=pending[0].age if pending else None,
            rejecting=self._gate.rejecting,
            cut_short=self._gate.cut_short,
            streams=self._deciding.open_streams,
            backlog=None if backlog is None else backlog[0],
            backlog_limit=None if backlog is None else backlog[1],
        )

    # -- ending

    def close(self) -> None:
        """Stop; reset what is undecided. Streams go on. A second call does nothing.

        Waiting calls end at once with `ListenerClosedError`, decisions under way are
        cancelled. The kernel resets those it had queued. A condition that closes the
        listener that asks it keeps its verdict, if it does so itself and not by a task.
        """
        if not self._deciding.closed:
            self._accepting.close()
            if self._file is not None:
                unlink(*self._file)

    async def wait_closed(self) -> None:
        """Wait until the listener is closed and no decision is under way any more.

        Cancellation:
            Safe; does not close the listener.
        """
        await self._accepting.wait_closed()

    def abort(self) -> None:
        """Close, and abort the streams that were accepted, and what became of them."""
        self.close()
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

    def _check_open(self) -> None:
        if self._deciding.closed:
            reason = "the listener is closed"
            raise ListenerClosedError(reason)


@overload
async def listen(
    host: Host = None,
    port: int | str | None = None,
    *,
    path: UnixPath | None = None,
    mode: int | None = None,
    family: int = socket.AF_UNSPEC,
    backlog: int = 4096,
    options: Iterable[Option] = (),
    reuse_port: bool = False,
    defer_accept: int | None = None,
    max_pending: int | None = 1024,
    on_full: OnFull | None = None,
    max_deciding: int = 128,
    defer_timeout: float | None = 30.0,
    reject_timeout: float | None = 5.0,
    on_eof: OnEof = "keep",
    stream_factory: None = None,
    conditional_accept: bool = False,
) -> Listener[Stream]: ...
@overload
async def listen(
    host: Host = None,
    port: int | str | None = None,
    *,
    path: UnixPath | None = None,
    mode: int | None = None,
    family: int = socket.AF_UNSPEC,
    backlog: int = 4096,
    options: Iterable[Option] = (),
    reuse_port: bool = False,
    defer_accept: int | None = None,
    max_pending: int | None = 1024,
    on_full: OnFull | None = None,
    max_deciding: int = 128,
    defer_timeout: float | None = 30.0,
    reject_timeout: float | None = 5.0,
    on_eof: OnEof = "keep",
    stream_factory: Callable[[Stream], T],
    conditional_accept: bool = False,
) -> Listener[T]: ...
async def listen(
    host: Host = None,
    port: int | str | None = None,
    *,
    path: UnixPath | None = None,
    mode: int | None = None,
    family: int = socket.AF_UNSPEC,
    # asyncio's 100 and the classic 128 overflow within milliseconds of a flood; this is
    # what net.core.somaxconn has been since Linux 5.4, which cuts it down where lower.
    backlog: int = 4096,
    options: Iterable[Option] = (),
    reuse_port: bool = False,
    defer_accept: int | None = None,
    # As many as a process may have descriptors by default (RLIMIT_NOFILE, soft: 1024).
    max_pending: int | None = 1024,
    on_full: OnFull | None = None,
    # A hundred outside look-ups at once is what a connection pool holds.
    max_deciding: int = 128,
    # Apache's and HAProxy's usual time for a client that says nothing.
    defer_timeout: float | None = 30.0,
    # nginx's lingering_timeout.
    reject_timeout: float | None = 5.0,
    on_eof: OnEof = "keep",
    stream_factory: Callable[[Stream], Any] | None = None,
    conditional_accept: bool = False,
) -> Listener[Any]:
    """Listen on an address and return a `Listener`.

    Args:
        host: A name or address, several of them, or ``None`` for all addresses of the
            machine. Every address of a name is listened on.
        port: A number or the name of a service. 0: any free one, the same for all
            addresses.
        path: A Unix socket, in place of *host* and *port*; a leading NUL makes it an
            abstract name. A file left behind by a dead listener is replaced; the file is
            removed by `Listener.close()` if it is still the same.
        mode: Access bits for the file of *path*, set before anybody can connect.
        family: ``AF_INET`` or ``AF_INET6`` to use only these addresses of *host*.
        backlog: How many finished connections the kernel queues.
        options: Socket options, ``(level, name, value)`` each, set before listen(2);
            accepted connections inherit them. TCP_NODELAY is set beforehand.
        reuse_port: Share the port with other sockets (SO_REUSEPORT).
        defer_accept: Seconds for which the kernel keeps a connection back until its
            caller has sent something (TCP_DEFER_ACCEPT); ``None``: it does not.
        max_pending: How many connections may be on the deque; at the bound no further one
            is taken, and the kernel's backlog holds the rest. ``None``: no limit.
        on_full: What to do at that bound. ``"wait"``, the default: nothing is taken.
            ``"expire_oldest"`` makes room by expiring the oldest deferred connection;
            under `accept()` there never is one then, since it would be offered first.
        max_deciding: How many async decisions may be under way at once.
        defer_timeout: Seconds from the first deferral to a verdict; then the connection
            is closed as expired. ``None``: no limit.
        reject_timeout: Seconds that a rejected caller is given to read callee data.
            ``None``: no limit.
        on_eof: What a FIN before the verdict means. ``"keep"``: nothing, it may be a
            half-close. ``"withdraw"``: the caller has left; the connection expires.
        stream_factory: Called with each new `Stream`; its result is what `accept()`
            returns.
        conditional_accept: Ask the condition before the handshake. Not available yet.

    Raises:
        OSError: The address cannot be resolved, bound or listened on, or an option cannot
            be set; the message says which. Nothing is left open.
        TypeError, ValueError: An argument is not what it should be, which the message says.

    Source: getaddrinfo(3), bind(2), listen(2), tcp(7), unix(7).
    """
    checked = check_options(options)
    _check_timeout("reject_timeout", reject_timeout)
    _check_limits(max_pending, max_deciding, defer_timeout, on_full, on_eof)
    hosts = _check_address(host, port, path)
    for name, number, most in (
        ("backlog", backlog, INT_MAX),
        ("defer_accept", defer_accept, INT_MAX),
        ("mode", mode, 0o7777),
    ):
        _check_number(name, number, most)
    if conditional_accept:
        message = "conditional_accept needs a gate before the handshake, which is not there yet"
        raise NotImplementedError(message)
    loop = asyncio.get_running_loop()
    inode = lingers = None
    if path is not None:
        _check_unix(host, port, family, reuse_port=reuse_port, defer_accept=defer_accept)
        sock, inode = open_unix(path, mode=mode, backlog=backlog, options=checked)
        sockets = [sock]
    else:
        if port is None:
            message = "listen() needs a port, or path= for a Unix socket"
            raise ValueError(message)
        if mode is not None:
            message = "mode is for the file of a Unix socket: give path="
            raise ValueError(message)
        sockets, lingers = await open_tcp(
            loop,
            hosts,
            port,
            family=family,
            backlog=backlog,
            options=checked,
            reuse_port=reuse_port,
            defer_accept=defer_accept,
        )
    try:
        listener: Listener[Any] = Listener(
            lambda loop, watch: HandshakeGate(
                loop, watch, sockets, reject_timeout=reject_timeout, lingers=lingers
            ),
            stream_factory=stream_factory,
            max_pending=max_pending,
            on_full=on_full,
            max_deciding=max_deciding,
            defer_timeout=defer_timeout,
            on_eof=on_eof,
        )
    except BaseException:
        for sock in sockets:
            sock.close()
        if path is not None and inode is not None:
            unlink(os.fspath(path), inode)
        raise
    if path is not None and inode is not None:
        listener._file = absolute(path), inode
    return listener


def _call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any
) -> None:
    # A listener may be closed after its loop; then there is nobody left to call.
    if not loop.is_closed():
        loop.call_soon(callback, *args)


def _report(loop: asyncio.AbstractEventLoop, message: str, error: BaseException) -> None:
    loop.call_exception_handler({"message": message, "exception": error})


def _check_address(host: object, port: object, path: object) -> list[str | None]:
    hosts = [host] if host is None or isinstance(host, str) else host
    if isinstance(hosts, bytes) or not isinstance(hosts, Iterable):
        message = f"host is a name, an address, a sequence of them or None; got {host!r}"
        raise TypeError(message)
    hosts = list(hosts)
    for each in hosts:
        if each is not None and not isinstance(each, str):
            message = f"host is a name, an address, a sequence of them or None; got {host!r}"
            raise TypeError(message)
    if port is not None and not isinstance(port, str):
        # getaddrinfo(3) would take the number modulo 65536.
        _check_number("port", port, 65535)
    if path is not None and not isinstance(path, (str, bytes, os.PathLike)):
        message = f"path is the name of a Unix socket, got {path!r}"
        raise TypeError(message)
    return hosts


def _check_number(name: str, value: object, most: int) -> None:
    if value is None and name != "backlog":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name} is an integer, got {value!r}"
        raise TypeError(message)
    if not 0 <= value <= most:
        message = f"{name} is between 0 and {most}, got {value!r}"
        raise ValueError(message)


def _check_unix(
    host: Host, port: int | str | None, family: int, *, reuse_port: bool, defer_accept: int | None
) -> None:
    if host is not None or port is not None:
        message = "path is instead of host and port: give one or the other"
        raise ValueError(message)
    if family not in (socket.AF_UNSPEC, socket.AF_UNIX):
        message = f"path is the name of a Unix socket, whose family is not {family!r}"
        raise ValueError(message)
    if reuse_port or defer_accept is not None:
        message = "reuse_port and defer_accept are for TCP: a Unix socket has neither"
        raise ValueError(message)


def _check_timeout(name: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        message = f"{name} is a number of seconds, or None for no limit; got {value!r}"
        raise TypeError(message)
    if not value >= 0:
        message = f"{name} cannot be negative, got {value!r}"
        raise ValueError(message)


def _check_limits(
    max_pending: int | None,
    max_deciding: int,
    defer_timeout: float | None,
    on_full: OnFull | None,
    on_eof: OnEof,
) -> None:
    _check_timeout("defer_timeout", defer_timeout)
    for name, limit in (("max_pending", max_pending), ("max_deciding", max_deciding)):
        if limit is None and name == "max_pending":
            continue
        if isinstance(limit, bool) or not isinstance(limit, int):
            message = f"{name} is a number of connections, got {limit!r}"
            raise TypeError(message)
        if limit < 1:
            message = f"{name} is at least 1, or nothing could ever be decided; got {limit!r}"
            raise ValueError(message)
    if on_full not in (None, "wait", "expire_oldest"):
        message = f"on_full is 'wait' or 'expire_oldest', got {on_full!r}"
        raise ValueError(message)
    if on_eof not in ("keep", "withdraw"):
        message = f"on_eof is 'keep' or 'withdraw', got {on_eof!r}"
        raise ValueError(message)
