"""The load generator where there is no C compiler: _flood.c in Python, with the same promises.

``python _flood.py PORT RATE MILLISECONDS`` prints
``STARTED RESET WRONG MOST_OPEN NANOSECONDS WAITED ECHOES BAD P50 P99 WORST``.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections import Counter
from time import monotonic_ns

from _load import LIFETIME, Client, Outcome
from _process import waited_ns

MAX_OPEN = 4000
SIZE = 64
INTERVAL = 500_000  # nanoseconds
LIMIT = 3_000_000_000  # nanoseconds


class Callers:
    """Those who are to be rejected."""

    def __init__(self, port: int, poll: select.epoll) -> None:
        """Begin with none."""
        self.port = port
        self.poll = poll
        self.open: dict[int, Client] = {}
        self.outcomes = Counter[Outcome]()
        self.started = self.most = 0
        self.last = monotonic_ns()

    def begin(self) -> None:
        """Begin one."""
        client = Client()
        self.started += 1
        self.open[client.sock.fileno()] = client
        self.most = max(self.most, len(self.open))
        self.poll.register(client.sock, select.EPOLLIN | select.EPOLLRDHUP)
        self._settle(client.sock.fileno(), client.connect(self.port))

    def read(self, fd: int) -> None:
        """See how one has ended."""
        self._settle(fd, self.open[fd].read_on())

    def _settle(self, fd: int, outcome: Outcome | None) -> None:
        if outcome is not None:
            self.outcomes[outcome] += 1
            self.last = monotonic_ns()
            self.open.pop(fd).sock.close()


class Stream:
    """The established one."""

    def __init__(self, port: int) -> None:
        """Connect, from another address than the callers."""
        address = ("127.0.0.1", port)
        self.sock = socket.create_connection(address, LIMIT / 1e9, ("127.0.0.2", 0))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.latencies: list[int] = []
        self.request = b""
        self.bad = False

    def begin(self) -> None:
        """Send a request."""
        self.request = bytes([len(self.latencies) % 256]) * SIZE
        self.got = b""
        self.since = monotonic_ns()
        self.sock.send(self.request)

    def read(self) -> None:
        """Read what has come of its echo."""
        data = self.sock.recv(SIZE)
        self.got += data
        self.bad = self.bad or not data or not self.request.startswith(self.got)
        if self.got == self.request:
            self.latencies.append(monotonic_ns() - self.since)
            self.request = b""

    def end(self) -> None:
        """Half-close; the end of the stream must come, and nothing before it."""
        self.sock.shutdown(socket.SHUT_WR)
        self.bad = self.bad or bool(self.request) or self.sock.recv(1) != b""


def main() -> None:
    """Run until the time is over and print what came of it."""
    port, rate, milliseconds = map(int, sys.argv[1:])
    signal.alarm(LIFETIME)
    poll = select.epoll()
    callers = Callers(port, poll)
    stream = Stream(port)
    poll.register(stream.sock, select.EPOLLIN)
    gap = 1e9 / rate
    at = first = next_echo = monotonic_ns()
    deadline = first + milliseconds * 1_000_000
    waited = waited_ns(os.getpid())
    while not stream.bad and at < deadline + LIMIT:
        due = first + int(callers.started * gap)
        if due <= at < deadline and len(callers.open) < MAX_OPEN:
            callers.begin()
        if not stream.request and next_echo <= at < deadline:
            stream.begin()
            next_echo = max(next_echo, at - INTERVAL) + INTERVAL
        following = first + int(callers.started * gap)
        ahead = min(following, at + 1_000_000, following if stream.request else next_echo) - at
        if ahead > 0:
            select.select([poll], (), (), ahead / 1e9)
        for fd, _ in poll.poll(0, 64):
            if fd == stream.sock.fileno():
                stream.read()
            else:
                callers.read(fd)
        if at >= deadline and not callers.open and not stream.request:
            break
        at = monotonic_ns()
    stream.end()
    outcomes = callers.outcomes
    reset = outcomes[Outcome.RESET]
    wrong = callers.started - reset
    took = sorted(stream.latencies) or [0]
    marks = took[len(took) // 2], took[len(took) * 99 // 100], took[-1]
    echoes = len(stream.latencies)
    elapsed = callers.last - first
    print(
        callers.started,
        reset,
        wrong,
        callers.most,
        elapsed,
        waited_ns(os.getpid()) - waited,
        end=" ",
    )
    print(echoes, int(stream.bad), *marks)


if __name__ == "__main__":
    main()
