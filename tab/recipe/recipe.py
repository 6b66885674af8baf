"""Recipes: an experiment as one TOML file, found by name or path, checked key by key.

    base = "fair"                    what this file does not say comes from there
    [train] [data] [evaluate]        see tab/run_config.py
    [model.cnn]                      options of a model
    [attention.local]                options of a mechanism, for both models
    [attention.local.cnn]            options of mechanism, model or training, for this pair alone

A later layer wins: file over base, override over file. What a later layer says of a model, of
training or of a mechanism (model.cnn.hidden, train.lr, attention.local.window_size) also replaces
what an earlier one said of a pair (attention.local.cnn.hidden, .lr, .window_size).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..checks import check_keys, check_option, check_type
from ..files.formats import read_toml, toml
from ..layers import (
    attention_names,
    attention_options,
    get_attention,
    layer_names,
    option_types,
)
from ..run_config import MODELS, SECTIONS, Data, RunConfig, later_options, model_class, options
from .published import published_attentions
from .size_matching import check_match, matched, reference_of

_FOLDER = Path(__file__).parent / "recipes"
OLD_NAMES = {"seed_winners": "published_winners"}  # version 0.1 said so


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `run_config` resolves it for one model, attention and seed."""

    name: str
    tables: dict
    overrides: dict = dataclasses.field(default_factory=dict, compare=False)  # already in tables

    @property
    def title(self) -> str:
        return self.tables.get("title", "")

    def run_config(self, model: str, attention: str, seed: int, *, classes: int = 10) -> RunConfig:
        """One run, resolved; classes: of the data set, for which sizes are matched."""
        kind = model_class(model)
        if model not in self.tables["model"]:
            raise ValueError(
                f"recipe {self.name} has no [model.{model}]: give another, such as "
                f"--recipe {'recall' if model == 'tokens' else 'fair'}"
            )
        published = self.tables["model"][model]["forms"] == "published"
        known = attention_options(attention, published=published)
        own = dict(self.tables["attention"].get(attention, {}))
        pair = own.pop(model, {})
        own = {k: v for k, v in own.items() if k not in MODELS}
        where = f"attention.{attention}{' as published' * published}"
        check_keys(where, own, known)
        check_keys(f"{where}, {model}", pair, [*known, *_fields(kind), *PAIR_TRAIN])
        chosen = {k: v for k, v in {**own, **pair}.items() if k in known}
        if "seed" in known:  # of its random parts
            chosen.setdefault("seed", seed)
        if "seed_shift" in known:  # which RunConfig.draws reads
            chosen.setdefault("seed_shift", known["seed_shift"])
        fields = _fields(kind)
        shape = {**self.tables["model"][model], **{k: v for k, v in pair.items() if k in fields}}
        mixes = get_attention(attention, published=published).mixes_tokens
        if shape.get("pool") == "class" and not mixes:
            raise ValueError(
                f"{model}, {attention}: nothing brings the image to the class token, as this layer "
                f"leaves each token by itself; give --set model.{model}.pool=mean, or leave out "
                f"{attention}"
            )
        if shape["block"] == "pre_norm" and not shape["ffn_ratio"] and "num_experts" in known:
            chosen.setdefault("num_experts", 0)  # experts are an FFN, and these blocks have none
        sections = {name: self.tables[name] for name in SECTIONS}
        sections["train"] = sections["train"] | {k: v for k, v in pair.items() if k in PAIR_TRAIN}
        config = RunConfig(
            recipe=self.name,
            model=model,
            attention=attention,
            seed=check_type("seed", seed, int),
            **{name: options(part, name, sections[name]) for name, part in SECTIONS.items()},
            model_options=options(kind, f"model.{model}", shape),
            attention_options=chosen,
        )
        reference = reference_of(config.model_options.match)
        if reference in ("", attention):
            return config
        return matched(config, self.run_config(model, reference, seed, classes=classes), classes)

    def data(self) -> Data:
        """Which images every variant gets."""
        return options(Data, "data", self.tables["data"])

    def attentions(self) -> list[str]:
        """All that this recipe is about: those of the published table if it trains their forms."""
        if any(table["forms"] == "published" for table in self.tables["model"].values()):
            return published_attentions()
        return attention_names()

    def with_pair(self, model: str, attention: str, table: dict) -> Recipe:
        """This recipe with `table` laid over [attention.<attention>.<model>]."""
        layer = {"attention": {attention: {model: table}}}
        _check(f"{model}, {attention}", layer)
        return dataclasses.replace(self, tables=_merge(self.tables, layer))

    def to_toml(self) -> str:
        """The whole recipe as TOML, without a base: `load_recipe` reads it back as it is."""
        return toml(self.tables)


