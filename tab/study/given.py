"""What names and places stand for, from the shell and from Python: plugins, data, a device,
an executor. Nothing here needs torch before it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def use_plugins(
    given: list[str] | None,
    kept: list[dict[str, str]] | None = None,
    results: Callable[[str], list[str]] | None = None,
) -> list[dict]:
    """Loads what --plugin names, before any name of an attention is looked up. kept: the records of
    what a study was begun with, which has to be that still where it has results of it. -> the
    records"""
    from .. import plugins

    if kept is None:
        found = [plugins.find(name) for name in given or []]
    else:
        found = plugins.again(kept, given or [], results)
    plugins.load(found)
    return [plugin.record() for plugin in found]


def say_mended(
    kept: list[dict[str, str]], records: list[dict[str, str]], tell: Callable[[str], object]
) -> None:
    """A line about each plugin that is no longer what a study, which goes on, trained with."""
    before = {record["sha256"] for record in kept}
    for record in records:
        if record["sha256"] not in before:
            tell(f"{record['name']} has changed; nothing was trained with what it was")


def place_of(data: str) -> str:
    """A folder or archive by its full path, so that work can resume from anywhere."""
    from ..data.huggingface import PREFIX, Source

    if data.startswith(PREFIX):
        return Source.of(data).spec
    return data if _named(data) or not Path(data).exists() else str(Path(data).resolve())


def _named(data: str) -> bool:
    from ..data.load import NAMED

    return data.split(":")[0] in NAMED


def load_data(spec: str, images=None, *, kept: bool = False, progress=None):
    """images: a recipe's or run's [data], which says their size, by default 32, and how many are
    drawn to test on. kept: `spec` is
    what a result was made with. progress: told (done, total, what)."""
    from ..data.load import load_dataset

    if kept and not _named(spec) and not Path(spec).exists():
        raise ValueError(f"the data is no longer at {spec}: say where it is now, with --data")
    keys = ("size", "fit", "test_share")
    how = {key: getattr(images, key) for key in keys} if images else {}
    return load_dataset(spec, **how, progress=progress)


def device_of(name: str | None, *, cluster: str | None = None) -> str:
    """A device that is there; without a name a GPU, if there is one."""
    import torch

    if cluster is not None and name == "cuda":
        return name  # of the cluster's nodes: this one may have none
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(0, device=name)  # raises a RuntimeError that says what is wrong with it
    return name


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
