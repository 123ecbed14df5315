"""Server CPU time per connection: condaccept beside a C loop and `asyncio.start_server`.

    python benchmarks/bench_accept.py [--loop asyncio|uvloop|both] [--quick] [--json FILE]

README.md in this folder says what is measured, and what isn't.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from _build import compile_c
from _contestants import HERE, contestants
from _measure import Load, Settings, measure
from _process import Cores
from _report import summarise, tables

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPS = ("asyncio", "uvloop")
FULL = Settings(rounds=9, connections=5000, bursts=(1, 64), warm_up=500)
QUICK = Settings(rounds=1, connections=128, bursts=(1, 64), warm_up=64)
# What a child can do in the 120 seconds that it gives itself, and what _load.c has room for.
MAX_CONNECTIONS, MAX_BURST, MAX_ROUNDS = 100_000, 512, 100


def main() -> int:
    """Measure and print; the exit status is 1 if a connection ended the wrong way."""
    options = parse()
    if sys.platform != "linux":
        print("This benchmark reads the CPU time of another process, the Linux way.")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the children
    cores = Cores.choose()
    loops = LOOPS if options.loop == "both" else (options.loop,)
    settings = chosen(options)

    with tempfile.TemporaryDirectory() as folder:
        generator = compile_c("_load", Path(folder))
        everybody = list(contestants(loops, compile_c("_floor", Path(folder))))
        present = [contestant for contestant in everybody if not contestant.lacks]
        command = (str(generator),) if generator else (sys.executable, str(HERE / "_load.py"))
        samples = list(measure(present, Load(command, cores.load), cores, settings))

    rows = summarise(samples)
    machine = describe(cores, "C" if generator else "Python")
    left_out = {f"{c.loop} {c.name}".strip(): c.lacks for c in everybody if c.lacks}
    errors = sum(sample.errors for sample in samples)

    for line in tables(rows):
        print(line)
    for name, lacks in left_out.items():
        print(f"left out: {name}; it needs {lacks}")
    print(f"{errors} of {len(samples) * settings.connections} connections ended the wrong way")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json:
        report = {
            "machine": machine,
            "settings": settings._asdict(),
            "left_out": left_out,
            "rows": [row._asdict() for row in rows],
            "samples": [sample._asdict() for sample in samples],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if errors else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--loop", choices=(*LOOPS, "both"), default="both")
    add("--connections", type=up_to(MAX_CONNECTIONS), metavar="N", help="per measurement")
    add("--rounds", type=up_to(MAX_ROUNDS), metavar="N")
    add("--bursts", type=bursts, metavar="N,N", help="connections at a time; default 1,64")
    add("--quick", action="store_true", help="everything once, to see that it works; no numbers")
    add("--json", type=Path, metavar="FILE", help="also write every sample there")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> Settings:
    """Return the default amounts, or the quick ones, with what the command line says instead."""
    said = {name: getattr(options, name) for name in ("rounds", "connections", "bursts")}
    amounts = QUICK if options.quick else FULL
    return amounts._replace(**{name: value for name, value in said.items() if value})


def up_to(limit: int) -> Callable[[str], int]:
    """Return an argument type: a number from 1 to *limit*."""

    def number(text: str) -> int:
        value = int(text)
        if not 1 <= value <= limit:
            raise argparse.ArgumentTypeError(f"not from 1 to {limit}: {value}")
        return value

    return number


def bursts(text: str) -> tuple[int, ...]:
    """Return the burst sizes in a list such as ``1,64``."""
    return tuple(map(up_to(MAX_BURST), text.split(",")))


def describe(cores: Cores, generator: str) -> dict[str, object]:
    """Return what anybody has to know who reads the numbers elsewhere."""
    return {
        "CPUs": os.cpu_count(),
        platform.system(): platform.release(),
        platform.python_implementation(): platform.python_version(),
        **{name: version(name) for name in ("uvloop", "condaccept")},
        "server on core": cores.server,
        f"load ({generator}) on core": cores.load,
    }


def version(distribution: str) -> str:
    """Return the installed version."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
