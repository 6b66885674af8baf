"""What a user would write by hand: each mechanism in a few PyTorch operators.

Tensors are (B, H, N, D). Exact softmax under a mask runs in PyTorch's own fused kernel, which is
the best that a user has. `tab bench` races TAB's ops against these, `tab bench steps` whole models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURES = {"elu1": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


def linear(q, k, v, *, causal: bool = False, feature_map: str = "elu1") -> Tensor:
    """φ(q)ᵀS/φ(q)ᵀz; causal by the N×N weights, for there is no better in plain PyTorch."""
    if feature_map == "softmax":
        q, k, feature_map = q.softmax(-1), k.softmax(-2), "identity"
    fq, fk = FEATURES[feature_map](q), FEATURES[feature_map](k)
    return _normalised(fq, fk, v, causal)


def _normalised(fq, fk, v, causal) -> Tensor:
    if causal:
        scores = (fq @ fk.mT).tril()
        return (scores @ v) / scores.sum(-1, keepdim=True)
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None])


def linformer(x, qkv, e, *, heads: int) -> Tensor:
    """softmax(q (eᵀk)ᵀ/√D) eᵀv with q, k, v from x (B, N, C) by qkv (3C, C); e (N, K). Tokens are
    projected first, which costs less."""
    wq, wk, wv = qkv.chunk(3)
    short = e.mT @ x  # (B, K, C)
    q, k, v = (
        F.linear(y, w).unflatten(-1, (heads, -1)).transpose(1, 2)
        for y, w in ((x, wq), (short, wk), (short, wv))
    )
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


def performer(q, k, v, projection, *, causal: bool = False) -> Tensor:
    """FAVOR+ with one shift for all keys of a head; projection (M, D)."""
    w = projection.to(q.dtype)

    def features(x, shift_over):
        y = (x * x.shape[-1] ** -0.25) @ w.mT - 0.5 * x.shape[-1] ** -0.5 * (x * x).sum(
            -1, keepdim=True
        )
        return (y - y.amax(shift_over, keepdim=True)).exp()

    return _normalised(features(q, -1), features(k, (-1, -2)), v, causal)


def masked(q, k, v, *, mask: Tensor, scale: float | None = None) -> Tensor:
    """local and sparse: a dense mask (N, N) or (H, N, N), True where a pair is seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def chunked_window(q, k, v, *, window: int, causal: bool = False) -> Tensor:
    """Blocks of w queries against three blocks of keys: the usual PyTorch sliding window."""
    w, n = window, q.shape[2]
    pad = -n % w
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    blocks = (n + pad) // w
    around = [F.pad(x, (0, 0, w, w)).unfold(2, 3 * w, w) for x in (k, v)]
    kb, vb = (x.transpose(-1, -2) for x in around)  # (B, H, blocks, 3w, D)
    qb = q.unflatten(2, (blocks, w))
    i = torch.arange(blocks, device=q.device)[:, None, None] * w
    i = i + torch.arange(w, device=q.device)[:, None]
    j = torch.arange(blocks, device=q.device)[:, None, None] * w - w
    j = j + torch.arange(3 * w, device=q.device)
    keep = (i - j <= w) & (j - i <= (0 if causal else w)) & (j >= 0) & (j < n)
    keep = keep | (i >= n)  # padding rows: any key, thrown away below
    o = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=keep)
    return o.flatten(2, 3)[:, :, :n]


def mla(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *, causal: bool = False) -> Tensor:
    """Expand: K_h and V_h of every head are written, then exact attention."""
    h, scale = q_nope.shape[1], (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    k = torch.cat(
        [torch.einsum("bnr,hdr->bhnd", c_kv, w_uk), k_rope[:, None].expand(-1, h, -1, -1)], -1
    )
    v = torch.einsum("bnr,hdr->bhnd", c_kv, w_uv)
    q = torch.cat([q_nope, q_rope], -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


# --- decoding: one new token ----------------------------------------------------------------------


def mla_decode(q_nope, q_rope, cache, w_uk, w_uv) -> Tensor:
    """Absorbed: q_nope (B, H, Dn), cache (B, N, R+Dr) all in use -> (B, H, Dv)."""
    r, scale = w_uk.shape[-1], (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    q = torch.cat([torch.einsum("bhd,hdr->bhr", q_nope, w_uk), q_rope], -1)
    z = (q @ cache.mT * scale).softmax(-1) @ cache[..., :r]  # (B, H, R)
    return torch.einsum("bhr,hvr->bhv", z, w_uv)


def mla_decode_sdpa(q_nope, q_rope, cache, w_uk, w_uv) -> Tensor:
    """The same with the heads as queries of PyTorch's fused kernel, values as wide as keys."""
    r, scale = w_uk.shape[-1], (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    q = torch.cat([torch.einsum("bhd,hdr->bhr", q_nope, w_uk), q_rope], -1)[:, None]
    z = F.scaled_dot_product_attention(q, cache[:, None], cache[:, None], scale=scale)
    return torch.einsum("bhr,hvr->bhv", z[:, 0, :, :r], w_uv)


def linear_decode(q, k, v, s, z) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q, k, v (B, H, 1, D), state S (B, H, D, Dv), z (B, H, D) -> o and the next state."""
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    s, z = s + fk.mT @ v, z + fk[:, :, 0]
    return (fq @ s) / (fq @ z[..., None]), (s, z)
