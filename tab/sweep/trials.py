"""trials.csv: what a sweep trained and scored, written by the sweep and read without Optuna."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..files import write_text
from ..files.formats import reading
from .halving import winner

COLUMNS = ("model", "attention", "configuration", "rung", "epochs", "status", "validation_accuracy")
BESIDE = (*COLUMNS, "bracket", "seconds")  # every other column is what was drawn
WAY_OUT = "let `tab sweep --resume` write it again"
Pair = tuple[str, str]  # (model, attention)


class RungTrial(NamedTuple):
    """One configuration at one rung, which has ended."""

    configuration: int
    rung: int
    epochs: int  # in all
    status: str  # done | diverged | failed
    score: float | None  # validation accuracy after the last epoch
    params: dict[str, object]
    bracket: int = 0
    seconds: float = 0.0
    curve: dict[int, float] | None = None  # epoch -> validation accuracy; None: of the last alone

    @property
    def points(self) -> dict[int, float]:
        """epoch -> validation accuracy, as far as it is known."""
        if self.curve is not None:
            return self.curve
        return {} if self.score is None else {self.epochs: self.score}

    def chosen(self) -> str:
        """'lr 0.001, hidden 32'; a number drawn from a range to three digits."""
        return ", ".join(f"{name} {value}" for name, value in self.facts())

    def facts(self) -> list[list[str]]:
        """[name, value] of each option."""
        return [[name, _short(value)] for name, value in self.params.items()]


def winner_of(trials: Iterable[RungTrial]) -> RungTrial | None:
    """The trial whose configuration a sweep takes, by its own rule; None if none was scored."""
    by_key = {(trial.configuration, trial.rung): trial for trial in trials}
    found = winner({key: trial.score for key, trial in by_key.items()})
    return None if found is None else by_key[found]


def write_trials(path: Path, found: Mapping[Pair, list[RungTrial]], drawn: Iterable[str]) -> None:
    """One line for each trial. drawn: the options that were drawn, a column each."""
    columns = ["model", "attention", "configuration", "bracket", "rung", "epochs", "status"]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*columns, "validation_accuracy", "seconds", *drawn], lineterminator="\n"
    )
    writer.writeheader()
    for (model, attention), trials in found.items():
        for trial in trials:
            line = {"model": model, "attention": attention}
            line |= {key: getattr(trial, key) for key in columns[2:]}
            line |= {"validation_accuracy": trial.score, "seconds": round(trial.seconds, 3)}
            writer.writerow(line | trial.params)
    write_text(path, text.getvalue())


def read_trials(folder: Path) -> dict[Pair, list[RungTrial]]:
    """What `folder`/trials.csv holds, its models together."""
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
    found: dict[Pair, list[RungTrial]] = {}
    with reading(path, WAY_OUT):
        for line in lines:
            found.setdefault((line["model"], line["attention"]), []).append(_trial(line))
    models = list(dict.fromkeys(model for model, _ in found))
    return dict(sorted(found.items(), key=lambda item: models.index(item[0][0])))


def _trial(line: dict[str, str]) -> RungTrial:
    score = line["validation_accuracy"]
    return RungTrial(
        configuration=int(line["configuration"]),
        rung=int(line["rung"]),
        epochs=int(line["epochs"]),
        status=line["status"],
        score=float(score) if score else None,
        params={name: _value(text) for name, text in line.items() if name not in BESIDE and text},
        bracket=int(line.get("bracket") or 0),
        seconds=float(line.get("seconds") or 0),
    )


def _value(text: str) -> object:
    """True or False, a whole number, a number, or a word."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
