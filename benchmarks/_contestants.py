"""Who is measured: each a command that serves a job, or the reason why it can't be run here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

import _proxies

HERE = Path(__file__).parent
JOBS = ("reject", "accept")
LISTENERS = {
    "1": "condaccept accept(), 1 task",
    "16": "condaccept accept(), 16 tasks",
    "streams": "condaccept streams()",
    "serve": "condaccept serve()",
}
"""What `_serve_condaccept.py` takes, and the name in the table."""
C_LOOP = "C loop"
START_SERVER = "start_server"
PROTOCOL = "protocol"
HAPROXY = "HAProxy"
STREAMS = "asyncio streams"
ECHOERS = {
    "streams": STREAMS,
    "protocol": PROTOCOL,
    "send": "condaccept send()",
    "drain": "condaccept write(), drain()",
}
"""What `_serve_echo.py` takes, and the name in the table."""
GUARDS = {
    "streams": START_SERVER,
    "protocol": PROTOCOL,
    "serve": "condaccept serve()",
}
"""What `_serve_flood.py` takes, and the name in the table."""

CONSTANT = "a constant"
CONDITIONS = {
    "none": "no condition",
    "constant": CONSTANT,
    "looks": "address and data",
    "at_once": "async, at once",
    "turn": "async, one turn of the loop",
}
"""What `_serve_conditions.py` takes, and the name in the table."""


class Contestant(NamedTuple):
    """A server under measurement."""

    loop: str
    """``asyncio`` or ``uvloop``; empty for those who have none."""
    name: str
    command: tuple[str, ...]
    """What starts it, once the job is appended."""
    lacks: str = ""
    """What it needs and this machine doesn't have."""
    jobs: tuple[str, ...] = JOBS
    rejection: str = "reset"
    """What its rejected clients see: ``reset``, or ``empty``, an EOF with nothing before it."""


def contestants(loops: Sequence[str], floor: Path | None) -> Iterator[Contestant]:
    """Yield everybody, those who lack something included; *floor* is the compiled C loop."""
    yield Contestant("", C_LOOP, (str(floor),), "" if floor else "a working C compiler")
    yield _proxy(HAPROXY, jobs=("reject",))
    yield _proxy("nginx", rejection="empty")
    for loop in loops:
        lacks = _missing(loop)
        yield Contestant(loop, START_SERVER, _script("_serve_streams.py", loop), lacks)
        yield Contestant(loop, PROTOCOL, _script("_serve_protocol.py", loop), lacks)
        yield from named("_serve_condaccept.py", LISTENERS, [loop])


def _proxy(name: str, jobs: tuple[str, ...] = JOBS, rejection: str = "reset") -> Contestant:
    program = name.lower()
    command = _script("_serve_proxy.py", program)
    return Contestant("", name, command, _proxies.lacks(program), jobs, rejection)


def named(script: str, names: Mapping[str, str], loops: Sequence[str]) -> Iterator[Contestant]:
    """Yield everybody whom *script* serves: *names* has its arguments, and those of the table."""
    for loop in loops:
        lacks = _missing(loop, "condaccept")
        for argument, name in names.items():
            yield Contestant(loop, name, _script(script, loop, argument), lacks)


def _missing(*modules: str) -> str:
    return ", ".join(name for name in modules if importlib.util.find_spec(name) is None)


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / name), *arguments)
