"""Echoes on an established stream while a flood is rejected: condaccept beside `start_server`.

    python benchmarks/bench_flood.py [--loop asyncio|uvloop|both] [--quick]
        [--json FILE] [--plot FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import _cli
from _build import generator
from _contestants import GUARDS, START_SERVER, named
from _measure import in_turn
from _plot import Bar, Panel, is_ours
from _process import Cores, Usage, output, raise_descriptor_limit, serve
from _report import ratio

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from _contestants import Contestant

MAX_RATE = 100_000
MAX_MILLISECONDS = 10_000  # a server gives itself 120 seconds

HEADINGS = (
    "p50",
    "p99",
    "lowest - highest",
    "x start_server",
    "rate",
    "waiting",
    "busy",
    "disturbed",
)
LINE = "{:<30}{:>5}{:>6}{:>18}{:>16}{:>6}{:>9}{:>6}{:>11}"


class Settings(NamedTuple):
    """How much of it."""

    rounds: int
    milliseconds: int
    """For each contestant and round."""
    rate: int
    """Connections to reject, per second."""
    warm_up: int
    """Milliseconds before each measurement; what comes of it has to be right here, too."""


FULL = Settings(rounds=12, milliseconds=250, rate=8000, warm_up=30)
QUICK = Settings(rounds=1, milliseconds=50, rate=1000, warm_up=20)


class Sample(NamedTuple):
    """One contestant in one round; latencies of echoes in microseconds."""

    round: int
    loop: str
    name: str
    p50: float
    p99: float
    worst: float
    echoes: int
    rate: float
    """Connections that were reset, per second."""
    waiting: int
    """How many connections were open at once, at most."""
    disturbed: float
    """For what share of the time server or generator did not get its core, as it went to others."""
    busy: float
    """CPU time of the server process, user and system, by the wall's."""
    started: int
    wrong: int
    """Connections that did not end in a reset, or an echo that was not what was sent."""


class Row(NamedTuple):
    """One contestant: medians over the rounds."""

    loop: str
    name: str
    p50: float
    p99: float
    lowest: float
    """Of p99; and the highest."""
    highest: float
    times_start_server: float | None
    """p99 to that of `start_server` on the same loop: the median of the ratios within each
    round."""
    rate: float
    waiting: float
    busy: float
    disturbed: float


def main() -> int:
    """Measure and print; the exit status is 1 if something ended the wrong way."""
    options = parse()
    cores = Cores.choose()
    settings = _cli.amounts(options, FULL, QUICK)
    raise_descriptor_limit()

    with tempfile.TemporaryDirectory() as folder:
        language, command = generator("_flood", Path(folder))
        everybody = list(named("_serve_flood.py", GUARDS, _cli.loops(options)))
        present = [contestant for contestant in everybody if not contestant.lacks]
        samples = list(measure(present, command, cores, settings))

    rows = summarise(samples)
    print(f"echo of 64 B in µs, while {settings.rate:,} connections a second are rejected")
    print(LINE.format("", *HEADINGS))
    for row in rows:
        print(line(row))
    print()
    wrong = sum(sample.wrong for sample in samples)
    started, echoes = (sum(getattr(s, name) for s in samples) for name in ("started", "echoes"))
    result = _cli.Result(_cli.describe(cores, language), settings, everybody, rows, samples)
    verdict = f"of {started} connections and {echoes} echoes, {wrong} ended the wrong way"
    result.end(verdict, options, panels(rows, settings))
    return 1 if wrong or not all(sample.echoes for sample in samples) else 0


def measure(
    contestants: Sequence[Contestant], load: Sequence[str], cores: Cores, settings: Settings
) -> Iterator[Sample]:
    """Run all rounds, the servers of a round side by side; one that nobody calls sleeps."""
    for number, turn in in_turn(contestants, settings.rounds):
        with ExitStack() as servers:
            running = [
                (each, *servers.enter_context(serve(each.command, cores.server, urgent=True)))
                for each in turn
            ]
            for contestant, pid, port in running:
                asked = (*load, str(port), str(settings.rate))
                warm_up = output((*asked, str(settings.warm_up)), cores.load, urgent=True).split()
                before = Usage.of(pid)
                printed = output((*asked, str(settings.milliseconds)), cores.load, urgent=True)
                after = Usage.of(pid)
                started, reset, wrong, most, took, waited, echoes, bad, p50, p99, worst = map(
                    int, printed.split()
                )
                took = max(took, 1)
                yield Sample(
                    round=number,
                    loop=contestant.loop,
                    name=contestant.name,
                    p50=p50 / 1000,
                    p99=p99 / 1000,
                    worst=worst / 1000,
                    echoes=echoes,
                    rate=reset / took * 1e9,
                    waiting=most,
                    disturbed=(waited + after.waited_ns - before.waited_ns) / took,
                    busy=(after.cpu_ns - before.cpu_ns) / took,
                    started=started,
                    wrong=wrong + bad + int(warm_up[2]) + int(warm_up[7]),
                )


def summarise(samples: Sequence[Sample]) -> list[Row]:
    """Boil the rounds down to one row per contestant."""
    cells: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda each: each.round):
        cells[sample.loop, sample.name].append(sample)
    tails = {key: [sample.p99 for sample in cell] for key, cell in cells.items()}
    return [
        Row(
            *(loop, name),
            median(sample.p50 for sample in cells[loop, name]),
            *(median(tail), min(tail), max(tail)),
            ratio(tail, tails.get((loop, START_SERVER))),
            *(
                median(getattr(sample, each) for sample in cells[loop, name])
                for each in ("rate", "waiting", "busy", "disturbed")
            ),
        )
        for (loop, name), tail in tails.items()
    ]


def line(row: Row) -> str:
    """Return a line of the table."""
    return LINE.format(
        f"  {row.loop:<9}{row.name}",
        f"{row.p50:.0f}",
        f"{row.p99:.0f}",
        f"{row.lowest:.0f} - {row.highest:.0f}",
        "" if row.times_start_server is None else f"{row.times_start_server:.2f}",
        f"{row.rate:.0f}",
        f"{row.waiting:.0f}",
        f"{row.busy:.0%}",
        f"{row.disturbed:.1%}",
    )


def panels(rows: Sequence[Row], settings: Settings) -> Sequence[Panel]:
    """Return the picture."""
    bars = [
        Bar(row.loop, row.name, row.p99, row.lowest, row.highest, is_ours(row.name)) for row in rows
    ]
    title = f"echo of 64 B while {settings.rate:,} connections a second are rejected"
    return [Panel(title, "p99 of the echo, µs", bars, "{:,.0f}")]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = _cli.parser(__doc__)
    add = parser.add_argument
    add("--milliseconds", type=_cli.up_to(MAX_MILLISECONDS), metavar="N", help="per measurement")
    add("--rate", type=_cli.up_to(MAX_RATE), metavar="N", help="connections to reject, per second")
    return parser.parse_args()


if __name__ == "__main__":
    _cli.run(main)
