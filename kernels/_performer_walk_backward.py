"""The backward of _performer_walk.py: pull, then states of dT and their scan, then push. Symbols:
performer_backward.py.

As dT is held at -c, and grows where c does, pull lets it stay at the shift before the segment; push
goes from the last tile to the first, where it shrinks.
"""

import triton
import triton.language as tl

from ._performer import (
    FAR,
    NOTHING,
    factor,
    far_pairs,
    key_features,
    key_slope,
    query_features,
    query_slope,
    vector,
)
from ._performer_backward import far_pull_keys, far_pull_queries
from ._performer_walk import exponents, moved, projected, raised, weights, within
from ._tiles import dot, head, hide, put, tile

# --- a tile ---------------------------------------------------------------------------------------


@triton.jit
def exceeds(b, top, norm, KERNEL: tl.constexpr):
    """Whether the tile is far, seen by its denominators: a query's feature is more than e^FAR."""
    if KERNEL == 1:
        return False
    else:
        return tl.max(tl.max(b + top[None, :] - norm[:, None], 1), 0) > FAR


@triton.jit
def key_pairs(
    f, e, b, a, norm, m, far, M: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """As `pairs`, key (rows) by query"""
    if far:
        p = tl.trans(far_pairs(within(b, m, M), a, norm, BN))
    else:
        p = dot(e, tl.trans(f), PRECISION)
    return p


@triton.jit
def pull_queries(
    y, g, f, e, b, a, norm, seen, m, far, KERNEL: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """db (BN, BM) of y, which the state before the tile gives, and of its pairs g (i, j)"""
    if far:
        x = y * f + far_pull_queries(tl.where(seen, g, 0.0), within(b, m, M), a, norm, BN)
    else:
        g, e = hide(g, e, seen, True)
        x = (y + dot(g, e, PRECISION)) * query_slope(b, f, norm, KERNEL)
    return x


@triton.jit
def pull_keys(
    y, g, f, e, b, a, norm, seen, m, far, KERNEL: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """da (BN, BM) of y, which the state behind the tile gives, and of its pairs g (j, i)"""
    if far:
        x = y * e + far_pull_keys(
            tl.trans(tl.where(seen, g, 0.0)), within(b, m, M), a, norm, BN
        )  # fmt: skip
    else:
        slope = key_slope(a, e, KERNEL)
        g, f = hide(g, f, seen, True)
        x = (y + dot(g, f, PRECISION)) * slope
    return x


@triton.jit
def add_up(
    y, rest, to, stride, at, n, m0, M: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y (BN, BLOCK) and what the features before m0 came to, which waits in rest (N, SIZE)"""
    if m0 > 0:
        y += tile(rest, SIZE, at, n, 0, SIZE, BLOCK)
    if m0 + BM < M:
        put(rest, SIZE, at, n, 0, y, SIZE, BLOCK)
    else:
        put(to, stride, at, n, 0, y, SIZE, BLOCK)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def performer_pull(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, o, o_b, o_h, o_n,
    w, mask, s, z, s_bh, z_bh, t_seg, c, c_bh, c_seg, lse, r, tops, t, rest,
    dq, dq_b, dq_h, dq_n, N, H, segment,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a segment and its share of dT at the shift before it, t (B·H, segments, M·Dv + M); and
    what its keys ask for: r (B·H, N), and the shift after each tile, tops (B·H, tiles, M). rest
    (B·H, N, D) waits for the next features."""
    bh, part = tl.program_id(0), tl.program_id(1)
    i = bh.to(tl.int64)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, o, dq = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h), head(dq, bh, H, dq_b, dq_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    s, z = s + i * s_bh + part.to(tl.int64) * t_seg, z + i * z_bh + part.to(tl.int64) * t_seg
    c, lse, r, rest = c + i * c_bh + part * c_seg, lse + i * N, r + i * N, rest + i * N * D
    tops += i * tl.cdiv(N, BN) * M
    t += (i * tl.num_programs(1) + part) * (M * DV + M)
    first = part * segment
    for m0 in range(0, M, BM):
        tl.debug_barrier()  # what waits was written by other threads of this program
        m = m0 + tl.arange(0, BM)
        W = weights(w, m, D, M, BD, EXACT)
        S, Z = tile(s, DV, m, M, 0, DV, BV), vector(z, m, M, 0.0)
        known = vector(c, m, M, NOTHING)
        seen = known
        dS, dZ = tl.zeros((BM, BV), tl.float32), tl.zeros((BM,), tl.float32)
        for start in range(first, tl.minimum(first + segment, N), BN):
            at = start + tl.arange(0, BN)
            a = exponents(k, k_n, W, mask, at, N, KERNEL, D, BD, EXACT)
            top = raised(seen, a, m, KERNEL, M)
            tl.store(tops + start // BN * M + m, top, mask=m < M)
            b, _ = projected(q, q_n, W, at, N, D, BD, EXACT)
            norm = vector(lse, at, N, float("inf"))
            far, shift = exceeds(b, top, norm, KERNEL), top
            if KERNEL == 0:
                shift = tl.where(far, seen, top)
                S, Z = moved(S, Z, seen, shift, KERNEL)
            f, e = query_features(b, shift, norm, KERNEL), key_features(a, top, KERNEL)
            g, x = tile(do, g_n, at, N, 0, DV, BV), tile(v, v_n, at, N, 0, DV, BV)
            r_i = -tl.sum(g * tile(o, o_n, at, N, 0, DV, BV), 1)
            if m0 == 0:
                tl.store(r + at, r_i, mask=at < N)
            y = dot(g, tl.trans(S), PRECISION, "a") + r_i[:, None] * Z[None, :]  # (BN, BM)
            less = factor(known, shift, KERNEL)
            dS += less[:, None] * dot(tl.trans(f), g, PRECISION, "b")
            dZ += less * tl.sum(f * r_i[:, None], 0)
            keep = at[:, None] >= at[None, :]
            p = dot(g, tl.trans(x), PRECISION, "ab") + r_i[:, None]  # g_i·v_j + r_i
            y = pull_queries(y, p, f, e, b, a, norm, keep, m, far, KERNEL, M, BN, PRECISION)
            if far:
                S, Z = moved(S, Z, shift, top, KERNEL)
            S += dot(tl.trans(e), x, PRECISION, "b")
            Z += tl.sum(e, 0)
            seen = top
            y = dot(y, tl.trans(W), PRECISION) * D**-0.25
            add_up(y, rest, dq, dq_n, at, N, m0, M, BM, D, BD)
        put(t, DV, m, M, 0, dS, DV, BV)
        tl.store(t + M * DV + m, dZ, mask=m < M)


@triton.jit
def performer_push(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, w, mask,
    ds, dz, s_bh, z_bh, t_seg, c, c_bh, c_seg, before, tops, lse, r, rest, rest_v,
    dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, N, H, segment,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a segment, its last tile first; ds, dz: dT after the segment, at the shift c
    there, and `before` it another. rest (B·H, N, D) and rest_v (B·H, N, Dv) as in pull."""
    bh, part = tl.program_id(0), tl.program_id(1)
    i = bh.to(tl.int64)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, dk, dv = head(do, bh, H, g_b, g_h), head(dk, bh, H, dk_b, dk_h), head(dv, bh, H, dv_b, dv_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    ds, dz = ds + i * s_bh + part.to(tl.int64) * t_seg, dz + i * z_bh + part.to(tl.int64) * t_seg
    c, before = c + i * c_bh + part * c_seg, before + i * c_bh + part * c_seg
    lse, r, rest, rest_v = lse + i * N, r + i * N, rest + i * N * D, rest_v + i * N * DV
    tops += i * tl.cdiv(N, BN) * M
    first = part * segment
    tiles = tl.cdiv(tl.minimum(segment, N - first), BN)
    for m0 in range(0, M, BM):
        tl.debug_barrier()  # what waits was written by other threads of this program
        m = m0 + tl.arange(0, BM)
        W = weights(w, m, D, M, BD, EXACT)
        dS, dZ = tile(ds, DV, m, M, 0, DV, BV), vector(dz, m, M, 0.0)
        held = vector(c, m, M, NOTHING)
        for turn in range(0, tiles):
            start = first + (tiles - 1 - turn) * BN
            at = start + tl.arange(0, BN)
            a = exponents(k, k_n, W, mask, at, N, KERNEL, D, BD, EXACT)
            b, _ = projected(q, q_n, W, at, N, D, BD, EXACT)
            norm, r_i = vector(lse, at, N, float("inf")), vector(r, at, N, 0.0)
            top = vector(tops + start // BN * M, m, M, NOTHING)
            far, shift = exceeds(b, top, norm, KERNEL), top
            if KERNEL == 0:
                dS, dZ = moved(dS, dZ, top, held, KERNEL)
                if far:
                    last = tops + (start // BN - 1) * M
                    shift = vector(before if start == first else last, m, M, NOTHING)
            f, e = query_features(b, shift, norm, KERNEL), key_features(a, top, KERNEL)
            g, x = tile(do, g_n, at, N, 0, DV, BV), tile(v, v_n, at, N, 0, DV, BV)
            seen = at[:, None] <= at[None, :]  # key (rows), query
            y = dot(e, dS, PRECISION)
            p = key_pairs(f, e, b, a, norm, m, far, M, BN, PRECISION)
            p, shown = hide(p, g, seen, True)
            y += dot(p, shown, PRECISION, "b")
            add_up(y, rest_v, dv, dv_n, at, N, m0, M, BM, DV, BV)
            u = dot(x, tl.trans(dS), PRECISION, "a") + dZ[None, :]  # (BN, BM)
            p = dot(x, tl.trans(g), PRECISION, "ab") + r_i[None, :]  # v_j·g_i + r_i
            u = pull_keys(u, p, f, e, b, a, norm, seen, m, far, KERNEL, M, BN, PRECISION)
            if far:
                dS, dZ = moved(dS, dZ, shift, top, KERNEL)
            dS += dot(tl.trans(f), g, PRECISION, "b")
            dZ += tl.sum(f * r_i[:, None], 0)
            held = shift
            y = dot(u, tl.trans(W), PRECISION)
            if KERNEL == 0:
                y -= tl.sum(u, 1)[:, None] * (tile(k, k_n, at, N, 0, D, BD) * D**-0.25)
            add_up(y * D**-0.25, rest, dk, dk_n, at, N, m0, M, BM, D, BD)
