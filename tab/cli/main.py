"""The command line. What needs torch is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .. import __version__
from .bench import app as bench
from .check import check
from .check import say as say_identity
from .options import (
    ATTENTIONS,
    BatchSeeds,
    Compile,
    Cpus,
    Data,
    Device,
    Epochs,
    Gpus,
    Jobs,
    Out,
    Overrides,
    RayAddress,
    RecipeName,
    TensorBoard,
    Threads,
    device_of,
    executor_for,
    layers_of,
    load_data,
    names_of,
    now,
    place_of,
    read_recipe,
    with_compile,
)
from .sweep import app as sweep
from .terminal import Commands, bar, command_line, console, errors, or_resume, pairs, say, wide

app = typer.Typer(
    cls=Commands,
    help="TAB: which attention, how fast, and does it help?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.add_typer(sweep, name="sweep")
app.command()(check)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    if version:
        say(f"tab {__version__}")
        raise typer.Exit()


@app.command()
def compare(
    models: Annotated[str | None, typer.Option(help="mlp,cnn (default), resnet9, all.")] = None,
    attentions: Annotated[str | None, typer.Option(help=ATTENTIONS)] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each; default: 1.")] = None,
    recipe: RecipeName = None,
    data: Data = None,
    epochs: Epochs = None,
    overrides: Overrides = None,
    compiled: Compile = False,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Continue a comparison that was stopped."),
    ] = None,
    device: Device = None,
    jobs: Jobs = 1,
    threads: Threads = None,
    ray: RayAddress = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    batch_seeds: BatchSeeds = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Train every model with every attention and compare them: tables, pictures, a report."""
    from ..compare.driver import compare as run_grid
    from ..compare.plan import Plan

    if tensorboard:  # is it there? before anything is written
        from .tensorboard import Board, summary_writer

        summary_writer()
    overrides = with_compile(overrides, compiled)
    given = {"models": models, "attentions": attentions, "seeds": seeds, "data": data}
    given |= {"device": device, "batch_seeds": batch_seeds}
    given = {key: value for key, value in given.items() if value is not None}
    if resume and out:
        raise ValueError("--resume continues in its own directory: drop --out")
    if resume:
        plan, out = _resumed(resume, given, recipe, epochs, overrides, ray), resume
        plan.configs()
        executor = executor_for(plan.grid.device, jobs, threads, ray, cpus, gpus)
        dataset = load_data(plan.grid.data, kept=True)
        if data:
            plan.moved(out, dataset)
        say(f"Resuming {out}")
    else:
        name = recipe or "fair"
        found = read_recipe(name, epochs, overrides)
        plan = Plan(found, _grid(given, name, ray, found))
        plan.configs()  # every name and option is checked before anything is fetched or written
        executor = executor_for(plan.grid.device, jobs, threads, ray, cpus, gpus)
        dataset = load_data(plan.grid.data)
        out = plan.save(out or now("results"), dataset, new=out is None)
        say_identity(plan.recipe, plan.grid.models, plan.grid.attentions, len(dataset.classes))
    say(f"{out}: {len(plan.grid.cells())} runs on {dataset.note}")
    again = f"tab compare --resume {shlex.quote(str(out))}{' --tensorboard' * tensorboard}"
    with or_resume(again):
        with _watcher() as watcher:
            if tensorboard:
                watcher = Board(out / "tensorboard", watcher)
                say(_see(out))
            runs = run_grid(plan, dataset, out, watcher=watcher, executor=executor)
        path = _report(out, dataset)
    _tables(runs, plan.grid.models, dataset.note)
    say(f"Report: {path}")
    if failed := [run.id for run in runs if run.status == "failed"]:
        say(f"failed: {', '.join(failed)} (error.txt in {out / 'runs'}/…)", style="red", to=errors)
        raise typer.Exit(1)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="mlp, cnn or resnet9.")],
    attention: Annotated[str, typer.Argument(help="The mechanism; `none` is the control.")],
    seed: Annotated[int, typer.Option(help="Of weights, data order and augmentation.")] = 0,
    recipe: RecipeName = None,
    data: Data = None,
    epochs: Epochs = None,
    overrides: Overrides = None,
    compiled: Compile = False,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    device: Device = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Train one model with one attention."""
    from ..files import fresh
    from ..train.loop import train as run_one
    from ..train.run_files import read_run_file
    from .progress import accuracies

    if tensorboard:
        from .tensorboard import Board, summary_writer

        summary_writer()
    if resume and not out:
        raise ValueError("--resume needs --out DIR, the directory of the run to continue")
    if resume and not (out / "run.json").exists():
        raise ValueError(f"{out} holds no run to continue: drop --resume, or give its directory")
    overrides = with_compile(overrides, compiled)
    found = read_recipe(recipe or "fair", epochs, overrides)
    for_ten = found.run_config(model, attention, seed)  # all is checked before anything is fetched
    dataset = load_data(data or "cifar10")
    config = found.run_config(model, attention, seed, classes=len(dataset.classes))
    # Version 0.1 matched sizes for ten classes whatever the data: such a run goes on as it was.
    if resume and (read_run_file(out) or {}).get("config") == for_ten.to_dict():
        config = for_ten
    out = out or fresh(now("runs", suffix=f"_{config.id}"))
    say(f"{out}: {config.id} on {dataset.note}")

    board = None
    if tensorboard:
        board = Board(out / "tensorboard")
        say(_see(out))

    def show(row: dict) -> None:
        if board:
            board.epoch(config, row)
        text = f"epoch {row['epoch']}/{config.train.epochs}  loss {row['train_loss']:.4f}  "
        say(f"{text}{accuracies(row)}  {row['seconds']:.1f} s")

    options = {"seed": seed, "recipe": recipe, "data": data, "epochs": epochs, "out": out}
    again = command_line("train", model, attention, overrides=overrides, device=device, **options)
    with or_resume(f"{again}{' --tensorboard' * tensorboard} --resume"):
        outcome = run_one(
            config, dataset, out, device=device_of(device), resume=resume, on_epoch=show
        )
    pairs(f"{config.id}: {outcome.status}", list(outcome.summary.items()))


@app.command()
def data(
    spec: Annotated[
        str, typer.Argument(help="cifar10, shapes, a folder or an archive.")
    ] = "cifar10",
) -> None:
    """Fetch or import a data set, and say what is in it."""
    from ..data.load import describe

    pairs(spec, describe(load_data(spec)))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A comparison's directory.")],
    data: Data = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="JSON of tab bench, to show in report.html."),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A sweep's directory: its rungs and winners, to show."),
    ] = None,
) -> None:
    """Rebuild tables, pictures, report.md and report.html of a comparison, without training."""
    from ..compare.csv_files import write_csvs
    from ..compare.plan import Grid
    from ..compare.runs import read_runs

    grid = Grid.load(run)
    dataset = load_data(data or grid.data, kept=not data)
    runs = read_runs(run, grid)
    write_csvs(run, runs)
    path = _report(run, dataset, bench=bench, sweep=sweep)
    _tables(runs, grid.models, dataset.note)
    say(f"Report: {path}")


@app.command()
def robustness(
    run: Annotated[Path, typer.Argument(help="The directory of a run, or of a comparison.")],
    data: Data = None,
    images: Annotated[int, typer.Option(min=1, help="Of the test set, for the attacks.")] = 1000,
    cifar10c: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The official .npy files of CIFAR-10-C.")
    ] = None,
    cifar101: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The official .npy files of CIFAR-10.1.")
    ] = None,
    device: Device = None,
) -> None:
    """Noise, corruptions, attacks and calibration of trained models; kept beside each run."""
    from ..analysis.robustness import Options, measure
    from ..compare.runs import trained_runs

    runs, spec = trained_runs(run)
    if data is None and spec.startswith("folder:"):
        raise ValueError(f"{run} was trained on {spec}: give that folder or archive as --data")
    dataset = load_data(data or spec, kept=not data)
    options = Options(images, cifar10c, cifar101)
    for path in runs:
        with bar("robustness") as show, or_resume(_again("robustness", run)):
            found = measure(path, dataset, options, device=device_of(device), progress=show)
        rows = [
            (name, ", ".join(f"{k} {_short(x)}" for k, x in section.items() if k != "settings"))
            for name, section in found.items()
        ]
        pairs(path.name, rows)
    if (run / "config.toml").is_file():
        say(f"For the table: tab report {shlex.quote(str(run))}")


@app.command()
def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Also a table of kernels.")] = False,
) -> None:
    """What is installed and built, and which backend of which operator can run here."""
    from ..doctor.doctor import backends, versions

    pairs("TAB", versions())
    found = backends()
    names = list(next(iter(found.values())))
    table = Table("operator", *names, title="Backends", title_justify="left", title_style="bold")
    why: dict[str, list[str]] = {}
    for op, row in found.items():
        table.add_row(
            op, *(Text("no", "dim") if reason else Text("yes", "green") for reason in row.values())
        )
        for backend, reason in row.items():
            if reason:
                why.setdefault(f"{backend}: {reason.removeprefix(f'{op} ')}", []).append(op)
    wide().print(table)
    for reason, ops in why.items():
        which = "" if len(ops) == len(found) else f" ({', '.join(ops)})"
        say(f"no {reason}{which}", style="dim")
    if kernels:
        from ..doctor.kernel_report import print_kernel_report

        print_kernel_report()


# --- shared ---------------------------------------------------------------------------------------


def _see(out: Path) -> str:
    return f"To watch: tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}"


def _short(value) -> str:
    """Numbers to four digits, in lists too."""
    if isinstance(value, list):
        return " ".join(map(_short, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _again(command: str, run: Path) -> str:
    return f"tab {command} {shlex.quote(str(run))} (with the same options)"


def _grid(given: dict, name: str, ray: str | None, recipe):
    from ..checks import check_keys
    from ..compare.plan import Grid
    from ..layers import layer_names
    from ..models.image_model import STUDY, model_names

    models = names_of(given.get("models", STUDY), model_names())
    attentions = layers_of(given.get("attentions", "all"), recipe.attentions())
    check_keys("--models", models, model_names())
    check_keys("--attentions", attentions, layer_names())
    return Grid(
        recipe=Path(name).stem,
        models=models,
        attentions=attentions,
        seeds=given.get("seeds", 1),
        data=place_of(given.get("data", "cifar10")),
        device=device_of(given.get("device"), ray=ray),
        batch_seeds=given.get("batch_seeds", 1),
    )


def _resumed(resume: Path, given: dict, recipe, epochs, overrides, ray):
    """The stored plan; an option that says otherwise is an error that names both values. The data
    may lie elsewhere now: whether it is the same is seen when it has been read."""
    import dataclasses

    from ..compare.plan import Plan

    plan = Plan.load(resume)
    stored = {**vars(plan.grid), **_listed(plan.grid)}
    was, new = vars(plan.grid), vars(_grid({**stored, **given}, "x", ray, plan.recipe))
    differ = [
        f"--{key.replace('_', '-')}: was {was[key]!r}, now {new[key]!r}"
        for key in given
        if was[key] != new[key] and key != "data"
    ]
    if recipe or epochs or overrides:
        source = recipe or str((resume / "config.toml").resolve())
        other = read_recipe(source, epochs, overrides)
        if recipe and Path(recipe).stem != plan.recipe.name:
            differ.append(f"--recipe: was {plan.recipe.name!r}, now {recipe!r}")
        elif dataclasses.replace(other, name=plan.recipe.name) != plan.recipe:
            differ.append("--recipe, --epochs or --set: the recipe that results is another one")
    if differ:
        raise ValueError(
            f"{resume} was started otherwise ({'; '.join(differ)}): drop the option, or start a "
            "new comparison"
        )
    grid = dataclasses.replace(plan.grid, data=new["data"])
    return dataclasses.replace(plan, grid=grid)


def _listed(grid) -> dict[str, str]:
    return {"models": ",".join(grid.models), "attentions": ",".join(grid.attentions)}


def _report(out: Path, dataset, **more: Path | None) -> Path:
    from ..report import write_report

    with bar("report") as show:
        return write_report(out, dataset, **more, progress=show)


def _watcher():
    from .progress import Bars, Lines

    return Bars(console) if console.is_terminal else contextlib.nullcontext(Lines(wide()))


def _tables(runs, models: list[str], note: str) -> None:
    from ..report.tables import ranking, terminal_table

    for model in models:
        wide().print(terminal_table(ranking(runs, model), f"{model.upper()}, {note}"))


def main() -> None:
    app()
