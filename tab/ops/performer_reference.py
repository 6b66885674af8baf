"""FAVOR+ by formula (tab/ops/performer.py), in PyTorch operators. Symbols as there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate, answered, real, token_major
from ._softmax import empty_heads, empty_outputs
from .linear_reference import join, token_sum, with_ones

WIDE = 64  # block length from which the causal reference multiplies keys and values first

# --- features -------------------------------------------------------------------------------------


def finite(shift: Tensor) -> Tensor:
    """-inf, the shift of a state that has seen nothing, as 0: e^(-inf - 0) = 0, not NaN."""
    return shift.masked_fill(shift == -torch.inf, 0.0)


def exponents(q, k, w, key_mask, kernel) -> tuple[Tensor, Tensor]:
    """b, a (B, H, N, M); a is -inf where a key is masked."""
    acc, scale = accumulate(q), q.shape[-1] ** -0.25
    qh, kh = q.to(acc) * scale, k.to(acc) * scale  # (B, H, N, D)
    b, a = qh @ w.mT, kh @ w.mT
    if kernel == 0:
        a = a - kh.square().sum(-1, keepdim=True) / 2
    if key_mask is not None:
        a = a.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    return b, a


def key_features(a: Tensor, shift: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """φ = e^(a - shift) (or relu(a)) and dφ/da"""
    if kernel == 1:
        return F.relu(a), (a > 0).to(a.dtype)
    phi = (a - finite(shift)).exp()
    return phi, phi


def query_features(b: Tensor, shift: Tensor, norm: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """φ = e^(b + shift - norm) (or relu(b)·e^-norm) and dφ/db. A state at -inf is not read."""
    if kernel == 1:
        return F.relu(b) * (-norm).exp(), (b > 0) * (-norm).exp()
    phi = (b + shift - norm).exp()
    return phi, phi


def rescale(before: Tensor, after: Tensor, kernel: int) -> Tensor:
    """(B, H, 1, M) shifts -> the factor (B, H, M, 1) that moves a state from one to the other."""
    factor = torch.ones_like(after) if kernel == 1 else (before - finite(after)).exp()
    return factor.mT


# --- reference ------------------------------------------------------------------------------------
# Causal sums in log₂N levels instead of N steps: at level h, in each block of 2h tokens, the
# queries of the right half read the keys of the left half at that half's own shift. Every pair
# j < i meets at exactly one level, nothing ever overflows, and no shift knows a later key.


def levels(n: int) -> Iterator[int]:
    """1, 2, 4 … below n."""
    h = 1
    while h < n:
        yield h
        h *= 2


def halves(x: Tensor, h: int, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """(B, H, N, ·) -> left and right halves (B, H, ⌈N/2h⌉, h, ·) of its blocks of 2h tokens."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % (2 * h)), value=fill).unflatten(2, (-1, 2, h)).unbind(3)


def to_left(x: Tensor, n: int) -> Tensor:
    """The inverse of `halves`: (B, H, N, ·) with x (B, H, ⌈N/2h⌉, h, ·) in left halves, else 0."""
    return F.pad(x, (0, 0, 0, x.shape[3])).flatten(2, 3)[:, :, :n]


def to_right(x: Tensor, n: int) -> Tensor:
    """The same with x in right halves."""
    return F.pad(x, (0, 0, x.shape[3], 0)).flatten(2, 3)[:, :, :n]


