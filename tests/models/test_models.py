"""Models: shapes, the same start for every variant, an identity at first, no global state."""

import pytest
import torch

from tab.layers import layer_names
from tab.models.image_model import build_model, model_names, parameter_count
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import parameters_of

SMALL = {"model.mlp.hidden": 16, "model.cnn.hidden": 16, "model.cnn.channels": 4}
SMALL |= {"model.mlp.match": "", "model.cnn.match": "", "model.resnet9.match": ""}
SMALL |= {"model.resnet9.hidden": 16, "model.resnet9.channels": 4}
SMALL |= {"model.vit.match": "", "model.vit.hidden": 16}
BOTH = pytest.mark.parametrize("model", model_names())


def model_of(model, attention="multi_head", recipe="fair", seed=0, **overrides):
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    return build_model(
        load_recipe(recipe, {**SMALL, **given}).run_config(model, attention, seed), 10
    )


def images(generator, count=4):
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize("recipe", ["document", "fair"])
@pytest.mark.parametrize("attention", layer_names())
def test_any_attention_fits_any_model(model, recipe, attention, generator):
    net, x = model_of(model, attention, recipe), images(generator)
    logits = net(x)
    assert logits.shape == (4, 10)
    logits.square().mean().backward()
    tokens = net.tokens(x)
    assert net.attention(tokens).shape == tokens.shape
    assert net.filters().shape[1] == 3


@pytest.mark.parametrize(
    ("recipe", "model", "tokens"),
    [("document", "mlp", 1), ("document", "cnn", 1), ("fair", "mlp", 16), ("fair", "cnn", 64)],
)
def test_number_of_tokens(recipe, model, tokens, generator):
    assert model_of(model, recipe=recipe).tokens(images(generator)).shape[1] == tokens


@BOTH
def test_variants_with_one_seed_start_from_the_same_common_weights(model):
    control = model_of(model, "none").state_dict()
    other_seed = model_of(model, "none", seed=1).state_dict()
    for attention in layer_names():
        if attention == "none_again":  # which is to have others
            continue
        state = model_of(model, attention).state_dict()
        common = [key for key in control if not key.startswith(("attention.", "block."))]
        assert all(torch.equal(control[key], state[key]) for key in common)
    moved = [k for k in common if k.endswith("weight") and control[k].dim() > 1]
    assert moved
    assert not any(torch.equal(control[key], other_seed[key]) for key in moved)


@BOTH
def test_building_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    for attention in layer_names():
        model_of(model, attention)
    assert torch.equal(before, torch.get_rng_state())


@BOTH
def test_a_residual_block_starts_as_the_control(model, generator):
    x = images(generator)
    assert torch.equal(model_of(model, "multi_head")(x), model_of(model, "none")(x))
    net = model_of(model, "multi_head")
    net(x).square().mean().backward()
    assert net.block.scale.grad.abs().sum() > 0


def test_attention_in_place_of_a_layer(generator):
    net, x = model_of("mlp", "multi_head", "document"), images(generator)
    tokens = net.tokens(x)
    assert torch.equal(tokens, net.embed(x))
    assert torch.allclose(net(x), net.head(net.attention(tokens)))


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
def test_positions(position, generator):
    net = model_of("cnn", "multi_head", model__cnn__position=position)
    assert (net.position is not None) == (position == "learned")
    assert (net.attention.rope is not None) == (position == "rope")
    assert net(images(generator)).shape == (4, 10)


def test_the_grid_reaches_the_attention():
    assert model_of("cnn").attention.grid == (8, 8)
    assert model_of("mlp").attention.grid is None
    assert model_of("cnn", recipe="document").attention.grid is None


@pytest.mark.parametrize("stem", ["pool", "stride"])
@pytest.mark.parametrize("tokens", ["grid", 4])
def test_stems_and_tokens_of_the_cnn(stem, tokens, generator):
    net = model_of("cnn", model__cnn__stem=stem, model__cnn__tokens=tokens)
    assert net.tokens(images(generator)).shape == (4, 64 if tokens == "grid" else 4, 16)
    assert net.filters().shape == (4, 3, 3, 3)


@pytest.mark.parametrize("cells", [4, 8])
def test_resnet9_attends_on_its_last_feature_map(cells, generator):
    net, x = model_of("resnet9", model__resnet9__cells=cells), images(generator)
    tokens = net.tokens(x)
    assert tokens.shape == (4, cells**2, 16) and net.attention.grid == (cells, cells)
    assert torch.equal(net.head(tokens), net.head.layers(tokens.amax(1)))  # max over the cells
    assert net.filters().shape == (4, 3, 3, 3)
    with pytest.raises(ValueError, match="cells = 5: give 4, 8"):
        model_of("resnet9", model__resnet9__cells=5)


def test_resnet9_has_the_usual_size():
    """Eight convolutions without bias, their batch norms, and 512 → 10."""
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128)]
    convolutions += [(128, 256), (256, 512), (512, 512), (512, 512)]
    size = sum(9 * a * b + 2 * b for a, b in convolutions) + 512 * 10 + 10
    config = load_recipe("fair", {"model.resnet9.match": ""}).run_config("resnet9", "none", 0)
    assert parameters_of(config) - 16 * 512 == size == 6_573_130  # less the learned positions


def test_residual_blocks_of_resnet9_add(generator):
    backbone = model_of("resnet9", "none", model__resnet9__position="none").backbone.eval()
    block, x = backbone.convolutions[-1], torch.randn(2, 16, 4, 4, generator=generator)
    assert torch.equal(block(x), x + block.branch(x))
    torch.nn.init.zeros_(block.branch[-2].weight)  # of the last batch norm
    assert torch.equal(block(x), x)


def test_filters_of_the_mlp_look_at_the_image_as_it_is(generator):
    net, x = model_of("mlp", "none", "document"), images(generator)
    hidden = torch.einsum("bchw,fchw->bf", x, net.filters()) + net.backbone.linear.bias
    assert torch.allclose(net.tokens(x)[:, 0], hidden.relu(), atol=1e-5)


def test_the_document_counts(generator):
    """3072·h + h, then two hidden layers of h, then 10 logits."""
    net = model_of("mlp", "none", "document", model__mlp__hidden=512)
    assert parameter_count(net) == 3072 * 512 + 512 + 2 * (512 * 512 + 512) + 5130


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match=r"num_heads=3 does not divide dim=16.*2, 4"):
        model_of("mlp", "multi_head", attention__multi_head__num_heads=3)
