"""local_attention against its formula with a dense mask."""

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from tasks import threads
from textbook.softmax import draw, in_window, naive

from tab import local_attention
from tab.ops import OPS

DOUBLE = {"dtype": torch.float64}
NAMES = "o dq dk dv"
BACKENDS = reference_and_cpp("local_fwd")


@pytest.mark.parametrize("n", [1, 63, 65, 150])
@pytest.mark.parametrize("window", [0, 1, 7, 200, (0, 5), (70, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_line(n, window, causal, backend):
    left, right = (window, window) if isinstance(window, int) else window
    assert_accurate(
        lambda *x: local_attention(*x, window=window, causal=causal, backend=backend),
        naive(in_window(n, left, right, causal)),
        draw(2, 3, n, 8, 12),
        names=NAMES,
    )


@pytest.mark.parametrize("grid", [(1, 1), (8, 8), (3, 21), (65, 1), (1, 65), (11, 10)], ids=str)
@pytest.mark.parametrize("window", [0, 1, (2, 1), 100], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grid(grid, window, causal, backend):
    left, right = (window, window) if isinstance(window, int) else window
    n = grid[0] * grid[1]
    assert_accurate(
        lambda *x: local_attention(*x, window=window, causal=causal, grid=grid, backend=backend),
        naive(in_window(n, left, right, causal, grid[1])),
        draw(1, 2, n, 4),
        names=NAMES,
    )


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("d", [4, 16])  # whole vectors are read where they lie, others are copied
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(how, heads, d, backend):
    inputs = [layout(x, how) for x in draw(2, heads, 65, d)]
    attend = naive(in_window(65, 3, 3))

    def local(*x):
        return local_attention(*x, window=3, backend=backend)

    assert_accurate(local, attend, inputs, names=NAMES)
    o, lse = OPS["local_fwd"](backend, *inputs, None, None, 3, 3, 0, 0, False, 0.5, 0.0)
    grads = OPS["local_bwd"](backend, o, *inputs, o, lse, None, None, 3, 3, 0, 0, False, 0.5, 0.0)
    assert all(x.transpose(1, 2).is_contiguous() for x in (o, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_stride_not_one(backend):
    inputs = [x.mT.contiguous().mT for x in draw(1, 2, 40, 16)]
    attend = naive(in_window(40, 5, 5))
    assert_accurate(lambda *x: local_attention(*x, window=5, backend=backend), attend, inputs)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(dtype, d, backend):
    inputs = [x.to(dtype) for x in draw(1, 2, 66, d)]
    out = local_attention(*inputs, window=2, backend=backend)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_accurate(
        lambda *x: local_attention(*x, window=2, backend=backend),
        naive(in_window(66, 2, 2)),
        inputs,
        names=NAMES,
    )


SHAPES = [  # B, H, N, D, Dv, window, causal
    (1, 1, 1, 16, 16, 0, False),
    (1, 3, 130, 64, 32, 20, False),
    (2, 2, 65, 32, 64, 9, True),
    (1, 1, 700, 48, 16, (40, 25), False),  # one sequence: threads share it in segments
    (1, 1, 700, 20, 33, (300, 0), False),
    (1, 2, 1100, 16, 16, 600, False),  # several chunks of keys
    (1, 1, 150, 256, 256, 100, False),  # the smallest chunk
    (1, 2, 90, 129, 200, 30, True),
]


@pytest.mark.each_isa
@needs_cpp("local_fwd")
@pytest.mark.parametrize(("b", "h", "n", "d", "dv", "window", "causal"), SHAPES)
def test_shapes(b, h, n, d, dv, window, causal):
    left, right = (window, window) if isinstance(window, int) else window
    assert_accurate(
        lambda *x: local_attention(*x, window=window, causal=causal, backend="cpp"),
        naive(in_window(n, left, right, causal)),
        draw(b, h, n, d, dv),
        names=NAMES,
    )


@pytest.mark.each_isa
@needs_cpp("local_fwd")
@pytest.mark.parametrize("grid", [(20, 32), (40, 9)], ids=str)
def test_large_grid(grid):
    n = grid[0] * grid[1]
    assert_accurate(
        lambda *x: local_attention(*x, window=(3, 2), grid=grid, backend="cpp"),
        naive(in_window(n, 3, 2, cols=grid[1])),
        draw(1, 1, n, 16),
        names=NAMES,
    )


@needs_cpp("local_fwd")
def test_same_bits_every_time_and_nearly_the_same_on_other_threads():
    inputs = draw(1, 1, 900, 16)

    def results():
        return outputs_and_gradients(lambda *x: local_attention(*x, window=40), inputs)

    with threads(3):
        three, again = results(), results()
    with threads(1):
        one = results()
    assert all(map(torch.equal, three, again))
    for x, y in zip(one, three, strict=True):
        torch.testing.assert_close(x, y)


@needs_cpp("local_fwd")
def test_nan_stays_in_its_window():
    q, k, v = draw(1, 1, 100, 16)
    k[0, 0, 50, 3] = torch.nan
    out = local_attention(q, k, v, window=4, backend="cpp")
    assert torch.equal(out[0, 0].isnan().all(-1).nonzero().flatten(), torch.arange(46, 55))
    assert not out[0, 0, [45, 55]].isnan().any()


@settings(max_examples=30)
@given(
    b=st.integers(1, 3), h=st.integers(1, 3), n=st.integers(1, 140), d=st.integers(1, 9),
    dv=st.integers(1, 9), left=st.integers(0, 150), right=st.integers(0, 150),
    causal=st.booleans(), scale=st.sampled_from([None, 0.3, -1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape(b, h, n, d, dv, left, right, causal, scale, seed):
    assert_accurate(
        lambda *x: local_attention(*x, window=(left, right), causal=causal, scale=scale),
        naive(in_window(n, left, right, causal), scale),
        draw(b, h, n, d, dv, seed),
        names=NAMES,
    )


def test_large_scores_do_not_overflow():
    q, k, v = draw(1, 1, 65, 8)
    inputs, mask = [q, k + 200, v], in_window(65, 4, 4)  # scores of some hundreds: exp is inf
    assert_accurate(lambda *x: local_attention(*x, window=4), naive(mask), inputs, names=NAMES)


@pytest.mark.parametrize("grid", [None, (11, 7)])
def test_gradcheck(grid, monkeypatch):
    monkeypatch.setattr("tab.ops.local_reference.CHUNK", 16)
    inputs = [x.requires_grad_() for x in draw(1, 2, 77, 2, 3, **DOUBLE)]
    assert torch.autograd.gradcheck(
        lambda *x: local_attention(*x, window=(2, 1), grid=grid), inputs, fast_mode=True
    )


def test_lse():
    q, k, v = draw(1, 2, 65, 4)
    o, lse = OPS["local_fwd"]("reference", q, k, v, None, None, 5, 2, 0, 0, False, 0.5, 0.0)
    scores = (q @ k.mT * 0.5).masked_fill(~in_window(65, 5, 2), -torch.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(o, (scores - lse[..., None]).exp() @ v)


@pytest.mark.parametrize("grid", [None, (10, 10)])
def test_causal_never_looks_ahead(grid):
    q, k, v = draw(1, 2, 100, 4)
    before = local_attention(q, k, v, window=30, causal=True, grid=grid)
    for x in (q, k, v):
        x[:, :, 67:] += 5
    after = local_attention(q, k, v, window=30, causal=True, grid=grid)
    assert torch.equal(before[:, :, :67], after[:, :, :67])
    assert not torch.equal(before[:, :, 67:], after[:, :, 67:])


def test_scores_are_never_n_by_n():
    """At N = 4,096 they would take 64 MB; no allocation is over 1 MB."""
    q, k, v = draw(1, 1, 4096, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = local_attention(q, k, v, window=4)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20
    torch.testing.assert_close(out[:, :, :60], naive(in_window(64, 4, 4))(
        q[:, :, :64], k[:, :, :64], v[:, :, :64])[:, :, :60])  # fmt: skip


@pytest.mark.parametrize("options", [(3, 2, 0, 0, False), (1, 1, 5, 13, True)])
def test_opcheck(options):
    q, k, v = draw(2, 2, 65, 4)
    args = (q, k, v, torch.ones(2, 65).bool(), torch.ones(2), *options, 0.5, 3.0)
    o, lse = OPS["local_fwd"]("auto", *args)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS["local_fwd"].overload, args, test_utils=tests)
    torch.library.opcheck(OPS["local_bwd"].overload, (o, q, k, v, o, lse, *args[3:]),
                          test_utils=tests)  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def loss(q, k, v):
        return local_attention(q, k, v, window=(3, 1), causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = [x.requires_grad_() for x in draw(1, 2, 65, 4)]
    eager = torch.autograd.grad(loss(*inputs), inputs)
    for x, y in zip(eager, torch.autograd.grad(compiled(*inputs), inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_meta_and_autocast():
    q, k, v = (x.to("meta").requires_grad_() for x in draw(2, 3, 70, 4, 6))
    out = local_attention(q, k, v, window=2)
    out.sum().backward()
    assert (out.shape, out.device.type, q.grad.shape) == ((2, 3, 70, 6), "meta", q.shape)
    inputs = draw(1, 1, 9, 4)
    half = [x.bfloat16() for x in inputs]
    for backend in ("auto", "reference"):  # only the inputs are cast: sums stay in float32
        with torch.autocast("cpu", torch.bfloat16):
            out = local_attention(*inputs, window=2, backend=backend)
        assert torch.equal(out, local_attention(*half, window=2, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, r"window ≥ 0.*window=-1; nearest: \(0, 0\)"),
        ({"window": (2, -3)}, r"\(2, -3\); nearest: \(2, 0\)"),
        ({"window": 1.5}, "whole numbers.*1.5"),
        ({"window": (1, 2, 3)}, "whole numbers"),
        ({"grid": (3, 5)}, r"N = 12, got grid=\(3, 5\).*\(3, 4\)"),
        ({"grid": 12}, "got grid=12"),
        ({"backend": "fast"}, "choose one of"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        local_attention(*draw(1, 2, 12, 4), **{"window": 1, **change})


@needs_cpp("local_fwd")
def test_op_guards_its_memory():
    q, k, v = draw(1, 2, 12, 4)
    forward, backward = OPS["local_fwd"].overload, OPS["local_bwd"].overload
    o, lse = forward(q, k, v, None, None, 1, 1, 0, 0, False, 0.5, 0.0)
    for bad, message in (
        ((q, k[:, :, :3], v, None, None, 1, 1, 0, 0), "wrong shape"),
        ((q, k, v.double(), None, None, 1, 1, 0, 0), "wrong dtype"),
        ((q, k, v, torch.ones(1, 9).bool(), None, 1, 1, 0, 0), "key_mask has the wrong shape"),
        ((q, k, v, torch.ones(1, 12), None, 1, 1, 0, 0), "key_mask has the wrong dtype"),
        ((q, k, v, None, torch.ones(1), 1, 1, 0, 0), "slopes has the wrong shape"),
        ((q, k, v, None, torch.ones(2).half(), 1, 1, 0, 0), "slopes has the wrong dtype"),
        ((q, k, v, None, None, -1, 1, 0, 0), "0 ≤ left"),
        ((q, k, v, None, None, 1, 1, 3, 5), "rows · cols = N"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*bad, False, 0.5, 0.0)
    with pytest.raises(RuntimeError, match="softcap ≥ 0"):
        forward(q, k, v, None, None, 1, 1, 0, 0, False, 0.5, -1.0)
    with pytest.raises(RuntimeError, match="lse has the wrong shape"):
        backward(o, q, k, v, o, lse[:, :1], None, None, 1, 1, 0, 0, False, 0.5, 0.0)


def test_bad_tensors():
    q, k, v = draw(1, 2, 12, 4)
    for bad in ((q[0], k, v), (q, k[:, :1], v), (q, k, v[:, :, :5]), (q, k, v.double()),
                (q, k, v.to("meta")), (q.long(), k.long(), v.long())):  # fmt: skip
        with pytest.raises(ValueError, match=r"local_attention wants .*\(1, 2, 12, 4\)|2, 12, 4"):
            local_attention(*bad, window=1)
