"""Every cache goes on as the causal function of the whole sequence does."""

import pytest
import torch
from caches import CHUNKED, DV, KINDS, D, N, decode, draw, parts
from torch.testing import assert_close

import tab

every = pytest.mark.parametrize("name", KINDS)
chunked = pytest.mark.parametrize("name", CHUNKED)


def assert_near(given, kind, x):
    """No further from float64 than twice the function of the whole sequence in the same dtype."""
    truth = kind.whole(*(t.double() for t in x))
    bound = 2 * (kind.whole(*x).double() - truth).abs().max() + 2 * torch.finfo(x[0].dtype).eps
    assert given.shape == truth.shape and given.dtype == x[0].dtype
    assert (given.double() - truth).abs().max() <= bound


# --- the same numbers -----------------------------------------------------------------------------


@every
@pytest.mark.parametrize("heads", (4, 2, 1))
def test_token_by_token(name, heads, generator):
    if name == "h2o" and heads < 4:
        return
    x = draw(generator, heads)
    cache = KINDS[name].cache()
    assert_close(decode(cache, x), KINDS[name].whole(*x), rtol=1e-10, atol=1e-10)
    assert cache.length == N


@every
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(name, dtype, generator):
    if name == "h2o" and dtype != torch.float32:
        return  # its choice turns on the rounding of a score: tests/ops/test_h2o_inputs.py
    x = draw(generator, 2 if name != "h2o" else 4, dtype=dtype)
    assert_near(decode(KINDS[name].cache(), x), KINDS[name], x)
    if KINDS[name].chunks:
        cache = KINDS[name].cache()
        outputs = [cache.prefill(*part) for part in parts(x, (20, 21))]
        assert_near(torch.cat(outputs, 2), KINDS[name], x)


@chunked
@pytest.mark.parametrize("heads", (4, 2))
@pytest.mark.parametrize(
    "lengths",
    ((N,), (1, 40), (7, 13, 1, 20), (12, 1, 1, 9, 18), (0, 30, 0, 11), (4, 8, 1, 2, 1, 25)),
)
def test_chunks(name, lengths, heads, generator):
    x = draw(generator, heads)
    cache = KINDS[name].cache()
    outputs = [cache.prefill(*part) for part in parts(x, lengths)]
    assert_close(torch.cat(outputs, 2), KINDS[name].whole(*x), rtol=1e-10, atol=1e-10)
    assert cache.length == N


@chunked
def test_a_prompt_then_tokens(name, generator):
    x = draw(generator, 2)
    cache = KINDS[name].cache()
    prompt, _ = parts(x, (17, N - 17))
    o = torch.cat([cache.prefill(*prompt), decode(cache, x, 17)], 2)
    assert_close(o, KINDS[name].whole(*x), rtol=1e-10, atol=1e-10)


def test_long_chunks_of_softmax_attention(generator):
    """More queries than are worked on together, after others."""
    for cache, window in ((tab.KVCache(), 999), (tab.LocalCache(window=600), 600)):
        x = draw(generator, 2, b=1, n=900)
        o = torch.cat([cache.prefill(*part) for part in parts(x, (400, 300, 200))], 2)
        whole = tab.local_attention(*x, window=window, causal=True, backend="reference")
        assert_close(o, whole, rtol=1e-10, atol=1e-10)


def test_h2o_in_blocks(generator):
    """A prompt in chunks is the stream in blocks of that length."""
    x = draw(generator)
    cache = tab.H2OCache(heavy=3, recent=4)
    o = torch.cat([cache.prefill(*part) for part in parts(x, (8,) * 5 + (1,))], 2)
    whole = tab.h2o_attention(*x, heavy=3, recent=4, causal=True, block=8)
    assert_close(o, whole, rtol=1e-10, atol=1e-10)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, numbers",
    (
        ("linear", D * DV + D),
        ("performer", 16 * (DV + 2)),
        ("local-5", 6 * (D + DV)),
        ("sparse-window", 3 * 4 * (D + DV)),
        ("h2o", 7 * (D + DV + 1 + 1)),
    ),
)
def test_what_is_bounded_stays_so(name, numbers, generator):
    """Numbers a head, after ten tokens and after all: of 8 bytes each, in float64."""
    cache, x = KINDS[name].cache(), draw(generator, b=1)
    decode(cache, [t[:, :, :10] for t in x])
    held = cache.bytes
    decode(cache, x, 10)
    assert cache.bytes == held == 4 * numbers * 8


def test_the_rows_of_a_kv_cache_double(generator):
    cache = tab.KVCache(capacity=100)
    x = draw(generator, b=1, n=300)
    sizes = set()
    for i in range(300):
        cache.step(*(t[:, :, i : i + 1] for t in x))
        sizes.add(cache.bytes // (4 * (D + DV) * 8))
    assert sizes == {100, 200, 400}


def test_a_slot_serves_block_after_block():
    """No two blocks that somebody can still see share one."""
    for name in ("strided", "sliding_window", "fixed"):
        options = {"window": 2, "sinks": 1} if name == "sliding_window" else {"stride": 3}
        pattern = getattr(tab.BlockPattern, name)(64, block_size=4, **options)
        cache = tab.SparseCache(pattern)
        blocks = pattern.to_blocks()[0].tril()
        most = 0
        for row in range(16):
            live = [c for c in range(row + 1) if c == row or blocks[row:, c].any()]
            assert len({cache._slots.slot[c] for c in live}) == len(live)
            most = max(most, len(live))
        assert cache._slots.count == most == {"strided": 14, "sliding_window": 3, "fixed": 7}[name]


# --- NaN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("local-5", "sparse-window", "sparse-random", "sparse-bigbird"))
@pytest.mark.parametrize("how", ("steps", "chunks"))
def test_a_nan_reaches_those_who_see_it(name, how, generator):
    kind, x = KINDS[name], draw(generator)
    for t in x[1:]:
        t[0, 1, 9, 2] = torch.nan
    cache = kind.cache()
    if how == "steps":
        o = decode(cache, x)
    else:
        o = torch.cat([cache.prefill(*part) for part in parts(x, (11, 3, 27))], 2)
    whole = kind.whole(*x)
    assert 0 < whole.isnan().any(-1).sum() < N
    assert torch.equal(o.isnan(), whole.isnan())
