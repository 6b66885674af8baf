"""local and sparse on a GPU, in Triton: types, shapes, strides, graphs, streams, compile.

What needs no GPU is in test_triton.py."""

import pytest
import torch
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.softmax import naive

from tab import BlockPattern, local_attention, sparse_attention
from tab.ops import OPS

pytestmark = pytest.mark.gpu
NAMES = "o dq dk dv"


def line(n):
    """-> options of local_attention, who sees whom (N, N)"""
    step = torch.arange(n)[None] - torch.arange(n)[:, None]
    return {"window": (20, 150)}, (step >= -20) & (step <= 150)


def causal_grid(n):
    cols = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
    row, col = torch.arange(n) // cols, torch.arange(n) % cols
    near = [((x[None] - x[:, None]).abs() <= 3) for x in (row, col)]
    options = {"window": 3, "grid": (n // cols, cols), "causal": True}
    return options, (near[0] & near[1]).tril()


def bigbird(n):
    """From 512 tokens on more than 32 blocks: long rows and columns."""
    pattern = BlockPattern.bigbird(n, heads=2, block_size=16)
    return {"pattern": pattern}, pattern.to_dense()


def holes(n):
    """Causal, blocks that are no tile, tokens that see nothing."""
    nb = -(-n // 24)
    mask = torch.rand(nb, nb, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[nb // 2] = False
    pattern = BlockPattern.from_blocks(mask, 24, n)
    return {"pattern": pattern, "causal": True}, pattern.to_dense().tril()


CASES = (line, causal_grid, bigbird, holes)


def attention(options):
    f = sparse_attention if "pattern" in options else local_attention
    return lambda *x: f(*x, backend="triton", **options)


def inputs(generator, n, d, dv, dtype=torch.float32):
    shapes = [(3, 2, n, d), (3, 2, n, d), (3, 2, n, dv)]
    return [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]


@pytest.fixture(autouse=True)
def all_there():
    for op in ("local_fwd", "local_bwd", "sparse_fwd", "sparse_bwd"):
        assert OPS[op].why_not("triton") is None, OPS[op].why_not("triton")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "n, d, dv, dtype",
    [
        (1, 3, 3, torch.float32),
        (63, 64, 64, torch.float32),
        (700, 200, 72, torch.float32),
        (15, 16, 24, torch.bfloat16),
        (1030, 64, 64, torch.bfloat16),
        (1030, 64, 64, torch.float16),
        (63, 64, 64, torch.float64),
    ],
)
def test_sizes(case, n, d, dv, dtype, generator):
    options, mask = case(n)
    x = inputs(generator, n, d, dv, dtype)
    assert_accurate(attention(options), naive(mask.cuda()), x, names=NAMES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(case, how, generator):
    f = attention(case(600)[0])
    x = [layout(t, how) for t in inputs(generator, 600, 64, 64, torch.bfloat16)]
    strided = outputs_and_gradients(f, x)
    plain = outputs_and_gradients(f, [t.contiguous() for t in x])
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_graph_and_streams(case, generator):
    """Captured in a CUDA graph, and run on two streams at once: the same bits as alone."""
    f = attention(case(600)[0])
    sets = [inputs(generator, 600, 64, 64, torch.bfloat16) for _ in range(2)]
    alone = [outputs_and_gradients(f, x) for x in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    results = []
    for stream, x in zip(streams, sets, strict=True):
        with torch.cuda.stream(stream):
            results.append([outputs_and_gradients(f, x) for _ in range(20)][-1])
    torch.cuda.synchronize()
    for a, b in zip([*alone[0], *alone[1]], [*results[0], *results[1]], strict=True):
        assert torch.equal(a, b)

    static = [t.clone().requires_grad_() for t in sets[0]]

    def step(x):
        o = f(*x)
        return o, *torch.autograd.grad(o, x, o.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(static)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    with torch.no_grad():
        for t, new in zip(static, sets[1], strict=True):
            t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step([t.requires_grad_() for t in sets[1]]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_compile(case, generator):
    f, x = attention(case(600)[0]), inputs(generator, 600, 64, 64, torch.bfloat16)
    compiled = torch.compile(f, fullgraph=True)
    pairs = outputs_and_gradients(compiled, x), outputs_and_gradients(f, x)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
