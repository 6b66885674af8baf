"""The numbers behind the charts of report.html: curves over seeds' means, and trade-offs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ..results import Run
from .pictures import averaged, measured
from .style import look
from .tables import ranking, title

NOTE = (
    "Curves are means over seeds. Trade-offs: a filled circle is matched by no other in all that "
    "was measured; the dashed line is the front of the two axes. Memory is missing on a CPU, where "
    "that of one run cannot be told from the process's. Point at a curve or a circle for its "
    "numbers; press a name to hide it; press the head of a table's column to sort by it."
)
Noise = dict[str, tuple[list[float], list[float]]]  # run id -> levels, accuracies


class Group(NamedTuple):
    """Charts under one heading, as charts.js draws them, and the words below."""

    heading: str
    note: str
    charts: list[dict]
    small: bool = False  # many little ones side by side


def charts(runs: list[Run], curves: list[Run], part: str, noise: Noise) -> list[dict]:
    """What charts.js draws. curves: the runs whose rows are drawn, by their accuracy on `part`."""
    names = list(dict.fromkeys(run.attention for run in runs))
    found = []
    for model in dict.fromkeys(run.model for run in runs):
        mine = [run for run in curves if run.model == model]
        found += _tradeoff(runs, model, noise)
        key, accuracy = f"{part}_accuracy", f"{part} accuracy (%)"
        kinds = [
            ("training loss", "epoch", "cross-entropy", measured("epoch", "train_loss", 1.0)),
            (f"{part} accuracy", "epoch", accuracy, measured("epoch", key, 100.0)),
            (
                *(f"{part} accuracy against time", "training time (s)", accuracy),
                measured("cumulative_training_time", key, 100.0),
            ),
            ("accuracy under noise", "σ of the noise", "test accuracy (%)", _noise(noise)),
        ]
        for heading, x, y, points in kinds:
            chart = {"title": f"{model.upper()}: {heading}", "xlabel": x, "ylabel": y}
            series = _series(mine, names, points)
            if series:
                found.append(chart | {"shared": "time" not in x, "series": series})
    return found


def looks(attentions: Iterable[str]) -> dict[str, dict]:
    """Of each mechanism, for charts.js."""
    names = list(dict.fromkeys(attentions))
    return {name: _look(name, names) for name in names}


def _noise(noise: Noise) -> Callable[[Run], tuple[list[float], list[float]]]:
    def points(run: Run) -> tuple[list[float], list[float]]:
        levels, accuracies = noise.get(run.id, ([], []))
        return levels, [100 * a for a in accuracies]

    return points


def _series(runs: list[Run], names: list[str], points: Callable) -> list[dict]:
    series = []
    for name in names:
        line = averaged([run for run in runs if run.attention == name], points)
        if line:
            x, y = line[0], line[1].mean(0)
            shown = [float(v) if math.isfinite(v) else None for v in y]
            series.append({"key": name, "x": [float(v) for v in x], "y": shown})
    return series


def _tradeoff(runs: list[Run], model: str, noise: Noise) -> list[dict]:
    """Accuracy, time, memory and robustness of each mechanism, where all of them have it."""
    entries = [entry for entry in ranking(runs, model) if entry.test and entry.seconds]

    def under_noise(entry) -> float | None:
        means = [100 * np.mean(noise[run.id][1][1:]) for run in entry.runs if run.id in noise]
        return float(np.mean(means)) if means else None

    # label, whether more is better, value
    quantities = {
        "accuracy": ("test accuracy (%)", True, lambda e: 100 * e.test.value),
        "time": ("training time (s)", False, lambda e: e.seconds.value),
        "memory": ("peak memory (MiB)", False, lambda e: e.memory and e.memory / 2**20),
        "parameters": ("parameters", False, lambda e: e.parameters),
        "flops": ("FLOPs per image", False, lambda e: e.flops),
        "noise": ("mean accuracy under noise (%)", True, under_noise),
    }
    values = {e.attention: {k: f(e) for k, (_, _, f) in quantities.items()} for e in entries}
    have = [k for k in quantities if values and all(v[k] for v in values.values())]
    if "accuracy" not in have or "time" not in have:
        return []
    area = next((k for k in ("memory", "parameters") if k in have), "time")
    return [
        {
            "title": f"{model.upper()}: trade-offs (area: {quantities[area][0]})",
            "area": area,
            "quantities": [
                {"key": k, "label": quantities[k][0], "more": quantities[k][1]} for k in have
            ],
            "points": [{"key": a, "values": {k: v[k] for k in have}} for a, v in values.items()],
        }
    ]


def _look(name: str, names: list[str]) -> dict:
    line = look(name, names)
    dash = "" if line["linestyle"] == "-" else line["linestyle"][1]
    return {
        "name": title(name),
        "color": "var(--ink)" if name == "none" else line["color"],
        "width": line["linewidth"],
        "dash": " ".join(f"{line['linewidth'] * part:.1f}" for part in dash),
    }
