"""`tab sweep` and `tab sweep show`."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    ATTENTIONS,
    Cpus,
    Data,
    Device,
    Gpus,
    Jobs,
    Out,
    Overrides,
    RayAddress,
    RecipeName,
    Threads,
    device_of,
    executor_for,
    layers_of,
    load_data,
    names_of,
    now,
    place_of,
    read_recipe,
)
from .terminal import bar, errors, or_resume, say, wide

app = typer.Typer(help="Find each mechanism's hyperparameters by successive halving.")


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    models: Annotated[str | None, typer.Option(help="mlp,cnn (default), resnet9, all.")] = None,
    attentions: Annotated[str | None, typer.Option(help=ATTENTIONS)] = None,
    recipe: RecipeName = None,
    data: Data = None,
    overrides: Overrides = None,
    space: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="What is drawn; default: published. Or: small."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="quick, published (the default), medium or large.")
    ] = None,
    configurations: Annotated[
        int | None, typer.Option(help="n, drawn for each model and attention.")
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(metavar="3,5,7", help="Of each rung, in all.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="η: 1/η of a rung go on.")] = None,
    images: Annotated[int | None, typer.Option(help="To train on, stratified; 0: all.")] = None,
    validation: Annotated[int | None, typer.Option(help="Held out to choose by.")] = None,
    brackets: Annotated[
        int | None, typer.Option(help="1 (the default): halving; more: Hyperband's.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="random (the default) or tpe.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of draws, weights and batches.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="postgresql://…", help="Default: study.journal in the directory."),
    ] = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue a sweep that was stopped.")
    ] = None,
    device: Device = None,
    jobs: Jobs = 1,
    threads: Threads = None,
    ray: RayAddress = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
) -> None:
    """Draw, train, keep the best and train those on; the winners become a recipe for compare."""
    given = {name: value for name, value in locals().items() if name != "context"}
    if context.invoked_subcommand:
        return
    from ..sweep.driver import sweep as run_sweep
    from ..sweep.plan import SweepPlan

    free = ("resume", "data", "storage", "jobs", "threads", "ray", "cpus", "gpus")
    if resume:
        if fixed := [
            key for key, value in given.items() if key not in free and value not in (None, [])
        ]:
            names = ", ".join("--set" if key == "overrides" else f"--{key}" for key in fixed)
            raise ValueError(
                f"{resume} goes on as it was started: drop {names}, or start a new one"
            )
        plan = _with_storage(SweepPlan.load(resume), storage)
        plan = dataclasses.replace(plan, data=place_of(data)) if data else plan
        out = resume
    else:
        plan = _plan(given)
        plan.check()
    where = executor_for(plan.device, jobs, threads, ray, cpus, gpus)
    dataset = load_data(plan.data, kept=bool(resume))
    if resume and data:
        plan.moved(out, dataset)
    if not resume:
        out = plan.save(out or now("results", prefix="sweep_"), dataset, new=out is None)
    say(f"{out}: {_what(plan)} on {dataset.note}")
    with or_resume(f"tab sweep --resume {shlex.quote(str(out))}"), _watcher(plan) as watcher:
        best = run_sweep(plan, dataset, out, watcher=watcher, executor=where)
    _show(plan, out)
    if lost := [f"{model}-{attention}" for model, attention in plan.pairs()
                if (model, attention) not in best]:  # fmt: skip
        text = f"nothing could be scored for: {', '.join(lost)} ({out}/runs/…)"
        say(text, style="red", to=errors)
        raise typer.Exit(1)
    recipe_path = shlex.quote(str(out / "winners.toml"))
    command = f"tab compare --recipe {recipe_path} --data {shlex.quote(plan.data)}"
    say(f"Compare the winners: {command}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A sweep's directory.")],
    storage: Annotated[str | None, typer.Option(help="As it was given, with its password.")] = None,
) -> None:
    """Rungs, survivors, winners and what mattered, of a sweep that runs or ran; and its picture."""
    from ..sweep.plan import SweepPlan

    _show(_with_storage(SweepPlan.load(run), storage), run)


def _plan(given: dict):
    from ..checks import check_keys
    from ..layers import attention_names, layer_names
    from ..models.image_model import STUDY, model_names
    from ..sweep.halving import named_budget
    from ..sweep.plan import SweepPlan
    from ..sweep.space import load_space

    models = names_of(given["models"] or STUDY, model_names())
    attentions = layers_of(given["attentions"] or "all", attention_names())
    check_keys("--models", models, model_names())
    check_keys("--attentions", attentions, layer_names())
    keys = ("configurations", "eta", "images", "validation")
    changes = {key: given[key] for key in keys if given[key] is not None}
    if given["epochs"]:
        changes["epochs"] = _numbers(given["epochs"])
    budget = dataclasses.replace(named_budget(given["budget"] or "published"), **changes)
    recipe = read_recipe(given["recipe"] or "fair", None, given["overrides"])
    return SweepPlan(
        recipe=recipe,
        space=load_space(given["space"] or "published"),
        budget=budget,
        models=models,
        attentions=attentions,
        data=place_of(given["data"] or "cifar10"),
        device=device_of(given["device"], ray=given["ray"]),
        seed=given["seed"] or 0,
        sampler=given["sampler"] or "random",
        brackets=1 if given["brackets"] is None else given["brackets"],
        storage=given["storage"] or "",
    )


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


def _what(plan) -> str:
    budget = plan.budget
    epochs = "/".join(map(str, budget.epochs))
    kind = f", {plan.brackets} brackets" if plan.brackets > 1 else ""
    return (
        f"{len(plan.pairs())} × {budget.configurations} configurations, {epochs} epochs, "
        f"η {budget.eta:g}{kind}"
    )


def _show(plan, out: Path) -> None:
    from ..report.halving import halving_picture, importance_table, rungs_table
    from ..sweep.driver import records, write_trials

    with records(plan, out) as found:
        wide().print(rungs_table(found, plan.budget, f"{out.resolve().name}: {_what(plan)}"))
        if table := importance_table(found):
            wide().print(table)
        write_trials(out / "trials.csv", found)
        halving_picture(out / "halving.png", found, plan.budget)
    say(f"Picture: {out / 'halving.png'}")


@contextlib.contextmanager
def _watcher(plan):
    """A line for each configuration's rung; on a terminal a bar over the epochs of the step too."""
    from ..sweep.driver import SweepWatcher

    class Lines(SweepWatcher):
        def step(self, bracket, rung, entries):
            self.rung, self.runs, self.ended = rung, len(entries), 0
            before = plan.budget.epochs[rung - 1] if rung > bracket.first else 0
            self.total = len(entries) * (plan.budget.epochs[rung] - before)
            self.before, self.done = before, {}
            if entries:
                epochs = plan.budget.epochs[rung]
                self.print(f"rung {rung + 1}, to epoch {epochs}: {self.runs} configurations")

        def epoch(self, pair, entry, row):
            self.done[pair, entry.configuration] = row["epoch"] - self.before
            what = f"rung {self.rung + 1}: {self.ended} of {self.runs}"
            bars(sum(self.done.values()), self.total, what)

        def end(self, pair, ended):
            self.ended += 1
            score = f"validation {ended.score:.1%}" if ended.status == "done" else ended.status
            name = f"{pair[0]}-{pair[1]}-c{ended.entry.configuration:03}"
            text = f"  [{self.ended}/{self.runs}] {name}: {score}, {ended.seconds:.1f} s"
            self.print(f"{text}  {ended.error}".rstrip(), "red" if ended.score is None else None)

        def print(self, text, style=None):
            wide().print(text, style=style)

    with bar("sweep") as bars:
        yield Lines()
