"""Softmax attention on one tile of queries and keys, forward and backward by formula.

Local and sparse attention differ in which tiles exist; inside a tile they are the same:

    S = scale·QKᵀ (−∞ where not allowed),  L = log Σ_j exp S_j,  O = exp(S − L) V
    P = exp(S − L),  Δ = Σ dO∘O,  dV = PᵀdO,  dS = P∘(dO Vᵀ − Δ),  dQ = scale·dS K,  dK = scale·dSᵀQ

Dao 2023, "FlashAttention-2", algorithms 1 and 2. A row that is allowed nothing has L = −∞ and
O = 0, and passes no gradient. Leading dimensions are the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_forward(q, k, v, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (…, n, D), k (…, m, D), v (…, m, Dv), allowed (…, n, m) -> O (…, n, Dv), L (…, n)."""
    s = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
    top = _finite(s.amax(-1, keepdim=True))
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    o = p @ v / torch.where(total == 0, torch.ones_like(total), total)
    return o, (top + total.log()).squeeze(-1)


def tile_backward(do, q, k, v, lse, delta, allowed: Tensor, scale: float) -> tuple[Tensor, ...]:
    """do (…, n, Dv), lse and delta (…, n), the rest as in `tile_forward` -> dq, dk, dv."""
    s = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
    p = (s - _finite(lse)[..., None]).exp()
    ds = p * (do @ v.mT - delta[..., None]) * scale
    return ds @ k, ds.mT @ q, p.mT @ do


def _finite(x: Tensor) -> Tensor:
    """−∞ -> 0, so that −∞ − x is −∞ and never NaN."""
    return x.masked_fill(x == -torch.inf, 0.0)


def empty_outputs(q: Tensor, v: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """o (B, H, N, Dv) token-major and lse (B, H, N), not filled: what a forward op returns."""
    return empty_heads(v), q.new_empty(q.shape[:3], dtype=acc)


def empty_heads(x: Tensor) -> Tensor:
    """Like x (B, H, N, D), token-major, not filled."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)
