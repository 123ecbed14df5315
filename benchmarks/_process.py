"""Child processes: pinned to a core, bounded in time, read from outside, always ended.

Linux only.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT = 130  # seconds; a little above the lifetime that every child gives itself


class Cores(NamedTuple):
    """The core of the server, and that of the load generator."""

    server: int
    load: int

    @classmethod
    def choose(cls) -> Cores:
        """Take the last and the first that this process may use; maybe they are the same."""
        usable = os.sched_getaffinity(0)
        return cls(server=max(usable), load=min(usable))


class Usage(NamedTuple):
    """What a process has used so far."""

    cpu_ns: int
    """User and system time, in nanoseconds."""
    sleeps: int
    """How often it gave up its core because it had nothing to do."""
    waited_ns: int
    """How long it had something to do and did not get its core, in nanoseconds."""

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Ask the kernel about another process."""
        return cls(_cpu_ns(pid), _sleeps(pid), waited_ns(pid))


def raise_descriptor_limit() -> int:
    """Let this process, and those it starts, have as many descriptors as they may; how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def _cpu_ns(pid: int) -> int:
    try:
        # The clock id that clock_getcpuclockid(3) makes of a pid; exact to the nanosecond.
        return time.clock_gettime_ns(~pid << 3 | 2)
    except OSError:  # a kernel or a sandbox without it; ticks of 10 ms, so take many connections
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # utime, stime: 14 and 15 in proc_pid_stat(5)
        return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def _sleeps(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def waited_ns(pid: int) -> int:
    """See `Usage`; 0 where the kernel does not count it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
    except FileNotFoundError:
        return 0


@contextmanager
def start(
    command: Sequence[str], core: int, *, urgent: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run *command* on *core* and kill it at the end of the block, if it is still there.

    If it is *urgent*, and whoever asks is allowed to, it gets its core before all others.

    It is in a session of its own: a Ctrl-C at the terminal reaches the driver only,
    which then leaves this block.
    """
    with subprocess.Popen(  # noqa: S603  # every command is built here, from this folder
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            os.sched_setaffinity(process.pid, {core})
            if urgent:
                with suppress(PermissionError):
                    os.sched_setscheduler(process.pid, os.SCHED_FIFO, os.sched_param(1))
            yield process
        finally:
            process.kill()


@contextmanager
def serve(command: Sequence[str], core: int, *, urgent: bool = False) -> Iterator[tuple[int, int]]:
    """Run a server that prints its port first, and yield its pid and port."""
    with start(command, core, urgent=urgent) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {' '.join(command)}")
        yield process.pid, int(line)


def output(command: Sequence[str], core: int, *, urgent: bool = False) -> str:
    """Run *command* on *core* to its end and return what it printed."""
    with start(command, core, urgent=urgent) as process:
        printed, _ = process.communicate(timeout=TIMEOUT)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}: {' '.join(command)}")
        return printed
