"""The charts of accuracy, time and memory against N, for a page."""

from __future__ import annotations

from .chart_data import Group
from .text import title

HEADING = "Accuracy, time and memory against N, the number of tokens"
NOTE = "Both axes of times and of memory are logarithmic. Dashed: the same layer in plain PyTorch."
PANELS = (  # column, the twin's column, heading, unit, its factor, logarithmic
    ("accuracy", "", "Accuracy", "test accuracy (%)", 100.0, False),
    ("step_ms", "eager_ms", "Training step", "ms (log)", 1.0, True),
    ("step_peak_mb", "eager_peak_mb", "Peak memory of a step", "MB (log)", 1.0, True),
)


def length_groups(lines: list[dict]) -> list[Group]:
    """For a page: a chart for each model and each of accuracy, time and memory that is known."""
    drawn = []
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == model]
        for column, twin, heading, unit, factor, log in PANELS:
            series = _lines(mine, column, factor, {})
            if not series:
                continue
            series += _lines(mine, twin, factor, {"dash": "3 3", "width": 1}) if twin else []
            drawn.append(
                {
                    "kind": "curves",
                    "title": f"{model.upper()}: {heading.lower()}",
                    "xlabel": "tokens N",
                    "ylabel": unit.removesuffix(" (log)"),
                    "xlog": True,
                    "ylog": log,
                    "xat": sorted({line["tokens"] for line in mine}),
                    "shared": False,
                    "series": series,
                }
            )
    return [Group(HEADING, NOTE, drawn)] if drawn else []


def _lines(lines: list[dict], column: str, factor: float, look_: dict) -> list[dict]:
    series = []
    for name in dict.fromkeys(line["attention"] for line in lines):
        at = [x for x in lines if x["attention"] == name and x.get(column) is not None]
        at.sort(key=lambda x: x["tokens"])
        if not at:
            continue
        one = {
            "key": name,
            "x": [x["tokens"] for x in at],
            "y": [float(f"{factor * x[column]:.5g}") for x in at],
            "dots": True,
            "look": look_ | ({"name": f"{title(name)}, PyTorch"} if look_ else {}),
        }
        half = f"{column}_half"
        if all(x.get(half) is not None for x in at):
            for end, sign in (("low", -1), ("high", 1)):
                one[end] = [factor * (x[column] + sign * x[half]) for x in at]
        series.append(one)
    return series
