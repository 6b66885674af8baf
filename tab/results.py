"""What a comparison leaves on disk, and its two CSV files.

    results/<time>/
        config.toml  environment.json                  written first: enough to resume
        runs/<model>-<attention>-s<seed>/              train()'s own files, or error.txt
        experiment_results.csv  experiment_summary.csv a function of config.toml and runs/ alone
        pictures/*.png  report.md  report.html

The first columns of the CSV files are those of the published study, in its order.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from . import checkpoint
from .data import Dataset
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
]
MEASURED = {  # columns that differ between two equal runs: times, and what follows from them
    *("cumulative_training_time", "total_training_time", "seconds", "images_per_second"),
    "peak_memory_bytes",
}
ANSWERS = "test.npz"  # in a run's directory: predicted and label of each test image
ENDED = ("done", "diverged", "failed")


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

    def cells(self) -> list[tuple[str, str, int]]:
        """(model, attention, seed) in the order of work: a whole table after each seed."""
        seeds = range(self.seeds)
        return [(m, a, s) for s in seeds for a in self.attentions for m in self.models]

    def groups(self) -> list[list[tuple[str, str, int]]]:
        """The cells that are trained at once, in the order of work."""
        n = self.batch_seeds
        starts = [(m, a, s) for m, a, s in self.cells() if s % n == 0]
        return [[(m, a, i) for i in range(s, min(s + n, self.seeds))] for m, a, s in starts]

    def to_toml(self) -> str:
        # JSON's strings, numbers and lists are TOML's.
        lines = (f"{key} = {json.dumps(value)}" for key, value in asdict(self).items())
        return "\n".join(["[grid]", *lines, ""])

    @classmethod
    def load(cls, out: Path) -> Grid:
        path = out / "config.toml"
        if not path.is_file():
            raise ValueError(f"{out} holds no comparison: there is no config.toml in it")
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("grid")
        if not table:
            raise ValueError(f"{path} has no [grid]: it is a recipe, not a comparison")
        return cls(**table)


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
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as found:
                return found["predicted"] == found["label"]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it, and the statistics of this run rest on "
                "its accuracy alone"
            ) from None


def read_runs(out: Path, grid: Grid) -> list[Run]:
    return [read_run(out, *cell) for cell in grid.cells()]


def read_run(out: Path, model: str, attention: str, seed: int) -> Run:
    path = out / "runs" / f"{model}-{attention}-s{seed}"
    cell, failed, run = (model, attention, seed, path), path / "error.txt", path / "run.json"
    if not run.is_file():
        if failed.is_file():
            return Run(*cell, "failed", error=failed.read_text())
        return Run(*cell, "missing")
    found = json.loads(run.read_text())
    status, error = found["status"], ""
    if status == "running" and failed.is_file():
        status, error = "failed", failed.read_text()
    rows = path / "rows.jsonl"
    lines = rows.read_text().splitlines() if rows.is_file() else []
    return Run(
        *cell,
        status,
        rows=[json.loads(line) for line in lines],
        summary=found["summary"],
        error=error,
        device=found["environment"]["device"],
        threads=found["environment"]["threads"],
        epochs=found["config"]["train"]["epochs"],
    )


def trained_runs(folder: Path) -> tuple[list[Path], str]:
    """The finished runs of a comparison, or the one run that `folder` is; and the name of the data.

    A ValueError if there is none, or the data of a run must be named.
    """
    if (folder / "run.json").is_file():
        name = json.loads((folder / "run.json").read_text())["data"]["name"]
        return [folder], name
    grid = Grid.load(folder)
    runs = [run.path for run in read_runs(folder, grid) if run.status == "done"]
    if not runs:
        raise ValueError(f"{folder} has no finished run: resume it with tab compare --resume")
    return runs, grid.data


def made_with(out: Path, dataset: Dataset) -> dict:
    """The facts in environment.json; a ValueError if `out` was made with other data."""
    facts = json.loads((out / "environment.json").read_text())
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
    ended = [run for run in runs if run.status in ENDED]
    found = {model: verdicts(runs, model) for model in {run.model for run in runs}}
    lines = (names(run) | row | {"seed": run.seed} for run in runs for row in run.rows)
    write_csv(out / "experiment_results.csv", NAMES + RESULTS, lines)
    lines = (
        names(run)
        | run.summary
        | {"seed": run.seed, "status": run.status, "error": run.error.strip().split("\n")[-1]}
        | {"final_validation_accuracy": last(run.rows, "validation_accuracy")}
        | (found[run.model][run.attention].columns() if run.scored else {})
        for run in ended
    )
    write_csv(out / "experiment_summary.csv", NAMES + SUMMARY, lines)


def last(rows: list[dict], key: str):
    """The latest measured value of a column, or None."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def write_csv(path: Path, columns: list[str], lines: Iterable[dict]) -> None:
    """None becomes an empty field; keys that are no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    checkpoint.write_bytes(path, text.getvalue().encode())
