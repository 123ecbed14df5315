"""Read one transfer to its end: ``python _fetch.py PORT`` prints ``BYTES NANOSECONDS``."""

from __future__ import annotations

import signal
import socket
import sys
import time

LIFETIME = 120  # seconds


def main() -> None:
    """Connect, read up to the end of the stream, and print how much came and how long it took."""
    signal.alarm(LIFETIME)
    scratch = bytearray(1 << 20)
    received = 0
    before = time.perf_counter_ns()
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
        while n := client.recv_into(scratch):
            received += n
    print(received, time.perf_counter_ns() - before)


if __name__ == "__main__":
    main()
