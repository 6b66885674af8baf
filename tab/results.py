"""What a comparison leaves on disk, and its two CSV files.

    results/<time>/
        config.toml  environment.json                  written first: enough to resume
        runs/<model>-<attention>-s<seed>/              train()'s own files, or error.txt
        experiment_results.csv  experiment_summary.csv a function of config.toml and runs/ alone
        pictures/*.png  report.md  report.html

The first columns of the CSV files are those of the published study, in its order.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Literal, NotRequired, TypedDict

import numpy as np

from .checkpoint import Corrupt
from .data import Dataset
from .environment import command, load, now
from .files import check, read_json, read_lines, read_toml, reading, write_json, write_text
from .verdicts import COLUMNS, verdicts

NAMES = ["model_name", "architecture", "attention_type"]
RESULTS = [
    *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    "cumulative_training_time",
    *("seed", "validation_loss", "validation_accuracy", "seconds", "images_per_second"),
    *("peak_memory_bytes", "learning_rate", "seeds_at_once"),
]
SUMMARY = [
    *("final_test_accuracy", "max_test_accuracy", "final_train_accuracy", "final_train_loss"),
    *("min_train_loss", "total_training_time", "num_epochs"),
    *("seed", "status", "images_per_second", "parameters", "attention_parameters", "flops"),
    *("peak_memory_bytes", "final_validation_accuracy", "error", "seeds_at_once"),
    *COLUMNS,  # of the mechanism over its seeds: the same in the line of each
    *("time_spread", "time_disturbed"),  # of the same: slowest over fastest; is that too much?
    "load_average",  # of the machine over the last minute of the run
]
DISTURBED = 1.5  # a spread from which on other work, not the mechanism, decided the times
MEASURED = {  # columns that differ between two equal runs: times, and what follows from them
    *("cumulative_training_time", "total_training_time", "seconds", "images_per_second"),
    *("peak_memory_bytes", "time_spread", "time_disturbed", "load_average"),
}
ANSWERS = "test.npz"  # in a run's directory: predicted and label of each test image
ENDED = ("done", "diverged", "failed")
COPY = "put a copy back, or start a new comparison"  # the way out of a damaged file


class Summary(TypedDict):
    """Of run.json: what is read of it by name."""

    num_epochs: int
    final_test_accuracy: float | None
    total_training_time: float | None
    images_per_second: float | None


class Data(TypedDict):
    """Which data set a result comes from."""

    name: str
    note: str
    fingerprint: str


class Used(Data):
    """How many of its images a comparison trains, validates and tests on."""

    train: NotRequired[int]
    validation: NotRequired[int]
    test: NotRequired[int]
    classes: NotRequired[int]


class Machine(TypedDict):
    device: str
    threads: int
    load: NotRequired[float | None]


class Time(TypedDict):
    """When somebody worked on a comparison, and the load averages before and after."""

    command: str
    started: str
    load: float | None
    ended: NotRequired[str]  # not there after a kill
    load_at_end: NotRequired[float | None]


class RunFile(TypedDict):
    """run.json: one run, with all that it takes to build its model again."""

    config: dict
    status: Literal["running", "done", "diverged"]
    data: Data
    classes: list[str]
    environment: Machine
    summary: Summary
    together: NotRequired[list[str] | None]


class Facts(Machine):
    """environment.json: what the numbers of a comparison or a sweep come from."""

    tab: str
    torch: str
    python: str
    cpu: str
    commit: str | None
    dataset: Used
    overrides: NotRequired[dict]  # of the recipe, by --set, --epochs, …
    times: NotRequired[list[Time]]


@dataclass(frozen=True)
class Grid:
    """Which runs a comparison holds. It stands in config.toml under [grid], below the recipe."""

    recipe: str  # its name
    models: list[str]
    attentions: list[str]
    seeds: int  # 0 … seeds - 1
    data: str
    device: str
    batch_seeds: int = 1  # seeds of a variant trained at once, as one stacked model
    classes: int = 10  # of the data set, for which sizes are matched; 0.1 matched for ten whatever

    def cells(self) -> list[tuple[str, str, int]]:
        """(model, attention, seed) in the order of work: a whole table after each seed."""
        seeds = range(self.seeds)
        return [(m, a, s) for s in seeds for a in self.attentions for m in self.models]

    def groups(self) -> list[list[tuple[str, str, int]]]:
        """The cells that are trained at once, in the order of work."""
        n = self.batch_seeds
        starts = [(m, a, s) for m, a, s in self.cells() if s % n == 0]
        return [[(m, a, i) for i in range(s, min(s + n, self.seeds))] for m, a, s in starts]

    @classmethod
    def load(cls, out: Path) -> Grid:
        path = out / "config.toml"
        if not path.exists():
            raise ValueError(f"{out} holds no comparison: there is no config.toml in it")
        table = read_toml(path, dict, COPY).get("grid")
        if not table:
            raise ValueError(f"{path} has no [grid]: it is a recipe, no comparison; {COPY}")
        with reading(path, COPY):
            return cls(**check("grid", table, cls))


@dataclass(frozen=True)
class Run:
    """One cell of the grid: what train() reported, or how it failed."""

    model: str
    attention: str
    seed: int
    path: Path
    status: str  # missing | running | done | diverged | failed
    rows: list[dict] = field(default_factory=list)  # one per epoch
    summary: dict = field(default_factory=dict)
    error: str = ""
    device: str = ""  # the name of what it ran on
    threads: int = 0  # where known
    load: float | None = None  # load average at its end, where known
    epochs: int = 0  # that it is to have, where known

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def state(self) -> str:
        """In words, for a run that is not in the means."""
        if self.status == "running":
            return f"stopped after epoch {len(self.rows)} of {self.epochs}"
        return "not begun" if self.status == "missing" else self.status

    @property
    def scored(self) -> bool:
        """It ended with a test accuracy."""
        return self.status == "done" and self.summary.get("final_test_accuracy") is not None

    @property
    def accuracy(self) -> float:
        """Of the final test."""
        return self.summary["final_test_accuracy"]

    def right(self) -> np.ndarray | None:
        """(N,) bool: which test images it answered rightly; None for a run that did not keep it."""
        path = self.path / ANSWERS
        if not path.exists():
            return None
        way_out = "remove it, and the statistics of this run rest on its accuracy alone"
        with reading(path, way_out), np.load(path, allow_pickle=False) as found:
            predicted, label = found["predicted"], found["label"]
            if predicted.ndim != 1 or predicted.shape != label.shape:
                raise ValueError(f"shapes {predicted.shape} and {label.shape}")
            return predicted == label


def read_runs(out: Path, grid: Grid) -> list[Run]:
    return [read_run(out, *cell) for cell in grid.cells()]


def read_run(out: Path, model: str, attention: str, seed: int) -> Run:
    path = out / "runs" / f"{model}-{attention}-s{seed}"
    cell, failed = (model, attention, seed, path), path / "error.txt"
    error = failed.read_text("utf-8", "replace") if failed.is_file() else ""
    found = read_run_file(path)
    if not found:
        return Run(*cell, "failed" if error else "missing", error=error)
    with reading(path / "run.json", again(path)):
        is_of = tuple(found["config"][key] for key in ("model", "attention", "seed"))
        if is_of != cell[:3]:
            raise ValueError("it is of {}-{}-s{}, not of this run".format(*is_of))
        check("train.epochs", found["config"]["train"]["epochs"], int)
    status = found["status"]
    if status == "running" and error:
        status = "failed"
    return Run(
        *cell,
        status,
        rows=read_rows(path, found),
        summary=found["summary"],
        error=error if status == "failed" else "",
        device=found["environment"]["device"],
        threads=found["environment"]["threads"],
        load=found["environment"].get("load"),
        epochs=found["config"]["train"]["epochs"],
    )


def read_run_file(path: Path) -> RunFile | None:
    """run.json of the run in the directory `path`; None if there is none yet."""
    file = path / "run.json"
    return read_json(file, RunFile, again(path)) if file.exists() else None


def read_rows(path: Path, run: RunFile) -> list[dict]:
    """The epochs of a run. While it runs, half a row at the end of the file is left out: its
    checkpoint knows them all."""
    file = path / "rows.jsonl"
    rows = read_lines(file, again(path)) if file.exists() else []
    with reading(file, again(path)):
        for i, row in enumerate(rows):
            numbers = all(type(x) in (int, float, NoneType) for x in row.values())
            if row.get("epoch") != i + 1 or not numbers or not row.keys() >= MEASURES:
                raise ValueError(f"line {i + 1} is no epoch {i + 1}")
    if run["status"] != "running" and len(rows) != run["summary"]["num_epochs"]:
        raise Corrupt(
            f"{file} has {len(rows)} of {run['summary']['num_epochs']} epochs: {again(path)}"
        )
    return rows


MEASURES = {  # of each row
    *("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss"),
    *("test_accuracy", "seconds", "cumulative_training_time", "images_per_second"),
    "peak_memory_bytes",
}


def again(path: Path) -> str:
    """The way out of a run that is damaged."""
    return f"put a copy back, or remove {path} and resume, which trains it again"


def trained_runs(folder: Path) -> tuple[list[Path], str]:
    """The finished runs of a comparison, or the one run that `folder` is; and the name of the data.

    A ValueError if there is none, or the data of a run must be named.
    """
    if found := read_run_file(folder):
        return [folder], found["data"]["name"]
    grid = Grid.load(folder)
    runs = [run.path for run in read_runs(folder, grid) if run.status == "done"]
    if not runs:
        raise ValueError(f"{folder} has no finished run: resume it with tab compare --resume")
    return runs, grid.data


def made_with(out: Path, dataset: Dataset) -> dict:
    """The facts in environment.json; a ValueError if `out` was made with other data."""
    facts = read_json(out / "environment.json", Facts, COPY)
    was = facts["dataset"]
    if was["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"{out} was made with {was['name']} ({was['fingerprint']}), "
            f"not with {dataset.name} ({dataset.fingerprint}): give the same data"
        )
    return facts


def attention_label(attention: str) -> str:
    """The control's name in the published files is "Control"."""
    return "Control" if attention == "none" else attention


