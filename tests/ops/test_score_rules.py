"""Softcap and ALiBi, by themselves and beside masks and sinks, on every backend that has them."""

from functools import partial

import pytest
import torch
from backends import reference_and_cpp
from packs import cu
from proof import assert_accurate, outputs_and_gradients
from softmax_cases import (
    NAMES,
    as_heads,
    latents,
    masks,
    qkv,
    seen_lse,
    sees,
    softmax_op,
    where,
)
from textbook.softmax import ruled

from tab import local_attention, mla_attention
from tab.ops import OPS

N = 76
SLOPES = torch.tensor([0.5, 0.05, -0.1, 0.0])
LINES = [name for name in NAMES if name != "grid"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize(("name", "backend"), where(*NAMES))
def test_against_the_textbook(name, backend, heads, dtype):
    """Each alone, then everything that there is; o, L and the gradients through both."""
    x = [t.to(dtype) for t in qkv(N, b=4, h=4, d=12, dv=8)]
    x[1:] = (t[:, :heads] for t in x[1:])
    rules = [{"softcap": 0.7}, {"softcap": 2.0, "key_mask": masks(N)}]
    if name != "grid":
        rules += [{"alibi": SLOPES}, {"softcap": 2.0, "alibi": SLOPES, "key_mask": masks(N)}]
    for told in rules:
        call = seen_lse(softmax_op(name, backend, N, return_lse=True, **told))
        formula = {"slopes" if key == "alibi" else key: value for key, value in told.items()}
        truth = ruled(sees(name, N), **formula)
        assert_accurate(call, truth, x, names="o lse dq dk dv")


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0, 30.0])
@pytest.mark.parametrize(("name", "backend"), where("line", "blocks"))
def test_caps_that_hardly_bend_and_that_cut_off(name, backend, size, dtype):
    """Scores from a thousandth of the cap to far beyond it."""
    cap, x = 50.0, [t.to(dtype) for t in qkv(N, b=1)]
    x[0] = x[0] * cap * size
    call = softmax_op(name, backend, N, softcap=cap)
    truth = ruled(sees(name, N), softcap=cap)
    assert_accurate(call, lambda *x: truth(*x)[0], x, names="o dq dk dv", floor=4e-6)


@pytest.mark.parametrize("name", LINES)
def test_derivatives_of_any_order(name):
    x = [t.requires_grad_() for t in qkv(12, b=1, h=4, d=2, dv=2, dtype=torch.float64)]
    call = softmax_op(name, "auto", 12, softcap=1.5, alibi=SLOPES)
    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("name", "backend"), where(*LINES))
