"""`tab bench history`: TAB's own times over commits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .answer import Answer
from .terminal import say


def command(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="JSON files of tab bench --out, the oldest first."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file for a chart of the same.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Show results of several machines nevertheless.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show how TAB's own times moved from one commit to the next, each over a fixed operation."""
    from ..bench.history import history
    from ..bench.page import write_history
    from .bench_tables import history_tables

    answer = Answer(quiet=quiet, as_json=as_json)
    lines = history(files, force=force)
    answer.show(*history_tables(lines))
    if out:
        write_history(out, lines)
        say(f"Page: {out}")
    answer.end(out=out, lines=[dataclasses.asdict(line) for line in lines])
