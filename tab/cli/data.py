"""`tab data`: what a data set holds."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .answer import Answer, pairs
from .given import load_data, read_recipe
from .terminal import command_line, next_command


def command(
    spec: Annotated[str, typer.Argument(metavar="SET", help=options.SETS)] = "cifar10",
    overrides: options.Overrides = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Fetch or import a data set, and say what is in it."""
    answer = Answer(quiet=quiet, as_json=as_json)
    dataset = load_data(spec, read_recipe("fair", overrides=overrides).data())
    facts = dataset.facts()
    answer.show(pairs(spec, facts))
    more = {"models": "tokens", "recipe": "recall"} if dataset.sequences else {}
    recipe = read_recipe(more.get("recipe", "fair"), overrides=overrides)
    keys = dataset.fitting(recipe.data(), recipe.tables["train"]["batch_size"])
    if dataset.sequences:
        n, usual = dataset.train.tokens.shape[1], recipe.tables["model"]["tokens"]["tokens"]
        keys |= {"model.tokens.tokens": n} if n != usual else {}
    changes = [*(overrides or []), *(f"{k}={v}" for k, v in keys.items())]
    again = command_line("compare", data=spec, **more, set=changes)
    next_command(again)
    answer.end(data=spec, facts=dict(facts), next=again)
