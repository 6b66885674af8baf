"""Second derivatives, torch.func, export and tracing of the softmax ops, on every backend."""

import pytest
import torch
from softmax_cases import BLOCK, FORMS, NAMES, band, latents, mla, qkv, softmax_op, where
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

from tab.functional import mla_decode
from tab.layers import build_attention
from tab.ops.local import local_bwd, local_fwd
from tab.ops.mla import mla_fwd
from tab.ops.mla_decode import mla_decode_op
from tab.ops.mla_forms import max_logits
from tab.ops.sparse import sparse_fwd

DOUBLE = {"dtype": torch.float64}
MLA = [*where("fused"), *(pytest.param(f, "", id=f) for f in FORMS[1:])]


def leaves(tensors):
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize(("name", "backend"), where(*NAMES))
def test_second_order(name, backend):
    n = 2 * BLOCK + 4
    f = softmax_op(name, backend, n)
    x = leaves(qkv(n, b=1, d=3, dv=2, **DOUBLE))
    assert gradcheck(f, x, fast_mode=True)
    assert gradgradcheck(f, x, fast_mode=True)


@pytest.mark.parametrize("outputs", ["o", "lse", "both"])
@pytest.mark.parametrize("options", ["causal", "masked", "both"])
@pytest.mark.parametrize(("form", "backend"), MLA)
def test_second_order_mla(form, backend, options, outputs):
    """Where a mask hides everything from a query, too."""
    chosen = {"return_lse": outputs != "o"}
    if options != "causal":
        chosen["key_mask"] = torch.tensor([[False, True, True, False], [True] * 4])
    if options != "masked":
        chosen["causal"] = True
    attend = mla(form, backend, **chosen)

    def f(*x):
        out = attend(*x)
        if outputs == "o":
            return out
        out = out[0], out[1].clamp(min=-1e3)  # −inf where a query sees nothing: no differences
        return out[1] if outputs == "lse" else out

    x = leaves(latents(4, **DOUBLE))
    assert gradcheck(f, x, fast_mode=True)
    assert gradgradcheck(f, x, fast_mode=True)


@pytest.mark.parametrize(("_", "backend"), where("decode"))
def test_second_order_decode(_, backend):
    qn, qr, c, kr, uk, uv = latents(4, **DOUBLE)
    x = leaves([qn[:, :, 0].clone(), qr[:, :, 0].clone(), torch.cat([c, kr], -1), uk, uv])

    def f(qn, qr, cache, uk, uv):
        return mla_decode(qn, qr, cache, torch.tensor([3, 9]), uk, uv, backend=backend)

    assert gradcheck(f, x, fast_mode=True)
    assert gradgradcheck(f, x, fast_mode=True)


def everything(n=BLOCK + 2):
    """name -> (f of tensors -> one tensor, the tensors, all with B = 2 in front)"""
    found = {name: (softmax_op(name, "auto", n), qkv(n, **DOUBLE)) for name in ("line", "blocks")}
    n = 5
    mask = torch.arange(n) < 4
    for form in FORMS:
        *x, uk, uv = latents(n, **DOUBLE)

        def f(*x, form=form, uk=uk, uv=uv):
            keep = mask.expand(len(x[0]), n)
            o, lse = mla(form, "auto", key_mask=keep, causal=True, return_lse=True)(*x, uk, uv)
            return o * lse[..., None] + mla(form, "auto")(*x, uk, uv)

        found[form] = f, x
    qn, qr, c, kr, uk, uv = latents(n, **DOUBLE)

    def decode(qn, qr, cache):
        return mla_decode(qn, qr, cache, torch.full(cache.shape[:1], 4), uk, uv)[0]

    found["decode"] = decode, [qn[:, :, 0], qr[:, :, 0], torch.cat([c, kr], -1)]
    return found


