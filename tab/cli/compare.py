"""`tab compare`: the whole comparison, from the grid to the report."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..study.given import executor_for, say_mended, use_plugins
from ..study.watching import watched
from . import check, options, report
from .answer import Answer
from .expected import say_time
from .given import before_work, load_data, read_recipe, watchers
from .terminal import command_line, errors, or_resume, say


def command(
    models: options.Models = None,
    attentions: options.Attentions = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of runs of each variant; by default 1."),
    ] = None,
    control_seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of runs of the control, to which every row is compared: √k times --seeds "
            "for k rows is best; by default --seeds.",
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Number of configurations (learning rate, weight decay, rate of the gates) that "
            "are tried for every row, the same for all, before the comparison; 0 (the default) "
            "trains every row as the recipe says.",
        ),
    ] = None,
    recipe: options.RecipeName = None,
    plugin: options.Plugin = None,
    data: options.Data = None,
    epochs: options.Epochs = None,
    overrides: options.Overrides = None,
    compiled: options.Compile = False,
    out: options.Out = None,
    resume: options.ResumeFrom = None,
    device: options.Device = None,
    jobs: options.Jobs = 1,
    threads: options.Threads = None,
    ray: options.RayAddress = None,
    slurm: options.SlurmSettings = None,
    cpus: options.Cpus = None,
    gpus: options.Gpus = None,
    batch_seeds: options.BatchSeeds = None,
    tensorboard: options.TensorBoard = False,
    watch: options.Watch = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Train every model with every attention and compare them: tables, pictures, a report."""
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work()
    from ..compare.driver import compare
    from ..compare.plan import Plan, plugins_of, results_of
    from ..study.tuned import sweep_of
    from ..study.watched import WatchedComparison
    from .progress import watcher

    kinds = watched(watch, tensorboard=tensorboard)
    records = use_plugins(plugin, *((plugins_of(resume), results_of(resume)) if resume else ()))
    given = {
        **{"models": models, "attentions": attentions, "seeds": seeds, "data": data},
        **{"device": device, "batch_seeds": batch_seeds},
        **{"control_seeds": control_seeds, "tune": tune},
    }
    given = {key: value for key, value in given.items() if value is not None}
    if resume and out:
        raise ValueError("--resume continues in its own directory: drop --out")
    changes = {"epochs": epochs, "overrides": overrides, "compiled": compiled}
    if resume:
        plan, out = _resumed(resume, given, recipe, changes, ray or slurm), resume
        say_mended(plan.grid.plugins, records, partial(say, style="yellow", to=errors))
        plan = plan.with_plugins(out, records)
        plan.configs()
        executor = executor_for(plan.grid.device, jobs, threads, ray, slurm, cpus, gpus)
        dataset = load_data(plan.grid.data, plan.recipe.data(), kept=True)
        if data:
            plan.moved(out, dataset)
        say(f"Resuming {out}")
    else:
        found = read_recipe(recipe or "fair", **changes)
        plan = Plan(found, _grid({**given, "plugins": records}, found, ray or slurm))
        plan.configs()  # every name and option is checked before anything is fetched or written
        executor = executor_for(plan.grid.device, jobs, threads, ray, slurm, cpus, gpus)
        dataset = load_data(plan.grid.data, plan.recipe.data())
        if plan.grid.tune:
            sweep_of(plan, dataset).check()
        out = plan.save(out, dataset)
    again = command_line("compare", "--resume", str(out), tensorboard=tensorboard, watch=watch)
    with or_resume(lambda: again):
        _say_what(plan, dataset, out, new=not resume)
        if plan.grid.tune:
            plan = _tuned(plan, dataset, out, executor, kinds, cluster=bool(ray or slurm))
        _say_time(plan, dataset, out, executor, cluster=bool(ray or slurm))
        with watchers(kinds, out) as told, watcher() as shown:
            watched_too = WatchedComparison(told, shown)
            runs = compare(plan, dataset, out, watcher=watched_too, executor=executor)
        report.write(out, dataset)
    report.tell(answer, out, plan.grid, runs, dataset)
    if failed := [run.id for run in runs if run.status == "failed"]:
        text = f"failed: {', '.join(failed)}; each one's error.txt in {out / 'runs'} says why"
        say(text, style="red", to=errors)
        raise typer.Exit(1)


