"""Training one model, in a directory on disk that survives anything (tab/train/training_run.py).

Everything random is a function of (seed, epoch): a run that was stopped and resumed continues to
the same numbers as an unbroken one, on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.load import Dataset
from ..files import Corrupt, folder, locked
from ..files.formats import reading
from ..models.image_model import ImageModel, build_model, layer_class
from ..plugins import origin
from ..run_config import RunConfig, as_known_now, flat
from . import checkpoint
from .run_files import RunFile, again, has_epochs, read_rows, read_run_file
from .training_run import Outcome, TrainingRun, place
from .weights import FILE, load_weights


def train(
    config: RunConfig,
    dataset: Dataset,
    out: Path,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    on_epoch: Callable[[dict], None] | None = None,
    stop_after: int | None = None,
) -> Outcome:
    """Trains `config` on `dataset` in the directory `out`.

    resume: continue what is in `out` (a finished run is returned as it is); without it a directory
    with a run in it is an error. stop_after: return after that many epochs in all, to be resumed.
    on_epoch: called with each new row once it is on disk.
    """
    out = folder(Path(out))
    with locked(out):
        found = found_run(config, dataset, out, resume)
        if found and found["status"] != "running":
            return Outcome(config, read_rows(out, found), found["status"], found["summary"])
        run = TrainingRun(config, dataset, torch.device(device), out)
        if found:
            run.restore()
        last = min(config.train.epochs, stop_after or config.train.epochs)
        while run.status == "running" and len(run.rows) < last:
            run.epoch()
            run.save()
            if on_epoch:
                on_epoch(run.rows[-1])
        return run.outcome()


def load_model(run: str | Path, device: str | torch.device = "cpu") -> ImageModel:
    """The trained model of a finished run, on `device` and in eval mode.

    run: its directory, as of `tab train` or one of runs/ of a comparison; or a model.safetensors
    from there, which is enough by itself and says how to prepare images (tab/train/weights.py).
    The model takes x (B, 3, S, S), S = data.size, and gives logits (B, classes).
    ValueError, OSError: there is no such run, it has not ended well, or a file is damaged.

    >>> from tab.data.load import load_dataset
    >>> from tab.recipe.recipe import load_recipe
    >>> few = {"train.epochs": 1, "data.images": 100, "data.validation": 20}
    >>> config = load_recipe("quick", few).run_config("mlp", "performer", seed=0)
    >>> ended = tab.train.train(config, load_dataset("shapes:200/40"), "run")
    >>> tab.load_model("run")(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return load_trained(run, device)[0]


def load_trained(
    out: str | Path, device: str | torch.device = "cpu"
) -> tuple[ImageModel, RunConfig]:
    """`load_model`, and the run's config."""
    out = Path(out)
    path, way_out = out, "fetch it again"
    if not out.is_file():
        path, way_out = model_of(out), again(out)
    if path.name == OLD:
        try:
            weights, about = checkpoint.load(path), read_run_file(out)
        except Corrupt as error:
            raise Corrupt(f"{error}; {way_out}") from None
    else:
        weights, about = load_weights(path, way_out)
    with reading(path, way_out):
        if path != out and about["config"] != read_run_file(out)["config"]:
            raise ValueError("it is of another run")
        config = RunConfig.from_dict(about["config"])
    layer_class(config)  # where its package is not installed the file is not to blame
    with reading(path, way_out):
        model = build_model(config, len(about["classes"]))
        model.load_state_dict(weights)
    return place(model, torch.device(device)).eval(), config


OLD = "model.pt"  # of version 0.1


def model_of(out: Path) -> Path:
    """The file with the weights of the run in the directory `out`."""
    run = read_run_file(out)
    if not run:
        raise ValueError(f"{out} holds no run: there is no run.json in it{_models_below(out)}")
    if run["status"] != "done":
        raise ValueError(f"the run in {out} is {run['status']}, it has no trained model")
    path = _weights(out)
    if path is None:
        raise ValueError(f"{out} has lost its {FILE}: {again(out)}")
    return path


def _models_below(out: Path) -> str:
    """What else an error says of the directory of a comparison or a sweep."""
    if not (out / "runs").is_dir():
        return "" if out.is_dir() else ", nor is there such a directory"
    found = [run for run in sorted((out / "runs").iterdir()) if has_weights(run)]
    if not found:
        return f"; those in {out / 'runs'} have no trained model yet"
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"; give one of these, which have a model: {', '.join(map(str, found[:LISTED]))}{more}"


LISTED = 24  # in one error


def has_weights(out: Path) -> bool:
    """Whether the weights of the run in `out` are there. Its figures do not need them."""
    return _weights(out) is not None


def _weights(out: Path) -> Path | None:
    return next((out / name for name in (FILE, OLD) if (out / name).exists()), None)


def plugin_of(config: RunConfig) -> dict[str, str] | None:
    """The record of the plugin that the mechanism comes from; None if it comes from none."""
    return origin(layer_class(config))


def found_run(
    config: RunConfig, dataset: Dataset, out: Path, resume: bool, together: list[str] | None = None
) -> RunFile | None:
    """The run.json in `out`, which must be of this very run."""
    found = read_run_file(out)
    if not found:
        return None
    if not resume:
        raise ValueError(f"{out} already holds a run: resume it, or give another directory")
    kept, now = found.get("plugin"), plugin_of(config)
    changed = bool(kept and now and kept["sha256"] != now["sha256"])
    if changed and not has_epochs(out):  # it only failed, and this may be why it does no more
        return None
    if found["data"]["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"the run in {out} was trained on {found['data']['name']} "
            f"({found['data']['fingerprint']}), not on {dataset.name} ({dataset.fingerprint})"
        )
    was = found["config"]
    with contextlib.suppress(ValueError):  # one that is none any more is told as it stands
        was = as_known_now(was)
    old, new = flat(was), flat(config.to_dict())
    if differ := [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]:
        was = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differ)
        raise ValueError(f"the run in {out} is another one: {was}; give another directory")
    if changed:
        raise ValueError(
            f"the run in {out} was begun with the plugin {kept['name']} (sha256 "
            f"{kept['sha256'][:12]}…), and {now['name']} is another (sha256 "
            f"{now['sha256'][:12]}…): put back what it was, or give another directory"
        )
    if found["status"] == "running" and (was := found.get("together")) != together:
        raise ValueError(
            f"the run in {out} was begun {_with(was)}, and cannot go on {_with(together)}: its "
            "numbers would be others in their last digits; go on as before, or remove it"
        )
    return found


def _with(together: list[str] | None) -> str:
    return f"together with {', '.join(together)}" if together else "by itself"
