"""FAVOR+ in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import pytest
import torch
from emulated import (
    FLOAT,
    FLOOR,
    HEADS,
    POINTER,
    TYPES,
    heads,
    inputs,
    ints,
    pointer,
    run,
    struct,
    unit_last,
)  # fmt: skip
from proof import assert_accurate

from tab import performer_attention
from tab.ops.performer import forward_reference

FAVOR = struct(
    *ints("heads n d dv m relu"), ("mask", POINTER), ("w", POINTER),
    *((name, HEADS) for name in "qkv"),
)  # fmt: skip
PERFORMER_FORWARD = struct(
    ("in", FAVOR),
    ("eps", FLOAT),
    ("o", HEADS),
    *((name, POINTER) for name in ("s", "z", "c", "lse")),
)
PERFORMER_BACKWARD = struct(
    ("in", FAVOR), ("do", HEADS), ("o", HEADS), ("c", POINTER), ("lse", POINTER),
    *((name, HEADS) for name in ("dq", "dk", "dv")),
)  # fmt: skip


class Performer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w, mask, relu, eps):
        (b, h, n, d), dv, m = q.shape, v.shape[3], w.shape[0]
        favor = FAVOR(h, n, d, dv, m, relu, pointer(mask), w.data_ptr(), *map(heads, (q, k, v)))

        def make(o, *rest):
            return PERFORMER_FORWARD(favor, eps, heads(o), *map(pointer, rest))

        rest = q.new_empty(b * h, m, dv), q.new_empty(b, h, m), q.new_empty(b, h, m), q[..., 0]
        o, s, z, c, lse = run("performer_fwd", make, q, [v, *rest])
        ctx.save_for_backward(q, k, v, o, c, lse)
        ctx.favor = favor
        s = s.view(b, h, m, dv)
        ctx.mark_non_differentiable(s, z, c, lse)
        return o, s, z, c, lse

    @staticmethod
    def backward(ctx, do, *_):
        q, k, v, o, c, lse = ctx.saved_tensors
        do = unit_last(do)

        def make(*outputs):
            state = c.data_ptr(), lse.data_ptr()
            return PERFORMER_BACKWARD(ctx.favor, heads(do), heads(o), *state, *map(heads, outputs))

        return *run("performer_bwd", make, q, [q, k, v]), None, None, None, None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv", "m", "relu", "masked", "eps"),
    [(1, 1, 1, 8, 3, 5, False, False, 0.0), (2, 2, 17, 33, 8, 70, False, True, 0.5),
     (1, 1, 63, 64, 96, 64, False, False, 0.0), (1, 2, 64, 96, 40, 130, False, True, 0.0),
     (1, 2, 2, 8, 16, 96, True, False, 0.25), (1, 1, 64, 70, 64, 66, True, True, 0.25)],
)  # fmt: skip
def test_performer(b, h, n, d, dv, m, relu, masked, eps, dtype, generator):
    x = inputs(generator, b, h, n, d, dv, dtype)
    w = torch.randn(m, d, generator=generator)
    mask = torch.rand(b, n, generator=generator) > 0.3 if masked else None
    if masked:
        mask[-1] = False  # a batch entry without keys

    def finish(o, s, z, c, lse):  # states against a shift of their own; no gradient through them
        state = (y.masked_fill(y.isinf(), 0.0) for y in (s, z, c, lse))
        return o, *(y.detach() + 0 * o.float().sum() for y in state)

    def given(*x):
        return finish(*Performer.apply(*x, w, mask, relu, eps))

    def naive(*x):
        acc = w.to(torch.promote_types(x[0].dtype, torch.float32))
        options = {"kernel": "relu" if relu else "softmax", "key_mask": mask, "eps": eps}
        o, state = performer_attention(*x, acc, return_state=True, backend="reference", **options)
        *_, lse = forward_reference(*x, acc, mask, None, None, None, int(relu), False, eps)
        return finish(o, *state, lse)

    names = "o S z c lse dq dk dv"
    assert_accurate(given, naive, x, floor=2 * FLOOR[dtype], names=names)
