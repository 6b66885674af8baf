"""sparse_attention against its formula with a dense mask."""

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.softmax import blocks, draw, naive

from tab import BlockPattern, sparse_attention
from tab.ops import OPS

NAMES = "o dq dk dv"
BACKENDS = reference_and_cpp("sparse_fwd")


@pytest.mark.each_isa
@pytest.mark.parametrize("n", [1, 63, 65, 200])
@pytest.mark.parametrize("block_size", [1, 8, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bigbird(n, block_size, causal, backend):
    pattern = BlockPattern.bigbird(n, heads=3, block_size=block_size, num_random=2)
    assert_accurate(
        lambda *x: sparse_attention(*x, pattern, causal=causal, backend=backend),
        naive(blocks(pattern, causal)),
        draw(2, 3, n, 8, 12),
        names=NAMES,
    )


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("d", [4, 16])  # whole vectors are read where they lie, others are copied
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(how, heads, d, backend):
    pattern = BlockPattern.bigbird(65, heads=heads, block_size=8)
    inputs = [layout(x, how) for x in draw(2, heads, 65, d)]

    def sparse(*x):
        return sparse_attention(*x, pattern, backend=backend)

    assert_accurate(sparse, naive(blocks(pattern)), inputs, names=NAMES)
    o, lse = OPS["sparse_fwd"](backend, *inputs, *pattern.tensors, None, None, 8, False, 0.5, 0.0)
    grads = OPS["sparse_bwd"](
        backend, o, *inputs, o, lse, *pattern.tensors, None, None, 8, False, 0.5, 0.0
    )
    assert all(x.transpose(1, 2).is_contiguous() for x in (o, *grads))


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(dtype, d, backend):
    pattern = BlockPattern.bigbird(67, heads=2, block_size=8, num_random=1)
    inputs = [x.to(dtype) for x in draw(1, 2, 67, d)]
    out = sparse_attention(*inputs, pattern, backend=backend)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_accurate(
        lambda *x: sparse_attention(*x, pattern, backend=backend),
        naive(blocks(pattern)),
        inputs,
        names=NAMES,
    )


SHAPES = [  # B, H, N, D, Dv, block_size, causal
    (1, 3, 130, 64, 32, 16, False),
    (2, 2, 65, 32, 64, 3, True),
    (1, 1, 700, 48, 16, 64, False),  # one sequence: threads share it in segments
    (1, 2, 1300, 16, 16, 64, False),  # global rows are several chunks of keys
    (1, 1, 300, 256, 256, 20, False),  # the smallest chunk
    (1, 2, 190, 129, 200, 48, True),  # blocks that strips of queries straddle
]


@pytest.mark.each_isa
@needs_cpp("sparse_fwd")
@pytest.mark.parametrize(("b", "h", "n", "d", "dv", "block_size", "causal"), SHAPES)
def test_shapes(b, h, n, d, dv, block_size, causal):
    pattern = BlockPattern.bigbird(n, heads=h, block_size=block_size, num_random=2)
    assert_accurate(
        lambda *x: sparse_attention(*x, pattern, causal=causal, backend="cpp"),
        naive(blocks(pattern, causal)),
        draw(b, h, n, d, dv),
        names=NAMES,
    )


@needs_cpp("sparse_fwd")
def test_same_bits_every_time_and_nearly_the_same_on_other_threads():
    inputs = draw(1, 1, 900, 16)
    pattern = BlockPattern.bigbird(900, heads=1, block_size=16)

    def results():
        return outputs_and_gradients(lambda *x: sparse_attention(*x, pattern), inputs)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        three, again = results(), results()
        torch.set_num_threads(1)
        one = results()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, three, again))
    for x, y in zip(one, three, strict=True):
        torch.testing.assert_close(x, y)


