"""tab::linear_fwd for CUDA in Triton (formula and symbols: tab/ops/linear.py).

    o_i = φ(q_i)ᵀT / (…),  T = [S z] = Σ_j φ(k_j) [v_j 1]ᵀ

Bidirectional: one program per (batch, head) does both sums in one launch when N is small or heads
fill the GPU. Otherwise, and when causal, N is cut into segments:

    states   T of every segment, in parallel
    scan     causal: T before each segment (after it, in the backward); else their sum
    outputs  φ(q)ᵀT, and when causal the scores inside the token's own segment; where D is one tile
             in bfloat16, a program takes T through a segment instead (_linear_walk.py)

Every order of summation is fixed, nothing is atomic: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import real
from tab.ops._heads import groups_forward

from . import _linear_walk
from ._launch import (
    HOPPER,
    block,
    capability,
    launch,
    mask_bytes,
    meta_heads,
    meta_tensor,
    register,
    rows,
    strided,
    token_major_empty,
    whole,
)
from ._linear import features, inverse, scanned
from ._linear_walk import linear_walk
from ._segments import meta, one_launch, segments, takes
from ._tiles import dot, head, put, sound, tile

FUSED_SIZE = 128  # largest D and Dv whose S one program keeps in registers

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def linear_outputs(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, mask, s, z, s_bh, z_bh, t_seg,
    o, o_b, o_h, o_n, N, H, segment, eps,
    MAP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one tile of tokens, BV of its columns."""
    bh, start, v0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BV
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    part = start // segment
    s += bh.to(tl.int64) * s_bh + part.to(tl.int64) * t_seg
    z += bh.to(tl.int64) * z_bh + part.to(tl.int64) * t_seg
    at = start + tl.arange(0, BN)
    num = tl.zeros((BN, BV), tl.float32)
    den = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BD):
        f, d = features(q, q_n, None, at, N, d0, MAP, D, BD), d0 + tl.arange(0, BD)
        num += dot(f, tile(s, DV, d, D, v0, DV, BV), PRECISION)
        den += tl.sum(f * tl.load(z + d, mask=d < D, other=0.0)[None, :], 1)
    if CAUSAL:
        for last in tl.static_range(2):  # the tile that meets itself comes last
            for j0 in tl.range(
                start if last else part * segment, start + BN if last else start, BN,
                num_stages=1 if last else None,  # nothing to read ahead
            ):  # fmt: skip
                j = j0 + tl.arange(0, BN)
                seen = at[:, None] >= j[None, :]
                p = tl.zeros((BN, BN), tl.float32)  # φ(q_i)·φ(k_j)
                for d0 in range(0, D, BD):
                    f = features(q, q_n, None, at, N, d0, MAP, D, BD)
                    p += dot(f, tl.trans(features(k, k_n, mask, j, N, d0, MAP, D, BD)), PRECISION)
                if last:
                    j, mark = sound(v, v_n, j, N, v0, DV, BV)
                    p = tl.where(seen, p + mark[None, :], 0.0)
                den += tl.sum(p, 1)
                num += dot(p, tile(v, v_n, j, N, v0, DV, BV), PRECISION, "b")
    den += eps
    num *= inverse(den)[:, None]
    put(head(o, bh, H, o_b, o_h), o_n, at, N, v0, num, DV, BV)


