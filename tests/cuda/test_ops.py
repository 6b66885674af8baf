"""The ops in CUDA C++ as a whole, where there is a GPU. Their arithmetic on the CPU: test_linear.py
and the like."""

import pytest
import torch
from emulated import FLOOR, TYPES, inputs
from proof import assert_accurate

import tab
from tab.ops import BlockPattern


def test_auto_takes_cuda_where_it_is_measured_to_win(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tab.ops import OPS, _op

    op = OPS["local_fwd"]
    monkeypatch.setitem(op.reasons, "cuda", None)
    with FakeTensorMode():
        x = torch.empty(2, 2, 64, 8, device="cuda")
    assert _op.choose("auto", op, x) == "auto"
    monkeypatch.setitem(_op.CUDA_TOKENS, "local_fwd", 64)
    assert _op.choose("auto", op, x) == "cuda"
    assert _op.choose("auto", op, x[:, :, :1].expand(2, 2, 65, 8)) == "auto"
    assert _op.choose("auto", op, x, cuda=False) == _op.choose("auto", op, x.double()) == "auto"


def attention(op: str, n: int, d: int, backend: str, causal: bool = False):
    if op == "sparse":
        pattern = BlockPattern.bigbird(n, heads=2, block_size=8)
        return lambda *x: tab.sparse_attention(*x, pattern, causal=causal, backend=backend)
    if op == "local":
        return lambda *x: tab.local_attention(*x, window=(5, 3), causal=causal, backend=backend)
    if op == "performer":
        w = torch.randn(70, d, generator=torch.Generator().manual_seed(1)).cuda()
        return lambda *x: tab.performer_attention(
            *x, w.to(torch.promote_types(x[0].dtype, torch.float32)), causal=causal, backend=backend
        )
    if op == "mla":
        return lambda *x: tab.mla_attention(*x, causal=causal, form="fused", backend=backend)
    return lambda *x: tab.linear_attention(*x, causal=causal, backend=backend)


OPERATORS = "linear", "performer", "local", "sparse", "mla"


def operands(op, generator, b, h, n, d, dv, dtype):
    """q, k, v, or what mla takes: Dr 8, R 24"""
    if op != "mla":
        return [t.cuda() for t in inputs(generator, b, h, n, d, dv, dtype)]
    shapes = (b, h, n, d), (b, h, n, 8), (b, n, 24), (b, n, 8), (h, d, 24), (h, dv, 24)
    return [(torch.randn(s, generator=generator) / 2).to("cuda", dtype) for s in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "d", "dv"), [(1, 8, 8), (17, 33, 64), (64, 64, 64), (63, 96, 40)])
def test_gpu(op, n, d, dv, dtype, generator):
    x = operands(op, generator, 3, 2, n, d, dv, dtype)
    for causal in (False, True):
        f, naive = (attention(op, n, d, backend, causal) for backend in ("cuda", "reference"))
        assert_accurate(f, naive, x, floor=max(2 * FLOOR[dtype], 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", ("linear", "performer"))
def test_gpu_states(op, dtype, causal, generator):
    """From one part of the tokens to the next, gradients through the state: as in one go."""
    x = operands(op, generator, 2, 3, 50, 24, 40, dtype)
    w = torch.randn(70, 24, generator=generator).cuda()

    def once(backend):
        def call(q, k, v, state=None):
            options = {"causal": causal, "backend": backend, "return_state": True}
            options["initial_state"] = state
            if op == "linear":
                return tab.linear_attention(q, k, v, **options)
            acc = torch.promote_types(q.dtype, torch.float32)
            return tab.performer_attention(q, k, v, w.to(acc), **options)

        def both(*x):
            first, state = call(*(t[:, :, :20] for t in x))
            second, (s, *_) = call(*(t[:, :, 20:] for t in x), state)
            return first, second, s

        return both

    assert_accurate(once("cuda"), once("reference"), x, floor=max(2 * FLOOR[dtype], 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_names_its_limits(op, generator):
    x = operands(op, generator, 1, 2, 65, 8, 8, torch.float32)
    with pytest.raises(RuntimeError, match="N ≤ 64"):
        attention(op, 65, 8, "cuda")(*x)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_graph_and_streams(op, generator):
    """Forward and backward as a CUDA graph, replayed on new numbers, and on two streams at once."""
    f = attention(op, 40, 24, "cuda")
    sets = [operands(op, generator, 3, 2, 40, 24, 24, torch.float32) for _ in range(2)]
    sets = [[x.detach().cuda().requires_grad_() for x in s] for s in sets]

    def both(x):
        out = f(*x)
        return out, *torch.autograd.grad(out.sin().sum(), x)

    truth = [both(x) for x in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    found = []
    for x, stream in zip(sets, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(both(x))
    torch.cuda.synchronize()
    torch.testing.assert_close(found, truth, rtol=0, atol=0)

    static = [x.detach().clone().requires_grad_() for x in sets[0]]
    with torch.cuda.stream(streams[0]):
        both(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both(static)
    for x, want in zip(sets, truth, strict=True):
        for place, number in zip(static, x, strict=True):
            place.data.copy_(number)
        graph.replay()
        torch.testing.assert_close(results, want, rtol=0, atol=0)
