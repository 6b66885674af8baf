"""`tab data`: what a data set holds."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .answer import Answer, pairs
from .given import load_data
from .terminal import command_line, next_command


def command(
    spec: Annotated[str, typer.Argument(metavar="SET", help=options.SETS)] = "cifar10",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Fetch or import a data set, and say what is in it."""
    answer = Answer(quiet=quiet, as_json=as_json)
    dataset = load_data(spec)
    facts = dataset.facts()
    answer.show(pairs(spec, facts))
    more = {"models": "tokens", "recipe": "recall"} if dataset.sequences else {}
    again = command_line("compare", data=spec, **more)
    next_command(again)
    answer.end(data=spec, facts=dict(facts), next=again)
