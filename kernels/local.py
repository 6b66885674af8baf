"""tab::local_fwd for CUDA in Triton (formulas: tab/ops/local.py, _softmax.py).

One program owns a tile of queries and walks over the keys that any of them sees. On a line the walk
has three parts: keys that only some see (masked), that all see, that only some see. On a grid it is
the band of whole rows of the image, masked. Nothing is atomic: the same input gives the same bits.
Up to 64 tokens are one tile (_few.py).
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from . import _few
from ._few import visible
from ._launch import (
    launch,
    meta_heads,
    meta_tensor,
    register,
    rows,
    rules_of,
    strided,
    token_major_empty,
)
from ._softmax import finish, forward_tile, heads, meta, quiet, real_keys, takes, tokens
from ._tiles import head, key_head, put, tile

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def walk(
    start, before, after, height, cols, N, M,
    GRID: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Where the BN of N tokens from `start` have partners among the M others, at most `before`
    ahead and `after` behind: masked from lo to a and from b to hi, all of them from a to b. lo, a,
    b are multiples of STEP, unless they are hi."""
    last = tl.minimum(start + BN, N) - 1
    start, last = start + (M - N), last + (M - N)  # the last of both stand at one place
    if GRID:
        lo = tl.maximum(start // cols - before, 0) * cols // STEP * STEP
        hi = tl.minimum(last // cols + after + 1, height) * cols
        return lo, hi, hi, hi
    else:
        lo = tl.maximum(start - before, 0) // STEP * STEP
        hi = tl.maximum(tl.minimum(last + after + 1, M), lo)
        a = tl.minimum(tl.cdiv(tl.maximum(last - before, 0), STEP) * STEP, hi)
        b = tl.maximum(tl.minimum(start + after + 1, M) // STEP * STEP, a)
        return lo, a, b, hi


@triton.jit
def turns(span, MASKED: tl.constexpr, BN: tl.constexpr):
    """How many tiles of a walk are masked, or are not."""
    lo, a, b, hi = span
    if MASKED:
        return tl.cdiv(a - lo, BN) + tl.cdiv(hi - b, BN)
    else:
        return (b - a) // BN


@triton.jit
def place(turn, span, MASKED: tl.constexpr, BN: tl.constexpr):
    """Where such a tile starts. Both edges are one loop: two bodies of it would be code, and
    addresses that registers hold."""
    lo, a, b, _ = span
    if MASKED:
        start = lo + turn * BN
        return tl.where(start < a, start, start + (b - a))
    else:
        return a + turn * BN


@triton.jit
def forward_part(
    o, top, total, x, q, q_n, i, at, k, k_n, v, v_n, mask, b, v0, span, left, right, cols, N, M,
    scale, cap, slope,
    MASKED: tl.constexpr, GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With the keys of a walk that are masked, or are not; queries i, read at `at`."""
    # A line has few masked tiles: they are not worth the memory of reading ahead.
    stages: tl.constexpr = 1 if MASKED and not GRID else None
    for turn in tl.range(0, turns(span, MASKED, BN), num_stages=stages):
        start = place(turn, span, MASKED, BN)
        j = start + tl.arange(0, BN)
        seen = None
        if MASKED:
            seen = visible(i[:, None] + (M - N), j[None, :], left, right, cols, M, GRID, CAUSAL)
        if mask is not None:
            real, j = real_keys(mask, b, j, M)
            seen = (seen & real[None, :]) if MASKED else real[None, :]
        o, top, total = forward_tile(
            o, top, total, x, q, q_n, at, N, k, k_n, v, v_n, j, M, v0, seen, scale, cap, slope,
            M - N, MASKED, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    return o, top, total


@triton.jit
def local_forward(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n, lse, mask, slopes,
    N, M, H, KV, left, right, height, cols, scale, cap,
    GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of BN queries, BV of its columns; lse (B·H, N)."""
    tiles = tl.cdiv(N, BN)
    bh, start, v0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN, tl.program_id(1) * BV
    q = head(q, bh, H, q_b, q_h)
    k, v = key_head(k, bh, H, KV, k_b, k_h), key_head(v, bh, H, KV, v_b, v_h)
    i = start + tl.arange(0, BN)
    lo, a, b, hi = walk(start, left, right, height, cols, N, M, GRID, BN, BN)
    if CAUSAL:
        hi = tl.minimum(hi, start + BN)
        a, b = hi, hi
    at = quiet(mask, bh // H, q, q_n, i, N, N, M, D, BD)
    if slopes is not None:
        slopes += bh % H
    x = tile(q, q_n, at, N, 0, D, BD)
    y = tl.zeros((BN, BV), tl.float32)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for inner in tl.static_range(1 if GRID else 2):
        y, top, total = forward_part(
            y, top, total, x, q, q_n, i, at, k, k_n, v, v_n, mask, bh // H, v0,
            (lo, a, b, hi), left, right, cols, N, M, scale, cap, slopes,
            inner == 0, GRID, CAUSAL, D, DV, BN, BD, BV, PRECISION,
        )  # fmt: skip
    y, top = finish(y, top, total)
    put(head(o, bh, H, o_b, o_h), o_n, i, N, v0, y, DV, BV)
    if v0 == 0:
        tl.store(lse + bh.to(tl.int64) * N + i, top, mask=i < N)


# --- launcher -------------------------------------------------------------------------------------


def window(q, k, v, left, right, height, cols, causal, scale, softcap, backward=False):
    """-> the arguments after the tensors, the compile-time arguments, tiles of queries."""
    (b, h, n, _), (_, kv, m, _) = q.shape, k.shape
    if causal and not cols:  # on a line no mask is needed for that
        right, causal = 0, False
    bn = tokens(q, max(n, m))
    fixed = {"GRID": cols > 0, "CAUSAL": causal, "BN": bn, **meta(q, v, backward)}
    rest = n, m, h, kv, left, right, height, cols, scale, softcap or None
    return rest, fixed, b * h * cdiv(n, bn)


def forward(q, k, v, key_mask, slopes, left, right, height, cols, causal, scale, softcap):
    """tab::local_fwd"""
    q, k, v, o = rows(q), rows(k), rows(v), token_major_empty(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    rest, m, tiles = window(q, k, v, left, right, height, cols, causal, scale, softcap)
    told = rules_of(key_mask, slopes)
    if few := _few.one_tile(q, k, v, m):
        _few.forward(q, k, v, o, lse, told, _few.by_window(*rest[4:6], cols), rest[-2:], few)
        return o, lse
    launch(
        local_forward, (tiles, cdiv(v.shape[-1], m["BV"])),
        *strided(q, k, v, o), lse, *told, *rest, **m,
    )  # fmt: skip
    return o, lse


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for first, q in enumerate(heads()):
        yield q, q, q, None, None, 64, 64, 0, 0, False, 0.1, 0.0
        if first == 0:
            yield q, q, q, None, None, 64, 64, 128, 64, True, 0.1, 0.0  # causal grid
            yield q, q, q, *rules(q), 64, 64, 0, 0, False, 0.1, 30.0
            yield q, q[:, :2], q[:, :2], None, None, 64, 64, 0, 0, False, 0.1, 0.0
    q = meta_heads(512, 8, 64, 64, torch.bfloat16)
    yield q, q, q, None, None, 2, 2, 8, 8, False, 0.1, 0.0


def rules(q):
    """key_mask and slopes"""
    return meta_tensor(q.shape[0], q.shape[2], dtype=torch.bool), meta_tensor(q.shape[1])


register("local_fwd", forward, takes=takes, cases=cases)
