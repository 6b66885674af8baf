"""How long training will take, from a step of each variant that is measured before it begins."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..data.batches import Batches
from ..data.load import Dataset
from ..data.splits import split_batches
from ..models.image_model import build_model
from ..run_config import RunConfig
from .steps import Steps
from .training_run import place, random_of

LIMIT = 15.0  # seconds of measuring, after which the variants that remain count as the mean


@dataclass(frozen=True)
class Estimate:
    """Seconds of training, one run after the other; from the steps of `measured` of `variants`."""

    seconds: float
    measured: int
    variants: int


def estimate(
    runs: Iterable[tuple[RunConfig, float]],
    dataset: Dataset,
    device: str | torch.device,
    *,
    limit: float = LIMIT,
    progress: Callable[[int, int, str], None] | None = None,
) -> Estimate:
    """For runs (config, how often it is trained; a part of a run counts as such).

    Runs of one attention and equal models take equally long, whatever their seed. A variant that
    fails here is left out: its run will tell. The seconds are those of the eager model;
    torch.compile and CUDA graphs make them fewer, after the time that they take themselves.
    """
    shares: dict[tuple, float] = {}
    configs: dict[tuple, RunConfig] = {}
    for config, share in runs:
        variant = config.model, config.attention, config.model_options
        configs.setdefault(variant, config)
        shares[variant] = shares.get(variant, 0.0) + share
    found: dict[tuple, float] = {}
    parts: dict[object, tuple] = {}
    begin = time.monotonic()
    for i, (variant, config) in enumerate(configs.items()):
        if found and time.monotonic() - begin > limit:
            break
        if progress:
            progress(i, len(configs), f"{config.model}-{config.attention}")
        same = (config.data, config.train.batch_size, config.evaluate)
        try:
            if same not in parts:
                parts[same] = split_batches(config, dataset, torch.device(device))
            found[variant] = run_seconds(config, dataset, torch.device(device), parts[same])
        except Exception:
            continue
    mean = statistics.mean(found.values()) if found else 0.0
    seconds = sum(share * found.get(variant, mean) for variant, share in shares.items())
    return Estimate(seconds, len(found), len(configs))


def run_seconds(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    parts: tuple[Batches, Batches | None, Batches],
) -> float:
    """Of one run: its steps, and the batches that it scores."""
    train, validation, test = parts
    epochs, split = config.train.epochs, config.evaluate.split
    options = dataclasses.replace(config.train, compile=False, graph=False)
    with random_of(device):
        torch.manual_seed(0)
        model = place(build_model(config, len(dataset.classes)), device)
        steps = Steps(model, options, epochs * len(train) + 2, device)
        batch = next(iter(train.epoch(0)))
        step = _second(lambda: steps.learn([batch]))
        scored = epochs * len(validation) if validation else 0
        scored += {"test": epochs, "validation": 1}.get(split, 0) * len(test)
        held = next(iter((validation or test).epoch(0))) if scored else None
        score = _second(lambda: steps.score([held])) if scored else 0.0
    return epochs * len(train) * step + scored * score


def _second(pass_: Callable[[], object]) -> float:
    """Seconds of the second call: the first one warms up. Each reads its sums, and so waits for the
    device."""
    pass_()
    start = time.perf_counter()
    pass_()
    return time.perf_counter() - start
