"""Inputs at the edge: no tokens or no batch, a tensor as scale, mixed types under autocast."""

import pytest
import torch
from softmax_cases import FORMS, NAMES, latents, mla, qkv, softmax_op, where

from tab import BlockPattern, local_attention, sparse_attention
from tab.functional import mla_decode
from tab.layers import build_attention

MLA = [*where("fused"), *(pytest.param(f, "", id=f) for f in FORMS[1:])]


def decode_inputs(n=5, b=2, **kwargs):
    """q_nope, q_rope, cache (B, Nmax, R+Dr), lengths, w_uk, w_uv"""
    qn, qr, c, kr, uk, uv = latents(max(n, 1), b=b, **kwargs)
    lengths = torch.full((b,), 3)
    return [qn[:, :, 0], qr[:, :, 0], torch.cat([c, kr], -1)[:, :n], lengths, uk, uv]


def zero_gradients(outputs, inputs):
    total = sum(o.sum() for o in outputs if o.requires_grad)
    for x, g in zip(inputs, torch.autograd.grad(total, inputs), strict=True):
        assert g.shape == x.shape
        assert not g.any()


@pytest.mark.parametrize(("b", "n"), [(0, 12), (2, 0), (0, 0)])
@pytest.mark.parametrize(("name", "backend"), where(*NAMES))
def test_nothing_to_attend(name, backend, b, n):
    x = [t.requires_grad_() for t in qkv(n, b=b, dv=5)]
    o = softmax_op(name, backend, n)(*x)
    assert o.shape == (b, 2, n, 5)
    zero_gradients([o], x)


@pytest.mark.parametrize(("b", "n"), [(0, 6), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("form", "backend"), MLA)
def test_nothing_to_attend_mla(form, backend, masked, b, n):
    x = [t.requires_grad_() for t in latents(n, b=b)]
    mask = torch.ones(b, n, dtype=torch.bool) if masked else None
    for causal in (False, True):
        options = {"key_mask": mask, "causal": causal, "return_max_logits": True}
        for lse in (False, True):
            o, *rest, peak = mla(form, backend, return_lse=lse, **options)(*x)
            assert o.shape == (b, 2, n, 5)
            assert (peak == -torch.inf).all()
            assert peak.shape == (b, 2)
            assert [r.shape for r in rest] == [(b, 2, n)] * lse
            zero_gradients([o, *rest], x)


@pytest.mark.parametrize(("b", "n"), [(0, 6), (2, 0), (0, 0)])
@pytest.mark.parametrize(("_", "backend"), where("decode"))
def test_empty_cache(_, backend, b, n):
    *first, cache, lengths, uk, uv = decode_inputs(n, b)
    x = [t.requires_grad_() for t in (*first, cache.detach(), uk, uv)]
    qn, qr, cache, uk, uv = x
    o, lse = mla_decode(qn, qr, cache, lengths, uk, uv, backend=backend)
    assert o.shape == (b, 2, 5)
    assert not o.any()
    assert (lse == -torch.inf).all()
    zero_gradients([o], x)


def test_empty_dimensions_that_mean_nothing():
    for x in ([t[:, :0] for t in qkv(8)], [t[..., :0] for t in qkv(8)]):
        for f in (softmax_op("line", "auto", 8), softmax_op("blocks", "auto", 8)):
            with pytest.raises(ValueError, match="at least one head and D, Dv ≥ 1"):
                f(*x)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.full((2, 1, 1), 0.3)])
def test_scale_is_no_tensor(scale):
    scale = torch.nn.Parameter(scale)
    x, w, pattern = qkv(8), latents(8), BlockPattern.bigbird(8, heads=2, block_size=4)
    for name, f in {
        "local_attention": lambda: local_attention(*x, window=2, scale=scale),
        "sparse_attention": lambda: sparse_attention(*x, pattern, scale=scale),
        **{"mla_attention" + " " * i: lambda f=f: mla(f, "auto", scale=scale)(*w)
           for i, f in enumerate(FORMS)},
        "mla_decode": lambda: mla_decode(*decode_inputs(), scale=scale),
    }.items():  # fmt: skip
        says = rf"{name.strip()}\(\): argument 'scale' must be float, not Parameter; .* q \* scale"
        with pytest.raises(TypeError, match=says):
            f()


def test_scale_on_the_queries_is_the_scale():
    """What the error advises: the gradient of the learned factor."""
    x, s = qkv(8), torch.tensor(0.3, requires_grad=True)
    q, k, v = x
    o = local_attention(q * s, k, v, window=8, scale=1.0)
    torch.testing.assert_close(o, local_attention(*x, window=8, scale=0.3))
    o.square().sum().backward()
    low, high = (local_attention(*x, window=8, scale=0.3 + d).square().sum() for d in (-0.01, 0.01))
    torch.testing.assert_close(s.grad, (high - low) / 0.02, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_before_it_checks(low):
    """A mixture, as rotary positions in float32 give it."""
    (q, k, v), w, d = qkv(8), latents(8), decode_inputs()
    pattern = BlockPattern.bigbird(8, heads=2, block_size=4)
    d[0] = d[0].to(low)
    with torch.autocast("cpu", dtype=low):
        for backend in ("auto", "reference"):
            outs = (
                local_attention(q.to(low), k, v, window=2, backend=backend),
                sparse_attention(q, k, v.to(low), pattern, backend=backend),
                *(mla(form, backend)(w[0].to(low), *w[1:]) for form in FORMS),
                mla_decode(*d, backend=backend)[0],
            )
            assert {o.dtype for o in outs} == {low}


def test_autocast_leaves_float64_alone():
    kwargs = {"dtype": torch.float64}
    x, w = qkv(8, **kwargs), latents(8, **kwargs)
    pattern = BlockPattern.bigbird(8, heads=2, block_size=4)

    def run():
        return [
            local_attention(*x, window=2),
            sparse_attention(*x, pattern),
            *(mla(form, "auto")(*w) for form in FORMS),
            mla_decode(*decode_inputs(**kwargs))[0],
        ]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(run(), plain, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_are_float32(form, dtype):
    """lse and max_logits of half tensors are those of the same numbers in float32."""
    x = [4 * t.to(dtype) for t in latents(33, r=16)]
    options = {"return_lse": True, "return_max_logits": True}
    _, lse, peak = mla(form, "auto", **options)(*x)
    _, lse32, peak32 = mla(form, "auto", **options)(*(t.float() for t in x))
    torch.testing.assert_close(lse, lse32)
    torch.testing.assert_close(peak, peak32)
    torch.testing.assert_close(mla(form, "auto", return_max_logits=True)(*x)[1], peak32)


@pytest.mark.parametrize("name", ["local", "sparse"])
def test_layer_of_a_batch_of_none(name):
    layer = build_attention(name, 16, seq_len=8)
    layer(torch.randn(0, 8, 16)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
