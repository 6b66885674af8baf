"""The Triton kernels of `gated_linear` where a GPU is; on CPU they are interpreted
(interpreted/gated_linear.py)."""

import pytest
import torch
from packs import cu
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.gated_linear import call, draw, naive

from tab import gated_linear_attention
from tab.ops.gated_linear import gated_linear_bwd, gated_linear_fwd

pytestmark = pytest.mark.gpu
NAMES = "o S dq dk dv dg dS0"
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def on_gpu(*args, **options):
    return [x.cuda() for x in draw(*args, **options)]


def test_there():
    for op in (gated_linear_fwd, gated_linear_bwd):
        assert op.why_not("triton") is None, f"on a GPU: {op.why_not('triton')}"


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize(
    "b, h, n, d, dv",
    [(1, 1, 1, 3, 3), (2, 3, 63, 16, 24), (1, 2, 700, 64, 64), (1, 2, 300, 200, 72),
     (50, 8, 130, 64, 64)],
)  # fmt: skip
def test_sizes(b, h, n, d, dv, dtype, generator):
    x = on_gpu(generator, b, h, n, d, dv, state=True, dtype=dtype)
    mask = torch.rand(b, n, generator=generator).cuda() > 0.3
    f = call(backend="triton", key_mask=mask)
    truth = lambda *x: on_device(naive, *x, key_mask=mask)  # noqa: E731
    assert_accurate(f, truth, x, names=NAMES, floor=FLOORS[dtype])


def on_device(f, *x, **options):
    """The textbook makes its states on the default device."""
    with torch.device(x[0].device):
        return f(*x, **options)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(how, generator):
    q, k, v, g = on_gpu(generator, 2, 2, 300, 32, 32)
    x = [*(layout(t, how) for t in (q, k, v)), g]
    f = call(backend="triton")
    pairs = outputs_and_gradients(f, x), outputs_and_gradients(f, [t.contiguous() for t in x])
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)


def test_like_the_reference(generator):
    """Heads that share keys, packed batches, a denominator: `auto` on a GPU is Triton."""
    q, *_ = on_gpu(generator, 1, 4, 300, 32, 32)
    _, k, v, g = on_gpu(generator, 1, 2, 300, 32, 32)
    for options in ({}, {"cu_seqlens": cu((130, 0, 170)).cuda()}, {"normalize": True}):
        x = [q.exp(), k.exp(), v, g]
        given, wanted = (
            outputs_and_gradients(call(backend=backend, **options), x)
            for backend in ("auto", "reference")
        )
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max()))


def test_graph(generator):
    """Captured in a CUDA graph, then replayed on other inputs: the same bits as alone."""
    first, second = (on_gpu(generator, 1, 4, 600, 64, 64) for _ in range(2))

    def step(q, k, v, g):
        o, s = torch.ops.tab.gated_linear_fwd(q, k, v, g[..., None], None, None, 0.1)
        return o, s, *torch.ops.tab.gated_linear_bwd(o, s, q, k, v, g[..., None], None, None, 0.1)

    stream = torch.cuda.Stream()  # compiles
    with torch.cuda.stream(stream):
        step(*first)
    torch.cuda.synchronize()
    static = [t.clone() for t in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for t, new in zip(static, second, strict=True):
        t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(*second), strict=True):
        assert torch.equal(a, b)


def test_compile(generator):
    x, f = on_gpu(generator, 1, 2, 64, 32, 32), call(backend="triton")
    compiled = torch.compile(f, fullgraph=True)
    pairs = outputs_and_gradients(compiled, x), outputs_and_gradients(f, x)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ends", [None, (0, 130, 130, 300)])
def test_without_the_state(ends, generator):
    """The same outputs and gradients where nobody asks for it; compiled, too."""
    x = on_gpu(generator, 1, 2, 300, 32, 32)
    options = {} if ends is None else {"cu_seqlens": torch.tensor(ends).int().cuda()}

    def f(*x):
        return gated_linear_attention(*x, backend="triton", **options)

    def with_state(*x):
        return gated_linear_attention(*x, backend="triton", return_state=True, **options)[0]

    wanted = outputs_and_gradients(with_state, x)
    for g in (f, torch.compile(f, fullgraph=True)):
        for a, b in zip(outputs_and_gradients(g, x), wanted, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(f(*x), wanted[0])
