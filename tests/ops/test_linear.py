"""Linear attention: reference and kernels against the textbook formula in float64."""

from functools import partial

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients, poisoned
from tasks import threads
from textbook.linear import draw, naive
from torch.nn import functional as F
from torch.testing import assert_close

from tab.functional import linear_attention
from tab.ops.linear import linear_bwd, linear_fwd

NAMES = "o S z dq dk dv dS₀ dz₀"
BACKENDS = reference_and_cpp("linear_fwd")


def mask(generator, b, n):
    keep = torch.rand(b, n, generator=generator) > 0.3
    keep[:, 0] = True
    return keep


def call(backend, **options):
    def f(q, k, v, s0=None, z0=None):
        state = None if s0 is None else (s0, z0)
        o, (s, z) = linear_attention(
            q, k, v, initial_state=state, return_state=True, backend=backend, **options
        )
        return o, s, z

    return f


def check(backend, x, *, floor=2e-6, **options):
    assert_accurate(
        call(backend, **options), partial(naive, **options), x, floor=floor, names=NAMES
    )


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("feature_map", ("elu1", "relu"))
@pytest.mark.parametrize("state", (False, True))
def test_outputs_and_gradients(backend, causal, feature_map, state, generator):
    options = {"causal": causal, "feature_map": feature_map, "eps": 0.5}
    check(backend, draw(generator, state=state), **options)
    check(backend, draw(generator, state=state), key_mask=mask(generator, 2, 65), **options)


@pytest.mark.each_isa
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    ("b", "h", "n", "d", "dv"),
    [
        (1, 1, 1, 8, 8),
        (3, 1, 63, 16, 16),
        (1, 3, 64, 33, 7),
        (2, 8, 65, 64, 64),
        (1, 1, 1100, 5, 24),  # segments of one sequence
        (1, 3, 520, 40, 17),
        (1, 1, 130, 256, 129),  # smaller tiles
    ],
)
def test_shapes(backend, causal, b, h, n, d, dv, generator):
    check(backend, draw(generator, b, h, n, d, dv, state=True), causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("causal", (False, True))
def test_layouts_in_token_major_out(backend, how, causal, generator):
    x = [layout(t, how) for t in draw(generator)]
    check(backend, x, causal=causal)
    o, s, z, dq, dk, dv = outputs_and_gradients(call(backend, causal=causal), x)
    rest = None, None, None, 0, causal, 0.0
    for y in (o, *linear_bwd(backend, o, None, None, *x, o, s, z, *rest)[:3]):
        assert y.transpose(1, 2).is_contiguous()
    assert {t.dtype for t in (o, dq, dk, dv)} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_stride_not_one(backend, generator):
    x = [t.mT.contiguous().mT for t in draw(generator)]
    assert x[0].stride(-1) != 1
    check(backend, x)


@pytest.mark.each_isa
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("causal", (False, True))
def test_dtypes(backend, dtype, causal, generator):
    x = draw(generator, 1, 2, 65, 19, 12, state=True, dtype=dtype)
    o, s, z = call(backend, causal=causal)(*x)
    acc = torch.promote_types(dtype, torch.float32)
    assert (o.dtype, s.dtype, z.dtype) == (dtype, acc, acc)
    floor = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}[dtype]

    def widened(q, k, v, s0, z0):  # in the accumulation type, so that the state keeps its own
        wide = torch.promote_types(q.dtype, torch.float32)
        o, s, z = naive(*(t.to(wide) for t in (q, k, v)), s0, z0, causal=causal)
        return o.to(q.dtype), s, z

    assert_accurate(call(backend, causal=causal), widened, x, floor=floor, names=NAMES)


