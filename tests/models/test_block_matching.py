"""Matching by block: the same backbone, width and head for every row, and blocks of equal size."""

import warnings

import pytest

from tab.layers import attention_names, control_names, layer_names
from tab.models.flops import forward_flops
from tab.models.image_model import build_block, build_model, parameter_count
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import block_flops_of, block_parameters_of

SIZED = [name for name in layer_names() if not name.startswith("none")]
CASES = [
    *[(model, {}) for model in ("cnn", "mlp", "resnet9")],
    *[("vit", {"model.vit.patch": patch}) for patch in (8, 4, 2)],
]
cases = pytest.mark.parametrize(("model", "given"), CASES)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it is dense
        yield


@cases
@pytest.mark.parametrize(
    ("match", "cost"),
    [("block:multi_head", block_parameters_of), ("block-flops:multi_head", block_flops_of)],
)
def test_all_rows_of_the_study_are_within_two_per_cent(model, given, match, cost):
    recipe = load_recipe("study", given | {f"model.{model}.match": match})
    target = cost(recipe.run_config(model, "multi_head", 0))
    off = {name: cost(recipe.run_config(model, name, 0)) / target - 1 for name in SIZED}
    assert max(map(abs, off.values())) < 0.02, off


@pytest.mark.parametrize("model", ["cnn", "vit"])
def test_all_but_the_block_is_the_same(model):
    recipe = load_recipe("study")
    shapes = {}
    for name in layer_names():
        net = build_model(recipe.run_config(model, name, 0), 10)
        shapes[name] = {
            key: value.shape for key, value in net.state_dict().items() if "blocks" not in key
        }
    assert all(each == shapes["multi_head"] for each in shapes.values())
    assert shapes["none"]["head.layers.0.weight"] == (10, 64)


def test_a_block_is_measured_as_it_is_built():
    recipe = load_recipe("study")
    for name in ("ffn", "deepseek_mla", "sparse"):
        config = recipe.run_config("vit", name, 0)
        net = build_model(config, 10)
        assert block_parameters_of(config) == parameter_count(build_block(config))
        assert block_parameters_of(config) == parameter_count(net.blocks[1])
        rest = forward_flops(net) - 3 * block_flops_of(config)
        assert rest == 2 * 64 * 48 * 64 + 2 * 64 * 10  # patches and head


def test_with_experts_and_without():
    recipe = load_recipe("study")
    for name in ("deepseek_mla", "kimi_k2"):
        cnn, vit = (recipe.run_config(model, name, 0).attention_options for model in ("cnn", "vit"))
        assert cnn["num_experts"] == 0 and "inner_dim" in cnn and "expert_dim" not in cnn
        assert "num_experts" not in vit and "expert_dim" in vit and "inner_dim" not in vit


def test_a_choice_of_the_recipe_stays():
    recipe = load_recipe("study", {"attention.linear.inner_dim": 32, "attention.ffn.width": 5})
    assert recipe.run_config("cnn", "linear", 0).attention_options["inner_dim"] == 32
    assert recipe.run_config("cnn", "ffn", 0).attention_options["width"] == 5


def test_the_control_is_what_the_blocks_add_to():
    recipe = load_recipe("study")
    for name in ("none", "none_again"):
        config = recipe.run_config("cnn", name, 0)
        assert block_parameters_of(config) == block_flops_of(config) == 0
    assert set(control_names()) | set(attention_names()) == set(layer_names())


def test_the_budget_of_a_run():
    """Forward and backward are three forward passes."""
    recipe = load_recipe("study")
    for model, low, high in (("cnn", 0.01, 0.02), ("vit", 0.008, 0.02)):
        config = recipe.run_config(model, "multi_head", 0)
        each = forward_flops(build_model(config, 10))
        total = 3 * each * 45_000 * config.train.epochs / 1e15
        assert low < total < high, (model, total)
