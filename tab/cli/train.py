"""`tab train`: one run."""

from __future__ import annotations

from typing import Annotated

import typer

from ..study.given import device_of, use_plugins
from ..study.watching import watched
from . import options
from .answer import Answer, pairs
from .expected import say_time
from .given import before_work, load_data, read_recipe, use_threads, watchers
from .terminal import command_line, next_command, or_resume, say


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"Name of the model: {options.MODELS}.")
    ],
    attention: Annotated[
        str,
        typer.Argument(
            metavar="ATTENTION", help="Name of the attention mechanism; none is the control."
        ),
    ],
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Seed of the weights, the data order and the augmentation."),
    ] = 0,
    recipe: options.RecipeName = None,
    plugin: options.Plugin = None,
    data: options.Data = None,
    epochs: options.Epochs = None,
    overrides: options.Overrides = None,
    compiled: options.Compile = False,
    out: options.Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    device: options.Device = None,
    threads: options.Threads = None,
    tensorboard: options.TensorBoard = False,
    watch: options.Watch = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Train one model with one attention."""
    answer = Answer(quiet=quiet, as_json=as_json)
    before_work()
    from ..run_config import as_known_now
    from ..train.loop import train
    from ..train.run_files import new_folder, read_run_file
    from .progress import accuracies

    kinds = watched(watch, tensorboard=tensorboard)
    if resume and not out:
        raise ValueError("--resume needs --out DIR, the directory of the run to continue")
    if resume and not (out / "run.json").exists():
        raise ValueError(f"{out} holds no run to continue: drop --resume, or give its directory")
    use_threads(threads)
    use_plugins(plugin)
    found = read_recipe(recipe or "fair", epochs, overrides, compiled=compiled)
    for_ten = found.run_config(model, attention, seed)  # checked before anything is fetched
    dataset = load_data(data or "cifar10", found.data())
    config = found.run_config(model, attention, seed, classes=len(dataset.classes))
    # Version 0.1 matched sizes for ten classes whatever the data: such a run goes on as it was.
    if resume and (was := read_run_file(out)) and as_known_now(was["config"]) == for_ten.to_dict():
        config = for_ten
    out = new_folder(config, out)
    say(f"{out}: {config.id} on {dataset.note}")

    def show(row: dict) -> None:
        told.epoch(config.id, config, row)
        text = f"epoch {row['epoch']}/{config.train.epochs}  loss {row['train_loss']:.4f}  "
        say(f"{text}{accuracies(row)}  {row['seconds']:.1f} s")

    def again() -> str:
        given = {"seed": seed, "recipe": recipe, "plugin": plugin, "data": data, "epochs": epochs}
        given |= {"set": overrides, "compile": compiled, "out": out, "device": device}
        given |= {"threads": threads, "tensorboard": tensorboard, "watch": watch}
        begun = (out / "run.json").exists()  # else there is nothing to resume
        return command_line("train", model, attention, **given, resume=begun)

    study = out.resolve().parent.name
    with or_resume(again):
        if not resume:
            say_time([(config, 1.0)], dataset, device_of(device))
        with watchers(kinds, out, study) as told:
            outcome = train(
                config, dataset, out, device=device_of(device), resume=resume, on_epoch=show
            )
            told.end(config.id, outcome.status, outcome.summary)
    answer.show(pairs(f"{config.id}: {outcome.status}", _facts(outcome.summary, device_of(device))))
    after = None
    if outcome.status == "done" and not dataset.sequences:
        after = command_line("robustness", str(out))
        next_command(after)
    answer.end(run=out, status=outcome.status, summary=outcome.summary, next=after)


def _facts(summary: dict, device: str) -> list[tuple[str, str]]:
    """What there is to read of a run; run.json has all of it."""
    from ..compare.columns import SUMMARY
    from ..report.averages import Mean, shown

    test = summary["final_test_accuracy"]
    facts = [("Test acc.", "–" if test is None else f"{test:.1%}")]
    for column in SUMMARY:
        value = summary.get(column.name)
        if column.title and value is not None and (column.on_cpu or device != "cpu"):
            facts.append((column.title, shown(Mean(value), column.unit)))
    return facts
