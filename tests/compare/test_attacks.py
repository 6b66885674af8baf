"""Attacks against what is possible on a linear model, and within the ball on any."""

import pytest
import torch
from torch import nn

from tab.analysis import attacks
from tab.analysis.attacks import EPSILON, attacked, fgsm, pgd
from tab.data.batches import Batches
from tab.data.load import Split
from tab.layers import attention_names
from tab.models.image_model import build_model
from tab.recipe.recipe import load_recipe


class Linear(nn.Module):
    """Logits (−s, s), s = w·x on the normalised image: an L∞ attack moves s by ε‖w‖₁ at most."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        s = (x * self.weight).sum((1, 2, 3))
        return torch.stack([-s, s], 1)


@pytest.fixture(scope="module")
def linear():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(64, 192, (200, 32, 32, 3), generator=generator).byte()
    weight = 0.1 * torch.randn(3, 32, 32, generator=generator)  # far from saturation
    mean, std = torch.tensor([127.5] * 3), torch.tensor([127.5] * 3)
    s = (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5 * weight
    margin = s.sum((1, 2, 3))
    test = Batches(Split(images, (margin > 0).long()), batch_size=64, mean=mean, std=std)
    return Linear(weight), test, margin


def test_attacks_on_a_linear_model_do_what_is_possible(linear, monkeypatch):
    model, test, margin = linear
    for epsilon in (1 / 255, 2 / 255):
        monkeypatch.setattr(attacks, "EPSILON", epsilon)
        monkeypatch.setattr(attacks.fgsm, "__defaults__", (epsilon,))
        monkeypatch.setattr(attacks.pgd, "__defaults__", (epsilon,))
        found = attacked(model, test, 1000)
        # In units of the input ε is 2ε of the normalised one.
        left = (margin.abs() > 2 * epsilon * model.weight.abs().sum()).float().mean().item()
        assert found["fgsm"] == found["pgd"] == pytest.approx(left, abs=1e-6)
        assert found["clean"] == 1.0 and found["large"] == 0.0 and found["images"] == 200
        assert found["random"] > found["fgsm"] and found["suspicions"] == []
    assert 0 < left < 1
    assert attacked(model, test, 50)["images"] == 50


def test_attacks_stay_in_the_ball_and_in_the_pixels(generator):
    x, y = torch.rand(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 0, 1])
    model = Linear(torch.randn(3, 8, 8, generator=generator))
    for moved in (fgsm(model, x, y), pgd(model, x, y, generator=generator)):
        assert (moved - x).abs().max() <= EPSILON + 1e-6
        assert moved.min() >= 0 and moved.max() <= 1
    assert not pgd(model, x, y, steps=0, generator=generator).equal(x)  # it starts at random


def test_masked_gradients_are_seen(linear):
    """A model that rounds its input has no gradient, one that is too sure has none in float32:
    attacks fail, and that is said."""

    class Rounds(Linear):
        def forward(self, x):
            return super().forward((x * 4).round() / 4)

    model, test, _ = linear
    found = attacked(Rounds(model.weight), test, 50)
    assert found["zero_gradients"] == 1.0
    assert {"gradients vanish", "an attack without a bound fails"} <= set(found["suspicions"])
    sure = attacked(Linear(1000 * model.weight), test, 50)
    assert "gradients vanish" in sure["suspicions"]


SMALL = {
    **{"model.mlp.hidden": 16, "model.mlp.tokens": 4, "model.mlp.block": "replace"},
    "attention.multi_head.num_heads": 2,
}


@pytest.mark.parametrize("attention", attention_names())
def test_every_attention_passes_gradients_to_the_image(attention, generator):
    recipe = load_recipe("quick", SMALL)
    model = build_model(recipe.run_config("mlp", attention, 0), 10).eval().requires_grad_(False)
    x, y = torch.rand(2, 3, 32, 32, generator=generator), torch.tensor([0, 1])
    assert (attacks.gradient(model, x, y).flatten(1).abs().amax(1) > 0).all()
