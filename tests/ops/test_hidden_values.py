"""What a hidden token holds, NaN or inf, reaches nobody, forward or backward; what a token that is
seen holds is seen by all who see it, and by nobody else."""

import math

import pytest
import torch
from softmax_cases import FORMS, NAMES, latents, mla, qkv, sees, softmax_op, where

from tab import linear_attention, orthogonal_projection, performer_attention
from tab.functional import mla_decode
from tab.ops import OPS
from tab.ops.mla_forms import max_logits

N, BAD = 40, 13


def run(f, tensors, rows):
    """o, and the gradients of a loss on the given rows (or batch rows) of o."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = f(*leaves)
    o[rows].pow(2).sum().backward()
    return o.detach(), [x.grad for x in leaves]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize(("name", "backend"), where(*NAMES))
def test_outside_the_window(name, backend, which, value):
    f, tensors = softmax_op(name, backend, N), qkv(N)
    seen = sees(name, N)
    outside = torch.arange(N) != BAD if which == 0 else ~seen[:, BAD]
    rows = (slice(None), slice(None), outside)
    o, grads = run(f, tensors, rows)
    tensors[which][:, :, BAD, 2] = value
    dirty, dirty_grads = run(f, tensors, rows)
    torch.testing.assert_close(dirty[rows], o[rows])
    # A loss that leaves out whoever sees the value. Not even those pass it on in the reference; in
    # C++ their own gradients, and those of the keys they see, are 0·NaN.
    met = torch.zeros(N, dtype=torch.bool) if backend == "reference" else seen[~outside].any(0)
    for a, b, spared in zip(dirty_grads, grads, (outside & ~met, ~met, ~met), strict=True):
        torch.testing.assert_close(a[:, :, spared], b[:, :, spared])
    if math.isnan(value) or which == 2:  # a key at infinity can have the weight 0
        assert not dirty[:, :, ~outside].isfinite().all(-1).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q_nope", "q_rope", "c_kv", "k_rope"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(("form", "backend"), where("fused") + [(f, "") for f in FORMS[1:]])
def test_masked_latents(form, backend, lse, which, value):
    """Output, lse, max_logits and the gradients of all tensors, weights too."""
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, BAD:] = False

    def f(*x):
        o, *_ = mla(form, backend, key_mask=mask, return_lse=lse, return_max_logits=True)(*x)
        return o.transpose(1, 2)  # (B, N, H, Dv), as the mask

    def peak(*x):
        return mla(form, backend, key_mask=mask, return_max_logits=True)(*x)[1]

    tensors = latents(N)
    o, grads = run(f, tensors, mask)
    largest = peak(*tensors)
    tensors[which][0, ..., BAD:, 1] = value
    dirty, dirty_grads = run(f, tensors, mask)
    torch.testing.assert_close(dirty[mask], o[mask])
    torch.testing.assert_close(peak(*tensors), largest)
    for a, b in zip(dirty_grads, grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("form", "backend"), where("fused") + [(f, "") for f in FORMS[1:]])
def test_later_latents(form, backend):
    """Causal: whoever comes before a token that holds NaN."""
    tensors, rows = latents(N), (slice(None), slice(None), slice(0, BAD))
    f = mla(form, backend, causal=True)
    o, _ = run(f, tensors, rows)
    tensors[2][:, BAD, 1] = math.nan
    dirty, _ = run(f, tensors, rows)
    torch.testing.assert_close(dirty[rows], o[rows])
    assert dirty[:, :, BAD:].isnan().all()


@pytest.mark.parametrize(("form", "backend"), where("fused") + [(f, "") for f in FORMS[1:]])
def test_seen_nan_is_in_max_logits(form, backend):
    tensors = latents(N)
    tensors[0][1, 1, 5, 2] = math.nan
    o, peak = mla(form, backend, return_max_logits=True)(*tensors)
    assert peak.isnan().tolist() == [[False, False], [False, True]]
    assert o[1, 1, 5].isnan().all()
    q = torch.randn(1, 2, 6, 4)
    q[0, 1, 3, 0] = math.nan
    assert max_logits(q, q, 1.0).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(("_", "backend"), where("decode"))
def test_unused_cache_rows(_, backend):
    qn, qr, c, kr, uk, uv = latents(N)
    cache, lengths = torch.cat([c, kr], -1), torch.tensor([7, 0])
    args = qn[:, :, 0], qr[:, :, 0], cache, lengths, uk, uv
    o, lse = mla_decode(*args, backend=backend)
    cache[0, 7:] = cache[1] = math.nan
    dirty, dirty_lse = mla_decode(*args, backend=backend)
    torch.testing.assert_close(dirty, o)
    torch.testing.assert_close(dirty_lse, lse)
    if backend == "reference":
        for x in (qn, qr, cache, uk, uv):
            x.requires_grad_()
        o, lse = mla_decode(qn[:, :, 0], qr[:, :, 0], cache, lengths, uk, uv)
        (o.sum() + lse[:1].sum()).backward()
        assert all(x.grad.isfinite().all() for x in (qn, qr, cache, uk, uv))


def causal(op, backend):
    w = orthogonal_projection(20, 16, generator=torch.Generator().manual_seed(0))
    if op == "linear":
        return lambda q, k, v: linear_attention(q, k, v, causal=True, backend=backend)
    return lambda q, k, v: performer_attention(q, k, v, w, causal=True, backend=backend)


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize(
    "op, backend", [(op, b) for op in ("linear", "performer") for b in ("reference", "cpp")]
)
def test_the_causal_future(op, backend, which, generator):
    """Of sums over features: o and the gradients of tokens that no seen NaN meets."""
    if OPS[f"{op}_fwd"].why_not(backend):
        pytest.skip("not built")
    f, n, bad = causal(op, backend), 70, 45
    tensors = [torch.randn(1, 2, n, 16, generator=generator) for _ in range(3)]
    token = torch.arange(n)
    rows = (slice(None), slice(None), token != bad if which == 0 else token < bad)
    o, grads = run(f, tensors, rows)
    tensors[which][:, :, bad, 2] = math.nan
    dirty, dirty_grads = run(f, tensors, rows)
    torch.testing.assert_close(dirty[rows], o[rows])
    torch.testing.assert_close(dirty_grads[0][rows], grads[0][rows])
    if which == 0:  # else every key meets a query that has seen it
        for a, b in zip(dirty_grads[1:], grads[1:], strict=True):
            torch.testing.assert_close(a[:, :, token > bad], b[:, :, token > bad])
