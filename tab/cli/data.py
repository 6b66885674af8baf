"""`tab data`: what a data set holds."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .given import load_data
from .terminal import pairs


def command(
    spec: Annotated[str, typer.Argument(help=options.SETS)] = "cifar10",
) -> None:
    """Fetch or import a data set, and say what is in it."""
    from ..data.load import describe

    pairs(spec, describe(load_data(spec)))
