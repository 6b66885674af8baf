"""Experts against loops over tokens, empty ones, every way to multiply groups."""

import pytest
import torch
from proof import assert_accurate, outputs_and_gradients
from textbook.moe import experts
from torch.nn import functional as F

from tab.functional import moe_experts, noaux_tc_gate
from tab.ops.grouped import (
    grouped_in_blocks,
    grouped_outer_in_blocks,
    moe_grouped,
    moe_grouped_outer,
    native,
)
from tab.ops.router import expert_counts


def fast_experts(index, number):
    counts = expert_counts(index, number)
    return lambda x, w13, w2, weights: moe_experts(x, w13, w2, weights, index, counts)


def routed(lead, experts, top_k, c, f, generator, dtype=torch.float32, choose_from=None):
    """x, w13, w2, weights and an index that uses only the first `choose_from` experts."""
    drawn = torch.rand(*lead, choose_from or experts, generator=generator)
    index = drawn.topk(top_k, -1).indices
    shapes = (*lead, c), (experts, 2 * f, c), (experts, c, f), (*lead, top_k)
    x = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    x[1], x[2] = x[1] / c**0.5, x[2] / f**0.5
    return x, index


CASES = [  # lead, E, k, C, F, experts in use
    ((1,), 1, 1, 3, 2, None),
    ((2, 63), 8, 2, 16, 8, None),
    ((65,), 5, 5, 7, 3, None),
    ((2, 9), 8, 2, 16, 8, 3),
    ((3,), 16, 2, 4, 4, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_accurate(case, generator):
    *sizes, used = case
    x, index = routed(*sizes, generator, choose_from=used)
    f, g = fast_experts(index, sizes[1]), experts(index)
    assert_accurate(f, g, x, names="y dx dw13 dw2 dweights")
    dw13 = outputs_and_gradients(f, x)[2]
    idle = expert_counts(index, sizes[1]) == 0
    assert (dw13[idle] == 0).all()
    assert used is None or idle.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_experts_dtypes(dtype, generator):
    x, index = routed((2, 9), 4, 2, 8, 8, generator, dtype, choose_from=3)
    assert_accurate(fast_experts(index, 4), experts(index), x)
    assert fast_experts(index, 4)(*x).dtype == dtype


def test_experts_strides(generator):
    (x, w13, w2, weights), index = routed((4, 9), 4, 2, 8, 8, generator, torch.float64)
    strange = [x.mT.contiguous().mT, w13.mT.contiguous().mT, torch.cat([w2, w2], -1)[..., ::2]]
    strange.append(weights.T.contiguous().T if weights.dim() == 2 else weights)
    assert not any(t.is_contiguous() for t in strange[:3])
    truth = experts(index)
    for a, b in zip(
        outputs_and_gradients(fast_experts(index, 4), strange),
        outputs_and_gradients(truth, strange),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    one = fast_experts(index[:1].expand(4, 9, 2), 4)(x[:1].expand_as(x), w13, w2, weights)
    assert one.shape == x.shape


def test_gradcheck_through_the_router(generator):
    (x, w13, w2, _), _ = routed((6,), 4, 2, 3, 2, generator, torch.float64)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)

    def f(x, w13, w2, logits):
        return moe_experts(x, w13, w2, *noaux_tc_gate(logits, torch.zeros(4), top_k=2))

    leaves = [t.requires_grad_() for t in (x, w13, w2, logits)]
    assert torch.autograd.gradcheck(f, leaves)


def test_compile_meta_autocast(generator):
    (x, w13, w2, _), _ = routed((2, 9), 4, 2, 8, 4, generator)
    logits, bias = torch.randn(2, 9, 4, generator=generator), torch.randn(4, generator=generator)

    def f(x, w13, w2, logits):
        weights, index, counts = noaux_tc_gate(logits, bias.to(x.device), top_k=2)
        return moe_experts(x, w13, w2, weights, index, counts)

    eager = outputs_and_gradients(f, [x, w13, w2, logits])
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    given = outputs_and_gradients(compiled, [x, w13, w2, logits])
    for a, b in zip(given, eager, strict=True):
        torch.testing.assert_close(a, b)
    meta = f(*(t.to("meta").requires_grad_() for t in (x, w13, w2, logits)))
    assert meta.shape == x.shape
    meta.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        low = f(x, w13, w2, logits)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), eager[0], atol=0.05, rtol=0.05)


# The products of groups: slices (CPU), padded blocks (GPU), PyTorch's own (GPU, bfloat16).


