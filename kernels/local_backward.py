"""tab::local_bwd for CUDA in Triton (formulas: tab/ops/local.py, _softmax_backward.py).

dq walks over the keys as the forward does; dk and dv own a tile of keys and walk over the queries
that see it. Nothing is atomic: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from . import _few, local
from ._few import visible
from ._launch import launch, register, rows, rules_of, strided, token_major_empty
from ._softmax import quiet, real_keys, takes
from ._softmax_backward import grad_kv_tile, grad_q_tile, row_sums
from ._tiles import head, key_head, put, tile
from .local import place, turns, walk, window

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def grad_q_part(
    dq, x, g, top, delta, q, q_n, do, do_n, i, at, k, k_n, v, v_n, mask, b, d0, span, left,
    right, cols, N, M, scale, cap, slope,
    MASKED: tl.constexpr, GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
        dq = grad_q_tile(
            dq, x, g, top, delta, q, q_n, do, do_n, at, N, k, k_n, v, v_n, j, M, d0, seen, scale,
            cap, slope, M - N, MASKED, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def local_grad_q(
    do, g_b, g_h, g_n, q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n,
    dq, dq_b, dq_h, dq_n, lse, delta, mask, slopes, N, M, H, KV, left, right, height, cols, scale,
    cap,
    GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BN queries, BD of its columns; delta (B·H, N) for the next kernel."""
    tiles = tl.cdiv(N, BN)
    bh, start, d0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN, tl.program_id(1) * BD
    q = head(q, bh, H, q_b, q_h)
    k, v = key_head(k, bh, H, KV, k_b, k_h), key_head(v, bh, H, KV, v_b, v_h)
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    i = start + tl.arange(0, BN)
    lo, a, b, hi = walk(start, left, right, height, cols, N, M, GRID, BN, BN)
    if CAUSAL:
        hi = tl.minimum(hi, start + BN)
        a, b = hi, hi
    at = quiet(mask, bh // H, q, q_n, i, N, N, M, D, BD)
    if slopes is not None:
        slopes += bh % H
    sums = row_sums(do, g_n, o, o_n, i, N, DV, BV)
    if d0 == 0:
        tl.store(delta + bh.to(tl.int64) * N + i, sums, mask=i < N)
    top = tl.load(lse + bh.to(tl.int64) * N + i, mask=i < N, other=float("inf"))
    x, g = tile(q, q_n, at, N, 0, D, BD), tile(do, g_n, at, N, 0, DV, BV)
    y = tl.zeros((BN, BD), tl.float32)
    for inner in tl.static_range(1 if GRID else 2):
        y = grad_q_part(
            y, x, g, top, sums, q, q_n, do, g_n, i, at, k, k_n, v, v_n, mask, bh // H, d0,
            (lo, a, b, hi), left, right, cols, N, M, scale, cap, slopes,
            inner == 0, GRID, CAUSAL, D, DV, BN, BD, BV, PRECISION,
        )  # fmt: skip
    put(head(dq, bh, H, dq_b, dq_h), dq_n, i, N, d0, y * scale, D, BD)


@triton.jit
def grad_kv_part(
    dk, dv, y, z, lse, delta, q, q_h, q_n, do, do_h, do_n, k, k_n, v, v_n, j, real, at, mask, b,
    d0, v0, span, left, right, cols, N, M, scale, cap, slopes, GROUP: tl.constexpr,
    MASKED: tl.constexpr, GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The heads one after the other in one loop, as two would keep more addresses in registers;
    lse, delta, q, do and slopes start at the first."""
    stages: tl.constexpr = 1 if MASKED and not GRID else None
    each = turns(span, MASKED, BN)
    for turn in tl.range(0, GROUP * each, num_stages=stages):
        share = (turn // each).to(tl.int64)
        top, sums, slope = lse + share * N, delta + share * N, None
        x, g = q + share * q_h, do + share * do_h
        if slopes is not None:
            slope = slopes + share
        i = place(turn % each, span, MASKED, BN) + tl.arange(0, BN)
        seen = None
        if MASKED:
            seen = visible(i[None, :] + (M - N), j[:, None], left, right, cols, M, GRID, CAUSAL)
        if mask is not None:
            i = quiet(mask, b, x, q_n, i, N, N, M, D, BD)
            seen = (seen & real[:, None]) if MASKED else real[:, None]
        dk, dv = grad_kv_tile(
            dk, dv, y, z, top, sums, x, q_n, g, do_n, i, N, k, k_n, v, v_n, at, M, d0, v0, seen,
            scale, cap, slope, M - N, MASKED, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def local_grad_kv(
    do, g_b, g_h, g_n, q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n,
    dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, lse, delta, mask, slopes,
    N, M, H, KV, left, right, height, cols, scale, cap, GROUP: tl.constexpr,
    GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one head, BD and BV of their columns, from the GROUP heads of q that
    share it; j is seen from j − right to j + left."""
    tiles = tl.cdiv(M, BN)
    kv, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN
    d0, v0 = tl.program_id(1) * BD, tl.program_id(1) * BV
    k, v = head(k, kv, KV, k_b, k_h), head(v, kv, KV, v_b, v_h)
    batch = kv // KV
    j = start + tl.arange(0, BN)
    lo, a, b, hi = walk(start, right, left, height, cols, M, N, GRID, BN, BN)
    if CAUSAL:
        lo = tl.maximum(lo, start)
    at, real = j, None
    if mask is not None:
        real, at = real_keys(mask, batch, j, M)
    y, z = tile(k, k_n, at, M, 0, D, BD), tile(v, v_n, at, M, 0, DV, BV)
    x, w = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32)
    if slopes is not None:
        slopes += kv % KV * GROUP
    bh = kv.to(tl.int64) * GROUP
    for inner in tl.static_range(1 if GRID else 2):
        x, w = grad_kv_part(
            x, w, y, z, lse + bh * N, delta + bh * N, head(q, bh, H, q_b, q_h), q_h, q_n,
            head(do, bh, H, g_b, g_h), g_h, g_n, k, k_n, v, v_n, j, real, at, mask, batch, d0, v0,
            (lo, a, b, hi), left, right, cols, N, M, scale, cap, slopes, GROUP,
            inner == 0, GRID, CAUSAL, D, DV, BN, BD, BV, PRECISION,
        )  # fmt: skip
    if mask is not None:
        x, w = tl.where(real[:, None], x, 0.0), tl.where(real[:, None], w, 0.0)
    put(head(dk, kv, KV, dk_b, dk_h), dk_n, j, M, d0, x * scale, D, BD)
    put(head(dv, kv, KV, dv_b, dv_h), dv_n, j, M, v0, w, DV, BV)


# --- launcher -------------------------------------------------------------------------------------


def backward(
    do, q, k, v, o, lse, key_mask, slopes, left, right, height, cols, causal, scale, softcap
):  # fmt: skip
    """tab::local_bwd"""
    do, q, k, v, o, lse = rows(do), rows(q), rows(k), rows(v), rows(o), lse.contiguous()
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    options = left, right, height, cols, causal, scale, softcap
    rest, fixed, tiles = window(q, k, v, *options, backward=True)
    told = rules_of(key_mask, slopes)
    if few := _few.one_tile(q, k, v, fixed):
        seen = _few.by_window(*rest[4:6], cols)
        _few.backward(do, q, k, v, o, dq, dk, dv, lse, told, seen, rest[-2:], few)
        return dq, dk, dv
    sums, inputs = (lse, torch.empty_like(lse), *told), strided(do, q, k, v)
    across = cdiv(q.shape[-1], fixed["BD"])
    launch(local_grad_q, (tiles, across), *inputs, *strided(o, dq), *sums, *rest, **fixed)
    across = max(across, cdiv(v.shape[-1], fixed["BV"]))
    (b, kv, m, _), group = k.shape, q.shape[1] // k.shape[1]
    launch(
        local_grad_kv, (b * kv * cdiv(m, fixed["BN"]), across), *inputs, *strided(dk, dv), *sums,
        *rest, GROUP=group, **fixed,
    )  # fmt: skip
    return dq, dk, dv


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, *options in local.cases():
        yield q, q, k, v, q, q.new_empty(q.shape[:3], dtype=torch.float32), *options


register("local_bwd", backward, takes=lambda do, *x: takes(*x), cases=cases)
