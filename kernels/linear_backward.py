"""tab::linear_bwd for CUDA in Triton. With inv = 1/den, g = inv·do, r = -g·o (tab/ops/linear.py):

    dφ(q_i) = T_i [g_i r_i],  dT_j = dT_N + Σ_{i≥j} φ(q_i) [g_i r_i]ᵀ
    dφ(k_j) = dT_j [v_j 1],   dv_j = dS_jᵀ φ(k_j)

φ is computed again, never stored. Bidirectional with few tokens or many heads: one launch.
Otherwise states and scan of T, the scalars inv and r of every token, states and scan of dT, then
dq, dk and dv; inside a token's own segment they use scores, as the forward does.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import answered, real

from . import linear
from ._launch import (
    capability,
    launch,
    mask_bytes,
    register,
    rows,
    strided,
    token_major_empty,
    whole,
)
from ._linear import features, inverse, scanned, slope
from ._segments import meta, one_launch, one_state, segments, takes
from ._tiles import dot, head, hide, put, tile

FUSED_SIZE = 64  # S and dS are both in registers

# --- kernels --------------------------------------------------------------------------------------


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


@triton.jit
def linear_fused_backward(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, o, o_b, o_h, o_n,
    mask, s, z, ds, dz, dq, dq_b, dq_h, dq_n, dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n,
    ds0, dz0, N, H, eps,
    MAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bidirectional, one program per (batch, head): queries, then keys. s and z: of forward."""
    bh = tl.program_id(0)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    dq, dk, dv = (
        head(dq, bh, H, dq_b, dq_h),
        head(dk, bh, H, dk_b, dk_h),
        head(dv, bh, H, dv_b, dv_h),
    )
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    d, at_s, at_z = tl.arange(0, BD), bh.to(tl.int64) * D * DV, bh.to(tl.int64) * D
    S = tile(s + at_s, DV, d, D, 0, DV, BV)
    Z = tl.load(z + at_z + d, mask=d < D, other=0.0)
    dS = tl.zeros((BD, BV), tl.float32)
    dZ = tl.zeros((BD,), tl.float32)
    if ds is not None:
        dS += tile(ds + at_s, DV, d, D, 0, DV, BV)
        dZ += tl.load(dz + at_z + d, mask=d < D, other=0.0)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        f = features(q, q_n, None, at, N, 0, MAP, D, BD)
        inv = inverse(tl.sum(f * Z[None, :], 1) + eps)
        g = inv[:, None] * tile(do, g_n, at, N, 0, DV, BV)  # (BN, BV)
        r = -tl.sum(g * tile(o, o_n, at, N, 0, DV, BV), 1)
        x = dot(g, tl.trans(S), PRECISION) + r[:, None] * Z[None, :]
        x *= slope(tile(q, q_n, at, N, 0, D, BD), MAP)
        put(dq, dq_n, at, N, 0, x, D, BD)
        dS += dot(tl.trans(f), g, PRECISION)
        dZ += tl.sum(f * r[:, None], 0)
    put(ds0 + at_s, DV, d, D, 0, dS, DV, BV)
    tl.store(dz0 + at_z + d, dZ, mask=d < D)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        f = features(k, k_n, mask, at, N, 0, MAP, D, BD)
        c = tile(v, v_n, at, N, 0, DV, BV)
        put(dv, dv_n, at, N, 0, dot(f, dS, PRECISION), DV, BV)
        x = dot(c, tl.trans(dS), PRECISION, "a") + dZ[None, :]
        x *= slope(tile(k, k_n, at, N, 0, D, BD), MAP)
        if mask is not None:
            x = tl.where((tl.load(mask + at, mask=at < N, other=0) != 0)[:, None], x, 0.0)
        put(dk, dk_n, at, N, 0, x, D, BD)


# --- launcher -------------------------------------------------------------------------------------


def backward(do, ds, dz, q, k, v, o, s, z, key_mask, s0, z0, feature_map, causal, eps):
    """tab::linear_bwd"""
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    do, q, k, v, o, mask = rows(do), rows(q), rows(k), rows(v), rows(o), mask_bytes(key_mask)
    s, z, s0, z0, ds, dz = whole(s, z, s0, z0, ds, dz)
    (b, h, n, d), keys = q.shape, k.shape[2]
    dim_v, m = v.shape[-1], {"MAP": feature_map, **meta(q, v)}
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    if one_launch(q, k, causal) and max(d, dim_v) <= FUSED_SIZE:
        ds0 = q.new_empty(b, h, d, dim_v, dtype=torch.float32)
        dz0 = ds0.new_empty(b, h, d)
        m |= {"BN": 32, "num_warps": 8}  # S and dS crowd the registers
        if m["PRECISION"] == "bf16" and capability(q.device) >= 90:
            m["maxnreg"] = 128  # 133 on sm_90: then one program alone would fill a processor
        launch(
            linear_fused_backward, (b * h,), *strided(q, k, v, do, o), mask, s, z, ds, dz,
            *strided(dq, dk, dv), ds0, dz0, n, h, eps, **m,
        )  # fmt: skip
        return dq, dk, dv, ds0, dz0
    size, count = segments(q, v, d, causal)
    tiles, across, across_v = cdiv(n, m["BN"]), cdiv(d, m["BD"]), cdiv(dim_v, m["BV"])
    m_out = {"CAUSAL": causal, **m}
    seen = one_state(s, z)
    if causal:
        _, _, seen = scanned(k, v, mask, None, None, s0, z0, size, count, causal, False, m)
    inv = q.new_empty(b * h, n, dtype=torch.float32)
    r = torch.empty_like(inv)
    launch(
        linear_scalars, (b * h, tiles), *strided(q, k, do, o), mask, seen[1], *seen[3:], inv, r,
        n, h, size, eps, **m_out,
    )  # fmt: skip
    launch(
        linear_grad_q, (b * h, tiles, across), *strided(q, k, v, do), mask, inv, r, *seen,
        *strided(dq), n, h, size, **m_out,
    )  # fmt: skip
    ds0, dz0, seen = scanned(q, do, None, inv, r, ds, dz, size, count, causal, True, m)
    tiles = cdiv(keys, m["BN"])
    launch(
        linear_grad_k, (b * h, tiles, across), *strided(q, k, v, do), mask, inv, r, *seen,
        *strided(dk), keys, h, size, **m_out,
    )  # fmt: skip
    launch(
        linear_grad_v, (b * h, tiles, across_v), *strided(q, k, do), mask, inv, seen[0], seen[2],
        seen[4], *strided(dv), keys, h, size, **m_out,
    )  # fmt: skip
    return dq, dk, dv, ds0, dz0


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, mask, s, z, *options in linear.cases():
        yield v, s, z, q, k, v, v, s, z, mask, s, z, *options


register("linear_bwd", backward, takes=lambda do, ds, dz, *x: takes(*x), cases=cases)
