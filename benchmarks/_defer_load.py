"""The other end of deferred connections, and who drives their server.

``python _defer_load.py PORT COUNT WAKE_UPS`` measures wake-ups, and with 0 of them memory.
It prints a JSON object: totals of CPU time in nanoseconds, or bytes, and what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LIFETIME = 120  # seconds
SPACING = 0.0002  # seconds from one byte to the next, whoever's


class Server:
    """The control connection."""

    def __init__(self, port: int) -> None:
        """Connect: the first is let in."""
        self.file = socket.create_connection(("127.0.0.1", port)).makefile("rwb")

    def ask(self, *request: object) -> list[int]:
        """Have it done and return the answer."""
        self.file.write(" ".join(map(str, request)).encode() + b"\n")
        self.file.flush()
        line = self.file.readline()
        assert line, f"the server has gone: {request}"
        return [int(number) for number in line.split()]


def connect(port: int, count: int) -> list[socket.socket]:
    """Return so many connections."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for client in clients:
        # A second byte would wait until the first is acknowledged, for 40 ms.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return clients


def pace(clients: Sequence[socket.socket], count: int) -> None:
    """Send *count* bytes, each to the next client; what is late makes all others later."""
    due = time.monotonic()
    for number in range(count):
        while time.monotonic() < due:
            os.sched_yield()
        clients[number % len(clients)].send(b".")
        due = time.monotonic() + SPACING


def silent(client: socket.socket) -> bool:
    """Whether the connection is there, and nothing has come."""
    try:
        client.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def wake_ups(server: Server, port: int, count: int, number: int) -> dict[str, object]:
    """Measure the CPU time of *number* wake-ups, for each way of waking, and of offers."""
    _, resident = server.ask("memory")
    server.ask("mark")
    clients = connect(port, count)
    (first,) = server.ask("offered", count)
    _, grown = server.ask("memory")
    rounds = -(-number // count)
    (everybody,) = server.ask("everybody", rounds)
    (reconsider,) = server.ask("one_by_one", number)
    server.ask("bytes")
    pace(clients, number)
    (data,) = server.ask("offered", number)
    server.ask("after")
    (after,) = server.ask("offered", number)
    return {
        "first": first / count,
        "offer": everybody / rounds / count,
        "reconsider": reconsider / number,
        "data": data / number,
        "after": after / number,
        "resident": (grown - resident) / count,
        "wrong": wrong(server, clients),
    }


def memory(server: Server, port: int, count: int) -> dict[str, object]:
    """Measure memory per connection: deferred once, and again."""
    before, _ = server.ask("memory")
    server.ask("mark")
    clients = connect(port, count)
    server.ask("offered", count)
    once, _ = server.ask("memory")
    server.ask("everybody", 1)
    again, _ = server.ask("memory")
    return {
        "once": (once - before) / count,
        "again": (again - before) / count,
        "wrong": wrong(server, clients),
    }


def wrong(server: Server, clients: Sequence[socket.socket]) -> int:
    """Return how many are not deferred at either end."""
    kept, lost = server.ask("kept")
    return max(len(clients) - kept, lost, sum(not silent(client) for client in clients))


def main() -> None:
    """Measure and print."""
    port, count, number = map(int, sys.argv[1:])
    signal.alarm(LIFETIME)
    server = Server(port)
    print(
        json.dumps(wake_ups(server, port, count, number) if number else memory(server, port, count))
    )


if __name__ == "__main__":
    main()
