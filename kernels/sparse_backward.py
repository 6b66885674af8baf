"""tab::sparse_bwd for CUDA in Triton (formulas: tab/ops/sparse.py, _softmax_backward.py).

dq walks over the rows' lists as the forward does. dk and dv walk over the transpose: a program owns
BN keys of a block column and visits the block rows that see it; causal's diagonal comes first.
Parts of long lists are summed in order: nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from . import _few, sparse
from ._launch import launch, mask_bytes, register, rows, strided, token_major_empty
from ._softmax import quiet, real_keys, takes
from ._softmax_backward import grad_kv_tile, grad_q_tile, row_sums
from ._tiles import head, put, tile
from .sparse import batch_head, below, partial, parts, plan, slot_of, work

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def sparse_grad_q(
    do, g_b, g_h, g_n, q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n,
    dq, dq_b, dq_h, dq_n, lse, delta, part_dq, mask, slopes, ptr, col, N, H, nb, b, lists, items,
    slots, scale, cap,
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
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    stop = tl.minimum((r + 1) * b, N)
    i = r * b + sub * BN + tl.arange(0, BN)
    sums = row_sums(do, g_n, o, o_n, i, stop, DV, BV)
    if (d0 == 0) & (item < lists):
        tl.store(delta + bh.to(tl.int64) * N + i, sums, mask=i < stop)
    full = N // b
    if CAUSAL:
        last = first + below(col, first, last, r + 1)
        full = tl.minimum(full, r)
    middle = first if PADDED else first + below(col, first, last, full)
    top = tl.load(lse + bh.to(tl.int64) * N + i, mask=i < stop, other=float("inf"))
    at = quiet(mask, bh // H, q, q_n, i, stop, N, D, BD)
    if slopes is not None:
        slopes += bh % H
    x, g = tile(q, q_n, at, stop, 0, D, BD), tile(do, g_n, at, stop, 0, DV, BV)
    y = tl.zeros((BN, BD), tl.float32)
    for e in range(first * SUB, middle * SUB):
        j = tl.load(col + e // SUB) * b + e % SUB * BN + tl.arange(0, BN)
        seen = None
        if mask is not None:
            real, j = real_keys(mask, bh // H, j, N)
            seen = real[None, :]
        y = grad_q_tile(
            y, x, g, top, sums, q, q_n, do, g_n, at, stop, k, k_n, v, v_n, j, N, d0, seen, scale,
            cap, slopes, False, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    for e in range(middle * SUB, last * SUB):
        c = tl.load(col + e // SUB)
        j, end = c * b + e % SUB * BN + tl.arange(0, BN), tl.minimum((c + 1) * b, N)
        seen = (j < end)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None])
        if mask is not None:
            real, j = real_keys(mask, bh // H, j, N)
            seen = seen & real[None, :]
        y = grad_q_tile(
            y, x, g, top, sums, q, q_n, do, g_n, at, stop, k, k_n, v, v_n, j, end, d0, seen, scale,
            cap, slopes, CAUSAL, D, DV, BD, BV, PRECISION,
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
    mask, slopes, ptr, row, N, H, nb, b, lists, items, slots, scale, cap,
    CUT: tl.constexpr, SUB: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys, BD and BV of their columns, or part_dk and part_dv."""
    group, item = tl.program_id(0) // items, tl.program_id(0) % items
    sub, d0, v0 = tl.program_id(1), tl.program_id(2) * BD, tl.program_id(2) * BV
    which, first, last, slot = work(ptr, item, nb, lists, CUT)
    if slot == -2:
        return
    bh, c = batch_head(group, which, nb, lists, H), which % nb
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do = head(do, bh, H, g_b, g_h)
    lse += bh.to(tl.int64) * N
    delta += bh.to(tl.int64) * N
    stop = tl.minimum((c + 1) * b, N)
    j = c * b + sub * BN + tl.arange(0, BN)
    at, real = j, None
    if mask is not None:
        real, at = real_keys(mask, bh // H, j, N)
    if slopes is not None:
        slopes += bh % H
    y, z = tile(k, k_n, at, stop, 0, D, BD), tile(v, v_n, at, stop, 0, DV, BV)
    x, w = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32)
    middle = first
    if CAUSAL:
        first += below(row, first, last, c)
        middle = first + below(row, first, last, c + 1)
        for e in range(first * SUB, middle * SUB):
            i = c * b + e % SUB * BN + tl.arange(0, BN)
            seen = j[:, None] <= i[None, :]
            if mask is not None:
                i = quiet(mask, bh // H, q, q_n, i, stop, N, D, BD)
                seen = seen & real[:, None]
            x, w = grad_kv_tile(
                x, w, y, z, lse, delta, q, q_n, do, g_n, i, stop, k, k_n, v, v_n, at, stop, d0, v0,
                seen, scale, cap, slopes, True, D, DV, BD, BV, PRECISION,
            )  # fmt: skip
    for e in range(middle * SUB, last * SUB):
        r = tl.load(row + e // SUB)
        i, end = r * b + e % SUB * BN + tl.arange(0, BN), tl.minimum((r + 1) * b, N)
        seen = None
        if mask is not None:
            i = quiet(mask, bh // H, q, q_n, i, end, N, D, BD)
            seen = real[:, None]
        x, w = grad_kv_tile(
            x, w, y, z, lse, delta, q, q_n, do, g_n, i, end, k, k_n, v, v_n, at, stop, d0, v0,
            seen, scale, cap, slopes, False, D, DV, BD, BV, PRECISION,
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
    do, q, k, v, o, lse = rows(do), rows(q), rows(k), rows(v), rows(o), lse.contiguous()
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    sizes, groups, cuts, m = plan(q, v, row_ptr, col, block_size, causal, backward=True)
    told, scales = (mask_bytes(key_mask), slopes), (scale, softcap or None)
    if few := _few.one_tile(q, k, v, m):
        seen = _few.by_pattern(row_ptr, col, block_size)
        _few.backward(do, q, k, v, o, dq, dk, dv, lse, told, seen, scales, few)
        return dq, dk, dv
    delta = torch.empty_like(lse)
    part_q, part_k = (partial(q, groups, sizes, q.shape[-1]) for _ in range(2))
    part_v = partial(q, groups, sizes, v.shape[-1])
    across_d, across_v = cdiv(q.shape[-1], m["BD"]), cdiv(v.shape[-1], m["BV"])
    inputs = strided(do, q, k, v)
    programs, sub = groups * sizes["items"], m["SUB"]
    launch(
        sparse_grad_q, (programs, sub, across_d), *inputs, *strided(o, dq), lse, delta,
        part_q, *told, row_ptr, col, *sizes.values(), *scales, **m,
    )  # fmt: skip
    launch(
        sparse_grad_kv, (programs, sub, max(across_d, across_v)), *inputs, *strided(dk, dv),
        lse, delta, part_k, part_v, *told, col_ptr, row, *sizes.values(), *scales, **m,
    )  # fmt: skip
    if cuts:
        sizes["items"] = cuts
        for x, part, ptr, block, across in (
            (dq, part_q, row_ptr, m["BD"], across_d),
            (dk, part_k, col_ptr, m["BD"], across_d),
            (dv, part_v, col_ptr, m["BV"], across_v),
        ):
            launch(
                sparse_add_parts, (groups * cuts, sub, across), *strided(x), part, ptr,
                *sizes.values(), CUT=m["CUT"], SIZE=x.shape[-1], BN=m["BN"], BLOCK=block,
            )  # fmt: skip
    return dq, dk, dv


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, *options in sparse.cases():
        yield v, q, k, v, v, q.new_empty(q.shape[:3], dtype=torch.float32), *options


register("sparse_bwd", backward, takes=lambda do, *x: takes(*x), cases=cases)
