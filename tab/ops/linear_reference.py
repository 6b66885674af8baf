"""Linear attention by formula (tab/ops/linear.py), in PyTorch operators.

A column of ones is appended to v: then S carries z as its last column, and the last column of
φ(q)ᵀS is the denominator. A row whose denominator is 0 gives 0 and passes no gradient. Causal, the
tokens come in chunks: scores within a chunk, and the state of all chunks before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate, answered, real, token_major
from ._softmax import empty_heads, empty_outputs, weigh

CHUNK = 64  # tokens whose causal scores the reference holds at once
BLOCK = 1024  # tokens that the reference adds up in one running sum


def feature(x: Tensor, feature_map: int) -> Tensor:
    """φ(x)"""
    if feature_map == 0:
        return F.elu(x) + 1
    return F.relu(x) if feature_map == 1 else x


def feature_slope(x: Tensor, feature_map: int) -> Tensor:
    """φ'(x)"""
    if feature_map == 0:
        return torch.where(x > 0, torch.ones_like(x), x.exp())
    return (x > 0).to(x.dtype) if feature_map == 1 else torch.ones_like(x)


def with_ones(v: Tensor) -> Tensor:
    """(…, Dv) -> (…, Dv+1)"""
    return F.pad(v, (0, 1), value=1.0)


def join(s: Tensor | None, z: Tensor | None) -> Tensor | float:
    """S (B, H, D, Dv) and z (B, H, D) as one (B, H, D, Dv+1); 0 where there are none."""
    return 0.0 if s is None or z is None else torch.cat([s, z[..., None]], -1)


def chunks(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, H, ⌈N/CHUNK⌉, CHUNK, D), padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % CHUNK)).unflatten(-2, (-1, CHUNK))


def merge(x: Tensor, n: int) -> Tensor:
    """The inverse of `chunks`."""
    return x.flatten(2, 3)[:, :, :n]


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Over dim 2 of x (B, H, c, D, Dv+1). Not cumsum − x: that leaks later tokens by rounding."""
    return F.pad(x.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))


def lower(scores: Tensor, v: Tensor) -> Tensor:
    """Σ_{j≤i} scores_ij v_j. A NaN or ∞ in v, which 0 · would not hide from earlier rows, counts as
    NaN from its own row on."""
    return scores.tril() @ v.nan_to_num(0.0, 0.0, 0.0) + (v - v).cumsum(-2)


def token_sum(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy over the tokens, (B, H, N, D) and (B, H, N, E) -> (B, H, D, E), in blocks: one float32
    running sum over 2²⁰ equal terms was 0.5 % off."""
    if x.shape[2] <= BLOCK:
        return x.mT @ y
    x, y = (F.pad(t, (0, 0, 0, -t.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)) for t in (x, y))
    return (x.mT @ y).sum(2)


def _operands(q, k, v, key_mask, feature_map):
    """φ(q), φ(k) with masked tokens at 0, and v with its ones, all in the accumulation type."""
    acc = accumulate(q)
    k, v = real(key_mask, k, v)
    fq, fk = feature(q.to(acc), feature_map), feature(k.to(acc), feature_map)  # (B, H, N, D)
    (fk,) = real(key_mask, fk)
    return fq, fk, with_ones(v.to(acc))  # (B, H, N, Dv+1)


def _sums(fq, fk, v1, state, causal, total=None):
    """φ(q)ᵀ[S z] (B, H, N, Dv+1), the state each chunk (or everyone) sees, and the final state,
    which is not summed again when `total` gives it."""
    if not causal:
        total = token_sum(fk, v1) + state if total is None else total  # (B, H, D, Dv+1)
        return fq @ total, total, total
    cq, ck, cv = chunks(fq), chunks(fk), chunks(v1)
    sums = ck.mT @ cv  # (B, H, c, D, Dv+1)
    total = sums.sum(2) + state if total is None else total
    state = state[:, :, None] if isinstance(state, Tensor) else state
    before = exclusive_cumsum(sums) + state
    out = cq @ before + lower(cq @ ck.mT, cv)
    return merge(out, fq.shape[2]), before, total


