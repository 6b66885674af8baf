"""H2O on any input: half types, hidden values, empties, copies, transforms, and every length."""

import copy
import pickle

import pytest
import torch
from proof import assert_accurate, outputs_and_gradients
from textbook.h2o import draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.testing import assert_close

from tab import H2OCache, h2o_attention

MODES = ("streaming", "exact")
both_modes = pytest.mark.parametrize("mode", MODES)
causal_or_not = pytest.mark.parametrize("causal", (False, True))


def steps(q, k, v, cache=None, **options):
    cache = cache or H2OCache(heavy=q.shape[2], recent=q.shape[2])
    each = range(q.shape[2])
    return torch.cat([cache.step(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in each], 2)


def everything(mode):
    return lambda q, k, v: h2o_attention(
        q, k, v, heavy=q.shape[2], recent=q.shape[2], causal=True, mode=mode, block=16
    )


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("std", (1, 4, 60))
@pytest.mark.parametrize("f", (*map(everything, MODES), steps), ids=(*MODES, "cache"))
def test_scores_are_not_rounded(generator, f, std, dtype):
    """Where nothing is evicted, the error is that of PyTorch's own attention."""
    q, k, v = (x.to(dtype) for x in draw(generator, h=4, n=64, d=64, dv=64))
    q, k = q * std, k * std
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    error, bound = ((x.double() - exact).abs().max().item() for x in (f(q, k, v), theirs))
    assert error <= 1.5 * bound


@both_modes
def test_gradients_of_half_types(generator, mode):
    q, k, v = (x.bfloat16() for x in draw(generator, n=33, d=16, dv=16))
    naive = lambda q, k, v: F.softmax((q @ k.mT * 0.5).masked_fill(later, -torch.inf), -1) @ v  # noqa: E731
    later = torch.ones(33, 33, dtype=torch.bool).triu(1)
    options = {"heavy": 33, "recent": 0, "causal": True, "mode": mode, "block": 8, "scale": 0.5}
    f = lambda *x: h2o_attention(*x, **options)  # noqa: E731
    assert_accurate(f, naive, (2 * q, 2 * k, v), names="o dq dk dv")


# --- what a masked token holds --------------------------------------------------------------------


@both_modes
@causal_or_not
@pytest.mark.parametrize("what", (torch.nan, torch.inf, 1e38))
@pytest.mark.parametrize("dirty", range(3), ids="qkv")
def test_hidden_values_reach_nobody(generator, what, dirty, causal, mode):
    clean = draw(generator, n=20)
    mask = torch.arange(20).expand(2, 20) < torch.tensor([[13], [20]])
    mask = mask & (torch.arange(20) != 5)
    soiled = [x.clone() for x in clean]
    soiled[dirty][(~mask)[:, None].expand(2, 2, 20)] = what
    options = {"heavy": 3, "recent": 2, "causal": causal, "mode": mode, "block": 4}

    def f(*x):
        o = h2o_attention(*x, key_mask=mask, **options)
        return o * mask[:, None, :, None]

    for a, b in zip(outputs_and_gradients(f, clean), outputs_and_gradients(f, soiled), strict=True):
        assert_close(a, b)


def test_hidden_values_never_enter_the_cache(generator):
    q, k, v = draw(generator, n=8)
    mask = torch.tensor([True, False, True, False]).repeat(2, 2)
    for x in (q, k, v):
        x[:, :, ~mask[0]] = torch.nan
    cache = H2OCache(heavy=1, recent=2)
    for i in (0, 4):
        now = slice(i, i + 4)
        o = cache.step(*(x[:, :, now] for x in (q, k, v)), key_mask=mask[:, now])
        assert o.isfinite().all()
    assert cache.k.isfinite().all() and cache.score.isfinite().all()


@both_modes
@causal_or_not
def test_nan_of_a_real_token_is_seen(generator, causal, mode):
    """By those who see the token (here all that are not before it), and by no other head."""
    options = {"heavy": 20, "recent": 20, "causal": causal, "mode": mode, "block": 20}
    for i in range(3):
        inputs = draw(generator, n=20)
        inputs[i][0, 0, 5, 2] = torch.nan
        rows = h2o_attention(*inputs, **options).isnan().any(-1)
        expected = torch.zeros(2, 2, 20, dtype=torch.bool)
        expected[0, 0, 5 if i == 0 else slice(5 if causal else 0, 20)] = True
        assert torch.equal(rows, expected)


# --- gradients, transforms, lengths ---------------------------------------------------------------


@both_modes
@causal_or_not
def test_second_derivatives(generator, causal, mode):
    inputs = [x.requires_grad_() for x in draw(generator, b=1, n=6, d=3, dv=2, dtype=torch.double)]
    options = {"heavy": 2, "recent": 1, "causal": causal, "mode": mode, "block": 2}
    assert torch.autograd.gradgradcheck(lambda *x: h2o_attention(*x, **options), inputs)


@both_modes
def test_transforms(generator, mode):
    q, k, v = draw(generator, n=9, dtype=torch.double)
    options = {"heavy": 2, "recent": 1, "causal": True, "mode": mode, "block": 4}
    f = lambda *x: h2o_attention(*x, **options)  # noqa: E731
    one = torch.func.vmap(lambda *x: f(*(t[None] for t in x))[0])(q, k, v)
    assert_close(one, f(q, k, v))
    given = torch.func.grad(lambda *x: f(*x).sin().sum(), (0, 1, 2))(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert_close(given, torch.autograd.grad(f(*leaves).sin().sum(), leaves))


@both_modes
@causal_or_not
@pytest.mark.parametrize("train", (False, True))
def test_two_compilations_for_every_length(generator, train, causal, mode):
    options = {"heavy": 20, "recent": 20, "causal": causal, "mode": mode, "block": 16}
    f = lambda q: h2o_attention(q, q * 2, q + 1, **options)  # noqa: E731
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for n in (32, 36, 44, 18, 52, 60, 64, 68, 20, 84, 92):  # a budget of all, too
        q = torch.randn(1, 1, n, 4, generator=generator, requires_grad=train)
        assert_close(compiled(q), f(q))
        if train:
            assert_close(*(torch.autograd.grad(g(q).sin().sum(), q)[0] for g in (compiled, f)))
    assert counter.frame_count <= 2


@both_modes
def test_exported_it_trains(generator, mode):
    class Layer(torch.nn.Module):
        def forward(self, *x):
            return h2o_attention(*x, heavy=2, recent=1, mode=mode, block=4)

    inputs = draw(generator, n=9)
    exported = torch.export.export(Layer(), tuple(inputs)).module()
    assert_close(outputs_and_gradients(exported, inputs), outputs_and_gradients(Layer(), inputs))


@both_modes
@pytest.mark.parametrize("b, n", ((0, 9), (2, 0), (0, 0)))
def test_empty(generator, b, n, mode):
    inputs = draw(generator, b=b, n=n)
    f = lambda *x: h2o_attention(*x, heavy=2, recent=1, causal=True, mode=mode, block=4)  # noqa: E731
    shapes = [x.shape for x in outputs_and_gradients(f, inputs)]
    assert shapes == [(b, 2, n, 5), *(x.shape for x in inputs)]
    cache = H2OCache(heavy=2, recent=1)
    assert cache.step(*inputs).shape == (b, 2, n, 5)
    more = draw(generator, b=b, n=3)
    assert cache.step(*more).shape == (b, 2, 3, 5) and cache.seen == n + 3


@both_modes
def test_a_learned_scale_is_refused(generator, mode):
    inputs = draw(generator, n=6)
    for scale in (torch.nn.Parameter(torch.tensor(0.3)), torch.ones(2, 1, 1)):
        with pytest.raises(TypeError, match=r"pass q \* scale"):
            h2o_attention(*inputs, heavy=1, recent=1, mode=mode, scale=scale)
        with pytest.raises(TypeError, match=r"pass q \* scale"):
            H2OCache(heavy=1, recent=1, scale=scale)


def test_dtypes_that_are_refused(generator):
    q, k, v = (x.to(torch.float8_e4m3fn) for x in draw(generator))
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*convert it"):
        h2o_attention(q, k, v, heavy=1, recent=1)
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*convert it"):
        H2OCache(heavy=1, recent=1).step(q, k, v)


# --- autocast -------------------------------------------------------------------------------------


@both_modes
def test_autocast(generator, mode):
    q, k, v = draw(generator)
    f = lambda *x: h2o_attention(*x, heavy=3, recent=2, mode=mode, block=4)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        assert f(q.bfloat16(), k, v).dtype == torch.bfloat16  # mixed, as rotary embeddings give it
        assert f(q.double(), k.double(), v.double()).dtype == torch.float64
        assert H2OCache(heavy=1, recent=1).step(q.bfloat16(), k, v).dtype == torch.bfloat16


def test_a_cache_goes_on_under_autocast(generator):
    q, k, v = draw(generator, n=8)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    cache = H2OCache(heavy=8, recent=8)
    cache.step(*(x[:, :, :4] for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        o = cache.step(*(x[:, :, 4:] for x in (q, k, v)))
    assert o.dtype == torch.bfloat16 and cache.k.dtype == torch.float32
    assert_close(o.float(), whole[:, :, 4:], atol=0.03, rtol=0.03)
    low = H2OCache(heavy=8, recent=8)
    low.step(*(x.bfloat16() for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"widens to it; got cache_k.*bfloat16.*float32"):
        low.step(q, k, v)


# --- the cache's memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", (1, 4))
def test_a_cache_owns_its_memory(generator, prompt):
    """One buffer for all tokens, as decoding loops have it, changes nothing that was decoded."""
    q, k, v = draw(generator, n=12)
    buffers = [x[:, :, :prompt].clone() for x in (q, k, v)]
    cache, outputs = H2OCache(heavy=20, recent=20), []
    for start in range(0, 12, prompt):
        for buffer, x in zip(buffers, (q, k, v), strict=True):
            buffer.copy_(x[:, :, start : start + prompt])
        outputs.append(cache.step(*buffers))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(torch.cat(outputs, 2), wanted)


def test_copies_go_on_by_themselves(generator):
    """A beam search: two continuations of one prompt, and gradients through both."""
    q, k, v = (x.requires_grad_() for x in draw(generator, n=6))
    tail = draw(generator, n=3)
    cache = H2OCache(heavy=2, recent=2)
    cache.step(q, k, v)
    beam = copy.deepcopy(cache)
    first, second = cache.step(*tail), beam.step(*(-x for x in tail))
    assert cache.seen == beam.seen == 9 and not torch.equal(first, second)
    assert cache.k.data_ptr() != beam.k.data_ptr()
    grads = [torch.autograd.grad(o.sum(), v, retain_graph=True)[0] for o in (first, second)]
    assert all(g.abs().sum() > 0 for g in grads)


def test_pickle(generator):
    inputs = draw(generator, n=6)
    cache = H2OCache(heavy=2, recent=2)
    cache.step(*(x.requires_grad_() for x in inputs))
    with pytest.raises(ValueError, match=r"cache.detach\(\).*no_grad"):
        pickle.dumps(cache)
    again = pickle.loads(pickle.dumps(cache.detach()))
    assert not again.k.requires_grad
    tail = draw(generator, n=2)
    assert_close(again.step(*tail), cache.step(*tail))
