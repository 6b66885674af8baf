"""Gated linear attention beside its numbers: later and masked tokens, NaN, states, no tokens, what
PyTorch does with it, errors."""

import math

import pytest
import torch
from backends import needs_cpp
from proof import outputs_and_gradients, poisoned
from textbook.gated_linear import call, draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from tab import gated_linear_attention
from tab.ops import OPS

# --- properties -----------------------------------------------------------------------------------


def test_later_tokens_change_nothing_earlier(decay, generator):
    def results(q, k, v, g):
        leaf = q.clone().requires_grad_()
        o = gated_linear_attention(leaf, k, v, g)[:, :, :100]
        return o, torch.autograd.grad(o.sum(), leaf)[0][:, :, :100]

    q, k, v, g = draw(generator, n=150, decay=decay)
    before = results(q, k, v, g)
    k, v = (torch.cat([x[:, :, :100], 9 * x[:, :, 100:]], 2) for x in (k, v))
    if decay != "head":
        g = torch.cat([g[:, :, :100], 9 * g[:, :, 100:]], 2)
    assert all(map(torch.equal, before, results(q, k, v, g)))


@pytest.mark.parametrize("normalize", (False, True))
def test_split_and_resume(decay, normalize, generator):
    q, k, v, g = draw(generator, n=150, decay=decay)
    q, k = q.exp(), k.exp()
    options = {"normalize": normalize, "return_state": True}
    whole, end = gated_linear_attention(q, k, v, g, **options)
    parts, state = [], None
    for at in (slice(0, 70), slice(70, 71), slice(71, 150)):
        x = [t if t.dim() == 1 else t[:, :, at] for t in (q, k, v, g)]
        o, state = gated_linear_attention(*x, initial_state=state, **options)
        parts.append(o)
    assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-4)
    assert_close(state, end, rtol=1e-5, atol=1e-4)


def test_a_masked_token_is_as_though_it_were_not_there(decay, generator):
    q, k, v, g, s0 = draw(generator, 1, 2, 150, decay=decay, state=True)
    keep = torch.rand(150, generator=generator) > 0.3
    left = [t if t.dim() == 1 else t[:, :, keep] for t in (q, k, v, g)]
    o, s = call(key_mask=keep[None])(q, k, v, g, s0)
    want, end = call()(*left, s0)
    assert_close(o[:, :, keep], want)
    assert_close(s, end)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("which", (0, 1, 2, 3))
def test_what_a_masked_token_holds_reaches_nobody(decay, which, value, generator):
    keep = torch.ones(2, 100, dtype=torch.bool)
    keep[0, 80:] = keep[1, 3] = False
    x = draw(generator, n=100, decay=decay)
    if x[which].dim() == 1:
        return

    def results(x):
        leaves = [t.clone().requires_grad_() for t in x]
        o, s = gated_linear_attention(*leaves, key_mask=keep, return_state=True)
        o = o.transpose(1, 2)[keep]
        grads = torch.autograd.grad(o.sin().sum() + s.sin().sum(), leaves)
        assert all(t.dim() == 1 or not t.transpose(1, 2)[~keep].any() for t in grads[1:])
        return o, s, *(t if t.dim() == 1 else t.transpose(1, 2)[keep] for t in grads)

    clean = results(x)
    x[which].transpose(1, 2)[~keep] = value
    assert_close(results(x), clean)


@pytest.mark.parametrize("which", (0, 1, 2, 3))
def test_a_nan_in_a_real_token_reaches_all_later_ones_alone(decay, which, generator):
    x = draw(generator, 1, 2, 150, decay=decay)
    if x[which].dim() == 1:
        return
    clean = gated_linear_attention(*x)
    x[which][0, 0, 70] = math.nan
    o = gated_linear_attention(*x)
    rows = o[0, 0].isnan().all(-1)
    assert_close(o[0, 0, :70], clean[0, 0, :70])
    assert torch.equal(o[0, 1], clean[0, 1])
    assert rows[70] and rows[71:].all() == (which != 0)


