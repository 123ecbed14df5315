"""How long a transfer takes with a token rate: a ratio to the same one without.

    python benchmarks/bench_pacing.py [--loop asyncio|uvloop|both] [--quick] [--json FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from _contestants import HERE
from _process import Cores, output, serve
from bench_accept import LOOPS, MAX_ROUNDS, describe, up_to

if TYPE_CHECKING:
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
    if sys.platform != "linux":
        print("SO_MAX_PACING_RATE is Linux's.")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the children
    cores = Cores.choose()
    loops = LOOPS if options.loop == "both" else (options.loop,)
    settings = QUICK if options.quick else FULL
    said = {"rounds": options.rounds, "size": options.size}
    settings = settings._replace(**{name: value for name, value in said.items() if value})

    samples = list(measure(loops, cores, settings))
    rows = summarise(samples)
    machine = describe(cores, "Python")
    short = sum(sample.received != settings.size for sample in samples)

    print(f"one transfer of {settings.size:,} bytes, from connect() to its end, in milliseconds")
    print(LINE.format("", *HEADINGS))
    for row in rows:
        print(line(row))
    print(f"{short} of {len(samples)} transfers ended with another number of bytes")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json:
        report = {
            "machine": machine,
            "settings": settings._asdict(),
            "rows": [row._asdict() for row in rows],
            "samples": [sample._asdict() for sample in samples],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if short else 0


def measure(loops: Sequence[str], cores: Cores, settings: Settings) -> Iterator[Sample]:
    """Run all rounds, each kind in a fresh server; each round begins with another kind."""
    kinds = [(loop, rate) for loop in loops for rate in RATES]
    fetch = (sys.executable, str(HERE / "_fetch.py"))
    for number in range(settings.rounds):
        print(f"round {number + 1} of {settings.rounds}", file=sys.stderr)
        first = number % len(kinds)
        for loop, rate in (*kinds[first:], *kinds[:first]):
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
        milliseconds = (1000 * each(times) for each in (median, min, max))
        reached = median(sample.received for sample in cell) / median(times)
        rows.append(Row(loop, rate, *milliseconds, reached, median(ratios)))
    return rows


def line(row: Row) -> str:
    """Return a line of the table."""
    kind = f"{row.rate // MEGABYTE} MB/s" if row.rate else "unpaced"
    return LINE.format(
        f"  {row.loop:<9}{kind}",
        f"{row.median:.1f}",
        f"{row.lowest:.1f} - {row.highest:.1f}",
        f"{row.reached / MEGABYTE:.1f}",
        f"{row.reached / row.rate:.2f}" if row.rate else "",
        f"{row.times_unpaced:.1f}",
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--loop", choices=(*LOOPS, "both"), default="both")
    add("--size", type=up_to(MAX_SIZE), metavar="BYTES", help="of each transfer")
    add("--rounds", type=up_to(MAX_ROUNDS), metavar="N")
    add("--quick", action="store_true", help="everything once, to see that it works; no numbers")
    add("--json", type=Path, metavar="FILE", help="also write every sample there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
