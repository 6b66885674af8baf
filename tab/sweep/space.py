"""What a sweep may choose: for each option a list of values or a range, as TOML.

    [train]                          lr = { low = 0.001, high = 0.01, log = true }
    [model]                          hidden = [256, 512]
    [model.cnn]                      of one model
    [attention]                      num_heads = [2, 4, 8]; of every mechanism that has the option
    [attention.local]                of one mechanism
    [attention.local.cnn]            of one pair: of mechanism, model or training

The narrower table wins. An option that a mechanism or a model does not have is not drawn for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checks import check_keys, check_type
from ..files.formats import read_toml, toml
from ..recipe.names import layers_of, own_options
from ..recipe.recipe import PAIR_TRAIN, Recipe
from ..recipe.size_matching import parameters_of
from ..run_config import MODELS, RunConfig
from .halving import OLD_NAMES

_FOLDER = Path(__file__).parent / "spaces"


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones if both ends are. log: evenly in ln x."""

    low: float
    high: float
    log: bool = False


Axis = list | Range


@dataclass(frozen=True)
class Space:
    """A checked search space; `axes` says what is drawn for one model and mechanism."""

    name: str
    tables: dict

    def axes(self, model: str, attention: str) -> dict[str, Axis]:
        """Option -> what it is drawn from, in the order training, model, mechanism."""
        narrow = self.tables["attention"].get(attention, {})
        pair = narrow.get(model, {})
        general = self.tables["model"]
        layers = (
            (self.tables["train"], pair),
            (general, general.get(model, {}), pair),
            (self.tables["attention"], narrow, pair),
        )
        axes: dict[str, Axis] = {}
        for known, tables in zip(own_options(model, attention), layers, strict=True):
            merged = {k: v for table in tables for k, v in table.items() if k in known}
            if twice := sorted(set(axes) & set(merged)):
                raise ValueError(
                    f"{attention} has an option {twice[0]!r} like its model or training"
                )
            axes |= merged
        return {name: axis for name, axis in axes.items() if not isinstance(axis, dict)}

    def to_toml(self) -> str:
        return toml(tables_of(self))


def space_names() -> list[str]:
    """Those that TAB brings along."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_space(name_or_file: str | Path) -> Space:
    """The space called so, or in that file, with every name and value checked."""
    name = str(name_or_file)
    if name.endswith(".toml"):
        path = Path(name)
        if not path.exists():
            raise ValueError(f"there is no file {path} with a search space")
    else:
        name = OLD_NAMES.get(name, name)
        check_keys("space (a name, or a file ending in .toml)", [name], space_names())
        path = _FOLDER / f"{name}.toml"
    tables = read_toml(path, dict, "mend it, or give another space")
    return Space(path.stem, _checked(f"space {path}", tables))


def size(axes: dict[str, Axis]) -> float:
    """How many configurations there are, possible or not."""
    return math.prod(len(axis) if isinstance(axis, list) else math.inf for axis in axes.values())


def by_chance(axis: Axis, draw: random.Random) -> Iterator[object]:
    """Values of the axis without end; of a list each as often as the others."""
    while isinstance(axis, list):
        yield from draw.sample(axis, len(axis))
    whole = isinstance(axis.low, int) and isinstance(axis.high, int)
    while True:
        if axis.log:
            value = math.exp(draw.uniform(math.log(axis.low), math.log(axis.high)))
        else:
            value = draw.uniform(axis.low, axis.high)
        yield round(value) if whole else value


def with_chosen(recipe: Recipe, model: str, attention: str, chosen: dict) -> Recipe:
    """The recipe with one configuration of a pair. A width that was chosen is not matched away."""
    match = {"match": ""} if "hidden" in chosen else {}
    return recipe.with_pair(model, attention, {**match, **chosen})


def possible(config: RunConfig) -> bool:
    """Whether this model can be built: its own checks decide (heads that divide the width, …)."""
    try:
        parameters_of(config)
    except ValueError:
        return False
    return True


# --- checks ---------------------------------------------------------------------------------------


def _checked(where: str, tables: dict) -> dict:
    check_keys(where, tables, ["title", "train", "model", "attention"])
    mechanisms, models = layers_of("all,ladder"), list(MODELS)
    shapes = {model: own_options(model, "none")[1] for model in models}
    options = {name: own_options(models[0], name)[2] for name in mechanisms}
    read = {"title": check_type(f"{where}: title", tables.get("title", ""), str)}
    for section in ("train", "model", "attention"):
        read[section] = {}
        check_type(f"{where}: {section}", tables.get(section, {}), dict)
    for key, value in tables.get("train", {}).items():
        check_keys(f"{where}: train", [key], PAIR_TRAIN)
        read["train"][key] = _axis(f"{where}: train.{key}", value)
    for key, value in tables.get("model", {}).items():
        check_keys(f"{where}: model", [key], [*itertools.chain(*shapes.values()), *models])
        read["model"][key] = (
            _table(f"{where}: model.{key}", value, shapes[key])
            if key in models
            else _axis(f"{where}: model.{key}", value)
        )
    for key, value in tables.get("attention", {}).items():
        name = f"{where}: attention.{key}"
        check_keys(f"{where}: attention", [key], [*itertools.chain(*options.values()), *mechanisms])
        if key not in mechanisms:
            read["attention"][key] = _axis(name, value)
            continue
        check_type(name, value, dict)
        own = {k: v for k, v in value.items() if k not in models}
        read["attention"][key] = _table(name, own, options[key])
        for model in [k for k in value if k in models]:
            known = [*options[key], *shapes[model], *PAIR_TRAIN]
            read["attention"][key][model] = _table(f"{name}.{model}", value[model], known)
    return read


def _table(where: str, table: object, known) -> dict[str, Axis]:
    check_keys(where, check_type(where, table, dict), known)
    return {key: _axis(f"{where}.{key}", value) for key, value in table.items()}


def _axis(where: str, value: object) -> Axis:
    if isinstance(value, list):
        plain = all(type(x) in (bool, int, float, str) for x in value)
        for x in value:
            if type(x) is float and not math.isfinite(x):
                raise ValueError(f"{where} = {value!r}: give finite numbers")
        if not value or not plain or len(set(map(repr, value))) < len(value):
            raise ValueError(f"{where} = {value!r}: give each value once, and at least one")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where} = {value!r}: give a list, or {{ low = …, high = … }}")
    check_keys(where, value, ["low", "high", "log"])
    if not {"low", "high"} <= set(value):
        raise ValueError(f"{where}: a range needs low and high")
    low, high = (check_type(f"{where}.{key}", value[key], int | float) for key in ("low", "high"))
    log = check_type(f"{where}.log", value.get("log", False), bool)
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        rule = "0 < low < high" if log else "low < high"
        raise ValueError(f"{where}: from {low} to {high}: {rule} must hold")
    return Range(low, high, log)


def tables_of(space: Space) -> dict:
    """As the file has them."""
    return _plain(space.tables)


def _plain(tables: dict) -> dict:
    plain = {}
    for key, value in tables.items():
        if isinstance(value, Range):
            plain[key] = dataclasses.asdict(value)
        else:
            plain[key] = _plain(value) if isinstance(value, dict) else value
    return plain
