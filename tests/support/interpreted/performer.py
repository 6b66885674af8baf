"""The Triton kernels of `performer`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.performer import draw, naive

from tab.kernels import _performer_walk, _segments
from tab.kernels._launch import PRECISION
from tab.ops.performer import backward_reference, forward_reference, performer_fwd

forward, backward = interpreted("performer_fwd", "performer_bwd")

NAMES = "o S z dq dk dv dS0 dz0"
CASES = [  # type, N, D, Dv, M: one token; two segments, one ragged; several tiles of everything
    (torch.float32, 1, 3, 2, 2),
    (torch.float32, 70, 24, 16, 20),
    (torch.float32, 33, 66, 65, 65),
    (torch.bfloat16, 9, 16, 16, 12),
    (torch.bfloat16, 70, 16, 24, 20),
    (torch.float16, 33, 16, 16, 12),
]


@pytest.fixture(params=["fused", "split", "causal", "causal walk"])
def path(request, monkeypatch):
    """Every way the launchers go; segments of 64 tokens, so that few tokens make several. All types
    walk here, by two tiles a segment and few features at once: float32 shows more than bfloat16."""
    way, *walk = request.param.split()
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    monkeypatch.setattr(_performer_walk, "WALKS", {*PRECISION.values()} if walk else set())
    monkeypatch.setattr(_performer_walk, "FEATURES", 16)
    if way == "split":
        monkeypatch.setattr(_segments, "FUSED_TOKENS", 0)
    return way


def call(backend, w, path, kernel=0, eps=0.0, mask=None, c0=None):
    """-> o and the true sums S·e^c, z·e^c"""

    def f(q, k, v, s0=None, z0=None):
        acc = torch.promote_types(q.dtype, torch.float32)
        shift = None if s0 is None else c0.to(acc)
        o, s, z, c, _ = performer_fwd.apply(
            backend, q, k, v, w.to(acc), mask, s0, z0, shift, kernel, path == "causal", eps
        )
        return (o, s, z) if kernel == 1 else (o, s * c.exp()[..., None], z * c.exp())

    return f


def textbook(w, path):
    def f(q, k, v):
        o, s, z = naive(q, k, v, w=w, causal=path == "causal")
        root = w.shape[0] ** 0.5  # the op leaves M^(-1/2) out: it cancels
        acc = torch.promote_types(q.dtype, torch.float32)
        return o, s.to(acc) * root, z.to(acc) * root

    return f


@pytest.mark.parametrize("dtype, n, d, dv, m", CASES)
def test_sizes(path, dtype, n, d, dv, m, generator):
    scale = 0.5 if dtype == torch.float16 else 1.0  # the textbook does not shift: it overflows
    q, k, v, w = draw(generator, 1, 1 if d > 64 else 2, n, d, dv, m, dtype, scale)
    assert_accurate(call("cuda", w, path), textbook(w, path), (q, k, v), names=NAMES)


@pytest.mark.parametrize("nq, nk", [(3, 130), (130, 3), (65, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_cross(nq, nk, masked, generator, monkeypatch):
    """As the reference does it, which tests/ops/test_cross.py holds against the textbook."""
    monkeypatch.setattr(_segments, "SEGMENT", 64)
    q, _, _, w = draw(generator, 1, 2, nq, 12, 8, 20)
    _, k, v, _ = draw(generator, 1, 2, nk, 12, 8, 20)
    options = w, "split", 0, 0.0, torch.rand(1, nk, generator=generator) > 0.3 if masked else None
    assert_accurate(call("cuda", *options), call("reference", *options), (q, k, v), names=NAMES)


def test_shared_heads(path, generator):
    """Each head of k and v, and their state, for two of q, as the reference does it; the op itself
    is given them."""
    q, *_ = draw(generator, 1, 4, 70, 12, 8, 20)
    _, k, v, w = draw(generator, 1, 2, 70, 12, 8, 20)
    s0 = torch.randn(1, 2, 20, 8, generator=generator)
    z0 = torch.rand(1, 2, 20, generator=generator) + 1
    options = w, path, 0, 0.0, None, torch.randn(1, 2, 20, generator=generator)
    both = call("cuda", *options), call("reference", *options)
    assert_accurate(*both, (q, k, v, s0, z0), names=NAMES)


@pytest.mark.parametrize("kernel, eps", [(0, 0.1), (1, 0.1), (0, 0.0), (1, 0.0)])
def test_state_mask_eps(path, kernel, eps, generator):
    """As the reference does it, which tests/ops/test_performer.py holds against the textbook."""
    q, k, v, w = draw(generator, 2, 1, 70, 12, 8, 20)
    s0 = torch.randn(2, 1, 20, 8, generator=generator)
    z0 = torch.rand(2, 1, 20, generator=generator) + 1
    c0 = torch.randn(2, 1, 20, generator=generator)
    mask = torch.rand(2, 70, generator=generator) > 0.3
    mask[1, :40] = False  # the first tile of a batch entry sees the initial state only
    options = w, path, kernel, eps, mask, c0
    both = call("cuda", *options), call("reference", *options)
    assert_accurate(*both, (q, k, v, s0, z0), names=NAMES)


@pytest.mark.any_torch
@pytest.mark.parametrize("masked", [False, True])
def test_extreme_keys(path, masked, generator):
    """Exponents far outside float32's range, and shifts that differ by hundreds within a tile."""
    q, k, v, w = draw(generator, 1, 1, 40, 16, 8, 20, scale=3.0)
    k[:, :, :30] *= 3
    q[:, :, 7] *= 10
    mask = torch.arange(40)[None] > 10 if masked else None
    given = outputs_and_gradients(lambda *x: call("cuda", w, path, mask=mask)(*x)[0], (q, k, v))
    exact = outputs_and_gradients(
        lambda *x: call("reference", w, path, mask=mask)(*x)[0], [x.double() for x in (q, k, v)]
    )
    for x, y in zip(given, exact, strict=True):
        assert (x.double() - y).abs().max() <= 2e-4 * max(1.0, y.abs().max())


