"""The forest plot: each row's difference from the control with its interval, its verdict, its time.

The intervals are those that verdicts are read off: they hold together over a model's mechanisms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.transforms import blended_transform_factory

from ..compare.disturbance import STAR
from ..compare.verdicts import kind
from ..recipe.names import is_attention
from ..statistics import MARGIN
from .chart_data import Group
from .html_tables import row_id
from .style import VERDICT, figure
from .tables import Standing
from .text import PERCENT, title

HEADING = "The answer at a glance"
CONTROLS = "Controls: no attention"


@dataclass(frozen=True)
class Row:
    """Of the plot; differences in points, times as ratios to the control's."""

    key: str
    name: str
    control: bool  # a row that is no attention
    test: float | None  # per cent
    difference: float | None
    low: float | None
    high: float | None
    kind: str  # of verdicts.KINDS, or "" where there is none
    verdict: str  # in words
    time: float | None
    time_low: float | None
    time_high: float | None
    disturbed: bool
    link: str  # the row's place in report.html

    @property
    def words(self) -> str:
        """+1.9 [+1.3, +2.5]"""
        if self.difference is None:
            return ""
        ends = "" if self.low is None else f" [{self.low:+z.1f}, {self.high:+z.1f}]"
        return f"{self.difference:+z.1f}{ends}"


def rows(entries: list[Standing]) -> list[Row]:
    """Attentions, then controls, the largest difference first; only those that can be compared."""
    found = [_row(e) for e in entries if e.points is not None]
    return sorted(found, key=lambda row: (row.control, -row.difference))


def _row(entry: Standing) -> Row:
    found, ratio = entry.verdict, entry.ratio
    low, high = found.difference_low, found.difference_high
    known = ratio is not None and ratio.low is not None
    return Row(
        key=entry.attention,
        name=title(entry.attention),
        control=not is_attention(entry.attention),
        test=100 * entry.test.value,
        difference=100 * entry.points.value,
        low=None if low is None else 100 * low,
        high=None if high is None else 100 * high,
        kind=kind(found.verdict),
        verdict=found.verdict,
        time=ratio and ratio.value,
        time_low=ratio.low if known else None,
        time_high=ratio.high if known else None,
        disturbed=ratio is not None and ratio.disturbed,
        link=row_id(entry.model, title(entry.attention)),
    )


def note(found: list[Row]) -> str:
    """What the plot shows."""
    text = "Difference from the control in points of test accuracy"
    if any(row.low is not None for row in found):
        text += (
            f", with intervals of {PERCENT} that hold together over all mechanisms of the model. "
            f"The line at 0 is no difference; the band of ±{100 * MARGIN:g} points is what counts "
            "as equivalent. Better: the whole interval lies right of 0; worse: left of it; "
            "equivalent: within the band; undecided: none of these."
        )
    else:
        text += (
            ", without intervals: these take two seeds, and a verdict takes an interval. The line "
            f"at 0 is no difference; the band of ±{100 * MARGIN:g} points is what will count as "
            "equivalent."
        )
    timed = [row for row in found if row.time is not None]
    if timed:
        text += " Time: training time over the control's"
        several = any(row.time_low is not None for row in timed)
        text += ", the median of seeds with the least and the largest." if several else "."
    return text + f" {STAR}" * any(row.disturbed for row in timed)


def extent(found: list[Row]) -> tuple[float, float]:
    """Of the axis: all intervals, but that one far off leaves the others their room. What is cut
    ends in an arrow, and its numbers stand beside it."""
    ends = [x for row in found for x in (row.low, row.high, row.difference) if x is not None]
    most = max(6 * float(np.median(np.abs(ends))), 4 * 100 * MARGIN)
    low = max(min(*ends, -200 * MARGIN), -most)
    high = min(max(*ends, 200 * MARGIN), most)
    room = 0.03 * (high - low)
    return low - room, high + room


def forest_group(ranked: dict[str, list[Standing]]) -> Group | None:
    """The charts of report.html; None where nothing was compared with the control."""
    drawn, shown = [], []
    for model, entries in ranked.items():
        if not (found := rows(entries)):
            continue
        shown += found
        control = next(e for e in entries if e.attention == "none")
        drawn.append(
            {
                "kind": "forest",
                "title": f"{model.upper()}: difference from no attention",
                "rows": [asdict(row) | {"words": row.words} for row in found],
                "extent": extent(found),
                "margin": 100 * MARGIN,
                "verdicts": {name: colour for name, (colour, _) in VERDICT.items()},
                "control": f"{title('none')} {control.test.show('.1f', 100, ' %')}",
                "controls": CONTROLS,
            }
        )
    return Group(HEADING, note(shown), drawn, wide=True) if drawn else None


