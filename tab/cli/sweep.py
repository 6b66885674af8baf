"""`tab sweep` and `tab sweep show`."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..study.given import executor_for, say_mended, use_plugins
from ..study.watching import watched
from . import options
from .answer import Answer
from .expected import say_time
from .given import before_work, load_data, watchers
from .sweep_plan import kept_plugins, plan_of, resumed, with_storage
from .terminal import (
    bar,
    command_group,
    command_line,
    console,
    errors,
    next_command,
    or_resume,
    say,
)

app = command_group("Find each mechanism's hyperparameters by successive halving.")


SAMPLES = 3  # configurations of each pair whose step is timed before a sweep begins


@app.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    models: options.Models = None,
    attentions: options.Attentions = None,
    recipe: options.RecipeName = None,
    plugin: options.Plugin = None,
    data: options.Data = None,
    overrides: options.Overrides = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Search space, by name or as a .toml file: published (the default) or small.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Budget: quick, published (the default), medium or large."
        ),
    ] = None,
    configurations: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of configurations drawn for each model and attention, in place of the "
            "budget's.",
        ),
    ] = None,
    epochs: Annotated[
        str | None,
        typer.Option(
            metavar="3,5,7",
            help="Epochs at which the rungs end, each counted from the first epoch.",
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(metavar="X", help="Factor η of the halving: the best 1/η of a rung go on."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of training images, stratified by class; 0 stands for all."
        ),
    ] = None,
    validation: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of training images held out to choose by."),
    ] = None,
    brackets: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of Hyperband's brackets; 1 (the default) is plain successive halving.",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Sampler of the configurations: random (the default) or tpe."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Seed of the draws, the weights and the batches; by default 0."
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database that keeps the record, such as postgresql://host/name; by default "
            "study.journal, a file in the sweep's directory, does.",
        ),
    ] = None,
    out: options.Out = None,
    resume: options.ResumeFrom = None,
    device: options.Device = None,
    jobs: options.Jobs = 1,
    threads: options.Threads = None,
    ray: options.RayAddress = None,
    slurm: options.SlurmSettings = None,
    cpus: options.Cpus = None,
    gpus: options.Gpus = None,
    watch: options.Watch = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Draw, train, keep the best and train those on; the winners become a recipe for compare."""
    if context.invoked_subcommand:
        return
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work()
    from ..sweep.driver import sweep

    kinds = watched(watch)

    # What a sweep is begun with; it goes on as it was begun.
    wishes = {
        **{"models": models, "attentions": attentions, "recipe": recipe, "set": overrides},
        **{"space": space, "budget": budget, "configurations": configurations, "epochs": epochs},
        **{"eta": eta, "images": images, "validation": validation, "brackets": brackets},
        **{"sampler": sampler, "seed": seed, "out": out, "device": device},
    }
    wishes = {name: value for name, value in wishes.items() if value not in (None, [])}
    records = use_plugins(plugin, *(kept_plugins(resume) if resume else ()))
    if resume:
        plan, out = resumed(resume, wishes, data, storage), resume
        say_mended(plan.plugins, records, partial(say, style="yellow", to=errors))
        plan = dataclasses.replace(plan, plugins=records)
    else:
        plan = plan_of(wishes, data or "cifar10", storage or "", ray or slurm, records)
        plan.check()
    where = executor_for(plan.device, jobs, threads, ray, slurm, cpus, gpus)
    dataset = load_data(plan.data, plan.recipe.data(), kept=bool(resume))
    if resume and data:
        plan.moved(out, dataset)
    if not resume:
        out = plan.save(out, dataset)
    with or_resume(lambda: command_line("sweep", "--resume", str(out), watch=watch)):
        say(f"{out}: {what(plan)} on {dataset.note}")
        say_sweep_time(plan, dataset, out, where, cluster=bool(ray or slurm))
        with watchers(kinds, out) as told, watching(plan, told) as watcher:
            best = sweep(plan, dataset, out, watcher=watcher, executor=where)
    _show(answer, plan, out)
    if lost := ["-".join(pair) for pair in plan.pairs() if pair not in best]:
        text = f"nothing could be scored for {', '.join(lost)}; see {out / 'runs'}"
        say(text, style="red", to=errors)
        raise typer.Exit(1)


