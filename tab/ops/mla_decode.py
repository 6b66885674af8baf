"""Decoding with multi-head latent attention: one query per sequence against a cache of latents.

Absorbed form (DeepSeek-V2 2024, appendix C): the cache holds [c | k_r] per token and nothing per
head, and every head reads the same rows.

    q̃_h = W_uk,hᵀ q_n,h,  S_h = (q̃_h·c + q_r,h·k_r)·scale,  z_h = softmax(S_h) c,  o_h = W_uv,h z_h
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import accumulate, autocast, shapes
from ._op import Op, choose
from .mla import check
from .mla_forms import probabilities


def decode_reference(q_nope, q_rope, cache, seqlens, w_uk, w_uv, scale):
    """-> o (B, H, Dv), lse (B, H). One query per sequence over its first `seqlens` cache rows."""
    acc, r = accumulate(q_nope), w_uk.shape[-1]
    cached = cache.to(acc)  # (B, Nmax, R+Dr)
    q = torch.einsum("bhd,hdr->bhr", q_nope.to(acc), w_uk.to(acc))
    s = torch.cat([q, q_rope.to(acc)], -1) @ cached.mT * scale  # (B, H, Nmax)
    seen = torch.arange(cache.shape[1], device=cache.device) < seqlens[:, None]  # (B, Nmax)
    s = s.masked_fill(~seen[:, None], -torch.inf)
    lse = s.logsumexp(-1)
    # Rows past the end may hold anything, NaN too, and 0·NaN is NaN.
    z = probabilities(s, lse) @ cached[..., :r].masked_fill(~seen[..., None], 0.0)  # (B, H, R)
    o = torch.einsum("bhr,hvr->bhv", z, w_uv.to(acc))
    return o.to(q_nope.dtype).contiguous(), lse  # one layout from every backend


mla_decode_op = Op(
    "mla_decode",
    "(Tensor q_nope, Tensor q_rope, Tensor cache, Tensor seqlens, Tensor w_uk, Tensor w_uv, "
    "float scale) -> (Tensor o, Tensor lse)",
    decode_reference,
)


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    seqlens: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One new token per sequence against its cache of latents, in the absorbed form.

    Args:
        q_nope: (B, H, Dn); q_rope: (B, H, Dr); w_uk: (H, Dn, R); w_uv: (H, Dv, R).
        cache: (B, Nmax, R+Dr), rows [c | k_r], nothing per head; the new token's row included.
        seqlens: (B,) int32 or int64, rows of the cache in use; above Nmax it counts as Nmax.
            A sequence of length 0 gives o 0 and lse −inf.
        scale: 1/√(Dn + Dr) when None.
        backend: "auto", "reference", "cpp", "triton" or "cuda". The kernels are for inference;
            where a gradient is wanted, "auto" and "reference" run the formula under autograd.

    Returns:
        o (B, H, Dv) in the input's dtype and lse (B, H) in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        RuntimeError: the backend asked for cannot run here, or has no gradient and one is wanted.
    """
    q_nope, q_rope, cache, w_uk, w_uv = autocast(q_nope, q_rope, cache, w_uk, w_uv)
    _check(q_nope, q_rope, cache, seqlens, w_uk, w_uv)
    backend = choose(backend, mla_decode_op, q_nope)
    wants_grad = any(x.requires_grad for x in (q_nope, q_rope, cache, w_uk, w_uv))
    if torch.is_grad_enabled() and wants_grad:
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend={backend!r} of mla_decode has no gradient and an input requires one; "
                'call it under torch.no_grad(), or use backend="reference"'
            )
        backend = "reference"
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else float(scale)
    return mla_decode_op(backend, q_nope, q_rope, cache, seqlens, w_uk, w_uv, scale)


def _check(q_nope, q_rope, cache, seqlens, w_uk, w_uv) -> None:
    rule, r, dr = None, w_uk.shape[-1], q_rope.shape[-1]
    if q_nope.dim() != 3 or q_rope.dim() != 3 or cache.dim() != 3:
        rule = "q_nope (B, H, Dn), q_rope (B, H, Dr), cache (B, Nmax, R+Dr) with rows [c | k_r]"
    elif seqlens.dtype not in (torch.int32, torch.int64) or seqlens.shape != cache.shape[:1]:
        rule = "seqlens (B,) int32 or int64"
    elif seqlens.device != cache.device:
        rule = "one device"
    elif cache.shape[-1] != r + dr:
        rule = f"cache rows of R + Dr = {r} + {dr} numbers"
    if rule:
        tensors = {"q_nope": q_nope, "q_rope": q_rope, "cache": cache, "seqlens": seqlens}
        raise ValueError(f"mla_decode wants {rule}; got {shapes(**tensors, w_uk=w_uk, w_uv=w_uv)}")
    # The rest is as in mla_attention, with one query and Nmax keys.
    latent, rotary = cache.split([r, dr], -1)
    check("mla_decode", q_nope[:, :, None], q_rope[:, :, None], latent, rotary, w_uk, w_uv, True)