def test_what_a_masked_token_holds(name, backend, value):
    mask, results = masks(N), []
    call = softmax_op(name, backend, N, key_mask=mask, softcap=2.0, alibi=SLOPES[:2])
    for dirty in (False, True):
        x = [t.requires_grad_() for t in qkv(N, b=4)]
        given = [t.masked_fill(~mask[:, None, :, None], value) for t in x] if dirty else x
        o = call(*given).transpose(1, 2)[mask]
        results.append((o, *torch.autograd.grad(o.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


LATENT = reference_and_cpp("bent_mla_fwd")


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [20, 150])
@pytest.mark.parametrize("backend", LATENT)
def test_latent_attention(backend, n, causal, dtype):
    """Each alone, and with masks and sinks; o, L and the gradients through both."""
    key_mask = torch.arange(n) < torch.tensor([[n - 3], [0]])
    mask = torch.ones(n, n, dtype=torch.bool)
    mask, cap = mask.tril() if causal else mask, {"softcap": 0.8}
    for told in (cap, {"slopes": SLOPES[:2]}, {**cap, "slopes": SLOPES[:2], "key_mask": key_mask}):
        truth = ruled(mask, scale=6**-0.5, **told)
        options = {"alibi" if key == "slopes" else key: value for key, value in told.items()}
        call = seen_lse(
            partial(mla_attention, causal=causal, return_lse=True, backend=backend, **options)
        )
        x = [t.to(dtype) for t in latents(n)]
        assert_accurate(call, lambda *x: truth(*as_heads(*x)), x)  # noqa: B023
        assert_accurate(
            lambda *x: call(*x[:6], sinks=x[6]),  # noqa: B023
            lambda *x: truth(*as_heads(*x[:6]), x[6]),  # noqa: B023
            [*x, torch.tensor([0.4, -1.0], dtype=dtype)],
        )


@pytest.mark.parametrize("backend", LATENT)
def test_latent_attention_of_many_sequences(backend):
    """Packed: positions are those of each."""
    lengths = [5, 0, 70, 1, 13]
    told = {"softcap": 0.8, "alibi": SLOPES[:2], "causal": True, "backend": backend}
    x = latents(sum(lengths), b=1)

    def alone(*x):
        dims = [2, 2, 1, 1]
        parts = zip(*(t.split(lengths, d) for t, d in zip(x, dims, strict=False)), strict=True)
        outs = [mla_attention(*p, *x[4:], return_lse=True, **told) for p in parts]
        return tuple(torch.cat(y, 2) for y in zip(*outs, strict=True))

    packed = partial(mla_attention, cu_seqlens=cu(lengths), return_lse=True, **told)
    for a, b in zip(*(outputs_and_gradients(f, x) for f in (packed, alone)), strict=True):
        torch.testing.assert_close(a, b)


def test_latent_attention_any_derivative_and_the_largest_score():
    x = [t.double().requires_grad_() for t in latents(5)]
    key_mask = torch.arange(5) < torch.tensor([[4], [0]])
    told = {"softcap": 2.0, "alibi": SLOPES[:2], "key_mask": key_mask, "return_lse": True}
    call = lambda *x: mla_attention(*x, **told)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)
    for backend in ("reference", "auto"):
        o, peak = mla_attention(*latents(20), softcap=0.5, return_max_logits=True, backend=backend)
        assert (peak <= 0.5).all() and o.isfinite().all()
    tilted = {"softcap": 0.5, "alibi": SLOPES[:2], "causal": True, "return_max_logits": True}
    peaks = [mla_attention(*latents(150), backend=x, **tilted)[1] for x in ("reference", "auto")]
    torch.testing.assert_close(*peaks)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", LATENT)
def test_latent_attention_and_what_a_masked_token_holds(backend, causal, value):
    n, results = 70, []
    mask = torch.arange(n) % 5 != torch.tensor([[1], [3]])
    told = {"softcap": 2.0, "alibi": SLOPES[:2], "key_mask": mask, "causal": causal}
    for dirty in (False, True):
        x = [t.requires_grad_() for t in latents(n)]
        held = [~mask[:, None, :, None]] * 2 + [~mask[..., None]] * 2
        given = [t.masked_fill(m, value) for t, m in zip(x, held, strict=False)] if dirty else x
        o = mla_attention(*given[:4], *x[4:], backend=backend, **told)
        o = o.transpose(1, 2)[mask]
        results.append((o, *torch.autograd.grad(o.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_forms_of_latent_attention_that_have_no_softcap():
    for form in ("expand", "absorb"):
        with pytest.raises(ValueError, match="runs SDPA, which takes neither softcap nor alibi"):
            mla_attention(*latents(20), form=form, softcap=3.0)


def test_what_cuda_cpp_does_not_take():
    q, k, v = qkv(N)
    for name, pattern in (("local_fwd", ()), ("sparse_fwd", (None,) * 4)):
        takes = OPS[name].takes["cuda"]
        assert takes(q, k, v, *pattern, None, None, 1, 0.0) is None
        assert "no key_mask" in takes(q, k, v, *pattern, masks(N)[:2], None, 1, 0.0)
        for slopes, cap in ((SLOPES, 0.0), (None, 2.0)):
            assert "neither softcap nor alibi" in takes(q, k, v, *pattern, None, slopes, 1, cap)


def test_bad_rules():
    x = qkv(N, h=4)
    call = lambda **o: local_attention(*x, window=2, **o)  # noqa: E731
    for cap in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="softcap > 0, or None for none; got softcap="):
            call(softcap=cap)
    with pytest.raises(TypeError, match=r"'softcap' must be float.*pass float"):
        call(softcap=torch.tensor(3.0))
    for bad in (SLOPES[:3], SLOPES.long(), SLOPES.expand(2, 4)):
        with pytest.raises(ValueError, match=r"wants alibi \(H,\) = \(4,\), floating, on cpu"):
            call(alibi=bad)
    with pytest.raises(ValueError, match=r"no gradient; pass alibi.detach\(\)"):
        call(alibi=SLOPES.clone().requires_grad_())
    with pytest.raises(ValueError, match="on a line only"):
        call(alibi=SLOPES, grid=(19, 4))
