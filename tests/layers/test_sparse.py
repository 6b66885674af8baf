"""The layer "sparse": its attention matrix, its patterns, key masks, errors."""

import pytest
import torch

from tab.layers import build_attention
from tab.layers.sparse import _pattern


def test_layer_is_its_attention_matrix(generator):
    layer = build_attention("sparse", 12, seq_len=50, num_heads=3, block_size=4, num_random=2)
    for n in (50, 37):
        x = torch.randn(2, n, 12, generator=generator)
        matrix = layer.attention_matrix(x)  # (B, H, N, N)
        assert torch.equal(matrix[0] > 0, layer.pattern(n).to_dense())
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, n))
        _, _, v = layer.project(x)
        torch.testing.assert_close(layer(x), layer.out((matrix @ v).transpose(1, 2).flatten(2)))
        assert torch.equal(layer(x), layer.eval()(x))  # the same pattern in training and after


def test_layer_trains_after_inference_mode(generator):
    layer = build_attention("sparse", 4, seq_len=9, num_heads=1, block_size=2)
    x = torch.randn(1, 7, 4, generator=generator)  # not seq_len: its pattern is made on demand
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.qkv.weight.grad.isfinite().all()


def test_layer_makes_a_pattern_once(generator):
    layer = build_attention("sparse", 4, seq_len=20, num_heads=1, block_size=2, seed=1234)
    before = _pattern.cache_info().misses
    for n in (*range(1, 20), *range(1, 20)):
        layer(torch.randn(1, n, 4, generator=generator))
    assert _pattern.cache_info().misses == before + 19


def test_layer_obeys_a_key_mask(generator):
    layer = build_attention("sparse", 8, seq_len=40, num_heads=2, block_size=4, num_random=1)
    x = torch.randn(1, 40, 8, generator=generator, requires_grad=True)
    mask = torch.arange(40)[None] < 33
    out = layer(x, mask)
    weights = layer.attention_matrix(x) * mask[:, None, None, :]
    weights = weights / weights.sum(-1, keepdim=True)
    expected = layer.out((weights @ layer.project(x)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected * mask[..., None])
    (grad,) = torch.autograd.grad(out[:, :33].sum(), x)
    assert grad[:, 33:].abs().max() == 0


def test_layer_compiles_and_runs_on_meta(generator):
    layer = build_attention("sparse", 8, seq_len=40, num_heads=2, block_size=4)
    x = torch.randn(2, 40, 8, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    given = torch.autograd.grad(compiled(x).square().sum(), layer.parameters())
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.device("meta"):
        skeleton = build_attention("sparse", 8, seq_len=40, num_heads=2, block_size=4)
    assert skeleton(x.to("meta")).shape == x.shape
    assert torch.equal(skeleton.pattern(40).col, layer.pattern(40).col)


def test_layer_with_one_block_is_full_attention(generator):
    layer = build_attention("sparse", 8, seq_len=5, num_heads=2, block_size=32)
    x = torch.randn(2, 5, 8, generator=generator)
    full = torch.nn.functional.scaled_dot_product_attention(*layer.project(x))
    torch.testing.assert_close(layer(x), layer.out(full.transpose(1, 2).flatten(2)))


def test_layer_errors():
    with pytest.raises(ValueError, match="block_size ≥ 1; got 64 and 0"):
        build_attention("sparse", 8, seq_len=64, block_size=0)
    with pytest.raises(ValueError, match=r"an odd window.* got 4; nearest: 3 or 5"):
        build_attention("sparse", 8, seq_len=64, window=4)
