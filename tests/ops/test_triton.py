"""The Triton kernels: interpreted on CPU (numbers), compiled for three architectures (resources),
and run where a GPU is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import SUPPORT
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients
from textbook.performer import naive as performer_naive

from tab import linear_attention, orthogonal_projection, performer_attention
from tab.doctor.kernel_launches import distinct, recorded
from tab.doctor.kernel_report import compiled, kernel_report
from tab.ops import OPS

pytest.importorskip("triton")

INTERPRETED = sorted(path.stem for path in (SUPPORT / "interpreted").glob("*.py"))

# Bytes of local memory a thread that are known and borne, by (kernel, arch) or kernel; few
# elsewhere; the larger of Triton 3.6 and 3.8. On an A100, S and dS in float32 exceed the registers.
# The causal kernels of performer hold pairs, features and their shifts beside the sums, and a
# second way for extreme keys. The backward of mla holds K, V, dK and dV: too much for tf32x3 at
# D 64, and for an A100.
SPILLS = {
    ("linear_fused_backward", 80): 512,
    ("mla_forward", 80): 256,
    ("mla_grad_kv", 80): 640,
    ("mla_grad_q", 80): 640,
    ("mla_grad_kv", 90): 192,
    ("mla_grad_kv", 100): 320,
    ("sparse_grad_kv", 80): 192,
    "performer_fused": 512,
    "performer_states": 256,
    "performer_outputs": 640,
    "performer_queries": 448,
    "performer_keys": 1152,
}
FEW = 128


def test_every_launcher_is_interpreted():
    from tab import kernels

    launching = {path.stem for path in Path(kernels.__file__).parent.glob("[!_]*.py")}
    assert {name.removesuffix("_backward") for name in launching} <= set(INTERPRETED)


@pytest.mark.parametrize("op", INTERPRETED)
def test_interpreted(op):
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"interpreted/{op}.py"]
    done = subprocess.run(
        command,
        cwd=SUPPORT,
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
    rows = kernel_report()
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["kernel"] for row in rows} >= launched_kernels()
    for row in rows:
        assert row["shared"] <= row["limit"], row
        assert 0 < row["registers"] <= 255, row
        known = SPILLS.get((row["kernel"], row["arch"]), SPILLS.get(row["kernel"], FEW))
        assert row["spilled"] <= known, row


def launched_kernels() -> set[str]:
    """The kernels that a launcher names: launch(NAME, …"""
    from tab import kernels

    files = Path(kernels.__file__).parent.glob("*.py")
    return {x for file in files for x in re.findall(r"launch\(\s*(\w+), \(", file.read_text())}


def test_compiled_ones():
    """Triton compiles an integer 1 in, as a constant: no kernel may want a tensor there."""
    from tab.kernels import (
        h2o,
        local,
        local_backward,
        moe,
        performer,
        performer_backward,
        sparse,
        sparse_backward,
    )

    x, counts = torch.empty(1, 1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    q, lse = torch.empty(1, 1, 1, 16, device="meta"), torch.empty(1, 1, 1, device="meta")
    window = 1, 1, 1, 1, True, 1.0
    pattern = [torch.empty(n, dtype=torch.int32, device="meta") for n in ((1, 2), 1) * 2]
    pattern += [1, True, 1.0]
    w, z = torch.empty(1, 16, device="meta"), torch.empty(1, 1, 1, device="meta")
    calls = [
        (moe.grouped, x, x[None], counts),
        (moe.grouped_outer, x, x, counts),
        (h2o.choose, x[None, None], x[None, None], None, 1, 0, True, 1, 1.0),
        (local.forward, q, q, q, *window),
        (local_backward.backward, q, q, q, q, q, lse, *window),
        (sparse.forward, q, q, q, *pattern),
        (sparse_backward.backward, q, q, q, q, q, lse, *pattern),
    ]
    for kernel, causal in ((0, True), (1, False)):
        options = *(None,) * 4, kernel, causal
        calls += [(performer.forward, q, q, q, w, *options, 0.0)]
        given = q, None, None, q, q, q, w, q, z[..., None].expand_as(q), z, z, lse
        calls += [(performer_backward.backward, *given, *options)]
    launches = distinct([launch for call in calls for launch in recorded(*call)])
    assert len(launches) == 3 + 6 + 9
    for launch in launches:
        assert compiled("ones", launch, 90)["registers"] > 0


LAUNCHES = [  # B, N, causal -> launches forward, backward
    (1, 64, False, 1, 1),
    (512, 1024, False, 1, 1),  # heads fill the GPU
    (1, 1024, False, 3, 4),
    (1, 1024, True, 3, 6),
]


@pytest.mark.parametrize("b, n, causal, forward, backward", LAUNCHES)
def test_launches_of_performer(b, n, causal, forward, backward):
    from tab.kernels import performer, performer_backward

    q, w = torch.empty(b, 2, n, 16, device="meta"), torch.empty(32, 16, device="meta")
    options = *(None,) * 4, 0, causal
    assert len(recorded(performer.forward, q, q, q, w, *options, 0.0)) == forward
    s, z, lse = q.new_empty(b, 2, 32, 16), q.new_empty(b, 2, 32), q.new_empty(b, 2, n)
    given = q, None, None, q, q, q, w, q, s, z, z, lse
    assert len(recorded(performer_backward.backward, *given, *options)) == backward


# --- on a GPU -------------------------------------------------------------------------------------

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

    def linear(q, k, v, s0=None, z0=None):
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
        return num / den, s.to(acc), z.to(acc)

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "n, d, dv", [(1, 3, 3), (5, 16, 24), (63, 64, 64), (65, 64, 64), (1030, 64, 64), (700, 200, 72)]
)
@pytest.mark.parametrize("op", ["linear", "performer"])
def test_gpu_triton(op, n, d, dv, causal, dtype, generator):
    require(op, "triton")
    x = inputs(op, generator, n, d, dv, dtype, state=n == 65)
    f = attention(op, "triton", d, causal=causal)
    assert_accurate(f, naive(op, d, causal), x, names=NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n, d, dv", [(1, 3, 3), (5, 16, 24), (63, 33, 64), (64, 128, 128)])
@pytest.mark.parametrize("op, backend", RUNS)
def test_gpu_small(op, backend, n, d, dv, dtype, generator):
    require(op, backend)
    x = inputs(op, generator, n, d, dv, dtype, state=n == 63)
    mask = torch.rand(3, n, generator=generator).cuda() > 0.3
    mask[:, 0] = True
    f = attention(op, backend, d, key_mask=mask)
    assert_accurate(f, naive(op, d, key_mask=mask), x, names=NAMES)


@pytest.mark.gpu
def test_gpu_extreme_keys(generator):
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


@pytest.mark.gpu
@pytest.mark.parametrize("op, backend", RUNS)
@pytest.mark.parametrize("how", LAYOUTS)
def test_gpu_layouts(op, backend, how, generator):
    f = attention(op, backend, 32)
    x = [layout(t, how) for t in inputs(op, generator, 50, 32, 32)]
    strided = outputs_and_gradients(f, x)
    plain = outputs_and_gradients(f, [t.contiguous() for t in x])
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("op, backend", RUNS)
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_graph_and_streams(op, backend, causal, generator):
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


@pytest.mark.gpu
@pytest.mark.parametrize("op, backend", RUNS)
def test_gpu_compile(op, backend, generator):
    x, f = inputs(op, generator, 64, 32, 32), attention(op, backend, 32)
    compiled = torch.compile(f, fullgraph=True)
    pairs = outputs_and_gradients(compiled, x), outputs_and_gradients(f, x)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear", "performer"])
def test_gpu_limits(op, generator):
    """Float64 and wide heads go to the reference, or raise where Triton is asked for by name."""
    for dtype, d in ((torch.float64, 16), (torch.float32, 300)):
        x = inputs(op, generator, 20, d, d, dtype)
        assert_accurate(attention(op, "auto", d), naive(op, d), x, floor=1e-5, names=NAMES)
        with pytest.raises(RuntimeError, match='use backend="auto"'):
            attention(op, "triton", d)(*x)
