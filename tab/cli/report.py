"""`tab report`, and what `tab compare` shows at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..study.given import use_plugins
from . import options
from .answer import Answer
from .given import load_data, use_threads
from .terminal import bar, command_line, next_command, say


def command(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the comparison.")],
    plugin: options.Plugin = None,
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
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Rebuild tables, pictures, report.md and report.html of a comparison, without training."""
    from ..compare.csv_files import write_csvs
    from ..compare.plan import Plan, plugins_of, results_of
    from ..compare.runs import read_runs

    answer = Answer(quiet=quiet, as_json=as_json)
    use_threads(threads)
    use_plugins(plugin, plugins_of(run), results_of(run))
    plan = Plan.load(run)
    grid = plan.grid
    dataset = load_data(data or grid.data, plan.recipe.data(), kept=not data)
    runs = read_runs(run, grid)
    write_csvs(run, runs)
    write(run, dataset, bench=bench, sweep=sweep)
    tell(answer, run, grid, runs, dataset)


def write(out: Path, dataset, **more: Path | None) -> None:
    """report.md, report.html and the pictures, with a bar."""
    from ..report import write_report

    with bar("report") as show:
        write_report(out, dataset, **more, progress=show)


def tell(answer: Answer, out: Path, grid, runs, dataset) -> None:
    """A table for each model, where the report lies, and the command that comes next."""
    from ..report.tables import ranking
    from .tables import ranked_rows, ranked_table

    ranked = {model: ranking(runs, model) for model in grid.models}
    for model, entries in ranked.items():
        answer.show(ranked_table(entries, f"{model.upper()}, {dataset.note}"))
    page, after = out / "report.html", _next(out, grid, runs, dataset)
    say(f"Report: {page}")
    if after:
        next_command(after)
    answer.end(
        results=out,
        report=page,
        data=dataset.note,
        rows=[row for entries in ranked.values() for row in ranked_rows(entries)],
        failed=[run.id for run in runs if run.status == "failed"],
        next=after,
    )


def _next(out: Path, grid, runs, dataset) -> str | None:
    """What helps the most: more seeds, where there is no verdict yet; then robustness."""
    from ..analysis.robustness_file import read
    from ..compare.runs import ENDED

    done = [run for run in runs if run.status == "done"]
    if any(run.status == "failed" or run.status not in ENDED for run in runs):
        return command_line("compare", "--resume", str(out))
    if grid.seeds == 1:
        names = {"models": ",".join(grid.models), "attentions": ",".join(grid.attentions)}
        recipe = out / "config.toml"
        plugins = [each["name"] for each in grid.plugins]
        more = {"plugin": plugins, "data": grid.data, "seeds": 5}
        return command_line("compare", recipe=recipe, **names, **more)
    if done and not dataset.sequences and "calibration" not in read(done[0].path):
        return command_line("robustness", str(out))
    return None
