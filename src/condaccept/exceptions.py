"""What an accept call raises.

Every leaf is an `AcceptError`, which is an `OSError`, and also the built-in that
people would catch for the same trouble elsewhere::

    AcceptError (OSError)           seed               errno         also a
    |-- ConnectionRejectedError     WSAECONNREFUSED    ECONNREFUSED  ConnectionRefusedError
    |-- ConnectionDeferredError     WSATRY_AGAIN       EAGAIN        BlockingIOError
    |-- PendingResetError           WSAECONNRESET      ECONNRESET    ConnectionResetError
    |-- PendingExpiredError         WSAEACCES          EACCES        PermissionError
    |-- QualityOfServiceError       WSAEOPNOTSUPP      EOPNOTSUPP
    |-- NoPendingError              WSAEWOULDBLOCK     EWOULDBLOCK   BlockingIOError
    |-- AcceptInterruptedError      WSAEINTR           EINTR         InterruptedError
    |-- AcceptInProgressError       WSAEINPROGRESS     EINPROGRESS   RuntimeError
    |-- ListenerClosedError         WSAEINVAL          EINVAL        ValueError
    |-- NotListeningError           WSAEINVAL          EINVAL        ValueError
    |-- InvalidVerdictError         WSAEINVAL          EINVAL        ValueError
    |-- InvalidGroupError           WSAEINVAL          EINVAL        ValueError
    |-- ConditionNotCallableError   WSAEFAULT          EFAULT        TypeError
    |-- CalleeDataError             WSAEFAULT          EFAULT        ValueError
    |-- DescriptorsExhaustedError   WSAEMFILE          EMFILE
    |-- BuffersExhaustedError       WSAENOBUFS         ENOBUFS
    |-- NetworkDownError            WSAENETDOWN        ENETDOWN
    |-- NotASocketError             WSAENOTSOCK        ENOTSOCK
    `-- NotStreamSocketError        WSAEOPNOTSUPP      EOPNOTSUPP

The first five are about one connection and carry its address. The two exhaustions and
`NetworkDownError` pass: back off and call again. The others are about the call or the
listener.

Source: the error table of WSPAccept, and WSPConnect's for a quality of service that
cannot be met; errno(3); accept(2).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from condaccept._qos import FlowSpec
    from condaccept._verdict import Defer

__all__ = (
    "AcceptError",
    "AcceptInProgressError",
    "AcceptInterruptedError",
    "BuffersExhaustedError",
    "CalleeDataError",
    "ConditionNotCallableError",
    "ConnectionDeferredError",
    "ConnectionRejectedError",
    "DescriptorsExhaustedError",
    "InvalidGroupError",
    "InvalidVerdictError",
    "ListenerClosedError",
    "NetworkDownError",
    "NoPendingError",
    "NotASocketError",
    "NotListeningError",
    "NotStreamSocketError",
    "PendingExpiredError",
    "PendingResetError",
    "QualityOfServiceError",
)


class AcceptError(OSError):
    """An accept call that gave no stream; the root, raised itself only for an unknown errno.

    Attributes:
        caller_id: The address of the connection it is about, as accept(2) gave it:
            ``(host, port)`` for IPv4, four items for IPv6, a path for Unix; ``None`` if
            no connection was looked at.
        reason: Why, in words for a person.
        winsock: The name of the seed's error code.
    """

    code: ClassVar[int] = errno.EIO
    winsock: ClassVar[str] = ""

    def __init__(self, reason: str, caller_id: Any = None) -> None:
        super().__init__(self.code, reason)
        self.reason = reason
        self.caller_id = caller_id

    def __str__(self) -> str:
        """Return the sentence, with the caller's address where there is one."""
        about = "" if self.caller_id is None else f" (caller {self.caller_id!r})"
        return f"[Errno {self.errno}] {self.reason}{about}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by our own arguments; OSError's would be (errno, reason)."""
        return type(self), (self.reason, self.caller_id), self.__dict__


