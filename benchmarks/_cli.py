"""What the scripts have in common: options, the machine, how they end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import _plot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _contestants import Contestant
    from _process import Cores

LOOPS = ("asyncio", "uvloop")
MAX_ROUNDS = 100
# What a child can do in the 120 seconds that it gives itself, and what _load.c has room for.
MAX_CONNECTIONS, MAX_BURST = 100_000, 512


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return what reads the options that every script has."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    add = parser.add_argument
    add("--loop", choices=(*LOOPS, "both"), default="both")
    add("--rounds", type=up_to(MAX_ROUNDS), metavar="N")
    add("--quick", action="store_true", help="everything once, to see that it works; no numbers")
    add("--json", type=Path, metavar="FILE", help="also write every sample there")
    add("--plot", type=_plot.target, metavar="FILE", help="also draw the tables: .svg or .png")
    return parser


def accepting(doc: str | None) -> argparse.ArgumentParser:
    """Return the same, for scripts that measure what accepting costs."""
    accepting = parser(doc)
    add = accepting.add_argument
    add("--connections", type=up_to(MAX_CONNECTIONS), metavar="N", help="per measurement")
    bursts = some_up_to(MAX_BURST)
    add("--bursts", type=bursts, metavar="N,N", help="connections at a time; default 1,64")
    return accepting


def loops(options: argparse.Namespace) -> Sequence[str]:
    """Return the loops asked for."""
    return LOOPS if options.loop == "both" else (options.loop,)


def amounts(options: argparse.Namespace, full: Any, quick: Any) -> Any:
    """Return the default amounts, or the quick ones, with what the command line says instead."""
    chosen = quick if options.quick else full
    said = {name: getattr(options, name, None) for name in chosen._fields}
    return chosen._replace(**{name: value for name, value in said.items() if value})


def up_to(limit: int) -> Callable[[str], int]:
    """Return an argument type: a number from 1 to *limit*."""

    def number(text: str) -> int:
        value = int(text)
        if not 1 <= value <= limit:
            raise argparse.ArgumentTypeError(f"not from 1 to {limit}: {value}")
        return value

    return number


def some_up_to(limit: int) -> Callable[[str], tuple[int, ...]]:
    """Return an argument type: numbers such as ``1,64``, each from 1 to *limit*."""
    return lambda text: tuple(map(up_to(limit), text.split(",")))


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


class Result(NamedTuple):
    """What a script has found out."""

    machine: dict[str, object]
    settings: Any
    everybody: Sequence[Contestant]
    rows: Sequence[Any]
    samples: Sequence[Any]

    def left_out(self) -> dict[str, str]:
        """Return who could not run here, and what for."""
        return {f"{c.loop} {c.name}".strip(): c.lacks for c in self.everybody if c.lacks}

    def end(self, verdict: str, options: argparse.Namespace, panels: Sequence[_plot.Panel]) -> None:
        """Print what stands under every table, and write and draw what was asked for."""
        for name, lacks in self.left_out().items():
            print(f"left out: {name}; it needs {lacks}")
        print(verdict)
        print(", ".join(f"{name} {value}" for name, value in self.machine.items()))
        if options.plot:
            _plot.draw(options.plot, panels)
        if options.json:
            report = {
                "machine": self.machine,
                "settings": self.settings._asdict(),
                "left_out": self.left_out(),
                "rows": [row._asdict() for row in self.rows],
                "samples": [sample._asdict() for sample in self.samples],
            }
            options.json.write_text(json.dumps(report, indent=1) + "\n")


def run(main: Callable[[], int]) -> None:
    """Run *main* and exit with what it returns, the children ended in any case."""
    if sys.platform != "linux":
        print("This benchmark reads the CPU time of another process, the Linux way.")
        sys.exit(2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the children
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
