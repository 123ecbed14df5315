"""The load generator where there is no C compiler: _echo_load.c in Python, with the same promises.

``python _echo_load.py PORT SIZE CONNECTIONS MILLISECONDS`` prints
``REQUESTS WRONG NANOSECONDS P50 P90 P99 IDLE``.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
from time import monotonic_ns

LIFETIME = 120  # seconds
SHIFTS = 4096


class Run:
    """What all connections share."""

    def __init__(self, size: int, milliseconds: int) -> None:
        """Take the time: requests are begun for so long from now."""
        self.size = size
        self.text = random.Random(1).randbytes(size + SHIFTS)  # noqa: S311  # no secret
        self.first = self.last = monotonic_ns()
        self.deadline = self.first + milliseconds * 1_000_000
        self.latencies: list[int] = []
        self.wrong = 0
        self.idle = 0


class Connection:
    """One connection with one request under way."""

    def __init__(self, run: Run, port: int, number: int) -> None:
        """Connect."""
        self.run = run
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.shift = number * 127 % SHIFTS
        self.over = False  # half-closed: only the end of the stream may come

    def begin(self) -> None:
        """Send the next request, or as much of it as the kernel takes."""
        self.shift = (self.shift + 61) % SHIFTS
        self.request = memoryview(self.run.text)[self.shift : self.shift + self.run.size]
        self.unsent = self.request
        self.got = 0
        self.since = monotonic_ns()
        self.send_on()

    def send_on(self) -> None:
        """Send more of it."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass

    def drive(self) -> bool | None:
        """Do what can be done now; True when all went well to the end, False if not."""
        try:
            if not self.over:
                self.send_on()
            data = self.sock.recv(max(self.run.size - self.got, 1))
        except BlockingIOError:
            return None
        except OSError:
            return False
        if self.over or not data:
            return self.over and not data
        if data != self.request[self.got : self.got + len(data)]:
            return False
        self.got += len(data)
        if self.got == self.run.size:
            self.next()
        return None

    def next(self) -> None:
        """Note an echo; begin another request or half-close."""
        run = self.run
        run.last = monotonic_ns()
        run.latencies.append(run.last - self.since)
        if run.last < run.deadline:
            self.begin()
        else:
            self.over = True
            self.got = run.size
            self.sock.shutdown(socket.SHUT_WR)

    def interest(self) -> int:
        """Return what to wait for."""
        return select.POLLIN | (select.POLLOUT if not self.over and self.unsent else 0)


def main() -> None:
    """Run until the time is over and print what came of it."""
    port, size, count, milliseconds = map(int, sys.argv[1:])
    signal.alarm(LIFETIME)
    run = Run(size, milliseconds)
    poll = select.poll()
    connections = {}
    for number in range(count):
        connection = Connection(run, port, number)
        connection.begin()
        connections[connection.sock.fileno()] = connection
        poll.register(connection.sock, connection.interest())
    while connections:
        before = monotonic_ns()
        ready = poll.poll(0)
        if not ready:
            os.sched_yield()
            run.idle += monotonic_ns() - before
        for fd, _ in ready:
            connection = connections[fd]
            well = connection.drive()
            if well is None:
                poll.modify(fd, connection.interest())
                continue
            run.wrong += not well
            poll.unregister(fd)
            connections.pop(fd).sock.close()
    took = sorted(run.latencies)
    marks = [took[len(took) * percent // 100] if took else 0 for percent in (50, 90, 99)]
    print(len(took), run.wrong, run.last - run.first, *marks, run.idle)


if __name__ == "__main__":
    main()
