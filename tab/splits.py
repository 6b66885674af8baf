"""Which images a run trains on, validates on and is tested on."""

from __future__ import annotations

import torch

from .batches import Batches
from .config import RunConfig
from .data import Dataset, Split, hold_out, statistics


def splits(
    config: RunConfig, dataset: Dataset, device: torch.device
) -> tuple[Batches, Batches | None, Batches]:
    """Training, validation (None if nothing is held out) and test batches of a run.

    Which images are held out, and which are used, is one choice for all models and seeds.
    """
    data, labels = config.data, dataset.train.labels
    if config.evaluate.split != "test" and not data.validation:
        raise ValueError(
            f'evaluate.split = "{config.evaluate.split}" needs data.validation above 0, images to '
            "hold out"
        )
    index, held = torch.arange(len(labels)), None
    if data.validation:
        index, held = hold_out(labels, data.validation, seed=0)
    if data.images and data.images < len(index):
        _, chosen = hold_out(labels[index], data.images, seed=0)
        index = index[chosen]
    mean, std = statistics(dataset.train.images[index])
    common = {"mean": mean, "std": std, "device": device}
    batches = Batches(
        dataset.train,
        index=index,
        batch_size=config.train.batch_size,
        seed=config.seed,
        shuffle=True,
        translate=data.translate,
        flip=data.flip,
        drop_last=data.drop_last,
        **common,
    )
    size = config.evaluate.batch_size
    validation = None
    if held is not None:
        validation = Batches(dataset.train, index=held, batch_size=size, **common)
    return batches, validation, test_batches(config, dataset.test, batch_size=size, **common)


def test_batches(config: RunConfig, test: Split, *, mean, std, **options) -> Batches:
    """The test images, normalised as the recipe says."""
    if config.data.normalise == "each":
        mean, std = statistics(test.images)
    return Batches(test, mean=mean, std=std, **options)
