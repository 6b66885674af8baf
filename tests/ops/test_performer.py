"""FAVOR+ against its textbook formula in float64, and the four mistakes it is known for."""

import pytest
import torch
from backends import reference_and_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import LAYOUTS, Largest, assert_accurate, layout, outputs_and_gradients
from textbook.performer import KERNELS, call, draw, exact, naive
from torch.testing import assert_close

from tab import performer_attention
from tab.ops import use_backend

BACKENDS = reference_and_cpp("performer_fwd")
each_backend = pytest.mark.usefixtures("backend")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@each_backend
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n, h", ((1, 1), (63, 3), (65, 8), (150, 1)))
def test_accuracy(generator, n, h, kernel, causal):
    # With few features relu(q)·relu(k) of one pair can be 0, and the textbook's 0/0.
    q, k, v, w = draw(generator, n=n, h=h, dv=5, m=64)
    assert_accurate(
        call(w, kernel=kernel, causal=causal),
        lambda q, k, v: naive(q, k, v, w=w, kernel=kernel, causal=causal)[0],
        (q, k, v),
        names="o dq dk dv",
    )


@each_backend
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(generator, dtype, causal):
    q, k, v, w = draw(generator, n=9, h=1, dtype=dtype, scale=0.5)
    o = performer_attention(q, k, v, w, causal=causal)
    assert o.dtype == dtype
    floor = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert_accurate(
        call(w, causal=causal),
        lambda q, k, v: naive(q, k, v, w=w, causal=causal)[0],
        (q, k, v),
        floor=floor,
        names="o dq dk dv",
    )


@each_backend
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("scale", (0.5, 1.0, 2.0, 4.0, 6.0))
def test_error_at_every_scale(scale, causal):
    """Subtracting max(W x̂) and adding ε is 87 % off at scale 1; the shifts here are exact."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        q, k, v, w = draw(generator, b=1, h=2, d=64, dv=64, m=128, scale=scale)
        v = v / scale
        truth = exact(q, k, v, w, causal)
        o = performer_attention(q, k, v, w, causal=causal)
        assert ((o - truth).norm() / truth.norm()).item() <= 1e-5


@each_backend
def test_any_single_feature_may_dominate(generator):
    """Exponents far over float32's range (e^±88) on single keys: still exact, never NaN."""
    q, k, v, w = draw(generator, b=1, h=1, n=40, scale=1.0)
    k[0, 0, 5] *= 60
    q[0, 0, 7] *= 60
    for causal in (False, True):
        results = outputs_and_gradients(call(w, causal=causal), (q, k, v))
        assert all(x.isfinite().all() for x in results)
        truth = outputs_and_gradients(lambda q, k, v: exact(q, k, v, w, causal), (q, k, v))  # noqa: B023
        assert_close(results[0].double(), truth[0], atol=1e-3, rtol=0)


@each_backend
@pytest.mark.parametrize("causal", (False, True))
def test_mask(generator, causal):
    q, k, v, w = draw(generator, n=33)
    mask = torch.rand(2, 33, generator=generator) < 0.6
    mask[:, 0] = True
    assert_accurate(
        call(w, causal=causal, key_mask=mask),
        lambda q, k, v: naive(q, k, v, w=w, causal=causal, key_mask=mask)[0],
        (q, k, v),
        names="o dq dk dv",
    )


@each_backend
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", (False, True))
def test_padding_invariance_and_nothing_to_see(generator, causal, kernel):
    q, k, v, w = draw(generator, n=20)
    k[:, :, 12:], v[:, :, 12:] = 1e4, -1e4
    mask = (torch.arange(20) < 12).expand(2, 20).clone()
    options = {"causal": causal, "kernel": kernel, "return_state": True}
    o, state = performer_attention(q, k, v, w, key_mask=mask, **options)
    short, short_state = performer_attention(q[:, :, :12], k[:, :, :12], v[:, :, :12], w, **options)
    assert_close(o[:, :, :12], short)
    assert_close(state, short_state)
    mask[0] = False
    del options["return_state"]
    results = outputs_and_gradients(call(w, key_mask=mask, **options), (q, k, v))
    assert (results[0][0] == 0).all()
    assert all(x[0].eq(0).all() for x in results[-3:])  # dq, dk, dv
    assert all(x.isfinite().all() for x in results[-3:])


@each_backend
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", (False, True))
def test_state_values_and_gradients(generator, causal, kernel):
    """S·e^c and z·e^c, in and out, against sums without shifts."""
    q, k, v, w = draw(generator, n=21, m=24, scale=0.5)
    s0 = torch.rand(2, 3, 24, 8, generator=generator)
    z0 = torch.rand(2, 3, 24, generator=generator) + 0.1
    c0 = torch.randn(2, 3, 24, generator=generator)
    c0 = torch.zeros_like(c0) if kernel == "relu" else c0

    def f(q, k, v, s0, z0):
        acc = s0.dtype
        o, (s, z, c) = performer_attention(
            q, k, v, w.to(acc), kernel=kernel, causal=causal, return_state=True,
            initial_state=(s0, z0, c0.to(acc)),
        )  # fmt: skip
        assert not c.requires_grad
        return o, s * c.exp()[..., None], z * c.exp()

    def truth(q, k, v, s0, z0):
        root = 24**0.5  # the op leaves out M^(-1/2)
        e = c0.to(s0.dtype).exp()
        o, s, z = naive(
            q, k, v, s0 * e[..., None] / root, z0 * e / root, w=w, kernel=kernel, causal=causal
        )
        return o, s * root, z * root

    names = "o S z dq dk dv dS0 dz0"
    assert_accurate(f, truth, (q, k, v, s0, z0), floor=5e-6, names=names)


