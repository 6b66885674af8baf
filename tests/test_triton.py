"""The Triton kernels: interpreted on CPU (numbers), compiled for three architectures (resources),
and run where a GPU is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients

from tab import kernel_report
from tab.ops.linear import linear_attention, linear_fwd

pytest.importorskip("triton")

# Bytes of local memory a thread that are known and borne, by (kernel, arch) or kernel; few
# elsewhere. On an A100, S and dS in float32 exceed the registers. The causal kernels of performer
# hold pairs, features and their shifts beside the sums, and a second way for extreme keys.
SPILLS = {
    ("fused_backward", 80): 512,
    "performer_fused": 512,
    "performer_states": 256,
    "performer_outputs": 640,
    "performer_queries": 384,
    "performer_keys": 1152,
}
FEW = 128


@pytest.mark.parametrize("op", kernel_report.LAUNCHERS)
def test_interpreted(op):
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"interpreted_{op}.py"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_compiled():
    """Every launch of every launcher, compiled for A100, H100 and B100: fits and does not spill."""
    rows = kernel_report.kernel_report()
    assert {row["arch"] for row in rows} == {80, 90, 100}
    kernels = {row["kernel"] for row in rows}
    assert {"fused", "states", "scan", "outputs", "fused_backward", "grad_q"} <= kernels
    assert {"performer_fused", "performer_outputs", "performer_scan"} <= kernels
    assert {"performer_fused_backward", "performer_queries", "performer_keys"} <= kernels
    assert {"local_forward", "local_grad_q", "local_grad_kv"} <= kernels
    assert {"sparse_forward", "combine", "sparse_grad_q", "sparse_grad_kv", "add_parts"} <= kernels
    for row in rows:
        assert row["shared"] <= row["limit"], row
        assert 0 < row["registers"] <= 255, row
        known = SPILLS.get((row["kernel"], row["arch"]), SPILLS.get(row["kernel"], FEW))
        assert row["spilled"] <= known, row


# --- on a GPU -------------------------------------------------------------------------------------

NAMES = "o S z dq dk dv dS0 dz0"
BACKENDS = ("triton", "cuda")


def attention(backend, **options):
    def f(q, k, v, s0=None, z0=None):
        state = None if s0 is None else (s0, z0)
        options_ = {"initial_state": state, "return_state": True, "backend": backend, **options}
        return linear_attention(q, k, v, **options_)

    return f


def naive(causal=False, key_mask=None):
    """The textbook, elu + 1, all N² weights."""

    def f(q, k, v, s0=None, z0=None):
        fq, fk = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
        if key_mask is not None:
            fk = fk * key_mask[:, None, :, None]
        a = fq @ fk.mT
        a = a.tril() if causal else a
        num, den, s, z = a @ v, a.sum(-1, keepdim=True), fk.mT @ v, fk.sum(-2)
        if s0 is not None:
            num, den = num + fq @ s0.to(q.dtype), den + fq @ z0.to(q.dtype)[..., None]
            s, z = s + s0, z + z0
        acc = torch.promote_types(q.dtype, torch.float32)
        return num / den, (s.to(acc), z.to(acc))

    return f


def inputs(generator, n, d, dv, dtype=torch.float32, b=3, h=2, state=False):
    shapes = [(b, h, n, d), (b, h, n, d), (b, h, n, dv)]
    x = [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    if state:
        x += [torch.rand(b, h, d, dv, generator=generator).cuda()]
        x += [torch.rand(b, h, d, generator=generator).cuda()]
    return x


def require(backend):
    reason = linear_fwd.why_not(backend)
    if reason:
        pytest.fail(f"on a GPU every backend must be there: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "n, d, dv", [(1, 3, 3), (5, 16, 24), (63, 64, 64), (65, 64, 64), (1030, 64, 64), (700, 200, 72)]
)
def test_gpu_triton(n, d, dv, causal, dtype, generator):
    require("triton")
    x = inputs(generator, n, d, dv, dtype, state=n == 65)
    assert_accurate(attention("triton", causal=causal), naive(causal), x, names=NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d, dv", [(1, 3, 3), (5, 16, 24), (63, 33, 64), (64, 128, 128)])
def test_gpu_cuda(n, d, dv, dtype, generator):
    require("cuda")
    x = inputs(generator, n, d, dv, dtype, state=n == 63)
    mask = torch.rand(3, n, generator=generator).cuda() > 0.3
    mask[:, 0] = True
    f = attention("cuda", key_mask=mask)
    assert_accurate(f, naive(key_mask=mask), x, names=NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", LAYOUTS)
def test_gpu_layouts(backend, how, generator):
    x = [layout(t, how) for t in inputs(generator, 50, 32, 32)]
    strided = outputs_and_gradients(attention(backend), x)
    plain = outputs_and_gradients(attention(backend), [t.contiguous() for t in x])
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_graph_and_streams(backend, generator):
    """Captured in a CUDA graph, and run on two streams at once: the same bits as alone."""
    f = attention(backend)
    first, second = inputs(generator, 64, 64, 64), inputs(generator, 64, 64, 64)
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
    bwd = torch.ops.tab_cuda.linear_bwd if backend == "cuda" else torch.ops.tab.linear_bwd

    def step(x):
        o = f(*x)[0]
        return o, *bwd(o, None, None, *x, o, None, None, None, 0, False, 0.0)

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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_compile(backend, generator):
    x = inputs(generator, 64, 32, 32)
    f = torch.compile(attention(backend), fullgraph=True)
    pairs = (outputs_and_gradients(f, x), outputs_and_gradients(attention(backend), x))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_gpu_limits(generator):
    """CUDA C++ names its limits; auto takes everything, float64 and wide heads by the reference."""
    for n, d, options in ((65, 16, {}), (16, 129, {}), (16, 16, {"causal": True})):
        with pytest.raises(RuntimeError, match="N ≤ 64, D and Dv ≤ 128"):
            attention("cuda", **options)(*inputs(generator, n, d, d))
    for dtype, d in ((torch.float64, 16), (torch.float32, 300)):
        x = inputs(generator, 20, d, d, dtype)
        assert_accurate(attention("triton"), naive(), x, floor=1e-5, names=NAMES)
