"""The forms of multi-head latent attention that compose PyTorch's operators, and what they share.

"expand" writes K_h = W_uk,h c and V_h = W_uv,h c for every head. "absorb" moves both matrices to
the query's side, q̃_h = W_uk,hᵀ q_n,h and o_h = W_uv,h z_h, and attends among the latents: one key
and value head for all (DeepSeek-V2 2024, appendix C). Both run SDPA and differentiate by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate, full_precision

CHUNK = 256  # queries whose scores `max_logits` holds at once


def hidden(key_mask: Tensor | None, n: int, causal: bool, device: torch.device) -> Tensor | None:
    """True where query i must not see key j: (B, N, N), (B, 1, N), (N, N), or None for nowhere."""
    hide = None if key_mask is None else ~key_mask[:, None, :]
    if causal:
        later = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        hide = later if hide is None else hide | later
    return hide


def probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """exp(S − lse); all zeros in a row that sees no key."""
    return (s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()


def expand(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, scale, causal, key_mask, want_lse, want_peak):
    """-> o (B, H, N, Dv), lse (B, H, N) or None, max_logits (B, H) or None"""
    c = c_kv[:, None]  # (B, 1, N, R)
    k_nope, v = c @ w_uk.mT, c @ w_uv.mT  # (B, H, N, Dn), (B, H, N, Dv)
    shared = k_rope[:, None].expand(-1, q_nope.shape[1], -1, -1)
    q, k = torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, shared], -1)
    return _attention(q, k, v, scale, causal, key_mask, want_lse, want_peak)


def absorb(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, scale, causal, key_mask, want_lse, want_peak):
    """-> as `expand`"""
    q = torch.cat([q_nope @ w_uk, q_rope], -1)  # (B, H, N, R+Dr)
    k = torch.cat([c_kv, k_rope], -1)[:, None]  # (B, 1, N, R+Dr)
    z, *rest = _attention(q, k, c_kv[:, None], scale, causal, key_mask, want_lse, want_peak)
    return z @ w_uv.mT, *rest  # z (B, H, N, R)


def _attention(q, k, v, scale, causal, key_mask, want_lse, want_peak):
    """softmax(scale·q kᵀ) v; k and v may have one head for all.

    SDPA gives no lse: where that is wanted, the scores (B, H, N, N) are written.
    """
    peak = max_logits(q, k, scale, causal=causal, key_mask=key_mask) if want_peak else None
    if want_lse:
        with full_precision(q):
            return *_written_scores(q, k, v, scale, causal, key_mask), peak
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if key_mask is None:
        options = {"is_causal": causal}
    else:
        options = {"attn_mask": ~hidden(key_mask, q.shape[2], causal, q.device)[:, None]}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **options), None, peak


def _written_scores(q, k, v, scale, causal, key_mask):
    acc = accumulate(q)
    s = q.to(acc) @ k.to(acc).mT * scale  # (B, H, N, N)
    hide = hidden(key_mask, q.shape[2], causal, q.device)
    if hide is None:
        return (s.softmax(-1) @ v.to(acc)).to(q.dtype), s.logsumexp(-1)
    hide = hide if key_mask is None else hide[:, None]  # (N, N) or (B, 1, 1 or N, N)
    # The softmax of a row that sees no key has no gradient: such a row is left whole, then zeroed.
    blind = hide.all(-1, keepdim=True)
    s = s.masked_fill(hide & ~blind, -torch.inf)
    p, lse = s.softmax(-1).masked_fill(blind, 0.0), s.logsumexp(-1)
    return (p @ v.to(acc)).to(q.dtype), lse.masked_fill(blind[..., 0], -torch.inf)


@torch.no_grad()
def max_logits(
    q: Tensor, k: Tensor, scale: float, *, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The largest scale·q_i·k_j with j visible to i and both real tokens, (B, H); no N×N scores.

    q (B, H, N, D), k (B, H or 1, N, D), key_mask (B, N).
    """
    acc, n, parts = accumulate(q), q.shape[2], []
    hide = hidden(key_mask, n, causal, q.device)
    if key_mask is not None:
        hide = (hide | ~key_mask[..., None])[:, None]  # (B, 1, N, N)
    with full_precision(q):
        for start in range(0, n, CHUNK):
            rows = slice(start, start + CHUNK)
            s = q[:, :, rows].to(acc) @ k.to(acc).mT * scale  # (B, H, CHUNK, N)
            s = s if hide is None else s.masked_fill(hide[..., rows, :], -torch.inf)
            parts.append(s.amax((-2, -1)))
    return torch.stack(parts).amax(0)
