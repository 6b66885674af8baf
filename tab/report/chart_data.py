"""The numbers behind the charts of report.html: curves over seeds' means, and trade-offs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from ..analysis.attacks import STEPS
from ..compare.disturbance import STAR, disturbed
from ..compare.runs import Run
from .attacks import attack_points
from .pictures import TIME, averaged, far_apart, measured
from .robustness import SETS, corrupted, severities, severity_points
from .style import look
from .tables import ranking
from .text import title

NOTE = (
    "Curves are means over seeds; the band of the one that is pointed at reaches from its lowest "
    "seed to its highest. Press a name to hide it."
)
COSTS = "Accuracy, time and memory"
COSTS_NOTE = (
    "Means of accuracy and medians of time over seeds. A filled circle is matched by no other in "
    "accuracy, time, memory and accuracy under noise together, as far as they are known; the "
    "dashed line is the front of the two axes. On a CPU the peak memory of one run cannot be told "
    "from the process's, and the circles' area is that of the parameters."
)
POINTS = 200  # of a curve; of a longer one as many, evenly chosen
PARETO = ("accuracy", "time", "memory", "noise")
Found = dict[str, dict]  # run id -> its robustness.json


class Group(NamedTuple):
    """Charts under one heading, as charts.js draws them, and the words below."""

    heading: str
    note: str
    charts: list[dict]
    small: bool = False  # many little ones side by side
    wide: bool = False  # each over the whole width


def charts(runs: list[Run], curves: list[Run], part: str, found: Found) -> list[dict]:
    """What charts.js draws. curves: the runs whose rows are drawn, by their accuracy on `part`."""
    names = list(dict.fromkeys(run.attention for run in runs))
    drawn, severity = [], severities(found)
    for model in dict.fromkeys(run.model for run in runs):
        mine = [run for run in curves if run.model == model]
        key, accuracy = f"{part}_accuracy", f"{part} accuracy (%)"
        kinds = [
            ("training loss", "epoch", "cross-entropy", measured("epoch", "train_loss", 1.0)),
            (f"{part} accuracy", "epoch", accuracy, measured("epoch", key, 100.0)),
            (
                *(f"{part} accuracy against time", TIME, accuracy),
                measured("cumulative_training_time", key, 100.0),
            ),
            ("accuracy under noise", "σ of the noise", "test accuracy (%)", _noise(found)),
        ]
        if severity:
            name, _, means = severity
            points = severity_points(means)
            kinds.append((f"accuracy under {name}", "severity", "test accuracy (%)", points))
        if points := attack_points(found):
            kinds.append(("accuracy under PGD", "ε (255ths)", "test accuracy (%)", points))
        for heading, x, y, points in kinds:
            chart = {"title": f"{model.upper()}: {heading}", "xlabel": x, "ylabel": y}
            series = _series(mine, names, points)
            for one in series if x == TIME else ():
                if disturbed(run for run in mine if run.attention == one["key"]):
                    one["look"] = {"name": f"{title(one['key'])} *"}
            if series:
                chart["xlog"] = x == TIME and far_apart([one["x"][-1] for one in series])
                chart |= {"kind": "curves", "shared": "time" not in x, "series": series}
                drawn.append(chart)
    return drawn


def tradeoff_group(runs: list[Run], found: Found) -> Group | None:
    """Each model's trade-offs; None where fewer than two mechanisms have accuracy and time."""
    models = dict.fromkeys(run.model for run in runs)
    drawn = [chart for model in models for chart in _tradeoff(runs, model, found)]
    starred = any(point["disturbed"] for chart in drawn for point in chart["points"])
    return Group(COSTS, COSTS_NOTE + f" {STAR}" * starred, drawn, wide=True) if drawn else None


def looks(attentions: Iterable[str]) -> dict[str, dict]:
    """Of each mechanism, for charts.js."""
    names = list(dict.fromkeys(attentions))
    return {name: _look(name, names) for name in names}


