"""What the Python servers under measurement have in common."""

from __future__ import annotations

import asyncio
import importlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine

HOST = "127.0.0.1"
BACKLOG = 4096  # the same for everybody: _floor.c, and condaccept by default
GREETING = b"hello"
LIFETIME = 120  # seconds; then SIGALRM ends a server that nobody has ended


def announce(port: int) -> None:
    """Tell whoever started this server where it listens."""
    print(port, flush=True)


def run(loop: str, main: Coroutine[None, None, None]) -> None:
    """Run *main* on the loop of that module, ``asyncio`` or ``uvloop``, never in debug mode."""
    signal.alarm(LIFETIME)
    factory = importlib.import_module(loop).new_event_loop
    with asyncio.Runner(debug=False, loop_factory=factory) as runner:
        runner.run(main)
