"""What TAB adds to PyTorch's scaled dot-product attention: NaN that is seen. And forward mode."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing import assert_close

import tab
from tab.layers import get_attention
from tab.ops._sdpa import LANES, _kernel, once, padded, pads, sdpa, written

SIZES = (1, 3, LANES - 1, LANES, LANES + 3)


def draw(n: int, dtype: torch.dtype = torch.float32, wide: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, d, generator=generator, dtype=dtype) for d in (8, 8, wide)]


def spoiled(n: int, which: int, at: int | slice, dtype=torch.float32, wide: int = 8):
    x = draw(n, dtype, wide)
    x[which][1, 1, at, 2] = math.nan
    return x


def rows(o: torch.Tensor) -> torch.Tensor:
    return o.isnan().any(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("wide", [8, 5], ids=("flash", "math"))  # which of PyTorch's kernels runs
def test_nan_is_seen_by_whoever_meets_it_and_nobody_else(wide, n, causal, dtype):
    for which in range(3):
        for at in (0, n // 2, slice(None)):
            x = spoiled(n, which, at, dtype, wide)
            o, truth = sdpa(*x, 0.3, causal=causal), written(*x, 0.3, causal=causal)[0]
            assert rows(truth).any()
            assert torch.equal(rows(o), rows(truth)), (which, at)
            fine = ~rows(truth)
            clean = sdpa(*draw(n, dtype, wide), 0.3, causal=causal)
            assert torch.equal(o[0], clean[0])
            assert_close(o[fine], clean[fine])


def test_pytorch_still_hides_it():
    """Where this fails, PyTorch has mended its kernel and `once` may go."""
    x = spoiled(3, 0, 1)
    assert not F.scaled_dot_product_attention(*x).isnan().any()


@pytest.mark.parametrize("causal", [False, True])
def test_what_comes_later_reaches_no_gradient(causal):
    """A value of NaN: the gradients of what came before are those of the prefix alone."""
    n, last = 20, 12
    x = [t.requires_grad_() for t in spoiled(n, 2, last)]
    o = sdpa(*x, 0.3, causal=causal)[:, :, :last]
    assert rows(o)[1, 1].all() != causal
    if causal:
        first = [t.detach()[:, :, :last].clone().requires_grad_() for t in x]
        short = sdpa(*first, 0.3, causal=True)
        assert_close(o, short)
        got = torch.autograd.grad(o.sin().sum(), x)
        for a, b in zip(got, torch.autograd.grad(short.sin().sum(), first), strict=True):
            assert_close(a[:, :, :last], b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(causal, dynamic):
    """Nothing can be looked at: NaN in q and k is seen all the same, without a guard on sizes."""
    torch._dynamo.reset()
    f = torch.compile(
        lambda q, k, v: once(q, k, v, causal=causal), backend="eager", fullgraph=True,
        dynamic=dynamic,
    )  # fmt: skip
    for n in (3, 9, LANES, 40) if dynamic else (3,):
        for which in range(2):
            x = spoiled(n, which, n // 2)
            seen = rows(f(*x))
            assert torch.equal(seen, rows(written(*x, 0.3, causal=causal)[0]))
    assert not f(*draw(3)).isnan().any()


@pytest.mark.parametrize("name", ["self", "multi_head", "linformer"])
def test_layers(name):
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    layer = get_attention(name)(16, seq_len=9)
    assert not layer(x).isnan().any()
    x[1, 4, 3] = math.nan
    assert rows(layer(x)).tolist() == [[False] * 9, [True] * 9]


def w(d: int = 8) -> torch.Tensor:
    return torch.randn(12, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def latent(q, k, v, form):
    c, weights = k[:, 0], v[0, :, :8]
    return tab.mla_attention(q, q, c, c, weights, weights, form=form)


@pytest.mark.parametrize(
    "attention",
    [
        tab.linear_attention,
        lambda q, k, v: tab.performer_attention(q, k, v, w()),
        lambda q, k, v: tab.local_attention(q, k, v, window=2),
        lambda q, k, v: tab.sparse_attention(
            q, k, v, tab.BlockPattern.bigbird(9, heads=2, block_size=2)
        ),
        lambda q, k, v: tab.linformer_attention(q, k, v, w()),
        lambda q, k, v: latent(q, k, v, "fused"),
        lambda q, k, v: latent(q, k, v, "expand"),
        lambda q, k, v: latent(q, k, v, "absorb"),
    ],
    ids=("linear", "performer", "local", "sparse", "linformer", "fused", "expand", "absorb"),
)
def test_forward_mode(attention):
    """Dual numbers, with and without a graph: neither an error nor a tangent that is dropped."""
    x = draw(9, torch.float64)
    _, want = torch.func.jvp(attention, tuple(x), tuple(x))
    for leaf in (False, True):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t.requires_grad_(leaf), t.detach().clone()) for t in x]
            tangent = forward_ad.unpack_dual(attention(*dual)).tangent
        assert_close(tangent, want)
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [(24, 16), (13, 21)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_heads_of_two_sizes_padded_to_one(sizes, scale):
    """As flash kernels want them: zeros change neither output nor gradients."""
    d, dv = sizes
    x = [torch.randn(2, 2, 9, n, dtype=torch.float64, requires_grad=True) for n in (d, d, dv)]
    results = []
    for f in (padded, lambda q, k, v, causal, scale: _kernel(q, k, v, None, causal, scale)):
        o = f(*x, True, scale)
        results.append((o, *torch.autograd.grad(o.sin().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert_close(a, b)


@pytest.mark.parametrize(
    "cuda, dtype, d, dv, seen, wanted",
    [
        (True, torch.bfloat16, 192, 128, None, True),
        (True, torch.bfloat16, 128, 128, None, False),
        (True, torch.bfloat16, 576, 512, None, False),  # longer than flash takes
        (True, torch.float32, 192, 128, None, False),
        (True, torch.bfloat16, 192, 128, torch.ones(9, 9), False),  # flash takes no mask
        (False, torch.bfloat16, 192, 128, None, False),
    ],
)
def test_where_heads_are_padded(cuda, dtype, d, dv, seen, wanted):
    q, v = (SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 2, 9, n)) for n in (d, dv))
    assert pads(q, v, seen) == wanted
