"""Accuracy against ε, on a model whose distance to a wrong answer is known for every image."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from tab.analysis.attacks import AUTO, EPSILONS, auto_attacked, epsilon_curve, still_right
from tab.data.batches import Batches
from tab.data.load import Split

COUNT = 60
EDGE = 127.4 / 255  # no pixel lies at a distance from it that is an ε


class Brightness(nn.Module):
    """Class 1 where the mean pixel exceeds EDGE: |mean − EDGE| turns the answer, nothing less."""

    def forward(self, x):
        z = (x.mean((1, 2, 3)) + 0.5 - EDGE) * 100
        return torch.stack([-z, z, z * 0 - 99, z * 0 - 99], 1)


def batches() -> tuple[Batches, torch.Tensor]:
    """Grey images whose distances run through the sizes of ε; their answers are right, but for
    every tenth."""
    distance = torch.linspace(0.1, 10, COUNT) / 255  # in 0…1
    sign = torch.arange(COUNT) % 2 * 2 - 1
    shade = (255 * (EDGE + sign * distance)).round()
    images = shade.to(torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3)
    right = shade / 255 > EDGE
    labels = torch.where(torch.arange(COUNT) % 10 == 0, ~right, right).long()
    split = Split(images.contiguous(), labels)
    half = torch.full((3,), 127.5)
    test = Batches(split, batch_size=16, mean=half, std=torch.ones(3) * 255)
    return test, (shade / 255 - EDGE).abs()


def test_the_curve_is_the_share_of_images_farther_away_than_epsilon():
    test, distance = batches()
    found = epsilon_curve(Brightness(), test, 1000)
    right = torch.arange(COUNT) % 10 != 0
    want = [(right & (distance > epsilon)).double().mean().item() for epsilon in EPSILONS]
    assert found["accuracy"] == want and len(set(want)) >= 5
    kept = still_right(found)
    assert kept.shape == (len(EPSILONS), COUNT) == (6, found["images"])
    for row, epsilon in zip(kept, EPSILONS, strict=True):
        np.testing.assert_array_equal(row, (right & (distance > epsilon)).numpy())


def test_a_part_of_the_images_and_the_same_again():
    test, _ = batches()
    found = epsilon_curve(Brightness(), test, 20)
    assert found["images"] == 20 and found == epsilon_curve(Brightness(), test, 20)


def test_autoattack_finds_what_can_be_found():
    """Two images lie nearer than 1/255 to the edge, one farther than 8/255; the rest between."""
    pytest.importorskip("pyautoattack", reason='needs pip install -e ".[autoattack]"')
    shade = torch.tensor([127, 128, 100, 124, 131, 122, 133, 129])
    images = shade.to(torch.uint8)[:, None, None, None].expand(-1, 8, 8, 3).contiguous()
    labels = (shade / 255 > EDGE).long()
    half = torch.full((3,), 127.5)
    test = Batches(Split(images, labels), batch_size=8, mean=half, std=torch.ones(3) * 255)
    found = auto_attacked(Brightness(), test, 8)
    near = [abs(s / 255 - EDGE) for s in shade.tolist()]
    for row, epsilon in zip(still_right(found), AUTO, strict=True):
        assert row.tolist() == [distance > epsilon for distance in near]


def test_autoattack_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"\[autoattack\]"):
        auto_attacked(Brightness(), batches()[0], 8)


def test_autoattack_needs_four_classes():
    pytest.importorskip("pyautoattack", reason='needs pip install -e ".[autoattack]"')
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(ValueError, match="4 classes or more, this model has 2"):
        auto_attacked(two, batches()[0], 8)
