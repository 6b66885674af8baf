"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from .terminal import bar

Data = Annotated[
    str | None,
    typer.Option(
        help="cifar10, shapes, shapes:TRAIN/TEST, or a folder or archive of pictures or of CIFAR."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME|FILE", help="A recipe; default: fair."),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Sets train.epochs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe; can be repeated."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Models through torch.compile: train.compile=true.")
]
Out = Annotated[Path | None, typer.Option(help="The new directory for the results.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; default: a GPU if there is one."),
]

ATTENTIONS = (
    "A list a,b,c; in it, all (the default) stands for the attentions, ladder for the controls."
)

TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Also log each epoch for TensorBoard.")
]

Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        help="Runs at once, in as many processes. On a GPU they share it, its memory too: the "
        "times of each run then say nothing of it alone.",
    ),
]
BatchSeeds = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Train N seeds of a variant at once, as one stacked model: meant for a GPU that one "
        "run leaves idle; a CPU gains little or loses. The times of each are then its share.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of each process; default: its share of the cores."),
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS|local", help="Run on a Ray cluster, or one made here."),
]
Cpus = Annotated[
    int | None,
    typer.Option("--cpus-per-task", min=1, help="With --ray: cores, and threads, of each run."),
]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-task", min=0, help="With --ray; default: 1 on --device cuda, else 0."),
]


def read_recipe(name: str, epochs: int | None, overrides: list[str] | None):
    from ..recipe.recipe import load_recipe, parse_override

    changes = dict(map(parse_override, overrides or []))
    if epochs is not None:
        if changes.get("train.epochs", epochs) != epochs:
            raise ValueError(f"--epochs {epochs} and --set train.epochs disagree: give one")
        changes["train.epochs"] = epochs
    return load_recipe(name, changes)


def with_compile(overrides: list[str] | None, compiled: bool) -> list[str] | None:
    return [*(overrides or []), "train.compile=true"] if compiled else overrides


def now(folder: str, prefix: str = "", suffix: str = "") -> Path:
    """A directory called by the time."""
    return Path(folder) / f"{prefix}{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}"


def place_of(data: str) -> str:
    """A folder or archive by its full path, so that work can resume from anywhere."""
    return data if _named(data) or not Path(data).exists() else str(Path(data).resolve())


def _named(data: str) -> bool:
    return data.split(":")[0] in ("cifar10", "shapes")


def names_of(text: str, everything: list[str]) -> list[str]:
    return everything if text == "all" else [name.strip() for name in text.split(",")]


def layers_of(text: str, everything: list[str]) -> list[str]:
    """Attentions and controls: a list of names, in it `all` stands for `everything` and `ladder`
    for those controls that are not named before it."""
    from ..layers import control_names

    groups = {"all": everything, "ladder": control_names()}
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        names += [x for x in groups[name] if x not in names] if name in groups else [name]
    return names


def device_of(name: str | None, *, ray: str | None = None) -> str:
    import torch

    if ray is not None and name == "cuda":
        return name  # of the cluster's nodes: this one may have none
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(0, device=name)  # raises a RuntimeError that says what is wrong with it
    return name


def executor_for(device: str, jobs: int, threads, ray, cpus, gpus):
    """Where tasks run that are for `device`, as the options say."""
    from ..tasks.choose import executor

    if ray is None and (cpus, gpus) != (None, None):
        raise ValueError("--cpus-per-task and --gpus-per-task are for --ray: give it too")
    if ray is not None and device.startswith("cuda:"):
        raise ValueError(f"--device {device}: Ray chooses the GPU of each task; give --device cuda")
    if gpus is None:
        gpus = 1 if device.startswith("cuda") else 0
    return executor(jobs, ray, threads=threads, cpus=cpus or 1, gpus=gpus)


def load_data(spec: str, *, kept: bool = False):
    """kept: `spec` is what a result was made with."""
    from ..data.load import load_dataset

    if kept and not _named(spec) and not Path(spec).exists():
        raise ValueError(f"the data is no longer at {spec}: say where it is now, with --data")
    with bar("data") as show:
        return load_dataset(spec, progress=show)
