"""H2O against the paper's algorithm 1, one batch entry, head, token and slot at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import LAYOUTS, Largest, assert_accurate, layout, outputs_and_gradients
from textbook.h2o import algorithm1, attend, draw, evict, naive
from torch.testing import assert_close

from tab import H2OCache, h2o_attention
from tab.layers import build_attention


def both(**options):
    return lambda *x: h2o_attention(*x, **options), lambda *x: naive(*x, **options)


STREAMS = [{"mode": "streaming", "block": block} for block in (1, 5, 64)]


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "mode", (*STREAMS, {"mode": "exact"}), ids=lambda m: "-".join(map(str, m.values()))
)
@pytest.mark.parametrize("heavy, recent", ((3, 4), (0, 3), (4, 0), (1, 0)))
def test_accuracy(generator, heavy, recent, mode, causal):
    inputs = draw(generator, b=1)
    options = {"heavy": heavy, "recent": recent, "causal": causal, **mode}
    assert_accurate(*both(**options), inputs, names="o dq dk dv")


@settings(max_examples=20)
@given(
    b=st.integers(1, 2), h=st.sampled_from((1, 3)), n=st.integers(1, 14), d=st.integers(1, 6),
    heavy=st.integers(0, 5), recent=st.integers(1, 5), block=st.integers(1, 16),
    causal=st.booleans(), mode=st.sampled_from(("streaming", "exact")),
)  # fmt: skip
def test_any_shape(b, h, n, d, heavy, recent, block, causal, mode):
    inputs = draw(torch.Generator().manual_seed(n), b=b, h=h, n=n, d=d, dtype=torch.float64)
    options = {"heavy": heavy, "recent": recent, "block": block, "causal": causal, "mode": mode}
    f, slow = both(**options, scale=0.7)
    assert_close(f(*inputs), slow(*inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ("streaming", "exact"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n, h", ((1, 1), (63, 3), (65, 8)))
def test_budget_of_everything_is_full_attention(generator, n, h, causal, mode):
    q, k, v = draw(generator, h=h, n=n)
    o = h2o_attention(q, k, v, heavy=n, recent=0, causal=causal, mode=mode, block=n)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_close(o, full)
    if causal:  # then the blocks change nothing either
        assert_close(h2o_attention(q, k, v, heavy=0, recent=n, causal=True, block=16), full)


@pytest.mark.parametrize("mode", ("streaming", "exact"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_dtypes(generator, dtype, causal, mode):
    # A budget that evicts nothing: the choice itself may turn on the rounding of a score.
    inputs = draw(generator, b=1, h=1, n=9, dtype=dtype)
    options = {"heavy": 4, "recent": 5, "causal": causal, "mode": mode, "block": 4}
    assert h2o_attention(*inputs, **{**options, "heavy": 1}).dtype == dtype
    assert_accurate(*both(**options), inputs, floor=torch.finfo(dtype).eps)


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", (0, 9))
def test_cache_is_algorithm_1(generator, prompt):
    """Outputs, survivors and their scores after each token, for each head on its own."""
    q, k, v = draw(generator, dtype=torch.float64)
    heavy, recent, scale = 3, 2, 8**-0.5
    cache, scores = H2OCache(heavy=heavy, recent=recent), {}
    if prompt:
        cache.prefill(*(x[:, :, :prompt] for x in (q, k, v)))
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        head = [x[b, h, :prompt] for x in (q, k, v)]
        scores[b, h] = algorithm1(*head, heavy, recent, True, prompt, scale)[1] if prompt else {}
    for i in range(prompt, 20):
        o = cache.step(*(x[:, :, i : i + 1] for x in (q, k, v)))
        for (b, h), score in scores.items():
            slots = {**score, i: 0.0}
            expected, p = attend(q[b, h, i], k[b, h], v[b, h], list(slots), scale)
            score = evict({j: a + p[j] for j, a in slots.items()}, heavy, recent)
            scores[b, h] = score
            assert_close(o[b, h, 0], expected)
            position = cache.position[b, h].tolist()
            assert sorted(position) == sorted(score)
            assert_close(cache.score[b, h], torch.tensor([score[j] for j in position]).double())
            assert_close(cache.k[b, h], k[b, h, position])
            assert_close(cache.v[b, h], v[b, h, position])
    kept = {tuple(sorted(cache.position[b, h].tolist())) for b, h in scores}
    assert len(kept) > 1, "all heads kept the same tokens: nothing was tested"


def test_cache_steps_make_the_stream(generator):
    q, k, v = draw(generator)
    cache = H2OCache(heavy=3, recent=2)
    steps = [cache.step(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(20)]
    o = h2o_attention(q, k, v, heavy=3, recent=2, causal=True, block=1)
    assert_close(torch.cat(steps, 2), o, rtol=0, atol=1e-6)
    assert cache.k.shape == (2, 2, 5, 8) and cache.seen == 20


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("streaming", "exact"))
def test_causal_leaks_nothing(generator, mode):
    q, k, v = draw(generator, n=65, dtype=torch.float64)
    options = {"heavy": 4, "recent": 4, "causal": True, "mode": mode, "block": 16}
    before = h2o_attention(q, k, v, **options)
    for x in (q, k, v):
        x[:, :, 60:] *= 30
    after = h2o_attention(q, k, v, **options)
    assert_close(after[:, :, :60], before[:, :, :60], rtol=0, atol=1e-12)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("mode", ("streaming", "exact"))
def test_batch_and_heads_are_independent(generator, mode):
    q, k, v = draw(generator)
    options = {"heavy": 3, "recent": 2, "mode": mode, "block": 5}
    before = h2o_attention(q, k, v, **options)
    k[1, 0] *= 20
    after = h2o_attention(q, k, v, **options)
    changed = torch.zeros(2, 2, dtype=torch.bool)
    changed[1, 0] = True
    assert torch.equal(after[~changed], before[~changed])
    assert not torch.equal(after[changed], before[changed])


@pytest.mark.parametrize("mode", ("streaming", "exact"))
@pytest.mark.parametrize("causal", (False, True))
def test_mask(generator, causal, mode):
    """Right padding changes nothing; a batch entry of nothing but padding gives 0, never NaN."""
    q, k, v = draw(generator, n=24)
    for x in (q, k, v):
        x[:, :, 13:] = 50.0
    mask = (torch.arange(24) < 13).expand(2, 24).clone()
    options = {"heavy": 3, "recent": 2, "causal": causal, "mode": mode, "block": 4}
    padded = h2o_attention(q, k, v, key_mask=mask, **options)
    short = h2o_attention(*(x[:, :, :13] for x in (q, k, v)), **options)
    assert_close(padded[:, :, :13], short)
    mask[0] = False
    results = outputs_and_gradients(
        lambda *x: h2o_attention(*x, key_mask=mask, **options), (q, k, v)
    )
    assert all(x.isfinite().all() and (x[0] == 0).all() for x in results)
    assert_close(results[0][1, :, :13], short[1])


@pytest.mark.parametrize("causal", (False, True))
def test_masked_holes(generator, causal):
    """Masked tokens in the middle of one block are as good as absent (and are not "recent")."""
    q, k, v = draw(generator, b=1, n=12)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, [2, 5, 11]] = False
    real = mask[0].nonzero().flatten()
    for mode in ("streaming", "exact"):
        options = {"heavy": 2, "recent": 2, "causal": causal, "mode": mode, "block": 12}
        holes = h2o_attention(q, k, v, key_mask=mask, **options)[:, :, real]
        assert_close(holes, h2o_attention(q[:, :, real], k[:, :, real], v[:, :, real], **options))


def test_streaming_memory(generator):
    n, budget, block = 512, 8, 16
    inputs = [x.requires_grad_() for x in draw(generator, b=1, h=1, n=n)]
    with Largest() as seen:
        o = h2o_attention(*inputs, heavy=4, recent=4, causal=True, block=block)
        o.sum().backward()
    assert 0 < seen.numel <= n * (budget + block) < n * n / 10


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("mode", ("streaming", "exact"))
def test_layouts(generator, how, mode):
    inputs = [layout(x, how) for x in draw(generator)]

    def f(q, k, v):
        return h2o_attention(q, k, v, heavy=3, recent=2, mode=mode, block=5)

    result = outputs_and_gradients(f, inputs)
    assert_close(result, outputs_and_gradients(f, [x.contiguous() for x in inputs]))
    assert result[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mode", ("streaming", "exact"))
@pytest.mark.parametrize("causal", (False, True))
def test_gradcheck(generator, causal, mode):
    inputs = draw(generator, b=1, n=7, d=3, dv=2, dtype=torch.float64)
    options = {"heavy": 2, "recent": 1, "causal": causal, "mode": mode, "block": 2}
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: h2o_attention(*x, **options), leaves)


@pytest.mark.parametrize("mode", ("streaming", "exact"))
def test_compile_meta_autocast(generator, mode):
    inputs = draw(generator)

    def f(q, k, v):
        return h2o_attention(q, k, v, heavy=3, recent=2, causal=True, mode=mode, block=5)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(f, inputs))
    assert f(*(x.to("meta") for x in inputs)).shape == inputs[2].shape
    with torch.autocast("cpu", torch.bfloat16):
        assert f(*inputs).dtype == torch.bfloat16


def test_errors(generator):
    q, k, v = draw(generator, n=4)
    cache = H2OCache(heavy=1, recent=1)
    cache.step(q, k, v)
    for bad, words in (
        (lambda: h2o_attention(q, k, v, heavy=0, recent=0), "at least one slot.*recent=1"),
        (lambda: h2o_attention(q, k, v, heavy=-1, recent=2), "heavy=-1"),
        (lambda: h2o_attention(q, k, v, heavy=1, recent=1, mode="fast"), "streaming, exact"),
        (lambda: h2o_attention(q, k, v, heavy=1, recent=1, block=0), "block=0"),
        (lambda: h2o_attention(q[0], k, v, heavy=1, recent=1), r"\(B, H, N, D\)"),
        (lambda: cache.step(q[:1], k[:1], v[:1]), r"cache_k \(2, 2, 2, 8\)"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()


# --- layer ----------------------------------------------------------------------------------------


def layer(seq_len=64, **options):
    torch.manual_seed(0)
    return build_attention("kv_compression", 24, seq_len=seq_len, num_heads=3, **options)


@pytest.mark.parametrize("mode", ("streaming", "exact"))
def test_layer(generator, mode):
    """At 64 tokens, the images' size, both modes really leave tokens out."""
    x = torch.randn(2, 64, 24, generator=generator)
    attention = layer(mode=mode, compression_ratio=0.25)
    matrix = attention.attention_matrix(x)
    assert_close(matrix.sum(-1), torch.ones(2, 3, 64))
    kept = (matrix > 0).sum(-1)
    assert kept.max() == (16 + 16 if mode == "streaming" else 16)
    q, k, v = attention.project(x)
    options = {"heavy": 8, "recent": 8, "mode": mode, "block": 16}
    assert_close(attention.attend(q, k, v, None), h2o_attention(q, k, v, **options))
    assert_close(attention(x), attention.out((matrix @ v).transpose(1, 2).flatten(2)))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), attention(x))


def test_layer_split():
    assert layer().split(64) == (16, 16)
    assert layer(compression_ratio=0.75).split(5) == (1, 2)
    assert layer(compression_ratio=0.29).split(100) == (14, 15)
    assert layer(compression_ratio=0.01).split(9) == (0, 1)
    assert layer(heavy=5).split(64) == (5, 27) and layer(recent=40).split(64) == (0, 40)
    assert layer(heavy=5, recent=2).split(64) == (5, 2)


def test_layer_errors():
    for options, words in (
        ({"compression_ratio": 0.0}, "nearest choice"),
        ({"compression_ratio": 1.5}, "nearest choice: 1"),
        ({"heavy": -1}, "heavy=-1"),
        ({"heavy": 0, "recent": 0}, "recent=1"),
        ({"mode": "fast"}, "streaming, exact"),
        ({"block": 0}, "block=0"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(**options)
