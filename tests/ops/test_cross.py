"""Cross-attention, with more or fewer keys than queries: linear, performer and linformer."""

import math
from functools import partial

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients, poisoned
from tasks import threads
from textbook.linear import naive as linear_naive
from textbook.linformer import naive as linformer_naive
from textbook.performer import naive as performer_naive
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from tab import (
    linear_attention,
    linformer_attention,
    orthogonal_projection,
    performer_attention,
)
from tab.ops import OPS
from tab.ops._op import choose
from tab.ops.linear import linear_bwd, linear_fwd
from tab.ops.performer import performer_bwd, performer_fwd

BACKENDS = reference_and_cpp("linear_fwd")
LENGTHS = [(1, 65), (65, 1), (70, 130), (1100, 20), (20, 1100), (64, 64)]
W = orthogonal_projection(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NAMES = ("linear", "performer")


def draw(generator, nq, nk, b=2, h=2, d=8, dv=12, dtype=torch.float32, kv=None):
    shapes = (b, h, nq, d), (b, kv or h, nk, d), (b, kv or h, nk, dv)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def call(name, **options):
    """-> o and, of linear attention, its state."""

    def f(q, k, v, *state):
        if name == "linear":
            o, state = linear_attention(
                q, k, v, initial_state=state or None, return_state=True, **options
            )
            return o, *state
        w = W.to(torch.promote_types(q.dtype, torch.float32))
        return performer_attention(q, k, v, w, **options)

    return f


def truth(name, **options):
    if name == "linear":
        return partial(linear_naive, **options)
    return lambda *x: performer_naive(*x, w=W, **options)[0]


def mask(generator, n, b=2):
    keep = torch.rand(b, n, generator=generator) > 0.3
    keep[:, 0] = True
    return keep


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.each_isa
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
def test_outputs_and_gradients(name, nq, nk, backend, generator):
    for keep in (None, mask(generator, nk)):
        x = draw(generator, nq, nk)
        given, want = call(name, backend=backend, key_mask=keep), truth(name, key_mask=keep)
        assert_accurate(given, want, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", (8, 64))
def test_from_a_state(d, backend, generator):
    state = torch.randn(2, 2, d, d, generator=generator), torch.rand(2, 2, d, generator=generator)
    x = [*draw(generator, 70, 30, d=d, dv=d), *state]
    assert_accurate(call("linear", backend=backend), truth("linear"), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_dtypes(name, dtype, backend, generator):
    floor = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}[dtype]
    x = draw(generator, 9, 65, dtype=dtype)
    given, want = call(name, backend=backend), truth(name)
    assert_accurate(lambda *x: given(*x)[:1], lambda *x: want(*x)[:1], x, floor=floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(name, how, backend, generator):
    x = [layout(t, how) for t in draw(generator, 33, 65)]
    assert_accurate(call(name, backend=backend), truth(name), x)


@pytest.mark.parametrize("name", NAMES)
@needs_cpp("linear_fwd")
def test_any_number_of_threads(name, generator):
    """Segments of the queries beside one of the keys, and the other way round."""
    for lengths in ((900, 70), (70, 900), (900, 600)):
        x = draw(generator, *lengths, b=1, h=1)
        for count in (2, 3):
            with threads(count):
                assert_accurate(call(name, backend="cpp"), truth(name), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_with_fewer_heads_of_keys(name, backend, generator):
    q, k, v = draw(generator, 33, 65, h=4, kv=2)
    want = [x.repeat_interleave(2, 1) for x in (k, v)]
    f = call(name, backend=backend)
    first = f(q, k, v), f(q, *want)
    assert_close(*(x if isinstance(x, torch.Tensor) else x[0] for x in first))


@pytest.mark.parametrize("lengths", ((3, 40), (40, 3)))
def test_linformer(lengths, generator):
    nq, nk = lengths
    E, F = (torch.randn(50, 6, generator=generator) / 7 for _ in range(2))
    x = [*draw(generator, nq, nk), E, F]
    for keep in (None, mask(generator, nk)):
        assert_accurate(
            lambda *x: linformer_attention(*x, key_mask=keep),  # noqa: B023
            lambda *x: linformer_naive(*x, key_mask=keep),  # noqa: B023
            x,
        )


@pytest.mark.parametrize("name", (*NAMES, "linformer"))
def test_a_mask_of_keys_is_none_of_queries(name, generator):
    """As many keys as queries, by chance: the outputs are those among other lengths."""
    q, k, v = draw(generator, 20, 20)
    keep = mask(generator, 20)
    E = torch.randn(20, 6, generator=generator)

    def o(q):
        if name == "linformer":
            return linformer_attention(q, k, v, E, key_mask=keep)
        given = call(name, key_mask=keep)(q, k, v)
        return given[0] if name == "linear" else given

    assert_close(o(q), torch.cat([o(q[:, :, :7]), o(q[:, :, 7:])], 2))


# --- the edge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_what_a_masked_key_holds_reaches_nobody(name, value, backend, generator):
    for nq, nk in ((30, 70), (70, 30)):
        keep = mask(generator, nk)
        x = draw(generator, nq, nk)
        f = call(name, backend=backend, key_mask=keep)
        clean = outputs_and_gradients(f, x)
        for i in (1, 2):
            x[i] = torch.where(keep[:, None, :, None], x[i], value)
        for a, b in zip(outputs_and_gradients(f, x), clean, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_and_no_queries(name, backend, generator):
    for nq, nk in ((5, 0), (0, 5), (0, 0)):
        x = [t.requires_grad_() for t in draw(generator, nq, nk)]
        with poisoned():
            o = call(name, backend=backend)(*x)
            o = o[0] if name == "linear" else o
            grads = torch.autograd.grad(o.sum(), x)
        assert o.shape == (2, 2, nq, 12) and not o.any()
        assert [g.shape for g in grads] == [t.shape for t in x]
        assert not any(g.any() for g in grads)


def test_causal_is_refused(generator):
    x = draw(generator, 5, 9)
    for f in (linear_attention, partial(performer_attention, projection=W.float())):
        with pytest.raises(ValueError, match=r"N_q = 5 and N_k = 9.*as initial_state"):
            f(*x, causal=True)
    with pytest.raises(ValueError, match="or both with another N; got"):
        linear_attention(*x[:2], x[2][:, :, :4])


def test_what_a_backend_does_not_take(generator):
    q, k, _ = draw(generator, 5, 9)
    for name in ("linear_fwd", "performer_fwd"):
        assert OPS[name].takes["cuda"](q, q) is None
        assert OPS[name].takes["cuda"](q, k) == "it takes as many keys as queries, got 9 and 5"
        assert choose("reference", OPS[name], q, k) == "reference"


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", ((3, 6), (6, 3)))
def test_derivatives_of_any_order(name, lengths, backend, generator):
    x = [t.requires_grad_() for t in draw(generator, *lengths, b=1, dv=3, dtype=torch.float64)]
    f = call(name, backend=backend)
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_opcheck(generator):
    q, k, v = draw(generator, 7, 20)
    keep, do = mask(generator, 20), torch.ones(2, 2, 7, 12)
    options = keep, None, None, 0, False, 0.0
    torch.library.opcheck(linear_fwd.overload, (q, k, v, *options))
    s, z = q.new_ones(2, 2, 8, 12), q.new_ones(2, 2, 8)
    torch.library.opcheck(linear_bwd.overload, (do, None, None, q, k, v, do, s, z, *options))
    w, options = W.float(), (keep, None, None, None, 0, False)
    out = performer_fwd.overload(q, k, v, w, *options, 0.0)
    torch.library.opcheck(performer_fwd.overload, (q, k, v, w, *options, 0.0))
    torch.library.opcheck(performer_bwd.overload, (do, None, None, q, k, v, w, *out, *options))


@pytest.mark.parametrize("name", NAMES)
def test_two_compilations_for_all_lengths(name, generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    f = call(name)
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for lengths in ((5, 9), (32, 64), (70, 33), (130, 20)):
        x = draw(generator, *lengths)
        assert_close(outputs_and_gradients(compiled, x), outputs_and_gradients(f, x))
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
def test_gpu(name, nq, nk, generator):
    x = [t.cuda() for t in draw(generator, nq, nk)]
    given = call(name, backend="triton") if name == "linear" else (
        lambda *x: performer_attention(*x, W.float().cuda(), backend="triton")
    )  # fmt: skip
    want = call(name, backend="reference") if name == "linear" else (
        lambda *x: performer_attention(*x, W.to(x[0]), backend="reference")
    )  # fmt: skip
    assert_accurate(given, want, x, floor=1e-5)