def inverse(den: Tensor) -> Tensor:
    """1/den, 0 where den is 0; replaced before it divides, for 1/0 has the gradient NaN."""
    nothing = den == 0
    return (1 / den.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def forward_reference(q, k, v, key_mask, s0, z0, feature_map, causal, eps):
    """-> o (B, H, N, Dv), S (B, H, D, Dv), z (B, H, D), the two last in the accumulation type."""
    if q.is_meta:  # shapes need no chunks, and so no guards on N
        o, lse = empty_outputs(q, v, accumulate(q))
        z = lse.new_empty(*q.shape[:2], q.shape[3])
        return o, z.new_empty(*z.shape, v.shape[3]), z
    fq, fk, v1 = _operands(q, k, v, key_mask, feature_map)
    out, _, total = _sums(fq, fk, v1, join(s0, z0), causal)
    o = out[..., :-1] * inverse(out[..., -1:] + eps)
    return token_major(o.to(v.dtype)), total[..., :-1].contiguous(), total[..., -1].contiguous()


def backward_reference(do, ds, dz, q, k, v, o, s, z, key_mask, s0, z0, feature_map, causal, eps):
    """-> dq, dk, dv, dS₀, dz₀; o, S, z are the forward pass's.
    With g = do/den, r = -g·o, g' = [g r], v' = [v 1], T = [S z]:

    dφ(q_i) = T_i g'_i,  dT_j = dT_N + Σ_{i≥j} φ(q_i) g'_iᵀ,
    dφ(k_j) = dT_j v'_j,  dv'_j = dT_jᵀ φ(k_j)
    """
    if q.is_meta:
        return *map(empty_heads, (q, k, v)), torch.empty_like(s), torch.empty_like(z)
    acc, n = accumulate(q), q.shape[2]
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    fq, fk, v1 = _operands(q, k, v, key_mask, feature_map)
    out, before, _ = _sums(fq, fk, v1, join(s0, z0), causal, join(s, z))
    g = do.to(acc) * inverse(out[..., -1:] + eps)
    g1 = torch.cat([g, -(g * o.to(acc)).sum(-1, keepdim=True)], -1)  # (B, H, N, Dv+1)
    last = join(ds, dz)
    if causal:
        cq, ck, cv, cg = chunks(fq), chunks(fk), chunks(v1), chunks(g1)
        sums = cq.mT @ cg  # (B, H, c, D, Dv+1)
        last = last[:, :, None] if isinstance(last, Tensor) else last
        after = exclusive_cumsum(sums.flip(2)).flip(2) + last
        scores, dscores = (cq @ ck.mT).tril(), (cg @ cv.mT).tril()
        seen = torch.ones_like(scores, dtype=torch.bool).tril()
        dfq = merge(cg @ before.mT + weigh(dscores, ck, seen), n)
        dfk = merge(cv @ after.mT + weigh(dscores.mT, cq, seen.mT), n)
        dv1 = merge(ck @ after + weigh(scores.mT, cg, seen.mT), n)
        first = after[:, :, 0] + sums[:, :, 0]
    else:
        first = token_sum(fq, g1) + last  # (B, H, D, Dv+1)
        dfq, dfk, dv1 = g1 @ before.mT, v1 @ first.mT, fk @ first
    (dfk,) = real(key_mask, dfk)
    dq = dfq * feature_slope(q.to(acc), feature_map)
    dk = dfk * feature_slope(k.to(acc), feature_map)
    grads = (x.to(like.dtype) for x, like in ((dq, q), (dk, k), (dv1[..., :-1], v)))
    return *map(token_major, grads), first[..., :-1].contiguous(), first[..., -1].contiguous()
