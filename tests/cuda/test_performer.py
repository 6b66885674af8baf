"""FAVOR+ in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import pytest
import torch
from emulated import FLOOR, TYPES, heads, inputs, pointer, run, struct, unit_last
from proof import assert_accurate

from tab import performer_attention
from tab.ops.performer import forward_reference

FAVOR = struct("Favor", "int heads n d dv m relu; pointer mask w; Heads q k v")
STATE = struct("State", "pointer s z c")
FORWARD = struct("Forward", "Favor in; float eps; Heads o; pointer s z c lse")
BACKWARD = struct("Backward", "Favor in; Heads do o; pointer c lse; Heads dq dk dv")
STATE_FORWARD = struct(
    "StateForward", "Favor in; int causal; float eps; State from; Heads o; pointer s z c lse"
)
STATE_BACKWARD = struct(
    "StateBackward",
    "Favor in; int causal; State from grad; Heads do o; pointer lse; Heads dq dk dv;"
    "pointer ds0 dz0",
)


class Performer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w, mask, relu, eps):
        (b, h, n, d), dv, m = q.shape, v.shape[3], w.shape[0]
        favor = FAVOR(h, n, d, dv, m, relu, pointer(mask), w.data_ptr(), *map(heads, (q, k, v)))

        def make(o, *rest):
            return FORWARD(favor, eps, heads(o), *map(pointer, rest))

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
            return BACKWARD(ctx.favor, heads(do), heads(o), *state, *map(heads, outputs))

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


class Stateful(torch.autograd.Function):
    """What csrc/cuda/performer/performer.cu takes for causal sums and states; s0 None: no state."""

    @staticmethod
    def forward(ctx, q, k, v, s0, z0, w, c0, mask, relu, causal, eps):
        (b, h, n, d), dv, m = q.shape, v.shape[3], w.shape[0]
        favor = FAVOR(h, n, d, dv, m, relu, pointer(mask), w.data_ptr(), *map(heads, (q, k, v)))
        start = STATE(*map(pointer, (s0, z0, c0)))

        def make(o, *rest):
            return STATE_FORWARD(favor, causal, eps, start, heads(o), *map(pointer, rest))

        rest = q.new_empty(b * h, m, dv), q.new_empty(b, h, m), q.new_empty(b, h, m), q[..., 0]
        o, s, z, c, lse = run("performer_state_fwd", make, q, [v, *rest])
        ctx.save_for_backward(q, k, v, o, c, lse, s0, z0)
        ctx.given = favor, causal, start
        s = s.view(b, h, m, dv)
        ctx.mark_non_differentiable(c, lse)
        ctx.set_materialize_grads(False)
        return o, s, z, c, lse

    @staticmethod
    def backward(ctx, do, ds, dz, *_):
        q, k, v, o, c, lse, s0, z0 = ctx.saved_tensors
        favor, causal, start = ctx.given
        do = unit_last(do)
        ds, dz = (None if x is None else x.contiguous() for x in (ds, dz))

        def make(dq, dk, dv, *first):
            grad = STATE(pointer(ds), pointer(dz), c.data_ptr())
            outputs = *map(heads, (dq, dk, dv)), *(map(pointer, first or (None, None)))
            return STATE_BACKWARD(
                favor, causal, start, grad, heads(do), heads(o), lse.data_ptr(), *outputs
            )

        first = [] if s0 is None else [s0.flatten(0, 1), z0]
        dq, dk, dv, *first = run("performer_state_bwd", make, q, [q, k, v, *first])
        first = [first[0].view_as(s0), first[1]] if first else [None, None]
        return dq, dk, dv, *first, *6 * [None]


def check_state(x, w, c0, mask, relu, causal, eps, states=True, floor=None):
    """x: q, k, v and S₀, z₀ unless c0 is None. states: gradients through S and z too."""

    def finish(o, s, z, c, lse):
        s, z, c, lse = (y.masked_fill(y.isinf(), 0.0) for y in (s, z, c, lse))
        if not states:
            s, z = s.detach() + 0 * o.float().sum(), z.detach() + 0 * o.float().sum()
        return o, s, z, *(y.detach() + 0 * o.float().sum() for y in (c, lse))

    def call(f):
        def on(q, k, v, s0=None, z0=None):
            acc = torch.promote_types(q.dtype, torch.float32)
            shift = None if c0 is None else c0.to(acc)
            return finish(*f(q, k, v, s0, z0, w.to(acc), shift))

        return on

    def given(q, k, v, s0, z0, w, c0):
        return Stateful.apply(q, k, v, s0, z0, w, c0, mask, relu, causal, eps)

    def naive(q, k, v, s0, z0, w, c0):  # as a function: it holds c constant
        first = None if c0 is None else (s0, z0, c0)
        options = {"kernel": "relu" if relu else "softmax", "causal": causal, "eps": eps}
        options |= {"key_mask": mask, "initial_state": first, "return_state": True}
        o, state = performer_attention(q, k, v, w, backend="reference", **options)
        *_, lse = forward_reference(q, k, v, w, mask, s0, z0, c0, int(relu), causal, eps)
        return o, *state, lse

    names = "o S z c lse dq dk dv dS0 dz0"
    floor = 2 * FLOOR[x[0].dtype] if floor is None else floor
    assert_accurate(call(given), call(naive), x, floor=floor, names=names)


def start(generator, b, h, m, dv):
    """S₀, z₀, c₀; the first feature has seen nothing"""
    s, z, c = (torch.randn(b, h, m, *tail, generator=generator) for tail in ((dv,), (), ()))
    s[:, :, 0], z[:, :, 0], c[:, :, 0] = 0, 0, -torch.inf
    return s, z.abs(), c


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv", "m", "causal", "relu", "first", "states", "masked"),
    [(1, 1, 1, 8, 3, 5, True, False, False, True, False),
     (2, 2, 17, 33, 8, 70, True, False, True, True, True),
     (1, 1, 64, 64, 96, 64, True, False, False, False, False),
     (1, 1, 63, 96, 70, 66, True, False, True, True, False),
     (1, 2, 33, 16, 24, 40, False, False, True, True, True),
     (1, 1, 20, 24, 16, 66, False, False, False, True, False),
     (1, 2, 40, 8, 16, 70, True, True, True, True, True)],
)  # fmt: skip
def test_states(
    b, h, n, d, dv, m, causal, relu, first, states, masked, dtype, generator
):  # fmt: skip
    x = inputs(generator, b, h, n, d, dv, dtype)
    w = torch.randn(m, d, generator=generator)
    mask = torch.rand(b, n, generator=generator) > 0.3 if masked else None
    if masked:
        mask[-1] = False
    c0 = None
    if first:
        *state, c0 = start(generator, b, h, m, dv)
        if relu:
            c0.zero_()
        x += state
    check_state(x, w, c0, mask, relu, causal, 0.25 if relu else 0.0, states)


@pytest.mark.parametrize("first", (False, True))
def test_a_later_key_may_outweigh_all_others(first, generator):
    """Exponents far over float's range on a late key: the pairs are added up one by one."""
    n, m = 40, 70
    x = inputs(generator, 1, 2, n, 16, 24, torch.float32)
    x[1][:, :, 30] *= 12
    x[0][:, :, 35] *= 12
    w = torch.randn(m, 16, generator=generator)
    c0 = None
    if first:
        *state, c0 = start(generator, 1, 2, m, 24)
        x += state
    check_state(x, w, c0, None, False, True, 0.0)
