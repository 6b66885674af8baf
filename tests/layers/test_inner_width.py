"""Layers whose heads together are narrower or wider than the tokens, and experts left out."""

import warnings

import pytest
import torch

from tab.layers import attention_names, attention_options, build_attention, get_attention
from tab.layers.deepseek_mla import LatentMoE

C, N = 16, 12
NAMES = [name for name in attention_names() if name != "none"]


def layer_of(name, **options):
    torch.manual_seed(0)
    if issubclass(get_attention(name), LatentMoE):
        options = {"num_experts": 0} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it is dense
        return build_attention(name, C, seq_len=N, **options)


def run(layer, x, mask=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer(x, mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inner", [8, 48])
def test_tokens_keep_their_width(name, inner, generator):
    layer, x = layer_of(name, inner_dim=inner), torch.randn(2, N, C, generator=generator)
    y = run(layer, x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    mask = torch.arange(N).expand(2, N) < 7
    assert not run(layer, x, mask)[:, 7:].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_width_of_the_tokens_is_the_default(name, generator):
    x = torch.randn(2, N, C, generator=generator)
    assert torch.equal(run(layer_of(name), x), run(layer_of(name, inner_dim=C), x))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_grow_with_it(name):
    sizes = [sum(p.numel() for p in layer_of(name, inner_dim=i).parameters()) for i in (8, 16, 48)]
    assert sizes == sorted(set(sizes))
    if name in ("multi_head", "local", "sparse"):
        assert sizes[2] == 4 * C * 48 + C


@pytest.mark.parametrize("name", NAMES)
def test_the_size_option_is_one_of_its_options(name):
    layer, known = get_attention(name), attention_options(name)
    assert layer.size_option({"num_experts": 0}) == "inner_dim"
    assert {*layer.size_options} <= known.keys()


@pytest.mark.parametrize("name", ["deepseek_mla", "kimi_k2"])
def test_without_experts_it_is_its_attention(name, generator):
    layer, x = layer_of(name), torch.randn(2, N, C, generator=generator)
    whole = layer_of(name, num_experts=4)
    assert torch.equal(layer(x), layer.attend(x, None))
    assert whole.reads_stream and not layer.reads_stream
    assert not [key for key in layer.state_dict() if "moe" in key or key.startswith("norm")]
    assert whole.size_option({"num_experts": 4}) == "expert_dim"
    layer.train()
    layer(x).sum().backward()
    layer.after_step()
    assert layer.auxiliary_loss() is None


def test_qk_clip_of_a_wider_attention(generator):
    """The rows of q and k shrink, those of v do not."""
    layer = layer_of("kimi_k2", attention="mha", inner_dim=32, tau=1e-3)
    q, k, v = (w.clone() for w in layer.attention.qkv.weight.detach().chunk(3))
    layer.train()
    layer(torch.randn(2, N, C, generator=generator))
    layer.after_step()
    new_q, new_k, new_v = layer.attention.qkv.weight.chunk(3)
    assert torch.equal(v, new_v)
    assert (new_q.norm() < 0.2 * q.norm()) and (new_k.norm() < 0.2 * k.norm())


def test_heads_must_divide_it():
    with pytest.raises(ValueError, match="num_heads=4 does not divide inner_dim=18"):
        layer_of("multi_head", inner_dim=18)
    with pytest.raises(ValueError, match="num_heads=4 does not divide inner_dim=18"):
        layer_of("deepseek_mla", inner_dim=18)
