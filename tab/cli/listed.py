"""`tab list`: the names that the other commands take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ..study.given import use_plugins
from . import options
from .answer import Answer, table


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
    from ..recipe.names import told_attentions

    return ("Name", "Kind", "What it is"), told_attentions()


def _ops() -> Listed:
    from ..bench.registry import benchmark, names

    rows = []
    for name in names():
        found = benchmark(name)
        forms = ["causal" if form else "full" for form in found.causal]
        here = ", ".join(found.runs_here()) or "PyTorch's own operators"
        rows.append((name, ", ".join(forms), here))
    return ("Name", "Forms", "Backends that run here"), rows


def _recipes() -> Listed:
    from ..recipe.names import told_recipes

    return ("Name", "What it is"), told_recipes()


def _models() -> Listed:
    from ..recipe.names import told_models

    return ("Name", "What makes its tokens"), told_models()


LISTS = {
    Kind.attentions: _attentions,
    Kind.ops: _ops,
    Kind.recipes: _recipes,
    Kind.models: _models,
}
