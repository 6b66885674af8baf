"""Which images a run trains on, validates on and is tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..run_config import IMAGE, RunConfig
from .batches import Batches
from .load import Dataset, Split, hold_out
from .sequences import SequenceBatches
from .statistics import statistics


def split_batches(
    config: RunConfig, dataset: Dataset, device: torch.device
) -> (
    tuple[Batches, Batches | None, Batches]
    | tuple[SequenceBatches, SequenceBatches | None, SequenceBatches]
):
    """Training, validation (None if nothing is held out) and test batches of a run.

    Which images are held out, and which are used, is one choice for all models and seeds.
    """
    if (config.model == "tokens") != dataset.sequences:
        kind, other = ("sequences", "tokens") if dataset.sequences else ("images", "cnn")
        raise ValueError(
            f"{dataset.name} is of {kind}, which the model {config.model} does not read: give "
            f"another --data, or --models {other} (of sequences: --recipe recall --models tokens)"
        )
    if config.data.test_share != dataset.test_share:
        raise ValueError(
            f"{dataset.name} was read with test_share={dataset.test_share}, and data.test_share = "
            f"{config.data.test_share}: read it with that"
        )
    if dataset.sequences:
        return _of_sequences(config, dataset, device)
    data, labels = config.data, dataset.train.labels
    if data.size != dataset.size:
        raise ValueError(
            f"{dataset.name} was read with images of {dataset.size}×{dataset.size}, and "
            f"data.size = {data.size}: read it with load_dataset(…, size={data.size})"
        )
    if config.evaluate.split != "test" and not data.validation:
        raise ValueError(
            f'evaluate.split = "{config.evaluate.split}" needs data.validation above 0, images to '
            "hold out"
        )
    index, held = torch.arange(len(labels)), None
    classes, most = len(dataset.classes), len(labels) - len(dataset.classes)
    if data.validation > most:
        fitting = dataset.fitting(data, config.train.batch_size)
        give = " ".join(f"--set {key}={value}" for key, value in fitting.items())
        raise ValueError(
            f"data.validation = {data.validation} leaves no training image of some class: of the "
            f"{len(labels)} of {dataset.name}, {classes} classes, at most {most} can be held out; "
            + (f"give {give} (a sweep: --validation)" if most else f"add pictures, or give {give}")
        )
    if data.validation:
        index, held = hold_out(labels, data.validation, seed=0, least=(1, 0))
    if 0 < data.images < classes:
        raise ValueError(
            f"data.images = {data.images} are too few for the {classes} classes of "
            f"{dataset.name}: give --set data.images={classes} or more, or 0 for all"
        )
    if 0 < data.images < len(index):
        _, chosen = hold_out(labels[index], data.images, seed=0, least=(0, 1))
        index = index[chosen]
    size = config.train.batch_size
    if data.drop_last and len(index) < size:
        raise ValueError(
            f"no batch: {len(index)} images, batch_size {size}, drop_last true: give "
            f"--set train.batch_size={len(index)} or less, or --set data.drop_last=false"
        )
    mean, std = _statistics(dataset.train.images, index)
    common: dict[str, Any] = {"mean": mean, "std": std, "device": device}
    batches = Batches(
        dataset.train,
        index=index,
        batch_size=size,
        seed=config.draws,
        shuffle=True,
        translate=data.translate,
        flip=data.flip,
        alternating=data.flip_order == "alternating",
        cutout=data.cutout,
        drop_last=data.drop_last,
        **common,
    )
    size = config.evaluate.batch_size
    validation = None
    if held is not None:
        validation = Batches(dataset.train, index=held, batch_size=size, **common)
    return batches, validation, test_batches(config, dataset.test, batch_size=size, **common)


def _of_sequences(
    config: RunConfig, dataset: Dataset, device: torch.device
) -> tuple[SequenceBatches, SequenceBatches | None, SequenceBatches]:
    """The last sequences are held out: they are drawn alike."""
    data, count, n = config.data, len(dataset.train), dataset.train.tokens.shape[1]
    if n != config.model_options.tokens:
        raise ValueError(
            f"{dataset.name} has {n} tokens, the model {config.model_options.tokens}: give --set "
            f"model.tokens.tokens={n}, or --data {dataset.name.split(':')[0]}:"
            f"{config.model_options.tokens}"
        )
    if data.size != IMAGE:
        raise ValueError(f"data.size = {data.size}, but {dataset.name} has no images: leave it out")
    if data.translate or data.flip or data.cutout:
        raise ValueError(
            f"{dataset.name} is of sequences, which are not moved, mirrored or cut out: give "
            "--set data.translate=0 --set data.flip=false --set data.cutout=0, or --recipe recall"
        )
    used = min(data.images or count, count - data.validation)
    if used < 1 or (config.evaluate.split != "test" and not data.validation):
        raise ValueError(
            f"data.validation = {data.validation} of {count} sequences: give 1 to {count - 1} to "
            'hold out, or 0 with evaluate.split = "test"'
        )
    batches = SequenceBatches(
        dataset.train,
        index=torch.arange(used),
        batch_size=config.train.batch_size,
        seed=config.draws,
        shuffle=True,
        drop_last=data.drop_last,
        device=device,
    )
    scored: dict[str, Any] = {"batch_size": config.evaluate.batch_size, "device": device}
    held, validation = torch.arange(count - data.validation, count), None
    if len(held):
        validation = SequenceBatches(dataset.train, index=held, **scored)
    return batches, validation, SequenceBatches(dataset.test, **scored)


def test_batches(config: RunConfig, test: Split, *, mean, std, **options) -> Batches:
    """The test images, normalised as the recipe says."""
    if config.data.normalise == "each":
        mean, std = _statistics(test.images)
    return Batches(test, mean=mean, std=std, **options)


def _statistics(images: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of these images, to normalise by; a constant channel becomes 0, whatever it is divided by.

    A second for those of CIFAR-10, and the same for all runs of a study: it is remembered, for as
    long as the images are there and nothing is written into them."""
    chosen = index.numpy().tobytes() if index is not None else b""
    known, key = _known.setdefault(images, {}), (images._version, chosen)
    if key not in known:
        mean, std = statistics(images if index is None else images[index])
        known[key] = mean, torch.where(std > 0, std, 1.0)
    return known[key]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
