"""Sums over many tokens in C++: as exact at 2²⁰ tokens as at 64, and blind to the future.

Equal keys are the worst case: added one after the other, all are rounded the same way.
"""

import pytest
import torch
from backends import needs_cpp
from tasks import threads as on_threads

import tab

# The arithmetic of one and the same binary, whatever torch loads it.
pytestmark = [needs_cpp("linear_fwd"), pytest.mark.any_torch]
W = tab.orthogonal_projection(8, 4, generator=torch.Generator().manual_seed(0))


def performer(q, k, v, **options):
    return tab.performer_attention(q, k, v, W.to(q.dtype), **options)


OPS = {
    "linear": lambda q, k, v, **o: tab.linear_attention(q, k, v, **o),
    "linear relu": lambda q, k, v, **o: tab.linear_attention(q, k, v, feature_map="relu", **o),
    "performer": lambda q, k, v, **o: performer(q, k, v, **o),
    "performer relu": lambda q, k, v, **o: performer(q, k, v, kernel="relu", **o),
}


@pytest.fixture
def one_thread():
    """One segment: more threads would cut the sequence into shorter sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_equal_keys(name, causal, one_thread, generator):
    n = 2**20
    key = torch.rand(1, 1, 1, 4, generator=generator) + 0.3
    v = torch.rand(1, 1, n, 4, generator=generator) + 0.5
    do = torch.rand(1, 1, n, 4, generator=generator) + 0.5
    leaves = [x.requires_grad_() for x in (key.flip(-1).repeat(1, 1, n, 1), v)]
    k = key.repeat(1, 1, n, 1)
    o, state = OPS[name](leaves[0], k, leaves[1], causal=causal, return_state=True, backend="cpp")
    dv = torch.autograd.grad(o, leaves, do)[1]

    seen = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None]  # keys of each query
    if causal:
        mean = v.detach().double().cumsum(2) / seen
        share = (do.double() / seen).flip(2).cumsum(2).flip(2)
    else:
        mean = v.detach().double().mean(2, keepdim=True)
        share = do.double().mean(2, keepdim=True)
    assert ((o.double() - mean) / mean).abs().max() < 1e-4
    assert ((dv.double() - share) / share).abs().max() < 1e-4
    one = OPS[name](*(x[:, :, :1] for x in (k, k, v)), return_state=True, backend="cpp")[1]
    z = one[1].double() * n
    assert ((state[1].double() - z).abs() <= 1e-4 * z).all()


@pytest.mark.parametrize("name", OPS)
def test_gradients_in_long_segments(name, generator):
    """Five heads on two threads are two segments each, and each of them a long sum."""
    x = [torch.randn(1, 5, 66000, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in x]
        with on_threads(2):
            o = OPS[name](*leaves, causal=True, backend="cpp")
            found.append(torch.autograd.grad(o, leaves, torch.ones_like(o)))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("name", OPS)
def test_a_later_key_changes_nothing_earlier(name, threads, one_thread, generator):
    """Not even the last bit: o and dq, wherever in a tile the later keys begin."""
    torch.set_num_threads(threads)
    n = 600
    q, k, v, other = (torch.randn(1, 2, n, 4, generator=generator) for _ in range(4))

    def results(k, v, until):
        leaf = q.clone().requires_grad_()
        o = OPS[name](leaf, k, v, causal=True, backend="cpp")[:, :, :until]
        return o, torch.autograd.grad(o.sum(), leaf)[0][:, :, :until]

    for until in (1, 7, 31, 32, 300, 599):
        for size in (1.0, 30.0):  # large ones raise the shifts of many features by much
            k2, v2 = (torch.cat([x[:, :, :until], size * other[:, :, until:]], 2) for x in (k, v))
            for a, b in zip(results(k, v, until), results(k2, v2, until), strict=True):
                assert torch.equal(a, b), (until, size)
