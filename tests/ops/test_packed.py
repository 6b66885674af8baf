"""Packed batches: equal to the loop over their sequences, of which none reaches another."""

import math

import pytest
import torch
from backends import reference_and_cpp
from packs import DV, LENGTHS, NAMES, D, H, M, call, cu, cut, dims, draw, loop, results
from proof import Largest
from torch.testing import assert_close

import tab
from tab.ops import OPS

T = sum(LENGTHS)
BACKENDS = reference_and_cpp("linear_fwd")
each = pytest.mark.parametrize("name", NAMES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def compare(name, x, lengths=LENGTHS, bits=False, given=None, dtype=torch.float32, **options):
    """The packed call and the loop, outputs and gradients. given: options of the packed call."""
    packed = call(name, dtype, cu_seqlens=cu(lengths), **options, **(given or {}))
    alone = call(name, dtype, **options)
    got = results(packed, x)
    want = results(lambda *x: loop(name, alone, x, lengths), x)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i - (len(got) - len(x)) >= 4:  # gradients of weights: the sequences' in another order
            error = (a - b).abs().max() / b.abs().max()
            assert error <= 8 * torch.finfo(a.dtype).eps, i
        elif bits:
            assert torch.equal(a, b), i
        else:
            assert_close(a, b)
    return got


@each
@each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_the_loop(name, backend, causal):
    """Bit for bit where the same kernel runs."""
    x = draw(name, T)
    o, *_ = compare(name, x, causal=causal, backend=backend, bits=backend == "cpp")
    assert o.shape == (1, H, T, DV) and o.transpose(1, 2).is_contiguous()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(name, dtype):
    x = draw(name, T, dtype)
    assert compare(name, x, causal=True, dtype=dtype)[0].dtype == dtype


@each
@pytest.mark.parametrize("lengths", [(83,), (0, 83, 0), (20,) * 4 + (3,), (1,) * 83], ids=str)
def test_lengths(name, lengths):
    compare(name, draw(name, T), lengths)


@pytest.mark.parametrize("name", ["linear", "performer", "local"])
@each_backend
@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_heads_of_k_and_v(name, backend, heads):
    x = draw(name, T, heads=heads)
    compare(name, x, causal=True, backend=backend)


@each
def test_layout_and_the_type_of_the_ends(name):
    x = draw(name, T)
    heads = 2 if name == "mla" else 3
    turned = [t.transpose(1, 2).contiguous() if i < heads else t for i, t in enumerate(x)]
    o = call(name, cu_seqlens=cu(LENGTHS, torch.int64), layout="bnhd")(*turned)
    want = call(name, cu_seqlens=cu(LENGTHS))(*x)
    assert torch.equal(o.transpose(1, 2), want) and o.is_contiguous()


@each
def test_strides(name):
    """Slices of a wider tensor, as a fused projection gives them."""
    x = draw(name, T)
    wide = [torch.cat([t, t + 1], -1)[..., : t.shape[-1]] for t in x]
    assert_close(
        results(call(name, cu_seqlens=cu(LENGTHS)), wide),
        results(call(name, cu_seqlens=cu(LENGTHS)), x),
    )


# --- nobody reaches another -----------------------------------------------------------------------


@each
@each_backend
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_what_one_sequence_holds_reaches_no_other(name, backend, what):
    f = call(name, cu_seqlens=cu(LENGTHS), backend=backend)
    x = draw(name, T)
    poisoned = [t.detach().clone().requires_grad_() for t in x]
    for which in (3, 5):  # one of two of a length, which run together
        here = slice(sum(LENGTHS[:which]), sum(LENGTHS[: which + 1]))
        with torch.no_grad():
            for t, dim in zip(poisoned, dims(name), strict=True):
                if dim is not None:
                    t.narrow(dim, here.start, here.stop - here.start).fill_(what)
    given, clean = results(f, poisoned), results(f, x)
    others = torch.ones(T, dtype=torch.bool)
    others[[8, 9, 10, 81]] = False
    for t, want, dim in zip(given, clean, (2, *dims(name)), strict=True):
        if dim is not None:
            keep = others.nonzero().squeeze(1)
            assert torch.equal(t.index_select(dim, keep), want.index_select(dim, keep))
    assert given[0][:, :, 8:11].isnan().any()


# --- derivatives ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_of_any_order(name, causal):
    lengths = (2, 0, 3, 1, 1)
    x = draw(name, 7, torch.float64)
    options = {"linear": {"return_state": True}, "local": {"return_lse": True}}.get(name, {})
    f = call(name, torch.float64, cu_seqlens=cu(lengths), causal=causal, **options)
    f = _differentiable(f) if name == "linear" else f
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def _differentiable(f):
    def flat(*x):
        o, state = f(*x)
        return (o, *state)

    return flat


@each
def test_transforms(name):
    """By the reference, as for all ops."""
    x = [t.detach() for t in draw(name, T)]
    f = call(name, cu_seqlens=cu(LENGTHS))
    total = lambda *x: f(*x).sin().sum()  # noqa: E731
    want = torch.autograd.grad(total(*[t.requires_grad_() for t in x]), x)
    got = torch.func.grad(total, tuple(range(len(x))))(*x)
    assert_close(got, want, atol=1e-4, rtol=1e-4)


# --- states, lse, masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "performer"])
@each_backend
def test_a_state_for_each_sequence(name, backend):
    """Sequences in two packed parts are the whole; one without tokens keeps its state."""
    x = draw(name, T)
    options = {"causal": True, "backend": backend}
    first = [(n + 1) // 2 for n in LENGTHS]
    later = [n - m for n, m in zip(LENGTHS, first, strict=True)]
    halves = [[], []]
    for part in cut(name, x, LENGTHS):
        for t in range(2):
            n = (part[0].shape[2] + 1) // 2
            halves[t].append([y[:, :, :n] if t == 0 else y[:, :, n:] for y in part])
    early, late = ([torch.cat(ys, 2) for ys in zip(*half, strict=True)] for half in halves)
    _, state = call(name, cu_seqlens=cu(first), return_state=True, **options)(*early)
    s, *rest = state
    assert s.shape == (len(LENGTHS), H, D if name == "linear" else M, DV)
    assert all(r.shape == s.shape[:3] for r in rest)
    o, last = call(name, cu_seqlens=cu(later), return_state=True, initial_state=state, **options)(
        *late
    )
    whole, want = call(name, cu_seqlens=cu(LENGTHS), return_state=True, **options)(*x)
    ends = [part[:, :, m:] for part, m in zip(whole.split(list(LENGTHS), 2), first, strict=True)]
    assert_close(o, torch.cat(ends, 2), atol=1e-4, rtol=1e-4)
    if name == "linear":
        assert_close(last, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(last[0][1], state[0][1])  # no tokens
    got = torch.autograd.grad((o.sin().sum() + last[0].sin().sum()), x)
    shift = (last[-1] - want[-1]).exp()[..., None] if name == "performer" else 1.0  # S·e^c
    total = torch.cat(ends, 2).sin().sum() + (want[0] / shift).sin().sum()
    assert_close(got, torch.autograd.grad(total, x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_states_are_those_of_the_loop(name):
    compare(name, draw(name, T), return_state=True, bits=OPS["linear_fwd"].why_not("cpp") is None)


@pytest.mark.parametrize("name", ["local", "mla"])
@each_backend
def test_lse(name, backend):
    options = {"return_max_logits": True} if name == "mla" else {}
    lengths = (5, 3, 3, 70, 2)  # a sequence without tokens has no largest score
    x = draw(name, sum(lengths))
    _, lse, *more = compare(name, x, lengths, return_lse=True, backend=backend, **options)
    assert lse.shape == (1, H, T) and lse.is_contiguous()
    if name == "mla":
        assert more[0].shape == (len(lengths), H)


@pytest.mark.parametrize("name", ["linear", "performer", "mla"])
@each_backend
def test_key_mask(name, backend):
    """(1, T): padding within sequences."""
    mask = torch.rand(1, T, generator=torch.Generator().manual_seed(3)) < 0.7
    x = draw(name, T)
    f = call(name, cu_seqlens=cu(LENGTHS), key_mask=mask, backend=backend)
    masks = mask.split(list(LENGTHS), 1)

    def alone(*x):
        parts = zip(cut(name, x, LENGTHS), masks, strict=True)
        return torch.cat([call(name, key_mask=m, backend=backend)(*p) for p, m in parts], 2)

    assert_close(results(f, x), results(alone, x))


def test_features_that_are_a_softmax_over_the_tokens():
    x = draw("linear", T)
    compare("linear", x, feature_map="softmax")
    mask = torch.arange(T)[None] % 3 > 0
    f = call("linear", cu_seqlens=cu((5, 78)), key_mask=mask, feature_map="softmax")
    for part in (slice(0, 5), slice(5, T)):
        o = tab.linear_attention(
            *(t[:, :, part] for t in x), key_mask=mask[:, part], feature_map="softmax"
        )
        assert_close(f(*x)[:, :, part], o)


@each
def test_nothing_is_padded(name):
    x = draw(name, T)
    with Largest() as largest:
        results(call(name, cu_seqlens=cu(LENGTHS)), x)
    assert largest.numel <= max(t.numel() for t in x)