@pytest.mark.any_torch
def test_layouts(path, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    q, k, v, w = draw(generator, 2, 2, 20, 16, 8, 12)
    do = torch.randn(2, 2, 20, 8, generator=generator)
    x = [layout(t, how) for t, how in zip((q, k, v, do), LAYOUTS[1:] + LAYOUTS[1:2], strict=True)]
    options, results = (None, None, None, 0, path == "causal"), []
    for q, k, v, do in (x, [t.contiguous() for t in x]):
        out = forward(q, k, v, w, None, *options, 0.0)
        grads = backward(do, None, None, q, k, v, w, *out, None, *options)
        results.append((*out, *grads))
    for strided, plain in zip(*results, strict=True):
        assert torch.equal(strided, plain)
        assert strided.stride() == plain.stride()


def test_like_the_reference_outside_its_range(path, generator):
    """Nothing to see gives 0 and passes nothing; float64 and D > 256 are the reference's."""
    causal = path == "causal"
    q, k, v, w = draw(generator, 1, 2, 9, 8, 8, 6)
    q[:, :, 3] = 0.0  # relu: no feature, denominator 0
    none = torch.zeros(1, 9, dtype=torch.bool)
    cases = [((q, k, v), w, 1, None), ((q, k, v), w, 0, none)]
    cases += [(tuple(x.double() for x in (q, k, v)), w.double(), 0, None)]
    cases += [((torch.ones(1, 1, 3, 257),) * 2 + (torch.ones(1, 1, 3, 2),), w[:, :1], 0, None)]
    for (q, k, v), w, kernel, mask in cases:
        w = w.expand(-1, 257) if q.shape[-1] == 257 else w
        state = (None,) * 3
        given = forward(q, k, v, w, mask, *state, kernel, causal, 0.0)
        wanted = forward_reference(q, k, v, w, mask, *state, kernel, causal, 0.0)
        tail = (torch.ones_like(v), None, None, q, k, v, w, *wanted, mask, *state, kernel, causal)
        given += backward(*tail)
        wanted += backward_reference(*tail)
        for x, y in zip(given, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
            assert x.stride() == y.stride() and x.dtype == y.dtype