@pytest.mark.parametrize(
    "sizes", [[5], [0, 0, 7], [3, 0, 9, 1], [1] * 8, [0, 40, 0, 1, 2], [0] * 6 + [2]], ids=str
)
def test_every_grouped_product(sizes, generator):
    counts, rows = torch.tensor(sizes), sum(sizes)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    g = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(len(sizes), 4, 8, generator=generator, dtype=torch.float64)
    y = torch.cat([p @ m.mT for p, m in zip(x.split(sizes), w, strict=True)])
    dw = torch.stack([a.mT @ b for a, b in zip(g.split(sizes), x.split(sizes), strict=True)])
    for product in (lambda *a: moe_grouped("auto", *a), grouped_in_blocks):
        torch.testing.assert_close(product(x, w, counts), y)
    for product in (lambda *a: moe_grouped_outer("auto", *a), grouped_outer_in_blocks):
        torch.testing.assert_close(product(g, x, counts), dw)
    ends = counts.cumsum(0).to(torch.int32)  # the arguments the GPU path passes
    given = F.grouped_mm(x.float(), w.float().mT, offs=ends)
    torch.testing.assert_close(given, y.float(), atol=1e-5, rtol=1e-5)
    given = F.grouped_mm(g.float().mT, x.float(), offs=ends)
    torch.testing.assert_close(given, dw.float(), atol=1e-5, rtol=1e-5)


def test_without_grouped_mm(monkeypatch):
    monkeypatch.delattr(F, "grouped_mm")
    assert not native(torch.empty(8, 8, dtype=torch.bfloat16))


def test_opcheck(generator):
    x, g = torch.randn(10, 6, generator=generator), torch.randn(10, 4, generator=generator)
    w, counts = torch.randn(3, 4, 6, generator=generator), torch.tensor([7, 0, 3])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(moe_grouped.overload, (x, w, counts), test_utils=tests)
    torch.library.opcheck(moe_grouped_outer.overload, (g, x, counts), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_asks_the_device_nothing(dtype, generator):
    x, index = routed((2, 64), 8, 2, 32, 16, generator, dtype, choose_from=5)
    truth = experts(index)(*(t.double() for t in x))
    x, index = [t.cuda().requires_grad_() for t in x], index.cuda()
    fast_experts(index, 8)(*x).sum().backward()  # loads the libraries, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = fast_experts(index, 8)(*x)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double().cpu(), truth, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [7, 64])
def test_gpu_grouped_products(width, dtype, generator):
    """Triton's, PyTorch's and the padded blocks', whichever takes it: float64's values, and the
    same bits each time, in a CUDA graph too."""
    for op in (moe_grouped, moe_grouped_outer):
        assert op.why_not("triton") is None, op.why_not("triton")
    sizes = [3, 0, 900, 1, 0, 120]
    counts = torch.tensor(sizes).cuda()
    x, g = (
        torch.randn(sum(sizes), n, generator=generator).to("cuda", dtype)
        for n in (width, 2 * width)
    )
    w = torch.randn(len(sizes), 2 * width, width, generator=generator).to("cuda", dtype)
    y = torch.cat([p.double() @ m.double().mT for p, m in zip(x.split(sizes), w, strict=True)])
    pairs = zip(g.double().split(sizes), x.double().split(sizes), strict=True)
    dw = torch.stack([a.mT @ b for a, b in pairs])
    for op, args, exact in ((moe_grouped, (x, w), y), (moe_grouped_outer, (g, x), dw)):
        given = op("auto", *args, counts)
        bound = 1e-5 if dtype in (torch.float32, torch.float64) else 8e-3
        assert (given.double() - exact).abs().max() <= bound * exact.abs().max()
        assert torch.equal(op("auto", *args, counts), given)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = op("auto", *args, counts)
        graph.replay()
        assert torch.equal(captured, given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: torch.zeros(9, 7)}, r"w13 \(E, 2F, C\).*x \(9, 7\)"),
        ({1: torch.zeros(4, 8, 7)}, r"w13 \(4, 8, 7\)"),
        ({2: torch.zeros(4, 8)}, r"w2 \(4, 8\)"),
        ({3: torch.zeros(9, 3)}, r"weights \(9, 3\)"),
        ({4: torch.zeros(9, 2)}, r"int64.*index \(9, 2\) float32"),
        ({5: torch.zeros(5, dtype=torch.int64)}, r"counts \(5,\)"),
        ({2: torch.zeros(4, 8, 4).double()}, r"one dtype.*w2 \(4, 8, 4\) float64"),
        ({4: torch.zeros(9, 2, dtype=torch.int64, device="meta")}, r"one device.*meta"),
        ({5: torch.tensor([9, 9, 0, 1])}, "counts says \\[9, 9, 0, 1\\]"),
    ],
)
def test_experts_bad_tensors(change, says, generator):
    x, index = routed((9,), 4, 2, 8, 4, generator)
    args = [*x, index, expert_counts(index, 4)]
    for i, t in change.items():
        args[i] = t
    with pytest.raises(ValueError, match=f"moe_experts.*{says}"):
        moe_experts(*args)
