"""tab::sparse_fwd for CUDA in Triton (formulas: tab/ops/sparse.py, _softmax.py).

A program owns BN queries of a block row (all of it where b ≤ 64) and walks over the block columns
listed for it; a block that is no whole number of tiles is padded. Columns are sorted, so whatever
needs a mask comes last: causal's diagonal block, the ragged last block.

Long rows are cut so that a few (BigBird's global ones) do not keep the GPU waiting. The grid must
not depend on the pattern's values, only on shapes, or the host would wait for the device:

    item w < Hp·nb    row w, or where it lists more than CUT columns, those up to the next multiple
                      of CUT in `col`
    the others        one for each inner multiple of CUT in `col` (nnz is a shape): the columns from
                      there, if they belong to a long row; else nothing

Parts of a row go to slots that `sparse_combine` merges in the order of the columns: nothing is
atomic, the same input gives the same bits. Where nb ≤ CUT no row is long and the grid is the rows.
Up to 64 tokens are one tile, whatever the blocks (_few.py).
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from . import _few
from ._launch import (
    launch,
    mask_bytes,
    meta_heads,
    meta_tensor,
    register,
    rows,
    strided,
    token_major_empty,
)
from ._softmax import finish, fold, forward_tile, heads, meta, quiet, real_keys, takes, tokens
from ._tiles import head, put, tile
from .local import rules

CUT = 32  # listed blocks; not measured yet

# --- the work list, for forward and backward ------------------------------------------------------


@triton.jit
def owner(ptr, position, nb, lists):
    """The list (of Hp·nb) that entry `position` belongs to: the last that starts at or before it.
    ptr (Hp, nb+1) does not decrease."""
    low, high = tl.zeros((), tl.int32), lists + lists // nb - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(ptr + middle) <= position:
            low = middle
        else:
            high = middle - 1
    return low - low // (nb + 1)


@triton.jit
def work(ptr, item, nb, lists, CUT: tl.constexpr):
    """-> list, its first and last + 1 entry in this item, the slot of the result: −1 if it is the
    list's whole result, −2 if there is nothing to do."""
    if item < lists:
        which = item
        start = tl.load(ptr + which + which // nb)
        end = tl.load(ptr + which + which // nb + 1)
        first, slot = start, -1
        if end - start > CUT:
            end = (start // CUT + 1) * CUT
            slot = end // CUT * 2
    else:
        first = (item - lists + 1) * CUT
        which = owner(ptr, first, nb, lists)
        start = tl.load(ptr + which + which // nb)
        end = tl.load(ptr + which + which // nb + 1)
        slot = first // CUT * 2 + 1
        if (end - start <= CUT) | (first == start):
            slot = -2
        end = tl.minimum(end, first + CUT)
    return which, first, end, slot


@triton.jit
def parts(ptr, item, nb, lists, CUT: tl.constexpr):
    """-> list, first slot, number of parts, if `item` (from 0) is the first inner multiple of CUT
    in a long list; else 0 parts."""
    position = (item + 1) * CUT
    which = owner(ptr, position, nb, lists)
    start = tl.load(ptr + which + which // nb)
    end = tl.load(ptr + which + which // nb + 1)
    count = 1 + tl.cdiv(end - position, CUT)
    if (end - start <= CUT) | (position == start) | (position - start > CUT):
        count = 0
    return which, position // CUT * 2, count


@triton.jit
def slot_of(first, part):
    """first, then first + 1, + 3, + 5 …"""
    return first + tl.maximum(2 * part - 1, 0)


@triton.jit
def below(entries, first, last, bound):
    """How many of the sorted entries are < bound."""
    count = 0
    for at in range(first, last, 64):
        x = tl.load(entries + at + tl.arange(0, 64), mask=at + tl.arange(0, 64) < last, other=bound)
        count += tl.sum((x < bound).to(tl.int32), 0)
    return count


@triton.jit
def batch_head(group, which, nb, lists, H):
    """Flat (batch, head). Group g of B·H/Hp: with one list for all heads g itself, else a batch."""
    hp = lists // nb
    each = H // hp  # heads that share a list
    return group // each * H + which // nb * each + group % each


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def sparse_forward(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n, lse, part_o, part_lse,
    mask, slopes, ptr, col, N, H, nb, b, lists, items, slots, scale, cap,
    CUT: tl.constexpr, SUB: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of BN queries, BV of its columns; lse (B·H, N). A part of a row: part_o (groups, slots, b,
    Dv) and part_lse (groups, slots, b) instead."""
    group, item = tl.program_id(0) // items, tl.program_id(0) % items
    sub, v0 = tl.program_id(1), tl.program_id(2) * BV
    which, first, last, slot = work(ptr, item, nb, lists, CUT)
    if slot == -2:
        return
    bh, r = batch_head(group, which, nb, lists, H), which % nb
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    stop = tl.minimum((r + 1) * b, N)
    i = r * b + sub * BN + tl.arange(0, BN)
    full = N // b  # whole blocks
    if CAUSAL:
        last = first + below(col, first, last, r + 1)
        full = tl.minimum(full, r)
    middle = first if PADDED else first + below(col, first, last, full)
    at = quiet(mask, bh // H, q, q_n, i, stop, N, D, BD)
    if slopes is not None:
        slopes += bh % H
    x = tile(q, q_n, at, stop, 0, D, BD)
    y = tl.zeros((BN, BV), tl.float32)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for e in range(first * SUB, middle * SUB):
        j = tl.load(col + e // SUB) * b + e % SUB * BN + tl.arange(0, BN)
        seen = None
        if mask is not None:
            real, j = real_keys(mask, bh // H, j, N)
            seen = real[None, :]
        y, top, total = forward_tile(
            y, top, total, x, q, q_n, at, stop, k, k_n, v, v_n, j, N, v0, seen, scale, cap, slopes,
            False, D, DV, BD, BV, PRECISION,
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
        y, top, total = forward_tile(
            y, top, total, x, q, q_n, at, stop, k, k_n, v, v_n, j, end, v0, seen, scale, cap,
            slopes, CAUSAL, D, DV, BD, BV, PRECISION,
        )  # fmt: skip
    y, top = finish(y, top, total)
    if slot == -1:
        put(head(o, bh, H, o_b, o_h), o_n, i, stop, v0, y, DV, BV)
        if v0 == 0:
            tl.store(lse + bh.to(tl.int64) * N + i, top, mask=i < stop)
    else:
        place = (group.to(tl.int64) * slots + slot) * b
        put(part_o + place * DV, DV, i - r * b, b, v0, y, DV, BV)
        if v0 == 0:
            tl.store(part_lse + place + i - r * b, top, mask=i < r * b + b)


@triton.jit
def sparse_combine(
    o, o_b, o_h, o_n, lse, part_o, part_lse, ptr, N, H, nb, b, lists, items, slots,
    CUT: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o and lse of the long rows: parts weighted by exp(lse − their common lse)."""
    group, item = tl.program_id(0) // items, tl.program_id(0) % items
    sub, v0 = tl.program_id(1), tl.program_id(2) * BV
    which, first, count = parts(ptr, item, nb, lists, CUT)
    if count == 0:
        return
    bh, r = batch_head(group, which, nb, lists, H), which % nb
    i = sub * BN + tl.arange(0, BN)
    y = tl.zeros((BN, BV), tl.float32)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for part in range(count):
        at = (group.to(tl.int64) * slots + slot_of(first, part)) * b
        log = tl.load(part_lse + at + i, mask=i < b, other=float("-inf"))
        x = tile(part_o + at * DV, DV, i, b, v0, DV, BV)
        y, top, total = fold(y, top, total, x, log)
    y, top = finish(y, top, total)
    stop = tl.minimum((r + 1) * b, N)
    put(head(o, bh, H, o_b, o_h), o_n, r * b + i, stop, v0, y, DV, BV)
    if v0 == 0:
        tl.store(lse + bh.to(tl.int64) * N + r * b + i, top, mask=r * b + i < stop)


# --- launcher -------------------------------------------------------------------------------------


def plan(q, v, ptr, entries, block_size, causal, backward=False) -> tuple[dict, int, int, dict]:
    """-> sizes that kernels take, by name; groups, each of which goes through all lists; items of
    the merging kernels, 0 where no list can be long; compile-time arguments."""
    b, h, n, _ = q.shape
    hp, nb = ptr.shape[0], ptr.shape[1] - 1
    cuts = max(0, entries.shape[0] - 1) // CUT if nb > CUT else 0
    sizes = {
        "N": n, "H": h, "nb": nb, "b": block_size, "lists": hp * nb, "items": hp * nb + cuts,
        "slots": 2 * cuts + 2 if cuts else 0,
    }  # fmt: skip
    bn = tokens(q, block_size)
    m = {
        "CUT": CUT, "SUB": cdiv(block_size, bn), "CAUSAL": causal, "PADDED": block_size % bn != 0,
        "BN": bn, **meta(q, v, backward),
    }  # fmt: skip
    return sizes, b * h // hp, cuts, m


def partial(x, groups: int, sizes: dict, *size: int):
    """Room for the parts of long lists."""
    return x.new_empty(groups, sizes["slots"], sizes["b"], *size, dtype=torch.float32)


def forward(
    q, k, v, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, causal, scale, softcap
):  # fmt: skip
    """tab::sparse_fwd"""
    q, k, v, o = rows(q), rows(k), rows(v), token_major_empty(v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    sizes, groups, cuts, m = plan(q, v, row_ptr, col, block_size, causal)
    told, scales = (mask_bytes(key_mask), slopes), (scale, softcap or None)
    if few := _few.one_tile(q, k, v, m):
        seen = _few.by_pattern(row_ptr, col, block_size)
        _few.forward(q, k, v, o, lse, told, seen, scales, few)
        return o, lse
    dv, across = v.shape[-1], (m["SUB"], cdiv(v.shape[-1], m["BV"]))
    part_o, part_lse = partial(q, groups, sizes, dv), partial(q, groups, sizes)
    out = *strided(o), lse, part_o, part_lse
    launch(
        sparse_forward, (groups * sizes["items"], *across),
        *strided(q, k, v), *out, *told, row_ptr, col, *sizes.values(), *scales, **m,
    )  # fmt: skip
    if cuts:
        sizes["items"] = cuts
        launch(
            sparse_combine, (groups * cuts, *across), *out, row_ptr, *sizes.values(),
            CUT=CUT, DV=dv, BN=m["BN"], BV=m["BV"],
        )  # fmt: skip
    return o, lse


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    """Causal, with long rows."""
    ptr = meta_tensor(8, 129, dtype=torch.int32)
    entries = meta_tensor(9999, dtype=torch.int32)
    for first, q in enumerate(heads()):
        pattern = ptr, entries, ptr, entries
        yield q, q, q, *pattern, None, None, 64, True, 0.1, 0.0
        if first == 0:
            yield q, q, q, *pattern, *rules(q), 64, True, 0.1, 30.0
    ptr = meta_tensor(8, 9, dtype=torch.int32)
    for rule, dtype in (False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32):
        q = meta_heads(512, 8, 64, 64, dtype)
        told = rules(q) if rule else (None, None)
        yield q, q, q, ptr, entries, ptr, entries, *told, 8, False, 0.1, 30.0 if rule else 0.0


register("sparse_fwd", forward, takes=takes, cases=cases)