def _noise(found: Found) -> Callable[[Run], tuple[list[float], list[float]]]:
    def points(run: Run) -> tuple[list[float], list[float]]:
        if "noise" not in found.get(run.id, {}):
            return [], []
        noise = found[run.id]["noise"]
        return noise["settings"]["sigma"], [100 * a for a in noise["accuracy"]]

    return points


def _series(runs: list[Run], names: list[str], points: Callable) -> list[dict]:
    series = []
    for name in names:
        line = averaged([run for run in runs if run.attention == name], points)
        if line:
            kept = np.linspace(0, len(line[0]) - 1, min(len(line[0]), POINTS)).round().astype(int)
            x, y = line[0][kept], line[1][:, kept]
            one = {"key": name, "x": _numbers(x), "y": _numbers(y.mean(0))}
            if len(y) > 1:
                one |= {"low": _numbers(y.min(0)), "high": _numbers(y.max(0))}
            series.append(one)
    return series


def _numbers(values: np.ndarray) -> list[float | None]:
    """To five digits, as far as a chart can show."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]


def _tradeoff(runs: list[Run], model: str, found: Found) -> list[dict]:
    """Accuracy, time, memory and robustness of each mechanism, where all of them have it."""
    entries = [entry for entry in ranking(runs, model) if entry.test and entry.seconds]

    def mean(of: Callable[[dict], float | None]) -> Callable:
        """Over the runs of an entry that have it, in per cent."""

        def value(entry) -> float | None:
            each = [of(found[run.id]) for run in entry.runs if run.id in found]
            known = [100 * x for x in each if x is not None]
            return float(np.mean(known)) if known else None

        return value

    masked = any(f["attacks"]["suspicions"] for f in found.values() if "attacks" in f)
    pgd = f"accuracy under PGD-{STEPS} (%)" + ", gradients perhaps masked" * masked
    # label, whether more is better, value
    quantities = {
        "accuracy": ("test accuracy (%)", True, lambda e: 100 * e.test.value),
        "time": (TIME, False, lambda e: e.seconds.value),
        "memory": ("peak memory (MiB)", False, lambda e: _mebibytes(e.value("peak_memory_bytes"))),
        "parameters": ("parameters", False, lambda e: e.value("parameters")),
        "flops": ("FLOPs per image", False, lambda e: e.value("flops")),
        "noise": (
            *("mean accuracy under noise (%)", True),
            mean(lambda f: float(np.mean(f["noise"]["accuracy"][1:])) if "noise" in f else None),
        ),
        "pgd": (pgd, True, mean(lambda f: f.get("attacks", {}).get("pgd"))),
    }
    for key, (name, kinds) in SETS.items():
        value = mean(partial(corrupted, key=key, kinds=kinds))
        quantities[key] = f"mean accuracy, {name} (%)", True, value
    values = {e.attention: {k: f(e) for k, (_, _, f) in quantities.items()} for e in entries}
    have = [k for k in quantities if values and all(v[k] is not None for v in values.values())]
    if len(values) < 2 or "accuracy" not in have or "time" not in have:
        return []
    area = next((k for k in ("memory", "parameters") if k in have), "time")
    return [
        {
            "kind": "tradeoff",
            "title": f"{model.upper()}: accuracy and cost (area: {quantities[area][0]})",
            "area": area,
            "pareto": [k for k in PARETO if k in have],
            "quantities": [
                {"key": k, "label": quantities[k][0], "more": quantities[k][1]} for k in have
            ],
            "points": [
                {
                    "key": e.attention,
                    "values": {k: values[e.attention][k] for k in have},
                    "disturbed": e.seconds.disturbed,
                }
                for e in entries
            ],
        }
    ]


def _mebibytes(count: float | None) -> float | None:
    return None if count is None else count / 2**20


def _look(name: str, names: list[str]) -> dict:
    line = look(name, names)
    dash = "" if line["linestyle"] == "-" else line["linestyle"][1]
    return {
        "name": title(name),
        "color": "var(--ink)" if name == "none" else line["color"],
        "width": line["linewidth"],
        "dash": " ".join(f"{line['linewidth'] * part:.1f}" for part in dash),
    }
