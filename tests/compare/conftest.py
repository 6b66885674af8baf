"""Files of the form of CIFAR-10-C and CIFAR-10.1, and a data set that has CIFAR-10's classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import dots as dots

from tab.analysis.corruptions import OFFICIAL
from tab.data.cifar import CLASSES
from tab.data.load import Dataset, Split


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """Two images a severity; each image is filled with its place."""
    folder, place = tmp_path_factory.mktemp("cifar10c"), np.arange(10, dtype=np.uint8)
    for name in OFFICIAL:
        np.save(
            folder / f"{name}.npy", np.broadcast_to(place[:, None, None, None], (10, 32, 32, 3))
        )
    np.save(folder / "labels.npy", place)
    np.save(folder / "cifar10.1_v6_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(folder / "cifar10.1_v6_labels.npy", np.array([1, 2, 3]))
    return folder


@pytest.fixture(scope="module")
def cifar() -> Dataset:
    split = Split(torch.zeros(10, 32, 32, 3, dtype=torch.uint8), torch.arange(10))
    return Dataset("cifar10", CLASSES, split, split, "made for tests", "0")
