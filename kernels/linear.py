"""tab::linear_fwd for CUDA in Triton (formula and symbols: tab/ops/linear.py).

    o_i = φ(q_i)ᵀT / (…),  T = [S z] = Σ_j φ(k_j) [v_j 1]ᵀ

Bidirectional: one program per (batch, head) does both sums in one launch when N is small or heads
fill the GPU. Otherwise, and when causal, N is cut into segments:

    states   T of every segment, in parallel
    scan     causal: T before each segment (after it, in the backward); else their sum
    outputs  φ(q)ᵀT, and when causal the scores inside the token's own segment

Every order of summation is fixed, nothing is atomic: the same input gives the same bits.
float64, and D or Dv above 256, run the reference, unless Triton was asked for by name.
"""

import torch
import triton
import triton.language as tl

from tab.ops.linear import forward_reference, linear_fwd  # defined before this is loaded

from ._common import (
    block,
    dot,
    head,
    hide,
    launch,
    outside,
    precision,
    processors,
    put,
    rows,
    tile,
    token_major_empty,
)

TOKENS = 64  # most tokens in a tile; segments are multiples of it
SEGMENT = 256  # tokens whose causal scores are computed directly: less state traffic, more FLOPs
FUSED_TOKENS = 256  # not measured yet: up to here one launch is expected to win
FUSED_SIZE = 128  # largest D and Dv whose S one program keeps in registers
MAX_SIZE = 256
SCAN = 1024  # elements of T one scan program walks

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def phi(x, MAP: tl.constexpr):
    """φ(x), codes as in tab.ops.linear.FEATURE_MAPS"""
    if MAP == 0:
        return tl.where(x > 0, x + 1, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == 1:
        return tl.where(x < 0, 0.0, x)
    else:
        return x


@triton.jit
def inverse(den):
    """1/den, and 0 where den is 0"""
    return tl.where(den == 0, 0.0, 1.0 / tl.where(den == 0, 1.0, den))


@triton.jit
def features(
    ptr, stride, mask, at, n, first, MAP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """φ of a tile; 0 outside the tensor and where the key mask (N,) is 0."""
    inside = (at < n)[:, None] & (first + tl.arange(0, BLOCK) < SIZE)[None, :]
    if mask is not None:
        inside = inside & (tl.load(mask + at, mask=at < n, other=0) != 0)[:, None]
    return tl.where(inside, phi(tile(ptr, stride, at, n, first, SIZE, BLOCK), MAP), 0.0)


@triton.jit
def states(
    a, a_b, a_h, a_n, c, c_b, c_h, c_n, mask, inv, r, t, N, H, segment,
    MAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T of a segment: Σ φ(k)[v 1]ᵀ, or with inv and r (B·H, N) the backward's Σ φ(q)[do·inv r]ᵀ.

    t (B·H, segments, D·Dv + D): S, then z.
    """
    bh, part = tl.program_id(0), tl.program_id(1)
    d0, v0 = tl.program_id(2) // tl.cdiv(DV, BV) * BD, tl.program_id(2) % tl.cdiv(DV, BV) * BV
    a, c = head(a, bh, H, a_b, a_h), head(c, bh, H, c_b, c_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    if inv is not None:
        inv += bh.to(tl.int64) * N
        r += bh.to(tl.int64) * N
    s = tl.zeros((BD, BV), tl.float32)
    z = tl.zeros((BD,), tl.float32)
    first = part * segment
    for start in range(first, tl.minimum(first + segment, N), BN):
        at = start + tl.arange(0, BN)
        f = features(a, a_n, mask, at, N, d0, MAP, D, BD)  # (BN, BD)
        x = tile(c, c_n, at, N, v0, DV, BV)  # (BN, BV)
        if inv is not None:
            x *= tl.load(inv + at, mask=at < N, other=0.0)[:, None]
            z += tl.sum(f * tl.load(r + at, mask=at < N, other=0.0)[:, None], 0)
        else:
            z += tl.sum(f, 0)
        s += dot(tl.trans(f), x, PRECISION)
    t += (bh.to(tl.int64) * tl.num_programs(1) + part) * (D * DV + D)
    at = d0 + tl.arange(0, BD)
    put(t, DV, at, D, v0, s, DV, BV)
    if v0 == 0:
        tl.store(t + D * DV + at, z, mask=at < D)


@triton.jit
def scan(
    t, s0, z0, s, z, segments,
    CAUSAL: tl.constexpr, REVERSE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """s, z = initial state + all segments; causal: t becomes the sum before each segment."""
    bh = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_s, in_z = at < D * DV, (at >= D * DV) & (at < D * DV + D)
    total = tl.zeros((BLOCK,), tl.float32)
    if s0 is not None:
        total += tl.load(s0 + bh * D * DV + at, mask=in_s, other=0.0)
        total += tl.load(z0 + bh * D + at - D * DV, mask=in_z, other=0.0)
    for i in range(segments):
        part = segments - 1 - i if REVERSE else i
        here = t + (bh * segments + part) * (D * DV + D) + at
        x = tl.load(here, mask=in_s | in_z, other=0.0)
        if CAUSAL:
            tl.store(here, total, mask=in_s | in_z)
        total += x
    tl.store(s + bh * D * DV + at, total, mask=in_s)
    tl.store(z + bh * D + at - D * DV, total, mask=in_z)


@triton.jit
def outputs(
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
        for j0 in range(part * segment, start + BN, BN):
            j = j0 + tl.arange(0, BN)
            p = tl.zeros((BN, BN), tl.float32)  # φ(q_i)·φ(k_j)
            for d0 in range(0, D, BD):
                f = features(q, q_n, None, at, N, d0, MAP, D, BD)
                p += dot(f, tl.trans(features(k, k_n, mask, j, N, d0, MAP, D, BD)), PRECISION)
            p = tl.where(at[:, None] >= j[None, :], p, 0.0)
            den += tl.sum(p, 1)
            num += dot(p, tile(v, v_n, j, N, v0, DV, BV), PRECISION)
    den += eps
    num *= inverse(den)[:, None]
    put(head(o, bh, H, o_b, o_h), o_n, at, N, v0, num, DV, BV)


@triton.jit
def fused(
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
    s += bh.to(tl.int64) * D * DV
    z += bh.to(tl.int64) * D
    d = tl.arange(0, BD)
    S = tl.zeros((BD, BV), tl.float32)
    Z = tl.zeros((BD,), tl.float32)
    if s0 is not None:
        S += tile(s0 + bh.to(tl.int64) * D * DV, DV, d, D, v0, DV, BV)
        Z += tl.load(z0 + bh.to(tl.int64) * D + d, mask=d < D, other=0.0)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        f = features(k, k_n, mask, at, N, 0, MAP, D, BD)  # (BN, BD)
        S += dot(tl.trans(f), tile(v, v_n, at, N, v0, DV, BV), PRECISION)
        Z += tl.sum(f, 0)
    put(s, DV, d, D, v0, S, DV, BV)
    if v0 == 0:
        tl.store(z + d, Z, mask=d < D)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        f = features(q, q_n, None, at, N, 0, MAP, D, BD)
        den = tl.sum(f * Z[None, :], 1) + eps
        num = dot(f, S, PRECISION)
        num *= inverse(den)[:, None]
        put(head(o, bh, H, o_b, o_h), o_n, at, N, v0, num, DV, BV)


# --- launchers ------------------------------------------------------------------------------------


def limit(q, k, v) -> str | None:
    return outside(q, MAX_SIZE, D=q.shape[-1], Dv=v.shape[-1])


def fits_fused(q, v, causal, most=FUSED_SIZE) -> bool:
    b, h, n, _ = q.shape
    enough = n <= FUSED_TOKENS or b * h >= 2 * processors(q.device)
    return not causal and enough and max(q.shape[-1], v.shape[-1]) <= most


def mask_bytes(key_mask):
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def meta(q, v, feature_map) -> dict:
    """The compile-time arguments of every tiled kernel."""
    d, dv = q.shape[-1], v.shape[-1]
    # tf32x3 holds three times the operands: fewer tokens, more threads.
    tokens, warps = (32, 8) if q.dtype == torch.float32 else (TOKENS, 4)
    return {
        "MAP": feature_map, "D": d, "DV": dv, "BN": tokens, "BD": block(d), "BV": block(dv),
        "PRECISION": precision(q), "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def segments(q, v, causal) -> tuple[int, int]:
    """(tokens in a segment, segments): enough programs to fill the GPU, fixed when causal."""
    b, h, n, d = q.shape
    size = SEGMENT
    if not causal:
        tiles = -(-d // block(d)) * -(-v.shape[-1] // block(v.shape[-1]))
        splits = max(1, 4 * processors(q.device) // (b * h * tiles))
        size = max(SEGMENT, -(-n // splits // TOKENS) * TOKENS)
    return size, -(-n // size)


def scanned(a, c, mask, inv, r, s0, z0, size, count, causal, reverse, m):
    """Launches `states` and `scan`. -> final S and z, and the arguments s, z, strides with which a
    kernel finds the state that a segment sees."""
    b, h, n, d = a.shape
    dv, bh = c.shape[-1], b * h
    t = a.new_empty(bh, count, d * dv + d, dtype=torch.float32)
    s, z = t.new_empty(b, h, d, dv), t.new_empty(b, h, d)
    tiles = -(-d // m["BD"]) * -(-dv // m["BV"])
    launch(
        states, (bh, count, tiles), a, *a.stride()[:3], c, *c.stride()[:3], mask, inv, r, t,
        n, h, size, **m,
    )  # fmt: skip
    launch(
        scan, (bh, -(-t.shape[-1] // SCAN)), t, s0, z0, s, z, count, CAUSAL=causal,
        REVERSE=reverse, D=d, DV=dv, BLOCK=SCAN,
    )  # fmt: skip
    if causal:
        seen = (t, t.flatten()[d * dv :], count * t.shape[-1], count * t.shape[-1], t.shape[-1])
    else:
        seen = (s, z, d * dv, d, 0)
    return s, z, seen


def forward(q, k, v, key_mask, s0, z0, feature_map, causal, eps):
    """tab::linear_fwd"""
    if limit(q, k, v):
        return forward_reference(q, k, v, key_mask, s0, z0, feature_map, causal, eps)
    k, v = hide(key_mask, k, v)
    q, k, v, mask = rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, z0 = (None, None) if s0 is None else (s0.contiguous(), z0.contiguous())
    b, h, n, d = q.shape
    dv, m, o = v.shape[-1], meta(q, v, feature_map), token_major_empty(v)
    strides = q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3]
    if fits_fused(q, v, causal):
        s = q.new_empty(b, h, d, dv, dtype=torch.float32)
        z = s.new_empty(b, h, d)
        m["BD"] = block(d, FUSED_SIZE)
        launch(
            fused, (b * h, -(-dv // m["BV"])), *strides, mask, s0, z0, o, *o.stride()[:3], s, z,
            n, h, eps, **m,
        )  # fmt: skip
        return o, s, z
    size, count = segments(q, v, causal)
    s, z, seen = scanned(k, v, mask, None, None, s0, z0, size, count, causal, False, m)
    launch(
        outputs, (b * h, -(-n // m["BN"]), -(-dv // m["BV"])), *strides, mask, *seen,
        o, *o.stride()[:3], n, h, size, eps, CAUSAL=causal, **m,
    )  # fmt: skip
    return o, s, z


torch.library.impl("tab::linear_fwd", "CUDA", forward)
linear_fwd.limits["triton"] = limit