@needs_cpp("linear_fwd")
@settings(max_examples=20)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 3, 200, 70, 70))),
    how=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
    state=st.booleans(),
    masked=st.booleans(),
)
def test_any_shape(sizes, how, causal, state, masked):
    generator = torch.Generator().manual_seed(sum(sizes))
    x = draw(generator, *sizes, state=state)
    x = [layout(t, how) for t in x[:3]] + x[3:]
    keep = mask(generator, sizes[0], sizes[2]) if masked else None
    check("cpp", x, floor=5e-6, causal=causal, key_mask=keep, eps=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_features(backend, generator):
    q, k, v = draw(generator)
    keep = mask(generator, 2, 65)
    weights = k.masked_fill(~keep[:, None, :, None], -torch.inf).softmax(-2)
    truth = q.softmax(-1) @ (weights.mT @ v)  # rows of both sum to one: the denominator is 1
    truth = truth / (q.softmax(-1) @ weights.sum(-2)[..., None])
    given = linear_attention(q, k, v, feature_map="softmax", key_mask=keep, backend=backend)
    assert_close(given, truth)


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_sees_nothing_later(backend, generator):
    q, k, v = draw(generator, n=150)
    before = linear_attention(q, k, v, causal=True, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, 100:], v[:, :, 100:] = 7, -7
    after = linear_attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend, generator):
    q, k, v = draw(generator, n=50)
    padded = [F.pad(x, (0, 0, 0, 30), value=3.0) for x in (q, k, v)]
    keep = (torch.arange(80) < 50).expand(2, 80)
    given = linear_attention(*padded, key_mask=keep, backend=backend)[:, :, :50]
    assert_close(given, linear_attention(q, k, v, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_row_gives_zero(backend, generator):
    q, k, v = (x.requires_grad_() for x in draw(generator, n=10))
    keep = torch.zeros(2, 10, dtype=torch.bool)
    with poisoned():
        o = linear_attention(q, k, v, key_mask=keep, backend=backend)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
    for x in (o, *grads):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_and_resume(backend, generator):
    q, k, v = draw(generator, n=150)
    whole, end = linear_attention(q, k, v, causal=True, return_state=True, backend=backend)
    parts, state = [], None
    for at in (slice(0, 70), slice(70, 71), slice(71, 150)):
        o, state = linear_attention(
            *(x[:, :, at] for x in (q, k, v)),
            causal=True,
            initial_state=state,
            return_state=True,
            backend=backend,
        )
        parts.append(o)
    assert_close(torch.cat(parts, 2), whole)
    assert_close(state, end)


@needs_cpp("linear_fwd")
@pytest.mark.parametrize("causal", (False, True))
def test_threads_change_little(causal, generator):
    x = draw(generator, 1, 1, 900, 32, 32)  # one sequence: cut into segments by two threads
    with threads(1):
        one = outputs_and_gradients(call("cpp", causal=causal), x)
    with threads(3):
        three = outputs_and_gradients(call("cpp", causal=causal), x)
    for a, b in zip(one, three, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_cpp("linear_fwd")
@pytest.mark.parametrize("dv", [64, 61])  # rows that begin on a whole vector, and that do not
def test_large_states_go_past_the_caches(dv, generator):
    """What 2²¹ numbers and more are written by is another loop: the same bits."""
    x = draw(generator, 552, 1, 2, 64, dv, state=True)

    def run(rows):
        leaves = [t[rows].requires_grad_() for t in x]
        found = call("cpp")(*leaves)
        return *found, *torch.autograd.grad(found[0].square().sum(), leaves)

    with poisoned():
        whole, one, other = (run(rows) for rows in (slice(None), slice(276), slice(276, None)))
    for a, b, c in zip(whole, one, other, strict=True):
        assert torch.equal(a, torch.cat([b, c]))


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (False, True))
def test_gradcheck(backend, causal, generator):
    x = draw(generator, 1, 2, 5, 3, 4, state=True, dtype=torch.float64)
    f = call(backend, causal=causal, key_mask=torch.tensor([[True, True, False, True, True]]))
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in x])


@pytest.mark.parametrize("state", (False, True))
@pytest.mark.parametrize("causal", (False, True))
def test_opcheck(causal, state, generator):
    q, k, v, *s = draw(generator, state=state)
    s = s or (None, None)
    keep = mask(generator, 2, 65)
    torch.library.opcheck(linear_fwd.overload, (q, k, v, keep, *s, 0, causal, 0.0))
    end = q.new_ones(2, 3, 20, 28), q.new_ones(2, 3, 20)
    args = (v, *s, q, k, v, v, *end, keep, *s, 0, causal, 0.0)
    torch.library.opcheck(linear_bwd.overload, args)


@pytest.mark.parametrize("causal", (False, True))
def test_compiles_whole(causal, generator):
    f = call("auto", causal=causal)
    x = draw(generator, state=True)
    compiled = outputs_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), x)
    assert_close(compiled, outputs_and_gradients(f, x))


def test_meta(generator):
    x = [t.to("meta") for t in draw(generator, state=True)]
    o, s, z = call("auto")(*x)
    assert (o.shape, s.shape, z.shape) == ((2, 3, 65, 28), (2, 3, 20, 28), (2, 3, 20))
    assert o.device.type == "meta" and o.transpose(1, 2).is_contiguous()


def test_autocast(generator):
    q, k, v = draw(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, (s, _) = linear_attention(q, k, v, return_state=True)
    assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert_close(o.float(), linear_attention(q, k, v), rtol=0.05, atol=0.05)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"\(B, H, N, D\).*\(2, 3, 4\)"),
        ({"k": torch.zeros(2, 3, 64, 20)}, r"one shape.*\(2, 3, 64, 20\)"),
        ({"v": torch.zeros(2, 3, 65, 28, dtype=torch.float64)}, "one dtype.*float64"),
        ({"feature_map": "exp"}, "'exp'.*elu1, relu, identity"),
        ({"backend": "fast"}, "'fast'.*reference, cpp"),
        ({"key_mask": torch.ones(2, 65)}, r"\(2, 65\) bool"),
        ({"initial_state": (torch.zeros(2, 3, 20, 27), torch.zeros(2, 3, 20))}, "initial_state"),
        ({"feature_map": "softmax", "causal": True}, "no causal form"),
    ],
)
def test_bad_input(change, words, generator):
    q, k, v = draw(generator)
    with pytest.raises(ValueError, match=words):
        linear_attention(**{"q": q, "k": k, "v": v, **change})


@needs_cpp("linear_fwd")
def test_op_guards_its_memory(generator):
    q, k, v = draw(generator)
    with pytest.raises(RuntimeError, match="wrong shape"):
        linear_fwd.overload(q, k[:, :, :3], v, None, None, None, 0, False, 0.0)
    with pytest.raises(RuntimeError, match="wrong dtype"):
        linear_fwd.overload(q, k, v.double(), None, None, None, 0, False, 0.0)
    with pytest.raises(RuntimeError, match="come together"):
        linear_fwd.overload(q, k, v, None, q, None, 0, False, 0.0)


# --- GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n", (1, 63, 65, 300))
def test_gpu(causal, n, generator):
    x = [t.cuda() for t in draw(generator, n=n, state=True)]
    check("triton", x, floor=1e-5, causal=causal)
    if n <= 64:  # what CUDA C++ takes
        check("cuda", x, floor=1e-5, causal=causal)
