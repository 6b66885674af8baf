"""Every cache goes on as the causal function of the whole sequence does."""

import copy
import io
import pickle

import pytest
import safetensors.torch
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
    "lengths", ((N,), (1, 40), (7, 13, 1, 20), (12, 1, 1, 9, 18), (0, 30, 0, 11), (4, 4, 8, 25))
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


# --- kept, picked, copied -------------------------------------------------------------------------


def saved(state, how, folder):
    if how == "safetensors":
        safetensors.torch.save_file(state, folder / "cache.safetensors")
        return safetensors.torch.load_file(folder / "cache.safetensors")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@every
@pytest.mark.parametrize("how", ("torch", "safetensors"))
@pytest.mark.parametrize("length", (0, 3, 24))
def test_state_dict(name, length, how, generator, tmp_path):
    kind, x = KINDS[name], draw(generator)
    cache = kind.cache()
    if length:
        decode(cache, [t[:, :, :length] for t in x])
    state = cache.state_dict()
    rest = decode(cache, x, length)  # a snapshot: these steps are not in it
    again = kind.cache()
    again.prefill(*draw(generator, b=1, n=2))  # which is forgotten
    again.load_state_dict(saved(state, how, tmp_path))
    assert again.length == length
    assert_close(decode(again, x, length), rest)
    again.load_state_dict(state)
    assert_close(decode(again, x, length), rest)  # nor did loading lend it


