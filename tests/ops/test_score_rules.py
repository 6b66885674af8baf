"""Softcap and ALiBi, by themselves and beside masks and sinks, on every backend that has them."""

import pytest
import torch
from proof import assert_accurate
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


@pytest.mark.parametrize("causal", [False, True])
def test_latent_attention(causal):
    """By the reference, with masks and sinks."""
    key_mask = torch.arange(20) < torch.tensor([[17], [0]])
    mask = torch.ones(20, 20, dtype=torch.bool)
    told = {"softcap": 2.0, "key_mask": key_mask}
    truth = ruled(mask.tril() if causal else mask, slopes=SLOPES[:2], scale=6**-0.5, **told)
    options = {"alibi": SLOPES[:2], "causal": causal, "return_lse": True, **told}
    assert_accurate(
        lambda *x: mla_attention(*x[:6], sinks=x[6], **options),
        lambda *x: truth(*as_heads(*x[:6]), x[6]),
        [*latents(20), torch.tensor([0.4, -1.0])],
    )
    x = [t.double().requires_grad_() for t in latents(5)]
    options |= {"key_mask": key_mask[:, :5], "return_lse": False}
    call = lambda *x: mla_attention(*x, **options)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)
    o, peak = mla_attention(*latents(20), softcap=0.5, return_max_logits=True)
    assert (peak <= 0.5).all() and o.isfinite().all()


def test_latent_attention_names_what_has_no_softcap():
    x = latents(20)
    with pytest.raises(ValueError, match="runs SDPA, which takes neither softcap nor alibi"):
        mla_attention(*x, form="expand", softcap=3.0)
    with pytest.raises(RuntimeError, match=r"takes neither softcap nor alibi|was not built"):
        mla_attention(*x, backend="cpp", alibi=SLOPES[:2])


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
