"""From samples to tables: medians, spread and ratios."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, overload

from _contestants import C_LOOP, HAPROXY, START_SERVER
from _plot import Bar, Panel, is_ours

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from _measure import Sample

TITLES = {
    "reject": "reject: accept, then reset",
    "accept": "accept: accept, write 5 bytes, close",
}
UNIT = "CPU time of the server, user + system, in µs per connection"
SHORT_UNIT = "CPU time of the server, µs per connection"
HEADINGS = (
    "median",
    "lowest - highest",
    "sleeps",
    "per second",
    "x C loop",
    f"x {START_SERVER}",
    f"x {HAPROXY}",
)
LINE = "{:<41}{:>7}{:>17}{:>8}{:>12}{:>10}{:>16}{:>11}"


class Row(NamedTuple):
    """One contestant in one table; times in microseconds of CPU per connection."""

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
    times_c_loop: float | None
    """Median of the ratios within each round, which a slow or fast minute can't shift."""
    times_start_server: float | None
    """The same, to `start_server` on the same loop."""
    times_haproxy: float | None
    """The same, to HAProxy, where it does that job."""


def summarise(samples: Iterable[Sample]) -> list[Row]:
    """Boil the rounds down to one row per contestant, job and burst."""
    cells: dict[tuple[str, int, str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        cells[sample.job, sample.burst, sample.loop, sample.name].append(sample)
    costs = {key: [sample.cpu_us for sample in cell] for key, cell in cells.items()}
    return [
        Row(
            *(job, burst, loop, name),
            *(median(cost), min(cost), max(cost)),
            median(sample.sleeps for sample in cells[job, burst, loop, name]),
            median(sample.rate for sample in cells[job, burst, loop, name]),
            ratio(cost, costs.get((job, burst, "", C_LOOP))),
            ratio(cost, costs.get((job, burst, loop, START_SERVER))),
            ratio(cost, costs.get((job, burst, "", HAPROXY))),
        )
        for (job, burst, loop, name), cost in costs.items()
    ]


@overload
def ratio(cost: Sequence[float], baseline: Sequence[float]) -> float: ...
@overload
def ratio(cost: Sequence[float], baseline: Sequence[float] | None) -> float | None: ...
def ratio(cost: Sequence[float], baseline: Sequence[float] | None) -> float | None:
    """Return the median of the ratios within each round; None without a baseline."""
    if baseline is None:
        return None
    return median(ours / theirs for ours, theirs in zip(cost, baseline, strict=True))


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of one table per job."""
    for job, title in TITLES.items():
        yield f"{title}\n{UNIT}"
        beside_haproxy = any(row.job == job and row.times_haproxy is not None for row in rows)
        headings = (*HEADINGS[:-1], HEADINGS[-1] if beside_haproxy else "")
        for burst in dict.fromkeys(row.burst for row in rows):
            yield LINE.format(at_a_time(burst), *headings).rstrip()
            yield from (_line(row) for row in rows if (row.job, row.burst) == (job, burst))
        yield ""


def at_a_time(burst: int) -> str:
    """Return what a table says of its bursts."""
    return "one by one" if burst == 1 else f"bursts of {burst}"


def panels(rows: Sequence[Row]) -> Iterator[Panel]:
    """Yield a picture per job and burst."""
    for job, title in TITLES.items():
        for burst in dict.fromkeys(row.burst for row in rows):
            bars = [
                Bar(row.loop, row.name, row.median, row.lowest, row.highest, is_ours(row.name))
                for row in rows
                if (row.job, row.burst) == (job, burst)
            ]
            yield Panel(f"{title}; {at_a_time(burst)}", SHORT_UNIT, bars)


def _line(row: Row) -> str:
    ratios = (row.times_c_loop, row.times_start_server, row.times_haproxy)
    return LINE.format(
        f"  {row.loop:<9}{row.name}" if row.loop else f"  {row.name}",
        f"{row.median:.1f}",
        f"{row.lowest:.1f} - {row.highest:.1f}",
        f"{row.sleeps:.2f}",
        f"{row.rate:,.0f}",
        *("" if each is None else f"{each:.2f}" for each in ratios),
    ).rstrip()
