"""The control ladder: layers that are no attention, as rows of a comparison."""

import pytest
import torch
from torch.nn import functional as F

from tab.layers import attention_names, build_attention, control_names, get_attention, layer_names
from tab.models.flops import forward_flops
from tab.models.image_model import build_model
from tab.recipe.names import layers_of
from tab.recipe.recipe import load_recipe

CONTROLS = ["none", "none_again", "ffn", "uniform", "mixer", "random", "dwconv"]
LEARNED = [name for name in CONTROLS if not name.startswith("none")]


def layer_of(name, c=12, n=10, **options):
    torch.manual_seed(0)
    return build_attention(name, c, seq_len=n, **options)


def tokens(generator, b=3, n=10, c=12):
    return torch.randn(b, n, c, generator=generator)


def test_which_names_stand_for_what():
    assert control_names() == CONTROLS
    assert set(attention_names()) & set(CONTROLS) == {"none"}
    assert len(attention_names()) == 12
    assert layer_names() == [*attention_names(), *CONTROLS[1:]]


@pytest.mark.parametrize("name", layer_names())
def test_each_layer_says_whether_it_is_an_attention(name):
    assert get_attention(name).is_attention == (name not in CONTROLS)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("grid", [None, (2, 5)])
def test_every_parameter_has_a_gradient(name, grid, generator):
    layer = layer_of(name, grid=grid)
    layer(tokens(generator)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_the_formulas(generator):
    x = tokens(generator)
    ffn = layer_of("ffn")
    torch.testing.assert_close(ffn(x), ffn.down(F.gelu(ffn.up(x))))
    uniform = layer_of("uniform")
    mean = (x @ uniform.value.weight.mT).mean(1, keepdim=True).expand(-1, 10, -1)
    torch.testing.assert_close(uniform(x), uniform.out(mean))
    for name in ("mixer", "random"):
        layer = layer_of(name, num_heads=2)
        v = x @ layer.value.weight.mT  # (B, N, 24)
        heads = [m @ v[..., 12 * h : 12 * (h + 1)] for h, m in enumerate(layer.weight)]
        torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, -1)))


@pytest.mark.parametrize("grid", [(2, 5), None])
def test_dwconv_sees_its_neighbours_alone(grid, generator):
    layer, x = layer_of("dwconv", grid=grid), tokens(generator)
    other = x.clone()
    other[:, 6] += 1  # row 1, column 1 of the grid
    moved = (layer(other) - layer(x)).abs().amax((0, 2)) > 1e-6
    near = {0, 1, 2, 5, 6, 7} if grid else {5, 6, 7}
    assert set(moved.nonzero().flatten().tolist()) == near
    seen = layer.attention_matrix(x)[0, 0, :, 6] > 0  # who sees token 6
    assert set(seen.nonzero().flatten().tolist()) == near


def test_dwconv_is_a_convolution_of_the_grid(generator):
    layer, x = layer_of("dwconv", grid=(2, 5)), tokens(generator)
    cells = F.linear(x, layer.value.weight).mT.reshape(3, 24, 2, 5)
    expected = F.conv2d(cells, layer.convolution.weight, padding=1, groups=24).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.out(expected))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("grid", [None, (2, 5)])
@pytest.mark.parametrize("n", [1, 7, 9])
def test_fewer_tokens_are_as_if_the_rest_were_masked(name, grid, n, generator):
    layer, x = layer_of(name, grid=grid), tokens(generator)
    mask = (torch.arange(10) < n).expand(3, 10)
    torch.testing.assert_close(layer(x[:, :n]), layer(x, mask)[:, :n])


@pytest.mark.parametrize("name", ["uniform", "mixer", "random", "dwconv"])
def test_more_tokens_than_it_was_made_for(name, generator):
    with pytest.raises(ValueError, match="made for 9 tokens, got 10"):
        layer_of(name, n=9)(tokens(generator))


