"""tab::h2o_choose for CUDA in Triton (formula: tab/ops/h2o.py; what it returns: h2o_choice.py).

One program per (batch, head) walks over the blocks with the cache on chip: a table of slots, each a
token number, its position among the real tokens, and its score A. A block's tokens take the free
slots, its queries credit all slots, and the least leave. Keys are read where they are.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import (
    block as tile_length,
)
from ._launch import (
    launch,
    mask_bytes,
    meta_heads,
    meta_tensor,
    outside,
    precision,
    register,
    rows,
    strided,
)
from ._tiles import dot, finite, head, tile

MOST = tl.constexpr(2**31 - 1)
MAX_SLOTS = 512  # a row of scores over all slots stays in registers
ROWS = 16  # queries at once, the least that tl.dot takes

# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def credit(
    q, q_n, k, k_n, mask, token, start, stop, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_i P_ij over the queries start … stop - 1 for each slot j, (BS,)"""
    live = token >= 0
    total = tl.zeros((BS,), tl.float32)
    for first in range(start, stop, BR):
        i = first + tl.arange(0, BR)
        s = tl.zeros((BR, BS), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            inside = live[None, :] & (d < D)[:, None]
            at = k + token[None, :].to(tl.int64) * k_n + d[:, None]
            keys = tl.load(at, mask=inside, other=0.0).to(tl.float32)  # (BD, BS)
            s += dot(tile(q, q_n, i, stop, d0, D, BD), keys, PRECISION, "ab")
        counted = i < stop
        if mask is not None:  # what padding attends to counts for nothing
            counted = counted & (tl.load(mask + i, mask=counted, other=0) != 0)
        visible = live[None, :] & counted[:, None]
        if CAUSAL:
            visible = visible & (token[None, :] <= i[:, None])
        s = tl.where(visible, s * scale, float("-inf"))
        p = tl.exp(s - finite(tl.max(s, 1))[:, None])
        weight = tl.sum(p, 1)
        p = p / tl.where(weight == 0, 1.0, weight)[:, None]
        total += tl.sum(tl.where(visible, p, 0.0), 0)  # a NaN credits what it sees
    return total


@triton.jit
def bits(score):
    """Scores ≥ 0 as numbers in the same order, NaN last; all below MOST."""
    return tl.where(score == score, score, float("nan")).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def least(x, count):
    """Which are the `count` least of x (n,), int32 ≥ 0, those in front first among equals. The
    largest of them is found bit by bit: 31 sums, however many there are."""
    bound = tl.zeros((), tl.int32)  # fewer than `count` lie below it
    for i in tl.static_range(31):
        more = bound + (1 << (30 - i))
        bound = tl.where(tl.sum((x < more).to(tl.int32), 0) < count, more, bound)
    below, equal = x < bound, x == bound
    left = count - tl.sum(below.to(tl.int32), 0)
    return (count > 0) & (below | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)))


@triton.jit
def h2o_scan(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, mask, chosen, N, H, blocks, block, width, budget, recent,
    scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """chosen (B·H, blocks, width)"""
    bh = tl.program_id(0)
    q, k = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    chosen += bh.to(tl.int64) * blocks * width
    token = tl.full((BS,), -1, tl.int32)
    position = tl.zeros((BS,), tl.int32)
    score = tl.zeros((BS,), tl.float32)
    seen = 0  # real tokens so far
    for t in range(0, blocks - 1):
        start = t * block
        rank = tl.cumsum((token < 0).to(tl.int32), 0) - 1  # among the free slots
        new = (token < 0) & (rank < block)
        if mask is not None:
            new = new & (tl.load(mask + start + rank, mask=new, other=0) != 0)
        position = tl.where(new, seen + tl.cumsum(new.to(tl.int32), 0) - 1, position)
        seen += tl.sum(new.to(tl.int32), 0)
        score = tl.where(new, 0.0, score)
        token = tl.where(new, start + rank, token)
        score += credit(
            q, q_n, k, k_n, mask, token, start, start + block, scale,
            CAUSAL, D, BS, BR, BD, PRECISION,
        )  # fmt: skip
        # The last `recent` stay; free slots are not there to leave.
        stays = (position >= seen - recent) | (token < 0)
        excess = tl.sum((token >= 0).to(tl.int32), 0) - budget
        token = tl.where(least(tl.where(stays, MOST, bits(score)), excess), -1, token)
        live = token >= 0
        at = (t + 1) * width + tl.cumsum(live.to(tl.int32), 0) - 1
        tl.store(chosen + at, token.to(tl.int64), mask=live)


# --- launcher -------------------------------------------------------------------------------------


def slots(q, heavy: int, recent: int, block: int) -> int:
    """How many the cache needs at most."""
    return max(16, triton.next_power_of_2(min(q.shape[2], heavy + recent + block)))


def takes(q, k, key_mask, heavy, recent, causal, block, scale) -> str | None:
    most = slots(q, heavy, recent, block)
    return outside(q) or (
        f"it takes up to {MAX_SLOTS} slots, got {most}" if most > MAX_SLOTS else None
    )


def choose(q, k, key_mask, heavy, recent, causal, block, scale):
    """tab::h2o_choose"""
    (b, h, n, d), budget, most = q.shape, heavy + recent, slots(q, heavy, recent, block)
    q, k, blocks, width = rows(q), rows(k), cdiv(n, block), min(budget, n)
    chosen = torch.full((b, h, blocks, width), -1, dtype=torch.int64, device=q.device)
    launch(
        h2o_scan, (b * h,), *strided(q, k), mask_bytes(key_mask), chosen, n, h, blocks, block,
        width, budget, recent, float(scale), CAUSAL=causal, D=d, BS=most, BR=ROWS,
        BD=16 if most > 256 else tile_length(d), PRECISION=precision(q),
        num_warps=max(4, most // 64), num_stages=2,
    )  # fmt: skip
    return chosen


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for n, half, block in ((64, 16, 16), (8192, 224, 64)):  # few slots and many
        for dtype in (torch.float32, torch.bfloat16):
            q = meta_heads(2, 8, n, 64, dtype)
            yield q, q, meta_tensor(2, n, dtype=torch.bool), half, half, True, block, 0.1


register("h2o_choose", choose, takes=takes, cases=cases)
