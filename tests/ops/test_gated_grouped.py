"""Gated linear attention with fewer heads of k and v than of q: one state, which decays, for all
heads of q that share it."""

from functools import partial

import pytest
import torch
from backends import needs_cpp
from packs import cu
from proof import Largest, assert_accurate, outputs_and_gradients
from tasks import threads
from textbook.gated_linear import call, draw, naive
from torch.testing import assert_close

from tab import use_backend
from tab.ops import _heads

GROUP = 3
NAMES = "o S dq dk dv dg dS₀"
in_cpp = needs_cpp("gated_linear_fwd")


def inputs(generator, kv=2, n=65, d=20, dv=28, decay="token", **options):
    q, *_ = draw(generator, 2, kv * GROUP, n, d, dv, decay, **options)
    _, *others = draw(generator, 2, kv, n, d, dv, decay, state=True, **options)
    return [q, *others]


def repeated(f):
    """f of as many heads of k, v, the decay and the state as of q."""

    def grouped(q, *others):
        o, s = f(q, *(x.repeat_interleave(GROUP, 0 if x.dim() == 1 else 1) for x in others))
        return o, s[:, ::GROUP]

    return grouped


@pytest.mark.each_isa
@pytest.mark.parametrize("kv", (1, 2))
@pytest.mark.parametrize("masked", (False, True))
def test_against_the_recurrence(decay, kv, masked, generator):
    options = {"key_mask": torch.rand(2, 65, generator=generator) > 0.3} if masked else {}
    x = inputs(generator, kv, decay=decay)
    assert_accurate(call(**options), repeated(partial(naive, **options)), x, names=NAMES)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_dtypes(decay, dtype, generator):
    floor = {torch.bfloat16: 8e-3, torch.float64: 1e-13}[dtype]
    x = inputs(generator, decay=decay, dtype=dtype)
    assert_accurate(call(), repeated(naive), x, names=NAMES, floor=floor)


def test_sizes_beyond_a_tile(decay, generator):
    """Smaller tiles, where rows are long, and several of them."""
    x = inputs(generator, 1, 100, 130, 40, decay)
    assert_accurate(call(), repeated(naive), x, names=NAMES)


def test_a_denominator(decay, generator):
    q, k, v, g, _ = inputs(generator, decay=decay)
    f = call(normalize=True)

    def truth(q, k, v, g):
        more = (x.repeat_interleave(GROUP, 0 if x.dim() == 1 else 1) for x in (k, v, g))
        o, s, z = naive(q, *more, normalize=True)
        return o, s[:, ::GROUP], z[:, ::GROUP]

    assert_accurate(f, truth, [q.exp(), k.exp(), v, g])


@in_cpp
@pytest.mark.parametrize("count", (1, 2, 3))
def test_any_number_of_threads(count, generator):
    """Too few heads of k for three threads: each is cut into segments."""
    x = [t[:1] for t in inputs(generator, 1, 600, 8, 12)]
    with threads(count), use_backend("cpp"):
        assert_accurate(call(), repeated(naive), x, names=NAMES)
        once, again = (outputs_and_gradients(call(), x) for _ in range(2))
    assert all(map(torch.equal, once, again))


@in_cpp
@pytest.mark.parametrize("what", ("plain", "mask", "packed"))
def test_bits_of_repeated_heads(what, generator):
    """o and dq are those of k and v that were repeated; what is shared is summed over the group."""
    q, k, v, g, s0 = (t[:1] for t in inputs(generator, 2, 130, 8, 12))
    options = {"backend": "cpp"}
    if what == "mask":
        options["key_mask"] = torch.arange(130)[None] % 3 > 0
    if what == "packed":
        options["cu_seqlens"], s0 = cu((30, 0, 100)), s0.expand(3, -1, -1, -1)
    with threads(1):
        got, want = (
            outputs_and_gradients(f(call(**options)), [q, k, v, g, s0])
            for f in (lambda f: f, repeated)
        )
    assert all(torch.equal(got[i], want[i]) for i in range(3))
    assert_close(got[3:], want[3:])


@in_cpp
def test_one_call(monkeypatch, generator):
    """Of all heads of q, and none of the others is expanded."""
    monkeypatch.setattr(_heads, "_each", None)
    x = inputs(generator, 1)
    with Largest() as largest:
        assert len(outputs_and_gradients(call(backend="cpp"), x)) == 7
    assert largest.numel <= 2 * GROUP * 65 * 28


def test_derivatives_of_any_order(decay, generator):
    x = inputs(generator, 1, 9, 3, 2, decay, dtype=torch.float64)
    x = [t.requires_grad_() for t in x]
    assert torch.autograd.gradcheck(call(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call(), x, fast_mode=True)
