"""Echoes per second and their latency: a condaccept stream beside asyncio's streams and protocols.

    python benchmarks/bench_stream.py [--loop asyncio|uvloop|both] [--quick]
        [--json FILE] [--plot FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import _cli
from _build import generator
from _contestants import ECHOERS, named
from _echoes import Settings, measure, panels, summarise, tables
from _process import Cores

if TYPE_CHECKING:
    import argparse

FULL = Settings(rounds=7, milliseconds=300, warm_up=50)
QUICK = Settings(rounds=1, milliseconds=20, warm_up=5)
MAX_MILLISECONDS = 10_000  # a server gives itself 120 seconds for all that a round asks of it


def main() -> int:
    """Measure and print; the exit status is 1 if an echo came back wrong or short."""
    options = parse()
    cores = Cores.choose()
    settings = _cli.amounts(options, FULL, QUICK)

    with tempfile.TemporaryDirectory() as folder:
        language, command = generator("_echo_load", Path(folder))
        everybody = list(named("_serve_echo.py", ECHOERS, _cli.loops(options)))
        present = [contestant for contestant in everybody if not contestant.lacks]
        samples = list(measure(present, command, cores, settings))

    rows = summarise(samples)
    for line in tables(rows):
        print(line)
    wrong = sum(sample.wrong for sample in samples)
    total = sum(sample.requests for sample in samples)
    machine = _cli.describe(cores, language)
    result = _cli.Result(machine, settings, everybody, rows, samples)
    result.end(
        f"{total} echoes were right, and {wrong} connections went wrong",
        options,
        list(panels(rows)),
    )
    return 1 if wrong or not all(sample.requests for sample in samples) else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = _cli.parser(__doc__)
    milliseconds = _cli.up_to(MAX_MILLISECONDS)
    parser.add_argument("--milliseconds", type=milliseconds, metavar="N", help="per measurement")
    return parser.parse_args()


if __name__ == "__main__":
    _cli.run(main)
