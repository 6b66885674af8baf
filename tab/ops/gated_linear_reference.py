"""Gated linear attention by formula (tab/ops/gated_linear.py), in PyTorch operators.

The tokens come in chunks: pairs within a chunk, and the state of all chunks before it. `g` is the
log decay, (…, T, 1) or (…, T, D) over a run of T tokens. Every exponent is a sum over the tokens
between two, formed as such and never as a difference of two longer sums: that would lose digits
behind a strong decay, and be NaN behind one of −∞. No decay above 1 means no exponent above 0, so
nothing overflows, however strong the decay and however many the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate, answered, real, token_major
from ._softmax import empty_heads, weigh
from .linear_reference import lower, merge
from .performer_reference import levels

CHUNK = 64  # most tokens whose pairs the reference holds at once; a power of two

# --- sums of g, and their transposes, along the tokens --------------------------------------------


def until(g: Tensor) -> Tensor:
    """Σ_{t≤i} g_t: what decays from before the run until token i has been."""
    return g.cumsum(-2)


def after(g: Tensor) -> Tensor:
    """Σ_{t>j} g_t: what decays from token j until the end of the run."""
    return until_t(F.pad(g[..., 1:, :], (0, 0, 0, 1)))


def until_t(x: Tensor) -> Tensor:
    """Σ_{i≥t} x_i, the gradient in g_t where x is that in `until`."""
    return x.flip(-2).cumsum(-2).flip(-2)


def after_t(x: Tensor) -> Tensor:
    """Σ_{j<t} x_j, the same for `after`."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def between(g: Tensor) -> Tensor:
    """(…, T, 1) -> (…, T, T): Σ_{j<t≤i} g_t, and −∞ where j > i"""
    t = g.shape[-2]
    seen = torch.ones(t, t, dtype=torch.bool, device=g.device).tril()
    sums = g.expand(*g.shape[:-1], t).masked_fill(~seen.tril(-1), 0.0).cumsum(-2)
    return sums.masked_fill(~seen, -torch.inf)


def like(g: Tensor, x: Tensor) -> Tensor:
    """A gradient (…, D) in the decay of each channel, as one in g."""
    return x if g.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)


# --- pairs within a chunk -------------------------------------------------------------------------
# One decay for all channels is a factor of each score. A decay for each channel cannot be taken out
# of the product over channels, so the pairs come in log₂T levels: at level h, in each run of 2h
# tokens, the queries of the right half read the keys of the left half, both decayed from or to the
# place where the halves meet. Every pair j < i meets at exactly one level.


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """(…, T, D) -> the left and right halves (…, T/2h, h, D) of its runs of 2h tokens."""
    return x.unflatten(-2, (-1, 2, h)).unbind(-3)


