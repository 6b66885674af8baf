"""FAVOR+ in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import math

import pytest
import torch
from emulated import FLOOR, TYPES, heads, inputs, pointer, run, spoilt, struct, unit_last
from proof import assert_accurate

from tab import performer_attention
from tab.ops.performer import forward_reference

PERFORMER = struct("Performer", "int heads n d dv m relu; pointer mask w; Heads q k v")
STATE = struct("State", "pointer s z c")
FORWARD = struct("Forward", "Performer in; float eps; Heads o; pointer s z c lse")
BACKWARD = struct("Backward", "Performer in; Heads do o; pointer c lse; Heads dq dk dv")
CAUSAL_FORWARD = struct(
    "CausalForward", "Performer in; int causal; float eps; State from; Heads o; pointer s z c lse"
)
CAUSAL_BACKWARD = struct(
    "CausalBackward",
    "Performer in; int causal; State from grad; Heads do o; pointer lse; Heads dq dk dv;"
    "pointer ds0 dz0",
)


class Performer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w, mask, relu, eps, nan=False):
        (b, h, n, d), dv, m = q.shape, v.shape[3], w.shape[0]
        read = PERFORMER(h, n, d, dv, m, relu, pointer(mask), w.data_ptr(), *map(heads, (q, k, v)))

        def make(o, *rest):
            return FORWARD(read, eps, heads(o), *map(pointer, rest))

        rest = q.new_empty(b * h, m, dv), q.new_empty(b, h, m), q.new_empty(b, h, m), q[..., 0]
        o, s, z, c, lse = run("performer_bidirectional_fwd", make, q, [v, *rest], nan)
        ctx.save_for_backward(q, k, v, o, c, lse)
        ctx.read, ctx.nan = read, nan
        s = s.view(b, h, m, dv)
        ctx.mark_non_differentiable(s, z, c, lse)
        return o, s, z, c, lse

    @staticmethod
    def backward(ctx, do, *_):
        q, k, v, o, c, lse = ctx.saved_tensors
        do = unit_last(do)

        def make(*outputs):
            state = c.data_ptr(), lse.data_ptr()
            return BACKWARD(ctx.read, heads(do), heads(o), *state, *map(heads, outputs))

        return *run("performer_bidirectional_bwd", make, q, [q, k, v], ctx.nan), *5 * [None]


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
    def forward(ctx, q, k, v, s0, z0, w, c0, mask, relu, causal, eps, nan=False):
        (b, h, n, d), dv, m = q.shape, v.shape[3], w.shape[0]
        read = PERFORMER(h, n, d, dv, m, relu, pointer(mask), w.data_ptr(), *map(heads, (q, k, v)))
        start = STATE(*map(pointer, (s0, z0, c0)))

        def make(o, *rest):
            return CAUSAL_FORWARD(read, causal, eps, start, heads(o), *map(pointer, rest))

        rest = q.new_empty(b * h, m, dv), q.new_empty(b, h, m), q.new_empty(b, h, m), q[..., 0]
        o, s, z, c, lse = run("performer_causal_fwd", make, q, [v, *rest], nan)
        ctx.save_for_backward(q, k, v, o, c, lse, s0, z0)
        ctx.given = read, causal, start, nan
        s = s.view(b, h, m, dv)
        ctx.mark_non_differentiable(c, lse)
        ctx.set_materialize_grads(False)
        return o, s, z, c, lse

    @staticmethod
    def backward(ctx, do, ds, dz, *_):
        q, k, v, o, c, lse, s0, z0 = ctx.saved_tensors
        read, causal, start, nan = ctx.given
        do = unit_last(do)
        ds, dz = (None if x is None else x.contiguous() for x in (ds, dz))

        def make(dq, dk, dv, *first):
            grad = STATE(pointer(ds), pointer(dz), c.data_ptr())
            outputs = *map(heads, (dq, dk, dv)), *(map(pointer, first or (None, None)))
            return CAUSAL_BACKWARD(
                read, causal, start, grad, heads(do), heads(o), lse.data_ptr(), *outputs
            )

        first = [] if s0 is None else [s0.flatten(0, 1), z0]
        dq, dk, dv, *first = run("performer_causal_bwd", make, q, [q, k, v, *first], nan)
        first = [first[0].view_as(s0), first[1]] if first else [None, None]
        return dq, dk, dv, *first, *7 * [None]


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


def form(name, relu, generator, d, dv):
    """One of the two kernels, as a function of q, k, v, a mask and `nan`."""
    w = torch.randn(70, d, generator=generator)
    if name == "bidirectional":
        return lambda *x, mask=None, nan=False: Performer.apply(*x, w, mask, relu, 0.25, nan)
    *state, c0 = start(generator, 2, 2, 70, dv) if name == "with states" else (None, None, None)
    c0 = torch.zeros_like(c0) if relu and c0 is not None else c0
    rest = w, c0
    return lambda *x, mask=None, nan=False: Stateful.apply(
        *x, *state, *rest, mask, relu, name == "causal", 0.25, nan
    )


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("name", ("bidirectional", "with states"))
def test_nan_is_seen(name, relu, generator):
    f = form(name, relu, generator, 8, 12)
    for which, rows in ((0, [5]), (1, list(range(20))), (2, list(range(20)))):
        x = inputs(generator, 2, 2, 20, 8, 12, torch.float32)
        x[which][0, 1, 5, 2] = math.nan
        x = [y.detach().requires_grad_() for y in x]
        o = f(*x, nan=True)[0]
        dq, dk, dv = torch.autograd.grad(o.sum(), x)
        for y in (o, dq):
            assert y[0, 1].isnan().any(-1).nonzero().flatten().tolist() == rows
        assert dk[0, 1].isnan().any(-1).all() and (which == 2 or dv[0, 1].isnan().any(-1).all())
        assert all(y[1].isfinite().all() and y[0, 0].isfinite().all() for y in (o, dq, dk, dv))


@pytest.mark.parametrize("where", ("kv", "q"))
@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("name", ("bidirectional", "causal", "with states"))
def test_masked_tokens_reach_nobody(name, relu, where, generator):
    """In k and v nobody at all, in q nobody else, if nothing hangs on the output of that token."""
    f = form(name, relu, generator, 72, 24)
    x = inputs(generator, 2, 2, 30, 72, 24, TYPES[not relu])
    mask = torch.rand(2, 30, generator=generator) > 0.3
    hidden = ~mask[:, None, :, None]
    dirty = [spoilt(y, mask) if at in where else y for at, y in zip("qkv", x, strict=True)]

    def results(x):
        x = [y.detach().requires_grad_() for y in x]
        o, s, z, c, lse = f(*x, mask=mask, nan=where == "q")
        if where == "q":
            o, lse = o.masked_fill(hidden, 0), lse.masked_fill(hidden[..., 0], 0)
        loss = o.sin().sum() if name == "bidirectional" else o.sin().sum() + s.sum() + z.sum()
        return o, s, z, c, lse, *torch.autograd.grad(loss, x)

    for a, b in zip(results(dirty), results(x), strict=True):
        assert torch.equal(a, b)
