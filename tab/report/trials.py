"""A sweep's trials.csv beside a comparison: its rungs as charts, its winners as a table.

From the CSV alone, so that it needs neither Optuna nor the storage that the sweep ran on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple, TypedDict

from ..files import read_toml, reading
from .chart_data import Group
from .tables import markdown_lines, title
from .text import plain

COLUMNS = ("model", "attention", "configuration", "rung", "epochs", "status", "validation_accuracy")
BESIDE = (*COLUMNS, "bracket", "seconds")  # every other column is what was drawn
HEADING = "Hyperparameters"
WAY_OUT = "let `tab sweep --resume` write it again"
Pair = tuple[str, str]  # model, attention


class Trial(NamedTuple):
    """One configuration at one rung."""

    configuration: int
    rung: int
    epochs: int
    score: float | None  # validation accuracy; None: diverged or failed
    params: dict[str, str]

    def chosen(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.params.items())


class Titled(TypedDict):
    title: str


def read_trials(folder: Path) -> dict[Pair, list[Trial]]:
    path = folder / "trials.csv"
    if not path.exists():
        raise ValueError(
            f"{folder} holds no trials.csv: give the directory of a sweep that ended, or let "
            "`tab sweep show` write that of one that runs"
        )
    with reading(path, WAY_OUT), path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines, names = list(reader), reader.fieldnames or []
    if not lines or not set(COLUMNS) <= set(names):
        raise ValueError(f"{path} is no record of a sweep: needed are {', '.join(COLUMNS)}")
    found: dict[Pair, list[Trial]] = {}
    for line in lines:
        params = {k: _short(v) for k, v in line.items() if k not in BESIDE and v}
        score = line["validation_accuracy"]
        with reading(path, WAY_OUT):
            numbers = (int(line[k]) for k in ("configuration", "rung", "epochs"))
            trial = Trial(*numbers, float(score) if score else None, params)
        found.setdefault((line["model"], line["attention"]), []).append(trial)
    models = list(dict.fromkeys(model for model, _ in found))
    return dict(sorted(found.items(), key=lambda item: models.index(item[0][0])))


def told(folder: Path) -> str:
    """What the sweep's own winners.toml says of it; "" before there is one."""
    path = folder / "winners.toml"
    return read_toml(path, Titled, WAY_OUT)["title"] if path.exists() else ""


def winner(trials: list[Trial]) -> Trial | None:
    """As the sweep chooses: the best at the highest rung that was scored, of equals the first."""
    scored = [trial for trial in trials if trial.score is not None]
    return max(scored, key=lambda t: (t.rung, t.score, -t.configuration), default=None)


def trials_section(found: dict[Pair, list[Trial]], what: str) -> str:
    """what: of the sweep, as `told`."""
    epochs = sorted({t.epochs for trials in found.values() for t in trials})
    lines = []
    for (model, attention), trials in found.items():
        line, won = [model.upper(), title(attention)], winner(trials)
        for budget in epochs:
            scores = [t.score for t in trials if t.epochs == budget and t.score is not None]
            line.append(f"{100 * max(scores):.1f} (of {len(scores)})" if scores else "–")
        lost = len({t.configuration for t in trials if t.score is None})
        line += [str(lost or "–"), f"{100 * won.score:.1f}" if won else "–"]
        lines.append([*line, won.chosen() or "nothing was drawn" if won else "–"])
    header = ["Model", "Attention", *(f"Epoch {n}" for n in epochs), "Lost", "Winner's", "Winner"]
    words = f"{plain(what)}. " if what else ""
    words += (
        "Successive halving: validation accuracy in per cent of the best configuration at each "
        "rung, and how many were scored there; the best of the last rung won. Lost: diverged or "
        "failed. The test set was not scored."
    )
    return f"## {HEADING}\n\n{words}\n\n{markdown_lines(header, lines)}"


def trials_charts(found: dict[Pair, list[Trial]]) -> Group:
    """A chart for each pair, a line for each configuration; the winner's in its colour."""
    charts = []
    for (model, attention), trials in found.items():
        won, series = winner(trials), []
        for number in dict.fromkeys(t.configuration for t in trials):
            mine = [t for t in trials if t.configuration == number and t.score is not None]
            if not mine:
                continue
            best = won is not None and number == won.configuration
            name = f"configuration {number}{', the winner' if best else ''}"
            look = {"name": name} if best else {"name": name, "color": "var(--grey)", "width": 1}
            line = {"key": attention, "x": [t.epochs for t in mine],
                    "y": [round(100 * t.score, 3) for t in mine]}  # fmt: skip
            facts = [[k, v] for k, v in mine[0].params.items()]
            series.append(line | {"look": {**look, "dash": ""}, "facts": facts, "dots": True})
        series.sort(key=lambda line: "color" not in line["look"])  # the winner lies on top
        score = f": {100 * won.score:.1f} %" if won else ""
        charts.append({"title": f"{model.upper()} {title(attention)}{score}", "xlabel": "epoch",
                       "ylabel": "validation accuracy (%)", "shared": False, "whole": True,
                       "series": series})  # fmt: skip
    note = "A line for each configuration, the winner's in colour; a dot: a rung."
    return Group(HEADING, note, charts, small=len(charts) > 2)


def _short(value: str) -> str:
    """Three digits of a number drawn from a range; anything else as it is."""
    try:
        return value if value.isdigit() else f"{float(value):.3g}"
    except ValueError:
        return value
