"""The identity check: it finds what is the same, and nothing that is not."""

import dataclasses

import pytest
import torch
from torch import nn

from tab.analysis.one_variant import Layer
from tab.analysis.same_function import Identity, identity
from tab.cli.tables import identity_tables
from tab.compare.runs import Run
from tab.data.load import load_dataset
from tab.layers import Attention, HeadsAttention, _registry, register_attention
from tab.layers.basic import MultiHeadAttention
from tab.recipe.recipe import load_recipe
from tab.report.same_function import identity_section, sentences
from tab.train.loop import train

SMALL = {"model.mlp.hidden": 16, "model.cnn.hidden": 16, "model.cnn.channels": 4}
PUBLISHED = {
    **SMALL,
    # Two dimensions a head would make the 1e-8 in performer's denominator count.
    "model.mlp.hidden": 64,
    **{f"attention.{name}.cnn.hidden": 16 for name in ("linear", "kv_compression", "kimi_k2")},
}


@pytest.fixture
def more():
    """Registers layers for one test."""
    before = dict(_registry._layers)
    yield register_attention
    _registry._layers.clear()
    _registry._layers.update(before)


@pytest.fixture(scope="module")
def published() -> Identity:
    recipe = load_recipe("published", PUBLISHED)
    return identity(recipe, ["mlp", "cnn"], recipe.attentions())


def of(found: Identity, model: str, attention: str) -> Layer:
    return next(x for x in found.layers if (x.model, x.attention) == (model, attention))


# --- the published study --------------------------------------------------------------------------


def test_nine_published_mlps_are_one(published):
    (mlp,) = [group for group in published.twins() if group.model == "mlp"]
    assert set(mlp.attentions) == {
        *("multi_head", "linear", "performer", "linformer", "kv_compression"),
        *("sparse", "local", "deepseek_mla", "kimi_k2"),
    }
    assert mlp.tie and mlp.difference < 1e-5
    for layer in published.layers:
        if layer.model == "mlp":
            assert layer.tokens == 1 and layer.affine and not layer.noisy
            assert layer.attention == "none" or {"Q", "K"} <= set(layer.idle)
    assert of(published, "mlp", "linear").idle == ("Q", "K", "features.0", "features.1")


def test_published_cnns_differ_but_for_linformer(published):
    (cnn,) = [group for group in published.twins() if group.model == "cnn"]
    assert cnn.attentions == ("multi_head", "linformer") and cnn.tie
    (heads,) = [group for group in published.alike if group.but]
    assert heads.attentions == ("multi_head", "deepseek_mla") and heads.but == "num_heads"
    assert of(published, "cnn", "deepseek_mla").noisy
    assert of(published, "cnn", "linformer").idle == ("E", "F")
    assert of(published, "cnn", "multi_head").idle == ()
    assert not of(published, "cnn", "multi_head").affine


def test_fair_is_twelve_functions():
    shapes = {**SMALL, "model.resnet9.hidden": 32, "model.resnet9.channels": 4}
    shapes |= {f"model.{m}.match": "" for m in ("mlp", "cnn", "resnet9")}
    recipe = load_recipe("fair", shapes)
    found = identity(recipe, ["mlp", "cnn", "resnet9"], recipe.attentions())
    assert found.alike == [] and found.failed == {}
    assert not any(layer.idle for layer in found.layers)
    assert sentences(found)[0] == "No two variants are the same function."


# --- one thing at a time --------------------------------------------------------------------------


def test_two_names_for_one_variant_tie(more, tmp_path):
    @more("alias")
    class Alias(MultiHeadAttention):
        pass

    options = {"model.mlp.hidden": 16, "data.images": 60, "data.validation": 20}
    recipe = load_recipe("quick", {**options, "train.batch_size": 20, "train.epochs": 2})
    found = identity(recipe, ["mlp"], ["none", "multi_head", "alias"])
    (group,) = found.alike
    assert group.attentions == ("multi_head", "alias")
    assert group.tie and group.difference == 0
    dataset = load_dataset("shapes:100/20")
    one, two = (
        train(recipe.run_config("mlp", name, 0), dataset, tmp_path / name).summary[
            "final_train_loss"
        ]
        for name in group.attentions
    )
    assert one == two  # bit for bit


def test_published_twins_tie_in_training(tmp_path):
    options = {"model.mlp.hidden": 16, "train.batch_size": 20, "train.epochs": 2}
    recipe, dataset = load_recipe("published", options), load_dataset("shapes:60/20")
    losses = {
        name: train(recipe.run_config("mlp", name, 0), dataset, tmp_path / name).rows[-1][
            "train_loss"
        ]
        for name in ("multi_head", "linformer", "performer", "linear", "kimi_k2", "self")
    }
    assert losses.pop("self") != pytest.approx(losses["multi_head"], rel=1e-3)
    assert all(loss == pytest.approx(losses["multi_head"], rel=1e-4) for loss in losses.values())


def test_the_same_function_that_starts_elsewhere_need_not_tie(more):
    @more("other_start")
    class OtherStart(MultiHeadAttention):
        def __init__(self, dim, *, seq_len, grid=None, num_heads=4):
            super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
            nn.init.normal_(self.qkv.weight)

    found = identity(load_recipe("quick"), ["mlp"], ["multi_head", "other_start"])
    assert found.alike[0].attentions == ("multi_head", "other_start")
    assert not found.alike[0].tie
    assert "must tie" not in sentences(found)[0]


