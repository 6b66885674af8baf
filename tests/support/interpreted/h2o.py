"""The Triton kernel of H2O's choices, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, layout

from tab.ops.h2o_choice import choose_reference

(choose,) = interpreted("h2o_choose")


def same(q, k, mask, *options):
    """The same tokens as in float64, in whatever order, block by block."""
    given = choose(q, k, mask, *options)
    exact = choose_reference(q.double(), k.double(), mask, *options)
    assert given.shape == exact.shape and given.dtype == exact.dtype
    assert torch.equal(given.sort(-1).values, exact.sort(-1).values)
    return given


def draw(generator, n, d, b=2, h=2, dtype=torch.float32):
    # Large scores: their sums lie apart, and no choice turns on a rounding.
    return [2 * torch.randn(b, h, n, d, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "n, d, heavy, recent, block",
    [
        (1, 3, 1, 0, 1),
        (20, 5, 3, 4, 1),
        (20, 5, 0, 3, 5),
        (33, 20, 4, 0, 8),
        (64, 16, 16, 16, 16),
        (65, 70, 5, 5, 20),  # several pieces of a head, a block that is no tile, a ragged end
        (40, 8, 50, 2, 8),  # nothing ever leaves
    ],
)
def test_sizes(n, d, heavy, recent, block, causal, generator):
    q, k = draw(generator, n, d)
    chosen = same(q, k, None, heavy, recent, causal, block, d**-0.5)
    full = min(heavy + recent, (chosen.shape[2] - 1) * block)
    assert (chosen[:, :, -1] >= 0).sum(-1).eq(full).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, generator):
    q, k = draw(generator, 40, 16, b=1, dtype=dtype)
    same(q, k, None, 4, 4, True, 8, 0.3)


@pytest.mark.parametrize("causal", [False, True])
def test_masks(causal, generator):
    """Padding at the end, holes, and a batch entry of nothing else."""
    q, k = draw(generator, 40, 8, b=3, h=1)
    mask = torch.rand(3, 40, generator=generator) > 0.3
    mask[0] = torch.arange(40) < 17
    mask[1] = False
    chosen = same(q, k, mask, 3, 4, causal, 8, 0.3)
    assert (chosen[1] == -1).all() and not (chosen[2, 0, -1] == -1).any()


@pytest.mark.any_torch
@pytest.mark.parametrize("how", LAYOUTS[1:])
def test_layouts(how, generator):
    q, k = (layout(x, how) for x in draw(generator, 24, 8))
    given = same(q, k, None, 3, 3, False, 6, 0.3)
    assert torch.equal(given, choose(q.contiguous(), k.contiguous(), None, 3, 3, False, 6, 0.3))


def test_limits(generator):
    """float64 and more slots than fit are the reference's."""
    q, k = draw(generator, 1100, 2, b=1, h=1)
    options = None, 1000, 60, False, 550, 0.3
    for x in ((q, k), (q.double(), k.double())):
        assert torch.equal(choose(*x, *options), choose_reference(*x, *options))
