"""The grid: models × attentions × seeds, each an independent run, in a directory that can resume.

A kill at any moment loses at most the epoch in progress: config.toml is written before the first
run, each run keeps its own state (tab/train/training_run.py), and the CSV files are made from all
runs.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from ..data.load import Dataset, loader
from ..files import locked, write_text
from ..run_config import RunConfig
from ..tasks.tasks import Executor, InProcess, Shared, Task, run_tasks
from ..train.facts import DISK, made_with, noted
from ..train.loop import train
from ..train.together import train_seeds
from .csv_files import write_csvs
from .plan import Grid, Plan
from .runs import ENDED, Run, read_run

Cell = tuple[str, str, int]  # model, attention, seed


class Watcher:
    """Told what happens; this one keeps silent."""

    def start(self, runs: int, epochs: int) -> None:
        """Before the first run: their number, and the epochs of each."""

    def begin(self, config: RunConfig) -> None:
        """Before a run."""

    def epoch(self, config: RunConfig, row: dict) -> None:
        """After an epoch."""

    def end(self, run: Run) -> None:
        """After a run, however it ended."""


def compare(
    plan: Plan,
    dataset: Dataset,
    out: Path,
    *,
    watcher: Watcher | None = None,
    executor: Executor | None = None,
) -> list[Run]:
    """Runs what of `plan` is not yet done in `out` (which `Plan.save` started).

    An exception ends its own run, recorded as error.txt in the run's directory; a resumed
    comparison tries such a run again. A disk that fails is no matter of one run: that OSError ends
    the comparison, which can be resumed. A ValueError: the data is not what `out` was begun with,
    or what has ended there is damaged, or of another comparison.
    """
    made_with(out, dataset)
    watcher, plan = watcher or Watcher(), plan.for_classes(Grid.load(out).classes)
    watcher.start(len(plan.configs()), plan.recipe.tables["train"]["epochs"])
    shared = Shared(dataset.fingerprint, loader(dataset, plan.grid.data))
    shared.put(dataset)
    with locked(out), noted(out):
        books, old, new = _Books(out, plan.grid), [], []
        for cells in plan.grid.groups():
            ended = all(books.runs[cell].status in ("done", "diverged") for cell in cells)
            (old if ended else new).append([plan.config(*cell) for cell in cells])
        # What has ended is only checked, for which this process will do.
        for groups, where in ((old, InProcess()), (new, executor)):
            tasks = [
                Task(
                    *(_run, (configs, shared, plan.grid.device), out / "runs"),
                    parts=tuple(config.id for config in configs),
                )
                for configs in groups
            ]
            for done in run_tasks(tasks, where, partial(_tell, watcher, groups)):
                if isinstance(done.error, OSError) and done.error.errno in DISK:
                    raise done.error
                if done.error and groups is old:
                    raise done.error
                cells = [(c.model, c.attention, c.seed) for c in groups[done.index]]
                if done.error:
                    for run in map(books.read, cells):
                        if run.status not in ("done", "diverged"):
                            run.path.mkdir(parents=True, exist_ok=True)  # if no process began it
                            write_text(run.path / "error.txt", done.traceback)
                for run in books.ended(cells) if groups is new else map(books.runs.get, cells):
                    watcher.end(run)
        books.write()
    return list(books.runs.values())


class _Books:
    """All runs of a comparison, and the CSV files that are made of them.

    A run is read again when it has ended. The files are made of all runs, and that takes the longer
    the more there are: they are written in a small SHARE of the time, and at the end. After a kill
    a resumed comparison, or `tab report`, makes them from the runs.
    """

    SHARE = 0.005

    def __init__(self, out: Path, grid: Grid):
        self.out, self.begin = out, time.monotonic()
        self.each = self.spent = 0.0  # seconds: for a run the last time, in all
        self.runs = {cell: read_run(out, *cell) for cell in grid.cells()}

    def read(self, cell: Cell) -> Run:
        return read_run(self.out, *cell)

    def ended(self, cells: list[Cell]) -> list[Run]:
        """The runs of `cells`, as they are now."""
        ended = [self.read(cell) for cell in cells]
        self.runs.update(zip(cells, ended, strict=True))
        elapsed = time.monotonic() - self.begin
        if self.spent + self.each * self.count() <= self.SHARE * elapsed:
            self.write()
        return ended

    def write(self) -> None:
        start = time.monotonic()
        write_csvs(self.out, list(self.runs.values()))
        cost = time.monotonic() - start
        self.each = cost / max(1, self.count())
        self.spent += cost

    def count(self) -> int:
        return sum(run.status in ENDED for run in self.runs.values())


def _run(
    configs: list[RunConfig], dataset: Shared[Dataset], device: str, *, folder: Path, emit
) -> None:
    """One run, or several seeds at once; emits (which of them, its row), or None as its row at the
    beginning."""
    outs = [folder / config.id for config in configs]
    for i, out in enumerate(outs):
        (out / "error.txt").unlink(missing_ok=True)
        emit((i, None))
    how = {"device": device, "resume": True}
    if len(configs) == 1:
        train(configs[0], dataset.get(), outs[0], on_epoch=lambda row: emit((0, row)), **how)
    else:
        train_seeds(configs, dataset.get(), outs, on_epoch=lambda *event: emit(event), **how)


def _tell(watcher: Watcher, groups: list[list[RunConfig]], index: int, event: tuple) -> None:
    which, row = event
    if row is None:
        watcher.begin(groups[index][which])
    else:
        watcher.epoch(groups[index][which], row)