@triton.jit
def linear_fused(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, mask, s0, z0,
    o, o_b, o_h, o_n, s, z, N, H, eps,
    MAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bidirectional, one program per (batch, head) and BV columns: T stays on chip."""
    bh, v0 = tl.program_id(0), tl.program_id(1) * BV
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    d = tl.arange(0, BD)
    S = tl.zeros((BD, BV), tl.float32)
    Z = tl.zeros((BD,), tl.float32)
    if s0 is not None:
        S += tile(s0 + bh.to(tl.int64) * D * DV, DV, d, D, v0, DV, BV)
        Z += tl.load(z0 + bh.to(tl.int64) * D + d, mask=d < D, other=0.0)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        f = features(k, k_n, mask, at, N, 0, MAP, D, BD)  # (BN, BD)
        S += dot(tl.trans(f), tile(v, v_n, at, N, v0, DV, BV), PRECISION, "b")
        Z += tl.sum(f, 0)
    if s is not None:
        put(s + bh.to(tl.int64) * D * DV, DV, d, D, v0, S, DV, BV)
        if v0 == 0:
            tl.store(z + bh.to(tl.int64) * D + d, Z, mask=d < D)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        f = features(q, q_n, None, at, N, 0, MAP, D, BD)
        den = tl.sum(f * Z[None, :], 1) + eps
        num = dot(f, S, PRECISION)
        num *= inverse(den)[:, None]
        put(head(o, bh, H, o_b, o_h), o_n, at, N, v0, num, DV, BV)


# --- launcher -------------------------------------------------------------------------------------


@groups_forward
def forward(q, k, v, key_mask, s0, z0, feature_map, causal, eps, state=True):
    """tab::linear_fwd; S and z may be None without `state`."""
    k, v = real(key_mask, k, v)
    q, k, v, mask = rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, z0 = whole(s0, z0)
    b, h, n, d = q.shape
    dv, o = v.shape[-1], token_major_empty(q, v.shape[-1])
    m = {"MAP": feature_map, **meta(q, v)}
    if one_launch(q, k, causal) and max(d, dv) <= FUSED_SIZE:
        s = q.new_empty(b, h, d, dv, dtype=torch.float32) if state else None
        z = s.new_empty(b, h, d) if state else None
        m["BD"] = block(d, FUSED_SIZE)
        if capability(q.device) == HOPPER:
            # With two, the next tile's addresses are written to registers that the product which
            # is still under way reads (tests/ops/test_assembled.py).
            m["num_stages"] = 1
        launch(
            linear_fused, (b * h, cdiv(dv, m["BV"])), *strided(q, k, v), mask, s0, z0,
            *strided(o), s, z, n, h, eps, **m,
        )  # fmt: skip
        return o, s, z
    size, count = segments(k, v, d, causal)
    s, z, seen = scanned(k, v, mask, None, None, s0, z0, size, count, causal, False, m)
    if causal and d <= m["BD"] and m["PRECISION"] in _linear_walk.WALKS:
        if capability(q.device) < HOPPER:  # S and a tile of 64 tokens spill
            m["BN"] = 32
        launch(
            linear_walk, (b * h, count, cdiv(dv, m["BV"])), *strided(q, k, v), mask, *seen,
            *strided(o), n, h, size, eps, **m,
        )  # fmt: skip
        return o, s, z
    launch(
        linear_outputs, (b * h, cdiv(n, m["BN"]), cdiv(dv, m["BV"])), *strided(q, k, v), mask,
        *seen, *strided(o), n, h, size, eps, CAUSAL=causal, **m,
    )  # fmt: skip
    return o, s, z


def stateless(*args):
    """tab::linear_stateless_fwd"""
    return forward(*args, False)[0]


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    both, full = (torch.float32, torch.bfloat16), (torch.float32,)
    for b, h, n, d, causal, types in (
        (512, 8, 64, 64, False, both),  # one launch
        (512, 8, 64, 128, False, full),  # one launch forward, split backward
        (32, 8, 1024, 64, False, (torch.bfloat16,)),  # by segments
        (1, 8, 8192, 64, True, both),  # one tile across D
        (1, 8, 8192, 256, True, full),  # several
    ):
        for dtype in types:
            q = meta_heads(b, h, n, d, dtype)
            mask = meta_tensor(b, n, dtype=torch.bool)
            yield q, q, q, mask, meta_tensor(b, h, d, d), meta_tensor(b, h, d), 0, causal, 0.0


def stateless_cases():
    """One launch."""
    for *x, _, _, feature_map, causal, eps in list(cases())[:3]:
        yield *x, None, None, feature_map, causal, eps


register("linear_fwd", forward, takes=takes, cases=cases)
register("linear_stateless_fwd", stateless, takes=takes, cases=stateless_cases)
