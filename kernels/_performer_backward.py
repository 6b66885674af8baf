"""The parts of the Triton backward of `performer`, a tile at a time (performer_backward.py)."""

import triton
import triton.language as tl

from ._performer import (
    NOTHING,
    exponential,
    is_far,
    key_exponents,
    key_features,
    key_slope,
    pairs,
    project,
    query_features,
    query_slope,
    row,
    shifts,
    vector,
)
from ._tiles import dot, hide, put, tile

# --- pairs of tokens, causal ----------------------------------------------------------------------


@triton.jit
def pull_queries(
    g, b, a, top, norm, seen, hides, far, KERNEL: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """db = Σ_j g_ij ∂P_ij/∂b, (BN, BM); seen (i, j), outside which g_ij is 0, as in `hide`"""
    if far:
        x = far_pull_queries(g, b, a, norm, BN)
    else:
        g, f = hide(g, key_features(a, top, KERNEL), seen, hides)
        x = dot(g, f, PRECISION)
        x *= query_slope(b, query_features(b, top, norm, KERNEL), norm, KERNEL)
    return x


@triton.jit
def pull_keys(
    g, b, a, top, norm, seen, hides, far, KERNEL: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """da = Σ_i g_ij ∂P_ij/∂a, likewise; seen (j, i)"""
    if far:
        x = far_pull_keys(g, b, a, norm, BN)
    else:
        g, f = hide(tl.trans(g), query_features(b, top, norm, KERNEL), seen, hides)
        x = dot(g, f, PRECISION)
        x *= key_slope(a, key_features(a, top, KERNEL), KERNEL)
    return x


@triton.jit
def far_pull_queries(g, b, a, norm, BN: tl.constexpr):
    """The same, pair by pair."""
    x, at = tl.zeros(b.shape, tl.float32), tl.arange(0, BN)
    for j in range(BN):
        g_j = tl.sum(tl.where((at == j)[None, :], g, 0.0), 1)
        e = b + row(a, j, BN)[None, :] - norm[:, None]
        x += g_j[:, None] * exponential(tl.where((at >= j)[:, None], e, NOTHING))
    return x


@triton.jit
def far_pull_keys(g, b, a, norm, BN: tl.constexpr):
    x, at = tl.zeros(a.shape, tl.float32), tl.arange(0, BN)
    for i in range(BN):
        g_i = tl.sum(tl.where((at == i)[:, None], g, 0.0), 0)
        e = a + (row(b, i, BN) - tl.sum(tl.where(at == i, norm, 0.0), 0))[None, :]
        x += g_i[:, None] * exponential(tl.where((at <= i)[:, None], e, NOTHING))
    return x


@triton.jit
def pair_gradients(
    do, g_n, r_i, v, v_n, i, j, N, DV: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[g_i r_i]·[v_j 1] where j ≤ i, else 0: (BN, BN)"""
    g = tl.zeros((BN, BN), tl.float32) + r_i[:, None]
    for v0 in range(0, DV, BV):
        left, right = tile(do, g_n, i, N, v0, DV, BV), tile(v, v_n, j, N, v0, DV, BV)
        g += dot(left, tl.trans(right), PRECISION)
    return tl.where(i[:, None] >= j[None, :], g, 0.0)


# --- gradients ------------------------------------------------------------------------------------


@triton.jit
def queries(
    q, q_n, k, k_n, v, v_n, do, g_n, o, o_n, w, mask, s, z, c, lse, r, dq, dq_n,
    start, first, N, x0,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BX columns of dq of the tile of tokens at start, and its r."""
    at = start + tl.arange(0, BN)
    norm = vector(lse, at, N, float("inf"))
    r_i = tl.zeros((BN,), tl.float32)
    for v0 in range(0, DV, BV):
        r_i -= tl.sum(tile(do, g_n, at, N, v0, DV, BV) * tile(o, o_n, at, N, v0, DV, BV), 1)
    if x0 == 0:
        tl.store(r + at, r_i, mask=at < N)
    dx = tl.zeros((BN, BX), tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        b, _ = project(q, q_n, w, at, N, m0, D, M, BN, BM, BD, EXACT)
        known = vector(c, m, M, NOTHING)
        db = r_i[:, None] * vector(z, m, M, 0.0)[None, :]  # (BN, BM)
        for v0 in range(0, DV, BV):
            g = tile(do, g_n, at, N, v0, DV, BV)
            db += dot(g, tl.trans(tile(s, DV, m, M, v0, DV, BV)), PRECISION)
        db *= query_slope(b, query_features(b, known, norm, KERNEL), norm, KERNEL)
        if CAUSAL:
            for j0 in range(first, start + BN, BN):
                j = j0 + tl.arange(0, BN)
                a = key_exponents(k, k_n, w, mask, j, N, m0, KERNEL, D, M, BN, BM, BD, EXACT)
                top, low = shifts(a, known, j0 == start, KERNEL)
                keep, far = at[:, None] >= j[None, :], is_far(top, low, KERNEL)
                g = pair_gradients(do, g_n, r_i, v, v_n, at, j, N, DV, BN, BV, PRECISION)
                db += pull_queries(
                    g, b, a, top, norm, keep, j0 == start, far, KERNEL, BN, PRECISION
                )
                known = top
        dx += dot(db, tile(w, D, m, M, x0, D, BX), PRECISION)
    put(dq, dq_n, at, N, x0, dx * D**-0.25, D, BX)


@triton.jit
def pulled(
    q, q_n, do, g_n, w, lse, r, c, first, last, N, ds, dz, m0, v0,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM features and BV columns of dT at shift c over queries [first, last), on top of ds, dz."""
    m = m0 + tl.arange(0, BM)
    known = vector(c, m, M, NOTHING)
    S = tl.zeros((BM, BV), tl.float32)
    Z = tl.zeros((BM,), tl.float32)
    if ds is not None:
        S += tile(ds, DV, m, M, v0, DV, BV)
        Z += vector(dz, m, M, 0.0)
    for start in range(first, last, BN):
        at = start + tl.arange(0, BN)
        b, _ = project(q, q_n, w, at, N, m0, D, M, BN, BM, BD, EXACT)
        f = query_features(b, known, vector(lse, at, N, float("inf")), KERNEL)  # (BN, BM)
        S += dot(tl.trans(f), tile(do, g_n, at, N, v0, DV, BV), PRECISION, "b")
        Z += tl.sum(f * vector(r, at, N, 0.0)[:, None], 0)
    return S, Z


@triton.jit
def keys(
    q, q_n, k, k_n, v, v_n, do, g_n, w, mask, ds, dz, c, before, lse, r, dk, dk_n, dv, dv_n,
    start, last, N, x0,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BX columns of dk and of dv of the tile of tokens at start. ds, dz at shift c hold the queries
    from `last` on when causal, else all; `before` is the shift before the tile's segment."""
    at = start + tl.arange(0, BN)
    dx = tl.zeros((BN, BX), tl.float32)
    dy = tl.zeros((BN, BX), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        a = key_exponents(k, k_n, w, mask, at, N, m0, KERNEL, D, M, BN, BM, BD, EXACT)
        f = key_features(a, vector(c, m, M, NOTHING), KERNEL)  # (BN, BM)
        da = tl.zeros((BN, BM), tl.float32) + vector(dz, m, M, 0.0)[None, :]
        for v0 in range(0, DV, BV):
            x = tile(v, v_n, at, N, v0, DV, BV)
            da += dot(x, tl.trans(tile(ds, DV, m, M, v0, DV, BV)), PRECISION)
        da *= key_slope(a, f, KERNEL)
        dy += dot(f, tile(ds, DV, m, M, x0, DV, BX), PRECISION)
        if CAUSAL:
            known = vector(before, m, M, NOTHING)
            for i0 in range(start, last, BN):
                i = i0 + tl.arange(0, BN)
                norm = vector(lse, i, N, float("inf"))
                b, _ = project(q, q_n, w, i, N, m0, D, M, BN, BM, BD, EXACT)
                top, low = shifts(a, known, i0 == start, KERNEL)
                keep, far = i[:, None] >= at[None, :], is_far(top, low, KERNEL)
                seen = at[:, None] <= i[None, :]
                p = pairs(b, a, top, norm, keep, far, KERNEL, BN, PRECISION)
                dy += dot(tl.trans(p), tile(do, g_n, i, N, x0, DV, BX), PRECISION, "b")
                r_i = vector(r, i, N, 0.0)
                g = pair_gradients(do, g_n, r_i, v, v_n, i, at, N, DV, BN, BV, PRECISION)
                da += pull_keys(g, b, a, top, norm, seen, i0 == start, far, KERNEL, BN, PRECISION)
        dx += dot(da, tile(w, D, m, M, x0, D, BX), PRECISION)
        total += tl.sum(da, 1)
    if KERNEL == 0:
        dx -= total[:, None] * (tile(k, k_n, at, N, x0, D, BX) * D**-0.25)
    put(dk, dk_n, at, N, x0, dx * D**-0.25, D, BX)
    put(dv, dv_n, at, N, x0, dy, DV, BX)
