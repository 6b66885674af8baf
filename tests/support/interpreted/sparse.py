"""The Triton kernels of `sparse`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, assert_accurate, layout
from textbook.softmax import blocks, naive

from tab import BlockPattern
from tab.kernels import _few
from tab.kernels import sparse as kernels
from tab.ops.sparse import backward_reference, forward_reference, sparse_fwd

forward, backward = interpreted("sparse_fwd", "sparse_bwd")

NAMES = "o dq dk dv"


def inputs(pattern, d, dv, generator, dtype=torch.float32, b=1, h=2):
    shapes = ((b, h, pattern.n, d), (b, h, pattern.n, d), (b, h, pattern.n, dv))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def check(x, pattern, causal=False, scale=0.4):
    rest = *pattern.tensors, None, None, pattern.block_size, causal, scale, 0.0
    f = lambda *x: sparse_fwd.apply("cuda", *x, *rest)[0]  # noqa: E731
    assert_accurate(f, naive(blocks(pattern, causal), scale), x, names=NAMES)


def random_pattern(n, block_size, heads, density, generator):
    nb = -(-n // block_size)
    mask = torch.rand(*(heads,) * (heads > 0), nb, nb, generator=generator) < density
    mask[..., nb // 2, :] = False  # a row of blocks that sees nothing
    return BlockPattern.from_blocks(mask, block_size, n)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "n, block_size", [(1, 64), (30, 8), (64, 1), (48, 16), (100, 24), (150, 80)]
)
def test_sizes(n, block_size, causal, generator):
    pattern = random_pattern(n, block_size, 1, 0.7, generator)
    check(inputs(pattern, 8, 12, generator, h=1), pattern, causal)


@pytest.mark.parametrize("cut, heads, causal", [(1, 0, True), (1, 2, False), (2, 2, True)])
def test_long_rows(cut, heads, causal, generator, monkeypatch):
    """Rows and columns cut in parts, some of them empty when causal, the pattern shared or not."""
    monkeypatch.setattr(kernels, "CUT", cut)
    monkeypatch.setattr(_few, "FEW", 0)
    pattern = random_pattern(36, 8, heads, 0.6, generator)
    check(inputs(pattern, 4, 5, generator, b=1 if heads else 2), pattern, causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, generator, monkeypatch):
    monkeypatch.setattr(kernels, "CUT", 3)
    pattern = BlockPattern.bigbird(73, heads=1, block_size=16, num_random=1)
    check(inputs(pattern, 16, 16, generator, dtype, h=1), pattern)


@pytest.mark.parametrize("d, dv", [(80, 3), (3, 130)])
def test_wide_heads(d, dv, generator, monkeypatch):
    """Several tiles across a head, and tiles that its end cuts."""
    monkeypatch.setattr(kernels, "CUT", 2)
    pattern = random_pattern(50, 16, 1, 0.8, generator)
    check(inputs(pattern, d, dv, generator, h=1), pattern, scale=0.2)


@pytest.mark.any_torch
@pytest.mark.parametrize("how", LAYOUTS[1:])
def test_layouts(how, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    pattern = BlockPattern.bigbird(21, heads=1, block_size=8)
    q, k, v, do = (torch.randn(2, 1, 21, 8, generator=generator) for _ in range(4))
    x, results = [layout(t, how) for t in (q, k, v, do)], []
    options = *pattern.tensors, None, None, 8, True, 0.3, 0.0
    for q, k, v, do in (x, [t.contiguous() for t in x]):
        o, lse = forward(q, k, v, *options)
        results.append((o, lse, *backward(do, q, k, v, o, lse, *options)))
    for strided, plain in zip(*results, strict=True):
        assert torch.equal(strided, plain)
        assert strided.stride() == plain.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("empty", [False, True])
def test_like_the_reference(dtype, empty, generator, monkeypatch):
    """lse, strides and types too; nothing listed at all; float64 is the reference's."""
    monkeypatch.setattr(kernels, "CUT", 2)
    pattern = random_pattern(36, 8, 2, 0.0 if empty else 0.6, generator)
    if not empty:  # and lists of blocks
        monkeypatch.setattr(_few, "FEW", 0)
    q, k, v, do = (torch.randn(1, 2, 36, 8, generator=generator).to(dtype) for _ in range(4))
    options = *pattern.tensors, None, None, 8, True, 0.3, 0.0
    given, wanted = forward(q, k, v, *options), forward_reference(q, k, v, *options)
    given += backward(do, q, k, v, *wanted, *options)
    wanted += backward_reference(do, q, k, v, *wanted, *options)
    for x, y in zip(given, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert x.stride() == y.stride()
