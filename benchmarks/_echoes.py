"""The measurement of echoes: rounds of all contestants, and the tables made of them."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from _contestants import STREAMS
from _measure import in_turn
from _plot import Bar, Panel, is_ours
from _process import Cores, Usage, output, serve
from _report import ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from _contestants import Contestant


KB = 1024


class Job(NamedTuple):
    """What is asked of a server."""

    size: int
    """Bytes in a request, and in its echo."""
    connections: int
    """Each with one request under way."""
    first: bool = False
    """Whether nobody has called the server before: asked first, and without a warm-up."""

    def __str__(self) -> str:
        size = f"{self.size} B" if self.size % KB else f"{self.size // KB} KB"
        first = "the first " if self.first else ""
        return f"{size}, {first}{self.connections} connection{'s' if self.connections > 1 else ''}"


JOBS = (Job(64, 32, first=True), Job(64, 1), Job(64, 32), Job(60 * KB, 1), Job(60 * KB, 8))


class Settings(NamedTuple):
    """How much of it."""

    rounds: int
    milliseconds: int
    """For each contestant, job and round."""
    warm_up: int
    """Milliseconds before each measurement; what comes back has to be right here, too."""


class Sample(NamedTuple):
    """One contestant and job in one round."""

    round: int
    job: Job
    loop: str
    name: str
    requests: int
    wrong: int
    """Connections in which an echo came back wrong, short or with something behind it."""
    rate: float
    """Requests per second."""
    cpu_us: float
    """CPU time of the server process, user and system, per request, in microseconds."""
    p50: float
    p90: float
    p99: float
    """Latencies in microseconds."""
    idle: float
    """The share of the time in which the load generator had nothing to do."""


class Row(NamedTuple):
    """One contestant in one table: medians over the rounds."""

    job: Job
    loop: str
    name: str
    rate: float
    lowest: float
    highest: float
    times_streams: float
    """Requests per second to those of asyncio's streams on the same loop: the median of the
    ratios within each round, which a slow or fast minute can't shift."""
    cpu_us: float
    cpu_times_streams: float
    """The same ratio of the CPU times."""
    p50: float
    p90: float
    p99: float
    idle: float


def measure(
    contestants: Sequence[Contestant], load: Sequence[str], cores: Cores, settings: Settings
) -> Iterator[Sample]:
    """Run all rounds.

    The servers of a round live side by side, so that the contestants of a job are measured
    within seconds of each other; one that is not asked anything sleeps.
    """
    for number, line in in_turn(contestants, settings.rounds):
        with ExitStack() as servers:
            running = [
                (each, *servers.enter_context(serve(each.command, cores.server))) for each in line
            ]
            for job in JOBS:
                for contestant, pid, port in running:
                    asked = (*load, str(port), str(job.size), str(job.connections))
                    early = 0
                    if not job.first:
                        warm_up = output((*asked, str(settings.warm_up)), cores.load)
                        early = int(warm_up.split()[1])
                    before = Usage.of(pid)
                    printed = output((*asked, str(settings.milliseconds)), cores.load)
                    cpu = Usage.of(pid).cpu_ns - before.cpu_ns
                    requests, wrong, took, p50, p90, p99, idle = map(int, printed.split())
                    yield Sample(
                        round=number,
                        job=job,
                        loop=contestant.loop,
                        name=contestant.name,
                        requests=requests,
                        wrong=wrong + early,
                        rate=requests / max(took, 1) * 1e9,
                        cpu_us=cpu / max(requests, 1) / 1000,
                        p50=p50 / 1000,
                        p90=p90 / 1000,
                        p99=p99 / 1000,
                        idle=idle / took if took else 0,
                    )


def summarise(samples: Iterable[Sample]) -> list[Row]:
    """Boil the rounds down to one row per contestant and job."""
    cells: dict[tuple[Job, str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        cells[sample.job, sample.loop, sample.name].append(sample)
    rates = {key: [sample.rate for sample in cell] for key, cell in cells.items()}
    costs = {key: [sample.cpu_us for sample in cell] for key, cell in cells.items()}
    middle = ("p50", "p90", "p99", "idle")
    return [
        Row(
            *(job, loop, name),
            *(median(rate), min(rate), max(rate)),
            ratio(rate, rates[job, loop, STREAMS]),
            median(costs[job, loop, name]),
            ratio(costs[job, loop, name], costs[job, loop, STREAMS]),
            *(
                median(getattr(sample, each) for sample in cells[job, loop, name])
                for each in middle
            ),
        )
        for (job, loop, name), rate in rates.items()
    ]


HEADINGS = (
    "per second",
    "lowest - highest",
    "x streams",
    "CPU µs",
    "x streams",
    "p50",
    "p90",
    "p99",
    "idle",
)
LINE = "{:<38}{:>10}{:>18}{:>10}{:>8}{:>10}{:>7}{:>7}{:>7}{:>6}"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of one table per job."""
    for job in JOBS:
        yield LINE.format(str(job), *HEADINGS)
        for row in rows:
            if row.job == job:
                yield LINE.format(
                    f"  {row.loop:<9}{row.name}",
                    f"{row.rate:.0f}",
                    f"{row.lowest:.0f} - {row.highest:.0f}",
                    f"{row.times_streams:.2f}",
                    f"{row.cpu_us:.1f}",
                    f"{row.cpu_times_streams:.2f}",
                    *(f"{value:.0f}" for value in (row.p50, row.p90, row.p99)),
                    f"{row.idle:.0%}",
                )
        yield ""


def panels(rows: Sequence[Row]) -> Iterator[Panel]:
    """Yield a picture per job."""
    for job in JOBS:
        bars = [
            Bar(row.loop, row.name, row.rate, row.lowest, row.highest, is_ours(row.name))
            for row in rows
            if row.job == job
        ]
        yield Panel(f"echo of {job}", "requests per second", bars, "{:,.0f}")
