"""What a comparison is to run: a recipe and a grid of models × attentions × seeds.

results/<time>/
    config.toml  environment.json                  written first: enough to resume
    runs/<model>-<attention>-s<seed>/              train()'s own files, or error.txt
    experiment_results.csv  experiment_summary.csv a function of config.toml and runs/ alone
    pictures/*.png  report.md  report.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.load import Dataset
from ..data.splits import split_batches
from ..files import begun, dated, locked
from ..files.formats import check, read_toml, reading, toml, write_json, write_toml
from ..recipe.recipe import Recipe, load_recipe
from ..run_config import RunConfig
from ..train.facts import COPY, facts_of, made_with
from ..train.run_files import has_epochs, read_run_file


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
    tune: int = 0  # configurations tried for each model and mechanism before (tab/study/tuned.py)
    control_seeds: int = 0  # of `none`, where it has more than the others
    # What its runs are made with: their records (tab/plugins.py).
    plugins: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def seeds_of(self, attention: str) -> int:
        return max(self.seeds, self.control_seeds) if attention == "none" else self.seeds

    def cells(self) -> list[tuple[str, str, int]]:
        """(model, attention, seed) in the order of work: a whole table after each seed."""
        most = max(map(self.seeds_of, self.attentions))
        order = [(m, a, s) for s in range(most) for a in self.attentions for m in self.models]
        return [(m, a, s) for m, a, s in order if s < self.seeds_of(a)]

    def groups(self) -> list[list[tuple[str, str, int]]]:
        """The cells that are trained at once, in the order of work."""
        n = self.batch_seeds
        starts = [(m, a, s) for m, a, s in self.cells() if s % n == 0]
        return [[(m, a, i) for i in range(s, min(s + n, self.seeds_of(a)))] for m, a, s in starts]

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: a recipe and a grid; config.toml holds both."""

    recipe: Recipe
    grid: Grid

    def configs(self) -> list[RunConfig]:
        """All runs, resolved and checked, in the order of work."""
        check("grid", vars(self.grid), Grid)
        if self.grid.seeds < 1:
            raise ValueError(f"seeds = {self.grid.seeds}: a comparison needs at least one")
        if self.grid.tune < 0 or self.grid.control_seeds < 0:
            raise ValueError(
                f"tune = {self.grid.tune}, control_seeds = {self.grid.control_seeds}: give a "
                "number from 0 on"
            )
        if self.grid.batch_seeds < 1:
            raise ValueError(f"batch_seeds = {self.grid.batch_seeds}: 1 is one run at a time")
        for key in ("models", "attentions"):
            names = getattr(self.grid, key)
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{key} = {', '.join(names)!r}: give each name once")
        return [self.config(*cell) for cell in self.grid.cells()]

    def config(self, model: str, attention: str, seed: int) -> RunConfig:
        return self.recipe.run_config(model, attention, seed, classes=self.grid.classes)

    def for_classes(self, classes: int) -> Plan:
        """With sizes matched for so many classes."""
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, classes=classes))

    def save(self, out: Path | None, dataset: Dataset) -> Path:
        """Starts the directory `out`; one that holds a comparison is an error. None: a new one in
        results/, named after the time. -> the directory"""
        grid = self.grid
        if grid.control_seeds and (
            "none" not in grid.attentions or grid.control_seeds < grid.seeds
        ):
            raise ValueError(
                f"control_seeds = {grid.control_seeds}: they are of the control, none, which has "
                f"{grid.seeds} like the others, or more; give attentions with none, and at least "
                f"{grid.seeds}, or leave it out"
            )
        plan = self.for_classes(len(dataset.classes))
        # Are there images enough?
        train, validation, test = split_batches(plan.configs()[0], dataset, torch.device("cpu"))
        facts = facts_of(self.grid.device, dataset)
        facts["dataset"] |= {"train": train.samples, "test": test.samples}
        facts["dataset"] |= {"validation": validation.samples if validation else 0}
        facts["overrides"] = self.recipe.overrides
        toml(plan.table())  # an error now if it cannot be kept
        with begun(out or dated("results")) as out:
            write_json(out / "environment.json", facts)
            write_toml(out / "config.toml", plan.table())
        return out

    def table(self) -> dict:
        """config.toml: the recipe, and the grid below it."""
        return {**self.recipe.tables, "grid": dataclasses.asdict(self.grid)}

    def moved(self, out: Path, dataset: Dataset) -> None:
        """Keeps where the data of the comparison in `out` is now; a ValueError if it is other."""
        made_with(out, dataset)
        self.rewrite(out)

    def with_plugins(self, out: Path, records: list[dict[str, str]]) -> Plan:
        """The comparison in `out` with its plugins as they are now, which it keeps."""
        if records == self.grid.plugins:
            return self
        plan = dataclasses.replace(self, grid=dataclasses.replace(self.grid, plugins=records))
        plan.rewrite(out)
        return plan

    def rewrite(self, out: Path) -> None:
        """Replaces the plan of the comparison in `out`."""
        with locked(out):
            write_toml(out / "config.toml", self.table())

    @classmethod
    def load(cls, out: Path) -> Plan:
        grid = Grid.load(out)
        recipe = load_recipe((out / "config.toml").resolve())
        return cls(dataclasses.replace(recipe, name=grid.recipe), grid)


def plugins_of(folder: Path) -> list[dict[str, str]]:
    """The records of what a comparison, or one run, was begun with."""
    if run := read_run_file(folder):
        return [run["plugin"]] if run.get("plugin") else []
    return Grid.load(folder).plugins


def results_of(folder: Path) -> Callable[[str], list[str]]:
    """Of a comparison, a sweep or one run: a plugin's checksum -> the folders with epochs of its
    code."""

    def made_by(sha256: str) -> list[str]:
        runs = [path.parent for path in sorted(folder.rglob("run.json"))]
        runs = [run for run in runs if has_epochs(run)]
        made = {run: read_run_file(run).get("plugin") or {} for run in runs}
        return [str(run) for run, plugin in made.items() if plugin.get("sha256") == sha256]

    return made_by
