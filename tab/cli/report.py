"""`tab report`, and what `tab compare` shows at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .given import load_data, use_threads
from .terminal import bar, say, wide


def command(
    run: Annotated[Path, typer.Argument(help="Directory of the comparison.")],
    data: options.DataAgain = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with JSON files of tab bench, whose tables report.html then shows.",
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory of a sweep, whose rungs and winners the report then shows.",
        ),
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Rebuild tables, pictures, report.md and report.html of a comparison, without training."""
    from ..compare.csv_files import write_csvs
    from ..compare.plan import Plan
    from ..compare.runs import read_runs

    use_threads(threads)
    plan = Plan.load(run)
    grid = plan.grid
    dataset = load_data(data or grid.data, plan.recipe.data(), kept=not data)
    runs = read_runs(run, grid)
    write_csvs(run, runs)
    path = write(run, dataset, bench=bench, sweep=sweep)
    print_tables(runs, grid.models, dataset.note)
    say(f"Report: {path}")


def write(out: Path, dataset, **more: Path | None) -> Path:
    """report.md, report.html and the pictures, with a bar. -> the path of report.md"""
    from ..report import write_report

    with bar("report") as show:
        return write_report(out, dataset, **more, progress=show)


def print_tables(runs, models: list[str], note: str) -> None:
    from ..report.tables import ranking, terminal_table

    for model in models:
        wide().print(terminal_table(ranking(runs, model), f"{model.upper()}, {note}"))
