"""Normalized gated linear attention as ops of its own, as on a GPU: what the function gives by
gated linear attention on (v, 1), with a CPU taken for a GPU."""

import pytest
import torch
from packs import LENGTHS, cu, results
from torch._dynamo.backends.debugging import aot_eager
from torch.testing import assert_close

from tab import gated_linear_attention
from tab.ops import OPS, gated_linear

T = sum(LENGTHS)
NAME = "gated_linear_normalized"


def draw(b=1, heads=4, shared=2, n=T, d=4, dv=3, states=None, dtype=torch.float64):
    """q, k, v, g, S₀ and z₀; keys and queries as a feature map leaves them."""
    g = torch.Generator().manual_seed(0)
    sizes = (b, heads, n, d), (b, shared, n, d), (b, shared, n, dv), (b, shared, n)
    sizes += ((states or b, shared, d, dv), (states or b, shared, d))
    q, k, v, decay, s0, z0 = (torch.rand(size, generator=g, dtype=dtype) for size in sizes)
    return [q, k, v - 0.5, -decay, s0, z0]


def function(**options):
    def f(q, k, v, g, *state):
        first = state or None
        o, last = gated_linear_attention(
            q, k, v, g, normalize=True, initial_state=first, return_state=True, **options
        )
        return o, *last

    return f


def called(monkeypatch) -> list[str]:
    """The names of the ops that run from now on."""
    names: list[str] = []
    for name, op in OPS.items():
        if name.startswith("gated_linear"):
            below = op.below
            monkeypatch.setattr(
                op, "below", lambda *x, below=below, name=name: names.append(name) or below(*x)
            )
    return names


def on_a_gpu(monkeypatch) -> list[str]:
    monkeypatch.setattr(gated_linear, "_in_kernels", lambda *x: True)
    return called(monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_same_numbers_and_gradients(packed, masked, state, backend, monkeypatch):
    x = draw(states=len(LENGTHS) if packed else None)[: 6 if state else 4]
    x = [t.requires_grad_() for t in x]
    mask = torch.rand(1, T, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    f = function(key_mask=mask, backend=backend, **({"cu_seqlens": cu(LENGTHS)} if packed else {}))
    want = results(f, x)
    names = on_a_gpu(monkeypatch)
    assert_close(results(f, x), want)
    way = f"{NAME}_packed" if packed else NAME
    assert f"{way}_bwd" in names or f"{NAME}_stateless_bwd" in names


@pytest.mark.parametrize("dtype, size", [(torch.float64, 4), (torch.float32, 65)])
def test_what_the_kernels_do_not_take_goes_as_on_a_cpu(dtype, size, monkeypatch):
    names = called(monkeypatch)
    monkeypatch.setattr(gated_linear, "_on_a_gpu", lambda x: True)
    x = draw(n=5, d=size, dtype=dtype)
    assert all(y.isfinite().all() for y in function()(*x)) and {*names} == {"gated_linear_fwd"}


@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_any_order(packed, monkeypatch):
    on_a_gpu(monkeypatch)
    lengths = (2, 0, 3, 1, 1)
    x = draw(n=7, states=len(lengths) if packed else None)
    f = function(**({"cu_seqlens": cu(lengths)} if packed else {}))
    x = [t.requires_grad_() for t in x]
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


@pytest.mark.parametrize("where", ["gpu", "cpu", "channel"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_a_masked_query_holds_is_in_no_gradient(where, what, monkeypatch):
    """o is NaN there, and so is its denominator."""
    if where == "gpu":
        on_a_gpu(monkeypatch)
    q, k, v, g, *_ = draw()
    g = g[..., None].expand(k.shape).contiguous() if where == "channel" else g
    mask = torch.arange(T)[None] != 5
    q[:, :, 5] = what
    x = [t.requires_grad_() for t in (q, k, v, g)]
    o = gated_linear_attention(*x, normalize=True, key_mask=mask)
    assert o[:, :, 5].isnan().all()
    grads = torch.autograd.grad(o[:, :, mask[0]].sin().sum(), x)
    assert all(t.isfinite().all() for t in grads)


@pytest.mark.parametrize("way", ["fwd", "bwd", "stateless_fwd", "stateless_bwd"])
def test_to_pytorch_they_are_ops_like_others(way):
    q, k, v, g, s, z = draw(b=2, n=9, dtype=torch.float32)
    given, rest = (q, k, v, g[..., None]), (None, s, z)
    if way.endswith("bwd"):
        o, den = q[..., :3], q[..., 0].contiguous()
        do = o.transpose(1, 2).contiguous().transpose(1, 2)
        given = do, s, z, *given, do, den
    torch.library.opcheck(OPS[f"{NAME}_{way}"].overload, (*given, *rest))


@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_packed_they_are_too(way):
    q, k, v, g, s, z = draw(states=len(LENGTHS), shared=4, dtype=torch.float32)
    given = q, k, v, g[..., None], None, s, z
    if way == "bwd":
        given = *given, v, s, z, q[..., 0].contiguous(), v, s, z
    torch.library.opcheck(OPS[f"{NAME}_packed_{way}"].overload, (*given, cu(LENGTHS)))


def test_compiled(monkeypatch):
    """One graph with the op in it, for what the kernels take."""
    pytest.importorskip("triton")
    from tab.kernels._launch import load

    load()
    monkeypatch.setattr(gated_linear, "_on_a_gpu", lambda x: True)
    x = [t.requires_grad_() for t in draw(heads=2, dtype=torch.float32)[:4]]
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return aot_eager(graph, inputs)

    def f(*x):
        return gated_linear_attention(*x, normalize=True)

    assert_close(results(torch.compile(f, fullgraph=True, backend=backend), x), results(f, x))
    assert len(graphs) == 1 and f"{NAME}_stateless_fwd" in graphs[0]
