"""tab::performer_fwd for CUDA in Triton (formula and symbols: tab/ops/performer.py).

    o_i = Σ_m e^(b_im) T_m / (…),  T_m = [S z]_m = Σ_j e^(a_jm) [v_j 1], held at a shift c_m

Bidirectional: one launch does both sums when N is small or heads fill the GPU, one program per
(batch, head). Otherwise, and when causal, N is cut into segments:

    states   T and its own shift of every segment, in parallel, online over its tokens
    scan     causal: T before each segment, at the running shift; else their sum
    outputs  φ(q)ᵀT, and when causal the pairs inside the token's own segment; where D is one tile
             in bfloat16, a program takes T through a segment instead (_performer_walk.py)

The features, N·M numbers, never leave the chip. Every order of summation is fixed, nothing is
atomic: the same input gives the same bits. Any M.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import real
from tab.ops._heads import groups_forward

from . import _segments
from ._launch import (
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
from ._performer import NOTHING, factor, output, state
from ._performer_walk import performer_walk, waiting, walks
from ._segments import SCAN, each_state, one_launch, one_state, segments, takes
from ._tiles import head

# Triton 3.6 fails on causal tiles of 64 tokens for sm_100, and spills more for sm_80 than 3.8 does.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def performer_states(
    k, k_b, k_h, k_n, v, v_b, v_h, v_n, w, mask, t, c, N, H, segment,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """t (B·H, segments, M·Dv + M): S, then z; c (B·H, segments, M)"""
    bh, part = tl.program_id(0), tl.program_id(1)
    m0, v0 = tl.program_id(2) // tl.cdiv(DV, BV) * BM, tl.program_id(2) % tl.cdiv(DV, BV) * BV
    k, v = head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    at = bh.to(tl.int64) * tl.num_programs(1) + part
    t += at * (M * DV + M)
    first = part * segment
    state(
        k, k_n, v, v_n, w, mask, first, tl.minimum(first + segment, N), N, None, None, None,
        t, t + M * DV, c + at * M, m0, v0,
        KERNEL, D, DV, M, BN, BM, BD, BV, EXACT, PRECISION,
    )  # fmt: skip


@triton.jit
def performer_scan(
    t, c, s0, z0, c0, s, z, c_end, running, segments,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """s, z at shift c_end = initial state + all segments. Causal: t becomes the state before each
    segment and running (B·H, segments + 1, M) its shift, the final one last."""
    bh = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_s, in_z = at < M * DV, (at >= M * DV) & (at < M * DV + M)
    m = tl.where(in_s, at // DV, at - M * DV)
    live = in_s | in_z
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), 0.0 if KERNEL == 1 else NOTHING, tl.float32)
    if s0 is not None:
        total += tl.load(s0 + bh * M * DV + at, mask=in_s, other=0.0)
        total += tl.load(z0 + bh * M + m, mask=in_z, other=0.0)
        top = tl.load(c0 + bh * M + m, mask=live, other=0.0)
    for i in range(segments):
        here = t + (bh * segments + i) * (M * DV + M) + at
        x = tl.load(here, mask=live, other=0.0)
        y = tl.load(c + (bh * segments + i) * M + m, mask=live, other=0.0)
        if CAUSAL:
            tl.store(here, total, mask=live)
            tl.store(running + (bh * (segments + 1) + i) * M + m, top, mask=in_z)
        if KERNEL == 1:
            total += x
        else:
            new = tl.maximum(top, y)
            total = total * factor(top, new, KERNEL) + x * factor(y, new, KERNEL)
            top = new
    tl.store(s + bh * M * DV + at, total, mask=in_s)
    tl.store(z + bh * M + m, total, mask=in_z)
    tl.store(c_end + bh * M + m, top, mask=in_z)
    if CAUSAL:
        tl.store(running + (bh * (segments + 1) + segments) * M + m, top, mask=in_z)


@triton.jit
def performer_outputs(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, w, mask,
    s, z, s_bh, z_bh, t_seg, c, c_bh, c_seg, o, o_b, o_h, o_n, lse, N, H, segment, eps,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one tile of tokens, BV of its columns."""
    bh, start, v0 = tl.program_id(0), tl.program_id(1) * BN, tl.program_id(2) * BV
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    i, part = bh.to(tl.int64), (start // segment).to(tl.int64)
    output(
        q, q_n, k, k_n, v, v_n, w, mask,
        s + i * s_bh + part * t_seg, z + i * z_bh + part * t_seg, c + i * c_bh + part * c_seg,
        head(o, bh, H, o_b, o_h), o_n, lse + i * N, start, start // segment * segment, N, eps, v0,
        KERNEL, CAUSAL, D, DV, M, BN, BM, BD, BV, EXACT, PRECISION,
    )  # fmt: skip


@triton.jit
def performer_fused(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, w, mask, s0, z0, c0,
    o, o_b, o_h, o_n, s, z, c, lse, N, H, eps,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Bidirectional, one program per (batch, head): the state, then the outputs."""
    bh = tl.program_id(0)
    i = bh.to(tl.int64)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    if s0 is not None:
        s0, z0, c0 = s0 + i * M * DV, z0 + i * M, c0 + i * M
    s, z, c = s + i * M * DV, z + i * M, c + i * M
    for m0 in range(0, M, BM):
        for v0 in range(0, DV, BV):
            state(
                k, k_n, v, v_n, w, mask, 0, N, N, s0, z0, c0, s, z, c, m0, v0,
                KERNEL, D, DV, M, BN, BM, BD, BV, EXACT, PRECISION,
            )  # fmt: skip
    tl.debug_barrier()  # s, z and c are read back by other threads of this program
    for start in range(0, N, BN):
        for v0 in range(0, DV, BV):
            output(
                q, q_n, k, k_n, v, v_n, w, mask, s, z, c, head(o, bh, H, o_b, o_h), o_n,
                lse + i * N, start, 0, N, eps, v0,
                KERNEL, False, D, DV, M, BN, BM, BD, BV, EXACT, PRECISION,
            )  # fmt: skip


# --- launcher -------------------------------------------------------------------------------------


def meta(q, v, w, kernel, causal) -> dict:
    """The compile-time arguments of every tiled kernel."""
    m = {"KERNEL": kernel, "M": w.shape[0], "BM": block(w.shape[0]), **_segments.meta(q, v)}
    # Exponents want more than bfloat16's 8 bits; features lie in [0, 1] and add up.
    m["EXACT"] = "tf32x3" if q.dtype == torch.float32 else "tf32"
    return m | ({"BN": 32} if causal and OLD and capability(q.device) != 90 else {})


def scanned(k, v, w, mask, s0, z0, c0, size, count, causal, m):
    """Launches the states of the segments and their scan. -> final S, z and c; what each segment
    sees, at which shift; the running shift (B·H, segments + 1, M), only when causal."""
    b, h, n, _ = k.shape
    (features, dv), bh = (m["M"], m["DV"]), b * h
    t = w.new_empty(bh, count, features * dv + features)
    own = w.new_empty(bh, count, features)
    running = w.new_empty(bh, count + 1, features) if causal else None
    s, z = w.new_empty(b, h, features, dv), w.new_empty(b, h, features)
    c = torch.empty_like(z)
    tiles = cdiv(features, m["BM"]) * cdiv(dv, m["BV"])
    launch(
        performer_states, (bh, count, tiles), *strided(k, v), w, mask, t, own, n, h, size, **m
    )  # fmt: skip
    launch(
        performer_scan, (bh, cdiv(t.shape[-1], SCAN)), t, own, s0, z0, c0, s, z, c, running, count,
        KERNEL=m["KERNEL"], CAUSAL=causal, DV=dv, M=features, BLOCK=SCAN,
    )  # fmt: skip
    if causal:
        return (s, z, c), (*each_state(t, features), *each_shift(running)), running
    return (s, z, c), (*one_state(s, z), *one_shift(c)), None


def each_shift(running, after: int = 0) -> tuple:
    """The shift before each segment, or `after` it: its first element, strides of (batch, head) and
    segment."""
    _, count, features = running.shape
    return running.flatten()[after * features :], count * features, features


def one_shift(c) -> tuple:
    """The shift c (B, H, M) of a state that all see."""
    return c, c.shape[-1], 0


@partial(groups_forward, lse=True)
def forward(q, k, v, projection, key_mask, s0, z0, c0, kernel, causal, eps):
    """tab::performer_fwd"""
    k, v = real(key_mask, k, v)
    q, k, v, mask = rows(q), rows(k), rows(v), mask_bytes(key_mask)
    w, s0, z0, c0 = whole(projection, s0, z0, c0)
    b, h, n, _ = q.shape
    m, o = meta(q, v, w, kernel, causal), token_major_empty(q, v.shape[-1])
    lse = w.new_empty(b, h, n)
    if one_launch(q, k, causal):
        s, z = w.new_empty(b, h, m["M"], m["DV"]), w.new_empty(b, h, m["M"])
        c = torch.empty_like(z)
        launch(
            performer_fused, (b * h,), *strided(q, k, v), w, mask, s0, z0, c0, *strided(o), s, z, c,
            lse, n, h, eps, **m,
        )  # fmt: skip
        return o, s, z, c, lse
    size, count = segments(k, v, m["M"], causal)
    final, seen, _ = scanned(k, v, w, mask, s0, z0, c0, size, count, causal, m)
    walk = walks(m, 1) if causal and eps == 0 else None  # ε is at the shift that a query knows
    if walk is not None:
        num, den = waiting(w, walk, b * h, n, m["DV"]), waiting(w, walk, b * h, n)
        launch(
            performer_walk, (b * h, count), *strided(q, k, v), w, mask, *seen, num, den,
            *strided(o), lse, n, h, size, **walk,
        )  # fmt: skip
        return o, *final, lse
    launch(
        performer_outputs, (b * h, cdiv(n, m["BN"]), cdiv(m["DV"], m["BV"])), *strided(q, k, v), w,
        mask, *seen, *strided(o), lse, n, h, size, eps, CAUSAL=causal, **m,
    )  # fmt: skip
    return o, *final, lse


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    half, full = torch.bfloat16, torch.float32
    for b, h, n, d, features, causal, dtype in (
        (512, 8, 64, 64, 256, False, half),  # one launch
        (512, 8, 64, 64, 256, False, full),
        (1, 8, 8192, 64, 256, True, half),  # segments, of one tile across D
        (1, 8, 8192, 128, 256, True, half),  # and of two
        (1, 8, 8192, 256, 512, True, full),  # several tiles of everything
    ):
        q, w = meta_heads(b, h, n, d, dtype), meta_tensor(features, d)
        mask, z0 = meta_tensor(b, n, dtype=torch.bool), meta_tensor(b, h, features)
        yield q, q, q, w, mask, meta_tensor(b, h, features, d), z0, z0, 0, causal, 0.0


register("performer_fwd", forward, takes=takes, cases=cases)
