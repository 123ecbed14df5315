"""Listening sockets from, and for, another process.

A service manager or a parent process hands sockets down by number and environment; a
process that is about to end passes its own on to its successor over a Unix socket, so that
nobody who calls meanwhile is refused or reset.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from condaccept._sockets import check_listening
from condaccept.exceptions import (
    DescriptorsExhaustedError,
    ListenerClosedError,
    NotASocketError,
    NotListeningError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from condaccept._listener import Listener

__all__ = ("inherited_sockets", "receive_sockets", "send_listener")

FIRST: Final = 3
"""SD_LISTEN_FDS_START: the first number after standard input, output and error."""
MOST: Final = 253
"""SCM_MAX_FD: descriptors in one message."""
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

# -- sockets handed down by number


def inherited_sockets(*, unset: bool = True) -> tuple[tuple[str, socket.socket], ...]:
    """Return the sockets that a service manager handed to this process, each with its name.

    That is systemd's socket activation, which other supervisors speak too: LISTEN_FDS
    descriptors from number 3 on, for the process LISTEN_PID, named by LISTEN_FDNAMES. They
    are in that order; a name is ``"unknown"`` where the manager gave none, and several may
    have the same. Each is from now on the caller's to close, and is not inherited by
    programs this process starts. Of any family and type, and listening or not, which
    `Listener.from_socket()` checks.

    A second call would make second objects over the same descriptors; with *unset* it
    finds nothing.

    Args:
        unset: Remove the variables from the environment, whatever comes of the call, so
            that no child takes them for its own.

    Returns:
        ``()`` if there are none, or if they are for another process.

    Raises:
        ValueError: A variable is not what it should be, which the message says.
        NotASocketError: A descriptor is closed or no socket. Nothing has been closed.

    Source: sd_listen_fds(3).
    """
    environment = {name: os.environ.get(name) for name in _VARIABLES}
    if unset:
        for name in _VARIABLES:
            os.environ.pop(name, None)
    pid, count = environment["LISTEN_PID"], environment["LISTEN_FDS"]
    if pid is None or _number("LISTEN_PID", pid) != os.getpid() or count is None:
        return ()
    descriptors = range(FIRST, FIRST + _number("LISTEN_FDS", count))
    given = environment["LISTEN_FDNAMES"]
    names = ["unknown"] * len(descriptors) if given is None else given.split(":")
    if len(names) != len(descriptors):
        message = (
            f"LISTEN_FDNAMES has {len(names)} names for the {len(descriptors)} sockets of "
            f"LISTEN_FDS: {given!r}"
        )
        raise ValueError(message)
    return tuple(zip(names, _adopt(descriptors), strict=True))


def _number(name: str, value: str) -> int:
    # Not int() alone: that takes "1_0", " 1" and other scripts' digits.
    if value.isascii() and value.isdigit() and 0 < (number := int(value)) < 2**31 - FIRST:
        return number
    message = f"{name} is a positive number, got {value!r}"
    raise ValueError(message)


def _adopt(descriptors: Sequence[int]) -> list[socket.socket]:
    """Return a socket for each descriptor; after an error, leave all of them as they were."""
    adopted: list[socket.socket] = []
    try:
        for fd in descriptors:
            try:
                adopted.append(socket.socket(fileno=fd))
            except OSError as error:
                reason = f"descriptor {fd} is not a socket: {error.strerror}"
                raise NotASocketError(reason) from error
        for sock in adopted:
            sock.set_inheritable(False)
    except BaseException:
        for sock in adopted:
            sock.detach()
        raise
    return adopted


# -- sockets passed to a successor
#
# Three frames: the sender's sockets, the receiver's word that it has them, the sender's
# word that they are the receiver's. Without the third, a sender cancelled while it waits
# for the second would serve on beside a receiver that takes itself for its successor.

_FRAME: Final = struct.Struct("!4sBBHI")
"""Magic, version, kind, how many sockets, length of the text that follows."""
_MAGIC: Final = b"CAcc"
_VERSION: Final = 1
_SOCKETS, _RECEIVED, _YOURS, _REFUSED = range(1, 5)
_KINDS: Final = {_SOCKETS: "sockets", _RECEIVED: "received", _YOURS: "yours", _REFUSED: "refused"}
_TEXT_MOST: Final = 256 * 1024
"""Bytes; the names of 253 Unix sockets fit, with every byte escaped."""
_INT_SIZE: Final = array.array("i").itemsize
_NONBLOCK: Final[int] = getattr(socket, "MSG_DONTWAIT", 0)
_CLOEXEC: Final[int] = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


async def send_listener(listener: Listener[Any], control: socket.socket) -> None:
    """Pass the listening sockets of *listener* to the process at the other end of *control*.

    That process calls `receive_sockets()`. It has said that it holds every socket when
    this returns, and from then on callers are taken by both processes, whoever is faster.
    Close the listener next: the kernel's queue, which lives on with the sockets, is then
    the successor's, and nobody in it is reset. What was taken stays here: streams go on,
    and the deferred ones are this listener's to decide before it is closed, which resets
    them as always.

    The file of a Unix socket stays when this listener is closed. The successor's
    `Listener.from_socket()` leaves it alone as well; the next `listen()` on that path
    replaces it when nobody answers there.

    Marks the sockets as shared, like `Listener.sockets`.

    Args:
        listener: Still open, and with listening sockets, at most 253.
        control: A connected Unix stream socket, non-blocking; stays the caller's. Nobody
            else reads or writes there during the call. Who can connect to it can have the
            sockets: choose its place and mode accordingly.

    Raises:
        ListenerClosedError: *listener* is closed, or was closed during the call.
        NotListeningError: It refuses new connections at present.
        ValueError: It has no listening sockets, or too many for one message; *control* is
            not what it should be; the other end said something else than expected.
        TypeError: *control* is not a `socket.socket`.
        ConnectionAbortedError: The other end could not take the sockets; the message
            gives its reason.
        OSError: *control* failed; a ConnectionError where the other end has gone.

        After an error the listener serves on, with nothing lost and its file still its
        own. *control* may have half a message in it: close it.

    Cancellation:
        As after an error. Close *control*, and the receiver ends with an error too.

    Source: unix(7), SCM_RIGHTS.
    """
    _check_control(control)
    _check_open(listener)
    sockets = listener._gate.sockets
    if not sockets:
        message = "the listener has no listening sockets: its gate cannot be passed on"
        raise ValueError(message)
    if len(sockets) > MOST:
        message = f"one message carries at most {MOST} sockets; the listener has {len(sockets)}"
        raise ValueError(message)
    for sock in sockets:
        try:
            check_listening(sock)
        except NotListeningError:
            reason = "the listener does not listen at present: a successor could not either"
            raise NotListeningError(reason) from None
    listener._gate.share()
    names = "\n".join(f"{sock.family.name} {sock.getsockname()!r}" for sock in sockets)
    await _send(control, _SOCKETS, len(sockets), names, sockets)
    kind, count, text, strays = await _receive(control)
    _close(strays)
    # Closed meanwhile, it has removed its file, and a successor would have none.
    _check_open(listener)
    if kind == _REFUSED:
        raise ConnectionAbortedError(errno.ECONNABORTED, f"the sockets were not taken: {text}")
    if kind != _RECEIVED or count != len(sockets):
        message = f"expected 'received {len(sockets)}', got {_KINDS.get(kind, kind)!r} {count}"
        raise ValueError(message)
    # Nothing between the two: whoever is told that the sockets are its own finds the file.
    await _send(control, _YOURS, count, "", done=lambda: _forget_file(listener))


def _check_open(listener: Listener[Any]) -> None:
    if listener._deciding.closed:
        reason = "the listener is closed: there is nothing to pass on"
        raise ListenerClosedError(reason)


def _forget_file(listener: Listener[Any]) -> None:
    listener._file = None


async def receive_sockets(control: socket.socket) -> tuple[socket.socket, ...]:
    """Return the listening sockets that the process at the other end of *control* passes on.

    That process calls `send_listener()`. When this returns, the sockets are the caller's,
    one for `Listener.from_socket()` each, in the order of the sender's; they have their
    options and their queue, and the sender may still be taking from it.

    Args:
        control: A connected Unix stream socket, non-blocking; stays the caller's. Nothing
            behind the message is read from it.

    Raises:
        ValueError: *control* is not what it should be, or what came on it is not a message
            of this version of `send_listener()`.
        TypeError: *control* is not a `socket.socket`.
        DescriptorsExhaustedError: This process has not enough free descriptors for all.
        NotASocketError: A descriptor that came is not a socket.
        OSError: *control* failed; a ConnectionError where the other end has gone before
            it said that the sockets are this process's.

        After an error whatever had come is closed here, the sender has been told why if
        it could be, and serves on. Close *control*.

    Cancellation:
        As after an error, and also when the sender's last word has come already and it may
        have closed its own sockets: give this call more time than the sender has.

    Source: unix(7), SCM_RIGHTS.
    """
    _check_control(control)
    try:
        kind, count, text, descriptors = await _receive(control)
    except (ValueError, DescriptorsExhaustedError) as error:
        _refuse(control, str(error))
        raise
    try:
        sockets = _unpack(kind, count, text, descriptors)
    except (OSError, ValueError) as error:
        _close(descriptors)
        _refuse(control, str(error))
        raise
    try:
        await _send(control, _RECEIVED, len(sockets), "")
        kind, count, _, strays = await _receive(control)
        _close(strays)
        if kind != _YOURS or count != len(sockets):
            message = f"expected 'yours {len(sockets)}', got {_KINDS.get(kind, kind)!r} {count}"
            raise ValueError(message)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return tuple(sockets)


def _unpack(kind: int, count: int, text: str, descriptors: list[int]) -> list[socket.socket]:
    """Return the sockets of a message, or say what is wrong with it and change nothing."""
    if kind != _SOCKETS:
        message = f"expected sockets, got {_KINDS.get(kind, kind)!r}"
        raise ValueError(message)
    names = text.splitlines()
    if len(names) != count or count == 0:
        message = f"a message of {count} sockets with {len(names)} names"
        raise ValueError(message)
    if len(descriptors) < count:
        missing = ", ".join(names[len(descriptors) :])
        reason = (
            f"{len(descriptors)} of {count} sockets could be received: no descriptor was free "
            f"for {missing} (RLIMIT_NOFILE)"
        )
        raise DescriptorsExhaustedError(reason)
    if len(descriptors) > count:
        message = f"{len(descriptors)} descriptors came, the message names {count}"
        raise ValueError(message)
    return _adopt(descriptors)


def _check_control(control: socket.socket) -> None:
    if not isinstance(control, socket.socket):
        message = f"control is a socket.socket, got {control!r}"
        raise TypeError(message)
    if control.family != socket.AF_UNIX or control.type != socket.SOCK_STREAM:
        message = f"control is a Unix stream socket: only those carry descriptors; got {control!r}"
        raise ValueError(message)
    if control.gettimeout() != 0:
        message = "control is non-blocking: call its setblocking(False) first"
        raise ValueError(message)


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _refuse(control: socket.socket, reason: str) -> None:
    """Tell the sender, if that can be done at once; else closing *control* has to."""
    text = reason.encode()[:4096]
    try:
        control.send(_FRAME.pack(_MAGIC, _VERSION, _REFUSED, 0, len(text)) + text, _NONBLOCK)
    except OSError:
        return


async def _send(
    control: socket.socket,
    kind: int,
    count: int,
    text: str,
    sockets: Sequence[socket.socket] = (),
    *,
    done: Callable[[], object] | None = None,
) -> None:
    """Send one frame; call *done* in the step in which the last of it was sent."""
    body = text.encode()
    data = memoryview(_FRAME.pack(_MAGIC, _VERSION, kind, count, len(body)) + body)
    while data:
        # Asked for anew after each wait: a socket closed meanwhile says -1, and not the
        # number of something else.
        descriptors = array.array("i", [sock.fileno() for sock in sockets])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if sockets else []
        try:
            data = data[control.sendmsg([data], rights, _NONBLOCK) :]
            sockets = ()  # they travel with the first bytes
        except BlockingIOError:
            await _ready(control, writing=True)
    if done is not None:
        done()


async def _receive(control: socket.socket) -> tuple[int, int, str, list[int]]:
    """Return kind, count, text and descriptors of one frame, and read nothing behind it."""
    got: list[int] = []
    try:
        magic, version, kind, count, length = _FRAME.unpack(
            await _exactly(control, _FRAME.size, got)
        )
        if magic != _MAGIC:
            message = "what came on control is not from send_listener() or receive_sockets()"
            raise ValueError(message)
        if version != _VERSION:
            message = f"the other end speaks version {version} of the hand-over, not {_VERSION}"
            raise ValueError(message)
        if length > _TEXT_MOST:
            message = f"{length} bytes of text in a message; {_TEXT_MOST} are allowed"
            raise ValueError(message)
        text = (await _exactly(control, length, got)).decode()
    except BaseException:
        _close(got)
        raise
    return kind, count, text, got


async def _exactly(control: socket.socket, size: int, descriptors: list[int]) -> bytes:
    """Read *size* bytes; add the descriptors that come along to *descriptors*."""
    data = b""
    room = socket.CMSG_SPACE(MOST * _INT_SIZE)
    while len(data) < size:
        try:
            # loop.sock_recv() has no place for what comes along; the kernel would drop it.
            # MSG_CTRUNC needs no look: the count in the frame says how many there were.
            chunk, rights, _, _ = control.recvmsg(size - len(data), room, _NONBLOCK | _CLOEXEC)
        except BlockingIOError:
            await _ready(control, writing=False)
            continue
        for level, kind, raw in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = array.array("i")
                whole.frombytes(raw[: len(raw) - len(raw) % _INT_SIZE])
                descriptors.extend(whole)
        if len(descriptors) > MOST:
            message = f"more than {MOST} descriptors came with one message"
            raise ValueError(message)
        if not chunk:
            reason = "the other end closed control before the hand-over was complete"
            raise ConnectionResetError(errno.ECONNRESET, reason)
        data += chunk
    return data


async def _ready(control: socket.socket, *, writing: bool) -> None:
    """Wait until *control* has something to read, or room to write."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    )
    add(control, _told, ready)
    try:
        await ready
    finally:
        remove(control)


def _told(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
