"""`tab recipe show`: a recipe with all that it inherits."""

from __future__ import annotations

from typing import Annotated

import typer

from ..study.given import use_plugins
from . import options
from .answer import Answer
from .given import read_recipe
from .terminal import command_group

app = command_group("Show recipes.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Show recipes: how models are built and trained."""


@app.command("show")
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="Name of the recipe, or a .toml file.")
    ],
    overrides: options.Overrides = None,
    plugin: options.Plugin = None,
    as_json: options.Json = False,
) -> None:
    """Print a recipe as TOML that --recipe takes: all that it inherits, and what --set says."""
    answer = Answer(quiet=False, as_json=as_json)
    use_plugins(plugin)
    recipe = read_recipe(name, overrides=overrides)
    answer.text(recipe.to_toml())
    answer.end(name=recipe.name, recipe=recipe.tables)
