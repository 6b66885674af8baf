"""`tab sweep` and `tab sweep show`."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .given import (
    before_work,
    device_of,
    executor_for,
    load_data,
    now,
    place_of,
    read_recipe,
    variants,
)
from .terminal import bar, command_line, errors, or_resume, say, wide
from .watching import watched, watchers

app = typer.Typer(help="Find each mechanism's hyperparameters by successive halving.")


@app.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    models: options.Models = None,
    attentions: options.Attentions = None,
    recipe: options.RecipeName = None,
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
            metavar="postgresql://…",
            help="Database that keeps the record; by default a file in the sweep's directory, "
            "study.journal, does.",
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
) -> None:
    """Draw, train, keep the best and train those on; the winners become a recipe for compare."""
    if context.invoked_subcommand:
        return
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
    if resume:
        plan, out = _resumed(resume, wishes, data, storage), resume
    else:
        plan = _plan(wishes, data or "cifar10", storage or "", ray or slurm)
        plan.check()
    where = executor_for(plan.device, jobs, threads, ray, slurm, cpus, gpus)
    dataset = load_data(plan.data, plan.recipe.data(), kept=bool(resume))
    if resume and data:
        plan.moved(out, dataset)
    if not resume:
        out = plan.save(out or now("results", prefix="sweep_"), dataset, new=out is None)
    say(f"{out}: {what(plan)} on {dataset.note}")
    again = command_line("sweep", "--resume", str(out), watch=watch)
    with or_resume(again), watchers(kinds, out) as told, watching(plan, told) as watcher:
        best = sweep(plan, dataset, out, watcher=watcher, executor=where)
    _show(plan, out)
    if lost := ["-".join(pair) for pair in plan.pairs() if pair not in best]:
        text = f"nothing could be scored for {', '.join(lost)}; see {out / 'runs'}"
        say(text, style="red", to=errors)
        raise typer.Exit(1)
    recipe_path = shlex.quote(str(out / "winners.toml"))
    again = f"tab compare --recipe {recipe_path} --data {shlex.quote(plan.data)}"
    say(f"To compare the winners: {again}")


@app.command("show")
def show(
    run: Annotated[Path, typer.Argument(help="Directory of the sweep.")],
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="postgresql://…",
            help="Database as it was given, with its password.",
        ),
    ] = None,
) -> None:
    """Show a sweep's rungs, winners and what mattered, also while it runs; draw its picture."""
    from ..sweep.plan import SweepPlan

    _show(_with_storage(SweepPlan.load(run), storage), run)


# --- the plan -------------------------------------------------------------------------------------


def _plan(wishes: dict, data: str, storage: str, cluster: str | None):
    from ..layers import attention_names
    from ..sweep.halving import named_budget
    from ..sweep.plan import SweepPlan
    from ..sweep.space import load_space

    models, attentions = variants(wishes.get("models"), wishes.get("attentions"), attention_names())
    keys = ("configurations", "eta", "images", "validation")
    changes = {key: wishes[key] for key in keys if key in wishes}
    if "epochs" in wishes:
        changes["epochs"] = _numbers(wishes["epochs"])
    return SweepPlan(
        recipe=read_recipe(wishes.get("recipe", "fair"), overrides=wishes.get("set")),
        space=load_space(wishes.get("space", "published")),
        budget=dataclasses.replace(named_budget(wishes.get("budget", "published")), **changes),
        models=models,
        attentions=attentions,
        data=place_of(data),
        device=device_of(wishes.get("device"), cluster=cluster),
        seed=wishes.get("seed", 0),
        sampler=wishes.get("sampler", "random"),
        brackets=wishes.get("brackets", 1),
        storage=storage,
    )


def _resumed(resume: Path, wishes: dict, data: str | None, storage: str | None):
    from ..sweep.plan import SweepPlan

    if wishes:
        names = ", ".join(f"--{name}" for name in wishes)
        raise ValueError(f"{resume} goes on as it was started: drop {names}, or start a new one")
    plan = _with_storage(SweepPlan.load(resume), storage)
    return dataclasses.replace(plan, data=place_of(data)) if data else plan


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--epochs {text!r}: give whole numbers, such as 3,5,7") from None


def _with_storage(plan, storage: str | None):
    """The plan with the storage as given, which may add a password but name no other place."""
    from ..sweep.storage import without_password

    if storage is None:
        return plan
    if not plan.storage or without_password(storage) != plan.storage:
        where = plan.storage or "its journal file"
        raise ValueError(f"this sweep is stored in {where}: give that, or drop --storage")
    return dataclasses.replace(plan, storage=storage)


# --- what is shown --------------------------------------------------------------------------------


def what(plan) -> str:
    budget = plan.budget
    epochs = "/".join(map(str, budget.epochs))
    kind = f", {plan.brackets} brackets" if plan.brackets > 1 else ""
    return (
        f"{len(plan.pairs())} × {budget.configurations} configurations, {epochs} epochs, "
        f"η {budget.eta:g}{kind}"
    )


def _show(plan, out: Path) -> None:
    from ..report.sweep import halving_picture, importance_table, rungs_table
    from ..sweep.driver import records, write_results

    rungs, heading = plan.budget.epochs, f"{out.resolve().name}: {what(plan)}"
    with records(plan, out) as found:
        trials = write_results(out, found)
        wide().print(rungs_table(trials, rungs, heading))
        if table := importance_table({p: record.importance() for p, record in found.items()}):
            wide().print(table)
    halving_picture(out / "halving.png", trials, rungs)
    say(f"Picture: {out / 'halving.png'}")


@contextlib.contextmanager
def watching(plan, told):
    """A line for each configuration's rung; on a terminal a bar over the epochs of the step too.
    told: the programs that its runs are logged to."""
    from ..sweep.watched import WatchedSweep
    from .sweep_progress import RungLines

    with bar("sweep") as show_bar:
        yield WatchedSweep(plan, told, RungLines(wide(), plan.budget.epochs, show_bar))