class ConnectionRejectedError(AcceptError, ConnectionRefusedError):
    """The condition said REJECT; the connection is closed and gone from the deque."""

    code = errno.ECONNREFUSED
    winsock = "WSAECONNREFUSED"


class ConnectionDeferredError(AcceptError, BlockingIOError):
    """The condition said DEFER; the connection keeps its place and is offered again.

    Attributes:
        defer: The `Defer` that the condition returned, with its hints.
    """

    code = errno.EAGAIN
    winsock = "WSATRY_AGAIN"
    defer: Defer


class PendingResetError(AcceptError, ConnectionResetError):
    """The peer reset the connection before a verdict; the condition was not asked again."""

    code = errno.ECONNRESET
    winsock = "WSAECONNRESET"


class PendingExpiredError(AcceptError, PermissionError):
    """A deferred connection's deadline passed, or its caller withdrew; it is closed."""

    code = errno.EACCES
    winsock = "WSAEACCES"


class QualityOfServiceError(AcceptError):
    """A flow spec could not be applied; the connection was accepted, and is reset.

    For a group, which is for later connections, there is no caller, and no group was made.

    Attributes:
        flow: The part of the flow spec that could not be applied. The error of the kernel,
            if it was asked, is the cause.
    """

    code = errno.EOPNOTSUPP
    winsock = "WSAEOPNOTSUPP"
    flow: FlowSpec


class NoPendingError(AcceptError, BlockingIOError):
    """`accept_nowait()` found nobody."""

    code = errno.EWOULDBLOCK
    winsock = "WSAEWOULDBLOCK"


class AcceptInterruptedError(AcceptError, InterruptedError):
    """`cancel_accept()` ended a call that was waiting; no connection was touched."""

    code = errno.EINTR
    winsock = "WSAEINTR"


class AcceptInProgressError(AcceptError, RuntimeError):
    """An accept call from inside its own condition; nothing was touched."""

    code = errno.EINPROGRESS
    winsock = "WSAEINPROGRESS"


class ListenerClosedError(AcceptError, ValueError):
    """The listener was closed before or during the call."""

    code = errno.EINVAL
    winsock = "WSAEINVAL"


class NotListeningError(AcceptError, ValueError):
    """The socket does not listen: listen(2) was not called, or somebody shut it down."""

    code = errno.EINVAL
    winsock = "WSAEINVAL"


class InvalidVerdictError(AcceptError, ValueError):
    """The condition returned no verdict; the connection keeps its place, undecided."""

    code = errno.EINVAL
    winsock = "WSAEINVAL"


class InvalidGroupError(AcceptError, ValueError):
    """The condition named a group that the listener does not have; nothing was decided."""

    code = errno.EINVAL
    winsock = "WSAEINVAL"


class ConditionNotCallableError(AcceptError, TypeError):
    """The condition cannot be called; noticed before the deque is touched."""

    code = errno.EFAULT
    winsock = "WSAEFAULT"


class CalleeDataError(AcceptError, ValueError):
    """Callee data beyond its capacity; the buffer is as it was."""

    code = errno.EFAULT
    winsock = "WSAEFAULT"


class DescriptorsExhaustedError(AcceptError):
    """No descriptor is free and somebody waits in the backlog, where the caller stays."""

    code = errno.EMFILE
    winsock = "WSAEMFILE"


class BuffersExhaustedError(AcceptError):
    """The kernel has no memory for another socket; the caller stays in the backlog."""

    code = errno.ENOBUFS
    winsock = "WSAENOBUFS"


class NetworkDownError(AcceptError):
    """accept(2) passed on a network error; the call can be made again at once."""

    code = errno.ENETDOWN
    winsock = "WSAENETDOWN"


class NotASocketError(AcceptError):
    """The descriptor is no socket, or was closed behind the listener's back."""

    code = errno.ENOTSOCK
    winsock = "WSAENOTSOCK"


class NotStreamSocketError(AcceptError):
    """The socket is not of a connection-oriented type."""

    code = errno.EOPNOTSUPP
    winsock = "WSAEOPNOTSUPP"
