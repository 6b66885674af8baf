"""What a sweep is to do, and the files that hold it."""

from __future__ import annotations

import json
import tomllib
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from . import checkpoint
from .compare import facts_of
from .config import RunConfig
from .data import Dataset
from .halving import Budget, brackets
from .layers import get_attention
from .recipe import Recipe, load_recipe
from .space import Space, load_space, with_chosen
from .splits import splits
from .storage import without_password
from .study import SAMPLERS

Pair = tuple[str, str]  # (model, attention)


@dataclass(frozen=True)
class Plan:
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

    def pairs(self) -> list[Pair]:
        return [(model, attention) for attention in self.attentions for model in self.models]

    def config(self, pair: Pair, chosen: dict) -> RunConfig:
        """The run of one configuration."""
        config = with_chosen(self.recipe, *pair, chosen).run(*pair, self.seed)
        budget = self.budget
        return replace(
            config,
            train=replace(config.train, epochs=budget.epochs[-1]),
            data=replace(config.data, images=budget.images, validation=budget.validation),
            evaluate=replace(config.evaluate, split="validation_only"),
        )

    def check(self) -> None:
        """Names, axes and brackets, before anything runs."""
        for key in ("models", "attentions"):
            names = getattr(self, key)
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{key} = {', '.join(names)!r}: give each name once")
        for pair in self.pairs():
            get_attention(pair[1])
            self.space.axes(*pair)
        brackets(self.budget, self.brackets)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler = {self.sampler!r}: choose {' or '.join(SAMPLERS)}")
        if self.storage:
            without_password(self.storage)  # raises what is wrong with it

    def save(self, out: Path, dataset: Dataset) -> None:
        """Starts the directory `out`; one that holds a sweep is an error."""
        if (out / "sweep.toml").exists():
            raise ValueError(f"{out} already holds a sweep: resume it, or give another place")
        self.check()
        splits(self.config(self.pairs()[0], {}), dataset, torch.device("cpu"))  # images enough?
        out.mkdir(parents=True, exist_ok=True)
        facts = json.dumps(facts_of(self.device, dataset), indent=1, ensure_ascii=False)
        checkpoint.write_bytes(out / "environment.json", f"{facts}\n".encode())
        checkpoint.write_bytes(out / "recipe.toml", self.recipe.to_toml().encode())
        checkpoint.write_bytes(out / "space.toml", self.space.to_toml().encode())
        name = out.resolve().name
        if self.storage:  # where others may have a sweep of that name
            name += f"-{uuid.uuid4().hex[:6]}"
        table = {"name": name, "recipe": self.recipe.name, "space": self.space.name}
        keys = ("models", "attentions", "data", "device", "seed", "sampler", "brackets")
        table |= {key: getattr(self, key) for key in keys}
        # A password does not belong in a file: PGPASSWORD, ~/.pgpass or --storage give it again.
        table["storage"] = without_password(self.storage) if self.storage else ""
        lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        lines += ["", "[budget]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in asdict(self.budget).items()]
        checkpoint.write_bytes(out / "sweep.toml", "\n".join([*lines, ""]).encode())

    @classmethod
    def load(cls, out: Path) -> Plan:
        table = _read(out)
        table.pop("name")
        budget = table.pop("budget")
        recipe = load_recipe((out / "recipe.toml").resolve())
        return cls(
            **table
            | {
                "recipe": replace(recipe, name=table["recipe"]),
                "space": replace(load_space(out / "space.toml"), name=table["space"]),
                "budget": Budget(**{**budget, "epochs": tuple(budget["epochs"])}),
            }
        )


def name_of(out: Path) -> str:
    """What its studies are called, even if the directory has been moved."""
    return _read(out)["name"]


def _read(out: Path) -> dict:
    path = out / "sweep.toml"
    if not path.is_file():
        raise ValueError(f"{out} holds no sweep: there is no sweep.toml in it")
    return tomllib.loads(path.read_text(encoding="utf-8"))
