"""The pictures drawn from numbers: curves, bars, accuracy against time and against noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from ..compare.disturbance import disturbed
from ..compare.runs import Run
from .style import figure, label_ends, look
from .tables import Standing
from .text import title

TIME = "training time (s)"  # of an axis
STARRED = "; a star marks a time that other work decided"  # of a caption


def curves(
    path: Path,
    runs: list[Run],
    points: Callable[[Run], tuple[list[float], list[float]]],
    *,
    heading: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """One panel per model, one line per mechanism: the mean over seeds; up to four
    lines also show the range of their seeds.

    points(run) -> its x and y values; runs of one mechanism are cut to the shortest.
    """
    models = list(dict.fromkeys(run.model for run in runs))
    mechanisms = list(dict.fromkeys(run.attention for run in runs))
    with figure(path, len(models)) as (_, axes):
        for ax, model in zip(axes, models, strict=True):
            ends = []
            for attention in mechanisms:
                mine = [r for r in runs if (r.model, r.attention) == (model, attention)]
                means = averaged(mine, points)
                if means is None:
                    continue
                x, y = means  # (n,), (seeds, n)
                n = len(x)
                line = look(attention, mechanisms)
                ax.plot(x, y.mean(0), marker="o" if n == 1 else None, markersize=4, **line)
                if len(y) > 1 and len(mechanisms) <= 4:  # more would bury the lines
                    ax.fill_between(x, y.min(0), y.max(0), color=line["color"], alpha=0.12, lw=0)
                star = " *" * (xlabel == TIME and bool(disturbed(mine)))
                ends.append((x[-1], y.mean(0)[-1], title(attention) + star, line))
            ax.set(title=f"{model.upper()}: {heading}", xlabel=xlabel, ylabel=ylabel)
            if xlabel in ("epoch", "severity"):  # which are whole
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if xlabel == TIME:
                spread_out(ax, ends)
            label_ends(ax, ends)


def far_apart(values: list[float]) -> bool:
    """One of them would squeeze the others into a corner of a linear axis."""
    return bool(values) and max(values) > 8 * min(values) > 0


def spread_out(ax, ends: list[tuple]) -> None:
    """Times of which one lies far off stand on a logarithmic axis."""
    if far_apart([x for x, *_ in ends]):
        ax.set(xscale="log", xlabel=f"{TIME}, log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.minorticks_off()


def drawn(runs: list[Run]) -> list[Run]:
    """Those with curves: the finished ones, and all of a mechanism of which none is finished."""
    finished = {(run.model, run.attention) for run in runs if run.status == "done"}
    return [
        r for r in runs if r.rows and (r.status == "done" or (r.model, r.attention) not in finished)
    ]


def averaged(
    runs: list[Run], points: Callable[[Run], tuple[list[float], list[float]]]
) -> tuple[np.ndarray, np.ndarray] | None:
    """x (n,), its median over runs (epochs are equal, times are not), and y (runs, n), cut to the
    shortest; None without a point."""
    pairs = [pair for pair in map(points, runs) if pair[0]]
    if not pairs:
        return None
    n = min(len(x) for x, _ in pairs)
    return np.median([x[:n] for x, _ in pairs], axis=0), np.array([y[:n] for _, y in pairs], float)


def tradeoffs(path: Path, charts: list[dict], names: list[str]) -> str:
    """Accuracy against time, the area by memory or parameters, a panel for each of the charts of
    report.html; also as .svg. names: all mechanisms, by which colours go. -> the caption"""
    with figure(path, len(charts), height=4.6, svg=True) as (_, axes):
        for ax, chart in zip(axes, charts, strict=True):
            labels = {q["key"]: q["label"] for q in chart["quantities"]}
            most = max(point["values"][chart["area"]] for point in chart["points"])
            ends = []
            for point in chart["points"]:
                x, y = (point["values"][key] for key in ("time", "accuracy"))
                line = look(point["key"], names)
                size = 30 + 220 * point["values"][chart["area"]] / most
                ax.scatter(x, y, s=size, color=line["color"], alpha=0.75, edgecolor="white")
                ends.append((x, y, title(point["key"]) + " *" * point["disturbed"], line))
            ax.set(title=chart["title"], xlabel=labels["time"], ylabel=labels["accuracy"])
            spread_out(ax, ends)
            label_ends(ax, ends)
    starred = any(point["disturbed"] for chart in charts for point in chart["points"])
    caption = "Test accuracy against training time; higher and further left is better"
    return caption + STARRED * starred


def per_epoch(path: Path, runs: list[Run], key: str, heading: str, ylabel: str, scale=1.0) -> None:
    """A column of the rows against the epoch."""
    points = measured("epoch", key, scale)
    curves(path, runs, points, heading=heading, xlabel="epoch", ylabel=ylabel)


def against_time(path: Path, runs: list[Run], key: str, heading: str, ylabel: str) -> None:
    """An accuracy in per cent against the seconds trained so far."""
    points = measured("cumulative_training_time", key, 100.0)
    curves(path, runs, points, heading=heading, xlabel=TIME, ylabel=ylabel)


def measured(x: str, y: str, scale: float) -> Callable[[Run], tuple[list[float], list[float]]]:
    """The rows in which both columns were measured."""

    def points(run: Run) -> tuple[list[float], list[float]]:
        rows = [row for row in run.rows if row.get(x) is not None and row.get(y) is not None]
        return [row[x] for row in rows], [row[y] * scale for row in rows]

    return points


def bars(path: Path, entries: list[Standing], heading: str) -> None:
    """Final accuracy and train time of one model's mechanisms, in the order of the table."""
    entries = [entry for entry in entries if entry.test]
    names, places = [title(entry.attention) for entry in entries], range(len(entries))
    looks = [look(e.attention, [e.attention for e in entries]) for e in entries]
    colours = [line["color"] for line in looks]
    hatches = ["" if line["linestyle"] == "-" else "////" for line in looks]
    with figure(path, 2, height=0.9 + 0.3 * max(len(entries), 2), width=5.2) as (fig, axes):
        fig.subplots_adjust(wspace=0.08)
        accuracy, time = axes
        panels = (
            (accuracy, "test", 100, "final test accuracy (%)", lambda x: f"{x:.1f}"),
            (time, "seconds", 1, TIME, lambda x: f"{x:.0f}" if x >= 100 else f"{x:.3g}"),
        )
        for ax, key, scale, xlabel, written in panels:
            means = [getattr(entry, key) for entry in entries]  # no time where all runs diverged
            values = [mean.value * scale if mean else 0.0 for mean in means]
            below = [mean.spread[0] * scale if mean else 0.0 for mean in means]
            above = [mean.spread[1] * scale if mean else 0.0 for mean in means]
            ax.barh(places, values, color=colours, hatch=hatches, height=0.72, edgecolor="white")
            if any(above + below):
                bar = {"fmt": "none", "ecolor": "#777777", "capsize": 2.5}
                ax.errorbar(values, places, xerr=(below, above), **bar)
            ends = [value + more for value, more in zip(values, above, strict=True)]
            room = max(ends) or 1.0
            for place, mean, end in zip(places, means, ends, strict=True):
                x, plate = end + 0.012 * room, {"color": "white", "pad": 0.6}
                text = written(mean.value * scale) + " *" * mean.disturbed if mean else "–"
                ax.text(x, place, text, va="center", fontsize=8.5, bbox=plate)
            ax.set(xlabel=xlabel, xlim=(0, room * 1.13))
            ax.set_yticks(places, names if ax is accuracy else [""] * len(names))
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="y", visible=False)
            ax.invert_yaxis()
        accuracy.set_title(heading)
        control = next((e for e in entries if e.attention == "none"), None)
        if control:
            for ax, mean, scale in ((accuracy, control.test, 100), (time, control.seconds, 1)):
                if mean:
                    ax.axvline(mean.value * scale, color="#000000", linewidth=0.9, linestyle=":")


def noise(path: Path, runs: list[Run], found: dict[str, dict], heading: str) -> None:
    """Test accuracy against the noise on the input; found: run id -> "noise" of its
    robustness.json."""

    def points(run: Run) -> tuple[list[float], list[float]]:
        if run.id not in found:
            return [], []
        return found[run.id]["settings"]["sigma"], [100 * a for a in found[run.id]["accuracy"]]

    xlabel = "σ of the noise (in standard deviations of the input)"
    curves(path, runs, points, heading=heading, xlabel=xlabel, ylabel="test accuracy (%)")
