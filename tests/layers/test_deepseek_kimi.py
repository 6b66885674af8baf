"""The layers deepseek_mla and kimi_k2: what they compute, route, balance and refuse."""

import copy

import pytest
import torch
from small_experts import KINDS, build, tokens
from textbook.deepseek_kimi import slow_layer
from torch.nn import functional as F

from tab.functional import mla_decode
from tab.layers import build_attention
from tab.layers.moe import MoE
from tab.models.image_model import build_layer
from tab.recipe.recipe import load_recipe

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("n", [1, 13, 65])
@torch.no_grad()
def test_layer_is_its_formula(kind, n):
    layer, x = build(kind), tokens(2, n, 24)
    layer.moe.bias.copy_(tokens(8, seed=3) * 0.2 - 0.4)  # a negative bias steers too
    y, p = slow_layer(layer, kind, x)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x).double(), y, atol=1e-5, rtol=1e-5)
    given = layer.attention_matrix(x)
    torch.testing.assert_close(given.double(), p, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.sum(-1), torch.ones(2, 3, n))


@kinds
def test_every_parameter_learns(kind):
    """One step down the gradient lowers the loss, and no parameter is idle but unused experts."""
    layer, x, goal = build(kind, balance_alpha=1e-4), tokens(4, 16, 24), tokens(4, 16, 24, seed=1)
    loss = F.mse_loss(layer(x), goal)
    (loss + layer.auxiliary_loss()).backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    with torch.no_grad():
        for p in layer.parameters():
            p -= 0.05 * p.grad
    assert F.mse_loss(layer(x), goal) < loss


@kinds
def test_padding_changes_nothing(kind):
    layer = build(kind)
    x = tokens(2, 20, 24)
    mask = torch.arange(20).expand(2, 20) < torch.tensor([[20], [12]])
    y = layer(x, mask)
    load = layer.moe.load.clone()
    assert load.sum() == 32 * 2  # real tokens × top_k
    other = x.clone()
    other[1, 12:] = 100.0
    layer.moe.load.zero_()
    torch.testing.assert_close(layer(other, mask)[1, :12], y[1, :12])
    assert torch.equal(layer.moe.load, load)
    torch.testing.assert_close(layer(x[1:, :12])[0], y[1, :12], atol=1e-5, rtol=1e-5)
    if kind.startswith("kimi"):
        assert layer.peak.max() < 10  # padding of size 100 was not seen by QK-Clip either


@kinds
def test_position_matters(kind):
    """Rotary: a permutation of the tokens does not merely permute the outputs; on a grid too."""
    x = tokens(1, 16, 24)
    for options in ({}, {"grid": (4, 4)}):
        layer = build(kind, seq_len=16, **options).eval()
        assert not torch.allclose(layer(x.flip(1)), layer(x).flip(1), atol=1e-4)
    line, grid = (build(kind, seq_len=16, grid=g).eval() for g in (None, (4, 4)))
    assert not torch.allclose(line(x), grid(x), atol=1e-4)


@kinds
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_heads_and_small_widths(kind, heads):
    for dim in (8 * heads, 24):
        layer = build(kind, dim, num_heads=heads) if dim // heads % 2 == 0 else None
        if layer is not None:
            assert layer(tokens(2, 5, dim)).shape == (2, 5, dim)
            assert layer.attention_matrix(tokens(2, 5, dim)).shape == (2, heads, 5, 5)


@kinds
def test_compile_meta_autocast(kind):
    layer, x = build(kind, balance_alpha=1e-3), tokens(2, 9, 24)
    twin = copy.deepcopy(layer)
    y = layer(x)
    y.square().sum().backward()
    torch._dynamo.reset()
    given = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    given.square().sum().backward()
    torch.testing.assert_close(given, y)
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    assert torch.equal(layer.moe.load, twin.moe.load)
    torch.testing.assert_close(layer.auxiliary_loss(), twin.auxiliary_loss())
    if kind.startswith("kimi"):
        torch.testing.assert_close(layer.peak, twin.peak)
    assert copy.deepcopy(layer).auxiliary_loss() is None  # the graph stays behind
    layer.eval()(x)
    assert layer.train().auxiliary_loss() is None
    assert build(kind).to("meta")(x.to("meta")).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    # bfloat16 rounds the router's input and may send a token to another expert: most agree.
    assert ((low.float() - y).abs() < 0.1).float().mean() > 0.8
    layer = layer.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.moe.bias.dtype == torch.float32


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deepseek", "deepseek-q", "kimi-mla"])
@torch.no_grad()
def test_the_cache_is_the_latent(kind):
    """The last token decoded from [c | k_r] alone attends as in the layer's full forward."""
    layer, x = build(kind), tokens(2, 13, 24)
    qn, qr, c, kr = layer.attention.project(x)
    cache = torch.cat([c, kr], -1)
    assert cache.shape[-1] == 24 // 4 + 4 < 2 * 24  # multi-head attention would keep 2·C
    o, _ = mla_decode(
        qn[:, :, -1],
        qr[:, :, -1],
        cache,
        torch.full((2,), 13),
        layer.attention.w_uk,
        layer.attention.w_uv,
    )
    full, _ = layer.attention(x)
    torch.testing.assert_close(layer.attention.out(o.flatten(1)), full[:, -1])


