"""`tab bench compare`: what changed between two results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .answer import Answer
from .terminal import console


def command(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="JSON file of the earlier results.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="JSON file of the later results.")],
    alpha: Annotated[
        float,
        typer.Option(
            metavar="X",
            callback=options.within(0, 1),
            help="Level of significance, after Holm's correction.",
        ),
    ] = 0.01,
    effect: Annotated[
        float,
        typer.Option(
            metavar="X", callback=options.within(0), help="Smallest relative change that counts."
        ),
    ] = 0.05,
    force: Annotated[
        bool, typer.Option("--force", help="Compare results of two machines nevertheless.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Say what changed between two results, also by the exit code.

    It is 1 where something of TAB's is slower, wrong or gone, and 2 where something of TAB's could
    not be judged."""
    from ..bench.regress import compare, differences
    from ..bench.results import load
    from ..bench.turns import busy
    from .bench_tables import changes_tables

    answer = Answer(quiet=quiet, as_json=as_json)
    (before, old_rows), (after, new_rows) = load(old), load(new)
    machine, other = differences(before, after)
    if machine and not force:
        raise ValueError(
            f"{old} and {new} are not of one machine ({'; '.join(machine)}): measure both on one, "
            "or compare them nevertheless with --force"
        )
    for line in (*machine, *other):
        console.print(line, style="yellow" if line in machine else "dim")
    for path, record in ((old, before), (new, after)):
        if words := busy(record.get("load"), record["environment"]["threads"]):
            console.print(f"{path}: {words}", style="yellow")
    changes = compare(old_rows, new_rows, alpha=alpha, effect=effect)
    answer.show(*changes_tables(changes))
    answer.end(changes=[dataclasses.asdict(change) for change in changes])
    mine = [change for change in changes if change.ours]
    if any(change.bad for change in mine):
        raise typer.Exit(1)
    if any(change.undecidable for change in mine):
        raise typer.Exit(2)
