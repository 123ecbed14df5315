"""What deferred connections cost under `serve()`: memory, offers, wake-ups, for 10 to 15,000.

    python benchmarks/bench_defer.py [--loop asyncio|uvloop|both] [--quick]
        [--json FILE] [--plot FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import _cli
from _contestants import HERE
from _measure import in_turn
from _plot import Bar, Panel
from _process import Cores, output, raise_descriptor_limit, serve
from _report import SHORT_UNIT, ratio

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

KINDS = {"plain": "DEFER", "bytes": "until_bytes", "long": "after"}
"""What `_serve_defer.py` takes, and the name in the table."""
WAYS = {
    "first": "taken, offered, deferred",
    "offer": "offered again, all in a row",
    "reconsider": "woken by reconsider()",
    "data": "woken by until_bytes",
    "after": "woken by after",
}
"""What `_defer_load.py` prints, and the name in the table."""
SPARE = 100  # descriptors that a process has besides its connections
MAX_WAKE_UPS = 50_000  # what a child can do in the 120 seconds that it gives itself
MAX_SIZE = 25_000  # one port of 127.0.0.1 has some 28,000 for its callers

MEMORY_LINE = "{:<30}{:>9}{:>10}{:>10}"
LINE = "{:<40}{:>9}{:>19}{:>9}"


class Settings(NamedTuple):
    """How much of it."""

    rounds: int
    wake_ups: int
    """For each way, loop, number of connections and round."""
    sizes: tuple[int, ...]
    """How many are deferred. Ratios are to the first."""


FULL = Settings(rounds=3, wake_ups=2000, sizes=(10, 1000, 10_000, 15_000))
QUICK = Settings(rounds=1, wake_ups=20, sizes=(10, 200))


class Sample(NamedTuple):
    """One server: of wake-ups in microseconds of CPU time each, or of memory in bytes."""

    round: int
    loop: str
    size: int
    kind: str
    """How they were deferred, where memory was asked for."""
    values: dict[str, float]
    """Per connection, or per wake-up."""
    wrong: int
    """Connections that were not deferred, open and silent at the end."""


class Row(NamedTuple):
    """One line of a table."""

    loop: str
    size: int
    what: str
    median: float
    lowest: float
    highest: float
    times_first: float
    """To the smallest number of connections: the median of the ratios within each round."""


def main() -> int:
    """Measure and print; the exit status is 1 if a connection did not stay deferred."""
    options = parse()
    cores = Cores.choose()
    settings = _cli.amounts(options, FULL, QUICK)
    limit = raise_descriptor_limit()
    fitting = tuple(size for size in settings.sizes if size + SPARE <= limit)
    for size in set(settings.sizes) - set(fitting):
        print(f"left out: {size:,} connections, since RLIMIT_NOFILE is {limit:,}")
    settings = settings._replace(sizes=fitting)

    loops = _cli.loops(options)
    kept = list(memory(loops, cores, settings))
    spent = list(wake_ups(loops, cores, settings))
    rows = summarise(spent)
    for line in (*memory_table(kept, spent), "", *table(rows, loops, settings)):
        print(line)
    samples = [*kept, *spent]
    wrong = sum(sample.wrong for sample in samples)
    result = _cli.Result(_cli.describe(cores, "Python"), settings, (), rows, samples)
    total = sum(sample.size for sample in samples)
    result.end(
        f"{wrong} of {total} connections did not stay deferred to the end",
        options,
        list(panels(kept, rows)),
    )
    return 1 if wrong or not samples else 0


def memory(loops: Sequence[str], cores: Cores, settings: Settings) -> Iterator[Sample]:
    """Count what each takes, once: it is the same each time."""
    for loop, size, kind in product(loops, settings.sizes, KINDS):
        yield one(0, loop, size, kind, cores)


def wake_ups(loops: Sequence[str], cores: Cores, settings: Settings) -> Iterator[Sample]:
    """Run all rounds, each number of connections with a fresh server."""
    everybody = list(product(loops, settings.sizes))
    for number, turn in in_turn(everybody, settings.rounds):
        for loop, size in turn:
            yield one(number, loop, size, settings.wake_ups, cores)


def one(number: int, loop: str, size: int, how: str | int, cores: Cores) -> Sample:
    """Measure one server: so many wake-ups of each way, or the memory of that kind."""
    kind, count = (how, 0) if isinstance(how, str) else ("plain", how)
    server = (sys.executable, str(HERE / "_serve_defer.py"), loop, str(size), kind)
    load = (sys.executable, str(HERE / "_defer_load.py"))
    with serve((*server, "no" if count else "trace"), cores.server) as (_pid, port):
        printed = json.loads(output((*load, *map(str, (port, size, count))), cores.load))
    wrong = printed.pop("wrong")
    values = {
        name: value / 1000 if name in WAYS else value  # ns to µs
        for name, value in printed.items()
    }
    return Sample(number, loop, size, "" if count else kind, values, wrong)


def summarise(samples: Sequence[Sample]) -> list[Row]:
    """Boil the rounds down to one row per way, loop and number of connections."""
    cells: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for sample in sorted(samples, key=lambda each: (each.round, each.size)):
        for way in WAYS:
            cells[sample.loop, way, sample.size].append(sample.values[way])
    rows = []
    for (loop, way, size), cell in cells.items():
        smallest = cells[loop, way, min(sample.size for sample in samples)]
        rows.append(Row(loop, size, way, median(cell), min(cell), max(cell), ratio(cell, smallest)))
    return rows


def memory_table(kept: Sequence[Sample], spent: Sequence[Sample]) -> Iterator[str]:
    """Yield the lines about memory."""
    yield "memory of the server's Python side, in bytes per deferred connection"
    yield MEMORY_LINE.format("", "once", "again", "resident")
    for sample in kept:
        resident = median(
            other.values["resident"]
            for other in spent
            if (other.loop, other.size) == (sample.loop, sample.size)
        )
        yield MEMORY_LINE.format(
            f"  {sample.loop:<9}{sample.size:>6,}  {KINDS[sample.kind]}",
            f"{sample.values['once']:.0f}",
            f"{sample.values['again']:.0f}",
            f"{resident:.0f}" if sample.kind == "plain" and sample.size >= 1000 else "",  # noqa: PLR2004  # pages
        )


def table(rows: Sequence[Row], loops: Sequence[str], settings: Settings) -> Iterator[str]:
    """Yield the lines about CPU time."""
    yield "CPU time of the server, user + system, in µs per connection"
    smallest = f"x {settings.sizes[0]:,}" if settings.sizes else ""
    for way, title in WAYS.items():
        yield LINE.format(title, "median", "lowest - highest", smallest)
        for loop in loops:
            for row in rows:
                if (row.loop, row.what) == (loop, way):
                    yield LINE.format(
                        f"  {row.loop:<9}{row.size:>6,} deferred",
                        f"{row.median:.1f}",
                        f"{row.lowest:.1f} - {row.highest:.1f}",
                        f"{row.times_first:.2f}",
                    )
    yield ""


def panels(kept: Sequence[Sample], rows: Sequence[Row]) -> Iterator[Panel]:
    """Yield a picture of the memory per kind, and one per way."""
    for kind, title in KINDS.items():
        bars = []
        for sample in kept:
            if sample.kind == kind:
                once = sample.values["once"]
                bars.append(Bar(sample.loop, f"{sample.size:,} deferred", once, once, once))
        unit = "bytes of the Python side, per connection"
        yield Panel(f"memory, deferred once: {title}", unit, bars, "{:,.0f}")
    for way, title in WAYS.items():
        bars = [
            Bar(row.loop, f"{row.size:,} deferred", row.median, row.lowest, row.highest)
            for row in sorted(rows, key=lambda each: (each.loop, each.size))
            if row.what == way
        ]
        yield Panel(title, SHORT_UNIT, bars)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = _cli.parser(__doc__)
    add = parser.add_argument
    add("--wake-ups", type=_cli.up_to(MAX_WAKE_UPS), metavar="N", help="per measurement")
    sizes = _cli.some_up_to(MAX_SIZE)
    add(
        "--sizes",
        type=sizes,
        metavar="N,N",
        help="deferred connections; default 10,1000,10000,15000",
    )
    return parser.parse_args()


if __name__ == "__main__":
    _cli.run(main)
