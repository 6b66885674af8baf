"""How trained models take what they were not trained on, measured once a run.

What is measured, and when it is measured again, stands in robustness_file.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import files
from ..data.batches import Batches
from ..data.load import Dataset, Split
from ..data.splits import split_batches
from ..files.formats import write_json
from ..train.loop import load_trained, model_of
from ..train.run_files import read_run_file
from .attacks import (
    ALPHA,
    AUTO,
    EPSILON,
    EPSILONS,
    LARGE,
    STEPS,
    attacked,
    auto_attacked,
    epsilon_curve,
)
from .cache_budget import BUDGETS, budget_curves, fits
from .corruptions import OFFICIAL, OWN, SEVERITIES, check_cifar10c, cifar10c, cifar101, corrupt
from .robustness_file import FILE, differing, read

NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # σ, in standard deviations of the training images
BINS = 15
Section = tuple[str, dict, Callable[[nn.Module, Batches], dict]]  # name, settings, measure


@dataclass(frozen=True)
class Options:
    """What to measure beside noise, calibration and attacks on `images` test images."""

    images: int = 1000
    cifar10c: Path | None = None  # a folder of official files; None: our own corruptions
    cifar101: Path | None = None
    autoattack: bool = False  # slow: thousands of steps an image


def measure(
    run: Path,
    dataset: Dataset,
    options: Options | None,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
    weights: str | None = None,
) -> dict:
    """All of robustness.json of a finished run, after measuring what is not in it yet.

    options None: the noise alone, which every report shows. weights: `weights_of` it, where that
    is known.
    """
    described = read_run_file(run)
    if described and described["data"]["fingerprint"] != dataset.fingerprint:
        trained_on = described["data"]
        raise ValueError(
            f"the run in {run} was trained on {trained_on['name']} "
            f"({trained_on['fingerprint']}), not on {dataset.name} ({dataset.fingerprint})"
        )
    model_is = weights or weights_of(run)
    sections = [(s, {**of, "model": model_is}, f) for s, of, f in _sections(dataset, options)]
    if options and described and _cut(described["config"]):
        images = min(options.images, len(dataset.test))
        cut = {"budgets": list(BUDGETS), "images": images, "seed": 0, "data": dataset.fingerprint}
        sections.append(("cache", cut | {"model": model_is}, partial(budget_curves, images=images)))
    if not _missing(read(run), sections):
        return read(run)
    with files.locked(run):
        model, config = load_trained(run, device)
        model.requires_grad_(False)  # attacks want gradients of images alone
        test = split_batches(config, dataset, torch.device(device))[2]
        found = read(run)
        missing = _missing(found, sections)
        for i, (name, settings, of) in enumerate(missing):
            if progress:
                progress(i, len(missing), f"{run.name}: {name}")
            found[name] = {"settings": settings, **of(model, test)}
            write_json(run / FILE, found)
    return found


def is_measured(run: Path, dataset: Dataset, weights: str) -> bool:
    """Whether the noise alone, which every report shows, is measured already of these weights."""
    of_model = {"model": weights}
    sections = [(s, {**of, **of_model}, f) for s, of, f in _sections(dataset, None)]
    return not _missing(read(run), sections)


def _missing(found: dict, sections: list[Section]) -> list[Section]:
    """Those not measured yet, or under other settings."""
    return [s for s in sections if s[0] not in found or differing(found[s[0]]["settings"], s[1])]


def weights_of(run: Path) -> str:
    """The sum of a finished run's weights."""
    return files.digest(model_of(run))


official_sum = functools.cache(files.digest)  # of two gigabytes, in one process once


