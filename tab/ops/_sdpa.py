"""PyTorch's scaled dot-product attention, with what its kernels lack: higher derivatives, and NaN.

The kernels behind SDPA have no second derivative, and none in forward mode. Where those are asked
for, they are taken of the formula with all its scores (B, H, N, N) written.

On a CPU, PyTorch's flash kernel takes a query all of whose scores are NaN for one that sees
nothing, and gives 0, wherever there are fewer keys than a vector register holds numbers
(pytorch/pytorch issue 141128). And 0·NaN is NaN: in causal attention a NaN reaches the queries
before it. Both are mended here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import transforming
from ._check import accumulate, token_major
from ._softmax import may_look, softmax_forward

FLASH = 256  # the longest head of PyTorch's flash kernel
LANES = 16  # float32 in the widest register, AVX-512's


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, seen: Tensor | None = None,
    causal: bool = False, merged: bool = True,
) -> Tensor:  # fmt: skip
    """softmax(scale·q kᵀ) v; k and v may have one head for all.

    q (B, H, N, D), k (B, H or 1, N, D), v (B, H or 1, N, Dv). Either `seen`, a mask that broadcasts
    to (B, H, N, N), or causal. merged: token-major, as the operators return it.
    """
    if transforming():
        o, _ = written(q, k, v, scale, seen=seen, causal=causal)
        return token_major(o) if merged else o
    h = q.shape[1]
    k, v = (x if x.shape[1] == h else x.expand(-1, h, -1, -1) for x in (k, v))
    o = once(q, k, v, scale, seen=seen, causal=causal)
    if not o.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return token_major(o) if merged else o
    return _Sdpa.apply(o, q, k, v, seen, causal, scale, merged)


def once(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, seen: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's kernel, which can be differentiated once. A NaN that a query meets is in its output
    and, where values can be looked at (`may_look`), in no output of another query."""
    if not (q.is_cpu and seen is None) or _harmless(q, k, v, causal):
        return _kernel(q, k, v, seen, causal, scale)
    hidden = _nan(q, causal, own=True) + _nan(k, causal, own=False)  # (B, H, N, 1)
    if causal and may_look(v):  # what comes later is 0, and NaN from its own row on
        hidden, v = hidden + (v - v).detach().cumsum(-2), v.nan_to_num(0.0, 0.0, 0.0)
        k = k.nan_to_num(0.0, torch.inf, -torch.inf)
    o = _kernel(q, k, v, seen, causal, scale)
    return o + hidden.to(o.dtype)


def _kernel(q, k, v, seen, causal, scale):
    if pads(q, v, seen):
        return padded(q, k, v, causal, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scale)


def pads(q: Tensor, v: Tensor, seen: Tensor | None) -> bool:
    """Whether PyTorch's flash kernel would run but for D ≠ Dv: it wants one size, at most 256. What
    runs instead, memory-efficient, is expected to take twice as long; not measured yet."""
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    sizes = {q.shape[-1], v.shape[-1]}
    return half and seen is None and len(sizes) == 2 and max(sizes) <= FLASH


def padded(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """The same with zeros behind the shorter of D and Dv: they add nothing to scores or sums."""
    d, dv = q.shape[-1], v.shape[-1]
    size = -(-max(d, dv) // 8) * 8
    q, k, v = (F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
    scale = d**-0.5 if scale is None else scale
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)[..., :dv]


def _harmless(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether the kernel does right as it is. Looking costs little; elsewhere sizes decide."""
    if may_look(q):
        few = k.shape[2] < LANES
        total = q.detach().sum().item() if few else 0.0
        total += k.detach().sum().item() if few or causal else 0.0
        total += v.detach().sum().item() if causal else 0.0
        return math.isfinite(total)
    if not torch.compiler.is_compiling():
        return k.shape[2] >= LANES
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(k.shape[2] >= LANES)  # a guard would cost a compilation


def _nan(x: Tensor, causal: bool, own: bool) -> Tensor:
    """NaN for each query (B, H, N or 1, 1) that meets a NaN in x (B, H, N, D), else 0: its own row,
    or any key that it sees."""
    x = x.detach()
    found = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, 0.0).to(x.dtype)
    if own:
        return found
    return found.cumsum(-2) if causal else found.sum(-2, keepdim=True)


def written(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, seen: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sdpa`, by formula: -> o in q's dtype and lse (B, H, N) in the accumulation type."""
    if causal:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    acc = accumulate(q)
    o, lse, _ = softmax_forward(q.to(acc), k.to(acc), v.to(acc), seen, scale)
    return o.to(q.dtype), lse


class _Sdpa(torch.autograd.Function):
    """o, with higher derivatives: first ones pass on to PyTorch's node, through o; a backward pass
    that is to be differentiated itself goes by the formula instead, and nothing through o."""

    @staticmethod
    def forward(ctx, o, q, k, v, seen, causal, scale, merged):
        ctx.save_for_backward(q, k, v, seen)
        ctx.options = causal, scale
        return token_major(o) if merged else o.detach()

    @staticmethod
    def backward(ctx, do):
        if not torch.is_grad_enabled():
            return do, None, None, None, None, None, None, None
        *x, seen = ctx.saved_tensors  # create_graph=True
        causal, scale = ctx.options
        # Views are nodes of their own: q, k and v may be one tensor, or made from each other.
        needed = ctx.needs_input_grad[1:4]
        x = [x.view_as(x) if need else x for x, need in zip(x, needed, strict=True)]
        o, _ = written(*x, scale, seen=seen, causal=causal)
        wanted = [x for x, need in zip(x, needed, strict=True) if need]
        found = iter(torch.autograd.grad(o, wanted, do, create_graph=True))
        return None, *(next(found) if need else None for need in needed), None, None, None, None
