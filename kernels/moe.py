"""tab::moe_grouped and tab::moe_grouped_outer for CUDA in Triton (formula: tab/ops/grouped.py).

    y_m = W_e x_m           for the rows m of group e, which lie together
    dW_e = Σ_m∈e g_m x_mᵀ

The sizes of the groups stay on the device: each program finds its group itself, among as many tiles
as any sizes could need. Every order of summation is fixed, nothing is atomic. Where PyTorch has a
grouped product that does not ask the device either, that one runs (bfloat16 on sm_90 and sm_100).
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops import grouped as op

from ._launch import (
    HOPPER,
    PRECISION,
    block,
    capability,
    launch,
    meta_tensor,
    outside,
    processors,
    register,
    rows,
    strided,
)
from ._tiles import dot, put, tile

MAX_GROUPS = 1024  # their sizes are one vector of a program
SPLITS = 16  # parts, at most, that the rows of a group are summed in
STEPS = 4  # tiles of rows that each of them has at least, on average

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def moe_rows(
    x, x_m, w, w_e, w_o, w_i, counts, y, M,
    E: tl.constexpr, I: tl.constexpr, O: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM rows of one group, BO columns of y (M, O); x (M, I), w (E, O, I) in any strides."""
    part, o0 = tl.program_id(0), tl.program_id(1) * BO
    e = tl.arange(0, BE)
    size = tl.maximum(tl.load(counts + e, mask=e < E, other=0), 0).to(tl.int32)
    tiles = tl.cdiv(size, BM)
    group = tl.sum((tl.cumsum(tiles, 0) <= part).to(tl.int32), 0)
    if group < E:
        before = e < group
        row = tl.sum(tl.where(before, size, 0), 0)
        end = tl.minimum(row + tl.sum(tl.where(e == group, size, 0), 0), M)
        row += (part - tl.sum(tl.where(before, tiles, 0), 0)) * BM
        at, o = row + tl.arange(0, BM), o0 + tl.arange(0, BO)
        w += group.to(tl.int64) * w_e
        acc = tl.zeros((BM, BO), tl.float32)
        for i0 in range(0, I, BI):
            i = i0 + tl.arange(0, BI)
            where = w + o[None, :].to(tl.int64) * w_o + i[:, None].to(tl.int64) * w_i
            part_w = tl.load(where, mask=(i < I)[:, None] & (o < O)[None, :], other=0.0)
            acc += dot(tile(x, x_m, at, end, i0, I, BI), part_w.to(tl.float32), PRECISION, "ab")
        put(y, O, at, end, o0, acc, O, BO)


@triton.jit
def moe_outer(
    g, g_m, x, x_m, counts, dw, M,
    E: tl.constexpr, I: tl.constexpr, O: tl.constexpr, BE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dW_e from one part of the group's rows; dw (SPLIT, E, O, I)."""
    group, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    o0, i0 = tl.program_id(1) * BO, tl.program_id(2) * BI
    e = tl.arange(0, BE)
    size = tl.maximum(tl.load(counts + e, mask=e < E, other=0), 0).to(tl.int32)
    first = tl.sum(tl.where(e < group, size, 0), 0)
    own = tl.sum(tl.where(e == group, size, 0), 0)
    length = tl.cdiv(own, SPLIT)
    end = tl.minimum(first + tl.minimum(own, (split + 1) * length), M)
    acc = tl.zeros((BO, BI), tl.float32)
    for row in range(first + split * length, end, BM):
        at = row + tl.arange(0, BM)
        a, b = tile(g, g_m, at, end, o0, O, BO), tile(x, x_m, at, end, i0, I, BI)
        acc += dot(tl.trans(a), b, PRECISION, "ab")
    dw += (split.to(tl.int64) * E + group) * (O * I)
    put(dw, I, o0 + tl.arange(0, BO), O, i0, acc, I, BI)


# --- launchers ------------------------------------------------------------------------------------


def takes(x, y, counts) -> str | None:
    """Of both launchers; y is w or x."""
    if len(counts) > MAX_GROUPS:
        return f"it takes up to {MAX_GROUPS} groups, got {len(counts)}"
    if x.numel() == 0:
        return "it takes rows, got none"
    if x.is_cuda and op.native(x, y):
        return "PyTorch's own grouped product takes these"
    return outside(x)


def meta(x, counts, o: int, i: int) -> dict:
    e = len(counts)
    # tf32x3 holds three times the operands: smaller steps, more threads.
    step, warps = (32, 8) if x.dtype == torch.float32 else (64, 4)
    return {
        "E": e, "I": i, "O": o, "BE": triton.next_power_of_2(e), "BO": block(o),
        "PRECISION": PRECISION[x.dtype], "num_warps": warps, "num_stages": 2, "step": step,
    }  # fmt: skip


def grouped(x, w, counts):
    """tab::moe_grouped"""
    x, m = rows(x), meta(x, counts, *w.shape[1:])
    m["BI"] = block(m["I"], m.pop("step"))
    m["BM"] = block(cdiv(x.shape[0], m["E"]))  # a group of the mean size is one tile, if it can
    y = x.new_empty(x.shape[0], m["O"])
    # Group e takes ⌈size/BM⌉ tiles: together at most M/BM + E.
    tiles = cdiv(x.shape[0], m["BM"]) + m["E"]
    launch(
        moe_rows, (tiles, cdiv(m["O"], m["BO"])), *strided(x), w, *w.stride(),
        counts.contiguous(), y, x.shape[0], **m,
    )  # fmt: skip
    return y


def grouped_outer(g, x, counts):
    """tab::moe_grouped_outer"""
    g, x, m = rows(g), rows(x), meta(x, counts, g.shape[1], x.shape[1])
    m["BM"], m["BI"] = m.pop("step"), block(m["I"])
    if capability(x.device) == HOPPER:  # as linear_fused: registers of a product are written early
        m["num_stages"] = 1
    tiles = cdiv(m["O"], m["BO"]), cdiv(m["I"], m["BI"])
    programs, steps = m["E"] * tiles[0] * tiles[1], x.shape[0] // (m["E"] * STEPS * m["BM"])
    m["SPLIT"] = max(1, min(SPLITS, 2 * processors(x.device) // programs, steps))
    kind = x.dtype if m["SPLIT"] == 1 else torch.float32
    dw = x.new_empty(m["SPLIT"], m["E"], m["O"], m["I"], dtype=kind)
    grid = m["E"] * m["SPLIT"], *tiles
    launch(moe_outer, grid, *strided(g, x), counts.contiguous(), dw, x.shape[0], **m)
    return dw[0] if m["SPLIT"] == 1 else dw.sum(0).to(x.dtype)


# --- compiled ahead -------------------------------------------------------------------------------


def rows_and_weights():
    """x (M, C), w (E, C, C), counts (E,)"""
    counts = meta_tensor(8, dtype=torch.int64)
    for n, c, dtype in (
        (65536, 256, torch.float32),
        (65536, 256, torch.float16),
        (65536, 256, torch.bfloat16),
        (4096, 32, torch.bfloat16),
    ):
        yield meta_tensor(n, c, dtype=dtype), meta_tensor(8, c, c, dtype=dtype), counts


def cases():
    for x, w, counts in rows_and_weights():
        yield x, w, counts
        yield x, w.mT, counts  # weights lie both ways


def outer_cases():
    """Sums in one part and in several."""
    for x, _, counts in rows_and_weights():
        yield x, x, counts


register("moe_grouped", grouped, takes=takes, cases=cases)
register("moe_grouped_outer", grouped_outer, takes=takes, cases=outer_cases)
