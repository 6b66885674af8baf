"""The Triton kernels of the experts' grouped products, run by Triton's interpreter on CPU tensors
against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import assert_accurate, poisoned

from tab.kernels import moe as kernels
from tab.ops.grouped import grouped_outer_reference, grouped_reference, moe_grouped

# In the place of the loop over slices.
grouped, grouped_outer = interpreted("moe_grouped", "moe_grouped_outer", instead_of="tab")

SIZES = [[5], [0, 0, 7], [3, 0, 90, 1], [1] * 8, [0, 40, 0, 1, 2], [0] * 6 + [2], [130, 70, 0]]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(sizes):
    def f(x, w):
        parts = zip(x.split(sizes), w, strict=True)
        return torch.cat([rows @ weight.mT for rows, weight in parts])

    return f


def inputs(sizes, i, o, generator, dtype=torch.float32):
    x = torch.randn(sum(sizes), i, generator=generator).to(dtype)
    return x, torch.randn(len(sizes), o, i, generator=generator).to(dtype)


@pytest.mark.parametrize("i, o", [(3, 5), (40, 70)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, i, o, generator):
    counts = torch.tensor(sizes)
    x = inputs(sizes, i, o, generator)
    assert_accurate(
        lambda x, w: moe_grouped.apply("auto", x, w, counts), naive(sizes), x, names="y dx dw"
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_dtypes(dtype, generator):
    sizes = [3, 0, 33]
    x = inputs(sizes, 24, 20, generator, dtype)
    counts = torch.tensor(sizes)
    assert_accurate(
        lambda x, w: moe_grouped.apply("auto", x, w, counts), naive(sizes), x, names="y dx dw"
    )


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_rows_of_a_group_in_parts(dtype, generator, monkeypatch):
    """Several partial sums of dW, one of them empty; the same bits each time."""
    monkeypatch.setattr(kernels, "processors", lambda device: 4)
    sizes = [2200, 0, 70, 2]
    g, x = (torch.randn(sum(sizes), 16, generator=generator).to(dtype) for _ in range(2))
    counts, seen = torch.tensor(sizes), []
    launch = kernels.launch

    def recorded(*args, **options):
        seen.append(options["SPLIT"])
        launch(*args, **options)

    monkeypatch.setattr(kernels, "launch", recorded)
    with poisoned():
        dw, again = (grouped_outer(g, x, counts) for _ in range(2))
    assert seen == [2, 2] and torch.equal(dw, again)
    exact = grouped_outer_reference(g.double(), x.double(), counts)
    assert (dw.double() - exact).abs().max() <= torch.finfo(dtype).eps * 4 * exact.abs().max()


def test_counts_of_more_rows_than_there_are(generator):
    """What lies behind x and g is nobody's."""
    both = torch.cat([torch.randn(8, 16, generator=generator), torch.full((9, 16), torch.nan)])
    x, w = both[:8], torch.randn(2, 16, 16, generator=generator)
    good, more = torch.tensor([3, 5]), torch.tensor([3, 14])
    assert torch.equal(grouped(x, w, more), grouped(x, w, good))
    assert torch.equal(grouped_outer(x, x, more), grouped_outer(x, x, good))


def test_strides_and_limits(generator):
    sizes = [4, 6]
    x, w = inputs(sizes, 8, 8, generator)
    counts = torch.tensor(sizes)
    plain = grouped(x, w.mT.contiguous(), counts)
    assert torch.equal(grouped(torch.cat([x, x], 1)[:, :8], w.mT, counts), plain)
    assert torch.equal(grouped(x.T.contiguous().T, w.mT, counts), plain)
    wide = grouped(x.double(), w.double(), counts)  # the reference's
    assert torch.equal(wide, grouped_reference(x.double(), w.double(), counts))