def test_the_random_mix_is_drawn_from_its_seed_and_kept(generator):
    one, two, x = layer_of("random"), layer_of("random", seed=1), tokens(generator)
    assert not torch.equal(one.weight, two.weight)
    assert torch.equal(one.weight, layer_of("random").weight)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    assert "weight" not in dict(one.named_parameters())
    learned = layer_of("mixer").weight.detach()
    assert one.weight.std() == pytest.approx(10**-0.5, rel=0.1)
    assert learned.std() == pytest.approx(10**-0.5, rel=0.1)


def test_a_mix_of_low_rank(generator):
    layer = layer_of("mixer", num_heads=2, rank=3)
    assert torch.linalg.matrix_rank(layer.matrix(10)).tolist() == [3, 3]
    assert layer.matrix(10).detach().std() == pytest.approx(10**-0.5, rel=0.25)
    with pytest.raises(ValueError, match=r"rank=10: 0 for a free matrix, or 1 to 9.*choice: 9"):
        layer_of("mixer", rank=10)


@pytest.mark.parametrize("name", LEARNED)
def test_rows_of_the_matrix_sum_to_one(name, generator):
    matrix = layer_of(name, grid=(2, 5)).attention_matrix(tokens(generator))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(()).expand(matrix.shape[:-1]))
    assert matrix.shape[0] == 3 and matrix.shape[2:] == (10, 10)


def test_flops_are_counted():
    """Per image: two products for each weight matrix, whatever the layer is called."""
    small = {"model.cnn.hidden": 8, "model.cnn.channels": 4, "model.cnn.match": ""}
    recipe = load_recipe("fair", small | {"attention.mixer.num_heads": 2})
    flops = {
        name: forward_flops(build_model(recipe.run_config("cnn", name, 0), 10)) for name in CONTROLS
    }
    n, c, inner = 64, 8, 16
    projections = 2 * n * 2 * c * inner
    assert flops["none_again"] == flops["none"]
    for name, mix in {
        "ffn": 0,
        "uniform": 0,
        "dwconv": 2 * 9 * n * inner,
        "mixer": 2 * n * n * inner,
        "random": 2 * n * n * inner,
    }.items():
        assert flops[name] - flops["none"] == projections + mix, name


def test_the_second_control_differs_in_its_draws_alone():
    recipe = load_recipe("fair", {"model.mlp.hidden": 8, "model.mlp.match": ""})
    one, two = (recipe.run_config("mlp", name, 3) for name in ("none", "none_again"))
    assert (one.seed, one.draws) == (3, 3) and (two.seed, two.draws) == (3, 1003)
    assert two.id == "mlp-none_again-s3"
    other, moved = build_model(one, 10).state_dict(), build_model(two, 10).state_dict()
    assert other.keys() == moved.keys()
    assert not torch.equal(other["backbone.linear.weight"], moved["backbone.linear.weight"])
    again = build_model(recipe.run_config("mlp", "none", 1003), 10).state_dict()
    assert all(torch.equal(again[key], moved[key]) for key in again)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="num_heads=5 does not divide inner_dim=24"):
        layer_of("mixer", num_heads=5)
    with pytest.raises(ValueError, match="seed_shift=0"):
        layer_of("none_again", seed_shift=0)
    with pytest.raises(ValueError, match="inner_dim=0"):
        layer_of("uniform", inner_dim=0)
    with pytest.raises(ValueError, match="width=0"):
        layer_of("ffn", width=0)


@pytest.mark.parametrize("name", LEARNED)
def test_it_grows_in_its_size_option_at_one_width(name):
    option, *_ = get_attention(name).size_options
    sizes = []
    for n in (4, 8, 24):
        layer = layer_of(name, **{option: n})
        assert layer(torch.zeros(1, 10, 12)).shape == (1, 10, 12)
        sizes.append(sum(p.numel() for p in layer.parameters()))
    assert sizes == sorted(set(sizes))


def test_groups_on_the_command_line():
    assert layers_of("all", ["none", "self"]) == ["none", "self"]
    assert layers_of("ladder", []) == CONTROLS
    assert layers_of("none, linear,ladder", []) == ["none", "linear", *CONTROLS[1:]]
    assert layers_of("all,ladder", attention_names()) == layer_names()
    assert layers_of("self,self", []) == ["self", "self"]  # for Plan to refuse