@pytest.mark.parametrize(("b", "n"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("normalize", (False, True))
def test_nothing(decay, b, n, normalize, generator):
    x = [t.requires_grad_() for t in draw(generator, b, 3, n, decay=decay)]
    first = torch.ones(b, 3, 20, 28), torch.ones(b, 3, 20)
    o, state = gated_linear_attention(
        *x, normalize=normalize, initial_state=first if normalize else first[0], return_state=True
    )
    assert o.shape == (b, 3, n, 28)
    assert_close(state, first if normalize else first[0])
    o.sum().backward()
    assert all(t.grad.shape == t.shape for t in x)


def test_a_row_that_sees_nothing_is_zero(generator):
    q, k, v, g = (t.requires_grad_() for t in draw(generator, n=10))
    keep = torch.zeros(2, 10, dtype=torch.bool)
    for normalize in (False, True):
        with poisoned():
            o = gated_linear_attention(q, k, v, g, key_mask=keep, normalize=normalize)
            grads = torch.autograd.grad(o.sum(), (q, k, v, g))
        assert not any(t.any() for t in (o, *grads))


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("masked", (False, True))
def test_derivatives_of_any_order(decay, normalize, masked, generator):
    x = draw(generator, 1, 2, 5, 3, 4, decay, state=True, dtype=torch.float64)
    if normalize:
        x[:2], x[4:] = [t.exp() for t in x[:2]], [x[4], torch.rand(1, 2, 3).double() + 0.5]
    keep = torch.tensor([[True, True, False, True, True]]) if masked else None
    f = call(normalize=normalize, key_mask=keep)
    x = [t.requires_grad_() for t in x]
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


@pytest.mark.parametrize("width", (1, 20))
@pytest.mark.parametrize("state", (False, True))
def test_opcheck(width, state, generator):
    q, k, v, g, s0 = draw(generator, decay="channel", state=True)
    args = (
        q,
        k,
        v,
        g[..., :width],
        torch.rand(2, 65, generator=generator) > 0.3,
        s0 if state else None,
        0.3,
    )
    name = "gated_linear" if width == 1 else "channel_gated_linear"
    torch.library.opcheck(OPS[f"{name}_fwd"].overload, args)
    torch.library.opcheck(OPS[f"{name}_bwd"].overload, (v, s0 if state else None, *args))


def test_two_compilations_for_all_lengths(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend=counter)
    for n in (5, 32, 63, 64, 65, 130, 520):
        x = [t.requires_grad_() for t in draw(generator, n=n)]
        for a, b in zip(
            outputs_and_gradients(compiled, x),
            outputs_and_gradients(gated_linear_attention, x),
            strict=True,
        ):
            assert_close(a, b)
    assert counter.frame_count <= 2


def test_exports_and_runs_without_memory(decay, generator):
    class Attention(torch.nn.Module):
        def forward(self, *x):
            return gated_linear_attention(*x, normalize=True, return_state=True)

    x = draw(generator, decay=decay)
    assert_close(torch.export.export(Attention(), tuple(x)).module()(*x), Attention()(*x))
    o, s = call()(*(t.to("meta") for t in x))
    assert o.shape == (2, 3, 65, 28) and o.transpose(1, 2).is_contiguous()
    assert s.shape == (2, 3, 20, 28)


def test_under_transforms(generator):
    x = draw(generator, decay="channel")

    def loss(*x):
        return gated_linear_attention(*x).sin().sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*x)
    leaves = [t.requires_grad_() for t in x]
    assert_close(grads, torch.autograd.grad(loss(*leaves), leaves))


def test_autocast(generator):
    x = draw(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, s = call()(*x)
    assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    half = [t.bfloat16() for t in x[:3]]
    assert torch.equal(o, gated_linear_attention(*half, x[3]))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"\(B, H, N, D\).*\(2, 3, 4\)"),
        ({"log_decay": torch.zeros(2)}, r"\(3,\), \(2, 3, 65\) or .*log_decay \(2,\)"),
        ({"log_decay": torch.zeros(2, 65, 3)}, r"got log_decay \(2, 65, 3\)"),
        ({"log_decay": torch.zeros(3, dtype=torch.int64)}, "floating; got log_decay .* int64"),
        ({"key_mask": torch.ones(2, 65)}, r"\(2, 65\) bool"),
        ({"initial_state": torch.zeros(2, 3, 20, 27)}, r"S \(2, 3, 20, 28\) in float32"),
        ({"initial_state": torch.zeros(2, 3, 20, 28), "normalize": True}, r"z \(2, 3, 20\)"),
        ({"layout": "nbhd"}, "layout='nbhd'"),
        ({"backend": "fast"}, "'fast'.*reference, cpp"),
    ],
)
def test_bad_input(change, words, generator):
    given = dict(zip(("q", "k", "v", "log_decay"), draw(generator), strict=True))
    with pytest.raises(ValueError, match=words):
        gated_linear_attention(**{**given, **change})


@needs_cpp("gated_linear_fwd")
def test_a_kernel_for_heads_is_none_for_channels(generator):
    x = draw(generator, decay="channel")
    with pytest.raises(RuntimeError, match="channel_gated_linear_fwd has no cpp kernel"):
        gated_linear_attention(*x, backend="cpp")