def _grid(given: dict, recipe, cluster: str | None):
    from ..study.plans import grid_of

    usual = {"models": None, "attentions": None, "data": "cifar10", "device": None, "seeds": 1}
    return grid_of(recipe, cluster=cluster, **{**usual, **given})


def _say_what(plan, dataset, out: Path, *, new: bool) -> None:
    grid = plan.grid
    if new:
        check.say_same(plan.recipe, grid.models, grid.attentions, len(dataset.classes))
    say(f"{out}: {len(grid.cells())} runs on {dataset.note}")


def _tuned(plan, dataset, out: Path, executor, kinds: dict[str, type], *, cluster: bool):
    """The comparison with the configuration that won for each row."""
    from ..study.tuned import FOLDER, sweep_of, tuned
    from . import sweep

    search = sweep_of(plan, dataset)
    say(f"{out / FOLDER}: {sweep.what(search)}")
    sweep.say_sweep_time(search, dataset, out / FOLDER, executor, cluster=cluster)
    study = f"{out.resolve().name}/{FOLDER}"
    with (
        watchers(kinds, out / FOLDER, study) as told,
        sweep.watching(search, told) as watcher,
    ):
        return tuned(plan, dataset, out, watcher=watcher, executor=executor)


def _say_time(plan, dataset, out: Path, executor, *, cluster: bool) -> None:
    """How long what is still to be trained will take."""
    from ..compare.runs import read_runs

    def left(run) -> float:
        if run.status in ("done", "diverged"):
            return 0.0
        return 1 - len(run.rows) / epochs

    epochs, runs = plan.recipe.tables["train"]["epochs"], read_runs(out, plan.grid)
    configs = plan.for_classes(len(dataset.classes)).configs()
    parts = [(config, left(run)) for config, run in zip(configs, runs, strict=True)]
    say_time(parts, dataset, plan.grid.device, executor, cluster=cluster)


def _resumed(resume: Path, given: dict, recipe: str | None, changes: dict, cluster: str | None):
    """The stored plan; an option that says otherwise is an error that names both values. The data
    may lie elsewhere now: whether it is the same is seen when it has been read."""
    from ..compare.plan import Plan
    from ..study.tuned import FOLDER, begun_with

    plan = Plan.load(resume)
    was = vars(plan.grid)
    stored = {key: value for key, value in was.items() if key != "recipe"}
    stored |= {"models": ",".join(was["models"]), "attentions": ",".join(was["attentions"])}
    new = vars(_grid({**stored, **given}, plan.recipe, cluster))
    differ = [
        f"--{key.replace('_', '-')}: was {was[key]!r}, now {new[key]!r}"
        for key in given
        if was[key] != new[key] and key != "data"
    ]
    if recipe and Path(recipe).stem != plan.recipe.name:
        differ.append(f"--recipe: was {plan.recipe.name!r}, now {recipe!r}")
    elif recipe or any(changes.values()):
        was = begun_with(resume, plan)
        stored = resume / FOLDER / "recipe.toml"
        stored = stored if stored.exists() else resume / "config.toml"
        other = read_recipe(recipe or str(stored.resolve()), **changes)
        other = dataclasses.replace(other, name=was.name)
        # By its runs: a recipe has since got models and options that this comparison has none of.
        runs, others = (dataclasses.replace(plan, recipe=x).configs() for x in (was, other))
        if runs != others:
            differ.append("--recipe, --epochs, --set or --compile: the recipe is then another one")
    if differ:
        raise ValueError(
            f"{resume} was started otherwise ({'; '.join(differ)}): drop the option, or start a "
            "new comparison"
        )
    return dataclasses.replace(plan, grid=dataclasses.replace(plan.grid, data=new["data"]))
