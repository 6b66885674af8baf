"""The Triton and CUDA C++ kernels of linear and performer where a GPU is."""

import pytest
import torch
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.linear import naive as linear_naive
from textbook.performer import naive as performer_naive

from tab import linear_attention, orthogonal_projection, performer_attention
from tab.ops import OPS

pytestmark = pytest.mark.gpu
NAMES = "o S z dq dk dv dS0 dz0"
RUNS = [(op, backend) for op in ("linear", "performer") for backend in ("triton", "cuda")]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FEATURES = 70


def projection(d):
    generator = torch.Generator().manual_seed(1)
    return orthogonal_projection(FEATURES, d, generator=generator).cuda()


def attention(op, backend, d, **options):
    """-> o, S, z; those of performer free of its shift"""
    options = {"return_state": True, "backend": backend, **options}
    w = projection(d) if op == "performer" else None

    def linear(q, k, v, *state):
        return linear_attention(q, k, v, initial_state=state or None, **options)

    def performer(q, k, v, *state):
        acc = torch.promote_types(q.dtype, torch.float32)
        state = (*state, torch.zeros_like(state[1])) if state else None
        o, (s, z, c) = performer_attention(q, k, v, w.to(acc), initial_state=state, **options)
        return o, s * c.exp()[..., None], z * c.exp()

    return linear if op == "linear" else performer


def naive(op, d, causal=False, key_mask=None):
    """The textbook, all N² weights; linear's map is elu + 1."""
    w = projection(d) if op == "performer" else None
    root = FEATURES**0.5  # the op leaves M^(-1/2) out: it cancels

    def linear(*x):
        return linear_naive(*x, causal=causal, key_mask=key_mask)

    def performer(q, k, v, *state):
        acc = torch.promote_types(q.dtype, torch.float32)
        state = [x / root for x in state]
        o, s, z = performer_naive(q, k, v, *state, w=w, causal=causal, key_mask=key_mask)
        return o, s.to(acc) * root, z.to(acc) * root

    return linear if op == "linear" else performer


def inputs(op, generator, n, d, dv, dtype=torch.float32, b=3, h=2, state=False):
    shapes = [(b, h, n, d), (b, h, n, d), (b, h, n, dv)]
    # Half as large for performer, whose textbook shifts nothing: float16 would overflow.
    scale, rows = (1.0, d) if op == "linear" else (0.5, FEATURES)
    x = [(scale * torch.randn(s, generator=generator)).to("cuda", dtype) for s in shapes]
    if state:
        x += [torch.rand(b, h, rows, dv, generator=generator).cuda()]
        x += [torch.rand(b, h, rows, generator=generator).cuda()]
    return x


def require(op, backend):
    reason = OPS[f"{op}_fwd"].why_not(backend)
    if reason:
        pytest.fail(f"on a GPU every backend must be there: {reason}")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "n, d, dv", [(1, 3, 3), (5, 16, 24), (63, 64, 64), (65, 64, 64), (1030, 64, 64), (700, 200, 72)]
)
@pytest.mark.parametrize("op", ["linear", "performer"])
def test_sizes(op, n, d, dv, causal, dtype, generator):
    require(op, "triton")
    x = inputs(op, generator, n, d, dv, dtype, state=n == 65)
    f = attention(op, "triton", d, causal=causal)
    assert_accurate(f, naive(op, d, causal), x, names=NAMES)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n, d, dv", [(1, 3, 3), (5, 16, 24), (63, 33, 64), (64, 128, 128)])
@pytest.mark.parametrize("op, backend", RUNS)
def test_small(op, backend, n, d, dv, dtype, generator):
    require(op, backend)
    x = inputs(op, generator, n, d, dv, dtype, state=n == 63)
    mask = torch.rand(3, n, generator=generator).cuda() > 0.3
    mask[:, 0] = True
    f = attention(op, backend, d, key_mask=mask)
    assert_accurate(f, naive(op, d, key_mask=mask), x, names=NAMES)


def test_extreme_keys(generator):
    """performer's shifts differ by hundreds inside a tile: exact still, never NaN."""
    q, k, v = inputs("performer", generator, 150, 64, 64)
    q, k = 6 * q, 6 * k
    k[:, :, 40:100] *= 4
    for causal in (False, True):
        given, exact = (
            outputs_and_gradients(lambda *x: f(*x)[0], [t.to(dtype) for t in (q, k, v)])  # noqa: B023
            for f, dtype in (
                (attention("performer", "triton", 64, causal=causal), torch.float32),
                (attention("performer", "reference", 64, causal=causal), torch.float64),
            )
        )
        for a, b in zip(given, exact, strict=True):
            assert (a.double() - b).abs().max() <= 1e-3 * max(1.0, b.abs().max())


@pytest.mark.parametrize("op, backend", RUNS)
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(op, backend, how, generator):
    f = attention(op, backend, 32)
    x = [layout(t, how) for t in inputs(op, generator, 50, 32, 32)]
    strided = outputs_and_gradients(f, x)
    plain = outputs_and_gradients(f, [t.contiguous() for t in x])
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op, backend", RUNS)
@pytest.mark.parametrize("causal", [False, True])
def test_graph_and_streams(op, backend, causal, generator):
    """Captured in a CUDA graph, and run on two streams at once: the same bits as alone."""
    n = 600 if causal and backend == "triton" else 64
    f = attention(op, backend, 64, causal=causal)
    first, second = inputs(op, generator, n, 64, 64), inputs(op, generator, n, 64, 64)
    alone = [outputs_and_gradients(f, x) for x in (first, second)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for stream, x in zip(streams, (first, second), strict=True):
        with torch.cuda.stream(stream):
            results.append([outputs_and_gradients(f, x) for _ in range(20)][-1])
    torch.cuda.synchronize()
    for a, b in zip([*alone[0], *alone[1]], [*results[0], *results[1]], strict=True):
        assert torch.equal(a, b)

    static = [t.clone() for t in first]

    def step(x):
        leaves = [t.detach().requires_grad_() for t in x]
        o = f(*leaves)[0]
        return o, *torch.autograd.grad(o, leaves, o.detach())

    step(static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for t, new in zip(static, second, strict=True):
        t.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op, backend", RUNS)
def test_compile(op, backend, generator):
    x, f = inputs(op, generator, 64, 32, 32), attention(op, backend, 32)
    compiled = torch.compile(f, fullgraph=True)
    pairs = outputs_and_gradients(compiled, x), outputs_and_gradients(f, x)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["linear", "performer"])
def test_limits(op, generator):
    """Float64 and wide heads go to the reference, or raise where Triton is asked for by name."""
    for dtype, d in ((torch.float64, 16), (torch.float32, 300)):
        x = inputs(op, generator, 20, d, d, dtype)
        assert_accurate(attention(op, "auto", d), naive(op, d), x, floor=1e-5, names=NAMES)
        with pytest.raises(RuntimeError, match='use backend="auto"'):
            attention(op, "triton", d)(*x)
