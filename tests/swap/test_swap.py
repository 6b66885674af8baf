"""`tab.swap_attention`: the same function where it can be the same, and what a mechanism keeps."""

import copy
import pickle

import pytest
import torch
from small_models import HEADS, C, N, encoder, padding, randomised, vit
from torch import nn
from torchvision.models import VisionTransformer

import tab
from tab.layers import get_attention, layer_names
from tab.models.swap.modules import TimmAttention, TorchAttention

CARRIED = ("multi_head", "linear", "performer", "linformer", "sparse", "local", "kv_compression")
CARRIED += ("flex",)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, N, C, generator=torch.Generator().manual_seed(2))


# --- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "scattered"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_multi_head_is_what_torch_computed(x, training, grad, mask, norm_first):
    """With grad off and in eval mode torch takes its fast path, through nested tensors where the
    padding is at the end; at padding its paths differ among each other."""
    before = randomised(encoder(norm_first=norm_first)).train(training)
    after = tab.swap_attention(copy.deepcopy(before), "multi_head", seq_len=N)
    hidden = padding() if mask != "scattered" else padding().flip(1)
    given = torch.zeros(3, N).masked_fill(hidden, -torch.inf) if mask == "float" else hidden
    given = None if mask == "none" else given
    with torch.set_grad_enabled(grad):
        y, z = (model(x, src_key_padding_mask=given) for model in (before, after))
    seen = torch.ones(3, N, dtype=torch.bool) if mask == "none" else ~hidden
    assert (y - z)[seen].abs().max() < 1e-6
    assert z.isfinite().all()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_is_what_a_bare_module_computed(x, batch_first, bias):
    torch.manual_seed(0)
    before = randomised(nn.MultiheadAttention(C, HEADS, bias=bias, batch_first=batch_first))
    after = tab.swap_attention(before, "multi_head", seq_len=N)
    assert isinstance(after, TorchAttention)
    for t, hidden in ((x if batch_first else x.transpose(0, 1), padding()), (x[1], padding()[1])):
        y, z = (m(t, t, t, key_padding_mask=hidden, need_weights=False)[0] for m in (before, after))
        seen = ~hidden if batch_first or t.dim() == 2 else ~hidden.T
        assert y.shape == z.shape and (y - z)[seen].abs().max() < 1e-6


