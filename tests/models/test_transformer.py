"""Transformer blocks and the backbone `vit`: shapes, formulas, starts, and which weights decay."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from tab.layers import control_names, get_attention, layer_names
from tab.models.image_model import build_model, sincos
from tab.models.parts import Branch, shares
from tab.models.stacked import SeedTransformer, stack
from tab.models.transformer import Block
from tab.recipe.recipe import load_recipe
from tab.train.steps import Steps, parameter_groups

SMALL = {
    "model.vit.hidden": 16,
    "model.vit.match": "",
    "model.vit.depth": 2,
    "model.cnn.hidden": 16,
    "model.cnn.channels": 4,
    "model.cnn.match": "",
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it is dense
        yield


def config_of(attention="multi_head", model="vit", seed=0, **overrides):
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    return load_recipe("study", {**SMALL, **given}).run_config(model, attention, seed)


def model_of(*args, **overrides):
    return build_model(config_of(*args, **overrides), 10)


def images(generator, count=3):
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


POOLED = [(a, p) for a in layer_names() for p in ("mean", "class")]
POOLED = [(a, p) for a, p in POOLED if p == "mean" or get_attention(a).mixes_tokens]


@pytest.mark.parametrize("attention, pool", POOLED)
@pytest.mark.parametrize("ffn", [0.0, 2.0])
def test_every_layer_and_every_parameter_takes_part(attention, ffn, pool, generator):
    more = {"attention__local__vit__two_dimensional": False} if pool == "class" else {}
    net = model_of(attention, model__vit__ffn_ratio=ffn, model__vit__pool=pool, **more)
    x = images(generator, 8)
    assert net(x).shape == (8, 10)
    F.cross_entropy(net(x), torch.arange(8)).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle
    net.after_step()
    assert net.tokens(x).shape == (8, 64 + (pool == "class"), 16)


@pytest.mark.parametrize("attention", ["none", "none_again", "ffn"])
def test_a_class_token_wants_tokens_that_meet(attention):
    with pytest.raises(ValueError, match="nothing brings the image to the class token"):
        config_of(attention, model__vit__pool="class")


@pytest.mark.parametrize(("patch", "n"), [(8, 16), (4, 64), (2, 256), (1, 1024)])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_patches(patch, n, pool, generator):
    net = model_of("uniform", model__vit__patch=patch, model__vit__pool=pool)
    x = images(generator)
    cells = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))[1, :, 0, :, 1]  # (3, p, p)
    pixels = cells.permute(1, 2, 0).flatten()  # of the second patch, as 3-vectors
    first = pool == "class"
    expected = net.backbone.linear(pixels)
    assert torch.allclose(net.backbone(x)[1, 1 + first], expected, atol=1e-5)
    assert net.embed(x).shape == (3, n + first, 16)
    assert net.filters().shape == (16, 3, patch, patch)
    filtered = (net.filters() * cells).sum((1, 2, 3)) + net.backbone.linear.bias
    assert torch.allclose(filtered, expected, atol=1e-5)


def test_the_head_reads_the_class_token_or_the_mean(generator):
    x = images(generator)
    for pool, of in (("mean", lambda y: y.mean(1)), ("class", lambda y: y[:, 0])):
        net = model_of(model__vit__pool=pool)
        body = net.body(net.embed(x))
        assert torch.allclose(net(x), net.head.layers(of(body)))
        assert torch.allclose(body.mean(-1), torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), None])
@pytest.mark.parametrize("c", [16, 18, 21])
def test_fixed_positions_tell_tokens_apart(grid, c):
    table = sincos(24, c, grid)
    assert table.shape == (24, c)
    distances = torch.cdist(table, table) + torch.eye(24)
    assert distances.min() > 0.1
    if grid and c % 4 == 0:
        rows, columns = table.unflatten(0, grid).chunk(2, -1)
        assert torch.equal(rows[:, 0], rows[:, 5]) and torch.equal(columns[0], columns[3])


def test_the_class_token_stands_before_the_grid():
    assert torch.equal(sincos(25, 16, (4, 6))[1:], sincos(24, 16, (4, 6)))
    assert not sincos(25, 16, (4, 6))[0].any()


def test_the_block_is_two_gated_pre_norm_branches(generator):
    block = model_of(model__vit__layer_scale=0.3).blocks[0]
    x = torch.randn(2, 64, 16, generator=generator)
    with torch.no_grad():
        block.gate.uniform_(-1, 1, generator=generator)
        block.ffn_gate.uniform_(-1, 1, generator=generator)
    middle = x + block.gate * block.layer(block.norm(x))
    ffn = block.ffn.down(F.gelu(block.ffn.up(block.ffn_norm(middle))))
    assert torch.allclose(block(x), middle + block.ffn_gate * ffn, atol=1e-6)
    assert block.ffn.up.weight.shape == (32, 16)  # ffn_ratio 2


@pytest.mark.parametrize("attention", ["deepseek_mla", "kimi_k2"])
def test_experts_stand_where_the_ffn_does(attention, generator):
    block = model_of(attention).blocks[0].eval()
    x = torch.randn(2, 64, 16, generator=generator)
    layer = block.layer
    middle = x + block.gate * layer.attend(block.norm(x), None)
    assert torch.allclose(block(x), middle + block.ffn_gate * layer.moe(layer.norm(middle)))
    assert block.ffn is None and block.ffn_norm is None
    # Without an FFN there are no experts either; with none of its own, it has the FFN of all.
    assert model_of(attention, model__vit__ffn_ratio=0.0).blocks[0].ffn_gate is None
    dense = model_of(attention, **{f"attention__{attention}__num_experts": 0}).blocks[0]
    assert dense.ffn is not None and dense.layer.moe is None


@pytest.mark.parametrize("attention", ["none", "none_again"])
def test_the_control_has_no_branch_and_no_weights_for_one(attention):
    bare = model_of(attention, model__vit__ffn_ratio=0.0)
    assert not list(bare.blocks.parameters())
    names = {name.split(".")[1] for name, _ in model_of(attention).blocks.named_parameters()}
    assert names == {"ffn", "ffn_norm", "ffn_gate"}


@pytest.mark.parametrize("model", ["vit", "cnn"])
def test_variants_start_from_the_same_common_weights(model):
    control = model_of("none", model=model).state_dict()
    for attention in layer_names():
        state = model_of(attention, model=model).state_dict()
        other = [
            key for key in control if key not in state or not torch.equal(control[key], state[key])
        ]
        if attention in ("deepseek_mla", "kimi_k2") and model == "vit":
            assert all("ffn" in key for key in other)
        elif attention != "none_again":
            assert not other, attention


def test_the_gates_start_where_the_recipe_says(generator):
    net, x = model_of(model__vit__layer_scale=0.0), images(generator)
    assert torch.equal(net(x), model_of("none", model__vit__layer_scale=0.0)(x))
    assert (model_of(model__vit__layer_scale=0.25).blocks[1].gate == 0.25).all()


def test_branches_are_what_the_blocks_add(generator):
    net, x = model_of(model__vit__layer_scale=0.5), images(generator)
    found = net.branches(x)
    assert [branch.kind for branch in found] == ["attention", "ffn"] * 2
    assert all(isinstance(branch, Branch) for branch in found)
    assert torch.equal(found[0].stream, net.embed(x))
    end = found[-1].stream + found[-1].output
    assert torch.allclose(net.norm(end), net.body(net.embed(x)), atol=1e-5)
    old = load_recipe("fair", {"model.cnn.hidden": 16, "model.cnn.match": ""})
    (branch,) = build_model(old.run_config("cnn", "linear", 0), 10).branches(x)
    assert branch.kind == "attention" and not branch.output.any()


def test_shares_of_the_stream(generator):
    net, x = model_of(model__vit__layer_scale=0.5, model__vit__depth=1), images(generator)
    found = net.branches(x)
    share = (found[0].output.norm() / found[0].stream.norm()).item()
    assert shares(found)["branch_share"] == pytest.approx(share)
    assert shares(found)["branch_gate"] == pytest.approx(0.5)
    assert shares(found)["ffn_share"] > 0
    half = model_of(model__vit__layer_scale=0.25, model__vit__depth=1).branches(x)
    assert shares(half)["branch_share"] == pytest.approx(share / 2)
    nothing = {"branch_share": None, "branch_gate": None, "ffn_share": None}
    assert shares(model_of("none", model__vit__ffn_ratio=0.0).branches(x)) == nothing


def test_options_of_transformer_blocks_alone():
    with pytest.raises(ValueError, match="depth = 2 is an option of transformer blocks, but block"):
        load_recipe("fair", {"model.cnn.depth": 2})
    with pytest.raises(ValueError, match='matches transformer blocks, but block = "residual"'):
        load_recipe("fair", {"model.cnn.match": "block:multi_head"})


# --- training -------------------------------------------------------------------------------------


def groups_of(**overrides):
    config = config_of(**overrides)
    net = build_model(config, 10)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, config.train)
    return [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups]


def test_decay_and_rate_of_each_parameter():
    (weights, lr, decay), (bare, lr2, none), (gates, lr3, none2) = groups_of(
        model__vit__pool="class", model__vit__position="learned", train__gate_lr_ratio=7.0
    )
    assert decay == 0.05 and none == none2 == 0.0
    assert lr == lr2 == 0.005 and lr3 == pytest.approx(7 * lr)
    assert all(name.endswith("weight") and "norm" not in name for name in weights)
    assert {"position", "backbone.class_token", "head.layers.0.bias"} <= bare
    assert {"blocks.0.norm.weight", "blocks.1.ffn_norm.bias", "blocks.0.ffn.up.bias"} <= bare
    assert gates == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("gate", "ffn_gate")}
    assert "blocks.0.layer.qkv.weight" in weights


def test_recipes_from_before_have_one_group_in_the_order_of_the_model():
    old = load_recipe("fair", {"model.cnn.hidden": 16, "model.cnn.match": ""})
    config = old.run_config("cnn", "deepseek_mla", 0)
    net = build_model(config, 10)
    (group,) = parameter_groups(net, config.train)
    assert all(p is q for p, q in zip(group["params"], net.parameters(), strict=True))
    assert group["weight_decay"] == 0.05


def test_gates_move_at_their_own_rate():
    moved = {}
    for ratio in (1.0, 10.0):
        config = config_of(train__gate_lr_ratio=ratio, train__schedule="constant")
        net = build_model(config, 10)
        before = net.blocks[0].gate.detach().clone()
        steps = Steps(net, config.train, 1, torch.device("cpu"))
        x = images(torch.Generator().manual_seed(0), 8)
        steps.learn([(x, torch.arange(8))])
        moved[ratio] = (net.blocks[0].gate.detach() - before).abs().mean().item()
    assert moved[10.0] == pytest.approx(10 * moved[1.0], rel=0.05)


def test_every_control_is_here():
    assert {"ffn", "dwconv", "mixer", "uniform", "random"} <= set(control_names())
    assert isinstance(model_of("mixer").blocks[0], Block)


# --- several seeds at once ------------------------------------------------------------------------


STACKED = ("multi_head", "deepseek_mla", "mixer", "random", "none")


@pytest.mark.parametrize("attention, pool", [pair for pair in POOLED if pair[0] in STACKED])
def test_seeds_at_once_compute_what_each_does_alone(attention, pool, generator):
    configs = [config_of(attention, seed=s, model__vit__pool=pool) for s in range(2)]
    x, apart = images(generator, 8), []
    for config, part in zip(configs, x.chunk(2), strict=True):
        net = build_model(config, 10)
        y = net(part)
        y.square().sum().backward()
        apart.append((y.detach(), {n: p.grad for n, p in net.named_parameters()}))
    together = stack([build_model(config, 10) for config in configs])
    assert isinstance(together, SeedTransformer)
    together.start([0, 1], torch.device("cpu"))
    y = together(x)
    torch.testing.assert_close(y, torch.cat([a for a, _ in apart]), atol=1e-5, rtol=1e-4)
    y.square().sum().backward()
    for name, leaf in together.named_parameters():
        if hasattr(leaf, "seeds"):
            for s, grad in enumerate(leaf.grad):
                torch.testing.assert_close(grad, apart[s][1][name], atol=1e-3, rtol=1e-3)


def test_groups_of_seeds_at_once_are_those_of_one():
    configs = [config_of(seed=s, model__vit__pool="class") for s in range(2)]
    models = [build_model(config, 10) for config in configs]
    train = configs[0].train
    alone, whole = parameter_groups(models[0], train), parameter_groups(stack(models), train)
    assert [len(g["params"]) for g in alone] == [len(g["params"]) for g in whole]
    assert [g["lr"] for g in alone] == [g["lr"] for g in whole]
