"""Corruptions are what they say; official files are cut as they say, and damage is named."""

import dataclasses

import numpy as np
import pytest
import torch

from tab.analysis import corruptions
from tab.analysis.corruptions import OWN, cifar10c, cifar101, corrupt


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (12, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("kind", OWN)
def test_severities_grow_and_repeat(kind, images):
    made = [corrupt(images, kind, severity) for severity in range(1, 6)]
    assert all(x.dtype == torch.uint8 and x.shape == images.shape for x in made)
    moved = [(x.float() - images.float()).abs().mean().item() for x in made]
    assert moved == sorted(set(moved)) and moved[0] > 1
    assert torch.equal(corrupt(images, kind, 3), made[2])


def test_corruptions_are_what_they_say(images):
    flat = torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
    for kind in ("blur", "contrast", "pixelate"):
        assert torch.equal(corrupt(flat, kind, 5), flat)
    assert (corrupt(flat, "brightness", 2) == round(100 + 0.2 * 255)).all()
    noise = (corrupt(flat, "noise", 1).float() - 100).std()
    assert noise == pytest.approx(0.04 * 255, rel=0.05)
    assert not torch.equal(corrupt(flat, "noise", 1), corrupt(flat, "noise", 1, seed=1))
    cells = corrupt(images, "pixelate", 5).unflatten(1, (8, 4)).unflatten(3, (8, 4))
    assert (cells == cells[:, :, :1, :, :1]).all()
    x = images.float()
    want = x.mean((1, 2), keepdim=True) * 0.5 + x * 0.5
    assert (corrupt(images, "contrast", 2).float() - want).abs().max() <= 0.51


def test_official_arrays_are_cut_by_severity(official, cifar):
    corruptions.check_cifar10c(official, cifar)
    split = cifar10c(official, "fog", 4)
    assert split.labels.tolist() == [6, 7] and split.images[:, 0, 0, 0].tolist() == [6, 7]
    version, split = cifar101(official, cifar)
    assert version == "v6" and split.labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fog.npy", None, "fog.npy is missing"),
        ("fog.npy", b"\x93NUMPY cut", "fog.npy is no whole array"),
        ("fog.npy", np.zeros((10, 3, 32, 32), np.uint8), "not uint8"),
        ("fog.npy", np.zeros((10, 32, 32, 3)), "not uint8"),
        ("fog.npy", np.zeros((9, 32, 32, 3), np.uint8), "9 images and labels.npy 10"),
        ("labels.npy", np.array([{}] * 10, dtype=object), "labels.npy is no whole array"),
        ("labels.npy", np.full(10, 10), "labels 10 … 10, not 0 … 9"),
    ],
)
def test_damaged_official_files_are_named(name, content, message, official, cifar, tmp_path):
    for path in official.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).unlink()
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        corruptions.check_cifar10c(tmp_path, cifar)


def test_official_files_are_for_cifar10(official, cifar, tmp_path):
    other = dataclasses.replace(cifar, classes=tuple("abcdefghij"))
    for check in (corruptions.check_cifar10c, cifar101):
        with pytest.raises(ValueError, match="has CIFAR-10's classes"):
            check(official, other)
    with pytest.raises(ValueError, match=r"has no cifar10.1_v6_data.npy"):
        cifar101(tmp_path, cifar)