@needs_cpp("sparse_fwd")
def test_op_guards_its_memory():
    q, k, v = draw(1, 2, 12, 4)
    pattern = BlockPattern.bigbird(12, heads=2, block_size=4)
    row_ptr, col, col_ptr, row = pattern.tensors
    forward = OPS["sparse_fwd"].overload
    for bad, message in (
        ((q, k[:, :, :3], v, row_ptr, col), "wrong shape"),
        ((q, k, v.double(), row_ptr, col), "wrong dtype"),
        ((q, k, v, row_ptr[:, :2], col), "row_ptr has the wrong shape"),
        ((q, k, v, row_ptr.long(), col), "row_ptr has the wrong dtype"),
        ((q, k, v, row_ptr, col + 1), "outside the pattern"),
        ((q, k, v, row_ptr, col[:2]), "outside the pattern"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*bad, col_ptr, row, None, None, 4, False, 0.5, 0.0)


@settings(max_examples=30)
@given(
    b=st.integers(1, 2), h=st.integers(1, 3), n=st.integers(1, 90), d=st.integers(1, 9),
    dv=st.integers(1, 9), block_size=st.integers(1, 40), shared=st.booleans(), p=st.floats(0, 1),
    causal=st.booleans(), scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_mask(b, h, n, d, dv, block_size, shared, p, causal, scale, seed):
    """Any mask of blocks, with rows that see nothing."""
    nb = -(-n // block_size)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(*(() if shared else (h,)), nb, nb, generator=g) < p
    pattern = BlockPattern.from_blocks(mask, block_size, n)
    assert_accurate(
        lambda *x: sparse_attention(*x, pattern, causal=causal, scale=scale),
        naive(blocks(pattern, causal), scale),
        draw(b, h, n, d, dv, seed),
        names=NAMES,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend):
    """Block row 0 sees only block 1: causally that is nothing. Block row 2 lists no block."""
    mask = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    pattern = BlockPattern.from_blocks(mask, 4, 11)
    inputs = [x.requires_grad_() for x in draw(1, 2, 11, 4)]
    out = sparse_attention(*inputs, pattern, causal=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(out.sum(), inputs)
    nothing = torch.tensor([0, 1, 2, 3, 8, 9, 10])
    assert not out[:, :, nothing].any() and not dq[:, :, nothing].any()
    assert not dk[:, :, 8:].any() and not dv[:, :, 8:].any()
    _, lse = OPS["sparse_fwd"](backend, *inputs, *pattern.tensors, None, None, 4, True, 0.5, 0.0)
    assert torch.equal(lse[0, 0].isneginf().nonzero().flatten(), nothing)


def test_lse_and_large_scores():
    q, k, v = draw(1, 2, 65, 4)
    pattern = BlockPattern.bigbird(65, heads=2, block_size=8, num_random=1)
    k = k + 200  # scores of some hundreds: exp is inf
    o, lse = OPS["sparse_fwd"](
        "reference", q, k, v, *pattern.tensors, None, None, 8, False, 0.5, 0.0
    )
    scores = (q @ k.mT * 0.5).masked_fill(~pattern.to_dense(), -torch.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(o, scores.softmax(-1) @ v)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    pattern = BlockPattern.bigbird(33, heads=2, block_size=4, num_random=1)
    inputs = [x.requires_grad_() for x in draw(1, 2, 33, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: sparse_attention(*x, pattern, causal=causal), inputs, fast_mode=True
    )


def test_causal_never_looks_ahead():
    q, k, v = draw(1, 2, 100, 4)
    pattern = BlockPattern.bigbird(100, heads=2, block_size=8)
    before = sparse_attention(q, k, v, pattern, causal=True)
    for x in (q, k, v):
        x[:, :, 67:] += 5
    after = sparse_attention(q, k, v, pattern, causal=True)
    assert torch.equal(before[:, :, :67], after[:, :, :67])
    assert not torch.equal(before[:, :, 67:], after[:, :, 67:])


def test_scores_are_never_n_by_n():
    """At N = 16,384 they would take 1 GB."""
    q, k, v = draw(1, 1, 16_384, 2)
    pattern = BlockPattern.bigbird(16_384, heads=1, block_size=32, num_random=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        sparse_attention(q, k, v, pattern)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**24


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared):
    q, k, v = draw(2, 2, 65, 4)
    mask = BlockPattern.bigbird(65, heads=2, block_size=8).to_blocks()
    pattern = BlockPattern.from_blocks(mask[0] if shared else mask, 8, 65)
    rules = torch.ones(2, 65).bool(), torch.ones(2)
    args = (*pattern.tensors, *rules, 8, True, 0.5, 3.0)
    o, lse = OPS["sparse_fwd"]("auto", q, k, v, *args)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS["sparse_fwd"].overload, (q, k, v, *args), test_utils=tests)
    torch.library.opcheck(OPS["sparse_bwd"].overload, (o, q, k, v, o, lse, *args),
                          test_utils=tests)  # fmt: skip


def test_meta_and_autocast():
    pattern = BlockPattern.bigbird(70, heads=3, block_size=8)
    q, k, v = (x.to("meta").requires_grad_() for x in draw(2, 3, 70, 4, 6))
    out = sparse_attention(q, k, v, pattern)
    out.sum().backward()
    assert (out.shape, out.device.type, q.grad.shape) == ((2, 3, 70, 6), "meta", q.shape)
    inputs = draw(1, 3, 70, 4)
    half = [x.bfloat16() for x in inputs]
    for backend in ("auto", "reference"):  # only the inputs are cast: sums stay in float32
        with torch.autocast("cpu", torch.bfloat16):
            out = sparse_attention(*inputs, pattern, backend=backend)
        assert torch.equal(out, sparse_attention(*half, pattern, backend=backend))


def test_bad_input():
    q, k, v = draw(1, 2, 12, 4)
    pattern = BlockPattern.bigbird(12, heads=2, block_size=1, num_random=1)
    for other, message in (
        (BlockPattern.bigbird(13, heads=2, block_size=4), "N = 13, .* H = 2 .* N = 12, .* H = 2"),
        (BlockPattern.bigbird(12, heads=3, block_size=4), "N = 12, .* H = 3 .* N = 12, .* H = 2"),
        (BlockPattern.from_blocks(torch.ones(3, 3, dtype=torch.bool), 4, 11), "N = 11, .* H = any"),
        (torch.ones(3, 3, dtype=torch.bool), "wants a BlockPattern, got Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(q, k, v, other)
    for bad in ((q[0], k, v), (q, k[:, :1], v), (q, k, v.double()), (q, k, v.to("meta"))):
        with pytest.raises(ValueError, match=r"sparse_attention wants .*2, 12, 4"):
            sparse_attention(*bad, pattern)
    with pytest.raises(ValueError, match="choose one of"):
        sparse_attention(q, k, v, pattern, backend="fast")
