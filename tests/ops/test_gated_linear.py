"""Gated linear attention: the reference against the recurrence in float64, and against the closed
forms of retention, Mamba-2 and GLA."""

import math
from functools import partial

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from proof import LAYOUTS, Largest, assert_accurate, layout, outputs_and_gradients
from tasks import threads
from textbook.gated_linear import call, draw, naive
from torch.nn import functional as F
from torch.testing import assert_close

from tab import gated_linear_attention, linear_attention, use_backend

NAMES = "o S dq dk dv dg dS₀"


def check(x, *, floor=2e-6, **options):
    assert_accurate(call(**options), partial(naive, **options), x, floor=floor, names=NAMES)


def mask(generator, b, n):
    return torch.rand(b, n, generator=generator) > 0.3


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", (False, True))
def test_outputs_and_gradients(decay, state, generator):
    check(draw(generator, decay=decay, state=state))
    check(draw(generator, decay=decay, state=state), key_mask=mask(generator, 2, 65), scale=0.7)


@pytest.mark.each_isa
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv"),
    [
        (1, 1, 1, 8, 8),
        (3, 1, 2, 1, 3),
        (1, 3, 63, 16, 1),
        (2, 2, 64, 33, 7),
        (1, 2, 300, 5, 24),
        (1, 1, 70, 130, 40),  # smaller tiles
        (1, 2, 130, 64, 64),
    ],
)
def test_shapes(decay, b, h, n, d, dv, generator):
    check(draw(generator, b, h, n, d, dv, decay, state=True))


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_in_token_major_out(decay, how, generator):
    q, k, v, g = draw(generator, decay=decay)
    if decay == "channel":
        g = layout(g, how)
    x = [*(layout(t, how) for t in (q, k, v)), g]
    check(x)
    o, _, dq, dk, dv, _ = outputs_and_gradients(call(), x)
    assert all(t.transpose(1, 2).is_contiguous() for t in (o, dq, dk, dv))
    check([*(t.mT.contiguous().mT for t in (q, k, v)), g])


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_dtypes(decay, dtype, generator):
    x = draw(generator, 1, 2, 65, 19, 12, decay, state=True, dtype=dtype)
    o, s = call()(*x)
    assert (o.dtype, s.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    check(x, floor={torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}[dtype])


def test_a_decay_of_any_precision(generator):
    q, k, v, g = draw(generator)
    assert_close(gated_linear_attention(q, k, v, g.double()), gated_linear_attention(q, k, v, g))
    half = g.bfloat16().requires_grad_()
    o = gated_linear_attention(q, k, v, half)
    assert torch.equal(o, gated_linear_attention(q, k, v, half.detach().float()))
    assert torch.autograd.grad(o.sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("masked", (False, True))
def test_normalized(decay, masked, generator):
    q, k, v, g, s0 = draw(generator, decay=decay, state=True)
    z0 = torch.rand(2, 3, 20, generator=generator) + 0.5
    options = {"normalize": True, "key_mask": mask(generator, 2, 65) if masked else None}
    check([F.elu(q) + 1, F.elu(k) + 1, v, g, s0, z0], **options)
    check([F.elu(q) + 1, F.elu(k) + 1, v, g], **options)


def test_without_decay_it_is_linear_attention(generator):
    q, k, v, _ = draw(generator, n=130)
    for none in (torch.zeros(3), torch.zeros(2, 3, 130), torch.zeros(2, 3, 130, 20)):
        fq, fk = F.elu(q) + 1, F.elu(k) + 1
        o, state = gated_linear_attention(fq, fk, v, none, normalize=True, return_state=True)
        want, end = linear_attention(q, k, v, causal=True, return_state=True)
        assert_close(o, want)
        assert_close(state, end)


@needs_cpp("gated_linear_fwd")
@pytest.mark.parametrize("count", (1, 2, 3))
def test_any_number_of_threads(count, generator):
    """One sequence is cut into segments, whose states and their gradients are put together."""
    with threads(count), use_backend("cpp"):
        for n in (600, 901):
            check(draw(generator, 1, 1, n, 33, 20, state=True), key_mask=mask(generator, 1, n))


# --- the forms of the papers ----------------------------------------------------------------------


def test_retention(generator):
    """Sun et al. 2023, eq. 5: ((Q Kᵀ) ∘ D) V, D_ij = γ^(i−j)."""
    q, k, v, _ = draw(generator, n=150, dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
    apart = torch.arange(150)[:, None] - torch.arange(150)
    decay = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp(min=0), 0.0)
    assert_close(gated_linear_attention(q, k, v, gamma.log(), scale=1.0), (q @ k.mT * decay) @ v)


def test_mamba2(generator):
    """Dao and Gu 2024, eq. 6-7: (L ∘ C Bᵀ) X with L_ij = a_i … a_{j+1}, its heads sharing one B and
    one C, which are read where they lie."""
    c, b, x, g = draw(generator, n=150, dtype=torch.float64)
    c, b = (t[:, :1].expand(-1, 3, -1, -1) for t in (c, b))
    a = g.exp()  # (B, H, N)
    L = torch.zeros(2, 3, 150, 150, dtype=torch.float64)
    for j in range(150):
        L[:, :, j, j] = 1
        for i in range(j + 1, 150):
            L[:, :, i, j] = L[:, :, i - 1, j] * a[:, :, i]
    assert_close(gated_linear_attention(c, b, x, g, scale=1.0), (L * (c @ b.mT)) @ x)


def test_gla(generator):
    """Yang et al. 2024, eq. 4: ((Q ∘ B)(K / B)ᵀ, lower) V, B_t the product of all gates until t."""
    q, k, v, g = draw(generator, n=40, decay="channel", dtype=torch.float64)
    b = g.cumsum(2).exp()
    want = 20**-0.5 * ((q * b) @ (k / b).mT).tril() @ v
    assert_close(gated_linear_attention(q, k, v, g), want)


# --- what decay does to numbers -------------------------------------------------------------------


@pytest.mark.parametrize("strength", (30.0, 1e4, math.inf))
def test_a_strong_decay(decay, strength, generator):
    """Some tokens forget nearly all; what comes behind them keeps its digits."""
    q, k, v, g, s0 = draw(generator, n=150, decay=decay, state=True)
    g = torch.where(torch.rand(g.shape, generator=generator) > 0.8, -strength, g)
    check([q, k, v, g, s0])


def test_a_weak_growth(decay, generator):
    """Above 1, too, the formula is what it is."""
    q, k, v, g = draw(generator, n=100, decay=decay)
    check([q, k, v, -g / 50], floor=5e-6)


def test_many_tokens(decay, generator):
    """2¹⁷ with a memory of a thousand: as exact at the end as at the beginning."""
    n, one = 2**17, torch.ones(())
    q, k = (one.expand(1, 1, n, 2) for _ in range(2))
    v = torch.rand(1, 1, n, 1, generator=generator) + 0.5
    g = (one * math.log(0.999)).expand({"head": (1,), "token": (1, 1, n)}.get(decay, (1, 1, n, 2)))
    o, s = gated_linear_attention(q, k, v, g, scale=0.5, return_state=True)
    truth, x, rate = [], 0.0, g.double().exp().flatten()[0].item()
    for y in v.double().flatten().tolist():
        truth.append(x := rate * x + y)
    assert_close(o.double().flatten(), torch.tensor(truth, dtype=torch.float64), rtol=2e-5, atol=0)
    assert_close(s.double(), torch.full((1, 1, 2, 1), x, dtype=torch.float64), rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", reference_and_cpp("gated_linear_fwd"))
def test_a_million_equal_keys(backend):
    """Without decay: one float32 running sum over them would be 0.5 % off; over the 2¹⁷ of the
    reference, whose chunks are Python's, 0.1 %."""
    n = 2**17 if backend == "reference" else 2**20
    x, v = torch.full((1, 1, n, 1), 0.3), torch.full((1, 1, n, 1), 0.3, requires_grad=True)
    o = gated_linear_attention(x, x, v, torch.zeros(1), scale=1.0, backend=backend)
    truth = 0.3**3 * torch.arange(1, n + 1, dtype=torch.float64)
    assert_close(o.double().flatten(), truth, rtol=1e-5, atol=0)
    (dv,) = torch.autograd.grad(o.sum(), v)
    truth = 0.3**2 * torch.arange(n, 0, -1, dtype=torch.float64)
    assert_close(dv.double().flatten(), truth, rtol=1e-5, atol=0)


def test_memory_grows_with_n_alone(decay):
    n, d = 2048, 16
    x = [torch.randn(1, 1, n, d) for _ in range(3)]
    g = torch.zeros({"head": (1,), "token": (1, 1, n), "channel": (1, 1, n, d)}[decay])
    with Largest() as largest:
        gated_linear_attention(*x, g)
    assert largest.numel <= 64 * n  # N pairs of 64, where N² would be 2048·n
