"""H2O's choices for a whole sequence, and the attention to them (formula: tab/ops/h2o.py).

Queries come in blocks. What block t may attend beside its own tokens is what the cache held when it
came: chosen (B, H, T, budget) int64, token numbers, -1 where there is none. The choices need no
gradient and no v; once they are known, all blocks attend at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate
from ._op import Op
from .h2o_cache import H2OCache


def choose_reference(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    heavy: int,
    recent: int,
    causal: bool,
    block: int,
    scale: float,
) -> Tensor:
    """q, k (B, H, N, D) -> chosen (B, H, ⌈N/block⌉, min(heavy + recent, N))"""
    b, h, n, _ = q.shape
    blocks = -(-n // block)
    shape = b, h, blocks, min(heavy + recent, n)
    if q.device.type == "meta":
        return q.new_empty(shape, dtype=torch.int64)
    chosen = torch.full(shape, -1, device=q.device)
    cache = H2OCache(heavy=heavy, recent=recent, scale=scale)
    tokens = torch.arange(n, device=q.device).expand(b, h, n)[..., None]  # in the place of v
    for t in range(blocks - 1):
        now = slice(t * block, (t + 1) * block)
        mask = None if key_mask is None else key_mask[:, now]
        cache._append(k[:, :, now], tokens[:, :, now], mask)
        cache._credit(cache._probabilities(q[:, :, now], causal), mask)
        cache._evict()
        slots = cache.v[..., 0].masked_fill(cache.position < 0, -1)
        chosen[:, :, t + 1, : slots.shape[-1]] = slots
    return chosen


h2o_choose = Op(
    "h2o_choose",
    "(Tensor q, Tensor k, Tensor? key_mask, int heavy, int recent, bool causal, int block, "
    "float scale) -> Tensor",
    choose_reference,
)


def attend_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    block: int,
    scale: float,
) -> Tensor:
    """Attention to the chosen tokens and the own block; differentiable in q, k, v (B, H, N, ·)."""
    few = q.shape[2] <= 2 * (chosen.shape[-1] + block)
    attend = _with_a_mask if few else _gathered  # a mask N wide, or copies: whichever is smaller
    return attend(q, k, v, chosen, key_mask, causal, block, scale)


def _with_a_mask(q, k, v, chosen, key_mask, causal, block, scale) -> Tensor:
    (b, h, n, _), blocks = q.shape, chosen.shape[2]
    seen = torch.zeros(b, h, blocks, n + 1, dtype=torch.bool, device=q.device)
    seen = seen.scatter(-1, torch.where(chosen < 0, n, chosen), True)[..., :n]
    token = torch.arange(n, device=q.device)
    own = token[:, None] // block == token // block  # (N, N)
    own = own & (token <= token[:, None]) if causal else own
    visible = seen.index_select(2, token // block) | own  # (B, H, N, N)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return masked_attention(q, k, v, visible, scale)


def _gathered(q, k, v, chosen, key_mask, causal, block, scale) -> Tensor:
    (b, _, n, _), blocks = q.shape, chosen.shape[2]
    tail = blocks * block - n
    own = (F.pad(x, (0, 0, 0, tail)).unflatten(2, (blocks, block)) for x in (q, k, v))
    own_q, own_k, own_v = own  # (B, H, T, block, ·)
    here = chosen.clamp(min=0)
    keys = torch.cat([_Gather.apply(k, here), own_k], 3)  # (B, H, T, budget + block, D)
    values = torch.cat([_Gather.apply(v, here), own_v], 3)
    token = torch.arange(blocks * block, device=q.device).view(1, blocks, 1, block)
    real = token < n  # (1 or B, T, 1, block)
    if key_mask is not None:
        real = real & F.pad(key_mask, (0, tail)).view(b, blocks, 1, block)
    near = real.expand(-1, -1, block, -1)
    near = near & (token <= token.mT) if causal else near  # (1 or B, T, block, block)
    far = (chosen >= 0)[..., None, :].expand(-1, -1, -1, block, -1)
    near = near[:, None].expand(*chosen.shape[:2], -1, -1, -1)
    visible = torch.cat([far, near], -1)  # (B, H, T, block, budget + block)
    folded = (x.flatten(1, 2) for x in (own_q, keys, values, visible))
    o = masked_attention(*folded, scale)  # (B, H·T, block, Dv)
    return o.unflatten(1, (-1, blocks)).flatten(2, 3)[:, :, :n]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale) -> Tensor:
    """SDPA; a row that sees nothing gives 0."""
    # Some SDPA kernels answer NaN to a row that sees nothing: let it see all, and cut it.
    blind = ~visible.any(-1, keepdim=True)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind, scale=scale)
    return o.masked_fill(blind, 0.0)


class _Gather(torch.autograd.Function):
    """x (B, H, N, D), where (B, H, T, S) -> x[where] (B, H, T, S, D). Its gradient is summed block
    by block: within one no token comes twice (but for the number 0 in the place of none, which gets
    no gradient), so that no two addends meet and the sums have one order."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.save_for_backward(where)
        ctx.tokens = x.shape[2]
        at = where[..., None].expand(*where.shape, x.shape[-1])
        return x[:, :, None].expand(-1, -1, where.shape[2], -1, -1).gather(3, at)

    @staticmethod
    def backward(ctx, g):
        (where,) = ctx.saved_tensors
        b, h, blocks, _, d = g.shape
        dx = torch.zeros(b, h, ctx.tokens, d, dtype=accumulate(g), device=g.device)
        for t in range(blocks):
            at = where[:, :, t, :, None].expand(-1, -1, -1, d)
            dx = dx.scatter_add(2, at, g[:, :, t].to(dx.dtype))
        return dx.to(g.dtype), None