def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x yᵀ z, in the cheaper order; the rows are tokens."""
    return x @ (y.mT @ z) if x.shape[-2] > WIDE else (x @ y.mT) @ z


def _causal_sums(b, a, v1, r, kernel):
    """Σ_{j≤i} Σ_m e^(b_im + a_jm - r_i) v1_j, (B, H, N, Dv+1)"""
    n = a.shape[2]
    own = a.detach()
    fq, fk = query_features(b, own, r, kernel)[0], key_features(a, own, kernel)[0]
    out = (fq * fk).sum(-1, keepdim=True) * v1  # j = i
    for h in levels(n):
        left, right = halves(a, h, -torch.inf)[0], halves(b, h, -torch.inf)[1]
        shift = left.amax(-2, keepdim=True).detach()
        fk = key_features(left, shift, kernel)[0]
        fq = query_features(right, shift, halves(r, h)[1], kernel)[0]
        out = out + to_right(product(fq, fk, halves(v1, h)[0]), n)
    return out


def _causal_gradients(b, a, v1, g1, lse, kernel):
    """The gradients of Σ_i g1_i·(causal sum)_i in b, a and v1."""
    n = a.shape[2]
    (fq, sq), (fk, sk) = query_features(b, a, lse, kernel), key_features(a, a, kernel)
    pair = (g1 * v1).sum(-1, keepdim=True)  # (B, H, N, 1)
    db, da, dv1 = pair * fk * sq, pair * fq * sk, (fq * fk).sum(-1, keepdim=True) * g1
    for h in levels(n):
        left, right = halves(a, h, -torch.inf)[0], halves(b, h, -torch.inf)[1]
        v, g = halves(v1, h)[0], halves(g1, h)[1]
        shift = left.amax(-2, keepdim=True)
        fk, sk = key_features(left, shift, kernel)
        fq, sq = query_features(right, shift, halves(lse, h)[1], kernel)
        db = db + to_right(product(g, v, fk) * sq, n)
        da = da + to_left(product(v, g, fq) * sk, n)
        dv1 = dv1 + to_left(product(fk, fq, g), n)
    return db, da, dv1


def _initial(s0, z0, c0, a, dv, kernel):
    """[S z] (B, H, M, Dv+1) and its shift (B, H, 1, M); empty where none is given."""
    if s0 is not None:
        return join(s0, z0), c0[:, :, None]
    empty = 0.0 if kernel == 1 else -torch.inf
    b, h, _, m = a.shape
    return a.new_zeros(b, h, m, dv + 1), a.new_full((b, h, 1, m), empty)


def forward_reference(q, k, v, projection, key_mask, s0, z0, c0, kernel, causal, eps):
    """-> o (B, H, N, Dv), S (B, H, M, Dv), z, c (B, H, M), lse (B, H, N)"""
    if q.is_meta:  # shapes need no levels, and so no guards on N
        o, lse = empty_outputs(q, v, accumulate(q))
        z = lse.new_empty(*q.shape[:2], projection.shape[0])
        return o, z.new_empty(*z.shape, v.shape[3]), z, torch.empty_like(z), lse
    k, v = real(key_mask, k, v)
    b, a = exponents(q, k, projection, key_mask, kernel)  # (B, H, N, M)
    v1 = with_ones(v.to(b.dtype))  # (B, H, N, Dv+1)
    t0, shift0 = _initial(s0, z0, c0, a, v.shape[-1], kernel)
    if kernel == 1:
        last, r = shift0, torch.zeros_like(b[..., :1])
    else:
        seen = torch.cat([shift0, a], 2).detach()
        last = seen.amax(2, keepdim=True)  # (B, H, 1, M)
        c = seen.cummax(2).values[:, :, 1:] if causal else last  # what query i may know
        r = finite((b + c).amax(-1, keepdim=True)).detach()  # (B, H, N, 1)
    total = token_sum(key_features(a, last, kernel)[0], v1) + rescale(shift0, last, kernel) * t0
    if causal:
        out = query_features(b, shift0, r, kernel)[0] @ t0 + _causal_sums(b, a, v1, r, kernel)
    else:
        out = query_features(b, last, r, kernel)[0] @ total
    den = out[..., -1:] + eps  # (B, H, N, 1)
    nothing = den == 0
    # A denominator that is 0 is replaced before it divides: 0/0 would have the gradient NaN.
    o = (out[..., :-1] / den.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)
    lse = (r + den.log()).masked_fill(nothing, torch.inf).squeeze(-1).detach()
    s, z = total[..., :-1].contiguous(), total[..., -1].contiguous()
    return token_major(o.to(v.dtype)), s, z, last.squeeze(2).clone(), lse


def backward_reference(
    do, ds, dz, q, k, v, projection, o, s, z, c, lse, key_mask, s0, z0, c0, kernel, causal
):
    """-> dq, dk, dv, dS₀, dz₀; the last two are of size 0 without an initial state. Features are
    made again, the query's already divided by the denominator (norm = lse), so with
    g' = [do, -do·o] and T = [S z] at shift c:

    dφ(q_i) = T g'_i,  dT = dT_N + Σ_i φ(q_i) g'_iᵀ,  dφ(k_j) = dT v'_j,  dv'_j = dTᵀ φ(k_j);
    db = dφ(q)∘φ', da = dφ(k)∘φ';  dq̂ = db W,  dk̂ = da W - (Σ_m da_m) k̂.
    """
    if q.is_meta:
        first = (torch.empty_like(x) if s0 is not None else x.new_empty(0) for x in (s, z))
        return *map(empty_heads, (q, k, v)), *first
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    b, a = exponents(q, k, projection, key_mask, kernel)
    acc, scale = b.dtype, q.shape[-1] ** -0.25
    v1, (lse,) = with_ones(v.to(acc)), answered(key_mask, do, lse[..., None], fill=torch.inf)
    do = do.to(acc)
    g1 = torch.cat([do, -(do * o.to(acc)).sum(-1, keepdim=True)], -1)  # (B, H, N, Dv+1)
    t0, shift0 = _initial(s0, z0, c0, a, v.shape[-1], kernel)
    last = c[:, :, None]
    dt = torch.zeros_like(t0) if ds is None else join(ds, dz)

    # Causal queries read the state before the first token, the others the final one.
    t, shift = (t0, shift0) if causal else (join(s, z), last)
    fq, sq = query_features(b, shift, lse, kernel)
    db, read = (g1 @ t.mT) * sq, token_sum(fq, g1)
    if not causal:
        dt = dt + read
    fk, sk = key_features(a, last, kernel)
    da, dv1 = (v1 @ dt.mT) * sk, fk @ dt
    dt0 = rescale(shift0, last, kernel) * dt
    if causal:
        dt0 = dt0 + read
        more = _causal_gradients(b, a, v1, g1, lse, kernel)
        db, da, dv1 = db + more[0], da + more[1], dv1 + more[2]

    dq, dk = db @ projection, da @ projection
    if kernel == 0:
        dk = dk - da.sum(-1, keepdim=True) * (k.to(acc) * scale)
    grads = (
        token_major(x.to(like.dtype))
        for x, like in ((dq * scale, q), (dk * scale, k), (dv1[..., :-1], v))
    )
    if s0 is None:
        return *grads, t0.new_empty(0), t0.new_empty(0)
    return *grads, dt0[..., :-1].contiguous(), dt0[..., -1].contiguous()
