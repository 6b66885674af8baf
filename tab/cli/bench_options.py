"""Options that several commands of `tab bench` take, and what they say of a busy machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import within
from .terminal import errors


def _writable(out: Path | None) -> Path | None:
    """Before anything is measured, which may take hours."""
    if out is not None:  # --help does not wait for torch
        from ..bench.results import check_place

        check_place(out)
    return out


Ops = Annotated[
    str,
    typer.Option(metavar="A,B", help="Names of ops (tab list ops), separated by commas, or all."),
]
On = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Device to measure on: cpu or cuda.")
]
Budget = Annotated[
    float,
    typer.Option(
        metavar="X",
        callback=within(0),
        help="Seconds of measuring for each contestant and direction.",
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of processes, which take turns; tab bench compare needs at least 2.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=_writable,
        help="JSON file for the results, with a page and a picture beside it.",
    ),
]
Contestants = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help="Contestants beside TAB's own, by the beginnings of their names, or all.",
    ),
]


def beginnings(contestants: str) -> tuple[str, ...] | None:
    """Of the names of contestants; None for all."""
    return None if contestants == "all" else tuple(contestants.split(","))


def entered(prefixes: tuple[str, ...] | None, name: str) -> bool:
    return prefixes is None or name == "tab" or name.startswith(prefixes)


def chosen(given: str, known: tuple[str, ...] | list[str], option: str) -> list[str]:
    from ..bench import registry

    return registry.chosen(given.split(","), known, option)


def warn(load) -> None:
    import torch

    from ..bench.turns import busy

    if words := busy(load.record(), torch.get_num_threads()):
        errors.print(f"{words}: times are longer than the code's own", style="yellow")
