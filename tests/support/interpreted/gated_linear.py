"""The Triton kernels of `gated_linear`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients, poisoned
from textbook.gated_linear import draw, naive

from tab.kernels import _gated, _segments
from tab.ops import OPS
from tab.ops.gated_linear import backward_reference, forward_reference, gated_linear_fwd

forward, backward = interpreted("gated_linear_fwd", "gated_linear_bwd")
interpreted("gated_linear_packed_fwd", "gated_linear_packed_bwd")
few, few_backward = interpreted("gated_linear_stateless_fwd", "gated_linear_stateless_bwd")

NAMES = "o S dq dk dv dg dS0"
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [(1, 3, 3), (5, 16, 24), (63, 24, 16), (65, 64, 64), (130, 80, 72), (70, 16, 120)]
CASES = [(torch.float32, *size) for size in SIZES]
CASES += [(dtype, *size) for dtype in (torch.bfloat16, torch.float16) for size in SIZES[1::3]]


@pytest.fixture(params=["walk", "segments"])
def path(request, monkeypatch):
    """Both ways that the launchers go; segments of one or two tiles, so that few tokens make
    several, or one segment, as where there are heads enough."""
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    if request.param == "walk":
        monkeypatch.setattr(_gated, "processors", lambda device: 0)
    return request.param


def launchers(mask=None, scale=0.3):
    def f(q, k, v, g, s0=None):
        if g.dim() == 1:
            g = g[:, None].expand(*k.shape[:3])
        return gated_linear_fwd.apply("cuda", q, k, v, g[..., None], mask, s0, scale)

    return f


def textbook(mask=None, scale=0.3):
    return partial(naive, key_mask=mask, scale=scale)


@pytest.mark.parametrize("dtype, n, d, dv", CASES)
def test_sizes(path, dtype, n, d, dv, generator):
    x = draw(generator, 1, 1 if n > 60 else 2, n, d, dv, dtype=dtype)
    assert_accurate(launchers(), textbook(), x, names=NAMES, floor=FLOORS[dtype])


@pytest.mark.parametrize("decay", ["head", "token"])
def test_state_and_mask(path, decay, generator):
    x = draw(generator, 2, 1, 130, 24, 16, decay, state=True)
    options = torch.rand(2, 130, generator=generator) > 0.3, 0.7
    assert_accurate(launchers(*options), textbook(*options), x, names=NAMES)


def test_shared_heads(path, generator):
    """Each head of k, v and the decay for two of q; the op itself is given them."""
    q, *_ = draw(generator, 1, 4, 70, 16, 24, "token", state=True)
    _, *shared = draw(generator, 1, 2, 70, 16, 24, "token", state=True)
    mask = torch.rand(1, 70, generator=generator) > 0.3

    def each(q, *shared):
        o, s = textbook(mask)(q, *(x.repeat_interleave(2, 1) for x in shared))
        return o, s[:, ::2]

    assert_accurate(launchers(mask), each, [q, *shared], names=NAMES)


LENGTHS = 5, 0, 70, 16, 33, 1


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype, d, dv", [(torch.float32, 24, 40), (torch.bfloat16, 16, 24)])
def test_packed(state, dtype, d, dv, generator, monkeypatch):
    """Sequences of several lengths as one launch each way: the loop over them."""
    tokens, count = sum(LENGTHS), len(LENGTHS)
    x = draw(generator, 1, 2, tokens, d, dv, dtype=dtype)
    x += [torch.randn(count, 2, d, dv, generator=generator)] * state
    mask = torch.rand(1, tokens, generator=generator) > 0.3
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    launched = []
    for name in ("fwd", "bwd"):
        op = OPS[f"gated_linear_packed_{name}"]
        run = op.together
        monkeypatch.setattr(op, "together", lambda *y, run=run: launched.append(y) or run(*y))
        monkeypatch.setattr(op.base, "below", None)  # no call for each length

    def together(q, k, v, g, s0=None):
        return OPS["gated_linear_packed_fwd"].apply(
            "cuda", q, k, v, g[..., None], mask, s0, ends, 0.3
        )

    def one_by_one(q, k, v, g, s0=None):
        acc = torch.promote_types(q.dtype, torch.float32)
        s0 = torch.zeros(count, 2, d, dv, dtype=acc) if s0 is None else s0
        parts = zip(*(y.split(LENGTHS, 2) for y in (q, k, v, g)), s0.split(1), strict=True)
        outs = [
            naive(*part, scale=0.3, key_mask=some) if some.numel() else (part[2], part[-1])
            for part, some in zip(parts, mask.split(LENGTHS, 1), strict=True)
        ]
        return torch.cat([o for o, _ in outs], 2), torch.cat([s for _, s in outs])

    assert_accurate(together, one_by_one, x, names=NAMES, floor=FLOORS[dtype])
    assert len(launched) == 2


@pytest.mark.parametrize("heads", [2, 4])
def test_without_the_state(path, heads, generator):
    """The same bits; of the state nothing is written."""
    q, *_ = draw(generator, 1, heads, 70, 16, 24, "token")
    _, k, v, g = draw(generator, 1, 2, 70, 16, 24, "token")
    given = q, k, v, g[..., None], None, None, 0.3
    o, _ = forward(*given)
    with poisoned():
        assert torch.equal(few(*given), o)
        for x, y in zip(
            few_backward(o.cos(), None, *given), backward(o.cos(), None, *given), strict=False
        ):
            assert torch.equal(x, y)


def test_no_gradient_of_the_state(path, generator):
    """Then none goes back through it, and S₀ has its own gradient still."""
    x = draw(generator, 1, 2, 70, 8, 8, state=True)
    f, truth = launchers(), textbook()
    assert_accurate(lambda *x: f(*x)[0], lambda *x: truth(*x)[0], x)


@pytest.mark.any_torch
@pytest.mark.parametrize("strength", [30.0, 1e4, math.inf, -0.05])
def test_any_decay(path, strength, generator):
    """Some tokens forget nearly all, and what comes behind them keeps its digits; or grow."""
    q, k, v, g, s0 = draw(generator, 1, 1, 100, state=True)
    g = torch.where(torch.rand(g.shape, generator=generator) > 0.8, -strength, g)
    assert_accurate(launchers(), textbook(), [q, k, v, g, s0], names=NAMES)


@pytest.mark.any_torch
def test_layouts(path, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    q, k, v, g = draw(generator, 2, 2, 70, 16, 16)
    do = torch.randn(2, 2, 70, 16, generator=generator)
    x = [layout(t, how) for t, how in zip((q, k, v, do), LAYOUTS[1:] + LAYOUTS[1:2], strict=True)]
    x.append(g.transpose(1, 2).contiguous().transpose(1, 2)[..., None])
    results = []
    for q, k, v, do, g in (x, [t.contiguous() for t in x]):
        with poisoned():
            o, s = forward(q, k, v, g, None, None, 0.3)
            grads = backward(do, None, q, k, v, g, None, None, 0.3)
        results.append((o, s, *grads))
    for strided, plain in zip(*results, strict=True):
        assert torch.equal(strided, plain)
        assert strided.stride() == plain.stride()


def test_like_the_reference_outside_its_range(generator):
    """Strides of what it gives, and float64 and D > 128, which are the reference's."""
    for dtype, d in ((torch.float32, 16), (torch.float64, 16), (torch.float32, 129)):
        q, k, v, g, s0 = draw(generator, 2, 2, 9, d, 5, state=True, dtype=dtype)
        tail = q, k, v, g[..., None], torch.rand(2, 9, generator=generator) > 0.3, s0, 0.3
        do, ds = torch.randn(2, 2, 9, 5, generator=generator).to(dtype), torch.ones_like(s0)
        given = *forward(*tail), *backward(do, ds, *tail)
        wanted = *forward_reference(*tail), *backward_reference(do, ds, *tail)
        for x, y in zip(given, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
            assert x.stride() == y.stride()


@pytest.mark.any_torch
def test_what_a_masked_token_holds_reaches_nobody(path, generator):
    """In q, in k, in v or in the decay: NaN or infinity."""
    keep = torch.ones(2, 100, dtype=torch.bool)
    keep[0, 80:] = keep[1, 3] = False
    x = draw(generator, 2, 1, 100, 8, 8)

    def results(x):
        leaves = [t.clone().requires_grad_() for t in x]
        o, s = launchers(keep)(*leaves)
        o = o.transpose(1, 2)[keep]
        grads = torch.autograd.grad(o.sin().sum() + s.sin().sum(), leaves)
        assert not any(t.transpose(1, 2)[~keep].any() for t in grads[1:])
        return o, s, *(t.transpose(1, 2)[keep] for t in grads)

    clean = results(x)
    for which in range(4):
        dirty = [t.clone() for t in x]
        dirty[which].transpose(1, 2)[~keep] = torch.tensor([math.nan, math.inf])[which % 2]
        for a, b in zip(results(dirty), clean, strict=True):
            assert a.isfinite().all() and torch.equal(a, b), which


@pytest.mark.any_torch
def test_a_nan_reaches_all_later_tokens_alone(path, generator):
    """And in the gradients those that it meets: dg_t is of the pairs j < t ≤ i."""
    x = draw(generator, 1, 1, 100, 8, 8)
    clean = outputs_and_gradients(launchers(), x)
    for which in range(4):
        dirty = [t.clone() for t in x]
        dirty[which][0, 0, 45] = math.nan
        o, _, dq, dk, dv, dg = (t[0, 0] for t in outputs_and_gradients(launchers(), dirty))
        rows = o.isnan().all(-1)
        assert torch.equal(o[:45], clean[0][0, 0, :45]), which
        assert rows[45] and rows[46:].all() == (which != 0), which
        if which != 3:  # q: the keys until 45; k, v: the queries from 45 on
            early = slice(0, 46) if which == 0 else slice(0, 45)
            spared = {0: (dk[46:], dv[46:], dg[46:]), 1: (dq[:45],), 2: (dq[:45],)}[which]
            assert all(t.isfinite().all() for t in spared), which
            assert dg[early].isnan().any() == (which == 0)


@pytest.mark.any_torch
def test_the_same_bits_again(path, generator):
    x = draw(generator, 1, 2, 100, 16, 16, state=True)
    once, again = (outputs_and_gradients(launchers(), x) for _ in range(2))
    assert all(map(torch.equal, once, again))
