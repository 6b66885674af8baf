"""tab::performer_fwd for CUDA in Triton (formula and symbols: tab/ops/performer.py).

    o_i = Σ_m e^(b_im) T_m / (…),  T_m = [S z]_m = Σ_j e^(a_jm) [v_j 1], held at a shift c_m

Bidirectional: one launch does both sums when N is small or heads fill the GPU, one program per
(batch, head). Otherwise, and when causal, N is cut into segments:

    states   T and its own shift of every segment, in parallel, online over its tokens
    scan     causal: T before each segment, at the running shift; else their sum
    outputs  φ(q)ᵀT, and when causal the pairs inside the token's own segment

The features, N·M numbers, never leave the chip. Every order of summation is fixed, nothing is
atomic: the same input gives the same bits. Any M; float64, and D or Dv above 256, run the
reference, unless Triton was asked for by name.
"""

import torch
import triton
import triton.language as tl

from tab.ops.performer import forward_reference, performer_fwd

from ._common import (
    OLD,
    block,
    head,
    hide,
    launch,
    outside,
    precision,
    processors,
    rows,
    token_major_empty,
)
from ._favor import NOTHING, factor, output, state

SEGMENT = 256  # tokens whose causal pairs are computed directly: less state traffic, more FLOPs
FUSED_TOKENS = 256  # not measured yet: up to here one launch is expected to win
MAX_SIZE = 256
SCAN = 1024  # elements of T one scan program walks

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
    s, z, c, s_bh, z_bh, c_bh, t_seg, c_seg, o, o_b, o_h, o_n, lse, N, H, segment, eps,
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


# --- launchers ------------------------------------------------------------------------------------


def limit(q, k, v, projection) -> str | None:
    return outside(q, MAX_SIZE, D=q.shape[-1], Dv=v.shape[-1])


def fits_fused(q, causal) -> bool:
    b, h, n, _ = q.shape
    return not causal and (n <= FUSED_TOKENS or b * h >= 2 * processors(q.device))


def mask_bytes(key_mask):
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def meta(q, v, w, kernel, causal) -> dict:
    """The compile-time arguments of every tiled kernel."""
    d, dv, m = q.shape[-1], v.shape[-1], w.shape[0]
    # tf32x3 holds three times the operands: fewer tokens, more threads.
    few = q.dtype == torch.float32
    tokens, warps = (32 if few or (causal and OLD) else 64), (8 if few else 4)
    return {
        "KERNEL": kernel, "D": d, "DV": dv, "M": m,
        "BN": tokens, "BM": block(m), "BD": block(d), "BV": block(dv),
        # Exponents want more than bfloat16's 8 bits; features lie in [0, 1] and add up.
        "EXACT": "tf32x3" if q.dtype == torch.float32 else "tf32", "PRECISION": precision(q),
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def segments(q, v, w, causal) -> tuple[int, int]:
    """(tokens in a segment, segments): enough programs to fill the GPU, fixed when causal."""
    b, h, n, _ = q.shape
    size = SEGMENT
    if not causal:
        tiles = -(-w.shape[0] // block(w.shape[0])) * -(-v.shape[-1] // block(v.shape[-1]))
        splits = max(1, 4 * processors(q.device) // (b * h * tiles))
        size = max(SEGMENT, -(-n // splits // 64) * 64)
    return size, -(-n // size)


def scanned(k, v, w, mask, s0, z0, c0, size, count, causal, m):
    """Launches the states and their scan. -> final S, z, c; the arguments s, z, c, strides with
    which a kernel finds the state that a segment sees; the running shifts when causal."""
    b, h, n, _ = k.shape
    dv, features, bh = m["DV"], m["M"], b * h
    t = w.new_empty(bh, count, features * dv + features)
    own = w.new_empty(bh, count, features)
    s, z = w.new_empty(b, h, features, dv), w.new_empty(b, h, features)
    c, running = torch.empty_like(z), w.new_empty(bh, count + 1, features) if causal else None
    tiles = -(-features // m["BM"]) * -(-dv // m["BV"])
    launch(
        performer_states, (bh, count, tiles), k, *k.stride()[:3], v, *v.stride()[:3], w, mask,
        t, own, n, h, size, **m,
    )  # fmt: skip
    launch(
        performer_scan, (bh, -(-t.shape[-1] // SCAN)), t, own, s0, z0, c0, s, z, c, running, count,
        KERNEL=m["KERNEL"], CAUSAL=causal, DV=dv, M=features, BLOCK=SCAN,
    )  # fmt: skip
    return (s, z, c), seen(t, running) if causal else once(s, z, c), running


def seen(t, running, after: int = 0):
    """The states t (B·H, segments, M·Dv + M) that each segment sees, at their running shifts."""
    _, count, size = t.shape
    features = running.shape[-1]
    z, c = t.flatten()[size - features :], running.flatten()[after * features :]
    return t, z, c, count * size, count * size, (count + 1) * features, size, features


def once(s, z, c):
    """One state s (B, H, M, Dv) that all see."""
    features, dv = s.shape[2:]
    return s, z, c, features * dv, features, features, 0, 0


def forward(q, k, v, projection, key_mask, s0, z0, c0, kernel, causal, eps):
    """tab::performer_fwd"""
    if limit(q, k, v, projection):
        return forward_reference(q, k, v, projection, key_mask, s0, z0, c0, kernel, causal, eps)
    k, v = hide(key_mask, k, v)
    q, k, v, w, mask = rows(q), rows(k), rows(v), projection.contiguous(), mask_bytes(key_mask)
    if s0 is not None:
        s0, z0, c0 = s0.contiguous(), z0.contiguous(), c0.contiguous()
    b, h, n, _ = q.shape
    m, o = meta(q, v, w, kernel, causal), token_major_empty(v)
    lse = w.new_empty(b, h, n)
    strides = q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3]
    if fits_fused(q, causal):
        s, z = w.new_empty(b, h, m["M"], m["DV"]), w.new_empty(b, h, m["M"])
        c = torch.empty_like(z)
        launch(
            performer_fused, (b * h,), *strides, w, mask, s0, z0, c0, o, *o.stride()[:3], s, z, c,
            lse, n, h, eps, **m,
        )  # fmt: skip
        return o, s, z, c, lse
    size, count = segments(q, v, w, causal)
    final, state_, _ = scanned(k, v, w, mask, s0, z0, c0, size, count, causal, m)
    launch(
        performer_outputs, (b * h, -(-n // m["BN"]), -(-m["DV"] // m["BV"])), *strides, w, mask,
        *state_, o, *o.stride()[:3], lse, n, h, size, eps, CAUSAL=causal, **m,
    )  # fmt: skip
    return o, *final, lse


torch.library.impl("tab::performer_fwd", "CUDA", forward)
performer_fwd.limits["triton"] = limit
