"""The decaying state goes on as the whole sequence does."""

import pytest
import torch
from caches import D, N, draw
from torch.testing import assert_close

import tab

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def decays(kind, heads, generator, b=2, n=N):
    shape = {"head": (heads,), "token": (b, heads, n), "channel": (b, heads, n, D)}[kind]
    return -torch.rand(shape, generator=generator, dtype=torch.float64)


def cut(x, g, now):
    return [*(t[:, :, now] for t in x), g if g.dim() == 1 else g[:, :, now]]


def decode(cache, x, g, first=0):
    steps = [cache.step(*cut(x, g, slice(i, i + 1))) for i in range(first, x[0].shape[2])]
    return torch.cat(steps, 2)


@pytest.mark.parametrize("kind", ("head", "token", "channel"))
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("heads", (4, 2))
def test_tokens_and_chunks(heads, normalize, kind, generator):
    x, g = draw(generator, heads), decays(kind, heads, generator)
    x = [t.exp() for t in x[:2]] + x[2:]  # positive features, as normalize wants them
    whole = tab.gated_linear_attention(*x, g, normalize=normalize)
    cache = tab.GatedLinearCache(normalize=normalize)
    assert_close(decode(cache, x, g), whole, **EXACT)
    cache.reset()
    parts = [cache.prefill(*cut(x, g, slice(a, b))) for a, b in ((0, 9), (9, 10), (10, 25))]
    state = cache.state_dict()
    rest = decode(cache, x, g, 25)
    assert_close(torch.cat([*parts, rest], 2), whole, **EXACT)
    again = tab.GatedLinearCache(normalize=normalize)
    again.load_state_dict(state)
    again.reorder(torch.tensor([1, 1, 0]))
    x, whole = [t[[1, 1, 0]] for t in x], whole[[1, 1, 0]]
    g = g if g.dim() == 1 else g[[1, 1, 0]]
    assert_close(decode(again, x, g, 25), whole[:, :, 25:], **EXACT)
    assert again.length == N and state.keys() == {"length", *again.NAMES}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtypes(dtype, generator):
    x, g = draw(generator, 2, dtype=dtype), decays("channel", 2, generator).float()
    o = decode(tab.GatedLinearCache(scale=0.3), x, g)
    truth = tab.gated_linear_attention(*(t.double() for t in x), g.double(), scale=0.3)
    assert o.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (o.double() - truth).abs().max() <= bound


def test_what_is_refused_leaves_the_state(generator):
    x, g = draw(generator), decays("token", 4, generator)
    cache = tab.GatedLinearCache()
    cache.prefill(*cut(x, g, slice(0, 5)))
    before = cache.state_dict()
    one = cut(x, g, slice(5, 6))
    for bad in (one[3][..., :0], one[3][:1], one[3].long()):
        with pytest.raises(ValueError, match=r"log_decay \(4,\), \(2, 4, 1\) or \(2, 4, 1, 8\)"):
            cache.step(*one[:3], bad)
    with pytest.raises(RuntimeError, match="records no gradients"):
        cache.step(*one[:3], one[3].clone().requires_grad_())
    with pytest.raises(ValueError, match="one token of each sequence"):
        cache.step(*cut(x, g, slice(5, 7)))
    with pytest.raises(ValueError, match="dtype and device that it was begun with"):
        cache.step(*(t.float() for t in one))
    assert_close(cache.state_dict(), before, rtol=0, atol=0)
