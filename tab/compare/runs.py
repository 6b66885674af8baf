"""What a comparison left on disk of each of its runs: read, never written, and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files.formats import check, reading
from ..train.run_files import again, read_rows, read_run_file
from ..train.training_run import ANSWERS
from .plan import Grid

ENDED = ("done", "diverged", "failed")


@dataclass(frozen=True)
class Run:
    """One cell of the grid: what train() reported, or how it failed."""

    model: str
    attention: str
    seed: int
    path: Path
    status: str  # missing | running | done | diverged | failed
    rows: list[dict] = field(default_factory=list, repr=False)  # one per epoch
    summary: dict = field(default_factory=dict, repr=False)
    error: str = ""
    device: str = ""  # the name of what it ran on
    threads: int = 0  # where known
    load: float | None = None  # load average at its end, where known
    load_at_start: float | None = None
    epochs: int = 0  # that it is to have, where known
    classes: int = 10  # of its data set
    draws: int | None = None  # RunConfig.draws: its seed, if that is not all there is to it

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def state(self) -> str:
        """In words, for a run without a test accuracy of its own."""
        if self.status == "running":
            return f"stopped after epoch {len(self.rows)} of {self.epochs}"
        if self.diverged:
            return "diverged, counted as chance"
        return "not begun" if self.status == "missing" else self.status

    @property
    def scored(self) -> bool:
        """It ended with a test accuracy."""
        return self.status == "done" and self.summary.get("final_test_accuracy") is not None

    @property
    def diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def counts(self) -> bool:
        """In the statistics: a mechanism is not better for those of its runs that diverge."""
        return self.scored or self.diverged

    @property
    def accuracy(self) -> float:
        """Of the final test; of a run that diverged, that of chance."""
        return 1 / self.classes if self.diverged else self.summary["final_test_accuracy"]

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
    """All runs of the comparison in `out`, in the order of its cells."""
    return [read_run(out, *cell) for cell in grid.cells()]


def read_run(out: Path, model: str, attention: str, seed: int) -> Run:
    """One of them; `missing` where it has not begun."""
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
        load_at_start=found["environment"].get("load_at_start"),
        epochs=found["config"]["train"]["epochs"],
        classes=len(found["classes"]),
        draws=seed + found["config"]["attention_options"].get("seed_shift", 0),
    )


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