@pytest.mark.parametrize("name", ["line", "blocks", *FORMS, "decode"])
def test_functional_transforms(name):
    f, x = everything()[name]
    weight = torch.randn(f(*x).shape, generator=torch.Generator().manual_seed(3), **DOUBLE)

    def loss(*x):
        return (f(*x) * weight[: len(x[0])]).sum()

    wanted = torch.autograd.grad(loss(*leaves(x)), x)
    x = [t.detach() for t in x]
    for i, right in enumerate(wanted):
        torch.testing.assert_close(grad(loss, argnums=i)(*x), right)
    pushed = jvp(loss, tuple(x), tuple(torch.ones_like(t) for t in x))[1]
    torch.testing.assert_close(pushed, sum(g.sum() for g in wanted))
    each = vmap(grad(lambda *x: f(*(t[None] for t in x)).square().sum()))(*x)
    torch.testing.assert_close(each, torch.autograd.grad(f(*leaves(x)).square().sum(), x[0])[0])
    x = [t.detach() for t in x]
    small = x[0].clone()

    def first(u):
        return loss(u, *x[1:])

    h = hessian(first)(small).flatten(small.dim()).flatten(0, small.dim() - 1)
    torch.testing.assert_close(h, h.T)
    direction = torch.randn_like(small)
    leaf = small.requires_grad_()
    (g,) = torch.autograd.grad(first(leaf), leaf, create_graph=True)
    (product,) = torch.autograd.grad((g * direction).sum(), leaf)
    torch.testing.assert_close((h @ direction.flatten()).view_as(product), product)


class Learned(torch.nn.Module):
    """f of its tensors, each times a matrix that is learned."""

    def __init__(self, f, tensors):
        super().__init__()
        self.f = f
        self.weights = torch.nn.ParameterList(
            torch.eye(x.shape[-1], dtype=x.dtype) + 0.1 for x in tensors
        )

    def forward(self, *x):
        return self.f(*(t @ w for t, w in zip(x, self.weights, strict=True)))


def export_for_inference(module, x):
    with torch.no_grad():
        return torch.export.export(module, x).module()


@pytest.mark.parametrize(
    "make",
    [
        lambda module, x: torch.export.export(module, x).module(),
        export_for_inference,
        torch.jit.trace,
        lambda module, _: torch.compile(module, fullgraph=True, backend="aot_eager"),
    ],
    ids=["export", "export without gradients", "trace", "compile"],
)
@pytest.mark.parametrize("name", ["line", "blocks", *FORMS, "decode"])
def test_trains_as_eager_does(name, make):
    f, x = everything()[name]
    module, x = Learned(f, x), tuple(x)
    module(*x).square().sum().backward()
    wanted = [w.grad.clone() for w in module.weights]
    module.zero_grad()
    made = make(module, x)
    made(*x).square().sum().backward()
    given = [p.grad for _, p in sorted(made.named_parameters())]
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["local", "sparse"])
def test_layer_exported_for_training(name):
    torch.manual_seed(0)
    layer, x = build_attention(name, 16, seq_len=16), torch.randn(2, 16, 16)
    layer(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    exported = torch.export.export(layer, (x,)).module()
    exported(x).square().sum().backward()
    given = {n: p.grad for n, p in exported.named_parameters() if p.grad is not None}
    assert given.keys() == wanted.keys()
    for n, gradient in wanted.items():
        torch.testing.assert_close(given[n], gradient)


def test_opcheck():
    n = BLOCK + 2
    x, w = leaves(qkv(n)), leaves(latents(n))
    blocks, keep = band(n).tensors, torch.arange(n).expand(2, n) < 7
    qn, qr, c, kr, uk, uv = w
    cache = torch.cat([c, kr], -1).detach().requires_grad_()
    one = qn[:, :, 0].detach().requires_grad_(), qr[:, :, 0].detach().requires_grad_()
    for op, args in (
        (local_fwd, (*x, None, None, 3, 2, 0, 0, False, 0.5, 0.0)),
        (sparse_fwd, (*x, *blocks, None, None, BLOCK, True, 0.5, 0.0)),
        (mla_fwd, (*w, keep, 0.5, True)),
        (mla_decode_op, (*one, cache, torch.tensor([3, 9]), uk, uv, 0.5)),
    ):
        torch.library.opcheck(op.overload, args)


def test_backward_ops_are_closed_to_second_derivatives():
    x = leaves(qkv(9))
    o, lse = local_fwd("auto", *x, None, None, 1, 1, 0, 0, False, 0.5, 0.0)
    dq, *_ = local_bwd(
        "auto", torch.ones_like(o), *x, o, lse, None, None, 1, 1, 0, 0, False, 0.5, 0.0
    )
    with pytest.raises(NotImplementedError, match="local_bwd has no derivative of its own"):
        dq.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_max_logits_carries_no_gradient(form):
    o, peak = mla(form, "auto", return_max_logits=True)(*leaves(latents(5)))
    assert o.requires_grad
    assert not peak.requires_grad
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    assert not max_logits(q, q, 0.5).requires_grad
