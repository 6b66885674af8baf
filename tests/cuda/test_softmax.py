"""Local and sparse attention in CUDA C++, run on the CPU (emulated.py) and held against float64:
softmax with 64 bits a row."""

import pytest
import torch
from emulated import FLOOR, SEES, TYPES, heads, inputs, run, struct, unit_last
from proof import assert_accurate

from tab.ops import BlockPattern
from tab.ops._softmax import softmax_forward
from tab.ops.local_reference import in_window
from tab.ops.merge import merge_sinks, shares

SIZES = "int heads d dv; float scale; Sees sees"
FORWARD = struct("Forward", f"{SIZES}; Heads q k v o; pointer lse")
BACKWARD = struct("Backward", f"{SIZES}; Heads do q k v; pointer lse; Heads dq dk dv_out")


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sees, scale, sinks=None):
        q, k, v = map(unit_last, (q, k, v))
        sizes = q.shape[1], q.shape[3], v.shape[3], scale, sees

        def make(o, lse):
            return FORWARD(*sizes, *map(heads, (q, k, v, o)), lse.data_ptr())

        o, lse = run("softmax_fwd", make, q, [v, q[..., 0].float()])
        if sinks is not None:  # as tab/ops/_sinks_op.py does it
            share, _, lse = shares(lse, sinks[:, None])
            o = o * share[..., None].to(o.dtype)
        ctx.save_for_backward(q, k, v, lse)
        ctx.sizes = sizes
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, lse = ctx.saved_tensors
        do = unit_last(do)

        def make(*outputs):
            inputs = map(heads, (do, q, k, v))
            return BACKWARD(*ctx.sizes, *inputs, lse.data_ptr(), *map(heads, outputs))

        return *run("softmax_bwd", make, q, [q, k, v]), None, None, None


def check_softmax(x, sees, allowed, scale=0.3, sinks=None):
    """`allowed` (H or 1, N, N) must say what `sees` says."""

    def naive(q, k, v):
        acc = torch.promote_types(q.dtype, torch.float32)
        o, lse, _ = softmax_forward(q.to(acc), k.to(acc), v.to(acc), allowed, scale)
        return (o if sinks is None else merge_sinks(o, lse, sinks)[0]).to(q.dtype)

    def given(q, k, v):
        return Softmax.apply(q, k, v, sees, scale, sinks)

    assert_accurate(given, naive, x, floor=FLOOR[x[0].dtype], names="o dq dk dv")


def local(n, left, right, grid=(0, 0), causal=False):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return SEES(n, causal, left, right, *grid), in_window(i, j, left, right, grid[1], causal)[None]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv"),
    [(1, 1, 1, 1, 1), (2, 1, 2, 8, 3), (1, 3, 17, 33, 64), (1, 1, 63, 64, 96), (1, 2, 64, 96, 40),
     (1, 1, 64, 256, 130)],
)  # fmt: skip
def test_softmax_shapes(b, h, n, d, dv, dtype, generator):
    x = inputs(generator, b, h, n, d, dv, dtype)
    check_softmax(x, *local(n, n, n), scale=d**-0.5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "left", "right", "grid", "causal"),
    [(17, 3, 0, (0, 0), False), (64, 0, 5, (0, 0), False), (63, 2, 2, (7, 9), False),
     (64, 1, 2, (8, 8), True), (40, 0, 0, (5, 8), False)],
)  # fmt: skip
def test_local(n, left, right, grid, causal, dtype, generator):
    x = inputs(generator, 1, 2, n, 16, 24, dtype)
    check_softmax(x, *local(n, left, right, grid, causal))


def test_sinks(generator):
    """The backward kernel, given L with the sink, needs no more: it forms Δ as Σ P∘dP."""
    x = inputs(generator, 2, 2, 40, 16, 24, torch.float32)
    check_softmax(x, *local(40, 3, 5), sinks=torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "block", "causal"), [(63, 8, False), (64, 32, True), (50, 64, False), (33, 5, True)]
)
def test_sparse(n, block, causal, dtype, generator):
    """Each head its own blocks, some rows of blocks empty."""
    blocks = -(-n // block)
    mask = torch.rand(2, blocks, blocks, generator=generator) > 0.4
    mask[:, -1] = False
    pattern = BlockPattern.from_blocks(mask, block, n)
    sees = SEES(n, causal, 0, 0, 0, 0, pattern.row_ptr.data_ptr(), pattern.col.data_ptr(),
                min(block, n), 2)  # fmt: skip
    allowed = pattern.to_dense()
    x = inputs(generator, 2, 2, n, 24, 16, dtype)
    check_softmax(x, sees, allowed.tril() if causal else allowed)
    sees.keepalive = pattern
