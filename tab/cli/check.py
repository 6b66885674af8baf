"""`tab check`: what a recipe's sizes make of its variants, before anything is trained."""

from __future__ import annotations

import dataclasses

from ..study.given import use_plugins
from . import options
from .answer import Answer
from .given import load_data, read_recipe, use_threads
from .terminal import bar, command_line, console, next_command


def command(
    given: options.RecipeName = None,
    models: options.Models = None,
    attentions: options.Attentions = None,
    plugin: options.Plugin = None,
    overrides: options.Overrides = None,
    data: options.ClassesOf = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Say which variants are the same function, and which weights do nothing."""
    from ..recipe.names import variants
    from ..report.same_function import sentences
    from .tables import identity_tables

    answer = Answer(quiet=quiet, as_json=as_json)
    use_threads(threads)
    use_plugins(plugin)
    recipe = read_recipe(given or "fair", overrides=overrides)
    chosen = variants(models, attentions, recipe.attentions())
    classes = len(load_data(data, recipe.data()).classes) if data else 10
    found = checked(recipe, *chosen, classes)
    said = sentences(found)
    for sentence in said:
        answer.show(sentence)
    answer.show(*identity_tables(found))
    names = {"recipe": given, "models": models, "attentions": attentions, "plugin": plugin}
    again = command_line("compare", **names, data=data, set=overrides)
    next_command(again)
    answer.end(
        recipe=recipe.name,
        sentences=said,
        layers=[dataclasses.asdict(layer) for layer in found.layers],
        alike=[dataclasses.asdict(group) for group in found.alike],
        failed=found.failed,
        next=again,
    )


def say_same(recipe, models: list[str], attentions: list[str], classes: int) -> None:
    """Says what the check finds, in sentences."""
    from ..report.same_function import sentences

    for sentence in sentences(checked(recipe, models, attentions, classes)):
        console.print(sentence)


def checked(recipe, models: list[str], attentions: list[str], classes: int):
    """The identity check, with a bar."""
    from ..analysis.same_function import identity

    with bar("check") as show:
        return identity(recipe, models, attentions, classes=classes, progress=show)
