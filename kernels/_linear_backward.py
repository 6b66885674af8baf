"""The backward of linear attention where a head is more than one tile: dq, dk and dv by tiles of
tokens and pieces of columns, from inv, r and the states of the segments (see linear_backward.py).
"""

import triton
import triton.language as tl

from ._linear import features, inverse, slope
from ._tiles import dot, head, hide, put, tile


@triton.jit
def linear_scalars(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, do, g_b, g_h, g_n, o, o_b, o_h, o_n, mask,
    z, z_bh, t_seg, inv, r, N, H, segment, eps,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inv and r (B·H, N)"""
    bh, start = tl.program_id(0), tl.program_id(1) * BN
    q, k = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h)
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    part = start // segment
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    at = start + tl.arange(0, BN)
    den = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BD):
        f, d = features(q, q_n, None, at, N, d0, MAP, D, BD), d0 + tl.arange(0, BD)
        den += tl.sum(f * tl.load(z + d, mask=d < D, other=0.0)[None, :], 1)
        if CAUSAL:
            for j0 in range(part * segment, start + BN, BN):
                j = j0 + tl.arange(0, BN)
                p = dot(f, tl.trans(features(k, k_n, mask, j, N, d0, MAP, D, BD)), PRECISION)
                den += tl.sum(tl.where(at[:, None] >= j[None, :], p, 0.0), 1)
    i = inverse(den + eps)
    product = tl.zeros((BN,), tl.float32)
    for v0 in range(0, DV, BV):
        product += tl.sum(tile(do, g_n, at, N, v0, DV, BV) * tile(o, o_n, at, N, v0, DV, BV), 1)
    tl.store(inv + bh.to(tl.int64) * N + at, i, mask=at < N)
    tl.store(r + bh.to(tl.int64) * N + at, -i * product, mask=at < N)


@triton.jit
def linear_grad_q(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, mask, inv, r,
    s, z, s_bh, z_bh, t_seg, dq, dq_b, dq_h, dq_n, N, H, segment,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of tokens, BD of its columns."""
    bh, start, d0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BD
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do = head(do, bh, H, g_b, g_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    part = start // segment
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    at, d = start + tl.arange(0, BN), d0 + tl.arange(0, BD)
    i = tl.load(inv + bh.to(tl.int64) * N + at, mask=at < N, other=0.0)[:, None]
    r_i = tl.load(r + bh.to(tl.int64) * N + at, mask=at < N, other=0.0)[:, None]
    x = r_i * tl.load(z + d, mask=d < D, other=0.0)[None, :]  # (BN, BD)
    for v0 in range(0, DV, BV):
        g = i * tile(do, g_n, at, N, v0, DV, BV)
        x += dot(g, tl.trans(tile(s, DV, d, D, v0, DV, BV)), PRECISION)
    if CAUSAL:
        for last in tl.static_range(2):  # as in the forward
            for j0 in tl.range(
                start if last else part * segment, start + BN if last else start, BN,
                num_stages=1 if last else None,  # nothing to read ahead
            ):  # fmt: skip
                j = j0 + tl.arange(0, BN)
                p = r_i + tl.zeros((BN, BN), tl.float32)  # g_i·v_j + r_i
                for v0 in range(0, DV, BV):
                    g = i * tile(do, g_n, at, N, v0, DV, BV)
                    p += dot(g, tl.trans(tile(v, v_n, j, N, v0, DV, BV)), PRECISION, "b")
                f = features(k, k_n, mask, j, N, d0, MAP, D, BD)
                p, f = hide(p, f, at[:, None] >= j[None, :], last)
                x += dot(p, f, PRECISION)
    x *= slope(tile(q, q_n, at, N, d0, D, BD), MAP)
    put(head(dq, bh, H, dq_b, dq_h), dq_n, at, N, d0, x, D, BD)


@triton.jit
def linear_grad_k(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, mask, inv, r,
    s, z, s_bh, z_bh, t_seg, dk, dk_b, dk_h, dk_n, N, H, segment,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one tile of tokens, BD of its columns; s and z are dT."""
    bh, start, d0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BD
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do = head(do, bh, H, g_b, g_h)
    inv += bh.to(tl.int64) * N
    r += bh.to(tl.int64) * N
    part = start // segment
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    at, d = start + tl.arange(0, BN), d0 + tl.arange(0, BD)
    x = tl.zeros((BN, BD), tl.float32) + tl.load(z + d, mask=d < D, other=0.0)[None, :]
    for v0 in range(0, DV, BV):
        c = tile(v, v_n, at, N, v0, DV, BV)
        x += dot(c, tl.trans(tile(s, DV, d, D, v0, DV, BV)), PRECISION, "a")
    if CAUSAL:
        end = tl.minimum((part + 1) * segment, N)
        for later in tl.static_range(2):  # the tile that meets itself comes first
            for i0 in tl.range(
                start + BN if later else start, end if later else start + BN, BN,
                num_stages=None if later else 1,
            ):  # fmt: skip
                i = i0 + tl.arange(0, BN)
                scale = tl.load(inv + i, mask=i < N, other=0.0)[:, None]
                # v_j·g_i + r_i
                p = tl.load(r + i, mask=i < N, other=0.0)[None, :] + tl.zeros((BN, BN), tl.float32)
                for v0 in range(0, DV, BV):
                    g = scale * tile(do, g_n, i, N, v0, DV, BV)
                    p += dot(tile(v, v_n, at, N, v0, DV, BV), tl.trans(g), PRECISION, "a")
                f = features(q, q_n, None, i, N, d0, MAP, D, BD)
                p, f = hide(p, f, at[:, None] <= i[None, :], 1 - later)
                x += dot(p, f, PRECISION)
    x *= slope(tile(k, k_n, at, N, d0, D, BD), MAP)
    if mask is not None:
        keep = tl.load(mask + (bh // H).to(tl.int64) * N + at, mask=at < N, other=0) != 0
        x = tl.where(keep[:, None], x, 0.0)
    put(head(dk, bh, H, dk_b, dk_h), dk_n, at, N, d0, x, D, BD)


@triton.jit
def linear_grad_v(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, do, g_b, g_h, g_n, mask, inv,
    s, s_bh, t_seg, dv, dv_b, dv_h, dv_n, N, H, segment,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one tile of tokens, BV of its columns; s is dS."""
    bh, start, v0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BV
    q, k, do = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(do, bh, H, g_b, g_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    inv += bh.to(tl.int64) * N
    part = start // segment
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    at = start + tl.arange(0, BN)
    x = tl.zeros((BN, BV), tl.float32)
    for d0 in range(0, D, BD):
        f = features(k, k_n, mask, at, N, d0, MAP, D, BD)
        x += dot(f, tile(s, DV, d0 + tl.arange(0, BD), D, v0, DV, BV), PRECISION)
    if CAUSAL:
        end = tl.minimum((part + 1) * segment, N)
        for later in tl.static_range(2):
            for i0 in tl.range(
                start + BN if later else start, end if later else start + BN, BN,
                num_stages=None if later else 1,
            ):  # fmt: skip
                i = i0 + tl.arange(0, BN)
                p = tl.zeros((BN, BN), tl.float32)  # φ(k_j)·φ(q_i)
                for d0 in range(0, D, BD):
                    f = features(k, k_n, mask, at, N, d0, MAP, D, BD)
                    p += dot(f, tl.trans(features(q, q_n, None, i, N, d0, MAP, D, BD)), PRECISION)
                g = tile(do, g_n, i, N, v0, DV, BV)
                g *= tl.load(inv + i, mask=i < N, other=0.0)[:, None]
                p, g = hide(p, g, at[:, None] <= i[None, :], 1 - later)
                x += dot(p, g, PRECISION)
    put(head(dv, bh, H, dv_b, dv_h), dv_n, at, N, v0, x, DV, BV)