def _sections(dataset: Dataset, options: Options | None) -> Iterator[Section]:
    on = {"data": dataset.fingerprint, "images": len(dataset.test)}
    yield "noise", {"sigma": list(NOISE), "seed": 0, **on}, _noise
    if options is None:
        return
    calibration = {"bins": BINS, **on}
    yield "calibration", calibration, lambda *a: {"ece": calibration_error(*answers(*a))}
    yield "mirrored", dict(on), _mirrored
    settings = on | {"images": min(options.images, len(dataset.test)), "seed": 0}
    settings |= {"epsilon": EPSILON, "alpha": ALPHA, "steps": STEPS, "large": LARGE}
    yield "attacks", settings, lambda model, test: attacked(model, test, settings["images"])
    curve = on | {"images": settings["images"], "seed": 0, "steps": STEPS}
    curve["epsilon"] = [round(255 * epsilon, 2) for epsilon in EPSILONS]  # of 255
    yield "pgd", curve, lambda model, test: epsilon_curve(model, test, curve["images"])
    if options.autoattack:
        auto = {**curve, "epsilon": [round(255 * epsilon, 2) for epsilon in AUTO]}
        del auto["steps"]
        yield "autoattack", auto, lambda model, test: auto_attacked(model, test, auto["images"])
    if options.cifar10c:
        check_cifar10c(options.cifar10c, dataset)
        folder = options.cifar10c
        for name in OFFICIAL:
            made_of = {"files": official_sum(folder / f"{name}.npy", folder / "labels.npy")}
            yield f"cifar10c/{name}", made_of, partial(_severities, partial(cifar10c, folder, name))
    else:
        for kind, (_, levels) in OWN.items():
            made = partial(_own, dataset.test, kind)
            drawn = {"levels": list(levels), "seed": 0, **on}
            yield f"own/{kind}", drawn, partial(_severities, made)
    if options.cifar101:
        version, split = cifar101(options.cifar101, dataset)
        parts = (f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels"))
        made_of = {"files": official_sum(*(options.cifar101 / part for part in parts))}
        yield "cifar10.1", {"version": version, **made_of}, partial(_on, split)


def _cut(config: dict) -> bool:
    return fits(config["attention"], config["model_options"].get("forms", "library"))


def _own(test: Split, kind: str, severity: int) -> Split:
    return Split(corrupt(test.images, kind, severity), test.labels)


def _noise(model: nn.Module, test: Batches) -> dict:
    return {"accuracy": noise_curve(model, test), "images": test.samples}


def _mirrored(model: nn.Module, test: Batches) -> dict:
    both = accuracy(lambda x: (model(x) + model(x.flip(3))) / 2, test)
    return {"accuracy": both, "images": test.samples}


def _on(split: Split, model: nn.Module, test: Batches) -> dict:
    return {"accuracy": accuracy(model, instead(test, split)), "images": len(split)}


def _severities(made: Callable[[int], Split], model: nn.Module, test: Batches) -> dict:
    levels = range(1, SEVERITIES + 1)
    return {"accuracy": [accuracy(model, instead(test, made(severity))) for severity in levels]}


# --- measures: the model is used as it is, put it in eval mode ------------------------------------


@torch.no_grad()
def noise_curve(
    model: nn.Module, batches: Batches, *, levels: Sequence[float] = NOISE, seed: int = 0
) -> list[float]:
    """Accuracy on all of `batches` with x + σ·ε for each σ, ε ~ N(0, 1) on the normalised image.

    Every level and every model sees the same ε (seeded), so that curves differ by model alone.
    """
    right, generator = [0] * len(levels), None
    for x, y in batches.epoch(0):  # (B, 3, H, W), (B,)
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(seed)
        noise = torch.empty_like(x).normal_(generator=generator)
        for i, level in enumerate(levels):
            right[i] += (model(x + level * noise).argmax(-1) == y).sum()
    return [float(n) / batches.samples for n in right]


def instead(test: Batches, split: Split) -> Batches:
    """Other images, normalised as those of `test`: what a model was trained for stays."""
    mean, std = test.mean.cpu(), 1 / test.scale.cpu().double()
    return Batches(split, batch_size=test.batch_size, mean=mean, std=std, device=test.device)


@torch.no_grad()
def accuracy(model: Callable[[torch.Tensor], torch.Tensor], batches: Batches) -> float:
    """The share of the images that the model, or what makes logits of it, answers rightly."""
    right = sum((model(x).argmax(-1) == y).sum() for x, y in batches.epoch(0))
    return float(right) / batches.samples


@torch.no_grad()
def answers(model: nn.Module, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the probability given to the answer, (N,) whether it was right."""
    parts = [(model(x).double().softmax(-1).max(-1), y) for x, y in batches.epoch(0)]
    confidence = torch.cat([top.values for top, _ in parts])
    right = torch.cat([top.indices == y for top, y in parts])
    return confidence.cpu().numpy(), right.cpu().numpy()


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Σ_b (n_b/N)·|accuracy_b − confidence_b| over bins (b/B, (b+1)/B] of confidence (Guo et al.
    2017, eq. 3)."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, right.astype(float) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
