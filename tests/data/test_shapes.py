"""The drawn classes: a function of their seed, told by form and not by colour."""

import numpy as np
import pytest

from tab.data import shapes
from tab.data.load import load_dataset


def test_shapes_are_a_function_of_the_seed():
    images, labels = shapes.draw(600, seed=1)
    assert images.shape == (600, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [60] * 10
    again = shapes.draw(600, seed=1)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    for other in (shapes.draw(600, seed=2), shapes.draw(600, seed=1, stream=1)):
        assert not np.array_equal(images, other[0])


def test_shapes_cannot_be_told_by_colour():
    """The mean colour of a class is that of every other, to within 4 standard errors."""
    images, labels = shapes.draw(3000, seed=0)
    mean = images.mean((1, 2))  # (N, 3)
    error = mean.std(0) / np.sqrt(300)
    for label in range(10):
        assert (np.abs(mean[labels == label].mean(0) - mean.mean(0)) < 4 * error).all()


def test_shapes_can_be_told_by_form():
    """Least squares on |pixel − median colour| is far above chance: the forms are really there."""
    images, labels = shapes.draw(3000, seed=0)
    pixels = images.astype(np.float32)
    away = np.abs(pixels - np.median(pixels, (1, 2), keepdims=True)).mean(3).reshape(3000, -1)
    away = (away - away.mean(0)) / away.std(0)
    fit, test = slice(0, 2500), slice(2500, 3000)
    gram = away[fit].T @ away[fit] + 2000 * np.eye(1024)
    weights = np.linalg.solve(gram, away[fit].T @ np.eye(10)[labels[fit]])
    accuracy = ((away[test] @ weights).argmax(1) == labels[test]).mean()
    assert 0.2 < accuracy < 0.7


def test_shapes_by_name():
    data = load_dataset("shapes:40/20")
    assert (len(data.train), len(data.test), data.name) == (40, 20, "shapes:40/20")
    assert "not CIFAR-10" in data.note and data.classes == shapes.CLASSES
    assert data.fingerprint == load_dataset("shapes:40/20").fingerprint
    assert data.fingerprint != load_dataset("shapes:50/20").fingerprint


@pytest.mark.parametrize(
    "spec", ["shapes:", "shapes:40", "shapes:9/20", "shapes:40/9", "shapes:a/b"]
)
def test_bad_shapes_are_named(spec):
    with pytest.raises(ValueError, match=r"shapes:4000/1000"):
        load_dataset(spec)
