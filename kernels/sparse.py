"""tab::sparse_fwd for CUDA in Triton (formulas: tab/ops/sparse.py, _softmax.py).

A program owns BN queries of a block row (all of it where b ≤ 64) and walks over the block columns
listed for it; a block that is no whole number of tiles is padded. Columns are sorted, so whatever
needs a mask comes last: causal's diagonal block, the ragged last block.

Long rows are cut in parts (_lists.py), whose results go to slots that `sparse_combine` merges in
the order of the columns: nothing is atomic, the same input gives the same bits.
Up to 64 tokens are one tile, whatever the blocks (_few.py).
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from . import _few
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
from ._lists import batch_head, below, parts, reach, slot_of, work
from ._softmax import finish, fold, forward_tile, heads, meta, quiet, real_keys, takes, tokens
from ._tiles import head, key_head, put, tile
from .local import rules

CUT = 32  # listed blocks; not measured yet

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def sparse_forward(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n, lse, part_o, part_lse,
    mask, slopes, ptr, col, N, M, H, KV, nb, b, lists, items, slots, scale, cap,
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
    q = head(q, bh, H, q_b, q_h)
    k, v = key_head(k, bh, H, KV, k_b, k_h), key_head(v, bh, H, KV, v_b, v_h)
    stop, shift = tl.minimum((r + 1) * b, N), M - N
    i = r * b + sub * BN + tl.arange(0, BN)
    full, last = reach(col, first, last, r * b, stop, M, shift, b, CAUSAL)
    middle = first if PADDED else first + below(col, first, last, full)
    at = quiet(mask, bh // H, q, q_n, i, stop, N, M, D, BD)
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
            real, j = real_keys(mask, bh // H, j, M)
            seen = real[None, :]
        y, top, total = forward_tile(
            y, top, total, x, q, q_n, at, stop, k, k_n, v, v_n, j, M, v0, seen, scale, cap, slopes,
            shift, False, D, DV, BD, BV, PRECISION,
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
        y, top, total = forward_tile(
            y, top, total, x, q, q_n, at, stop, k, k_n, v, v_n, j, end, v0, seen, scale, cap,
            slopes, shift, CAUSAL, D, DV, BD, BV, PRECISION,
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


def plan(q, k, v, ptr, entries, others, block_size, causal, backward=False):
    """For lists of at most `others` blocks -> sizes that kernels take, by name; groups, each of
    which goes through all lists; items of the merging kernels, 0 where no list can be long;
    compile-time arguments."""
    (b, h, n, _), (_, kv, m, _) = q.shape, k.shape
    hp, nb = ptr.shape[0], ptr.shape[1] - 1
    cuts = max(0, entries.shape[0] - 1) // CUT if others > CUT else 0
    sizes = {
        "N": n, "M": m, "H": h, "KV": kv, "nb": nb, "b": block_size, "lists": hp * nb,
        "items": hp * nb + cuts,
        "slots": 2 * cuts + 2 if cuts else 0,
    }  # fmt: skip
    bn = tokens(q, block_size)
    fixed = {
        "CUT": CUT, "SUB": cdiv(block_size, bn), "CAUSAL": causal, "PADDED": block_size % bn != 0,
        "BN": bn, **meta(q, v, backward),
    }  # fmt: skip
    return sizes, b * h // hp, cuts, fixed


def merging(n: int, sizes: dict, items: int) -> list:
    """What the kernels that merge parts of long lists take of the sizes, for n tokens."""
    return [n, *({**sizes, "items": items}[x] for x in ("H", "nb", "b", "lists", "items", "slots"))]


def partial(x, groups: int, sizes: dict, *size: int):
    """Room for the parts of long lists."""
    return x.new_empty(groups, sizes["slots"], sizes["b"], *size, dtype=torch.float32)


def forward(
    q, k, v, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, causal, scale, softcap
):  # fmt: skip
    """tab::sparse_fwd"""
    row_ptr, col = row_ptr.contiguous(), col.contiguous()
    q, k, v, o = rows(q), rows(k), rows(v), token_major_empty(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    others = col_ptr.shape[1] - 1
    sizes, groups, cuts, m = plan(q, k, v, row_ptr, col, others, block_size, causal)
    told, scales = rules_of(key_mask, slopes), (scale, softcap or None)
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
        launch(
            sparse_combine, (groups * cuts, *across), *out, row_ptr,
            *merging(q.shape[2], sizes, cuts),
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
            k = q[:, :2]  # fewer heads
            yield q, k, k, *pattern, *rules(q), 64, True, 0.1, 30.0
    ptr, entries = meta_tensor(8, 9, dtype=torch.int32), meta_tensor(256, dtype=torch.int32)
    for rule, dtype in (False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32):
        q = meta_heads(512, 8, 64, 64, dtype)
        told = rules(q) if rule else (None, None)
        yield q, q, q, ptr, entries, ptr, entries, *told, 8, False, 0.1, 30.0 if rule else 0.0


register("sparse_fwd", forward, takes=takes, cases=cases)
