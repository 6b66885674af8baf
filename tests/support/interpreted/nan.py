"""NaN, masked tokens and limits of the Triton kernels, run by Triton's interpreter on CPU tensors.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from interpreter import interpreted

from tab import orthogonal_projection
from tab.ops import OPS
from tab.ops._op import choose

interpreted(*(f"{op}_{way}" for op in ("linear", "performer", "mla") for way in ("fwd", "bwd")))

B, H, N, D = 2, 1, 40, 16
W = orthogonal_projection(16, D, generator=torch.Generator().manual_seed(0))
CALLS = {
    "linear": lambda q, k, v, mask=None, c=False: OPS["linear_fwd"].apply(
        "cuda", q, k, v, mask, None, None, 0, c, 0.0
    ),
    "linear relu": lambda q, k, v, mask=None, c=False: OPS["linear_fwd"].apply(
        "cuda", q, k, v, mask, None, None, 1, c, 0.0
    ),
    "performer": lambda q, k, v, mask=None, c=False: OPS["performer_fwd"].apply(
        "cuda", q, k, v, W, mask, None, None, None, 0, c, 0.0
    ),
    "performer relu": lambda q, k, v, mask=None, c=False: OPS["performer_fwd"].apply(
        "cuda", q, k, v, W, mask, None, None, None, 1, c, 0.0
    ),
}


def operands(generator):
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", CALLS)
def test_nan_is_seen(name, generator):
    for which, rows in ((0, [5]), (1, list(range(N))), (2, list(range(N)))):
        xs = operands(generator)
        xs[which][0, 0, 5, 2] = math.nan
        o = CALLS[name](*xs)[0]
        assert o[0, 0].isnan().any(-1).nonzero().flatten().tolist() == rows
        assert o[1].isfinite().all()


def real_results(f, xs, mask):
    leaves = [x.clone().requires_grad_() for x in xs]
    o = f(*leaves)
    grads = torch.autograd.grad(o.masked_fill(~mask[:, None, :, None], 0.0).sin().sum(), leaves)
    return [x.movedim(-2, 1)[mask] for x in (o, *grads)]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", CALLS)
def test_masked_tokens_reach_nobody(name, causal, generator):
    """NaN, ∞ and huge numbers side by side in the masked tokens."""
    xs, mask = operands(generator), torch.ones(B, N, dtype=torch.bool)
    mask[0, 25:] = mask[0, 1] = False
    f = lambda *x: CALLS[name](*x, mask, causal)[0]  # noqa: E731
    values = torch.tensor([math.nan, math.inf, 1e30])[torch.arange(N) % 3, None]
    dirty = [torch.where(mask[:, None, :, None], x, values) for x in xs]
    for a, b in zip(real_results(f, dirty, mask), real_results(f, xs, mask), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("with_lse", (False, True))
@pytest.mark.parametrize("causal", (False, True))
def test_mla(causal, with_lse, generator):
    """Queries, latents and weights: o, lse, the largest score, and all gradients."""
    shapes = (B, H, N, D), (B, H, N, 4), (B, N, 8), (B, N, 4), (H, D, 8), (H, D, 8)
    q, qr, c, kr, *w = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 25:] = mask[0, 1] = False

    def call(*x, mask=mask):
        return OPS["mla_fwd"].apply("cuda", *x, mask, 0.3, causal)

    def results(*x):
        leaves = [t.clone().requires_grad_() for t in x]
        o, lse, peak = call(*leaves)
        o, lse = o.transpose(1, 2)[mask], lse.transpose(1, 2)[mask]
        (o.sin().sum() + (lse.sin().sum() if with_lse else 0)).backward()
        return o, lse, peak, *(t.grad for t in leaves)

    hidden = (x.masked_fill(~mask[:, None, :, None], math.nan) for x in (q, qr))
    dirty = *hidden, *(x.masked_fill(~mask[..., None], math.nan) for x in (c, kr)), *w
    for a, b in zip(results(*dirty), results(q, qr, c, kr, *w), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)

    q[0, 0, 5, 2] = math.nan
    o, _, peak = call(q, qr, c, kr, *w, mask=None)
    assert o[0, 0].isnan().any(-1).nonzero().tolist() == [[5]]
    assert peak.isnan().tolist() == [[True], [False]]


def heads(dtype=torch.float32, d=16, dv=16, h=1):
    """q, k, v as `choose` sees them on a GPU, of which there is none here."""
    device = SimpleNamespace(type="cuda")
    sizes = (1, h, 8, d), (1, 1, 8, d), (1, 1, 8, dv)
    return [SimpleNamespace(dtype=dtype, device=device, shape=torch.Size(s)) for s in sizes]


def latents(dn=16, dr=8, dv=16, dtype=torch.float32):
    q, k, _ = heads(dtype, dn)
    rotary, w = heads(dtype, dr)[0], SimpleNamespace(shape=(1, dv, 8))
    return [q, rotary, k, rotary, w, w]


BEYOND = [
    ("linear_fwd", heads(torch.float64), "float32, bfloat16 and float16, got float64"),
    ("linear_fwd", heads(d=257), "D up to 256, got 257"),
    ("linear_fwd", heads(dv=300), "Dv up to 256, got 300"),
    ("gated_linear_fwd", heads(torch.float64), "got float64"),
    ("gated_linear_fwd", heads(torch.bfloat16, dv=257), "Dv up to 256, got 257"),
    ("gated_linear_fwd", heads(dv=129), "Dv up to 128, got 129"),
    ("performer_fwd", [*heads(d=300), W], "D up to 256, got 300"),
    ("local_fwd", heads(torch.float64), "got float64"),
    ("sparse_fwd", heads(torch.float64), "got float64"),
    ("mla_fwd", latents(dtype=torch.float64), "got float64"),
    ("mla_fwd", latents(dr=129), "Dr up to 128, got 129"),
    ("mla_fwd", latents(dv=129), "Dv up to 128, got 129"),
    ("mla_decode", latents(dr=129)[:2], "Dr up to 128, got 129"),
]
WITHIN = [
    ("linear_fwd", heads(d=256)),
    ("gated_linear_fwd", heads(torch.bfloat16, d=256)),
    ("performer_fwd", [*heads(dv=256), W]),
    ("local_fwd", heads(d=300)),
    ("mla_fwd", latents(dn=256, dtype=torch.bfloat16)),
    ("mla_decode", latents(dr=128)[:2]),
]


@pytest.mark.parametrize("name, operands, message", BEYOND)
def test_asked_for_by_name_it_never_falls_back(name, operands, message, monkeypatch):
    monkeypatch.setitem(OPS[name].reasons, "triton", None)  # as where a GPU is
    with pytest.raises(RuntimeError) as raised:
        choose("triton", OPS[name], *operands)
    assert message in str(raised.value) and 'backend="auto"' in str(raised.value)


@pytest.mark.parametrize("name, operands", WITHIN)
def test_within_the_limits(name, operands, monkeypatch):
    monkeypatch.setitem(OPS[name].reasons, "triton", None)
    assert choose("triton", OPS[name], *operands) == "triton"


def test_auto_still_has_the_reference(generator):
    """What the kernels do not take runs through the same launcher, without an error."""
    q, k, v = (x.double() for x in operands(generator))
    given = CALLS["linear"](q, k, v)[0]
    want = OPS["linear_fwd"].apply("reference", q, k, v, None, None, None, 0, False, 0.0)[0]
    assert torch.equal(given, want)
