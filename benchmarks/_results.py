"""RESULTS.md: what a whole run of the benchmarks has found, as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from _goals import goals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from _goals import Goal, Report

INTRODUCTION = """\
# Results

Written by `make bench`, which rewrites it; nothing here is typed by hand.
[README.md](README.md) says what was measured and how, and how to read it.
"""


class Run(NamedTuple):
    """One script."""

    command: str
    """As somebody types it."""
    printed: str
    report: Report


def document(date: str, machine: Mapping[str, object], runs: Mapping[str, Run]) -> str:
    """Return the text of RESULTS.md; *runs* has each script by its name, in this order."""
    text = "\n".join(_lines(date, machine, runs))
    return "\n".join(line.rstrip() for line in text.split("\n"))


def _lines(date: str, machine: Mapping[str, object], runs: Mapping[str, Run]) -> Iterator[str]:
    yield INTRODUCTION
    yield "| | |\n| --- | --- |"
    yield f"| date | {date} |"
    for name, value in machine.items():
        yield f"| {name} | {value} |"
    yield "\n## The goals\n"
    yield (
        "Computed from this run. A ratio is the median of those within each round;"
        " what concerns accepting is in bursts of 64.\n"
    )
    yield from _table(list(goals({name: run.report for name, run in runs.items()})))
    for name, run in runs.items():
        yield f"\n## `bench_{name}.py`\n"
        yield f"```console\n$ {run.command}\n{run.printed.rstrip()}\n```\n"
        yield f"![bench_{name}.py](results/{name}.svg)"
    yield ""


def _table(goals: Sequence[Goal]) -> Iterator[str]:
    yield "| | loop | goal | this run | reached |"
    yield "| --- | --- | --- | --- | --- |"
    order = list(dict.fromkeys(goal.what for goal in goals))  # both loops, one below the other
    for goal in sorted(goals, key=lambda goal: order.index(goal.what)):
        sign = "≥" if goal.at_least else "≤"
        if goal.reached is None:
            reached, met = "not measured", ""
        else:
            reached, met = _number(goal, goal.reached), "yes" if goal.met else "no"
        limit = _number(goal, goal.limit)
        yield f"| {goal.what} | {goal.loop} | {sign} {limit} | {reached} | {met} |"


def _number(goal: Goal, value: float) -> str:
    return f"{value:,.0f} {goal.unit}" if goal.unit else f"{value:.2f}"
