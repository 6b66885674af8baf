"""`tab check`: what a recipe's sizes make of its variants, before anything is trained."""

from __future__ import annotations

from . import options
from .given import load_data, read_recipe, use_threads, variants
from .terminal import console, wide


def command(
    recipe: options.RecipeName = None,
    models: options.Models = None,
    attentions: options.Attentions = None,
    overrides: options.Overrides = None,
    data: options.ClassesOf = None,
    threads: options.Threads = None,
) -> None:
    """Say which variants are the same function, and which weights do nothing."""
    from ..report.same_function import identity_table

    use_threads(threads)
    found = read_recipe(recipe or "fair", overrides=overrides)
    chosen = variants(models, attentions, found.attentions())
    classes = len(load_data(data, found.data()).classes) if data else 10
    same = say_same(found, *chosen, classes)
    wide().print(identity_table(same, f"Identity check of {found.name}"))


def say_same(recipe, models: list[str], attentions: list[str], classes: int):
    """Prints what the check finds, in sentences, and returns it."""
    from ..analysis.same_function import identity
    from ..report.same_function import sentences

    found = identity(recipe, models, attentions, classes=classes)
    for sentence in sentences(found):
        console.print(sentence)
    return found
