"""PyTorch's scaled dot-product attention, with the derivatives that its kernels lack.

The kernels behind SDPA have no second derivative, and none in forward mode. Where those are asked
for, they are taken of the formula with all its scores (B, H, N, N) written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate
from ._tile import tile_forward


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, seen: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale·q kᵀ) v; k and v may have one head for all.

    q (B, H, N, D), k (B, H or 1, N, D), v (B, H or 1, N, Dv). Either `seen`, a mask that broadcasts
    to (B, H, N, N), or causal.
    """
    if torch._C._are_functorch_transforms_active():
        return written(q, k, v, scale, seen=seen, causal=causal)[0]
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not wants_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _kernel(q, k, v, seen, causal, scale)
    return _Sdpa.apply(q, k, v, seen, causal, scale)


def written(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, seen: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sdpa`, by formula: -> o in q's dtype and lse (B, H, N) in the accumulation type."""
    if causal:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    acc = accumulate(q)
    o, lse, _ = tile_forward(q.to(acc), k.to(acc), v.to(acc), seen, scale)
    return o.to(q.dtype), lse


def _kernel(q, k, v, seen, causal, scale):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scale)


class _Sdpa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seen, causal, scale):
        ctx.save_for_backward(q, k, v, seen)
        ctx.options = causal, scale
        ctx.graph = _Sdpa.first_order(q, k, v, seen, causal, scale)
        return ctx.graph[1].detach()

    @staticmethod
    def first_order(q, k, v, *options):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return leaves, _kernel(*leaves, *options)

    @staticmethod
    def backward(ctx, do):
        q, k, v, seen = ctx.saved_tensors
        causal, scale = ctx.options
        if torch.is_grad_enabled():  # create_graph=True
            # Views are nodes of their own: q, k and v may be one tensor, or made from each other.
            x = [
                x.view_as(x) if need else x
                for x, need in zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
            ]
            o, _ = written(*x, scale, seen=seen, causal=causal)
            wanted = [x for x in x if x.requires_grad]
            found = iter(torch.autograd.grad(o, wanted, do, create_graph=True))
            return *(next(found) if x.requires_grad else None for x in x), None, None, None
        # Used once, so that its memory is free; a second pass through a kept graph makes it again.
        graph, ctx.graph = ctx.graph, None
        leaves, o = graph or _Sdpa.first_order(q, k, v, seen, causal, scale)
        return *torch.autograd.grad(o, leaves, do), None, None, None
