"""Pictures of the tables: horizontal bars at the median, with lines from lowest to highest.

matplotlib is imported only when a picture is asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

OURS, OTHERS, INK = "#2f6db5", "#b9bfc7", "#333333"
COLUMNS = 2
WIDTH, BAR, FRAME = 6.4, 0.235, 1.1
"""Inches: of a panel, of a line in it, and of what stands above and below its lines."""
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: a tenth of the size, and diffs can be read
    "svg.hashsalt": "condaccept",  # the same numbers make the same file
}


class Bar(NamedTuple):
    """One line of a table."""

    group: str
    """The loop, mostly; those of a group stand together under its name."""
    name: str
    median: float
    lowest: float
    highest: float
    ours: bool = True
    """Whether it is condaccept's, where others stand beside it."""


class Panel(NamedTuple):
    """One table."""

    title: str
    unit: str
    bars: Sequence[Bar]
    form: str = "{:,.1f}"
    """How the median is written beside its bar."""


def target(text: str) -> Path:
    """Return the file that a picture goes to: the type of an argument.

    Raises:
        argparse.ArgumentTypeError: It can't be drawn, and why.
    """
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"neither .svg nor .png: {text}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "it takes matplotlib, which is not installed: pip install matplotlib,"
            " or pip install --editable '.[plot]'"
        )
    return path


def is_ours(name: str) -> bool:
    """Whether that name of a table is condaccept's."""
    return name.startswith("condaccept")


def draw(file: Path, panels: Sequence[Panel]) -> None:
    """Draw *panels* into *file*, two side by side."""
    import matplotlib as mpl  # noqa: PLC0415  # optional
    from matplotlib.figure import Figure  # noqa: PLC0415  # not pyplot: no window, no state
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415  # optional

    columns = min(COLUMNS, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    lines = [max(map(_lines, row)) for row in rows]
    heights = [FRAME + BAR * each for each in lines]
    with mpl.rc_context(SETTINGS):
        layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)  # inches
        figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.3), layout=layout)
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for number, panel in enumerate(panels):
            _panel(grid.flat[number], panel, lines[number // columns])
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        figure.supxlabel(
            "bar: median of the rounds; line: lowest to highest", fontsize="small", color=INK
        )
        metadata = {"Date": None, "Creator": None} if file.suffix == ".svg" else None
        figure.savefig(file, metadata=metadata, dpi=110)


def _lines(panel: Panel) -> int:
    return len(panel.bars) + sum(bool(group) for group in {bar.group for bar in panel.bars})


def _panel(axes: Axes, panel: Panel, lines: int) -> None:
    at = 0
    marks: list[tuple[int, str]] = []
    headings: list[int] = []
    group = ""
    widest = max((bar.highest for bar in panel.bars), default=0) or 1
    for bar in panel.bars:
        if bar.group != group:
            group = bar.group
            headings.append(len(marks))
            marks.append((at, group))
            at += 1
        axes.barh(at, bar.median, height=0.72, color=OURS if bar.ours else OTHERS)
        if bar.highest > bar.lowest:
            axes.plot([bar.lowest, bar.highest], [at, at], color=INK, linewidth=1.1)
        axes.annotate(
            panel.form.format(bar.median),
            (bar.highest, at),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize="small",
            color=INK,
        )
        marks.append((at, bar.name))
        at += 1
    axes.set_yticks([place for place, _ in marks], [name for _, name in marks])
    labels = axes.get_yticklabels()
    for number in headings:
        labels[number].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(lines - 0.4, -0.6)  # bars as thick as those beside them
    axes.set_xlim(0, widest * 1.12)
    axes.set_title(panel.title, loc="left", fontsize="medium", fontweight="bold")
    axes.set_xlabel(panel.unit)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