@app.command("show")
def show(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the sweep.")],
    plugin: options.Plugin = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database as it was given, with its password.",
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show a sweep's rungs, winners and what mattered, also while it runs; draw its picture."""
    from ..sweep.plan import SweepPlan

    answer = Answer(quiet=quiet, as_json=as_json)
    use_plugins(plugin, *kept_plugins(run))
    _show(answer, with_storage(SweepPlan.load(run), storage), run)


# --- what is shown --------------------------------------------------------------------------------


def what(plan) -> str:
    budget = plan.budget
    epochs = "/".join(map(str, budget.epochs))
    kind = f", {plan.brackets} brackets" if plan.brackets > 1 else ""
    return (
        f"{len(plan.pairs())} × {budget.configurations} configurations, {epochs} epochs, "
        f"η {budget.eta:g}{kind}"
    )


def _show(answer: Answer, plan, out: Path) -> None:
    """The table, the picture, and the command that comes next."""
    from ..report.sweep import halving_picture
    from ..sweep.driver import records, write_results
    from .tables import sweep_rows, sweep_table

    rungs, heading = plan.budget.epochs, f"{out.resolve().name}: {what(plan)}"
    with records(plan, out) as found:
        trials, shares = write_results(out, found), {}
        with bar("importance") as show:
            for i, (pair, record) in enumerate(found.items()):
                show(i, len(found), "-".join(pair))
                shares[pair] = record.importance()
        answer.show(sweep_table(trials, rungs, heading, shares))
    halving_picture(out / "halving.png", trials, rungs)
    say(f"Picture: {out / 'halving.png'}")
    recipe, again = out / "winners.toml", command_line("sweep", "--resume", str(out))
    if recipe.exists():
        again = command_line(
            *("compare", f"--recipe={recipe}", f"--data={plan.data}", "--seeds=5"),
            models=",".join(plan.models),
            attentions=",".join(plan.attentions),
            plugin=[each["name"] for each in plan.plugins],
        )
    next_command(again)
    rows = [{**row, "importance": shares[pair]} for pair, row in sweep_rows(trials).items()]
    answer.end(sweep=out, picture=out / "halving.png", rows=rows, next=again)


def say_sweep_time(plan, dataset, out: Path, executor, *, cluster: bool) -> None:
    """How long all of it takes, unless it has ended in `out`; what has been trained of it before is
    not taken off."""
    from ..sweep.halving import brackets

    if (out / "winners.toml").exists():
        return
    ends, epochs = plan.budget.epochs, 0
    for bracket in brackets(plan.budget, plan.brackets):
        sizes = bracket.sizes(plan.budget, bracket.configurations)
        for rung, size in enumerate(sizes, bracket.first):
            epochs += size * (ends[rung] - (ends[rung - 1] if rung > bracket.first else 0))
    plan = dataclasses.replace(plan, classes=len(dataset.classes))
    share, samples = epochs / ends[-1], {pair: plan.samples(pair, SAMPLES) for pair in plan.pairs()}
    parts = [(config, share / len(some)) for some in samples.values() for config in some]
    say_time(parts, dataset, plan.device, executor, cluster=cluster)


@contextlib.contextmanager
def watching(plan, told):
    """A line for each configuration's rung; on a terminal a bar over the epochs of the step too.
    told: the programs that its runs are logged to."""
    from ..study.watched import WatchedSweep
    from ..sweep.driver import SweepWatcher
    from .sweep_progress import RungLines

    with bar("sweep") as show_bar:
        shown = SweepWatcher() if console.quiet else RungLines(plan.budget.epochs, show_bar)
        yield WatchedSweep(plan, told, shown)
