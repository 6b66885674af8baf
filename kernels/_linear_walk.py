"""Linear attention by segments, for heads of one tile: a program walks over the tiles of a segment
with the state in registers. So each token is read once, and when causal its pairs are those of its
own tile. φ, T = [S z] and the symbols: tab/ops/linear.py.

States take in a tile before its last product, which is of 32 tokens: before Hopper, Triton deals
all of them to warps as suits the last, and a square one would have every warp hold all columns.
"""

import triton
import triton.language as tl

from ._linear import features, inverse, slope
from ._tiles import dot, head, hide, put, tile

WALKS = {"bf16"}  # tf32 and tf32x3 hold twice and three times the operands, and spill

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def linear_walk(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, mask, s, z, s_bh, z_bh, t_seg,
    o, o_b, o_h, o_n, N, H, segment, eps,
    MAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a segment, BV of its columns."""
    bh, part, v0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    o, d = head(o, bh, H, o_b, o_h), tl.arange(0, BD)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    S, Z = tile(s, DV, d, D, v0, DV, BV), tl.load(z + d, mask=d < D, other=0.0)
    first = part * segment
    for start in range(first, tl.minimum(first + segment, N), BN):
        at = start + tl.arange(0, BN)
        f = features(q, q_n, None, at, N, 0, MAP, D, BD)  # (BN, BD)
        c = features(k, k_n, mask, at, N, 0, MAP, D, BD)
        x = tile(v, v_n, at, N, v0, DV, BV)  # (BN, BV)
        p, shown = hide(dot(f, tl.trans(c), PRECISION), x, at[:, None] >= at[None, :], True)
        den = tl.sum(f * Z[None, :], 1) + tl.sum(p, 1) + eps
        num = dot(f, S, PRECISION) + dot(p, shown, PRECISION, "b")
        put(o, o_n, at, N, v0, num * inverse(den)[:, None], DV, BV)
        S += dot(tl.trans(c), x, PRECISION, "b")
        Z += tl.sum(c, 0)


@triton.jit
def linear_pull(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, o, o_b, o_h, o_n,
    mask, s, z, s_bh, z_bh, t_seg, t, inv, r, dq, dq_b, dq_h, dq_n, N, H, segment, eps,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a segment and its share of dT: t (B·H, segments, D·Dv + D). Causal: inv and r (B·H, N),
    which its keys ask for."""
    bh, part, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BD)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, o, dq = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h), head(dq, bh, H, dq_b, dq_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    S, Z = tile(s, DV, d, D, 0, DV, BV), tl.load(z + d, mask=d < D, other=0.0)
    dS, dZ = tl.zeros((BD, BV), tl.float32), tl.zeros((BD,), tl.float32)
    first = part * segment
    for start in range(first, tl.minimum(first + segment, N), BN):
        at = start + tl.arange(0, BN)
        f = features(q, q_n, None, at, N, 0, MAP, D, BD)  # (BN, BD)
        den = tl.sum(f * Z[None, :], 1) + eps
        if CAUSAL:
            seen = at[:, None] >= at[None, :]
            c = features(k, k_n, mask, at, N, 0, MAP, D, BD)
            p = dot(f, tl.trans(c), PRECISION)
            den += tl.sum(tl.where(seen, p, 0.0), 1)
        i = inverse(den)
        g = i[:, None] * tile(do, g_n, at, N, 0, DV, BV)  # (BN, BV)
        r_i = -tl.sum(g * tile(o, o_n, at, N, 0, DV, BV), 1)
        y = dot(g, tl.trans(S), PRECISION) + r_i[:, None] * Z[None, :]
        dS += dot(tl.trans(f), g, PRECISION)
        dZ += tl.sum(f * r_i[:, None], 0)
        if CAUSAL:
            tl.store(inv + bh.to(tl.int64) * N + at, i, mask=at < N)
            tl.store(r + bh.to(tl.int64) * N + at, r_i, mask=at < N)
            x = tile(v, v_n, at, N, 0, DV, BV)
            S += dot(tl.trans(c), x, PRECISION, "b")
            Z += tl.sum(c, 0)
            p = dot(g, tl.trans(x), PRECISION, "b") + r_i[:, None]  # g_i·v_j + r_i
            p, shown = hide(p, c, seen, True)
            y += dot(p, shown, PRECISION)
        y *= slope(tile(q, q_n, at, N, 0, D, BD), MAP)
        put(dq, dq_n, at, N, 0, y, D, BD)
    t += (bh.to(tl.int64) * tl.num_programs(1) + part) * (D * DV + D)
    put(t, DV, d, D, 0, dS, DV, BV)
    tl.store(t + D * DV + d, dZ, mask=d < D)


@triton.jit
def linear_push(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, mask, inv, r,
    s, z, s_bh, z_bh, t_seg, dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, N, H, segment,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a segment, its last tile first; s and z are dT, causal: after the segment."""
    bh, part, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BD)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, dk, dv = head(do, bh, H, g_b, g_h), head(dk, bh, H, dk_b, dk_h), head(dv, bh, H, dv_b, dv_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    dS, dZ = tile(s, DV, d, D, 0, DV, BV), tl.load(z + d, mask=d < D, other=0.0)
    first = part * segment
    tiles = tl.cdiv(tl.minimum(segment, N - first), BN)
    for turn in range(0, tiles):
        at = first + (tiles - 1 - turn) * BN + tl.arange(0, BN)
        c = features(k, k_n, mask, at, N, 0, MAP, D, BD)
        y = dot(c, dS, PRECISION)
        if CAUSAL:
            seen = at[:, None] <= at[None, :]  # key (rows), query
            f = features(q, q_n, None, at, N, 0, MAP, D, BD)
            r_i = tl.load(r + bh.to(tl.int64) * N + at, mask=at < N, other=0.0)
            i = tl.load(inv + bh.to(tl.int64) * N + at, mask=at < N, other=0.0)
            g = i[:, None] * tile(do, g_n, at, N, 0, DV, BV)
            p, shown = hide(dot(c, tl.trans(f), PRECISION), g, seen, True)
            y += dot(p, shown, PRECISION)
        put(dv, dv_n, at, N, 0, y, DV, BV)
        x = tile(v, v_n, at, N, 0, DV, BV)
        y = dot(x, tl.trans(dS), PRECISION, "a") + dZ[None, :]
        if CAUSAL:
            dS += dot(tl.trans(f), g, PRECISION)
            dZ += tl.sum(f * r_i[:, None], 0)
            p = dot(x, tl.trans(g), PRECISION, "a") + r_i[None, :]  # v_j·g_i + r_i
            p, shown = hide(p, f, seen, True)
            y += dot(p, shown, PRECISION)
        y *= slope(tile(k, k_n, at, N, 0, D, BD), MAP)
        if mask is not None:
            keep = tl.load(mask + at, mask=at < N, other=0) != 0
            y = tl.where(keep[:, None], y, 0.0)
        put(dk, dk_n, at, N, 0, y, D, BD)
