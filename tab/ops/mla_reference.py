"""Multi-head latent attention, fused, by formula (tab/ops/mla.py), in PyTorch operators: one head's
keys and values at a time."""

from __future__ import annotations

import torch

from ._check import accumulate, token_major
from ._softmax import alibi, quiet, row_sums, softmax_backward, softmax_forward
from .mla_forms import real_tokens, visible


def _operands(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask):
    """All in the accumulation type: q = [q_n q_r] (B, H, N, Dn+Dr), then the others; what a masked
    token holds is 0."""
    acc = accumulate(q_nope)
    c, kr, uk, uv = (x.to(acc) for x in (*real_tokens(key_mask, c_kv, k_rope), w_uk, w_uv))
    return quiet(key_mask, torch.cat([q_nope, q_rope], -1)).to(acc), c, kr, uk, uv


def _keys(h, c, kr, uk, uv):
    """K = [W_uk,h c, k_r] (B, N, Dn+Dr) and V (B, N, Dv) of head h."""
    return torch.cat([c @ uk[h].mT, kr], -1), c @ uv[h].mT


def _bias(slopes, h, i):
    """ALiBi's of head h, (N, N), where there are slopes."""
    return None if slopes is None else alibi(slopes[h], i[:, None], i)


def forward_reference(
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask, scale, causal, softcap=0.0, slopes=None
):  # fmt: skip
    """-> o (B, H, N, Dv), lse (B, H, N), max_logits (B, H), the last two in the accumulation type.

    lse_i = log Σ_j exp(S_ij). A query that sees no key has lse −inf and o 0. max_logits is the
    largest S_ij in use: j visible to i, and i a real token too where there is a key_mask.
    softcap, slopes (H,): bent scores, c·tanh(S/c) − m_h·|i − j|.
    """
    q, *shared = _operands(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask)
    seen = visible(key_mask, q.shape[2], causal, q.device)
    heads, i = [], torch.arange(q.shape[2], device=q.device)
    for h in range(q.shape[1]):
        tile = q[:, h], *_keys(h, *shared)
        heads.append(softmax_forward(*tile, seen, scale, softcap, _bias(slopes, h, i)))
    o, lse, peak = (torch.stack(x, 1) for x in zip(*heads, strict=True))
    if key_mask is not None:
        peak = peak.masked_fill(~key_mask[:, None], -torch.inf)
    peak = peak.amax(-1) if q.shape[2] else peak.new_full(q.shape[:2], -torch.inf)
    return token_major(o.to(q_nope.dtype)), lse, peak


def backward_reference(
    do, dlse, q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, o, lse, key_mask, scale, causal,
    softcap=0.0, slopes=None,
):  # fmt: skip
    """-> dq_n, dq_r, dc, dk_r, dW_uk, dW_uv. Per head, with P = exp(S − lse) recomputed:

    Δ = Σ do·o − dlse,  dS = scale·P∘(do·vᵀ − Δ),  dq_n = dS k,  dq_r = dS k_r,
    dk = dSᵀ q_n,  dv = Pᵀ do,  dc = Σ_h(dk W_uk,h + dv W_uv,h),  dk_r = Σ_h dSᵀ q_r,
    dW_uk,h = Σ_b dkᵀ c,  dW_uv,h = Σ_b dvᵀ c
    """
    q, *shared = _operands(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask)
    c, _, uk, uv = shared
    do, dn = do.to(q.dtype), q_nope.shape[-1]
    delta = row_sums(do, o.to(q.dtype))  # (B, H, N)
    delta = delta if dlse is None else delta - dlse
    seen = visible(key_mask, q.shape[2], causal, q.device)
    dqn, dqr, duk, duv, dc, dkr = [], [], [], [], 0, 0
    i = torch.arange(q.shape[2], device=q.device)
    for h in range(q.shape[1]):
        tile = do[:, h], q[:, h], *_keys(h, *shared), lse[:, h], delta[:, h]
        dq, dk, dv = softmax_backward(*tile, seen, scale, softcap, _bias(slopes, h, i))
        dk, dkr_h = dk[..., :dn], dk[..., dn:]
        dqn.append(dq[..., :dn])
        dqr.append(dq[..., dn:])
        dc, dkr = dc + dk @ uk[h] + dv @ uv[h], dkr + dkr_h
        duk.append((dk.mT @ c).sum(0))  # (Dn, R)
        duv.append((dv.mT @ c).sum(0))  # (Dv, R)
    dqn, dqr = (torch.stack(x, 2).to(q_nope.dtype).transpose(1, 2) for x in (dqn, dqr))
    rest = dc, dkr, torch.stack(duk), torch.stack(duv)
    return dqn, dqr, *(x.to(q_nope.dtype) for x in rest)


def bent_forward_reference(*args):
    """The same in the order of the op, whose tensors come first."""
    *operands, slopes, scale, causal, softcap = args
    return forward_reference(*operands, scale, causal, softcap, slopes)


def bent_backward_reference(*args):
    """The same, too."""
    *operands, slopes, scale, causal, softcap = args
    return backward_reference(*operands, scale, causal, softcap, slopes)
