"""tab::mla_fwd and bent_mla_fwd for CUDA in Triton (formula and symbols: tab/ops/mla.py).

    k_n,h = W_uk,h c,  v_h = W_uv,h c,  S_h = (q_n·k_n + q_r·k_r)·scale,  o_h = softmax(S_h) v_h

One program per (batch entry, head) and tile of queries. It expands the head's keys and values from
the latents tile by tile, R in chunks, and never writes them; the softmax is online. The heads of
one entry run side by side and share its latents in L2. With N in one tile (the study's 64 tokens)
each key is expanded once; beyond, once for each tile of queries, which is why the public function
comes here for short N only, unless scores are capped or biased. Any N and R are right.
Deterministic, nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops.mla_forms import real_tokens

from ._launch import (
    block,
    launch,
    meta_tensor,
    outside,
    precision,
    register,
    rows,
    rules_of,
    strided,
    token_major_empty,
)
from ._softmax import LN2, biased, capped, finish, merge
from ._softmax_backward import steepness
from ._tiles import dot, head, hide, put, tile

# Dn and Dv, by precision: tf32x3 outgrows the registers.
MAX_SIZE = {"bf16": 256, "tf32": 256, "tf32x3": 128}
MAX_ROTARY = 128

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def expanded(
    c, c_n, w, w_d, at, N, R: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head, c Wᵀ (BN, SIZE) with c (N, R) and W (SIZE, R)."""
    x = tl.zeros((BN, BLOCK), tl.float32)
    for r0 in range(0, R, BR):
        chunk = tile(w, w_d, tl.arange(0, BLOCK), SIZE, r0, R, BR)  # (BLOCK, BR)
        x += dot(tile(c, c_n, at, N, r0, R, BR), tl.trans(chunk), PRECISION, "ab")
    return x


@triton.jit
def scores(
    qn, qr, k, kr, i, j, mask, slope, N, scale, cap,
    CAUSAL: tl.constexpr, DR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2(e)·S of queries i and keys j, −inf where i must not see j and outside N; how steep the
    cap is there. slope and cap as in _softmax.py."""
    s, steep = dot(qn, tl.trans(k), PRECISION, "a"), 1.0
    if DR > 0:
        s += dot(qr, tl.trans(kr), PRECISION, "ab")
    s = capped(s, scale, cap)
    if cap is not None:
        steep = steepness(s, cap)
    s = biased(s, i[:, None], j[None, :], slope)
    seen = j < N
    if mask is not None:
        seen = seen & (tl.load(mask + j, mask=j < N, other=0) != 0)
    seen = seen[None, :] & (i < N)[:, None]
    if CAUSAL:
        seen = seen & (i[:, None] >= j[None, :])
    return tl.where(seen, s, float("-inf")), steep


@triton.jit
def mla_forward(
    qn, qn_b, qn_h, qn_n, qr, qr_b, qr_h, qr_n, c, c_b, c_n, kr, kr_b, kr_n,
    uk, uk_h, uk_d, uv, uv_h, uv_d, mask, slopes, o, o_b, o_h, o_n, lse, peak, N, H, scale, cap,
    CAUSAL: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of BN queries, and the largest score among them: peak (B·H, tiles)."""
    bh, i = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    qn, qr = head(qn, bh, H, qn_b, qn_h), head(qr, bh, H, qr_b, qr_h)
    c, kr, uk, uv = c + b * c_b, kr + b * kr_b, uk + h * uk_h, uv + h * uv_h
    if mask is not None:
        mask += b * N
    if slopes is not None:
        slopes += h
    x = tile(qn, qn_n, i, N, 0, DN, BK)  # (BN, BK)
    y = tile(qr, qr_n, i, N, 0, DR, BP)  # (BN, BP)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    z = tl.zeros((BN, BV), tl.float32)
    end = tl.minimum((tl.program_id(1) + 1) * BN, N) if CAUSAL else N
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        k = expanded(c, c_n, uk, uk_d, j, N, R, DN, BN, BK, BR, PRECISION)  # (BN, BK)
        rotary = tile(kr, kr_n, j, N, 0, DR, BP)
        s, _ = scores(x, y, k, rotary, i, j, mask, slopes, N, scale, cap, CAUSAL, DR, PRECISION)
        p, z, top, total = merge(z, top, total, s)
        v = expanded(c, c_n, uv, uv_d, j, N, R, DV, BN, BV, BR, PRECISION)  # (BN, BV)
        hides = start == tl.program_id(1) * BN if CAUSAL else False
        p, v = hide(p, v, i[:, None] >= j[None, :], hides)
        z += dot(p, v, PRECISION)
    z, log = finish(z, top, total)
    put(head(o, bh, H, o_b, o_h), o_n, i, N, 0, z, DV, BV)
    tl.store(lse + bh.to(tl.int64) * N + i, log, mask=i < N)
    # The maximum passes over a NaN score, the sum does not; ∞ makes it NaN too.
    top = tl.where((total != total) & (top != float("inf")), total, top)
    if mask is not None:  # a token that is not real does not count as a query either
        top = tl.where(tl.load(mask + i, mask=i < N, other=0) != 0, top, float("-inf"))
    largest = tl.max(top, 0) * LN2
    nan = tl.sum(tl.where(top != top, 1, 0), 0) > 0
    largest = tl.where(nan, float("nan"), largest)
    tl.store(peak + bh.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), largest)