def recipe_names() -> list[str]:
    """Those that TAB brings along."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(name_or_file: str | Path, overrides: dict[str, object] | None = None) -> Recipe:
    """The recipe called so, or in that file; overrides by dotted key, {"train.lr": 0.01}."""
    path = _find(str(name_or_file), Path.cwd())
    tables = _read(path, seen=())
    for key, value in (overrides or {}).items():
        layer: dict = {}
        inner = layer
        *parents, last = key.split(".")
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = value
        _check_override(key, layer)
        tables = _merge(tables, layer)
    for section, kind in SECTIONS.items():
        tables[section] = {**later_options(kind), **tables[section]}
    for model, table in tables["model"].items():
        tables["model"][model] = {**later_options(MODELS[model]), **table}
    try:
        for section, kind in SECTIONS.items():
            options(kind, section, tables[section])
        for model, table in tables["model"].items():
            options(MODELS[model], f"model.{model}", table)
            check_match(f"model.{model}.match", table["match"], table["block"])
    except ValueError as error:
        raise ValueError(f"recipe {name_or_file}: {error}") from None
    # Under the name as given: a run of the old name goes on as such.
    return Recipe(Path(name_or_file).stem, tables, dict(overrides or {}))


def parse_override(text: str) -> tuple[str, object]:
    """ "train.lr=0.01" -> ("train.lr", 0.01). The value is TOML; a bare word is a string."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key or "\n" in value:
        raise ValueError(f"override {text!r}: write one KEY=VALUE, such as train.lr=0.01")
    with contextlib.suppress(tomllib.TOMLDecodeError):
        return key, tomllib.loads(f"x = {value}")["x"]
    with contextlib.suppress(ValueError):  # .01, which TOML wants a 0 before
        return key, float(value)
    return key, value


# --- files ----------------------------------------------------------------------------------------


def _find(name: str, folder: Path) -> Path:
    if name.endswith(".toml"):
        path = folder / name
        if not path.exists():
            raise ValueError(f"there is no recipe file {path}")
        return path
    name = OLD_NAMES.get(name, name)
    check_keys("recipe (a name, or a file ending in .toml)", [name], recipe_names())
    return _FOLDER / f"{name}.toml"


def _read(path: Path, seen: tuple[Path, ...]) -> dict:
    """The file's tables over those of its base."""
    if path in seen:
        raise ValueError(f"recipe {path}: its base leads back to itself")
    layer = read_toml(path, dict, "mend it, or give another recipe")
    base = layer.pop("base", None)
    layer.pop("grid", None)  # a comparison's config.toml is its recipe, with its grid below
    _check(f"recipe {path}", layer)
    empty: dict[str, dict] = {section: {} for section in (*SECTIONS, "model", "attention")}
    below = _read(_find(base, path.parent), (*seen, path)) if base else empty
    return _merge(below, layer)


def _check_override(key: str, layer: dict) -> None:
    if key == "base":  # whose keys would have to lie below those that are there
        raise ValueError("override base: give the recipe itself, with --recipe")
    try:
        _check("", layer)
    except ValueError as error:  # it begins with ": ", and mostly with the key, which stands once
        said = str(error).removeprefix(": ")
        raise ValueError(f"override {'' if said.startswith(key) else f'{key}: '}{said}") from None


def _check(where: str, layer: dict) -> None:
    """Names and types of what a layer says; what it does not say is checked when all are merged."""
    check_keys(where, layer, ["base", "title", *SECTIONS, "model", "attention"])
    for key, table in layer.items():
        check_type(f"{where}: {key}", table, str if key in ("base", "title") else dict)
    for section, kind in SECTIONS.items():
        check_keys(f"{where}: {section}", layer.get(section, {}), _fields(kind))
    check_keys(f"{where}: model", layer.get("model", {}), MODELS)
    for model, table in layer.get("model", {}).items():
        check_type(f"{where}: model.{model}", table, dict)
        check_keys(f"{where}: model.{model}", table, _fields(MODELS[model]))
    check_keys(f"{where}: attention", layer.get("attention", {}), layer_names())
    for name, table in layer.get("attention", {}).items():
        _check_attention(
            f"{where}: attention.{name}",
            check_type(f"{where}: attention.{name}", table, dict),
            name,
        )


def _check_attention(where: str, table: dict, name: str) -> None:
    """Names and types; the layer checks the values itself."""
    known, hints = attention_options(name), option_types(name)

    def check(where: str, option: str, value: object) -> None:
        check_option(f"{where}.{option}", value, hints.get(option), known[option])

    check_keys(where, table, [*known, *MODELS])
    for key, value in table.items():
        if key not in MODELS:
            check(where, key, value)
            continue
        pair = check_type(f"{where}.{key}", value, dict)
        check_keys(f"{where}.{key}", pair, [*known, *_fields(MODELS[key]), *PAIR_TRAIN])
        for option in set(pair) & set(known):
            check(f"{where}.{key}", option, pair[option])


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


# A comparison trains all its runs for the same number of epochs.
PAIR_TRAIN = [name for name in _fields(SECTIONS["train"]) if name != "epochs"]


def _merge(below: dict, layer: dict) -> dict:
    merged = copy.deepcopy(below)
    for model in MODELS:
        general = {*layer.get("model", {}).get(model, {}), *layer.get("train", {})}
        for name, attention in merged["attention"].items():
            for key in general | layer.get("attention", {}).get(name, {}).keys():
                attention.get(model, {}).pop(key, None)
    _update(merged, layer)
    return merged


def _update(into: dict, layer: dict) -> None:
    for key, value in layer.items():
        if isinstance(value, dict):
            _update(into.setdefault(key, {}), value)
        else:
            into[key] = value
