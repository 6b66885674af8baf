"""The neighbours' names: `is_causal` beside `causal`, and (B, N, H, D) beside (B, H, N, D)."""

from functools import partial

import pytest
import torch
from proof import Largest

import tab
from tab.ops import OPS

PATTERN = tab.BlockPattern.sliding_window(12, window=2, sinks=1, block_size=4)
CALLS = {  # on q, k and v
    "linear": tab.linear_attention,
    "gated_linear": lambda *x, **o: tab.gated_linear_attention(*x, torch.full((3,), -0.1), **o),
    "performer": lambda *x, **o: tab.performer_attention(*x, torch.ones(3, 8), **o),
    "local": partial(tab.local_attention, window=3),
    "sparse": lambda *x, **o: tab.sparse_attention(*x, PATTERN, **o),
    "h2o": partial(tab.h2o_attention, heavy=3, recent=2, block=2),
    "linformer": lambda *x, **o: tab.linformer_attention(*x, torch.ones(12, 3) / 12, **o),
    "mla": lambda q, k, v, **o: tab.mla_attention(
        q, k, v[:, 0] if o.get("layout", "bhnd") == "bhnd" else v[:, :, 0], torch.ones(2, 12, 8),
        torch.ones(3, 8, 8) / 8, torch.ones(3, 8, 8) / 8, **o
    ),
}  # fmt: skip
CAUSAL = [name for name in CALLS if name not in ("linformer", "gated_linear")]


@pytest.fixture
def heads(generator):
    return torch.randn(3, 2, 3, 12, 8, generator=generator)


def turned(x):
    """(B, H, N, D) <-> (B, N, H, D), dense in memory."""
    return x.transpose(1, 2).contiguous()


@pytest.mark.parametrize("name", CALLS)
def test_layout(name, heads):
    given = [turned(x).requires_grad_() for x in heads]
    plain = [x.clone().requires_grad_() for x in heads]
    o, want = CALLS[name](*given, layout="bnhd"), CALLS[name](*plain)
    assert o.shape == (2, 12, 3, 8) and o.is_contiguous()
    torch.testing.assert_close(o, turned(want))
    got = torch.autograd.grad(o.sin().sum(), given, allow_unused=True)
    wanted = torch.autograd.grad(want.sin().sum(), plain, allow_unused=True)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, turned(y))


@pytest.mark.parametrize("name", CAUSAL)
def test_is_causal(name, heads):
    call = CALLS[name]
    want = call(*heads, causal=True)
    assert torch.equal(call(*heads, is_causal=True), want)
    assert torch.equal(call(*heads, is_causal=True, causal=True), want)
    assert torch.equal(call(*heads, is_causal=False), call(*heads))
    assert not torch.equal(call(*heads, is_causal=False), want)
    with pytest.raises(ValueError, match="causal=True and is_causal=False, two names of one"):
        call(*heads, causal=True, is_causal=False)


@pytest.mark.parametrize("name", CALLS)
def test_bad_layout(name, heads):
    with pytest.raises(ValueError, match="layout='nbhd': choose one of bhnd, bnhd"):
        CALLS[name](*heads, layout="nbhd")
    with pytest.raises(ValueError, match=rf"{name}_attention wants .*got "):
        CALLS[name](*heads[:, 0], layout="bnhd")


@pytest.mark.parametrize(
    ("name", "op"), [("local", "local_fwd"), ("linear", "linear_stateless_fwd")]
)
def test_kernels_are_given_views(name, op, heads, monkeypatch):
    """What they read is the caller's memory."""
    given, seen = [turned(x) for x in heads], []
    apply = OPS[op].apply
    monkeypatch.setattr(OPS[op], "apply", lambda *x: seen.extend(x[1:4]) or apply(*x), raising=True)
    CALLS[name](*given, layout="bnhd")
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in given]


def test_nothing_of_the_size_of_scores():
    """At N = 1024 they would be 1 M numbers; the inputs are 16 k."""
    x = torch.randn(3, 1, 1024, 2, 8)
    with Largest() as largest:
        tab.local_attention(*x, window=4, layout="bnhd", is_causal=True)
    assert largest.numel <= x[0].numel() * 2