def names(run: Run) -> dict[str, str]:
    """{"model_name": "CNN - multi_head", "architecture": "CNN", "attention_type": "multi_head"}"""
    architecture, attention = run.model.upper(), attention_label(run.attention)
    return dict(zip(NAMES, (f"{architecture} - {attention}", architecture, attention), strict=True))


def write_csvs(out: Path, runs: list[Run]) -> None:
    """Both files from all runs; a run that has not ended has no line in the summary."""
    ended, spreads = [run for run in runs if run.status in ENDED], time_spreads(runs)
    found = {model: verdicts(runs, model) for model in {run.model for run in runs}}
    lines = (names(run) | row | {"seed": run.seed} for run in runs for row in run.rows)
    write_csv(out / "experiment_results.csv", NAMES + RESULTS, lines)
    lines = (
        names(run)
        | run.summary
        | {"seed": run.seed, "status": run.status, "error": run.error.strip().split("\n")[-1]}
        | {"final_validation_accuracy": last(run.rows, "validation_accuracy")}
        | (found[run.model][run.attention].columns() if run.scored else {})
        | _disturbance(spreads.get((run.model, run.attention)))
        | {"load_average": run.load}
        for run in ended
    )
    write_csv(out / "experiment_summary.csv", NAMES + SUMMARY, lines)


def time_spreads(runs: list[Run]) -> dict[tuple[str, str], float]:
    """(model, attention) -> its slowest seed's time over its fastest's, where there are two."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.scored and (seconds := run.summary.get("total_training_time")):
            times.setdefault((run.model, run.attention), []).append(seconds)
    return {key: max(mine) / min(mine) for key, mine in times.items() if len(mine) > 1}


def _disturbance(spread: float | None) -> dict:
    return {} if spread is None else {"time_spread": spread, "time_disturbed": spread > DISTURBED}


@contextlib.contextmanager
def noted(out: Path) -> Iterator[None]:
    """Writes into environment.json when the work within began and ended, by which command, and how
    busy the machine was."""
    path = out / "environment.json"
    time = {"command": command(), "started": now(), "load": load()}
    before = read_json(path, Facts, COPY)
    times = [*before.get("times", []), time]
    write_json(path, {**before, "times": times})
    try:
        yield
    finally:
        time |= {"ended": now(), "load_at_end": load()}
        write_json(path, {**before, "times": times})


def last(rows: list[dict], key: str):
    """The latest measured value of a column, or None."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def write_csv(path: Path, columns: list[str], lines: Iterable[dict]) -> None:
    """None becomes an empty field; keys that are no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
