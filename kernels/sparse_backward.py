"""tab::sparse_bwd for CUDA in Triton (formulas: tab/ops/sparse.py, _softmax_backward.py).

dq walks over the rows' lists as the forward does. dk and dv walk over the transpose: a program owns
BN keys of a block column and visits the block rows that see it; causal's diagonal comes first.
Heads that share keys may have other patterns: each has its own dk and dv, which are added up.
Parts of long lists are summed in order: nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import token_major

from . import _few, sparse
from ._launch import launch, register, rows, rules_of, strided, token_major_empty
from ._lists import batch_head, below, parts, reach, slot_of, work
from ._softmax import quiet, real_keys, takes
from ._softmax_backward import grad_kv_tile, grad_q_tile, row_sums
from ._tiles import head, key_head, put, tile
from .sparse import merging, partial, plan

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def sparse_grad_q(
    do, g_b, g_h, g_n, q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n,
    dq, dq_b, dq_h, dq_n, lse, delta, part_dq, mask, slopes, ptr, col, N, M, H, KV, nb, b, lists,
    items, slots, scale, cap,
    CUT: tl.constexpr, SUB: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BN queries, BD of its columns, or part_dq (groups, slots, b, D); delta (B·H, N) for the
    next kernel."""
    group, item = tl.program_id(0) // items, tl.program_id(0) % items
    sub, d0 = tl.program_id(1), tl.program_id(2) * BD
    which, first, last, slot = work(ptr, item, nb, lists, CUT)
    if slot == -2:
        return
    bh, r = batch_head(group, which, nb, lists, H), which % nb
    q = head(q, bh, H, q_b, q_h)
    k, v = key_head(k, bh, H, KV, k_b, k_h), key_head(v, bh, H, KV, v_b, v_h)
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    stop, shift = tl.minimum((r + 1) * b, N), M - N
    i = r * b + sub * BN + tl.arange(0, BN)
    sums = row_sums(do, g_n, o, o_n, i, stop, DV, BV)
    if (d0 == 0) & (item < lists):
        tl.store(delta + bh.to(tl.int64) * N + i, sums, mask=i < stop)
    full, last = reach(col, first, last, r * b, stop, M, shift, b, CAUSAL)
    middle = first if PADDED else first + below(col, first, last, full)
    top = tl.load(lse + bh.to(tl.int64) * N + i, mask=i < stop, other=float("inf"))
    at = quiet(mask, bh // H, q, q_n, i, stop, N, M, D, BD)
    if slopes is not None:
        slopes += bh % H
    x, g = tile(q, q_n, at, stop, 0, D, BD), tile(do, g_n, at, stop, 0, DV, BV)
    y = tl.zeros((BN, BD), tl.float32)
    for e in range(first * SUB, middle * SUB):
        j = tl.load(col + e // SUB) * b + e % SUB * BN + tl.arange(0, BN)
        seen = None
        if mask is not None:
            real, j = real_keys(mask, bh // H, j, M)
            seen = real[None, :]
        y = grad_q_tile(
            y, x, g, top, sums, q, q_n, do, g_n, at, stop, k, k_n, v, v_n, j, M, d0, seen, scale,
            cap, slopes, shift, False, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    for e in range(middle * SUB, last * SUB):
        c = tl.load(col + e // SUB)
        j, end = c * b + e % SUB * BN + tl.arange(0, BN), tl.minimum((c + 1) * b, M)
        seen = (j < end)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None] + shift)
        if mask is not None:
            real, j = real_keys(mask, bh // H, j, M)
            seen = seen & real[None, :]
        y = grad_q_tile(
            y, x, g, top, sums, q, q_n, do, g_n, at, stop, k, k_n, v, v_n, j, end, d0, seen, scale,
            cap, slopes, shift, CAUSAL, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    y *= scale
    if slot == -1:
        put(head(dq, bh, H, dq_b, dq_h), dq_n, i, stop, d0, y, D, BD)
    else:
        place = (group.to(tl.int64) * slots + slot) * b
        put(part_dq + place * D, D, i - r * b, b, d0, y, D, BD)


@triton.jit
def sparse_grad_kv(
    do, g_b, g_h, g_n, q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n,
    dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, lse, delta, part_dk, part_dv,
    mask, slopes, ptr, row, N, M, H, KV, nb, b, lists, items, slots, scale, cap,
    CUT: tl.constexpr, SUB: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys from a head of q, BD and BV of their columns, or part_dk and part_dv."""
    group, item = tl.program_id(0) // items, tl.program_id(0) % items
    sub, d0, v0 = tl.program_id(1), tl.program_id(2) * BD, tl.program_id(2) * BV
    which, first, last, slot = work(ptr, item, nb, lists, CUT)
    if slot == -2:
        return
    bh, c = batch_head(group, which, nb, lists, H), which % nb
    q, do = head(q, bh, H, q_b, q_h), head(do, bh, H, g_b, g_h)
    k, v = key_head(k, bh, H, KV, k_b, k_h), key_head(v, bh, H, KV, v_b, v_h)
    lse += bh.to(tl.int64) * N
    delta += bh.to(tl.int64) * N
    stop, shift = tl.minimum((c + 1) * b, M), M - N
    j = c * b + sub * BN + tl.arange(0, BN)
    at, real = j, None
    if mask is not None:
        real, at = real_keys(mask, bh // H, j, M)
    if slopes is not None:
        slopes += bh % H
    y, z = tile(k, k_n, at, stop, 0, D, BD), tile(v, v_n, at, stop, 0, DV, BV)
    x, w = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32)
    middle = first
    if CAUSAL:
        # From the block row of the first query that sees one of these keys to that which sees all.
        first += below(row, first, last, tl.maximum(c * b - shift, 0) // b)
        all_of_them = tl.cdiv(tl.maximum(stop - 1 - shift, 0), b)
        middle = first + below(row, first, last, all_of_them)
        for e in range(first * SUB, middle * SUB):
            r = tl.load(row + e // SUB)
            i, end = r * b + e % SUB * BN + tl.arange(0, BN), tl.minimum((r + 1) * b, N)
            seen = j[:, None] <= i[None, :] + shift
            if mask is not None:
                i = quiet(mask, bh // H, q, q_n, i, end, N, M, D, BD)
                seen = seen & real[:, None]
            x, w = grad_kv_tile(
                x, w, y, z, lse, delta, q, q_n, do, g_n, i, end, k, k_n, v, v_n, at, stop, d0, v0,
                seen, scale, cap, slopes, shift, True, D, DV, BD, BV, PRECISION,
            )  # fmt: skip
    for e in range(middle * SUB, last * SUB):
        r = tl.load(row + e // SUB)
        i, end = r * b + e % SUB * BN + tl.arange(0, BN), tl.minimum((r + 1) * b, N)
        seen = None
        if mask is not None:
            i = quiet(mask, bh // H, q, q_n, i, end, N, M, D, BD)
            seen = real[:, None]
        x, w = grad_kv_tile(
            x, w, y, z, lse, delta, q, q_n, do, g_n, i, end, k, k_n, v, v_n, at, stop, d0, v0,
            seen, scale, cap, slopes, shift, False, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    x *= scale
    if mask is not None:
        x, w = tl.where(real[:, None], x, 0.0), tl.where(real[:, None], w, 0.0)
    if slot == -1:
        put(head(dk, bh, H, dk_b, dk_h), dk_n, j, stop, d0, x, D, BD)
        put(head(dv, bh, H, dv_b, dv_h), dv_n, j, stop, v0, w, DV, BV)
    else:
        place = (group.to(tl.int64) * slots + slot) * b
        put(part_dk + place * D, D, j - c * b, b, d0, x, D, BD)
        put(part_dv + place * DV, DV, j - c * b, b, v0, w, DV, BV)


@triton.jit
def sparse_add_parts(
    x, x_b, x_h, x_n, part_x, ptr, N, H, nb, b, lists, items, slots,
    CUT: tl.constexpr, SIZE: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x of the long lists: the sum of its parts."""
    group, item = tl.program_id(0) // items, tl.program_id(0) % items
    sub, d0 = tl.program_id(1), tl.program_id(2) * BLOCK
    which, first, count = parts(ptr, item, nb, lists, CUT)
    if count == 0:
        return
    bh, r = batch_head(group, which, nb, lists, H), which % nb
    i = sub * BN + tl.arange(0, BN)
    y = tl.zeros((BN, BLOCK), tl.float32)
    for part in range(count):
        at = (group.to(tl.int64) * slots + slot_of(first, part)) * b
        y += tile(part_x + at * SIZE, SIZE, i, b, d0, SIZE, BLOCK)
    stop = tl.minimum((r + 1) * b, N)
    put(head(x, bh, H, x_b, x_h), x_n, r * b + i, stop, d0, y, SIZE, BLOCK)


# --- launcher -------------------------------------------------------------------------------------


def backward(
    do, q, k, v, o, lse, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, causal, scale,
    softcap,
):  # fmt: skip
    """tab::sparse_bwd"""
    row_ptr, col, col_ptr, row = (x.contiguous() for x in (row_ptr, col, col_ptr, row))
    do, q, k, v, o, lse = rows(do), rows(q), rows(k), rows(v), rows(o), lse.contiguous()
    _, h, n, d = q.shape
    m, shared = k.shape[2], h // k.shape[1]
    dq, delta = token_major_empty(q), torch.empty_like(lse)
    dk, dv = (each_head(x, h) for x in (k, v))
    dims = block_size, causal, True
    sizes, groups, cuts, fixed = plan(q, k, v, row_ptr, col, col_ptr.shape[1] - 1, *dims)
    told, scales = rules_of(key_mask, slopes), (scale, softcap or None)
    if few := _few.one_tile(q, k, v, fixed):
        seen = _few.by_pattern(row_ptr, col, block_size)
        _few.backward(do, q, k, v, o, dq, dk, dv, lse, told, seen, scales, few)
        return dq, dk, dv
    across_d, across_v = cdiv(d, fixed["BD"]), cdiv(v.shape[-1], fixed["BV"])
    inputs, sub = strided(do, q, k, v), fixed["SUB"]

    def add(parts, n, ptr, sizes, cuts):
        for x, part, block, across in parts if cuts else ():
            launch(
                sparse_add_parts, (groups * cuts, sub, across), *strided(x), part, ptr,
                *merging(n, sizes, cuts), CUT=fixed["CUT"], SIZE=x.shape[-1], BN=fixed["BN"],
                BLOCK=block,
            )  # fmt: skip

    part_q = partial(q, groups, sizes, d)
    launch(
        sparse_grad_q, (groups * sizes["items"], sub, across_d), *inputs, *strided(o, dq), lse,
        delta, part_q, *told, row_ptr, col, *sizes.values(), *scales, **fixed,
    )  # fmt: skip
    add([(dq, part_q, fixed["BD"], across_d)], n, row_ptr, sizes, cuts)
    sizes, groups, cuts, fixed = plan(q, k, v, col_ptr, row, row_ptr.shape[1] - 1, *dims)
    part_k, part_v = (partial(q, groups, sizes, x.shape[-1]) for x in (k, v))
    launch(
        sparse_grad_kv, (groups * sizes["items"], sub, max(across_d, across_v)), *inputs,
        *strided(dk, dv), lse, delta, part_k, part_v, *told, col_ptr, row, *sizes.values(),
        *scales, **fixed,
    )  # fmt: skip
    parts_kv = (dk, part_k, fixed["BD"], across_d), (dv, part_v, fixed["BV"], across_v)
    add(parts_kv, m, col_ptr, sizes, cuts)
    if shared > 1:
        dk, dv = (x.unflatten(1, (-1, shared)).sum(2).to(q.dtype) for x in (dk, dv))
        dk, dv = token_major(dk), token_major(dv)
    return dq, dk, dv


def each_head(x: torch.Tensor, h: int) -> torch.Tensor:
    """Room for the gradient of x (B, H_kv, N, D) from each of h heads; what is added up afterwards
    is not rounded before."""
    b, kv, n, d = x.shape
    dtype = x.dtype if kv == h else torch.float32
    return x.new_empty(b, n, h, d, dtype=dtype).transpose(1, 2)


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, *options in sparse.cases():
        yield q, q, k, v, q, q.new_empty(q.shape[:3], dtype=torch.float32), *options


register("sparse_bwd", backward, takes=lambda do, *x: takes(*x), cases=cases)
