"""`tab lengths`: several comparisons, each at another number of tokens, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import say


def command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Directories of comparisons, one for each number of tokens."),
    ] = None,
    steps: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file of tab bench steps --patch, for the time and memory of a step.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the tables and the figure.")
    ] = Path("lengths"),
) -> None:
    """Accuracy, time and memory against the number of tokens, from results on the disk.

    Images give lengths.csv, .md and .png; generated tasks (recall, copy, needle) give tasks.csv and
    .md, which say what each mechanism cannot do by construction, and whether it was found so."""
    from ..data.sequences import named
    from ..report.lengths import costs, joined, trained, write_lengths
    from ..report.tasks import answers, write_tasks

    if not runs and not steps:
        raise ValueError("nothing to show: give directories of comparisons, --steps FILE, or both")
    found = trained(runs) if runs else []
    images = [each for each in found if not named(each.data)]
    paths = []
    if images or steps:
        paths += write_lengths(out, joined(images, costs(steps) if steps else {}))
    if tasks := [each for each in found if named(each.data)]:
        paths += write_tasks(out, answers(tasks))
    say(f"Wrote {', '.join(map(str, paths))}")
