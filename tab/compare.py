"""The grid: models × attentions × seeds, each an independent run, in a directory that can resume.

A kill at any moment loses at most the epoch in progress: config.toml is written before the first
run, each run keeps its own state (tab/run.py), and the CSV files are made from all runs.
"""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import time
from functools import partial
from pathlib import Path

import torch

from . import __version__, checkpoint
from .config import RunConfig
from .data import Dataset, share
from .doctor import available, cpu_name
from .environment import command, environment
from .executor import Executor, InProcess, Shared, Task, run_tasks
from .files import begun, toml, write_json, write_text, write_toml
from .layers import get_attention
from .recipe import Recipe, load_recipe
from .results import ENDED, Grid, Run, made_with, noted, read_run, write_csvs
from .seeds import train_seeds
from .splits import splits
from .train import train

Cell = tuple[str, str, int]  # model, attention, seed
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: a recipe and a grid; config.toml holds both."""

    recipe: Recipe
    grid: Grid

    def configs(self) -> list[RunConfig]:
        """All runs, resolved and checked, in the order of work."""
        if self.grid.seeds < 1:
            raise ValueError(f"seeds = {self.grid.seeds}: a comparison needs at least one")
        if self.grid.batch_seeds < 1:
            raise ValueError(f"batch_seeds = {self.grid.batch_seeds}: 1 is one run at a time")
        for key in ("models", "attentions"):
            names = getattr(self.grid, key)
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{key} = {', '.join(names)!r}: give each name once")
        for attention in self.grid.attentions:
            get_attention(attention)  # an unknown name is an error before anything runs
        return [self.config(*cell) for cell in self.grid.cells()]

    def config(self, model: str, attention: str, seed: int) -> RunConfig:
        return self.recipe.run(model, attention, seed, classes=self.grid.classes)

    def for_classes(self, classes: int) -> Plan:
        """With sizes matched for so many classes."""
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, classes=classes))

    def save(self, out: Path, dataset: Dataset, *, new: bool = False) -> Path:
        """Starts the directory `out`; one that holds a comparison is an error. new: if another has
        taken that name, it gets a number. -> the directory"""
        plan = self.for_classes(len(dataset.classes))
        # Are there images enough?
        train, validation, test = splits(plan.configs()[0], dataset, torch.device("cpu"))
        facts = facts_of(self.grid.device, dataset)
        facts["dataset"] |= {"train": train.samples, "test": test.samples}
        facts["dataset"] |= {"validation": validation.samples if validation else 0}
        facts["overrides"] = self.recipe.overrides
        toml(plan.table())  # an error now if it cannot be kept
        with begun(out, "config.toml", "a comparison", new=new) as out:
            write_json(out / "environment.json", facts)
            write_toml(out / "config.toml", plan.table())
        return out

    def table(self) -> dict:
        """config.toml: the recipe, and the grid below it."""
        return {**self.recipe.tables, "grid": dataclasses.asdict(self.grid)}

    def moved(self, out: Path, dataset: Dataset) -> None:
        """Keeps where the data of the comparison in `out` is now; a ValueError if it is other."""
        made_with(out, dataset)
        with checkpoint.locked(out):
            write_toml(out / "config.toml", self.table())

    @classmethod
    def load(cls, out: Path) -> Plan:
        grid = Grid.load(out)
        recipe = load_recipe((out / "config.toml").resolve())
        return cls(dataclasses.replace(recipe, name=grid.recipe), grid)


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
    shared = share(dataset, plan.grid.data)
    with checkpoint.locked(out), noted(out):
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


def facts_of(device: str, dataset: Dataset) -> dict:
    """environment.json: what the numbers come from."""
    return {
        "tab": __version__,
        "commit": commit(),
        "cpu": cpu_name(),
        **environment(device),
        "backends": available(),
        "command": command(),
        "dataset": {key: getattr(dataset, key) for key in ("name", "note", "fingerprint")}
        | {"train": len(dataset.train), "test": len(dataset.test)}
        | {"classes": len(dataset.classes)},
    }


def commit() -> str | None:
    """The git commit of the source tree; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