# --- launcher -------------------------------------------------------------------------------------


def takes(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *_) -> str | None:
    sizes = {"Dn": q_nope.shape[-1], "Dv": w_uv.shape[1]}
    return outside(q_nope, MAX_ROTARY, Dr=q_rope.shape[-1]) or outside(
        q_nope, MAX_SIZE[precision(q_nope)], **sizes
    )


def meta(q_nope, q_rope, w_uv, causal, backward: bool = False) -> dict:
    """The compile-time arguments. Not measured: tiles as long as the registers hold."""
    (dn, dr), (dv, r) = (x.shape[-1] for x in (q_nope, q_rope)), w_uv.shape[1:]
    how, wide = precision(q_nope), max(dn, dv)
    tokens = {"bf16": 64, "tf32": 32, "tf32x3": 16 if backward or wide > 64 else 32}[how]
    half = how == "bf16" and wide <= 128
    return {
        "CAUSAL": causal, "DN": dn, "DR": dr, "DV": dv, "R": r,
        "BN": block(q_nope.shape[2], 16 if wide > 128 else tokens), "BK": block(dn, 256),
        "BP": block(dr, MAX_ROTARY), "BV": block(dv, 256), "BR": block(r, 64 if half else 32),
        "PRECISION": how, "num_warps": 4 if half and wide <= 64 else 8, "num_stages": 2,
    }  # fmt: skip


def arguments(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask, slopes) -> tuple:
    """The operands, with the strides that the kernels take; one copy where rows are not whole."""
    c_kv, k_rope = real_tokens(key_mask, c_kv, k_rope)
    operands = map(rows, (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv))
    return *strided(*operands), *rules_of(key_mask, slopes)


def bent_forward(
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask, slopes, scale, causal, softcap
):
    """tab::bent_mla_fwd"""
    (b, h, n, _), m = q_nope.shape, meta(q_nope, q_rope, w_uv, causal)
    tiles = cdiv(n, m["BN"])
    o = token_major_empty(q_nope[..., :1].expand(b, h, n, w_uv.shape[1]))
    lse = q_nope.new_empty(b, h, n, dtype=torch.float32)
    peak = q_nope.new_empty(b, h, tiles, dtype=torch.float32)
    given = arguments(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask, slopes)
    rest = n, h, scale, softcap or None
    launch(mla_forward, (b * h, tiles), *given, *strided(o), lse, peak, *rest, **m)
    return o, lse, peak[..., 0] if tiles == 1 else peak.amax(-1)


def forward(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask, scale, causal):
    """tab::mla_fwd"""
    x = q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask
    return bent_forward(*x, None, scale, causal, 0.0)


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    both, half = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    for b, h, n, dn, dr, r, dv, causal, types in (
        (512, 8, 64, 48, 16, 128, 64, False, both),  # bfloat16: one tile
        (1, 128, 256, 128, 64, 512, 128, True, half),  # DeepSeek-V3
        (1, 8, 256, 128, 64, 512, 128, True, (torch.float32,)),  # float32's widest
        (1, 8, 256, 256, 128, 512, 256, True, (torch.float16, *half)),  # and the halves'
    ):
        shapes = (b, h, n, dn), (b, h, n, dr), (b, n, r), (b, n, dr), (h, dn, r), (h, dv, r)
        for dtype in types:
            x = (meta_tensor(*shape, dtype=dtype) for shape in shapes)
            yield *x, meta_tensor(b, n, dtype=torch.bool), 0.1, causal


def bent_cases():
    """The study's, and DeepSeek-V3's."""
    for *x, scale, causal in list(cases())[1:3]:
        yield *x, meta_tensor(x[0].shape[1]), scale, causal, 30.0


register("mla_fwd", forward, takes=takes, cases=cases)
register("bent_mla_fwd", bent_forward, takes=takes, cases=bent_cases)