@pytest.mark.parametrize("size", [0.0, 1e-3])
def test_an_own_weight_that_is_zero_at_first_still_counts(more, size):
    """Equal at the start is not equal: what is not shared is drawn at random."""

    @more("extra")
    class Extra(MultiHeadAttention):
        def __init__(self, dim, *, seq_len, grid=None):
            super().__init__(dim, seq_len=seq_len, grid=grid)
            self.shift = nn.Parameter(torch.full((dim,), size))

        def forward(self, x, key_mask=None):
            return super().forward(x, key_mask) + self.shift

    found = identity(load_recipe("quick"), ["mlp"], ["multi_head", "extra"])
    assert found.alike == []


def test_weights_inside_another_layer_are_shared(more):
    @more("wrapped")
    class Wrapped(Attention):
        def __init__(self, dim, *, seq_len, grid=None):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.inner = MultiHeadAttention(dim, seq_len=seq_len, grid=grid)

        def forward(self, x, key_mask=None):
            return self.inner(x)

    found = identity(load_recipe("quick"), ["cnn"], ["wrapped", "multi_head"])
    assert found.alike[0].attentions == ("wrapped", "multi_head")
    assert of(found, "cnn", "wrapped").idle == ("unused",)
    assert of(found, "cnn", "multi_head").idle == ()


def test_affine_without_heads(more):
    @more("twice")
    class Twice(HeadsAttention):
        def attend(self, q, k, v, key_mask):
            return 2 * v

    found = identity(load_recipe("quick"), ["cnn"], ["multi_head", "twice"])
    assert of(found, "cnn", "twice").affine and of(found, "cnn", "twice").idle == ("Q", "K")


def test_a_layer_that_raises_is_named_and_the_rest_is_checked():
    recipe = load_recipe("quick", {"attention.multi_head.num_heads": 7})
    found = identity(recipe, ["mlp"], ["none", "self", "multi_head"])
    assert [layer.attention for layer in found.layers] == ["none", "self"]
    assert "num_heads=7" in found.failed["mlp", "multi_head"]
    assert "Multi-Head could not be checked: ValueError" in sentences(found)[-1]


def test_nothing_global_moves():
    before = torch.get_rng_state()
    identity(load_recipe("published", PUBLISHED), ["cnn"], ["deepseek_mla", "performer"])
    assert torch.equal(before, torch.get_rng_state())


# --- showing --------------------------------------------------------------------------------------


def test_the_section_says_how_far_names_of_one_function_lie_apart(published):
    runs = [
        Run("mlp", name, 0, None, "done", summary={"final_test_accuracy": score})
        for name, score in (("multi_head", 0.5), ("local", 0.52), ("none", 0.6))
    ]
    text = identity_section(published, runs)
    assert "the 2 names of one function scored 50.0 to 52.0 %" in text
    assert "CNN: no gradient reaches E, F of Linformer." in text
    assert "when num_heads is equal, but for the noise of DeepSeek MLA in training" in text
    assert text.count("| MLP | ") == 11
    assert [table.row_count for table in identity_tables(published)] == [11, 11]
    plain = dataclasses.replace(published, alike=[])
    assert "No two variants are the same function." in identity_section(plain, runs)


# --- the whole model ------------------------------------------------------------------------------


def test_a_table_of_positions_under_a_mean_is_a_bias_of_the_control():
    """The study that was reviewed had a sixth to a third of the control's weights there."""
    found = identity(
        load_recipe("fair", {**SMALL, "model.cnn.match": ""}), ["cnn"], ["none", "multi_head"]
    )
    assert of(found, "cnn", "none").biases == ("position",)
    assert of(found, "cnn", "multi_head").biases == ("attention.out.bias",)
    assert "no more than a bias of the logits, the same for every image: position of Control" in (
        " ".join(sentences(found))
    )


def test_tokens_meet_or_their_sum_is_read():
    """A linear mix under a mean is no meeting; with a norm behind it, it is."""
    names = ["none", "ffn", "uniform", "mixer", "dwconv", "multi_head"]
    small = {"model.cnn.hidden": 16, "model.cnn.channels": 4, "model.cnn.match": ""}
    old = identity(load_recipe("fair", small), ["cnn"], names)
    assert [layer.attention for layer in old.layers if layer.meet] == ["multi_head"]
    new = identity(load_recipe("study", small), ["cnn"], names)
    assert [layer.attention for layer in new.layers if layer.meet] == names[2:]
    assert "no token meets another: Control and Token-wise FFN" in " ".join(sentences(new))
    assert not [layer.biases for layer in new.layers if layer.biases]


def test_the_second_control_need_not_tie():
    """It is the same function, and starts from other weights."""
    small = {"model.cnn.hidden": 16, "model.cnn.channels": 4, "model.cnn.match": ""}
    recipe = load_recipe("study", small)
    found = identity(recipe, ["cnn"], ["none", "none_again", "mixer"])
    (twins,) = found.twins()
    assert twins.attentions == ("none", "none_again") and not twins.tie
    text = " ".join(sentences(found))
    assert "must tie" not in text
    assert "no more than one affine map of the tokens: Learned mix." in text


def test_what_a_gate_of_zero_hides_is_found(more):
    """A residual branch starts at γ = 0: its bias is one all the same."""

    @more("shift")
    class Shift(Attention):
        def __init__(self, dim, *, seq_len, grid=None):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(dim))

        def compute(self, x, key_mask):
            return x + self.bias

    given = {**SMALL, "model.cnn.match": "", "model.cnn.position": "none"}
    found = identity(load_recipe("fair", given), ["cnn"], ["shift"])
    assert set(of(found, "cnn", "shift").biases) == {"attention.bias", "block.norm.bias"}
