"""A cache is kept, picked from, copied and begun anew; and what none of them takes."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from caches import DV, KINDS, N, decode, draw
from torch.testing import assert_close

import tab

every = pytest.mark.parametrize("name", KINDS)


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


def test_h2o_moves_nothing_unless_gradients_are_recorded(generator):
    x = draw(generator)
    cache = tab.H2OCache(heavy=3, recent=4)
    decode(cache, [t[:, :, :8] for t in x])
    held = cache.k.data_ptr()
    first = decode(cache, [t[:, :, :20] for t in x], 8)
    assert cache.k.data_ptr() == held
    other = tab.H2OCache(heavy=3, recent=4)
    graph = [t.clone().requires_grad_() for t in x]
    decode(other, [t[:, :, :8] for t in graph])
    assert_close(decode(other, [t[:, :, :20] for t in graph], 8), first)
    assert_close(*(c.position.sort(-1).values for c in (cache, other)))


def test_h2o_goes_on_from_a_prompt_that_fills_it(generator):
    """Whose tokens all stay, in the order in which they came."""
    x = draw(generator)
    cache, other = (tab.H2OCache(heavy=3, recent=4) for _ in range(2))
    cache.prefill(*(t[:, :, :7] for t in x))
    graph = [t.clone().requires_grad_() for t in x]
    other.prefill(*(t[:, :, :7] for t in graph))
    assert_close(decode(cache, x, 7), decode(other, graph, 7))


def test_h2o_keeps_what_is_masked(generator):
    x = draw(generator)
    cache, again = (tab.H2OCache(heavy=3, recent=4) for _ in range(2))
    mask = torch.tensor([True, False, True, True, False]).expand(2, 5)
    cache.step(*(t[:, :, :5] for t in x), key_mask=mask)
    again.load_state_dict(cache.state_dict())
    assert again.length == cache.length == 3
    assert_close(decode(again, x, 5), decode(cache, x, 5))


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


@every
def test_what_raises_has_added_nothing(name, generator):
    """A backend that is not there: the same prompt is taken afterwards as though it came first."""
    x, cache = draw(generator, KINDS[name].heads), KINDS[name].cache()
    try:
        with tab.use_backend("triton" if not torch.cuda.is_available() else "cpp"):
            cache.prefill(*x)
    except RuntimeError:
        assert cache.length == 0
        cache.prefill(*x)
    assert cache.length == N


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
        (lambda: tab.KVCache(capacity=-1), "capacity ≥ 0"),
        (lambda: tab.LinearCache(feature_map="softmax"), "elu1, relu, identity"),
        (lambda: tab.PerformerCache(torch.ones(2, 2), kernel="x"), "softmax, relu"),
        (lambda: tab.PerformerCache(torch.ones(2, 2).requires_grad_()), r"projection.detach\(\)"),
        (lambda: tab.SparseCache(pattern).prefill(*draw(generator, n=9)), "8 tokens.*make the"),
    ):
        with pytest.raises(ValueError, match=words):
            f()
    with pytest.raises(TypeError, match=r"'window' must be int, not tuple; got \(1, 0\)"):
        tab.LocalCache(window=(1, 0))
    with pytest.raises(TypeError, match="'pattern' must be BlockPattern, not Tensor"):
        tab.SparseCache(torch.ones(2, 2))
    for make in (tab.KVCache, lambda **o: tab.LocalCache(window=1, **o)):
        with pytest.raises(TypeError, match=r"pass q \* scale"):
            make(scale=torch.ones(1))
