"""`tab lengths`: several comparisons, each at another number of tokens, in one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .answer import Answer
from .terminal import say


def command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR", help="Directories of comparisons, one for each number of tokens."
        ),
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
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Accuracy, time and memory against the number of tokens, from results on the disk.

    Images give lengths.csv, .md and .png; generated tasks (recall, copy, needle) give tasks.csv and
    .md, which say what each mechanism cannot do by construction, and whether it was found so."""
    answer = Answer(quiet=quiet, as_json=as_json)
    from ..report.lengths import COLUMNS, costs, joined, trained, write_lengths
    from ..report.tasks import answers, write_tasks
    from .tables import lengths_table, tasks_table

    if not runs and not steps:
        raise ValueError("nothing to show: give directories of comparisons, --steps FILE, or both")
    found = trained(runs) if runs else []
    images = [each for each in found if not each.task]
    paths, lines, solved = [], [], []
    if images or steps:
        lines = joined(images, costs(steps) if steps else {})
        paths += write_lengths(out, lines)
        answer.show(lengths_table(lines))
    if tasks := [each for each in found if each.task]:
        solved = answers(tasks)
        paths += write_tasks(out, solved)
        answer.show(tasks_table(solved))
    say(f"Wrote {', '.join(map(str, paths))}")
    rows = [dict.fromkeys(COLUMNS) | line for line in lines]
    answer.end(out=out, files=paths, rows=rows, tasks=[asdict(each) for each in solved])
