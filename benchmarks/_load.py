"""The load generator where there is no C compiler: _load.c in Python, with the same promises.

``python _load.py PORT COUNT BURST REQUEST`` prints
``SERVED RESET EMPTY WRONG NANOSECONDS``.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import sys
from collections import Counter
from enum import Enum
from time import monotonic_ns

LIFETIME = 120  # seconds
GREETING = b"hello"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # leaves no TIME_WAIT, see _load.c


class Outcome(Enum):
    """How a connection ended for the client."""

    SERVED = "exactly the greeting, then EOF"
    RESET = "a reset, and not one byte"
    EMPTY = "EOF, and not one byte"
    WRONG = "anything else"


class Client:
    """One connection."""

    def __init__(self, request: bytes = b"") -> None:
        """Make the socket; connecting comes later, for the whole burst at once."""
        self.unsent = request
        self.sock = socket.socket()
        self.sock.settimeout(0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.got = b""

    def connect(self, port: int) -> Outcome | None:
        """Start connecting; a fast server may have ended it already."""
        status = self.sock.connect_ex(("127.0.0.1", port))
        if status in (0, errno.EINPROGRESS):
            return self.send_request()
        return Outcome.RESET if status == errno.ECONNRESET else Outcome.WRONG

    def send_request(self) -> Outcome | None:
        """Send it, if that hasn't been done; None while the connection is open."""
        if self.unsent:
            try:
                self.sock.send(self.unsent)
            except BlockingIOError:  # not connected yet
                return None
            except ConnectionResetError:
                return Outcome.RESET
            except OSError:
                return Outcome.WRONG
            self.unsent = b""
        return None

    def read_on(self) -> Outcome | None:
        """Read what is there; None while the connection is open."""
        try:
            while data := self.sock.recv(64):
                self.got += data
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return Outcome.WRONG if self.got else Outcome.RESET
        except OSError:
            return Outcome.WRONG
        if not self.got:
            return Outcome.EMPTY
        return Outcome.SERVED if self.got == GREETING else Outcome.WRONG


def run_burst(port: int, size: int, request: bytes, outcomes: Counter[Outcome]) -> None:
    """Start *size* connections at once and return when all have ended."""
    poll = select.poll()
    clients = {client.sock.fileno(): client for client in (Client(request) for _ in range(size))}

    def settle(fd: int, outcome: Outcome | None) -> None:
        if outcome is not None:
            outcomes[outcome] += 1
            poll.unregister(fd)
            clients.pop(fd).sock.close()

    for fd, client in list(clients.items()):
        poll.register(fd, select.POLLIN)
        settle(fd, client.connect(port))
        if client.unsent and fd in clients:
            poll.modify(fd, select.POLLIN | select.POLLOUT)
    while clients:
        ready = poll.poll(0)
        if not ready:
            os.sched_yield()
        for fd, _ in ready:
            client = clients[fd]
            waiting = bool(client.unsent)
            outcome = client.send_request()
            if waiting and not client.unsent:
                poll.modify(fd, select.POLLIN)
            settle(fd, outcome or client.read_on())


def main() -> None:
    """Run all bursts and print what came of them."""
    port, count, burst, request = map(int, sys.argv[1:])
    signal.alarm(LIFETIME)
    outcomes = Counter[Outcome]()
    before = monotonic_ns()
    while count > 0:
        size = min(count, burst)
        run_burst(port, size, bytes(request), outcomes)
        count -= size
    print(*(outcomes[outcome] for outcome in Outcome), monotonic_ns() - before)


if __name__ == "__main__":
    main()
