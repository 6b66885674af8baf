"""Linear attention in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import math

import pytest
import torch
from emulated import FLOOR, TYPES, heads, inputs, pointer, run, spoilt, struct

from tab.ops.linear import backward_reference, forward_reference

NAMES = "o", "s", "z", "dq", "dk", "dv", "ds0", "dz0"
LINEAR = struct(
    "Linear",
    "int heads n d dv feature_map causal; float eps; pointer mask; Heads q k v; pointer s0 z0",
)
FORWARD = struct("Forward", "Linear in; Heads o; pointer s z")
BACKWARD = struct(
    "Backward", "Linear in; Heads do o; pointer ds dz; Heads dq dk dv_out; pointer ds0 dz0"
)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv", "feature_map", "state"),
    [(2, 2, 1, 3, 2, 0, True), (2, 2, 5, 16, 136, 1, False), (2, 1, 63, 33, 65, 2, True),
     (1, 2, 63, 65, 33, 0, False), (1, 1, 64, 64, 64, 0, False), (1, 1, 64, 130, 72, 0, True)],
)  # fmt: skip
def test_linear(b, h, n, d, dv, feature_map, state, dtype, causal, generator):
    eps = 0.5
    q, k, v = inputs(generator, b, h, n, d, dv, dtype)
    do = inputs(generator, b, h, n, d, dv, dtype)[2]
    if feature_map == 2:  # features are positive
        q, k = q.abs(), k.abs()
    s0, ds = (torch.randn(b, h, d, dv, generator=generator) for _ in range(2))
    z0, dz = (torch.rand(b, h, d, generator=generator) for _ in range(2))
    if not state:
        s0 = z0 = ds = dz = None
    mask = torch.rand(b, n, generator=generator) > 0.3
    exact = [None if x is None else x.double() for x in (q, k, v, s0, z0, do, ds, dz)]
    rest = mask, *exact[3:5], feature_map, causal, eps
    o, s, z = forward_reference(*exact[:3], *rest)
    wanted = o, s, z, *backward_reference(*exact[5:], *exact[:3], o, s, z, *rest)
    options, given = (feature_map, causal, eps, mask.data_ptr()), o.to(dtype)
    read = LINEAR(h, n, d, dv, *options, *map(heads, (q, k, v)), pointer(s0), pointer(z0))

    def forward(o, s, z):
        return FORWARD(read, heads(o), s.data_ptr(), z.data_ptr())

    def backward(dq, dk, dv, ds0, dz0):
        outputs = *map(heads, (dq, dk, dv)), ds0.data_ptr(), dz0.data_ptr()
        return BACKWARD(read, heads(do), heads(given), pointer(ds), pointer(dz), *outputs)

    states = s.float().flatten(0, 1), z.float()  # three dimensions: contiguous
    results = run("linear_fwd", forward, q, [v, *states])
    results += run("linear_bwd", backward, q, [q, k, v, *states])
    for name, x, truth in zip(NAMES, results, wanted, strict=True):
        scale = max(1.0, truth.abs().max().item())
        error = (x.double().view_as(truth) - truth).abs().max().item() / scale
        assert error < 2 * FLOOR[dtype], f"{name}: relative error {error:.2g}"


def attend(x, mask=None, states=False, feature_map=0, causal=False, nan=False):
    """o, S, z and the gradients, at x = q, k, v, do; `states`: from one, and back through one."""
    q, k, v, do = x
    (b, h, n, d), dv = q.shape, v.shape[3]
    generator = torch.Generator().manual_seed(1)
    s0, ds = (torch.randn(b, h, d, dv, generator=generator) if states else None for _ in range(2))
    z0, dz = (torch.rand(b, h, d, generator=generator) if states else None for _ in range(2))
    read = LINEAR(h, n, d, dv, feature_map, causal, 0.5, pointer(mask), *map(heads, (q, k, v)),
                  pointer(s0), pointer(z0))  # fmt: skip
    state = torch.empty(b * h, d, dv), torch.empty(b, h, d)
    forward = run("linear_fwd", lambda o, *rest: FORWARD(read, heads(o), *map(pointer, rest)), q,
                  [v, *state], nan)  # fmt: skip

    def make(dq, dk, dv, *first):
        rest = pointer(ds), pointer(dz), *map(heads, (dq, dk, dv)), *map(pointer, first)
        return BACKWARD(read, heads(do), heads(forward[0]), *rest)

    return forward + run("linear_bwd", make, q, [q, k, v, *state], nan)


@pytest.mark.parametrize("feature_map", (0, 1, 2))
def test_nan_is_seen(feature_map, generator):
    for which, rows in ((0, [5]), (1, list(range(20))), (2, list(range(20)))):
        q, k, v = inputs(generator, 2, 1, 20, 8, 12, torch.float32)
        x = [q.abs(), k.abs(), v, torch.ones_like(v)]
        x[which][0, 0, 5, 2] = math.nan
        o, *_, dq, dk, dv, _, _ = attend(x, feature_map=feature_map, nan=True)
        assert o[0, 0].isnan().any(-1).nonzero().flatten().tolist() == rows
        assert dq[0, 0].isnan().any(-1).nonzero().flatten().tolist() == rows
        assert dk[0].isnan().any(-1).all() and (which == 2 or dv[0].isnan().any(-1).all())
        assert all(y[1].isfinite().all() for y in (o, dq, dk, dv))


@pytest.mark.parametrize("where", ("kv", "q"))
@pytest.mark.parametrize(
    ("feature_map", "causal", "states"),
    ((0, False, True), (0, True, False), (1, False, False), (2, True, True)),
)
def test_masked_tokens_reach_nobody(feature_map, causal, states, where, generator):
    """In k and v nobody at all, in q nobody else, if nothing hangs on the output of that token."""
    dtype = TYPES[states]
    x = [*inputs(generator, 2, 2, 30, 72, 24, dtype), inputs(generator, 2, 2, 30, 1, 24, dtype)[2]]
    x = [x[0].abs(), x[1].abs(), *x[2:]]
    mask = torch.rand(2, 30, generator=generator) > 0.3
    hidden = ~mask[:, None, :, None]
    if where == "q":
        x[3] = x[3].masked_fill(hidden, 0)
    dirty = [spoilt(y, mask) if name in where else y for name, y in zip("qkvg", x, strict=True)]
    found = attend(dirty, mask, states, feature_map, causal, nan=where == "q")
    wanted = attend(x, mask, states, feature_map, causal)
    if where == "q":
        found[0], wanted[0] = (y[0].masked_fill(hidden, 0) for y in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