# --- router ---------------------------------------------------------------------------------------


def test_bias_moves_against_the_load():
    layer = build("deepseek", bias_speed=0.01)
    x = tokens(2, 30, 24)
    layer(x), layer(x)  # two forwards, one step: as with gradient accumulation
    load = layer.moe.load.double()
    assert load.sum() == 2 * 2 * 30 * 2
    layer.after_step()
    expected = 0.01 * (load.mean() - load).sign()
    torch.testing.assert_close(layer.moe.bias.double(), expected, atol=1e-9, rtol=1e-6)
    assert expected.abs().max() > 0
    layer.after_step()  # nothing seen since: nothing moves
    torch.testing.assert_close(layer.moe.bias.double(), expected, atol=1e-9, rtol=1e-6)
    layer.eval()(x)
    assert layer.moe.load.sum() == 0
    assert "moe.bias" in layer.state_dict()
    assert not layer.moe.bias.requires_grad


def test_bias_balances_a_lopsided_router():
    layer = build("deepseek", bias_speed=0.02)
    layer.moe.bias[0] = 0.5  # at first every token goes to expert 0
    x, spread = tokens(4, 64, 24), []
    for _ in range(60):
        layer(x)
        spread.append(layer.moe.load.double().std().item())
        layer.after_step()
    assert spread[-1] < spread[0] / 3


def test_balance_loss():
    moe = MoE(6, num_experts=4, top_k=2, balance_alpha=0.5)
    logits, mask = tokens(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    index = logits.topk(2, -1).indices
    total = 0.0
    for b, n in ((0, 5), (1, 3)):  # DeepSeek-V3 eq. 17-20 per sequence
        s = logits[b, :n].sigmoid()
        for e in range(4):
            f = 4 / (2 * n) * (index[b, :n] == e).sum()
            total += 0.5 * f * (s[:, e] / s.sum(-1)).mean() / 2
    torch.testing.assert_close(moe._balance_loss(logits, mask), total)
    even = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
    assert moe._balance_loss(even, None).item() == pytest.approx(0.5)
    assert build("deepseek").auxiliary_loss() is None
    layer = build("deepseek", balance_alpha=1e-4)
    layer(tokens(1, 9, 24))
    assert layer.auxiliary_loss().requires_grad
    layer.after_step()
    assert layer.auxiliary_loss() is None


def test_an_idle_expert_gets_a_zero_gradient():
    layer = build("deepseek")
    layer.moe.bias[3] = -100.0
    layer(tokens(2, 9, 24)).square().sum().backward()
    assert layer.moe.w13.grad[3].abs().max() == 0
    assert layer.moe.w13.grad[0].abs().max() > 0


# --- what a config says --------------------------------------------------------------------------


def test_what_a_config_does_not_say_is_what_it_was():
    """Latent by itself, and in new comparisons; results from before it was have multi-head."""
    assert build_attention("kimi_k2", 24, seq_len=16, num_heads=3).latent
    config = load_recipe("document").run_config("mlp", "kimi_k2", 0)
    assert config.attention_options == {"num_heads": 4} and not build_layer(config).latent
    for recipe, latent in (("fair", True), ("study", True), ("published_winners", False)):
        given = {"model.mlp.match": "", "model.mlp.hidden": 64}
        config = load_recipe(recipe, given).run_config("mlp", "kimi_k2", 0)
        assert build_layer(config).latent == latent, recipe


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (
            "deepseek",
            {"num_heads": 5},
            "num_heads=5 does not divide dim=24; nearest choices: 3, 4, 6",
        ),
        ("deepseek", {"kv_rank": 0}, "kv_rank=0"),
        ("deepseek", {"q_rank": -1}, "q_rank=-1"),
        ("deepseek", {"rope_dim": 3}, "multiple of 2, got 3"),
        ("deepseek", {"top_k": 9}, "top_k=9.*choose 1 to 8"),
        ("deepseek", {"n_group": 3}, "n_group=3 does not divide the 8 experts"),
        ("deepseek", {"num_experts": -1}, "num_experts ≥ 1"),
        ("deepseek", {"expert_dim": 0}, "expert_dim ≥ 1.* 0"),
        ("kimi-mha", {"attention": "gqa"}, "attention='gqa': choose mha or mla"),
        ("kimi-mha", {"tau": 0.0}, "tau=0.0"),
        ("kimi-mha", {"n_group": 2}, "kimi_k2 has no option n_group"),
    ],
)
def test_bad_options(kind, options, says):
    with pytest.raises(ValueError, match=says):
        build(kind, **options)


def test_bad_tokens():
    layer = build("deepseek", seq_len=8)
    with pytest.raises(ValueError, match="9"):
        layer(tokens(1, 9, 24))