def forest_picture(path: Path, model: str, entries: list[Standing]) -> str:
    """As .png and .svg. -> its caption; "" where nothing was compared with the control."""
    found = rows(entries)
    if not found:
        return ""
    attentions = sum(not row.control for row in found)
    places = [-i - 1.2 * row.control * (attentions > 0) for i, row in enumerate(found)]
    height = 1.1 + 0.3 * (1.2 - places[-1])
    size = {"width": 5.4, "height": height, "ratios": (3.4, 1.0)}
    with figure(path, 2, svg=True, **size) as (fig, (ax, time)):
        fig.subplots_adjust(wspace=1.05, left=0.18, right=0.93)
        _differences(ax, found, places)
        _times(time, found, places)
        for axis in (ax, time):
            axis.set(ylim=(places[-1] - 0.8, 0.9))
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
            axis.grid(axis="y", visible=False)
        if attentions and attentions < len(found):
            beside = blended_transform_factory(ax.transAxes, ax.transData)
            words = {"transform": beside, "va": "center", "style": "italic", "color": "#5c5c5c"}
            ax.text(-0.02, places[attentions] + 1.05, CONTROLS, ha="right", **words)
        control = next(e for e in entries if e.attention == "none").test.show(".1f", 100, " %")
        ax.set_title(f"{model.upper()}: difference from no attention ({title('none')}: {control})")
    return f"{model.upper()}: difference from no attention. {note(found)}"


def _differences(ax, found: list[Row], places: list[float]) -> None:
    low, high = extent(found)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    ax.set(xlim=(low, high), xlabel="← worse      points of test accuracy      better →")
    ax.axvspan(-100 * MARGIN, 100 * MARGIN, color="#009E73", alpha=0.1, lw=0)
    ax.axvline(0, color="#1b1b1b", lw=1)
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    for row, y in zip(found, places, strict=True):
        colour, marker = VERDICT[row.kind]
        if row.low is not None:
            ax.plot([max(row.low, low), min(row.high, high)], [y, y], color=colour, lw=2)
            for end, cut, arrow in ((low, row.low < low, "<"), (high, row.high > high, ">")):
                if cut:
                    ax.plot(end, y, marker=arrow, color=colour, clip_on=False)
        if low <= row.difference <= high:
            face = colour if row.kind != "undecided" and row.kind else "white"
            ax.plot(row.difference, y, marker=marker, ms=6.5, mfc=face, mec=colour, mew=1.6)
        text = {"transform": beside, "va": "center", "fontsize": 9}
        ax.text(-0.02, y, row.name, ha="right", **text)
        ax.text(1.02, y, row.words, ha="left", color="#1b1b1b", **text)
        ax.text(1.36, y, row.verdict, ha="left", color=colour, **text)


def _times(ax, found: list[Row], places: list[float]) -> None:
    timed = [(row, y) for row, y in zip(found, places, strict=True) if row.time]
    if not timed:
        ax.set_axis_off()
        return
    ax.set_xscale("log")
    ax.axvline(1, color="#1b1b1b", lw=1)
    ends = [x for row, _ in timed for x in (row.time_low or row.time, row.time_high or row.time)]
    ax.set(xlim=(min(*ends, 1) / 1.15, max(*ends, 1) * 1.15), xlabel="time ratio (log)")
    ticks = [
        t
        for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        if ends and ax.get_xlim()[0] <= t <= ax.get_xlim()[1]
    ]
    ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    ax.minorticks_off()
    beside = blended_transform_factory(ax.transAxes, ax.transData)
    for row, y in timed:
        if row.time_low is not None:
            ax.plot([row.time_low, row.time_high], [y, y], color="#7A7A7A", lw=1.4)
        face = "white" if row.disturbed else "#3b3b3b"
        ax.plot(row.time, y, marker="o", ms=5, mfc=face, mec="#3b3b3b")
        ax.text(1.04, y, f"{row.time:.2f}×{' *' * row.disturbed}", transform=beside, va="center")
