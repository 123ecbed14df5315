"""The goals, and what of them a run has reached: computed from what the scripts wrote as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from _contestants import LISTENERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Report = Mapping[str, Any]
    """What a script writes: `_cli.Result`."""

BURST = 64
SERVE = LISTENERS["serve"]
OTHERS = tuple(name for name in LISTENERS.values() if name != SERVE)
CROWD = 10_000


class Goal(NamedTuple):
    """A number to come to on a loop."""

    what: str
    loop: str
    limit: float
    reached: float | None
    """None if that was not measured."""
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        if self.reached is None:
            return False
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit


def goals(reports: Mapping[str, Report]) -> Iterator[Goal]:
    """Yield all goals; *reports* has the report of each script by its name."""
    for loop in ("asyncio", "uvloop"):
        yield from _accepting(reports["accept"]["rows"], loop)
        yield from _echoing(reports["stream"]["rows"], loop)
        yield from _deferring(reports["defer"], loop)
        p99 = _all(reports["flood"]["rows"], "times_start_server", loop=loop, name=SERVE)
        what = "p99 of an echo while 8,000 connections a second are rejected, to `start_server`"
        yield Goal(what, loop, 0.5, _least(p99))


def _accepting(rows: Sequence[Report], loop: str) -> Iterator[Goal]:
    def least(ratio: str, job: str, *names: str) -> float | None:
        return _least(
            value
            for name in names
            for value in _all(rows, ratio, job=job, burst=BURST, loop=loop, name=name)
        )

    uvloop = loop == "uvloop"
    reject = "`serve()` and reject, to "
    served = "5 bytes, close, to `start_server`"
    start_server = "times_start_server"
    yield Goal(f"{reject}the C loop", loop, 1.25, least("times_c_loop", "reject", SERVE))
    yield Goal(f"{reject}HAProxy", loop, 1.10, least("times_haproxy", "reject", SERVE))
    limit = 0.35 if uvloop else 0.22
    yield Goal(f"{reject}`start_server`", loop, limit, least(start_server, "reject", SERVE))
    limit = 0.50 if uvloop else 0.28
    what = f"`accept()` or `streams()`, {served}"
    yield Goal(what, loop, limit, least(start_server, "accept", *OTHERS))
    limit = 0.65 if uvloop else 0.35
    yield Goal(f"`serve()`, {served}", loop, limit, least(start_server, "accept", SERVE))


def _echoing(rows: Sequence[Report], loop: str) -> Iterator[Goal]:
    small = 1.05 if loop == "uvloop" else 1.5
    for job, title, limit in (
        ([64, 32, False], "64 B on 32 connections", small),
        ([61440, 1, False], "60 KB on 1 connection", 1.0),
        ([61440, 8, False], "60 KB on 8 connections", 1.0),
    ):
        found = [
            row["times_streams"]
            for row in rows
            if (row["job"], row["loop"]) == (job, loop) and row["name"].startswith("condaccept")
        ]
        what = f"echoes per second, {title}, to asyncio's streams"
        yield Goal(what, loop, limit, max(found, default=None), at_least=True)


def _deferring(report: Report, loop: str) -> Iterator[Goal]:
    kept = [
        sample["values"]["once"]
        for sample in report["samples"]
        if (sample["loop"], sample["size"], sample["kind"]) == (loop, CROWD, "plain")
    ]
    woken = _all(report["rows"], "times_first", loop=loop, size=CROWD, what="reconsider")
    yield Goal(f"memory of each of {CROWD:,} deferred", loop, 700, _least(kept), unit="B")
    yield Goal(f"waking one of {CROWD:,} by `reconsider()`, to one of 10", loop, 1.3, _least(woken))


def _all(rows: Sequence[Report], field: str, **wanted: object) -> Iterator[float]:
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()) and row[field] is not None:
            yield row[field]


def _least(values: Iterator[float] | Sequence[float]) -> float | None:
    return min(values, default=None)
