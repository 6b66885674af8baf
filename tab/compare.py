"""The grid: models × attentions × seeds, each an independent run, in a directory that can resume.

A kill at any moment loses at most the epoch in progress: config.toml is written before the first
run, each run keeps its own state (tab/train.py), and the CSV files are rewritten from all runs.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
from functools import partial
from pathlib import Path

import torch

from . import __version__, checkpoint
from .config import RunConfig
from .data import Dataset, share
from .doctor import available, cpu_name
from .environment import environment
from .executor import Executor, InProcess, Shared, Task, run_tasks
from .layers import get_attention
from .recipe import Recipe, load_recipe
from .results import Grid, Run, read_run, read_runs, write_csvs
from .splits import splits
from .train import train

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
        for key in ("models", "attentions"):
            names = getattr(self.grid, key)
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{key} = {', '.join(names)!r}: give each name once")
        for attention in self.grid.attentions:
            get_attention(attention)  # an unknown name is an error before anything runs
        return [self.recipe.run(*cell) for cell in self.grid.cells()]

    def save(self, out: Path, dataset: Dataset) -> None:
        """Starts the directory `out`; one that holds a comparison is an error."""
        if (out / "config.toml").exists():
            raise ValueError(f"{out} already holds a comparison: resume it, or give another place")
        splits(self.configs()[0], dataset, torch.device("cpu"))  # are there images enough?
        out.mkdir(parents=True, exist_ok=True)
        facts = json.dumps(facts_of(self.grid.device, dataset), indent=1, ensure_ascii=False)
        checkpoint.write_bytes(out / "environment.json", f"{facts}\n".encode())
        text = f"{self.recipe.to_toml()}\n{self.grid.to_toml()}"
        checkpoint.write_bytes(out / "config.toml", text.encode())

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
    the comparison, which can be resumed.
    """
    watcher = watcher or Watcher()
    watcher.start(len(plan.configs()), plan.recipe.tables["train"]["epochs"])
    shared = share(dataset, plan.grid.data)
    with checkpoint.locked(out):
        old, new = [], []
        for config in plan.configs():
            run = read_run(out, config.model, config.attention, config.seed)
            (old if run.status in ("done", "diverged") else new).append(config)
        # What has ended is only checked, for which this process will do.
        for configs, where in ((old, InProcess()), (new, executor)):
            tasks = [
                Task(_run, (config, shared, plan.grid.device), out / "runs" / config.id)
                for config in configs
            ]
            for done in run_tasks(tasks, where, partial(_tell, watcher, configs)):
                config = configs[done.index]
                if isinstance(done.error, OSError) and done.error.errno in DISK:
                    raise done.error
                if done.error:
                    path = out / "runs" / config.id / "error.txt"
                    path.parent.mkdir(parents=True, exist_ok=True)  # if its process never began
                    checkpoint.write_bytes(path, done.traceback.encode())
                write_csvs(out, read_runs(out, plan.grid))
                watcher.end(read_run(out, config.model, config.attention, config.seed))
    return read_runs(out, plan.grid)


def _run(config: RunConfig, dataset: Shared[Dataset], device: str, *, folder: Path, emit) -> None:
    (folder / "error.txt").unlink(missing_ok=True)
    emit(None)
    train(config, dataset.get(), folder, device=device, resume=True, on_epoch=emit)


def _tell(watcher: Watcher, configs: list[RunConfig], index: int, row: dict | None) -> None:
    if row is None:
        watcher.begin(configs[index])
    else:
        watcher.epoch(configs[index], row)


def facts_of(device: str, dataset: Dataset) -> dict:
    """environment.json: what the numbers come from."""
    return {
        "tab": __version__,
        "commit": commit(),
        "cpu": cpu_name(),
        **environment(device),
        "backends": available(),
        "dataset": {key: getattr(dataset, key) for key in ("name", "note", "fingerprint")},
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
