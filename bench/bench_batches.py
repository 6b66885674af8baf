"""Images per second of batch assembly: shuffled, moved by up to 4 pixels, mirrored, normalised.

Ours (tab/data/batches.py) against torchvision transforms in a DataLoader, as most training scripts
have it. A round is one epoch of IMAGES; the DataLoader's workers are started before and stay.
`extra_info` holds images per second (10th, 50th and 90th percentile).

    pytest bench/bench_batches.py --benchmark-columns=median,iqr,min,max
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from tab.data.batches import Batches
from tab.data.load import load_dataset
from tab.data.statistics import statistics

IMAGES, BATCH, ROUNDS = 10_000, 512, 9


class Pictures(TorchDataset):
    """The images as PIL pictures or as uint8 tensors (3, 32, 32), with a transform for each."""

    def __init__(self, split, mean, std, form):
        self.labels = split.labels.tolist()
        self.images = split.images.numpy()  # (N, 32, 32, 3)
        if form == "tensor":
            self.images = split.images.permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        first = [Image.fromarray] if form == "PIL" else []
        self.transform = v2.Compose(
            [
                *first,
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                *([v2.ToImage()] if form == "PIL" else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((mean / 255).tolist(), (std / 255).tolist()),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def epochs(kind, value):
    """A function that runs through one epoch and returns the shape of each batch."""
    split = load_dataset(f"shapes:{IMAGES}/10").train
    mean, std = statistics(split.images)
    if kind == "DataLoader":
        form, workers = value
        loader = DataLoader(
            Pictures(split, mean, std, form),
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(0),
        )
        return lambda: [x.shape for x, _ in loader]
    loader = Batches(
        split,
        batch_size=BATCH,
        mean=mean,
        std=std,
        shuffle=True,
        translate=4,
        flip=True,
        drop_last=True,
        threads=value,
    )
    numbers = itertools.count()
    return lambda: [x.shape for x, _ in loader.epoch(next(numbers))]


@pytest.mark.parametrize(
    "kind, value",
    [
        pytest.param("tab", None, id="tab"),
        pytest.param("tab", 1, id="tab, 1 thread"),
        pytest.param("DataLoader", ("PIL", 0), id="DataLoader, PIL, 0 workers"),
        pytest.param("DataLoader", ("PIL", 2), id="DataLoader, PIL, 2 workers"),
        pytest.param("DataLoader", ("tensor", 0), id="DataLoader, tensors, 0 workers"),
        pytest.param("DataLoader", ("tensor", 2), id="DataLoader, tensors, 2 workers"),
    ],
)
def test_assembly(benchmark, kind, value):
    benchmark.group = "batch assembly"
    run = epochs(kind, value)
    shapes = benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    assert shapes == [(BATCH, 3, 32, 32)] * (IMAGES // BATCH)
    rates = len(shapes) * BATCH / np.asarray(benchmark.stats.stats.data)
    for percent in (10, 50, 90):
        rate = float(np.percentile(rates, percent))
        benchmark.extra_info[f"images_per_second_p{percent}"] = round(rate)
