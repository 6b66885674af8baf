"""Seeds trained at once: each is the run it is alone, but for rounding; none spoils another."""

import pytest
import torch
from rehearsal import rehearsed, repeatable
from small_seeds import configs_of, numbers, saved, tiny, together
from torch import nn

import tab.train.together
import tab.train.training_run
from tab.layers import Attention, _registry, attention_names, register_attention
from tab.models.image_model import build_model
from tab.models.stacked import PerSeed, stack
from tab.train.loop import train

NAMES = attention_names()  # before this file registers others


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return tiny()


def same_as_alone(configs, dataset, tmp_path, weights=5e-4, losses=5e-4):
    """Rows and weights to rounding, and the right files."""
    alone = [train(c, dataset, tmp_path / "alone" / c.id) for c in configs]
    found = together(configs, dataset, tmp_path / "group")
    for config, one, own in zip(configs, alone, found, strict=True):
        assert (own.status, own.config) == (one.status, config)
        for a, b in zip(one.rows, own.rows, strict=True):
            assert b["seeds_at_once"] == len(configs) and a["seeds_at_once"] == 1
            for key in ("train_loss", "validation_loss", "test_loss"):
                assert (a[key] is None) == (b[key] is None)
                assert a[key] is None or b[key] == pytest.approx(a[key], rel=losses)
            assert b["learning_rate"] == a["learning_rate"]
        a, b = (saved(tmp_path / how, config) for how in ("alone", "group"))
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].stride() == b[key].stride()
            torch.testing.assert_close(a[key], b[key], atol=weights, rtol=1e-3, msg=key)
        files = [{p.name for p in (tmp_path / how / config.id).iterdir()}
                 for how in ("alone", "group")]  # fmt: skip
        assert files[0] == files[1]
    # Different seeds are different runs.
    assert len({outcome.rows[0]["train_loss"] for outcome in found}) == len(configs)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("attention", NAMES)
def test_each_seed_is_the_run_it_is_alone(model, attention, dataset, tmp_path):
    same_as_alone(configs_of(model, attention), dataset, tmp_path)


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        *(("mlp", "deepseek_mla"), ("cnn", "linear"), ("cnn", "performer"), ("cnn", "linformer")),
        *(("cnn", "kimi_k2"), ("cnn", "deepseek_mla"), ("cnn", "sparse")),
    ],
)
def test_published_forms_too(model, attention, dataset, tmp_path):
    """deepseek_mla draws noise: each seed its own."""
    quirks = {"data.validation": 0, "train.train_mode": "always"}
    sizes = {"attention.linear.kernel_size": 8, "attention.linformer.k": 8}  # of 64 tokens
    configs = configs_of(model, attention, recipe="published", **quirks, **sizes)
    same_as_alone(configs, dataset, tmp_path)


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("performer", {"redraw_interval": 2}),
        ("linformer", {"share_heads": False, "share_kv": False, "k": 3}),
        ("kimi_k2", {"attention": "mla", "tau": 1e-3, "balance_alpha": 0.01}),  # clips always
        ("deepseek_mla", {"q_rank": 8, "balance_alpha": 0.01}),
        ("multi_head", {"rope": True}),
    ],
)
def test_options_with_state_or_weights_of_their_own(attention, options, dataset, tmp_path):
    overrides = {f"attention.{attention}.{key}": value for key, value in options.items()}
    same_as_alone(configs_of("mlp", attention, **overrides), dataset, tmp_path, weights=1e-3)


def test_resnet9_and_three_seeds(dataset, tmp_path):
    """Deep: a ReLU that rounds to the other side of 0 shows, as Adam steps by the sign at first."""
    configs = configs_of("resnet9", "multi_head", 3)
    same_as_alone(configs, dataset, tmp_path, weights=5e-3, losses=2e-3)


def test_initial_weights_are_those_of_each_seed_bit_for_bit(dataset):
    for attention in NAMES:
        configs = configs_of("cnn", attention)
        models = [build_model(config, 10) for config in configs]
        one = stack(models)
        for config, model in zip(configs, models, strict=True):
            for key, value in build_model(config, 10).state_dict().items():
                assert torch.equal(value, model.state_dict()[key]), key
        assert not one.one_by_one()  # each of ours runs stacked
        count = sum(p.numel() for p in one.parameters())
        assert count == sum(p.numel() for model in models for p in model.parameters())


# --- layers of others -----------------------------------------------------------------------------


class Foreign(Attention):
    """Mixes the images of a batch, draws in training and counts its batches: none can be stacked
    unseen."""

    def __init__(self, dim, *, seq_len, grid=None):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(dim))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x, key_mask=None):
        if self.training:
            self.batches += 1
            x = x + 0.1 * torch.randn_like(x)
        return (x - x.mean(0)) * self.scale

    def auxiliary_loss(self):
        return self.scale.square().sum() if self.training else None

    @torch.no_grad()
    def after_step(self):
        self.scale.mul_(0.9)


@pytest.fixture
def foreign():
    register_attention("foreign")(Foreign)
    yield "foreign"
    del _registry._layers["foreign"]


def test_a_layer_of_others_runs_seed_by_seed(foreign, dataset, tmp_path):
    configs = configs_of("cnn", foreign)
    one = stack([build_model(config, 10) for config in configs])
    assert isinstance(one.attention, PerSeed) and len(one.one_by_one()) == 1
    with pytest.warns(UserWarning, match=r"^foreign runs one seed after the other: Foreign: .*say"):
        same_as_alone(configs, dataset, tmp_path)


# --- as a CUDA graph, with the capture stood in for -----------------------------------------------


def test_a_graphed_step_is_the_eager_one(dataset, tmp_path, monkeypatch):
    """The part of Graphed that a CPU can run: warming up must leave no trace in S models."""

    configs = configs_of("cnn", "deepseek_mla")
    begin, found = tab.train.together.SeedSteps.__init__, []
    for change in (rehearsed, repeatable):

        def other(self, *args, change=change):
            begin(self, *args)
            change(self)

        monkeypatch.setattr(tab.train.together.SeedSteps, "__init__", other)
        ends = together(configs, dataset, tmp_path / change.__name__)
        found.append([numbers(o) for o in ends])
    assert found[0] == found[1]
