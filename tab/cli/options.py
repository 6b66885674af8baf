"""The options that several commands share, each stated once: its type, its name and its help.

A command takes one as `models: options.Models = None`. What is made of them is in given.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..run_config import MODELS as KINDS


def within(low: float, high: float = math.inf) -> Callable[[float | None], float | None]:
    """The callback of an option that is a finite number of this range: NaN passes for one with a
    `min`, and whatever is compared with it is false."""

    def check(value: float | None) -> float | None:
        if value is not None and (not low <= value <= high or math.isinf(value)):
            to = f"{low:g} or more" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise typer.BadParameter(f"{value:g}: give a number, {to}")
        return value

    return check


# --- what a shell completes, without torch ---


def _models(incomplete: str) -> list[str]:
    """The last name of a list with commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in KINDS if name.startswith(last)]


def _recipes(incomplete: str) -> list[str]:
    folder = Path(__file__).parents[1] / "recipe" / "recipes"
    names = sorted(path.stem for path in folder.glob("*.toml"))
    return [name for name in names if name.startswith(incomplete)]


# --- what is trained ---

MODELS = ", ".join(KINDS)

Models = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help=f"Names of models ({MODELS}), separated by commas; all stands for those of images; "
        "by default mlp,cnn.",
        autocompletion=_models,
    ),
]
Attentions = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Names of attention mechanisms and controls, separated by commas; all (the default) "
        "stands for the mechanisms, ladder for the controls.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        autocompletion=_recipes,
        help="Recipe, by name or as a .toml file: how models are built and trained; by default "
        "fair.",
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Number of epochs of each run; short for --set train.epochs=N."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Key of the recipe and its new value, such as train.lr=0.01; may be given several "
        "times.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the models with torch.compile; short for --set train.compile=true.",
    ),
]

Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE|MODULE",
        help="Python file or module that registers an attention of your own; may be given several "
        "times.",
    ),
]

# --- the data and the results ---

SETS = (
    "Data set: cifar10, shapes, shapes:TRAIN/TEST, recall, copy or needle (also recall:TOKENS), "
    "hf:NAME of Hugging Face, or a folder or an archive (of pictures, or of CIFAR's own files); by "
    "default cifar10."
)
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SET",
        help=SETS,
    ),
]
DataAgain = Annotated[
    str | None,
    typer.Option(
        metavar="SET",
        help="Data set that the results were made with, where it has moved since; by default it "
        "is looked for where it was.",
    ),
]
ClassesOf = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SET",
        help="Data set whose number of classes the sizes are matched for, named as for tab "
        "compare; without it they are matched for ten.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Directory for the results, which must hold none yet; by default one named after "
        "the time.",
    ),
]
ResumeFrom = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        help="Directory of results to continue where they were stopped.",
    ),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Log every epoch for TensorBoard as well.")
]
Watch = Annotated[
    list[str] | None,
    typer.Option(
        "--watch",
        metavar="NAME",
        help="Program to log every run to: tensorboard, wandb, mlflow, or a watcher of an "
        "installed package; may be given several times.",
    ),
]

# --- how it answers ---

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the result alone: no progress, no hints."),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as one JSON object on standard output, and all else on standard "
        "error.",
    ),
]

# --- where it runs ---

Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Device to compute on: cpu, cuda or cuda:1; by default a GPU if there is one.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of runs at once, each in a process of its own. On a GPU they share the "
        "device and its memory, so that the time of one says little about that run alone.",
    ),
]
BatchSeeds = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of seeds of a variant to train at once, as one stacked model. This is meant "
        "for a GPU that a single run leaves idle; a CPU gains little or loses. The time of each "
        "seed is then its share of the whole.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of CPU threads of each process; by default its share of the cores.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|local",
        help="Address of a Ray cluster to run on, or local for one that is started here.",
    ),
]
SlurmSettings = Annotated[
    str | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE|local",
        help="Settings of the SLURM jobs to run as, such as partition=gpu,timeout_min=120, or "
        "local for processes that are started here.",
    ),
]
Cpus = Annotated[
    int | None,
    typer.Option(
        "--cpus-per-task",
        min=1,
        metavar="N",
        help="Number of cores, and of threads, of each run on Ray or SLURM; by default 1.",
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-task",
        callback=within(0),
        metavar="X",
        help="Number of GPUs of each run on Ray, which may be a fraction, or on SLURM; by default "
        "1 with --device cuda, else 0.",
    ),
]
