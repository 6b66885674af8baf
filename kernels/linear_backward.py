"""tab::linear_bwd for CUDA in Triton. With inv = 1/den, g = inv·do, r = -g·o (tab/ops/linear.py):

    dφ(q_i) = T_i [g_i r_i],  dT_j = dT_N + Σ_{i≥j} φ(q_i) [g_i r_i]ᵀ
    dφ(k_j) = dT_j [v_j 1],   dv_j = dS_jᵀ φ(k_j)

φ is computed again, never stored. Bidirectional with few tokens or many heads: one launch.
Otherwise, when causal, states and scan of T; then pull: dq and the states of dT; their scan; then
push: dk and dv. Heads of more than one tile go by the scalars inv and r of every token, dq, states
and scan of dT, dk, dv; inside a token's own segment all use scores, as the forward does.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import answered, real
from tab.ops._heads import groups_backward

from . import _linear_walk, linear
from ._launch import (
    capability,
    launch,
    mask_bytes,
    meta_tensor,
    register,
    rows,
    strided,
    token_major_empty,
    whole,
)
from ._linear import features, inverse, scan, scanned, slope
from ._linear_backward import linear_grad_k, linear_grad_q, linear_grad_v, linear_scalars
from ._linear_walk import linear_pull, linear_push
from ._segments import meta, one_launch, one_state, segments, takes
from ._tiles import dot, head, put, tile

FUSED_SIZE = 64  # S and dS are both in registers

# --- kernels --------------------------------------------------------------------------------------


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
        dS += dot(tl.trans(f), g, PRECISION)  # before the last product: see _linear_walk.py
        dZ += tl.sum(f * r[:, None], 0)
        x = dot(g, tl.trans(S), PRECISION) + r[:, None] * Z[None, :]
        x *= slope(tile(q, q_n, at, N, 0, D, BD), MAP)
        put(dq, dq_n, at, N, 0, x, D, BD)
    if ds0 is not None:
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


def limits(q, m: dict) -> dict:
    """Of bidirectional kernels that hold S and dS: on sm_90 133 registers a thread would leave a
    processor room for one program, 128 for two."""
    few = m["PRECISION"] == "bf16" and capability(q.device) >= 90
    return {"num_warps": 8} | ({"maxnreg": 128} if few else {})


@groups_backward
def backward(
    do, ds, dz, q, k, v, o, s, z, key_mask, s0, z0, feature_map, causal, eps, state=True
):  # fmt: skip
    """tab::linear_bwd; dS₀ and dz₀ may be None without `state`."""
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    do, q, k, v, o, mask = rows(do), rows(q), rows(k), rows(v), rows(o), mask_bytes(key_mask)
    s, z, s0, z0, ds, dz = whole(s, z, s0, z0, ds, dz)
    (b, h, n, d), keys = q.shape, k.shape[2]
    dim_v, m = v.shape[-1], {"MAP": feature_map, **meta(q, v)}
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    if one_launch(q, k, causal) and max(d, dim_v) <= FUSED_SIZE:
        ds0 = q.new_empty(b, h, d, dim_v, dtype=torch.float32) if state else None
        dz0 = ds0.new_empty(b, h, d) if state else None
        m |= {"BN": 32, **limits(q, m)}  # S and dS crowd the registers
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
    if m["PRECISION"] in _linear_walk.WALKS and max(d, dim_v) <= FUSED_SIZE:
        pull, push, step = {**m_out, "BN": 32}, m_out, size  # S and dS crowd the registers
        if causal:
            pull["num_warps"] = 4 if capability(q.device) >= 90 else 8  # else pull spills
            push = pull
        else:
            pull, step = {**pull, **limits(q, m)}, m["BN"]
        t = inv.new_empty(b * h, count, d * dim_v + d)
        launch(
            linear_pull, (b * h, count), *strided(q, k, v, do, o), mask, *seen, t, inv, r,
            *strided(dq), n, h, size, eps, **pull,
        )  # fmt: skip
        ds0, dz0, seen = scan(t, (b, h, d, dim_v), ds, dz, causal, True)
        launch(
            linear_push, (b * h, cdiv(keys, step)), *strided(q, k, v, do), mask, inv, r, *seen,
            *strided(dk, dv), keys, h, step, **push,
        )  # fmt: skip
        return dq, dk, dv, ds0, dz0
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


def stateless(do, ds, dz, q, k, *rest):
    """tab::linear_stateless_bwd"""
    shared = q.shape[1] != k.shape[1]  # then each head of q has a share of dS₀, too
    return backward(do, ds, dz, q, k, *rest, shared)[:3]


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, mask, s, z, *options in linear.cases():
        yield v, s, z, q, k, v, v, s, z, mask, s, z, *options


def stateless_cases():
    for q, k, v, mask, *_, feature_map, causal, eps in linear.stateless_cases():
        (b, h, _, d), dv = q.shape, v.shape[-1]
        state = meta_tensor(b, h, d, dv), meta_tensor(b, h, d)
        yield v, None, None, q, k, v, v, *state, mask, None, None, feature_map, causal, eps


register("linear_bwd", backward, takes=lambda do, ds, dz, *x: takes(*x), cases=cases)
register(
    "linear_stateless_bwd", stateless, takes=lambda do, ds, dz, *x: takes(*x), cases=stateless_cases
)
