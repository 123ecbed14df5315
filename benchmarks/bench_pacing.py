"""How long a transfer takes with a token rate: a ratio to the same one without.

    python benchmarks/bench_pacing.py [--loop asyncio|uvloop|both] [--quick]
        [--json FILE] [--plot FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import _cli
from _contestants import HERE
from _measure import in_turn
from _plot import Bar, Panel
from _process import Cores, output, serve

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

MEGABYTE = 1_000_000
UNPACED = 0
RATES = (UNPACED, 32 * MEGABYTE, 8 * MEGABYTE)
MAX_SIZE = 200 * MEGABYTE  # well within the 120 seconds that a child gives itself

HEADINGS = ("median", "lowest - highest", "MB/s", "x asked", "x unpaced")
LINE = "{:<23}{:>9}{:>19}{:>10}{:>9}{:>11}"


class Settings(NamedTuple):
    """How much of it."""

    rounds: int
    size: int
    """Bytes in each transfer."""


FULL = Settings(rounds=9, size=8 * MEGABYTE)
QUICK = Settings(rounds=1, size=MEGABYTE)


class Sample(NamedTuple):
    """One transfer."""

    round: int
    loop: str
    rate: int
    """Bytes per second that were asked for; 0: no flow spec."""
    seconds: float
    """From before connect() to the end of the stream, in the client."""
    received: int


class Row(NamedTuple):
    """One line of the table; times in milliseconds."""

    loop: str
    rate: int
    median: float
    lowest: float
    highest: float
    reached: float
    """Bytes per second, by the median."""
    times_unpaced: float
    """Median of the ratios within each round."""


def main() -> int:
    """Measure and print; the exit status is 1 if a client did not get every byte."""
    options = parse()
    cores = Cores.choose()
    settings = _cli.amounts(options, FULL, QUICK)

    samples = list(measure(_cli.loops(options), cores, settings))
    rows = summarise(samples)
    short = sum(sample.received != settings.size for sample in samples)

    print(f"one transfer of {settings.size:,} bytes, from connect() to its end, in milliseconds")
    print(LINE.format("", *HEADINGS))
    for row in rows:
        print(line(row))
    result = _cli.Result(_cli.describe(cores, "Python"), settings, (), rows, samples)
    verdict = f"{short} of {len(samples)} transfers ended with another number of bytes"
    result.end(verdict, options, panels(rows, settings))
    return 1 if short else 0


def measure(loops: Sequence[str], cores: Cores, settings: Settings) -> Iterator[Sample]:
    """Run all rounds, each kind in a fresh server; each round begins with another kind."""
    kinds = [(loop, rate) for loop in loops for rate in RATES]
    fetch = (sys.executable, str(HERE / "_fetch.py"))
    for number, turn in in_turn(kinds, settings.rounds):
        for loop, rate in turn:
            script = (sys.executable, str(HERE / "_serve_pacing.py"))
            command = (*script, loop, str(settings.size), str(rate))
            with serve(command, cores.server) as (_pid, port):
                received, elapsed = map(int, output((*fetch, str(port)), cores.load).split())
            yield Sample(number, loop, rate, elapsed / 1e9, received)


def summarise(samples: Sequence[Sample]) -> list[Row]:
    """Boil the rounds down to one row per loop and rate."""
    cells: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda each: each.round):
        cells[sample.loop, sample.rate].append(sample)
    rows = []
    for loop, rate in sorted(cells, key=lambda each: (each[0], RATES.index(each[1]))):
        cell = cells[loop, rate]
        times = [sample.seconds for sample in cell]
        ratios = [
            sample.seconds / base.seconds
            for sample, base in zip(cell, cells[loop, UNPACED], strict=True)
        ]
        middle, lowest, highest = (1000 * each(times) for each in (median, min, max))
        reached = median(sample.received for sample in cell) / median(times)
        rows.append(Row(loop, rate, middle, lowest, highest, reached, median(ratios)))
    return rows


def line(row: Row) -> str:
    """Return a line of the table."""
    return LINE.format(
        f"  {row.loop:<9}{kind(row)}",
        f"{row.median:.1f}",
        f"{row.lowest:.1f} - {row.highest:.1f}",
        f"{row.reached / MEGABYTE:.1f}",
        f"{row.reached / row.rate:.2f}" if row.rate else "",
        f"{row.times_unpaced:.1f}",
    )


def kind(row: Row) -> str:
    """Return what was asked for."""
    return f"{row.rate // MEGABYTE} MB/s" if row.rate else "unpaced"


def panels(rows: Sequence[Row], settings: Settings) -> Sequence[Panel]:
    """Return the picture."""
    bars = [Bar(row.loop, kind(row), row.median, row.lowest, row.highest) for row in rows]
    return [Panel(f"one transfer of {settings.size:,} bytes", "milliseconds", bars)]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = _cli.parser(__doc__)
    size = _cli.up_to(MAX_SIZE)
    parser.add_argument("--size", type=size, metavar="BYTES", help="of each transfer")
    return parser.parse_args()


if __name__ == "__main__":
    _cli.run(main)
