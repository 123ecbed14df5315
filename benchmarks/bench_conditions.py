"""What a decision costs under `Listener.serve()`: a condition that looks or waits, and none.

    python benchmarks/bench_conditions.py [--loop asyncio|uvloop|both] [--quick]
        [--json FILE] [--plot FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import _cli
from _build import generator
from _contestants import CONDITIONS, CONSTANT, JOBS, named
from _measure import Load, Settings, measure
from _plot import Bar, Panel
from _process import Cores
from _report import SHORT_UNIT, UNIT, at_a_time, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _contestants import Contestant
    from _measure import Sample

FULL = Settings(rounds=7, connections=5000, bursts=(1, 64), warm_up=500)
QUICK = Settings(rounds=1, connections=128, bursts=(1, 64), warm_up=64)
REQUEST = 16  # bytes that a client sends at once, for the condition that looks

TITLES = {
    "reject": f"reject under serve(): each caller sends {REQUEST} bytes, and is reset",
    "accept": "accept under serve(): write 5 bytes, close",
}
HEADINGS = ("median", "lowest - highest", "sleeps", "per second", "more", f"x {CONSTANT}")
LINE = "{:<41}{:>7}{:>17}{:>8}{:>12}{:>8}{:>14}"


class Row(NamedTuple):
    """One condition in one table; times in microseconds of CPU per connection."""

    job: str
    burst: int
    loop: str
    name: str
    median: float
    lowest: float
    highest: float
    sleeps: float
    rate: float
    """Connections per second."""
    more: float
    """Than the condition that returns a constant: median of the differences in each round."""
    times_constant: float
    """The same as a ratio."""


def main() -> int:
    """Measure and print; the exit status is 1 if a connection ended the wrong way."""
    options = _cli.accepting(__doc__).parse_args()
    cores = Cores.choose()
    settings = _cli.amounts(options, FULL, QUICK)

    with tempfile.TemporaryDirectory() as folder:
        language, command = generator("_load", Path(folder))
        everybody = list(conditions(_cli.loops(options)))
        present = [contestant for contestant in everybody if not contestant.lacks]
        samples = list(measure(present, Load(command, cores.load, REQUEST), cores, settings))

    rows = summarise(samples)
    for line in tables(rows):
        print(line)
    errors = sum(sample.errors for sample in samples)
    total = len(samples) * settings.connections
    result = _cli.Result(_cli.describe(cores, language), settings, everybody, rows, samples)
    result.end(f"{errors} of {total} connections ended the wrong way", options, list(panels(rows)))
    return 1 if errors or not samples else 0


def conditions(loops: Sequence[str]) -> Iterator[Contestant]:
    """Yield all conditions. None lets everybody in, and has the constant beside it there."""
    jobs = {CONDITIONS["none"]: ("accept",), CONSTANT: JOBS}
    for contestant in named("_serve_conditions.py", CONDITIONS, loops):
        yield contestant._replace(jobs=jobs.get(contestant.name, ("reject",)))


def summarise(samples: Sequence[Sample]) -> list[Row]:
    """Boil the rounds down to one row per job, burst, loop and condition."""
    cells: dict[tuple[str, int, str, str], list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda each: each.round):
        cells[sample.job, sample.burst, sample.loop, sample.name].append(sample)
    costs = {key: [sample.cpu_us for sample in cell] for key, cell in cells.items()}
    rows = []
    for key, cost in costs.items():
        constant = costs[*key[:3], CONSTANT]
        rows.append(
            Row(
                *key,
                *(median(cost), min(cost), max(cost)),
                median(sample.sleeps for sample in cells[key]),
                median(sample.rate for sample in cells[key]),
                median(ours - base for ours, base in zip(cost, constant, strict=True)),
                ratio(cost, constant),
            )
        )
    order = list(CONDITIONS.values())
    return sorted(rows, key=lambda row: (row.loop, order.index(row.name)))


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of one table per job."""
    for job, title in TITLES.items():
        yield f"{title}\n{UNIT}"
        for burst in dict.fromkeys(row.burst for row in rows):
            yield LINE.format(at_a_time(burst), *HEADINGS)
            yield from (_line(row) for row in rows if (row.job, row.burst) == (job, burst))
        yield ""


def panels(rows: Sequence[Row]) -> Iterator[Panel]:
    """Yield a picture per job and burst."""
    for job in TITLES:
        for burst in dict.fromkeys(row.burst for row in rows):
            bars = [
                Bar(row.loop, row.name, row.median, row.lowest, row.highest)
                for row in rows
                if (row.job, row.burst) == (job, burst)
            ]
            yield Panel(f"{job} under serve(); {at_a_time(burst)}", SHORT_UNIT, bars)


def _line(row: Row) -> str:
    return LINE.format(
        f"  {row.loop:<9}{row.name}",
        f"{row.median:.1f}",
        f"{row.lowest:.1f} - {row.highest:.1f}",
        f"{row.sleeps:.2f}",
        f"{row.rate:,.0f}",
        f"{row.more:+.1f}",
        f"{row.times_constant:.2f}",
    )


if __name__ == "__main__":
    _cli.run(main)
