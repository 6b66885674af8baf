"""`tab list`: the names that the other commands take."""

from __future__ import annotations

import inspect
import re
from enum import StrEnum
from typing import Annotated

import typer

from . import options
from .answer import Answer, table
from .given import use_plugins


class Kind(StrEnum):
    attentions = "attentions"
    ops = "ops"
    recipes = "recipes"
    models = "models"


def command(
    kind: Annotated[
        Kind | None,
        typer.Argument(help="Kind of what is listed; by default all.", show_choices=True),
    ] = None,
    plugin: options.Plugin = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """List the attentions, ops, recipes or models there are, each with a line about it."""
    answer = Answer(quiet=quiet, as_json=as_json)
    use_plugins(plugin)
    listed = {}
    for each in [kind] if kind else Kind:
        heads, rows = LISTS[each]()
        made = table(each.capitalize(), *heads)
        for row in rows:
            made.add_row(*row)
        answer.show(made)
        keys = [head.lower() for head in heads]
        listed[each.value] = [dict(zip(keys, row, strict=True)) for row in rows]
    answer.end(**listed)


Listed = tuple[tuple[str, ...], list[tuple[str, ...]]]  # heads, rows


def _attentions() -> Listed:
    from ..layers import get_attention, layer_names

    rows = []
    for name in layer_names():
        layer = get_attention(name)
        rows.append((name, "attention" if layer.is_attention else "control", _first_line(layer)))
    return ("Name", "Kind", "What it is"), rows


def _ops() -> Listed:
    from ..bench.registry import benchmark, names
    from ..ops import BACKENDS

    real, rows = [backend for backend in BACKENDS if backend != "auto"], []
    for name in names():
        found = benchmark(name)
        forms = ["causal" if form else "full" for form in found.causal]
        here = [b for b in real if found.op and found.op.why_not(b) is None]
        rows.append((name, ", ".join(forms), ", ".join(here) or "PyTorch's own operators"))
    return ("Name", "Forms", "Backends that run here"), rows


def _recipes() -> Listed:
    from ..recipe.recipe import load_recipe, recipe_names

    return ("Name", "What it is"), [(name, load_recipe(name).title) for name in recipe_names()]


def _models() -> Listed:
    from ..models.backbones import BACKBONES

    rows = [(name, _first_line(backbone)) for name, backbone in BACKBONES.items()]
    return ("Name", "What makes its tokens"), rows


def _first_line(of: type) -> str:
    """The first sentence of what the class says of itself."""
    text = (inspect.getdoc(of) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


LISTS = {
    Kind.attentions: _attentions,
    Kind.ops: _ops,
    Kind.recipes: _recipes,
    Kind.models: _models,
}
