"""`tab check`: what a recipe's sizes make of its variants, before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import ATTENTIONS, Overrides, RecipeName, layers_of, names_of, read_recipe
from .terminal import console, wide


def check(
    recipe: RecipeName = None,
    models: Annotated[str | None, typer.Option(help="mlp,cnn (default), resnet9, all.")] = None,
    attentions: Annotated[str | None, typer.Option(help=ATTENTIONS)] = None,
    overrides: Overrides = None,
) -> None:
    """Which variants are the same function at a recipe's sizes, and which weights do nothing."""
    from ..checks import check_keys
    from ..layers import layer_names
    from ..models.image_model import STUDY, model_names
    from ..report.same_function import identity_table

    found = read_recipe(recipe or "fair", None, overrides)
    chosen = names_of(models or STUDY, model_names())
    names = layers_of(attentions or "all", found.attentions())
    check_keys("--models", chosen, model_names())
    check_keys("--attentions", names, layer_names())
    result = say(found, chosen, names)
    wide().print(identity_table(result, f"Identity check of {found.name}"))


def say(recipe, models: list[str], attentions: list[str], classes: int = 10):
    """Prints what the check finds, in sentences, and returns it."""
    from ..analysis.same_function import identity
    from ..report.same_function import sentences

    found = identity(recipe, models, attentions, classes=classes)
    for sentence in sentences(found):
        console.print(sentence)
    return found