def test_gradients_are_those_of_torch(x):
    before = randomised(encoder(1))
    after = tab.swap_attention(copy.deepcopy(before), "multi_head", seq_len=N)
    seen, found = ~padding(), []
    for model in (before, after):
        model(x, src_key_padding_mask=padding())[seen].square().sum().backward()
        named = dict(model.named_parameters())
        attention = [named[k] for k in named if "self_attn" in k]
        found.append([p.grad for p in (*attention, named["layers.0.linear1.weight"])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"qkv_bias": False, "proj_bias": False},
        {"dynamic_img_size": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_multi_head_is_what_timm_computed(options):
    before = randomised(vit(**options))
    length = {"seq_len": N + 1} if "dynamic_img_size" in options else {}
    after = tab.swap_attention(copy.deepcopy(before), "multi_head", **length)
    assert sum(isinstance(m, TimmAttention) for m in after.modules()) == 2
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert (before(images) - after(images)).abs().max() < 1e-6


def test_heads_of_timm_may_be_wider_than_the_tokens():
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    before = randomised(Attention(C, HEADS, attn_head_dim=16, qkv_bias=True))
    x = torch.randn(2, N, C)
    y = before(x)
    after = tab.swap_attention(before, "multi_head", seq_len=N)
    assert (after(x) - y).abs().max() < 1e-6 and after.layer.inner_dim == 64


def test_a_vit_of_torchvision():
    torch.manual_seed(0)
    before = VisionTransformer(32, 8, 2, HEADS, C, 64, num_classes=10).eval()
    after = tab.swap_attention(copy.deepcopy(before), "multi_head", seq_len=17)
    images = torch.randn(2, 3, 32, 32)
    assert (before(images) - after(images)).abs().max() < 1e-6


def test_dropout_behind_the_attention_is_kept():
    """In training, with the same numbers drawn."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    before = randomised(vit(proj_drop_rate=0.3)).train()
    found = []
    for model in (before, tab.swap_attention(copy.deepcopy(before), "multi_head")):
        torch.manual_seed(5)
        found.append(model(images))
    assert (found[0] - found[1]).abs().max() < 1e-6


def test_without_the_dropout_of_weights_as_the_error_says():
    model = encoder(1, dropout=0.3)
    model.layers[0].self_attn.dropout = 0.0
    layer = tab.swap_attention(model, "performer", seq_len=N).layers[0]
    assert layer.dropout1.p == 0.3 and isinstance(layer.self_attn, TorchAttention)


# --- every mechanism ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARRIED)
def test_weights_are_carried_and_used(x, name):
    """Each projection and bias is the parameter that the optimizer holds, and the output rests on
    it; padding reaches no other token, and the fast path is not taken."""
    model = randomised(encoder(1))
    old = model.layers[0].self_attn
    held = [old.in_proj_weight, old.in_proj_bias, old.out_proj.weight, old.out_proj.bias]
    tab.swap_attention(model, name, seq_len=N)
    layer = model.layers[0].self_attn.layer
    mine = [layer.qkv.weight, layer.qkv.bias, layer.out.weight, layer.out.bias]
    assert all(a is b for a, b in zip(held, mine, strict=True))
    y = model(x, src_key_padding_mask=padding())
    y[~padding()].square().sum().backward()
    assert all(p.grad is not None for p in held)
    assert all(p.grad.abs().max() > 0 for p in held)
    other = x.masked_fill(padding()[..., None], 1e3)
    with torch.no_grad():
        z = model.eval()(other, src_key_padding_mask=padding())
    torch.testing.assert_close(z[~padding()], y[~padding()].detach(), atol=1e-4, rtol=1e-4)


def test_a_bias_of_linformer_counts_real_tokens_only():
    """By the formula, token for token, as if the padding had never been there."""
    torch.manual_seed(0)
    layer = randomised(
        tab.swap_attention(
            nn.MultiheadAttention(C, HEADS, batch_first=True), "linformer", seq_len=N
        )
    ).layer
    x = torch.randn(1, N, C)
    mask = torch.arange(N)[None] < 9
    q, k, v = layer.project(x[:, :9])
    E = layer.E[0, :9]  # (9, K)
    p = (q @ (E.T @ k).mT * (C // HEADS) ** -0.5).softmax(-1)
    truth = layer.out((p @ (E.T @ v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask)[:, :9], truth, atol=1e-5, rtol=1e-5)


def test_mechanisms_without_such_projections_start_anew(x):
    """Every one is either carried or says that it cannot be, and then starts from its own."""
    for name in layer_names():
        model = encoder(1)
        if name in CARRIED:
            continue
        with pytest.raises(ValueError, match=r"self_attn.*carry=False|residual stream"):
            tab.swap_attention(model, name, seq_len=N)
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention
        options = {"num_experts": 0} if get_attention(name).reads_stream else {}
        tab.swap_attention(model, name, seq_len=N, carry=False, **options)
        assert model(x, src_key_padding_mask=padding()).shape == x.shape


def test_grid_of_a_vit():
    plain = {"class_token": False, "global_pool": "avg"}
    options = {"window_size": 3, "two_dimensional": True}
    model = tab.swap_attention(vit(**plain), "local", **options)
    assert model.blocks[0].attn.layer.window_grid == (4, 4)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn.*grid.*16 patches.*1 prefix token,"):
        tab.swap_attention(vit(), "local", **options)
    assert tab.swap_attention(vit(), "local").blocks[0].attn.layer.seq_len == 17
    with pytest.raises(ValueError, match="drops patches"):
        tab.swap_attention(vit(**plain, patch_drop_rate=0.5), "local", **options)


def test_a_vit_of_torchvision_says_its_length():
    model = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=C, mlp_dim=C)
    with pytest.raises(ValueError, match=r"grid.*16 patches.*1 prefix token,"):
        tab.swap_attention(model, "local", two_dimensional=True)
    with pytest.raises(ValueError, match=r"no option num_feature; it takes [\w, ]+$"):
        tab.swap_attention(model, "performer", num_feature=8)
    tab.swap_attention(model, "linformer")(torch.randn(1, 3, 32, 32)).sum().backward()
    layer = model.encoder.layers[0].self_attention.layer
    assert layer.seq_len == 17 and all(p.grad is not None for p in layer.parameters())


def test_a_half_type_the_device_and_the_mode_are_kept():
    model = encoder(1).to(torch.bfloat16).eval()
    model.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    layer = tab.swap_attention(model, "linformer", seq_len=N).layers[0].self_attn
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not layer.training and not layer.layer.training
    assert not layer.layer.qkv.weight.requires_grad and layer.layer.out.weight.requires_grad
    meta = tab.swap_attention(encoder(1).to("meta"), "performer", seq_len=N)
    assert all(p.is_meta for p in meta.parameters())


def test_state_dict():
    """The names that the documentation gives; a swapped model loads what a swapped model saved."""
    model = tab.swap_attention(randomised(encoder(1)), "performer", seq_len=N)
    saved = model.state_dict()
    names = {name.removeprefix("layers.0.self_attn.") for name in saved if "self_attn" in name}
    assert names == {
        *(f"layer.{x}.{y}" for x in ("qkv", "out") for y in ("weight", "bias")),
        *("layer.projection", "layer.seed", "layer.steps"),
    }
    other = tab.swap_attention(encoder(1), "performer", seq_len=N, seed=5)
    other.load_state_dict(saved)
    x = torch.randn(1, N, C)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_some_modules_only():
    model = vit()
    tab.swap_attention(model, "local", modules=["blocks.0.attn"])
    tab.swap_attention(model, "performer", modules=["blocks.1.attn"])
    assert [block.attn.name for block in model.blocks] == ["local", "performer"]
    with pytest.raises(ValueError, match=r"'blocks\.7\.attn'"):
        tab.swap_attention(model, "performer", modules=["blocks.7.attn"])


def test_a_module_in_two_places_stays_one():
    model = encoder(2)
    model.layers[1].self_attn = model.layers[0].self_attn
    tab.swap_attention(model, "performer", seq_len=N)
    assert model.layers[0].self_attn is model.layers[1].self_attn


def test_it_compiles_and_is_pickled(x):
    """In one graph, with padding: what is checked of a mask breaks none."""
    model = tab.swap_attention(encoder(1), "performer", seq_len=N).layers[0]
    run = torch.compile(model, backend="eager", fullgraph=True)
    given = {"src_key_padding_mask": torch.zeros(3, N).masked_fill(padding(), -torch.inf)}
    torch.testing.assert_close(run(x, **given), model(x, **given))
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(x, **given), model(x, **given))
