"""Attention sinks: a logit for each head in the denominator of every softmax."""

from functools import partial

import pytest
import torch
from backends import reference_and_cpp
from proof import assert_accurate
from softmax_cases import FORMS, as_heads, latents
from textbook.softmax import blocks, draw, in_window, ruled

from tab import (
    BlockPattern,
    local_attention,
    merge_attention,
    merge_sinks,
    mla_attention,
    sparse_attention,
)

N = 45
PATTERN = BlockPattern.bigbird(N, heads=4, block_size=4, num_random=1)
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
BACKENDS = reference_and_cpp("local_fwd")
NAMES = "o lse dq dk dv dsinks"


def both(name, causal, backend="auto"):
    """-> f(q, k, v, sinks) -> o, L, and who sees whom."""
    options = {"causal": causal, "return_lse": True, "backend": backend}
    if name == "local":
        mask = in_window(N, 9, 4, causal)
        return lambda *x: local_attention(*x[:3], window=(9, 4), sinks=x[3], **options), mask
    call = lambda *x: sparse_attention(*x[:3], PATTERN, sinks=x[3], **options)  # noqa: E731
    return call, blocks(PATTERN, causal)


@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_textbook(name, causal, dtype, backend):
    """With gradients through o and L, of the sinks too; and, k and v of two heads, through o."""
    call, mask = both(name, causal, backend)
    x = [*(x.to(dtype) for x in draw(2, 4, N, 8, 12)), SINKS]
    # The gradients are those of an output in halves; the textbook's softmax is one of float32 here.
    floor = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_accurate(call, ruled(mask), x, floor=floor, names=NAMES)
    x[1:3] = (t[:, ::2] for t in x[1:3])
    names = NAMES.replace("lse ", "")
    o = [lambda *x, f=f: f(*x)[0] for f in (call, ruled(mask))]
    assert_accurate(*o, x, floor=floor, names=names)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_latent_attention(form, causal):
    """Masked, with a sequence of which nothing is seen."""
    key_mask = torch.arange(20) < torch.tensor([[17], [0]])
    mask = torch.ones(20, 20, dtype=torch.bool)
    truth = ruled(mask.tril() if causal else mask, key_mask=key_mask, scale=6**-0.5)
    assert_accurate(
        lambda *x: mla_attention(
            *x[:6], sinks=x[6], key_mask=key_mask, causal=causal, form=form, return_lse=True
        ),
        lambda *x: truth(*as_heads(*x[:6]), x[6]),
        [*latents(20), SINKS[:2]],
    )


def test_derivatives_of_any_order():
    x = [*draw(1, 2, 7, 2, dtype=torch.float64), SINKS[:2].double()]
    x = [t.requires_grad_() for t in x]
    call = lambda *x: local_attention(*x[:3], window=2, sinks=x[3], return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_and_heads_without_a_sink(backend):
    pattern = BlockPattern.from_blocks(torch.tensor([[1, 1], [0, 0]]).bool(), 4, 7)
    sinks = torch.tensor([-torch.inf, 2.0], requires_grad=True)
    x = [t.requires_grad_() for t in draw(1, 2, 7, 4)]
    o, lse = sparse_attention(*x, pattern, sinks=sinks, return_lse=True, backend=backend)
    plain, _ = sparse_attention(*x, pattern, return_lse=True, backend=backend)
    torch.testing.assert_close(o[:, 0], plain[:, 0])
    assert not o[:, :, 4:].any() and lse[0, 0, 4:].isneginf().all() and (lse[0, 1, 4:] == 2).all()
    grads = torch.autograd.grad(o.sum() + lse[:, 1].sum(), (*x, sinks))
    assert all(g.isfinite().all() for g in grads) and grads[3][0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_what_a_masked_token_holds(form):
    """It reaches no sink either."""
    mask = torch.arange(20) < torch.tensor([[13], [20]])
    tensors = [*latents(20), SINKS[:2]]
    dirty = [t.clone() for t in tensors]
    for t in dirty[:4]:
        t[0, ..., 13:, 1] = torch.nan
    results = []
    for x in (tensors, dirty):
        x = [t.requires_grad_() for t in x]
        o = mla_attention(*x[:6], sinks=x[6], key_mask=mask, form=form).transpose(1, 2)[mask]
        results.append((o, *torch.autograd.grad(o.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_and_exported():
    class Both(torch.nn.Module):
        def forward(self, q, k, v, sinks):
            return local_attention(q, k, v, window=3, sinks=sinks, return_lse=True, layout="bnhd")

    x = [*(t.transpose(1, 2) for t in draw(1, 4, 20, 4)), SINKS]
    want = Both()(*x)
    given = torch.export.export(Both(), tuple(x)).module()(*x)
    torch.testing.assert_close(given, want)
    leaves = [t.clone().requires_grad_() for t in x]
    compiled = torch.compile(Both(), backend="aot_eager", fullgraph=True)
    got, grads = (
        torch.autograd.grad((o.sum(-1) * lse.mT).sum(), leaves)
        for o, lse in (compiled(*leaves), Both()(*leaves))
    )
    torch.testing.assert_close(got, grads)


def test_merged_parts_take_the_sink_last():
    half = torch.arange(10) < 5
    x = draw(2, 4, 39, 8)
    parts = [
        sparse_attention(*x, BlockPattern.from_blocks(m.expand(10, 10), 4, 39), return_lse=True)
        for m in (half, ~half)
    ]
    whole = local_attention(*x, window=38, sinks=SINKS, return_lse=True)
    merged = merge_sinks(*merge_attention(*parts[0], *parts[1]), SINKS)
    torch.testing.assert_close(merged, whole)


def test_bad_sinks():
    q, k, v = draw(1, 4, N, 4)
    o, lse = local_attention(q, k, v, window=1, return_lse=True)
    calls = (
        partial(local_attention, q, k, v, window=1),
        partial(sparse_attention, q, k, v, PATTERN),
        partial(mla_attention, *latents(N, h=4)),
        lambda sinks: merge_sinks(o, lse, sinks),
    )
    for call in calls:
        for bad in (SINKS[:3], SINKS.long(), SINKS[None]):
            with pytest.raises(ValueError, match=r"wants sinks \(H,\) = \(4,\), floating, on cpu"):
                call(sinks=bad)
    with pytest.raises(ValueError, match=r"lse \(B, H, N\) in float32.*lse \(1, 4, 45\) float64"):
        merge_sinks(o, lse.double(), SINKS)
