"""The measurement: rounds of all contestants, each in a fresh process."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from _contestants import JOBS
from _process import Cores, Usage, output, serve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _contestants import Contestant

T = TypeVar("T")

WARM_UP_BURST = 64
SETTLE = 0.01  # seconds for a server to fall asleep after its last connection


class Settings(NamedTuple):
    """How much of it."""

    rounds: int
    connections: int
    """For each contestant, job, burst and round."""
    bursts: tuple[int, ...]
    warm_up: int
    """Connections before each measurement, whose outcome has to be right."""


class Sample(NamedTuple):
    """One contestant, job and burst in one round."""

    round: int
    job: str
    burst: int
    loop: str
    name: str
    cpu_us: float
    """CPU time of the server process, user and system, per connection, in microseconds."""
    sleeps: float
    """How often the server had nothing to do, per connection: 1 / the size of its batches."""
    rate: float
    """Connections per second, by the wall of the load generator."""
    errors: int
    """Connections that didn't end as the job says."""


class Load(NamedTuple):
    """The generator, and where it runs."""

    command: tuple[str, ...]
    core: int
    request: int = 0
    """Bytes that a client sends at once if it is to be rejected. One that is served sends
    none: left unread, they would make a reset of its end."""

    def run(self, port: int, ending: str, count: int, burst: int) -> tuple[int, float]:
        """Make *count* connections; return how many had another *ending*, and the seconds."""
        request = 0 if ending == "served" else self.request
        asked = (*self.command, *map(str, (port, count, burst, request)))
        printed = output(asked, self.core)
        *counts, took = map(int, printed.split())
        ended = dict(zip(("served", "reset", "empty", "wrong"), counts, strict=True))
        return count - ended[ending], took / 1e9


def measure(
    contestants: Sequence[Contestant], load: Load, cores: Cores, settings: Settings
) -> Iterator[Sample]:
    """Run all rounds."""
    for number, line in in_turn(contestants, settings.rounds):
        for job in JOBS:
            for contestant in line:
                if job in contestant.jobs:
                    for sample in _samples(contestant, job, load, cores, settings):
                        yield sample._replace(round=number)


def in_turn(contestants: Sequence[T], rounds: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Yield rounds; each begins with another contestant, so that no place is anybody's."""
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        first = number % len(contestants)
        yield number, (*contestants[first:], *contestants[:first])


def _samples(
    contestant: Contestant, job: str, load: Load, cores: Cores, settings: Settings
) -> Iterator[Sample]:
    ending = "served" if job == "accept" else contestant.rejection
    with serve((*contestant.command, job), cores.server) as (pid, port):
        errors, _ = load.run(port, ending, settings.warm_up, WARM_UP_BURST)
        assert not errors, f"{contestant.name}, {job}: {errors} connections ended the wrong way"
        for burst in settings.bursts:
            time.sleep(SETTLE)
            before = Usage.of(pid)
            errors, seconds = load.run(port, ending, settings.connections, burst)
            time.sleep(SETTLE)
            after = Usage.of(pid)
            yield Sample(
                round=0,
                job=job,
                burst=burst,
                loop=contestant.loop,
                name=contestant.name,
                cpu_us=(after.cpu_ns - before.cpu_ns) / settings.connections / 1000,
                sleeps=(after.sleeps - before.sleeps) / settings.connections,
                rate=settings.connections / seconds,
                errors=errors,
            )
