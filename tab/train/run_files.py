"""run.json and rows.jsonl: what a run left on disk, read and checked."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Literal, NotRequired, TypedDict

from ..files import Corrupt, dated, folder, refuse
from ..files.formats import read_json, read_lines, reading
from ..run_config import RunConfig
from .facts import DataFacts, Machine


class Summary(TypedDict):
    """Of run.json: what is read of it by name."""

    num_epochs: int
    final_test_accuracy: float | None
    total_training_time: float | None
    images_per_second: float | None


class RunMachine(Machine):
    """What the run was computed on; `load` is of its end."""

    load_at_start: NotRequired[float | None]


class RunFile(TypedDict):
    """run.json: one run, with all that it takes to build its model again."""

    config: dict
    status: Literal["running", "done", "diverged"]
    data: DataFacts
    classes: list[str]
    environment: RunMachine
    summary: Summary
    together: NotRequired[list[str] | None]
    plugin: NotRequired[dict[str, str] | None]


def new_folder(config: RunConfig, out: Path | None = None) -> Path:
    """Makes the directory of a run: `out`, or one in runs/."""
    if out:
        refuse(out, ("config.toml", "sweep.toml"))
    return folder(out) if out else dated("runs", suffix=f"_{config.id}")


def read_run_file(path: Path) -> RunFile | None:
    """run.json of the run in the directory `path`; None if there is none yet."""
    file = path / "run.json"
    return read_json(file, RunFile, again(path)) if file.exists() else None


def has_epochs(path: Path) -> bool:
    """Whether an epoch of the run in the directory `path` has ended."""
    kept = ("rows.jsonl", "checkpoint.pt", "group.pt")  # whichever a kill left
    return any((path / name).exists() for name in kept)


def read_config(path: Path) -> RunConfig:
    """The options of the run in the directory `path`, which has begun."""
    with reading(path / "run.json", again(path)):
        return RunConfig.from_dict(read_run_file(path)["config"])


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
