"""The Triton kernels of `linear`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

from functools import partial

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, assert_accurate, layout, poisoned
from textbook.linear import naive

from tab.kernels import _linear_walk, _segments
from tab.ops.linear import backward_reference, forward_reference, linear_fwd

forward, backward = interpreted("linear_fwd", "linear_bwd")
few, few_backward = interpreted("linear_stateless_fwd", "linear_stateless_bwd")

NAMES = "o S z dq dk dv dS0 dz0"
SIZES = [(1, 3, 3), (5, 16, 24), (63, 24, 16), (65, 64, 64), (130, 80, 72)]
CASES = [(torch.float32, *size) for size in SIZES]
CASES += [(dtype, *size) for dtype in (torch.bfloat16, torch.float16) for size in SIZES[::3]]


@pytest.fixture(params=["fused", "split", "causal", "split walk", "causal walk"])
def path(request, monkeypatch):
    """Every way the launchers go; segments of one tile, so that few tokens make several. float32
    walks too here, by two tiles a segment: it shows more than bfloat16."""
    way, *walk = request.param.split()
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    monkeypatch.setattr(_linear_walk, "WALKS", {"bf16", "tf32x3"} if walk else set())
    if way == "split":
        monkeypatch.setattr(_segments, "FUSED_TOKENS", 0)
    return way


def launchers(causal, feature_map=0, eps=0.0, mask=None):
    def f(q, k, v, s0=None, z0=None):
        return linear_fwd.apply("cuda", q, k, v, mask, s0, z0, feature_map, causal, eps)

    return f


def textbook(causal, feature_map=0, eps=0.0, mask=None):
    name = ("elu1", "relu", "identity")[feature_map]
    return partial(naive, causal=causal, feature_map=name, eps=eps, key_mask=mask)


def inputs(n, d, dv, dtype, generator, b=1, h=2):
    shapes = ((b, h, n, d), (b, h, n, d), (b, h, n, dv))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype, n, d, dv", CASES)
def test_sizes(path, dtype, n, d, dv, generator):
    x = inputs(n, d, dv, dtype, generator, h=1 if n > 100 else 2)
    causal = path == "causal"
    assert_accurate(launchers(causal), textbook(causal), x, names=NAMES)


@pytest.mark.parametrize("feature_map", [0, 1, 2])
def test_state_mask_eps(path, feature_map, generator):
    h = 2 if feature_map == 0 else 1
    q, k, v = inputs(130, 24, 16, torch.float32, generator, h=h)
    if feature_map == 2:  # features already: positive
        q, k = q.abs(), k.abs()
    s0 = torch.randn(1, h, 24, 16, generator=generator)
    z0 = torch.rand(1, h, 24, generator=generator) + 1
    mask = torch.rand(1, 130, generator=generator) > 0.3
    options = path == "causal", feature_map, 0.1, mask
    assert_accurate(launchers(*options), textbook(*options), [q, k, v, s0, z0], names=NAMES)


@pytest.mark.parametrize("nq, nk", [(3, 130), (130, 3), (65, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_cross(nq, nk, masked, generator, monkeypatch):
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    (q, *_), (_, k, v) = (inputs(n, 24, 16, torch.float32, generator) for n in (nq, nk))
    options = False, 0, 0.1, torch.rand(1, nk, generator=generator) > 0.3 if masked else None
    assert_accurate(launchers(*options), textbook(*options), (q, k, v), names=NAMES)


def test_shared_heads(path, generator):
    """Each head of k and v, and their state, for three of q; the op itself is given them."""
    (q, *_), (_, k, v) = (inputs(65, 16, 24, torch.float32, generator, h=h) for h in (6, 2))
    state = [torch.rand(1, 2, 16, *size, generator=generator) for size in ((24,), ())]
    options = path == "causal", 0, 0.1, torch.rand(1, 65, generator=generator) > 0.3

    def each(q, *shared):
        o, s, z = textbook(*options)(q, *(x.repeat_interleave(3, 1) for x in shared))
        return o, s[:, ::3], z[:, ::3]

    assert_accurate(launchers(*options), each, [q, k, v, *state], names=NAMES)


@pytest.mark.parametrize("grouped", [False, True])
def test_without_the_state(path, grouped, generator):
    """The same bits; of the state nothing is written."""
    heads = 4 if grouped else 2
    (q, *_), (_, k, v) = (inputs(65, 16, 24, torch.float32, generator, h=h) for h in (heads, 2))
    options = None, None, 0, path == "causal", 0.1
    o, s, z = forward(q, k, v, None, *options)
    back = o.cos(), None, None, q, k, v, o, s, z, None, *options
    with poisoned():
        assert torch.equal(few(q, k, v, None, *options), o)
        for x, y in zip(few_backward(*back), backward(*back), strict=False):
            assert torch.equal(x, y)


@pytest.mark.any_torch
def test_layouts(path, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    q, k, v = inputs(65, 16, 16, torch.float32, generator, b=2)
    do = torch.randn(2, 2, 65, 16, generator=generator)
    x = [layout(t, how) for t, how in zip((q, k, v, do), LAYOUTS[1:] + LAYOUTS[1:2], strict=True)]
    causal = path == "causal"
    results = []
    for q, k, v, do in (x, [t.contiguous() for t in x]):
        o, s, z = forward(q, k, v, None, None, None, 0, causal, 0.0)
        grads = backward(do, None, None, q, k, v, o, s, z, None, None, None, 0, causal, 0.0)
        results.append((o, s, z, *grads))
    for strided, plain in zip(*results, strict=True):
        assert torch.equal(strided, plain)
        assert strided.stride() == plain.stride()


def test_like_the_reference_outside_its_range(path, generator):
    """Zero denominators give 0 and pass nothing; float64 and D > 256 are the reference's."""
    causal = path == "causal"
    q, k, v = inputs(9, 16, 16, torch.float32, generator)
    q[:, :, 3] = -1.0  # relu: no feature, denominator 0
    cases = [((q, k, v), 1), (tuple(x.double() for x in (q, k, v)), 0)]
    cases += [((torch.ones(1, 1, 3, 257),) * 2 + (torch.ones(1, 1, 3, 2),), 0)]
    for (q, k, v), feature_map in cases:
        options = feature_map, causal, 0.0
        given = forward(q, k, v, None, None, None, *options)
        wanted = forward_reference(q, k, v, None, None, None, *options)
        tail = (torch.ones_like(v), None, None, q, k, v, *wanted, None, None, None, *options)
        given += backward(*tail)
        wanted += backward_reference(*tail)
        for x, y in zip(given, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
            assert x.stride() == y.stride()
