"""What the forward and the backward of `linear` share: features, and the states of the segments.

φ, T = [S z] and the symbols: tab/ops/linear.py.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import launch, strided
from ._segments import SCAN, each_state, one_state
from ._tiles import dot, head, put, tile

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
def slope(x, MAP: tl.constexpr):
    """φ'(x)"""
    if MAP == 0:
        return tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == 1:
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


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
def linear_states(
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
def linear_scan(
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


# --- launcher -------------------------------------------------------------------------------------


def scanned(a, c, mask, inv, r, s0, z0, size, count, causal, reverse, m):
    """Launches the states of the segments and their scan. -> final S and z, and what each segment
    sees."""
    b, h, n, d = a.shape
    dv = c.shape[-1]
    t = a.new_empty(b * h, count, d * dv + d, dtype=torch.float32)
    tiles = cdiv(d, m["BD"]) * cdiv(dv, m["BV"])
    launch(linear_states, (b * h, count, tiles), *strided(a, c), mask, inv, r, t, n, h, size, **m)
    return scan(t, (b, h, d, dv), s0, z0, causal, reverse)


def scan(t, sizes: tuple[int, ...], s0, z0, causal, reverse):
    """The same of states that are there; sizes: (B, H, D, Dv) of S."""
    bh, count, size = t.shape
    d, dv = sizes[2:]
    s, z = t.new_empty(sizes), t.new_empty(sizes[:3])
    launch(
        linear_scan, (bh, cdiv(size, SCAN)), t, s0, z0, s, z, count, CAUSAL=causal,
        REVERSE=reverse, D=d, DV=dv, BLOCK=SCAN,
    )  # fmt: skip
    return s, z, each_state(t, d) if causal else one_state(s, z)
