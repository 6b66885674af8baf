"""tab::performer_bwd for CUDA in Triton. With g_i = do_i, r_i = -do_i·o_i and the query's features
divided by the denominator already (norm = lse; tab/ops/performer.py):

    dφ(q_i) = T_i [g_i r_i],  dT_j = dT_N + Σ_{i≥j} φ(q_i) [g_i r_i]ᵀ
    dφ(k_j) = dT_j [v_j 1],   dv_j = dS_jᵀ φ(k_j)
    db = dφ(q)∘φ', da = dφ(k)∘φ';  dq̂ = db W,  dk̂ = da W - (Σ_m da_m) k̂

φ is computed again, never stored; T is held at a shift c and dT then at -c, so that nothing
overflows. Bidirectional with few tokens or many heads: one launch. Otherwise queries (dq and r),
states and scan of dT, then keys (dk and dv); causal first makes T of every segment again, and
inside a token's own segment uses pairs, as the forward does. Where that walks, pull is queries and
states in one, and push is keys.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import answered, real
from tab.ops._heads import groups_backward

from . import performer
from ._launch import (
    block,
    launch,
    mask_bytes,
    register,
    rows,
    strided,
    token_major_empty,
    whole,
)
from ._performer import NOTHING, factor, vector
from ._performer_backward import keys, pulled, queries
from ._performer_walk import waiting, walks
from ._performer_walk_backward import performer_pull, performer_push
from ._segments import SCAN, each_state, one_launch, one_state, segments, takes
from ._tiles import head, put
from .performer import each_shift, meta, one_shift, scanned

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def performer_queries(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, o, o_b, o_h, o_n,
    w, mask, s, z, s_bh, z_bh, t_seg, c, c_bh, c_seg, lse, r, dq, dq_b, dq_h, dq_n, N, H, segment,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of tokens, BX of its columns; r (B·H, N)"""
    bh, start, x0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BX
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    i, part = bh.to(tl.int64), (start // segment).to(tl.int64)
    queries(
        head(q, bh, H, q_b, q_h), q_n, head(k, bh, H, k_b, k_h), k_n, head(v, bh, H, v_b, v_h),
        v_n, head(do, bh, H, g_b, g_h), g_n, head(o, bh, H, o_b, o_h), o_n, w, mask,
        s + i * s_bh + part * t_seg, z + i * z_bh + part * t_seg, c + i * c_bh + part * c_seg,
        lse + i * N, r + i * N, head(dq, bh, H, dq_b, dq_h), dq_n,
        start, start // segment * segment, N, x0,
        KERNEL, CAUSAL, D, DV, M, BN, BM, BD, BV, BX, EXACT, PRECISION,
    )  # fmt: skip


@triton.jit
def performer_pulled(
    q, q_b, q_h, q_n, do, g_b, g_h, g_n, w, lse, r, c, c_bh, c_seg, t, N, H, segment,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """t (B·H, segments, M·Dv + M): dT of each segment's queries at the shift they see."""
    bh, part = tl.program_id(0), tl.program_id(1)
    m0, v0 = tl.program_id(2) // tl.cdiv(DV, BV) * BM, tl.program_id(2) % tl.cdiv(DV, BV) * BV
    i, m, first = bh.to(tl.int64), m0 + tl.arange(0, BM), part * segment
    S, Z = pulled(
        head(q, bh, H, q_b, q_h), q_n, head(do, bh, H, g_b, g_h), g_n, w, lse + i * N, r + i * N,
        c + i * c_bh + part.to(tl.int64) * c_seg, first, tl.minimum(first + segment, N), N,
        None, None, m0, v0, KERNEL, D, DV, M, BN, BM, BD, BV, EXACT, PRECISION,
    )  # fmt: skip
    t += (i * tl.num_programs(1) + part) * (M * DV + M)
    put(t, DV, m, M, v0, S, DV, BV)
    if v0 == 0:
        tl.store(t + M * DV + m, Z, mask=m < M)


@triton.jit
def performer_unwind(
    t, ds, dz, c0, c, running, ds0, dz0, segments,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Causal: t becomes dT after each segment at the shift there; else its first part becomes the
    sum of all. ds0, dz0, where c0 is given: moved on to the initial state's shift."""
    bh = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_s, in_z = at < M * DV, (at >= M * DV) & (at < M * DV + M)
    m = tl.where(in_s, at // DV, at - M * DV)
    live = in_s | in_z
    total = tl.zeros((BLOCK,), tl.float32)
    if ds is not None:
        total += tl.load(ds + bh * M * DV + at, mask=in_s, other=0.0)
        total += tl.load(dz + bh * M + m, mask=in_z, other=0.0)
    top = tl.load(c + bh * M + m, mask=live, other=0.0)
    t += bh * segments * (M * DV + M) + at
    for i in range(segments):
        here = t + (segments - 1 - i).to(tl.int64) * (M * DV + M)
        x = tl.load(here, mask=live, other=0.0)
        if CAUSAL:
            tl.store(here, total, mask=live)
            at_part = running + (bh * (segments + 1) + segments - 1 - i) * M + m
            new = tl.load(at_part, mask=live, other=0.0)
            total *= factor(new, top, KERNEL)
            top = new
        total += x
    if not CAUSAL:
        tl.store(t, total, mask=live)
    if c0 is not None:
        if not CAUSAL:
            total *= factor(tl.load(c0 + bh * M + m, mask=live, other=0.0), top, KERNEL)
        tl.store(ds0 + bh * M * DV + at, total, mask=in_s)
        tl.store(dz0 + bh * M + m, total, mask=in_z)


@triton.jit
def performer_keys(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, w, mask,
    ds, dz, s_bh, z_bh, t_seg, c, c_bh, c_seg, before, lse, r,
    dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, N, H, segment,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of tokens, BX of their columns."""
    bh, start, x0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BX
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    i, part = bh.to(tl.int64), (start // segment).to(tl.int64)
    shift = i * c_bh + part * c_seg
    keys(
        head(q, bh, H, q_b, q_h), q_n, head(k, bh, H, k_b, k_h), k_n, head(v, bh, H, v_b, v_h),
        v_n, head(do, bh, H, g_b, g_h), g_n, w, mask,
        ds + i * s_bh + part * t_seg, dz + i * z_bh + part * t_seg, c + shift, before + shift,
        lse + i * N, r + i * N, head(dk, bh, H, dk_b, dk_h), dk_n,
        head(dv, bh, H, dv_b, dv_h), dv_n,
        start, tl.minimum((start // segment + 1) * segment, N), N, x0,
        KERNEL, CAUSAL, D, DV, M, BN, BM, BD, BV, BX, EXACT, PRECISION,
    )  # fmt: skip


@triton.jit
def performer_fused_backward(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, do, g_b, g_h, g_n, o, o_b, o_h, o_n,
    w, mask, s, z, c, c0, ds, dz, lse, r, t, dq, dq_b, dq_h, dq_n, dk, dk_b, dk_h, dk_n,
    dv, dv_b, dv_h, dv_n, ds0, dz0, N, H,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Bidirectional, one program per (batch, head): queries, dT, keys. t (B·H, 1, M·Dv + M)"""
    bh = tl.program_id(0)
    i = bh.to(tl.int64)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, o, dq = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h), head(dq, bh, H, dq_b, dq_h)
    dk, dv = head(dk, bh, H, dk_b, dk_h), head(dv, bh, H, dv_b, dv_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    if ds is not None:
        ds, dz = ds + i * M * DV, dz + i * M
    s, z, c, lse, r = s + i * M * DV, z + i * M, c + i * M, lse + i * N, r + i * N
    t += i * (M * DV + M)
    for start in range(0, N, BN):
        for x0 in range(0, D, BX):
            queries(
                q, q_n, k, k_n, v, v_n, do, g_n, o, o_n, w, mask, s, z, c, lse, r, dq, dq_n,
                start, 0, N, x0,
                KERNEL, False, D, DV, M, BN, BM, BD, BV, BX, EXACT, PRECISION,
            )  # fmt: skip
    tl.debug_barrier()  # r is read back by other threads of this program
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        for v0 in range(0, DV, BV):
            S, Z = pulled(
                q, q_n, do, g_n, w, lse, r, c, 0, N, N, ds, dz, m0, v0,
                KERNEL, D, DV, M, BN, BM, BD, BV, EXACT, PRECISION,
            )  # fmt: skip
            put(t, DV, m, M, v0, S, DV, BV)
            if v0 == 0:
                tl.store(t + M * DV + m, Z, mask=m < M)
            if c0 is not None:
                before = vector(c0 + i * M, m, M, NOTHING)
                less = factor(before, vector(c, m, M, NOTHING), KERNEL)
                put(ds0 + i * M * DV, DV, m, M, v0, S * less[:, None], DV, BV)
                if v0 == 0:
                    tl.store(dz0 + i * M + m, Z * less, mask=m < M)
    tl.debug_barrier()  # and so is dT
    for start in range(0, N, BN):
        for x0 in range(0, max(D, DV), BX):
            keys(
                q, q_n, k, k_n, v, v_n, do, g_n, w, mask, t, t + M * DV, c, c, lse, r, dk, dk_n,
                dv, dv_n, start, N, N, x0,
                KERNEL, False, D, DV, M, BN, BM, BD, BV, BX, EXACT, PRECISION,
            )  # fmt: skip


# --- launcher -------------------------------------------------------------------------------------


@groups_backward
def backward(
    do, ds, dz, q, k, v, projection, o, s, z, c, lse, key_mask, s0, z0, c0, kernel, causal
):
    """tab::performer_bwd"""
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    (lse,) = answered(key_mask, do, lse[..., None], fill=torch.inf)
    do, q, k, v, o, mask = rows(do), rows(q), rows(k), rows(v), rows(o), mask_bytes(key_mask)
    w, s, z, c, lse, s0, z0, c0, ds, dz = whole(projection, s, z, c, lse, s0, z0, c0, ds, dz)
    (b, h, n, d), count_k = q.shape, k.shape[2]
    forward_m = meta(q, v, w, kernel, causal)
    m = {**forward_m, "BM": block(w.shape[0], 32)}  # two sums crowd the registers
    dim_v, features = m["DV"], m["M"]
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    ds0, dz0 = (x.new_empty(0) if s0 is None else torch.empty_like(x) for x in (s, z))
    r = torch.empty_like(lse)
    inputs = *strided(q, k, v, do, o), w, mask
    wide = {**m, "BX": block(max(d, dim_v))}
    if one_launch(q, k, causal):
        t = w.new_empty(b * h, 1, features * dim_v + features)
        launch(
            performer_fused_backward, (b * h,), *inputs, s, z, c, c0, ds, dz, lse, r, t,
            *strided(dq, dk, dv), ds0, dz0, n, h, **wide,
        )  # fmt: skip
        return dq, dk, dv, ds0, dz0
    size, count = segments(q, v, features, causal)
    tiles, columns = cdiv(n, m["BN"]), wide["BX"]
    seen, running = (*one_state(s, z), *one_shift(c)), None
    if causal:
        _, seen, running = scanned(k, v, w, mask, s0, z0, c0, size, count, causal, forward_m)
    shift, walk = seen[5:], walks(forward_m, 2) if causal else None
    t = w.new_empty(b * h, count, features * dim_v + features)
    if walk is not None:
        tops = w.new_empty(b * h, cdiv(n, walk["BN"]), features)
        rest, rest_v = (waiting(w, walk, b * h, n, x) for x in (d, dim_v))
        launch(
            performer_pull, (b * h, count), *inputs, *seen, lse, r, tops, t, rest, *strided(dq), n,
            h, size, **walk,
        )  # fmt: skip
    else:
        launch(
            performer_queries, (b * h, tiles, cdiv(d, columns)), *inputs, *seen, lse, r,
            *strided(dq), n, h, size, CAUSAL=causal, **wide,
        )  # fmt: skip
        launch(
            performer_pulled, (b * h, count, cdiv(features, m["BM"]) * cdiv(dim_v, m["BV"])),
            *strided(q, do), w, lse, r, *shift, t, n, h, size, **m,
        )  # fmt: skip
    launch(
        performer_unwind, (b * h, cdiv(t.shape[-1], SCAN)), t, ds, dz, c0, c, running, ds0, dz0,
        count, KERNEL=kernel, CAUSAL=causal, DV=dim_v, M=features, BLOCK=SCAN,
    )  # fmt: skip
    if causal:
        after = *each_state(t, features), *each_shift(running, after=1)
    else:  # the sum lies in the first segment's place
        after = *each_state(t, features)[:4], 0, *one_shift(c)
    if walk is not None:
        launch(
            performer_push, (b * h, count), *strided(q, k, v, do), w, mask, *after, shift[0], tops,
            lse, r, rest, rest_v, *strided(dk, dv), n, h, size, **walk | {"num_stages": 1},
        )  # fmt: skip
        return dq, dk, dv, ds0, dz0
    launch(
        performer_keys, (b * h, cdiv(count_k, m["BN"]), cdiv(max(d, dim_v), columns)),
        *strided(q, k, v, do), w, mask, *after, shift[0], lse, r, *strided(dk, dv), count_k, h,
        size, CAUSAL=causal, **wide | {"num_stages": 1},
    )  # fmt: skip
    return dq, dk, dv, ds0, dz0


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, w, mask, s, z, c, kernel, causal, _ in performer.cases():
        lse = z.new_empty(q.shape[:3])
        yield v, s, z, q, k, v, w, v, s, z, c, lse, mask, s, z, c, kernel, causal


register("performer_bwd", backward, takes=lambda do, ds, dz, *x: takes(*x), cases=cases)
