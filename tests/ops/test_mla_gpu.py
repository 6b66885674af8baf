"""The Triton kernels of `mla` where a GPU is; on CPU they are interpreted (interpreted/mla.py)."""

import pytest
import torch
from proof import LAYOUTS, assert_accurate, outputs_and_gradients
from textbook.mla import NAMES, operands, ours, textbook

from tab.functional import mla_attention, mla_decode
from tab.ops.mla import mla_bwd, mla_fwd
from tab.ops.mla_decode import mla_decode_op

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [  # (B, H, N, Dn, Dr, R, Dv), causal: one token, the study's, several tiles, the widest
    ((2, 3, 1, 4, 2, 3, 5), False),
    ((3, 8, 64, 48, 16, 128, 64), False),
    ((3, 8, 64, 48, 16, 128, 64), True),
    ((2, 3, 65, 33, 4, 40, 70), False),
    ((1, 4, 300, 128, 64, 512, 128), True),
    ((1, 2, 70, 256, 128, 64, 200), True),
]


def fused(**options):
    return ours("fused", backend="triton", **options)


def on_gpu(size, generator, dtype=torch.float32, how="contiguous"):
    return [x.cuda() for x in operands(size, generator, dtype, how)]


def test_there():
    for op in (mla_fwd, mla_bwd, mla_decode_op):
        assert op.why_not("triton") is None, f"on a GPU: {op.why_not('triton')}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, causal", CASES, ids=str)
def test_sizes(size, causal, dtype, generator):
    x = on_gpu(size, generator, dtype)
    assert_accurate(fused(causal=causal), on_device(textbook(causal)), x, names=NAMES)


def on_device(f):
    """The textbook builds its causal mask on the default device."""

    def run(*x):
        with torch.device(x[0].device):
            return f(*x)

    return run


def test_mask_and_peak_like_the_reference(generator):
    x = on_gpu((3, 2, 70, 8, 4, 6, 5), generator)
    mask = torch.rand(3, 70, generator=generator).cuda() > 0.4
    mask[1] = False
    options = {"key_mask": mask, "causal": True, "form": "fused", "return_max_logits": True}
    given, wanted = (
        mla_attention(*x, **options, return_lse=True, backend=backend)
        for backend in ("triton", "reference")
    )
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, causal", CASES[1:5:2], ids=str)
def test_capped_and_biased(size, causal, dtype, generator):
    x, slopes = on_gpu(size, generator, dtype), torch.linspace(0.02, 0.3, size[1]).cuda()
    truth = on_device(textbook(causal, softcap=2.0, slopes=slopes))
    given = fused(causal=causal, softcap=2.0, alibi=slopes)
    assert_accurate(given, truth, x, names=NAMES)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(how, generator):
    x = on_gpu((2, 2, 50, 16, 8, 24, 16), generator, how=how)
    plain = [t.contiguous() for t in x]
    pairs = outputs_and_gradients(fused(), x), outputs_and_gradients(fused(), plain)
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)


def test_graph(generator):
    """Captured in a CUDA graph, then replayed on other inputs: the same bits as alone."""
    first, second = (on_gpu((4, 4, 64, 48, 16, 64, 64), generator) for _ in range(2))
    lengths = torch.tensor([0, 3, 64, 40], dtype=torch.int32, device="cuda")

    def step(*x):
        o, lse, peak = torch.ops.tab.mla_fwd(*x, None, 0.1, False)
        grads = torch.ops.tab.mla_bwd(o, None, *x, o, lse, None, 0.1, False)
        cache = torch.cat(x[2:4], -1)
        token = mla_decode(x[0][:, :, 0], x[1][:, :, 0], cache, lengths, x[4], x[5])
        return o, lse, peak, *grads, *token

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
    x = on_gpu((2, 3, 64, 16, 8, 24, 16), generator)
    compiled = torch.compile(fused(causal=True), fullgraph=True)
    pairs = outputs_and_gradients(compiled, x), outputs_and_gradients(fused(causal=True), x)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "b, h, n, dn, dr, r, dv", [(4, 3, 300, 5, 4, 7, 6), (2, 128, 3000, 128, 64, 512, 128),
                               (1, 17, 5000, 32, 16, 576, 40), (64, 16, 100, 64, 0, 200, 64)]
)  # fmt: skip
def test_decode(b, h, n, dn, dr, r, dv, dtype, generator):
    """Ragged lengths, an empty sequence, rows past the end that hold NaN."""
    shapes = (b, h, dn), (b, h, dr), (b, n, r + dr), (h, dn, r), (h, dv, r)
    x = [torch.randn(s, generator=generator) / (r**0.5 if i > 2 else 1)
         for i, s in enumerate(shapes)]  # fmt: skip
    qn, qr, cache, uk, uv = (t.to("cuda", dtype) for t in x)
    lengths = torch.randint(0, n + 9, (b,), generator=generator).cuda()
    lengths[0] = 0 if b > 1 else n
    exact = mla_decode(
        *(t.double() for t in (qn, qr, cache)), lengths, uk.double(), uv.double(),
        backend="reference",
    )  # fmt: skip
    cache = cache.masked_fill(torch.arange(n, device="cuda")[:, None] >= lengths[:, None, None],
                              torch.nan)  # fmt: skip
    given = mla_decode(qn, qr, cache, lengths, uk, uv, backend="triton")
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for a, truth in zip(given, exact, strict=True):
        torch.testing.assert_close(a.double(), truth, rtol=tolerance, atol=tolerance)