def whole(left: Tensor, right: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return torch.stack((left, right), -3).flatten(-4, -2)


def meeting(q: Tensor, k: Tensor, g: Tensor, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right queries and left keys of level h, decayed, and their decays."""
    left, right = halves(g, h)
    eq, ek = until(right).exp(), after(left).exp()
    return halves(q, h)[1] * eq, halves(k, h)[0] * ek, eq, ek


def scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """P (…, T, T), P_ij = Σ_d q_id k_jd e^(Σ_{j<t≤i} g_td) for j ≤ i, else 0"""
    if g.shape[-1] == 1:
        return ((q @ k.mT) * between(g).exp()).tril()
    p = (q * k).sum(-1)[..., None, None]  # (…, T, 1, 1): runs of one token
    for h in levels(q.shape[-2]):
        left, right = p.unflatten(-3, (-1, 2)).unbind(-3)  # (…, T/2h, h, h)
        fq, fk, *_ = meeting(q, k, g, h)
        low = torch.cat([fq @ fk.mT, right], -1)
        p = torch.cat([F.pad(left, (0, h)), low], -2)  # (…, T/2h, 2h, 2h)
    return p.squeeze(-3)


def score_gradients(dp: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk and dg of Σ dP∘P, for dp (…, T, T) that is 0 where j > i."""
    if g.shape[-1] == 1:
        ds = (dp * between(g).exp()).tril()  # of q kᵀ
        seen = torch.ones_like(dp, dtype=torch.bool).tril()
        pairs = (ds * (q @ k.mT)).tril(-1)  # of the sums between j and i
        dg = until_t(pairs).tril(-1).sum(-1, keepdim=True)
        return weigh(ds, k, seen), weigh(ds.mT, q, seen.mT), dg
    own = dp.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk, dg = own * k, own * q, torch.zeros_like(q)
    for h in levels(q.shape[-2]):
        runs = dp.unflatten(-1, (-1, 2, h)).unflatten(-4, (-1, 2, h))  # (…, T/2h, 2, h, T/2h, 2, h)
        part = runs[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        fq, fk, eq, ek = meeting(q, k, g, h)
        dfq, dfk = part @ fk, part.mT @ fq
        dq = dq + whole(torch.zeros_like(dfq), dfq * eq)
        dk = dk + whole(dfk * ek, torch.zeros_like(dfk))
        dg = dg + whole(after_t(fk * dfk), until_t(fq * dfq))
    return dq, dk, dg


# --- chunks ---------------------------------------------------------------------------------------


def cut(size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, ·) -> (B, H, ⌈N/size⌉, size, ·), padded with zeros: no key, and no decay."""
    return tuple(F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)) for x in tensors)


def carry(first: Tensor | None, decay: Tensor, sums: Tensor) -> Tensor:
    """All states S_c = decay_c ∘ S_{c-1} + sums_c from S_0 = `first`, or 0: (B, H, c, D or 1, 1)
    and (B, H, c, D, Dv) -> (B, H, c + 1, D, Dv). In log₂c steps, each over twice as many chunks, so
    that rounding errors add up over log₂c additions, not c."""
    zero = F.pad(sums[:, :, :0], (0, 0, 0, 0, 1, 0))
    sums = torch.cat([zero if first is None else first[:, :, None], sums], 2)
    decay = F.pad(decay, (0, 0, 0, 0, 1, 0), value=1.0)
    for step in levels(sums.shape[2]):
        earlier = (0, 0, 0, 0, step, 0)
        sums = sums + decay * F.pad(sums[:, :, :-step], earlier)
        decay = decay * F.pad(decay[:, :, :-step], earlier, value=1.0)
    return sums


def operands(q, k, v, g, scale):
    """q·scale, k, v and g in chunks of the accumulation type."""
    acc, n = accumulate(q), q.shape[2]
    size = min(CHUNK, 1 << max(n - 1, 0).bit_length())
    return cut(size, q.to(acc) * scale, k.to(acc), v.to(acc), g)


def chunk_decay(g: Tensor) -> Tensor:
    """Of a whole chunk: (B, H, c, T, ·) -> (B, H, c, ·, 1)"""
    return g.sum(-2).exp()[..., None]


# --- reference ------------------------------------------------------------------------------------


def forward_reference(q, k, v, log_decay, key_mask, s0, scale):
    """-> o (B, H, N, Dv) and S (B, H, D, Dv) in the accumulation type"""
    if q.is_meta:  # shapes need no chunks, and so no guards on N
        b, h, _, d = q.shape
        return empty_heads(v), v.new_empty(b, h, d, v.shape[3], dtype=accumulate(q))
    k, v, g = real(key_mask, k, v, log_decay)
    cq, ck, cv, cg = operands(q, k, v, g, scale)  # (B, H, c, T, ·)
    states = carry(s0, chunk_decay(cg), (ck * after(cg).exp()).mT @ cv)
    o = (cq * until(cg).exp()) @ states[:, :, :-1] + lower(scores(cq, ck, cg), cv)
    return token_major(merge(o, v.shape[2]).to(v.dtype)), states[:, :, -1].contiguous()


def backward_reference(do, ds, q, k, v, log_decay, key_mask, s0, scale):
    """-> dq, dk, dv, dlog_decay, dS₀. With S before a chunk and dS behind it, a and b the decays
    from its start and to its end, and A that of all of it:

    d(a∘q) = S do,  d(b∘k) = dS v,  dv = dSᵀ(b∘k),  d log A = A∘Σ_v S∘dS,  dS_c = A∘dS_{c+1} + …;
    to these come the pairs within the chunk. The gradient in a log decay is that in the sums that
    it is a part of.
    """
    if q.is_meta:
        s = q.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=accumulate(q))
        return *map(empty_heads, (q, k, v, log_decay)), s
    (q,), (k, v, g) = answered(key_mask, do, q), real(key_mask, k, v, log_decay)
    cq, ck, cv, cg = operands(q, k, v, g, scale)
    (cdo,) = cut(cq.shape[3], do.to(cq.dtype))
    eq, ek, a = until(cg).exp(), after(cg).exp(), chunk_decay(cg)
    fq, fk = cq * eq, ck * ek
    states = carry(s0, a, fk.mT @ cv)
    dstates = carry(ds, a.flip(2), (fq.mT @ cdo).flip(2)).flip(2)
    before, later = states[:, :, :-1], dstates[:, :, 1:]
    dfq, dfk, p = cdo @ before.mT, cv @ later.mT, scores(cq, ck, cg)
    dq, dk, dg = score_gradients((cdo @ cv.mT).tril(), cq, ck, cg)
    seen = torch.ones_like(p, dtype=torch.bool).tril()
    dv = fk @ later + weigh(p.mT, cdo, seen.mT)
    of_all = a.squeeze(-1) * like(cg, (before * later).sum(-1))  # (B, H, c, ·)
    dg = dg + until_t(like(cg, fq * dfq)) + after_t(like(cg, fk * dfk)) + of_all[..., None, :]
    dq, dk, dv, dg = (
        merge(x, v.shape[2]) for x in ((dq + dfq * eq) * scale, dk + dfk * ek, dv, dg)
    )
    dk, dv, dg = real(key_mask, dk, dv, dg)
    grads = (token_major(x.to(y.dtype)) for x, y in ((dq, q), (dk, k), (dv, v), (dg, log_decay)))
    return *grads, dstates[:, :, 0].contiguous()
