"""The forms of attention that the recipe `published` alone reaches, each against its formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from tab.layers import attention_names, attention_options, build_attention, get_attention
from tab.models.image_model import build_model
from tab.recipe.published import published_attentions
from tab.recipe.recipe import load_recipe

N, C, H = 12, 32, 4
D = C // H
OPTIONS = {
    "linear": {"kernel_size": 6},
    "performer": {"num_features": 8},
    "linformer": {"k": 5, "max_seq_len": 16},
    "sparse": {"block_size": 4},
    "local": {"window_size": 4},
    "kv_compression": {"compression_ratio": 0.5},
}
FORMS = [a for a in published_attentions() if a not in ("none", "self")]


def layer_of(name, **options):
    torch.manual_seed(0)
    given = {"num_heads": H, **OPTIONS.get(name, {}), **options}
    return build_attention(name, C, seq_len=N, published=True, **given).double().eval()


def tokens(generator, count=N):
    return torch.randn(2, count, C, generator=generator, dtype=torch.float64)


def test_they_are_reached_by_the_recipe_alone():
    assert not [name for name in attention_names() if "publish" in name.lower()]
    for name in attention_names():
        library, published = get_attention(name), get_attention(name, published=True)
        assert (library is not published) == (name in FORMS)
        for recipe in ("fair", "document", "quick"):
            if name == "multi_head":
                config = load_recipe(recipe, {"model.mlp.hidden": 16, "model.mlp.match": ""})
                net = build_model(config.run_config("mlp", name, 0), 10)
                assert type(net.attention) is library


def test_an_option_that_the_published_form_lacks_is_an_error():
    recipe = load_recipe("published", {"attention.local.two_dimensional": True})
    with pytest.raises(ValueError, match=r"local as published: unknown 'two_dimensional'"):
        recipe.run_config("cnn", "local", 0)
    assert "two_dimensional" not in attention_options("local", published=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_that_none_can_mean_are_refused(name):
    for option in OPTIONS[name]:
        with pytest.raises(ValueError, match=f"{option}=-1: must be from"):
            layer_of(name, **{option: -1})
    if name == "linformer":
        with pytest.raises(ValueError, match="max_seq_len=8: must be from 12"):
            layer_of(name, max_seq_len=8)


def test_padding_is_refused(generator):
    with pytest.raises(ValueError, match="key_mask"):
        layer_of("local")(tokens(generator), torch.ones(2, N, dtype=torch.bool))


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_differentiable_and_their_rows_sum_to_one(name, generator):
    layer, x = layer_of(name), tokens(generator)
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad.abs().sum() > 0
    if name != "linformer":  # its weights have signs where it projects
        rows = layer.float().attention_matrix(x.float())
        assert rows.shape == (2, H, N, N)
        assert (rows.sum(-1) - 1).abs().max() < 1e-5


def heads_of(layer, x):
    """q, k, v (B, H, N, D) by the weights, in the simplest way."""
    wq, wk, wv = layer.qkv.weight.chunk(3)
    return [(x @ w.T).unflatten(-1, (H, D)).transpose(1, 2) for w in (wq, wk, wv)]


def out(layer, y):
    return y.transpose(1, 2).flatten(2) @ layer.out.weight.T


@torch.no_grad()
def test_masks_of_sparse_and_local(generator):
    x = tokens(generator)
    for name, sees in (
        ("sparse", lambda i, j: j <= i and (i // 4 == j // 4 or j % 4 == 0)),
        ("local", lambda i, j: abs(i - j) <= 2),
    ):
        layer = layer_of(name)
        q, k, v = heads_of(layer, x)
        mask = torch.tensor([[sees(i, j) for j in range(N)] for i in range(N)])
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
        assert torch.allclose(layer(x), out(layer, scores.softmax(-1) @ v))
        assert torch.equal(layer.attention_matrix(x)[0, 0] > 0, mask)


@torch.no_grad()
def test_noise_of_deepseek_is_of_training_alone(generator):
    layer, plain, x = layer_of("deepseek_mla"), layer_of("multi_head"), tokens(generator)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    layer.train()
    noisy = torch.stack([layer(x) for _ in range(2)])
    assert not torch.equal(*noisy)
    # d softmax ≤ |ε|/2 a weight, ε ~ 0.01: small, but there
    assert 1e-5 < (noisy[0] - plain(x)).abs().max() < 0.05


@torch.no_grad()
def test_kimi_adds_a_tenth_of_its_context(generator):
    layer, x = layer_of("kimi_k2"), tokens(generator)
    q, k, v = heads_of(layer, x)
    context = x @ layer.context.weight.T
    scores = q @ k.mT / math.sqrt(D) + 0.1 * (context @ context.mT)[:, None]
    assert torch.allclose(layer(x), out(layer, scores.softmax(-1) @ v))


@torch.no_grad()
def test_kv_compression_keeps_each_heads_heaviest_keys(generator):
    layer, x = layer_of("kv_compression"), tokens(generator)
    q, k, v = heads_of(layer, x)
    scores = q @ k.mT / math.sqrt(D)
    for b in range(2):
        for h in range(H):
            kept = scores[b, h].softmax(-1).sum(0).argsort(descending=True)[: N // 2]
            expected = scores[b, h][:, kept].softmax(-1) @ v[b, h][kept]
            assert torch.allclose(layer.mix(q, k, v)[b, h], expected)


@torch.no_grad()
def test_linformer_projects_only_more_than_k_tokens(generator):
    layer, plain = layer_of("linformer"), layer_of("multi_head")
    plain.load_state_dict(layer.state_dict(), strict=False)
    few, many = tokens(generator, 5), tokens(generator)
    assert torch.equal(layer(few), plain(few))
    q, k, v = heads_of(layer, many)
    k, v = layer.E.weight[:, :N] @ k, layer.F.weight[:, :N] @ v
    assert torch.allclose(layer(many), out(layer, F.scaled_dot_product_attention(q, k, v)))


@torch.no_grad()
def test_linear_has_a_map_for_q_and_one_for_k(generator):
    layer, x = layer_of("linear"), tokens(generator)
    q, k, v = heads_of(layer, x)
    fq, fk = (F.elu(t @ w.weight.T) + 1 for t, w in zip((q, k), layer.features, strict=True))
    weights = fq @ fk.mT
    assert torch.allclose(layer(x), out(layer, weights / weights.sum(-1, keepdim=True) @ v))


@torch.no_grad()
@pytest.mark.parametrize("features", [8, 5, 20])
def test_performer_has_at_most_d_orthonormal_rows(features, generator):
    layer, x = layer_of("performer", num_features=features), tokens(generator)
    w = layer.projection
    assert w.shape == (min(features, D), D)
    assert torch.allclose(w @ w.T, D * torch.eye(len(w), dtype=w.dtype), atol=1e-5)
    q, k, v = heads_of(layer, x)
    fq, fk = ((t / D**0.25 @ w.T - (t / D**0.25).square().sum(-1, True) / 2).exp() for t in (q, k))
    weights = fq @ fk.mT
    assert torch.allclose(layer(x), out(layer, weights / weights.sum(-1, keepdim=True) @ v))
    again = layer_of("performer", num_features=features, seed=1)
    assert not torch.equal(w, again.projection)
