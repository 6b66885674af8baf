"""Packed batches of sparse attention: sequences of any lengths, each under a pattern of its own."""

import functools

import pytest
import torch
from backends import reference_and_cpp
from proof import outputs_and_gradients
from textbook.softmax import draw

from tab import BlockPattern, sparse_attention

BACKENDS = reference_and_cpp("sparse_fwd")
LENGTHS = [5, 20, 20, 0, 33]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


@functools.cache
def near(n):
    return BlockPattern.bigbird(n, heads=4, block_size=4, num_random=1)


def one_by_one(x, keep=None, **options):
    """The loop over sequences; q, k, v (1, H, T, D)."""
    outs, masks = [], [None] * len(LENGTHS) if keep is None else keep.split(LENGTHS, 1)
    for mask, *part in zip(masks, *(t.split(LENGTHS, 2) for t in x), strict=True):
        if part[0].shape[2]:
            outs.append(sparse_attention(*part, near(part[0].shape[2]), key_mask=mask, **options))
    return tuple(torch.cat(t, 2) for t in zip(*outs, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_loop_over_sequences(causal, masked, backend):
    x = draw(1, 4, sum(LENGTHS), 8, 12, kv=2)
    keep = torch.arange(sum(LENGTHS))[None] % 5 != 0 if masked else None
    options = {"causal": causal, "backend": backend, "return_lse": True, "softcap": 3.0}
    options.update(alibi=torch.linspace(0.1, 0.5, 4), sinks=torch.linspace(-1, 1, 4))
    given, want = (
        outputs_and_gradients(f, x)
        for f in (
            lambda *x: sparse_attention(*x, near, cu_seqlens=CU, key_mask=keep, **options),
            lambda *x: one_by_one(x, keep, **options),
        )
    )
    for a, b in zip(given, want, strict=True):
        torch.testing.assert_close(a, b)
    assert given[0].transpose(1, 2).is_contiguous()


def test_no_token_reaches_another_sequence():
    x = draw(1, 4, sum(LENGTHS), 8)
    f = functools.partial(sparse_attention, pattern=near, cu_seqlens=CU)
    clean = f(*x)
    for t in x:
        t[:, :, 5:25] = torch.nan
    inside = (torch.arange(sum(LENGTHS)) >= 5) & (torch.arange(sum(LENGTHS)) < 25)
    o = f(*x)
    torch.testing.assert_close(o[:, :, ~inside], clean[:, :, ~inside])
    assert o[:, :, inside].isnan().all()


def test_nested_and_the_other_layout():
    parts = [torch.randn(n, 4, 8) for n in LENGTHS if n]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    o = sparse_attention(x, x, x, near, layout="bnhd")
    for part, given in zip(parts, o.unbind(), strict=True):
        want = sparse_attention(*[part[None]] * 3, near(len(part)), layout="bnhd")[0]
        torch.testing.assert_close(given, want)
    o.values().sum().backward()
    assert x.grad.is_nested


def test_derivatives_of_any_order():
    ends = torch.tensor([0, 3, 7])
    x = [t.requires_grad_() for t in draw(1, 2, 7, 2, dtype=torch.float64)]
    make = functools.partial(BlockPattern.sliding_window, window=1, sinks=1, block_size=2)
    f = functools.partial(sparse_attention, pattern=make, cu_seqlens=ends, return_lse=True)
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_compiled_meta_and_nothing():
    x = draw(1, 4, sum(LENGTHS), 8)
    f = functools.partial(sparse_attention, pattern=near, causal=True)
    compiled = torch.compile(lambda *x: f(*x, cu_seqlens=CU).sin(), backend="aot_eager")
    torch.testing.assert_close(compiled(*x), f(*x, cu_seqlens=CU).sin())
    assert f(*(t.to("meta") for t in x), cu_seqlens=CU.to("meta")).shape == x[0].shape
    for ends in ([0], [0, 0, 0]):
        assert f(*draw(1, 4, 0, 8), cu_seqlens=torch.tensor(ends)).shape == (1, 4, 0, 8)


def test_errors():
    x = draw(1, 4, sum(LENGTHS), 8)
    for pattern, message in (
        (near(sum(LENGTHS)), r"a function of a sequence's length .* got BlockPattern\(n=78"),
        (lambda n: near(n + 1), r"of pattern\(5\) a BlockPattern for 5 queries .* got .*\(n=6"),
        (lambda n: None, r"of pattern\(5\) .* got None"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(*x, pattern, cu_seqlens=CU)
    with pytest.raises(ValueError, match="wants a BlockPattern, got _lru_cache_wrapper"):
        sparse_attention(*x, near)
    with pytest.raises(ValueError, match="it ends at 45"):
        sparse_attention(*x, near, cu_seqlens=CU[:-1])
