"""What a sweep is to do, and the files that hold it."""

from __future__ import annotations

import itertools
import random
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import torch

from ..data.load import Dataset
from ..data.splits import split_batches
from ..files import begun, dated, locked, shown
from ..files.formats import read_toml, reading, toml, write_json, write_toml
from ..recipe.recipe import Recipe, load_recipe
from ..run_config import RunConfig
from ..train.facts import facts_of, made_with
from .halving import Budget, brackets
from .record import SAMPLERS
from .space import Space, by_chance, load_space, possible, tables_of, with_chosen
from .storage import needed, without_password
from .trials import Pair

DRAWS = ("own", "common")
WAY_OUT = "put a copy back, or start a new sweep"


class SweepFile(TypedDict):
    """sweep.toml."""

    name: str
    recipe: str
    space: str
    models: list[str]
    attentions: list[str]
    data: str
    device: str
    seed: int
    budget: dict
    sampler: NotRequired[str]
    brackets: NotRequired[int]
    storage: NotRequired[str]
    classes: NotRequired[int]
    draws: NotRequired[str]
    plugins: NotRequired[list[dict[str, str]]]


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep does; DIR/*.toml hold it all."""

    recipe: Recipe  # what is not drawn
    space: Space
    budget: Budget
    models: list[str]
    attentions: list[str]
    data: str
    device: str
    seed: int  # of the draws, and of every run: all configurations see the same batches
    sampler: str = "random"
    brackets: int = 1
    storage: str = ""  # "": the journal file
    classes: int = 10  # of the data set, for which sizes are matched; 0.1 matched for ten whatever
    draws: str = "own"  # of each pair; or "common": configuration i is one and the same for all
    plugins: list[dict[str, str]] = field(default_factory=list)  # their records (tab/plugins.py)

    def pairs(self) -> list[Pair]:
        return [(model, attention) for attention in self.attentions for model in self.models]

    def config(self, pair: Pair, chosen: dict) -> RunConfig:
        """The run of one configuration."""
        recipe = with_chosen(self.recipe, *pair, chosen)
        config = recipe.run_config(*pair, self.seed, classes=self.classes)
        budget = self.budget
        return replace(
            config,
            train=replace(config.train, epochs=budget.epochs[-1]),
            data=replace(config.data, images=budget.images, validation=budget.validation),
            evaluate=replace(config.evaluate, split="validation_only"),
        )

    def samples(self, pair: Pair, count: int) -> list[RunConfig]:
        """Some runs of a pair, by chance: what those that are drawn will cost, on average."""
        draw, axes = random.Random(0), self.space.axes(*pair)
        values = {name: by_chance(axis, draw) for name, axis in axes.items()}
        drawn = (
            self.config(pair, {name: next(some) for name, some in values.items()})
            for _ in range(20 * count)
        )
        return list(itertools.islice(filter(possible, drawn), count))

    def check(self) -> None:
        """Names, axes and brackets, and whether Optuna is there, before anything runs."""
        needed()
        for key in ("models", "attentions"):
            names = getattr(self, key)
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{key} = {', '.join(names)!r}: give each name once")
        for pair in self.pairs():
            self.space.axes(*pair)
        brackets(self.budget, self.brackets)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r}: choose {' or '.join(SAMPLERS)}")
        if self.draws not in DRAWS:
            raise ValueError(f"draws = {self.draws!r}: choose {' or '.join(DRAWS)}")
        spaces = [self.space.axes(*pair) for pair in self.pairs()]
        if self.draws == "common" and any(axes != spaces[0] for axes in spaces):
            raise ValueError(
                f"draws = 'common' needs a space that is the same for all, and {self.space.name} "
                "is not: it names options of a model or of a mechanism"
            )
        if self.storage:
            without_password(self.storage)  # raises what is wrong with it

    def save(self, out: Path | None, dataset: Dataset) -> Path:
        """Starts the directory `out`; one that holds a sweep is an error. None: a new one in
        results/, named after the time. -> the directory"""
        self.check()
        plan = replace(self, classes=len(dataset.classes))
        split_batches(
            plan.config(plan.pairs()[0], {}), dataset, torch.device("cpu")
        )  # images enough?
        toml({"data": self.data})  # an error now if it cannot be kept
        with begun(out or dated("results", prefix="sweep_")) as out:
            write_json(out / "environment.json", facts_of(self.device, dataset))
            write_toml(out / "recipe.toml", self.recipe.tables)
            write_toml(out / "space.toml", tables_of(self.space))
            write_toml(out / "sweep.toml", plan._table(out))
        return out

    def _table(self, out: Path) -> dict:
        name = shown(out.resolve().name)
        if self.storage:  # where others may have a sweep of that name
            name += f"-{uuid.uuid4().hex[:6]}"
        table = {"name": name, "recipe": self.recipe.name, "space": self.space.name}
        keys = ("models", "attentions", "data", "device", "seed", "sampler", "brackets", "classes")
        keys += ("draws", "plugins")
        table |= {key: getattr(self, key) for key in keys}
        # A password does not belong in a file: PGPASSWORD, ~/.pgpass or --storage give it again.
        table["storage"] = without_password(self.storage) if self.storage else ""
        return table | {"budget": asdict(self.budget)}

    def moved(self, out: Path, dataset: Dataset) -> None:
        """Keeps where the data of the sweep in `out` is now; a ValueError if it is other data."""
        made_with(out, dataset)
        with locked(out):
            write_toml(out / "sweep.toml", {**_read(out), "data": self.data})

    def keep_plugins(self, out: Path) -> None:
        """Those of this plan, in the sweep in `out`. The caller holds the lock."""
        write_toml(out / "sweep.toml", {**_read(out), "plugins": self.plugins})

    @staticmethod
    def plugins_of(out: Path) -> list[dict[str, str]]:
        """The records of those that the sweep in `out` trains with, to be loaded before it."""
        return _read(out).get("plugins", [])

    @classmethod
    def load(cls, out: Path) -> SweepPlan:
        table = _read(out)
        table.pop("name")
        budget = table.pop("budget")
        recipe = replace(load_recipe((out / "recipe.toml").resolve()), name=table.pop("recipe"))
        space = replace(load_space(out / "space.toml"), name=table.pop("space"))
        with reading(out / "sweep.toml", WAY_OUT):
            budget = Budget(**{**budget, "epochs": tuple(budget["epochs"])})
            return cls(recipe=recipe, space=space, budget=budget, **table)


def name_of(out: Path) -> str:
    """What its studies are called, even if the directory has been moved."""
    return _read(out)["name"]


def _read(out: Path) -> dict:
    path = out / "sweep.toml"
    if not path.exists():
        raise ValueError(f"{out} holds no sweep: there is no sweep.toml in it")
    return read_toml(path, SweepFile, WAY_OUT)