@each_backend
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cuts", ((1,), (64,), (3, 50), (10, 11, 12)))
def test_split_and_resume(generator, cuts, kernel):
    """Causal in pieces is causal at once: outputs, state, and gradients through the state."""
    q, k, v, w = draw(generator, dtype=torch.float64, n=80, m=24, scale=3.0)

    def pieces(q, k, v):
        state, outputs = None, []
        for parts in zip(*(x.tensor_split(cuts, 2) for x in (q, k, v)), strict=True):
            o, state = performer_attention(
                *parts, w, kernel=kernel, causal=True, initial_state=state, return_state=True
            )
            outputs.append(o)
        return torch.cat(outputs, 2), *state

    def whole(q, k, v):
        o, state = performer_attention(q, k, v, w, kernel=kernel, causal=True, return_state=True)
        return o, *state

    # The cotangent of c is there in both, and is ignored in both.
    keep = (0, 1, 2)
    a = outputs_and_gradients(lambda *x: [pieces(*x)[i] for i in keep], (q, k, v))
    b = outputs_and_gradients(lambda *x: [whole(*x)[i] for i in keep], (q, k, v))
    for x, y in zip(a, b, strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert_close(pieces(q, k, v)[3], whole(q, k, v)[3], rtol=0, atol=1e-12)


@each_backend
@pytest.mark.parametrize("others, last", ((1, 1), (1, 100), (40, 0)))
@pytest.mark.parametrize("n", (64, 65))
def test_causal_leaks_nothing(generator, n, others, last):
    """Small keys have large exponents: with a shift that knew the last one, the others (40, 0)
    would all be e^-2000 = 0."""
    q, k, v, w = draw(generator, n=n, dtype=torch.float64)
    k *= others
    before = performer_attention(q, k, v, w, causal=True)
    for x in (q, k, v):
        x[:, :, -1] = last * torch.randn(x.shape[-1], generator=generator, dtype=torch.float64)
    after = performer_attention(q, k, v, w, causal=True)
    assert_close(after[:, :, :-1], before[:, :, :-1], rtol=0, atol=1e-12)
    assert_close(after, exact(q, k, v, w, True), rtol=0, atol=1e-9)
    assert not torch.equal(after[:, :, -1], before[:, :, -1])


def test_causal_memory_is_linear(generator):
    n, m = 1024, 8
    q, k, v, w = draw(generator, b=1, h=1, n=n, d=4, dv=4, m=m)
    with Largest() as seen:
        # Called as "reference", Python runs it, and the probe sees inside.
        outputs_and_gradients(call(w, causal=True, backend="reference"), (q, k, v))
    # Scores of blocks of 64, or features; either is far from N².
    assert 0 < seen.numel <= n * 64 < n * n / 10


@each_backend
@pytest.mark.parametrize("causal", (False, True))
def test_batch_and_heads_are_independent(generator, causal):
    """A shift taken over batch or heads would underflow everyone beside a large one."""
    q, k, v, w = draw(generator)
    before = performer_attention(q, k, v, w, causal=causal)
    k[1, 2] *= 50
    after = performer_attention(q, k, v, w, causal=causal)
    changed = torch.zeros(2, 3, dtype=torch.bool)
    changed[1, 2] = True
    assert torch.equal(after[~changed], before[~changed])
    assert not torch.equal(after[changed], before[changed])


@each_backend
def test_eps_is_added_to_the_shifted_denominator(generator):
    q, k, v, w = draw(generator, n=1)  # one token: the denominator is the number that M terms make
    o, (_, z, _) = performer_attention(q, k, v, w, return_state=True, eps=0.5)
    assert_close(z, torch.ones_like(z))
    share = o / v  # den / (den + eps)
    assert ((share > 0.66) & (share < 1)).all()  # den ≥ 1


@each_backend
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("causal", (False, True))
def test_layouts(generator, how, causal):
    q, k, v, w = draw(generator, n=17)
    inputs = [layout(x, how) for x in (q, k, v)]
    given = outputs_and_gradients(call(w, causal=causal), inputs)
    plain = outputs_and_gradients(call(w, causal=causal), [x.contiguous() for x in inputs])
    for x, y in zip(given, plain, strict=True):
        assert_close(x, y)
        if how != "expanded":
            assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(
    b=st.integers(1, 3), h=st.sampled_from((1, 3, 8)), n=st.integers(1, 70), d=st.integers(1, 9),
    dv=st.integers(1, 9), m=st.integers(1, 20), causal=st.booleans(),
)  # fmt: skip
def test_any_shape(backend, b, h, n, d, dv, m, causal):
    q, k, v, w = draw(torch.Generator().manual_seed(n), b=b, h=h, n=n, d=d, dv=dv, m=m)
    assert_accurate(
        call(w, causal=causal, backend=backend),
        lambda q, k, v: naive(q, k, v, w=w, causal=causal)[0],
        (q, k, v),
    )
