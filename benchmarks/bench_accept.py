"""Server CPU time per connection: condaccept beside a C loop, HAProxy, nginx and asyncio.

    python benchmarks/bench_accept.py [--loop asyncio|uvloop|both] [--quick]
        [--json FILE] [--plot FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import _cli
import _proxies
from _build import compile_c, generator
from _contestants import contestants
from _measure import Load, Settings, measure
from _process import Cores
from _report import panels, summarise, tables

FULL = Settings(rounds=9, connections=5000, bursts=(1, 64), warm_up=500)
QUICK = Settings(rounds=1, connections=128, bursts=(1, 64), warm_up=64)


def main() -> int:
    """Measure and print; the exit status is 1 if a connection ended the wrong way."""
    options = _cli.accepting(__doc__).parse_args()
    cores = Cores.choose()
    settings = _cli.amounts(options, FULL, QUICK)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        language, command = generator("_load", folder)
        everybody = list(contestants(_cli.loops(options), compile_c("_floor", folder)))
        present = [contestant for contestant in everybody if not contestant.lacks]
        samples = list(measure(present, Load(command, cores.load), cores, settings))

    rows = summarise(samples)
    for line in tables(rows):
        print(line)
    errors = sum(sample.errors for sample in samples)
    total = len(samples) * settings.connections
    machine = _cli.describe(cores, language) | _proxies.versions()
    result = _cli.Result(machine, settings, everybody, rows, samples)
    result.end(f"{errors} of {total} connections ended the wrong way", options, list(panels(rows)))
    return 1 if errors else 0


if __name__ == "__main__":
    _cli.run(main)