@every
def test_reorder(name, generator):
    kind, x = KINDS[name], draw(generator, b=3)
    cache, index = kind.cache(), torch.tensor([2, 0, 2, 1])
    decode(cache, [t[:, :, :21] for t in x])
    cache.reorder(index)
    tails = draw(generator, b=4, n=N - 21)
    x = [torch.cat([t[index][:, :, :21], tail], 2) for t, tail in zip(x, tails, strict=True)]
    whole = kind.whole(*x)
    assert_close(decode(cache, x, 21), whole[:, :, 21:], rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("how", ("deepcopy", "pickle"))
def test_copies_go_on_by_themselves(name, how, generator):
    if how == "pickle" and name.startswith("performer"):
        return  # a class within a function
    kind, x = KINDS[name], draw(generator)
    cache = kind.cache()
    decode(cache, [t[:, :, :21] for t in x])
    other = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
    whole = kind.whole(*x)[:, :, 21:]
    assert_close(decode(cache, x, 21), whole, rtol=1e-10, atol=1e-10)
    assert_close(decode(other, x, 21), whole, rtol=1e-10, atol=1e-10)


@every
def test_the_memory_is_its_own(name, generator):
    """One buffer for all tokens, as decoding loops have it."""
    kind, x = KINDS[name], draw(generator)
    cache, buffers, outputs = kind.cache(), [t[:, :, :1].clone() for t in x], []
    for i in range(N):
        for buffer, t in zip(buffers, x, strict=True):
            buffer.copy_(t[:, :, i : i + 1])
        outputs.append(cache.step(*buffers).clone())
    assert_close(torch.cat(outputs, 2), kind.whole(*x), rtol=1e-10, atol=1e-10)


@every
def test_reset(name, generator):
    kind, x = KINDS[name], draw(generator)
    cache = kind.cache()
    decode(cache, draw(generator, b=3, n=9, dtype=torch.float32))
    cache.reset()
    assert cache.length == cache.bytes == 0 and cache.state_dict().keys() == {"length"}
    if not name.startswith("performer"):  # whose projection went to float32
        assert_close(decode(cache, x), kind.whole(*x), rtol=1e-10, atol=1e-10)


@every
def test_inference_mode_and_after_it(name, generator):
    kind, x = KINDS[name], draw(generator)
    cache, state = kind.cache(), None
    with torch.inference_mode():
        first = decode(cache, [t[:, :, :9] for t in x])
        state = cache.state_dict()
    rest = decode(cache, x, 9)
    whole = kind.whole(*x)
    assert_close(torch.cat([first, rest], 2), whole, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        cache.load_state_dict(state)
        cache.reorder(torch.tensor([0, 1]))
    assert_close(decode(cache, x, 9), whole[:, :, 9:], rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("b, n", ((0, 3), (2, 0)))
def test_empty(name, b, n, generator):
    cache = KINDS[name].cache()
    for _ in range(2):
        o = cache.prefill(*draw(generator, b=b, n=n))
        assert o.shape == (b, 4, n, DV)
    assert cache.step(*draw(generator, b=b, n=1)).shape == (b, 4, 1, DV)
    assert cache.length == 2 * n + 1


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


# --- what is refused ------------------------------------------------------------------------------


@every
def test_gradients_are_refused_or_recorded(name, generator):
    x = [t.requires_grad_() for t in draw(generator)]
    cache = KINDS[name].cache()
    if name == "h2o":
        cache.prefill(*(t[:, :, :9] for t in x))
        cache.reorder(torch.tensor([1, 0]))
        o = cache.step(*(t[:, :, 9:10].detach() for t in x))
        assert torch.autograd.grad(o.sum(), x[2])[0][:, :, :9].abs().sum() > 0
        return
    for f in (cache.prefill, lambda *x: cache.step(*(t[:, :, :1] for t in x))):
        with pytest.raises(RuntimeError, match=r"records no gradients.*no_grad.*to train, call"):
            f(*x)
    assert cache.length == 0
    with torch.no_grad():
        assert not cache.prefill(*x).requires_grad


@every
def test_what_does_not_go_on(name, generator):
    cache, x = KINDS[name].cache(), draw(generator)
    cache.prefill(*(t[:, :, :5] for t in x))
    one = [t[:, :, 5:6] for t in x]
    narrow = [one[0], one[1], one[2][..., :-1]]
    for bad in ([t[:1] for t in one], [t[:, :1] for t in one], narrow):
        with pytest.raises(ValueError, match=r"\.step wants the .*batch.*(got|and got) "):
            cache.step(*bad)
    if name != "h2o":
        with pytest.raises(ValueError, match=r"one token of each sequence.*prefill.*q \(2, 4, 2"):
            cache.step(*(t[:, :, 5:7] for t in x))
        with pytest.raises(ValueError, match=r"dtype and device that it was begun with"):
            cache.step(*(t.to(torch.bfloat16) for t in one))
    for index in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match=r"reorder wants the numbers \(B',\) int64 of its 2"):
            cache.reorder(index)
    assert cache.length == 5
    cache.step(*one)


def test_a_step_is_checked_whenever_it_may_not_fit(generator):
    """Those like the last one are not; autocast and gradients are no part of what is alike."""
    cache, x = tab.LocalCache(window=3), draw(generator, dtype=torch.float32)
    one = [t[:, :, :1] for t in x]
    cache.step(*one)
    cache.step(*one)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="begun with"):
        cache.step(*one)
    with pytest.raises(RuntimeError, match="records no gradients"):
        cache.step(one[0].clone().requires_grad_(), *one[1:])
    with pytest.raises(ValueError, match="one dtype"):
        cache.step(one[0].double(), *one[1:])
    cache.reset()
    assert cache.step(*(t[:1].double() for t in one)).dtype == torch.float64


@every
def test_a_state_that_is_not_its_own(name, generator):
    cache = KINDS[name].cache()
    cache.prefill(*(t[:, :, :5] for t in draw(generator)))
    state = cache.state_dict()
    first = next(key for key in state if key != "length")
    without = {key: x for key, x in state.items() if key != first}
    with pytest.raises(ValueError, match=r"wants length and .*as state_dict\(\) gives them; got"):
        cache.load_state_dict(without)
    with pytest.raises(ValueError, match=r"load_state_dict wants .* of 5 tokens; got"):
        cache.load_state_dict({**state, first: state[first][:, :, None]})
    assert cache.length == 5
    if name.startswith("local-5"):
        with pytest.raises(ValueError, match=r"k \(B, H, 4, D\).* of 5 tokens"):
            tab.LocalCache(window=3).load_state_dict(state)


def test_options_that_are_refused(generator):
    pattern = tab.BlockPattern.sliding_window(8, window=2, block_size=4)
    for f, words in (
        (lambda: tab.LocalCache(window=-1), "window ≥ 0.*-1"),
        (lambda: tab.LocalCache(window=(1, 0)), r"\(1, 0\)"),
        (lambda: tab.KVCache(capacity=-1), "capacity ≥ 0"),
        (lambda: tab.LinearCache(feature_map="softmax"), "elu1, relu, identity"),
        (lambda: tab.PerformerCache(torch.ones(2, 2), kernel="x"), "softmax, relu"),
        (lambda: tab.PerformerCache(torch.ones(2, 2).requires_grad_()), r"projection.detach\(\)"),
        (lambda: tab.SparseCache(torch.ones(2, 2)), "BlockPattern, got Tensor"),
        (lambda: tab.SparseCache(pattern).prefill(*draw(generator, n=9)), "8 tokens.*make the"),
    ):
        with pytest.raises(ValueError, match=words):
            f()
    for make in (tab.KVCache, lambda **o: tab.LocalCache(window=1, **o)):
        with pytest.raises(TypeError, match=r"pass q \* scale"):
            make(scale=torch.ones(1))
