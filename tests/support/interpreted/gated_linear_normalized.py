"""The Triton kernels of gated linear attention that is divided by its denominator, run by Triton's
interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import itertools
import math

import pytest
import torch
from interpreter import interpreted
from proof import assert_accurate, outputs_and_gradients, poisoned
from textbook.gated_linear import draw, naive

from tab.kernels import _gated, _segments
from tab.ops import OPS

NAME = "gated_linear_normalized"
forward, backward = interpreted(f"{NAME}_fwd", f"{NAME}_bwd")
interpreted(f"{NAME}_packed_fwd", f"{NAME}_packed_bwd")
few, few_backward = interpreted(f"{NAME}_stateless_fwd", f"{NAME}_stateless_bwd")

NAMES = "o S z dq dk dv dg dS0 dz0"
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CASES = [(torch.float32, *size) for size in ((1, 3, 3), (65, 64, 64), (70, 24, 40))]
CASES += [(torch.bfloat16, 70, 24, 16), (torch.bfloat16, 65, 80, 72), (torch.float16, 33, 16, 24)]


@pytest.fixture(params=["walk", "segments"])
def path(request, monkeypatch):
    """Both ways that the launchers go, as in gated_linear.py."""
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    if request.param == "walk":
        monkeypatch.setattr(_gated, "processors", lambda device: 0)
    return request.param


def positive(generator, b, h, n, d, dv, dtype=torch.float32, state=True):
    """q, k, v, g and S₀, z₀: keys and queries as a feature map leaves them."""
    q, k, v, g, *s0 = draw(generator, b, h, n, d, dv, dtype=dtype, state=state)
    z0 = [torch.rand(b, h, d, generator=generator)] * state
    return [q.abs(), k.abs(), v, g, *s0, *z0]


def launchers(mask=None, way="fwd"):
    def f(q, k, v, g, s0=None, z0=None):
        found = OPS[f"{NAME}_{way}"].apply("cuda", q, k, v, g[..., None], mask, s0, z0)
        return found[0] if way != "fwd" else found[:3]

    return f


def textbook(mask=None):
    return lambda *x: naive(*x, normalize=True, key_mask=mask)


@pytest.mark.parametrize("dtype, n, d, dv", CASES)
def test_sizes(path, dtype, n, d, dv, generator):
    x = positive(generator, 1, 1, n, d, dv, dtype)
    assert_accurate(launchers(), textbook(), x, names=NAMES, floor=FLOORS[dtype])


def test_mask_and_no_state(path, generator):
    x = positive(generator, 2, 2, 100, 16, 24, state=False)
    mask = torch.rand(2, 100, generator=generator) > 0.3
    assert_accurate(launchers(mask), textbook(mask), x, names="o S z dq dk dv dg")


def test_shared_heads(path, generator):
    """Each head of k, v and the decay for two of q."""
    q, *_ = positive(generator, 1, 4, 70, 16, 24)
    _, *shared = positive(generator, 1, 2, 70, 16, 24)

    def each(q, *shared):
        o, s, z = textbook()(q, *(x.repeat_interleave(2, 1) for x in shared))
        return o, s[:, ::2], z[:, ::2]

    assert_accurate(launchers(), each, [q, *shared], names=NAMES)


LENGTHS = 5, 0, 70, 16, 1


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype, d, dv", [(torch.float32, 24, 40), (torch.bfloat16, 16, 24)])
def test_packed(state, dtype, d, dv, generator, monkeypatch):
    """Sequences of several lengths as one launch each way: the loop over them."""
    tokens, count = sum(LENGTHS), len(LENGTHS)
    x = positive(generator, 1, 2, tokens, d, dv, dtype, state=False)
    if state:
        x += [torch.rand(count, 2, d, dv, generator=generator)]
        x += [torch.rand(count, 2, d, generator=generator)]
    mask = torch.rand(1, tokens, generator=generator) > 0.3
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    for name in ("fwd", "bwd"):  # no call for each length
        monkeypatch.setattr(OPS[f"{NAME}_packed_{name}"].base, "below", None)

    def together(q, k, v, g, s0=None, z0=None):
        op = OPS[f"{NAME}_packed_fwd"]
        return op.apply("cuda", q, k, v, g[..., None], mask, s0, z0, ends)[:3]

    def one_by_one(q, k, v, g, s0=None, z0=None):
        acc = torch.promote_types(q.dtype, torch.float32)
        s0 = torch.zeros(count, 2, d, dv, dtype=acc) if s0 is None else s0
        z0 = torch.zeros(count, 2, d, dtype=acc) if z0 is None else z0
        parts = zip(
            *(y.split(LENGTHS, 2) for y in (q, k, v, g)), s0.split(1), z0.split(1), strict=True
        )
        outs = [
            naive(*part, normalize=True, key_mask=some) if some.numel() else (part[2], *part[4:])
            for part, some in zip(parts, mask.split(LENGTHS, 1), strict=True)
        ]
        return tuple(
            torch.cat(y, 2 if i == 0 else 0) for i, y in enumerate(zip(*outs, strict=True))
        )

    assert_accurate(together, one_by_one, x, names=NAMES, floor=FLOORS[dtype])


@pytest.mark.parametrize("heads", [2, 4])
def test_without_the_state(path, heads, generator):
    """The same bits; of the state nothing is written."""
    q, *_ = positive(generator, 1, heads, 70, 16, 24)
    _, k, v, g, *_ = positive(generator, 1, 2, 70, 16, 24)
    given = q, k, v, g[..., None]
    o, _, _, den = forward(*given, None, None, None)
    with poisoned():
        assert all(map(torch.equal, few(*given, None, None, None), (o, den)))
        back = (o.cos(), None, None, *given, o, den, None, None, None)
        for x, y in zip(few_backward(*back), backward(*back), strict=False):
            assert torch.equal(x, y)


def test_nothing_to_divide_by(path, generator):
    """A row that sees no key is 0, and passes no gradient."""
    q, k, v, g, *_ = positive(generator, 1, 1, 70, 16, 16)
    mask = torch.arange(70)[None] >= 3
    q[:, :, 5] = 0
    o, *_, dq, dk, dv, dg = outputs_and_gradients(launchers(mask), [q, k, v, g])
    rows = [0, 1, 2, 5]
    assert not o[:, :, rows].any() and not dq[:, :, rows].any()
    assert all(x.isfinite().all() for x in (o, dq, dk, dv, dg))


@pytest.mark.parametrize("which", range(4))
def test_what_a_masked_token_holds_reaches_nobody(path, which, generator):
    keep = torch.ones(2, 100, dtype=torch.bool)
    keep[0, 80:] = keep[1, 3] = False
    x = positive(generator, 2, 1, 100, 8, 8, state=False)

    def results(x):
        leaves = [t.clone().requires_grad_() for t in x]
        o, s, z = launchers(keep)(*leaves)
        o = o.transpose(1, 2)[keep]
        grads = torch.autograd.grad(o.sin().sum() + s.sin().sum() + z.sin().sum(), leaves)
        assert not any(t.transpose(1, 2)[~keep].any() for t in grads[1:])
        return o, s, z, *(t.transpose(1, 2)[keep] for t in grads)

    clean = results(x)
    x[which].transpose(1, 2)[~keep] = torch.tensor([math.nan, math.inf])[which % 2]
    for a, b in zip(results(x), clean, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("which", range(4))
def test_a_nan_reaches_all_later_tokens_alone(path, which, generator):
    x = positive(generator, 1, 1, 100, 8, 8, state=False)
    clean = outputs_and_gradients(launchers(), x)
    x[which][0, 0, 45] = math.nan
    o, _, _, dq, dk, dv, dg = (t[0, 0] for t in outputs_and_gradients(launchers(), x))
    rows = o.isnan().all(-1)
    assert torch.equal(o[:45], clean[0][0, 0, :45])
    assert rows[45] and rows[46:].all() == (which != 0)
    if which != 3:
        spared = {0: (dk[46:], dv[46:], dg[46:]), 1: (dq[:45],), 2: (dq[:45],)}[which]
        assert all(t.isfinite().all() for t in spared)


def test_like_the_reference_outside_its_range(generator):
    """Strides of what it gives, and float64 and D > 128, which are the reference's."""
    for dtype, d in ((torch.float32, 16), (torch.float64, 16), (torch.float32, 129)):
        q, k, v, g, s0, z0 = positive(generator, 2, 2, 9, d, 5, dtype)
        s0, z0 = s0, z0.to(s0.dtype)
        tail = torch.rand(2, 9, generator=generator) > 0.3, s0, z0
        given = q, k, v, g[..., None]
        got, want = forward(*given, *tail), OPS[f"{NAME}_fwd"].reference(*given, *tail)
        do, ds, dz = torch.randn_like(v), torch.ones_like(s0), torch.ones_like(z0)
        back = (do, ds, dz, *given, want[0], want[3], *tail)
        got += tuple(backward(*back))
        want += tuple(OPS[f"{NAME}_bwd"].reference(*back))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
            assert x.stride() == y.stride() and x.dtype == y.dtype
