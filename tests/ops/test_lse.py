"""The log-sum-exp of local and sparse attention: returned, differentiable; what merges by it."""

from functools import partial

import pytest
import torch
from backends import reference_and_cpp
from proof import assert_accurate
from textbook.softmax import blocks, draw, in_window, naive

from tab import BlockPattern, local_attention, merge_attention, mla_attention, sparse_attention
from tab.ops import OPS

PATTERN = BlockPattern.bigbird(45, heads=2, block_size=4, num_random=1)
BACKENDS = reference_and_cpp("local_fwd")


def with_lse(mask):
    """The textbook's o and L under a mask."""

    def attention(q, k, v):
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return naive(mask)(q, k, v), s.logsumexp(-1)

    return attention


def both(name, causal, backend="auto", **options):
    """-> the call, and who sees whom."""
    options |= {"causal": causal, "return_lse": True, "backend": backend}
    if name == "local":
        return partial(local_attention, window=(9, 4), **options), in_window(45, 9, 4, causal)
    return partial(sparse_attention, pattern=PATTERN, **options), blocks(PATTERN, causal)


@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_textbook(name, causal, dtype, backend):
    """o and L, and the gradients through both at once, then through L alone."""
    call, mask = both(name, causal, backend)
    inputs = [x.to(dtype) for x in draw(2, 2, 45, 8, 12)]
    o, lse = call(*inputs)
    assert lse.shape == (2, 2, 45) and lse.dtype == torch.float32 and o.dtype == dtype
    textbook = with_lse(mask)
    assert_accurate(call, textbook, inputs, names="o lse dq dk dv")
    assert_accurate(
        lambda *x: call(*x)[1], lambda *x: textbook(*x)[1], inputs, names="lse dq dk dv"
    )


@pytest.mark.parametrize("name", ["local", "sparse"])
def test_derivatives_of_any_order(name):
    pattern = BlockPattern.strided(7, stride=2, block_size=2)

    def call(q, k, v):
        if name == "local":
            return local_attention(q, k, v, window=2, return_lse=True)
        return sparse_attention(q, k, v, pattern, return_lse=True)

    inputs = [x.requires_grad_() for x in draw(1, 2, 7, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend):
    pattern = BlockPattern.from_blocks(torch.tensor([[1, 1], [0, 0]]).bool(), 4, 7)
    inputs = [x.requires_grad_() for x in draw(1, 2, 7, 4)]
    o, lse = sparse_attention(*inputs, pattern, return_lse=True, backend=backend)
    assert (
        not o[:, :, 4:].any() and lse[:, :, 4:].isneginf().all() and lse[:, :, :4].isfinite().all()
    )
    grads = torch.autograd.grad(lse.sum() + o.sum(), inputs)
    assert all(x.isfinite().all() for x in grads) and not grads[0][:, :, 4:].any()


def test_compiled_and_exported():
    class Both(torch.nn.Module):
        def forward(self, q, k, v):
            return local_attention(
                q, k, v, window=3, return_lse=True, layout="bnhd", is_causal=True
            )

    inputs = [x.transpose(1, 2) for x in draw(1, 2, 20, 4)]
    want = Both()(*inputs)
    exported = torch.export.export(Both(), tuple(inputs)).module()
    for x, y in zip(exported(*inputs), want, strict=True):
        torch.testing.assert_close(x, y)
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, lse = torch.compile(Both(), backend="aot_eager", fullgraph=True)(*leaves)
    got = torch.autograd.grad((o.sum(-1) * lse.mT).sum(), leaves)
    o, lse = Both()(*leaves)
    for x, y in zip(got, torch.autograd.grad((o.sum(-1) * lse.mT).sum(), leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_cuda_cpp_says_that_it_has_no_gradient_of_lse():
    q, k, v = draw(1, 1, 4, 4)
    o, lse = OPS["local_fwd"]("reference", q, k, v, None, None, 1, 1, 0, 0, False, 0.5, 0.0)
    each = ("local", (1, 1, 0, 0, False, 0.5, 0.0)), ("sparse", (4, False, 0.5, 0.0))
    for name, options in each:
        file = __import__(f"tab.ops.{name}", fromlist="_gradients")
        pattern = BlockPattern.strided(4, stride=1, block_size=4).tensors * (name == "sparse")
        with pytest.raises(RuntimeError, match="has no gradient of lse; use backend="):
            file._gradients("cuda", (None, lse), q, k, v, *pattern, None, None, o, lse, *options)


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("causal", [False, True])
def test_two_halves_of_the_keys_are_the_whole(causal, layout):
    """Causal, the first queries see none of the later keys."""
    half = torch.arange(10) < 5
    parts = [BlockPattern.from_blocks(x.expand(10, 10), 4, 39) for x in (half, ~half)]

    def merged(*x):
        x = [t if layout == "bhnd" else t.transpose(1, 2) for t in x]
        options = {"causal": causal, "return_lse": True, "layout": layout}
        first, second = (sparse_attention(*x, p, **options) for p in parts)
        o, lse = merge_attention(*first, *second, layout=layout)
        return o if layout == "bhnd" else o.transpose(1, 2), lse

    mask = torch.ones(39, 39, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    assert_accurate(merged, with_lse(mask), draw(2, 2, 39, 8, 12), names="o lse dq dk dv")


def test_merged_mla(generator):
    x = [torch.randn(s, generator=generator) for s in
         ((2, 3, 9, 4), (2, 3, 9, 2), (2, 9, 5), (2, 9, 2), (3, 4, 5), (3, 6, 5))]  # fmt: skip
    for form in ("expand", "fused"):
        first = torch.arange(9).expand(2, 9) < 4
        parts = [mla_attention(*x, key_mask=m, form=form, return_lse=True) for m in (first, ~first)]
        want = mla_attention(*x, form=form, return_lse=True)
        for a, b in zip(merge_attention(*parts[0], *parts[1]), want, strict=True):
            torch.testing.assert_close(a, b)


def test_merge_has_derivatives_also_where_nothing_was_seen():
    o1, o2 = torch.randn(2, 1, 1, 3, 2, dtype=torch.float64)
    lse1, lse2 = torch.randn(2, 1, 1, 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (o1, lse1, o2, lse2)]
    assert torch.autograd.gradcheck(merge_attention, inputs)
    assert torch.autograd.gradgradcheck(merge_attention, inputs)
    gone = torch.tensor([[[0.0, -torch.inf, -torch.inf]]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[[-torch.inf, 1.0, -torch.inf]]], dtype=torch.float64, requires_grad=True)
    o, lse = merge_attention(o1, gone, o2, other)
    assert torch.equal(o, torch.stack([o1[0, 0, 0], o2[0, 0, 1], torch.zeros(2)])[None, None])
    assert lse.tolist() == [[[0.0, 1.0, -torch.inf]]]
    grads = torch.autograd.grad(o.sum() + lse[..., :2].sum(), (o1, gone, o2, other))
    assert all(x.isfinite().all() for x in grads)


def test_bad_parts():
    o, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for bad, message in (
        ((o, lse, o[:, :1], lse), r"of one shape .*o2 \(1, 1, 3, 4\)"),
        ((o, lse.mT, o, lse), r"lse1 \(1, 3, 2\)"),
        ((o, lse.double(), o, lse), "lse1 and lse2 in float32, .* lse1 .* float64"),
        ((o, lse, o.half(), lse), "one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_attention(*bad)
