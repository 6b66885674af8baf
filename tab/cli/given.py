"""What the shared options come to: the recipe, the variants, the data, where it all runs."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from .. import machine
from .terminal import bar, errors, say

# Turns of libgomp's waiting loop, of which its own default is 300,000. Beside one, two and four
# other processes on two cores a training step took 1.8, 2.2 and 3.2 times its quiet time, with the
# default 2.7, 3.5 and 5.5; on a quiet machine it cost nothing (0.99, median of five pairs).
SPINS = "4000"


def use_plugins(given: list[str] | None, kept: list[dict[str, str]] | None = None) -> list[dict]:
    """Loads what --plugin names, before any name of an attention is looked up. kept: the records of
    what a study was begun with, which has to be that still. -> the records"""
    from .. import plugins

    if kept is None:
        found = [plugins.find(name) for name in given or []]
    else:
        found = plugins.again(kept, given or [])
    plugins.load(found)
    return [plugin.record() for plugin in found]


def plugins_of(folder: Path) -> list[dict[str, str]]:
    """The records of what a comparison, or one run, was begun with."""
    from ..compare.plan import Grid
    from ..train.run_files import read_run_file

    if run := read_run_file(folder):
        return [run["plugin"]] if run.get("plugin") else []
    return Grid.load(folder).plugins


def read_recipe(
    name: str,
    epochs: int | None = None,
    overrides: list[str] | None = None,
    *,
    compiled: bool = False,
):
    from ..recipe.recipe import load_recipe, parse_override

    changes = dict(map(parse_override, overrides or []))
    short = {"train.epochs": ("--epochs", epochs), "train.compile": ("--compile", compiled or None)}
    for key, (option, value) in short.items():
        if value is None:
            continue
        if changes.setdefault(key, value) != value:
            raise ValueError(f"{option} and --set {key}={changes[key]} disagree: give one")
    return load_recipe(name, changes)


def variants(
    models: str | None, attentions: str | None, everything: list[str]
) -> tuple[list[str], list[str]]:
    """The names that --models and --attentions choose. everything: what `all` attentions are."""
    from ..checks import check_keys
    from ..layers import layer_names
    from ..models.image_model import STUDY, model_names
    from ..run_config import MODELS

    mine = _names(models or STUDY, {"all": model_names()})
    layers = layers_of(attentions or "all", everything)
    check_keys("--models", mine, MODELS)
    try:
        check_keys("--attentions", layers, layer_names())
    except ValueError as error:
        raise ValueError(f"{error}; --plugin FILE loads one of your own") from None
    return mine, layers


def layers_of(text: str, everything: list[str]) -> list[str]:
    """Attentions and controls: `all` stands for `everything`, `ladder` for the controls."""
    from ..layers import control_names

    return _names(text, {"all": everything, "ladder": control_names()})


def _names(text: str, groups: dict[str, list[str]]) -> list[str]:
    """A list of names; the name of a group stands for those of it that are not named before."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        names += [x for x in groups[name] if x not in names] if name in groups else [name]
    return names


def now(folder: str, prefix: str = "", suffix: str = "") -> Path:
    """A directory named after the time."""
    return Path(folder) / f"{prefix}{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}"


def place_of(data: str) -> str:
    """A folder or archive by its full path, so that work can resume from anywhere."""
    from ..data.huggingface import PREFIX, Source

    if data.startswith(PREFIX):
        return Source.of(data).spec
    return data if _named(data) or not Path(data).exists() else str(Path(data).resolve())


def _named(data: str) -> bool:
    from ..data.load import NAMED

    return data.split(":")[0] in NAMED


def load_data(spec: str, images=None, *, kept: bool = False):
    """images: a recipe's or run's [data], which says their size; by default 32. kept: `spec` is
    what a result was made with."""
    from ..data.load import load_dataset

    if kept and not _named(spec) and not Path(spec).exists():
        raise ValueError(f"the data is no longer at {spec}: say where it is now, with --data")
    with bar("data") as show:
        how = {"size": images.size, "fit": images.fit} if images else {}
        return load_dataset(spec, **how, progress=show)


def device_of(name: str | None, *, cluster: str | None = None) -> str:
    import torch

    if cluster is not None and name == "cuda":
        return name  # of the cluster's nodes: this one may have none
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(0, device=name)  # raises a RuntimeError that says what is wrong with it
    return name


def before_work(*, trains: bool = True) -> None:
    """To be called before torch is imported. The threads of a training wait for one another in a
    short spin and then asleep, unless the environment says otherwise: on a machine where something
    else runs, threads that spin on hold up the very one that they wait for. A busy machine is told
    of."""
    if trains and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    load, count = machine.load(), machine.cores()
    if load is not None and load > count:
        text = f"The machine is busy (load {load:.1f} on {count} cores): times will mean little."
        say(text, style="yellow", to=errors)


def use_threads(threads: int | None) -> None:
    """In this process; None leaves torch's own choice."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def executor_for(
    device: str,
    jobs: int,
    threads: int | None,
    ray: str | None,
    slurm: str | None,
    cpus: int | None,
    gpus: float | None,
):
    """Where tasks for `device` run, as the options say."""
    from ..tasks.choose import executor

    cluster = "Ray" if ray is not None else "SLURM" if slurm is not None else ""
    if not cluster and (cpus, gpus) != (None, None):
        raise ValueError("--cpus-per-task and --gpus-per-task are for --ray or --slurm: give one")
    if cluster and device.startswith("cuda:"):
        text = f"{cluster} chooses the GPU of each task; give --device cuda"
        raise ValueError(f"--device {device}: {text}")
    if gpus is None:
        gpus = 1 if device.startswith("cuda") else 0
    return executor(jobs, ray, slurm=slurm, threads=threads, cpus=cpus or 1, gpus=gpus)
