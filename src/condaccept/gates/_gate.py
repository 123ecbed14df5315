"""What every gate can do: the face between the kernel's side and the deque."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Sequence

    from condaccept._pending import Arrival, PendingTransport
    from condaccept._sockets import Option, OwnedSocket

__all__ = ("Gate",)

A = TypeVar("A", bound="Arrival")


class Gate(Protocol, Generic[A]):
    """A source of connections, and what can be done to one of them.

    An arrival belongs to the listener from `take()` until it is given back with exactly
    one of `admit()`, `refuse()` and `forget()`.
    """

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The listening sockets, if there are any."""

    @property
    def more(self) -> bool:
        """Whether somebody else waited when `take()` took the last one, or found nobody.

        Whoever came later is told of.
        """

    @property
    def rejecting(self) -> int:
        """How many refused connections are still being told so."""

    @property
    def cut_short(self) -> int:
        """How many refused connections could not be given the time to read why."""

    def share(self) -> None:
        """Make the listening sockets fit to be accepted from by somebody else, too.

        For good: nobody tells when the other one has let go of them.
        """

    def setsockopt(self, option: Option) -> None:
        """Set an option on the listening sockets."""

    def getsockopt(self, level: int, name: int, buflen: int) -> int | bytes:
        """Read an option of the first listening socket; *buflen* 0 for an integer."""

    def start(self, ready: Callable[[], object], told: Callable[[], object]) -> None:
        """Begin; *ready* is called when somebody has come. It is a hint.

        *told* is called when a refused connection that counted as `rejecting` is over.
        """

    def waiting(self) -> bool:
        """Whether somebody waits to be taken."""

    def backlog(self) -> tuple[int, int] | None:
        """How many wait to be taken, and how many could; ``None`` if unknown."""

    def take(self) -> A | None:
        """Take the connection that came first; ``None``: nobody waits.

        Raises:
            AcceptError: Nothing could be taken; who waits goes on waiting, but for a
                `PendingResetError`, which is about a connection that is gone.
        """

    def watch(self, arrival: A, n: int, pending: PendingTransport) -> None:
        """Call ``pending._changed()`` when its peer leaves, soon after.

        *pending* is the pending transport that was made of *arrival*. With *n*, also when
        *n* bytes can be peeked, or maybe sooner. Called again it changes *n*.

        Raises:
            ValueError: The connection cannot hold *n* bytes unread.
        """

    def admit(self, arrival: A) -> OwnedSocket | asyncio.Future[OwnedSocket]:
        """Let a connection in: its socket, or a future of it, which may fail.

        The listener cancels the future when it has no use for the connection any more;
        the gate then drops that.
        """

    def refuse(self, arrival: A, data: bytes) -> None:
        """Refuse a connection; with *data*, the caller is to read that first."""

    def forget(self, arrival: A) -> None:
        """Drop a connection that found its end without a verdict."""

    def check_refusable(self) -> None:
        """Check that connects can be refused, and change nothing.

        Raises:
            OSError: This gate cannot, and the message says why and what to do instead;
                EOPNOTSUPP.
        """

    def refuse_new(self) -> None:
        """Have connects refused: ECONNREFUSED at once, until `listen_again()`.

        Whoever is queued is reset, so the caller takes those first, without an await in
        between. What was taken and what was admitted goes on. Meanwhile nobody waits, and
        `take()` finds nobody. A second call does nothing.

        Raises:
            OSError: As `check_refusable()`, or the kernel would not. Nothing has changed.

        Source: shutdown(2), listen(2).
        """

    def listen_again(self) -> None:
        """End what `refuse_new()` began; a second call does nothing.

        Raises:
            OSError: The kernel would not. Connects go on being refused.
        """

    def stop(self) -> None:
        """Take no more; the listening sockets are closed."""

    def close(self) -> None:
        """Take no more, and end what goes on in the background."""
