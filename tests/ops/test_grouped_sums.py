"""Grouped heads in the ops that sum over keys: one sum for all heads of q that share it."""

from functools import partial

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from packs import cu
from proof import Largest, assert_accurate, outputs_and_gradients
from tasks import threads
from textbook.grouped import given, repeated
from textbook.linear import naive as linear
from textbook.performer import naive as performer

from tab import linear_attention, orthogonal_projection, performer_attention
from tab.ops import _heads

NAMES = "linear", "performer"


PROJECTION = orthogonal_projection(12, 8, generator=torch.Generator().manual_seed(0))


def summed(name, **options):
    """Linear and performer: -> the call, o and its state, and the truth."""
    if name == "linear":
        call = partial(linear_attention, return_state=True, **options)
        textbook = partial(linear, causal=options["causal"])
    else:
        call = partial(performer_attention, projection=PROJECTION, return_state=True, **options)
        textbook = partial(performer, w=PROJECTION, causal=options["causal"])

    def outputs(q, k, v):
        o, state = call(q, k, v)
        return (o, *state) if name == "linear" else o  # c is arbitrary, and S and z relative to it

    def truth(q, k, v):
        o, s, z = repeated(textbook)(q, k, v)
        return (o, s[:, :: q.shape[1] // k.shape[1]], z[:, :: q.shape[1] // k.shape[1]])

    return outputs, truth if name == "linear" else lambda *x: truth(*x)[0]


@pytest.mark.each_isa
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", [(4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", reference_and_cpp("linear_fwd"))
def test_sums_over_keys(name, heads, causal, backend):
    """With gradients through the state, which has the heads of k."""
    call, truth = summed(name, causal=causal, backend=backend)
    assert_accurate(call, truth, given(2, *heads, 70, 8, 12))


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_keys_any_derivative_and_from_a_state(name):
    """A sequence in two parts is the whole, and what is given is read in place."""
    inputs = [x.requires_grad_() for x in given(1, 4, 2, 9, 8, dtype=torch.float64)]
    w = PROJECTION.double()
    call = linear_attention if name == "linear" else partial(performer_attention, projection=w)
    assert torch.autograd.gradcheck(partial(call, causal=True), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(partial(call, causal=True), inputs, fast_mode=True)
    first, later = ([x[:, :, part] for x in inputs] for part in (slice(0, 5), slice(5, 9)))
    _, state = call(*first, causal=True, return_state=True)
    assert all(x.shape[:2] == (1, 2) for x in state)
    o = call(*later, causal=True, initial_state=state)
    torch.testing.assert_close(o, call(*inputs, causal=True)[:, :, 5:])
    with Largest() as largest:
        o = call(*inputs, causal=True)
    assert o.transpose(1, 2).is_contiguous() and largest.numel <= max(
        x.numel() for x in (o, *state)
    )


@needs_cpp("linear_fwd")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_threads(name, causal, count):
    """Too few heads of k for three threads: each is cut into segments."""
    call, truth = summed(name, causal=causal, backend="cpp")
    inputs = given(1, 6, 2, 600, 8, 12)
    with threads(count):
        assert_accurate(call, truth, inputs)
        once, again = (outputs_and_gradients(call, inputs) for _ in range(2))
    assert all(map(torch.equal, once, again))


WHAT = ["plain", "mask", "state", "packed", "64"]


@needs_cpp("linear_fwd")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("what", WHAT)
def test_bits_of_repeated_heads(name, causal, what):
    """o and dq are those of k and v that were repeated; dk and dv are the sums over the group."""
    inputs = given(1, 6, 2, 70, 64 if what == "64" else 8)
    w = orthogonal_projection(12, inputs[0].shape[3], generator=torch.Generator().manual_seed(0))
    call = linear_attention if name == "linear" else partial(performer_attention, projection=w)
    options = {"causal": causal, "backend": "cpp"}
    if what == "mask":
        options["key_mask"] = torch.arange(70)[None] % 3 > 0
    if what == "packed":
        options["cu_seqlens"] = cu((30, 0, 40))
    state = call(*inputs, return_state=True, **options)[1] if what == "state" else None
    twice = state and tuple(x.repeat_interleave(3, 1) for x in state)
    with threads(1):
        got = outputs_and_gradients(partial(call, initial_state=state, **options), inputs)
        many = repeated(partial(call, initial_state=twice, **options))
        want = outputs_and_gradients(many, inputs)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2:], want[2:])


@pytest.mark.parametrize("name", NAMES)
def test_cross_attention(name):
    call, truth = summed(name, causal=False)
    q, k, v = given(2, 6, 2, 70, 8)
    assert_accurate(call, truth, (q[:, :, :23], k, v))


@needs_cpp("linear_fwd")
@pytest.mark.parametrize("name", NAMES)
def test_one_call(name, monkeypatch):
    monkeypatch.setattr(_heads, "_each", None)  # of one head of q at a time
    call, _ = summed(name, causal=False)
    assert len(outputs_and_gradients(call, given(1, 6, 2, 10, 8, 12))) >= 4
