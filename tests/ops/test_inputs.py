"""What operators take: nothing at all, autocast's mixtures, masked NaN, long sequences; and what
they refuse, and how."""

import math

import pytest
import torch
from backends import reference_and_cpp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from tab import linear_attention, orthogonal_projection, performer_attention

BACKENDS = reference_and_cpp("linear_fwd")
M, D = 12, 8


def linear(q, k, v, **options):
    return linear_attention(q, k, v, return_state=True, **options)


W = orthogonal_projection(M, D, generator=torch.Generator().manual_seed(0))


def performer(q, k, v, **options):
    w = W.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return performer_attention(q, k, v, w, return_state=True, **options)


OPERATORS = pytest.mark.parametrize("attention", (linear, performer))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CAUSAL = pytest.mark.parametrize("causal", (False, True))


def draw(generator, b=2, n=20, dtype=torch.float32):
    return [torch.randn(b, 2, n, D, generator=generator, dtype=dtype) for _ in range(3)]


# --- nothing to compute ---------------------------------------------------------------------------


@each_backend
@OPERATORS
@CAUSAL
@pytest.mark.parametrize(("b", "n"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("first", (False, True))
def test_no_batch_no_tokens(attention, backend, causal, b, n, first, generator):
    x = [t.requires_grad_() for t in draw(generator, b, n)]
    keep = torch.ones(b, n, dtype=torch.bool)
    _, given = attention(*draw(generator, 2, 3))  # some state, of batch 2
    state = tuple(t[:b] for t in given) if first else None
    o, after = attention(
        *x, causal=causal, key_mask=keep, initial_state=state, backend=backend
    )  # fmt: skip
    assert o.shape == (b, 2, n, D) and o.requires_grad
    for left, right in zip(
        after[:2], state or [torch.zeros_like(t[:b]) for t in given], strict=False
    ):
        assert_close(left, right)
    (o.sum() + after[0].sum()).backward()
    assert all(t.grad.shape == t.shape for t in x)


# --- types ----------------------------------------------------------------------------------------


@OPERATORS
def test_float8_and_nested_tensors_are_refused_with_a_way_out(attention, generator):
    q, k, v = draw(generator)
    with pytest.raises(ValueError, match=r"wants float16, bfloat16.*q \(2, 2, 20, 8\) float8_e4m3"):
        attention(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"wants float16, bfloat16.*int32"):
        attention(q, k.int(), v)
    for options in ({}, {"layout": torch.jagged}):
        nested = torch.nested.nested_tensor([v[0, 0], v[1, 0, :3]], **options)
        with pytest.raises(ValueError, match=r"v is nested.*v.unbind\(\).*to_padded_tensor"):
            attention(q, k, nested)


@OPERATORS
def test_a_learned_eps_is_a_type_error(attention, generator):
    x = draw(generator)
    for eps in (torch.tensor(0.1, requires_grad=True), "0.1", None):
        with pytest.raises(TypeError, match=r"argument 'eps' must be float, not .*float\(eps\)"):
            attention(*x, eps=eps)
    assert_close(attention(*x, eps=True)[0], attention(*x, eps=1.0)[0])


@OPERATORS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_casts_before_it_compares(attention, dtype, generator):
    """q in the autocast type and k, v in float32, as rotary embeddings give them."""
    q, k, v = draw(generator)
    plain = attention(*(x.to(dtype) for x in (q, k, v)))
    with torch.autocast("cpu", dtype=dtype):
        for x in ((q.to(dtype), k, v), (q, k, v.to(dtype))):
            o, state = attention(*x, initial_state=None)
            assert (o.dtype, state[0].dtype) == (dtype, torch.float32)
            assert_close((o, *state), (plain[0], *plain[1]))
        o, _ = attention(q, k, v, causal=True, initial_state=state)
        assert o.dtype == dtype
    with pytest.raises(ValueError, match="one dtype"):
        attention(q.to(dtype), k, v)


@OPERATORS
def test_autocast_leaves_float64_alone(attention, generator):
    x = draw(generator, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = attention(*x)
        again = attention(*x, causal=True, initial_state=given[1])[0]
    assert_close(given, attention(*x), rtol=0, atol=0)
    assert again.dtype == torch.float64


# --- masked tokens --------------------------------------------------------------------------------


def hidden(what, where, keep, x):
    return [
        torch.where(keep[:, None, :, None], t, what) if name in where else t
        for name, t in zip("qkv", x, strict=True)
    ]


@each_backend
@CAUSAL
@pytest.mark.parametrize(
    ("attention", "options"),
    [(linear, {"feature_map": name}) for name in ("elu1", "relu", "identity", "softmax")]
    + [(performer, {"kernel": name}) for name in ("softmax", "relu")],
)
def test_what_a_masked_token_holds_reaches_nobody(attention, options, causal, backend, generator):
    if causal and options.get("feature_map") == "softmax":
        return
    x = [t.abs() for t in draw(generator)]
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, 13:] = keep[1, 3] = False
    seen = keep[:, None, :, None].expand_as(x[0])

    def results(x):
        x = [t.clone().requires_grad_() for t in x]
        o, state = attention(*x, key_mask=keep, causal=causal, backend=backend, **options)
        loss = o[seen].sin().sum() + sum(t.sin().sum() for t in state[:2])
        grads = torch.autograd.grad(loss, x)
        assert all(not g[~seen].any() for g in grads[1:])
        return o[seen], *state, *(g[seen] for g in grads)

    clean = results(x)
    for what in (math.nan, math.inf, -math.inf, 1e30):
        for where in ("q", "k", "v", "qkv"):
            assert_close(results(hidden(what, where, keep, x)), clean)


@each_backend
@OPERATORS
def test_a_nan_in_a_real_token_is_seen_by_all_who_attend_to_it(attention, backend, generator):
    for at, first in ((0, 5), (1, 5), (2, 5)):
        x = draw(generator)
        x[at][0, 0, 5, 2] = math.nan
        o, _ = attention(*x, causal=True, backend=backend)
        rows = o[0, 0].isnan().any(-1)
        assert rows[first:].all() if at else rows[5]
        assert not rows[:first].any() and not o[0, 1].isnan().any() and not o[1].isnan().any()


# --- many tokens, many lengths --------------------------------------------------------------------


@each_backend
@OPERATORS
@CAUSAL
def test_a_million_equal_keys(attention, backend, causal, generator):
    """One float32 running sum over them would be 0.5 % off; over the 2¹⁷ of the reference, whose
    chunks are Python's, 0.1 %."""
    n = 2**17 if backend == "reference" else 2**20
    q, k = (torch.randn(1, 1, 1, D, generator=generator).expand(1, 1, n, D) for _ in range(2))
    v = torch.rand(1, 1, n, 1, generator=generator) + 0.1
    truth = v.double().cumsum(2) / torch.arange(1, n + 1)[:, None]
    truth = truth if causal else truth[:, :, -1:].expand_as(truth)
    o, (_, z, *_) = attention(q, k, v, causal=causal, backend=backend)
    assert_close(o.double(), truth, rtol=1e-4, atol=0)
    one = attention(q[:, :, :1], k[:, :, :1], v[:, :, :1])[1][1]
    assert_close(z, n * one, rtol=1e-4, atol=0)


@OPERATORS
@CAUSAL
def test_two_compilations_for_all_lengths(attention, causal, generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=causal)[0], fullgraph=True, backend=counter
    )
    for n in (5, 32, 36, 63, 64, 65, 100, 128, 130, 520):
        x = [t.requires_grad_() for t in draw(generator, n=n)]
        o = compiled(*x)
        assert_close(o, attention(*x, causal=causal)[0])
        o.sum().backward()
    assert counter.frame_count <= 2
