"""How linear and performer cut N into segments, whose states T = [S z] are summed in parallel.

T of a segment, F features by Dv values, lies in t (B·H, segments, F·Dv + F): S, then z. What reads
the state that a segment sees takes S, z and three strides: those of S and z from one (batch, head)
to the next, and that from segment to segment, 0 where all see one state.
"""

import torch
from torch import Tensor
from triton import cdiv

from ._launch import block, outside, precision, processors

TOKENS = 64  # most tokens in a tile; segments are multiples of it
SEGMENT = 256  # tokens whose causal pairs are computed directly: less state traffic, more FLOPs
FUSED_TOKENS = 256  # not measured yet: up to here one launch is expected to win
MAX_SIZE = 256  # D and Dv
SCAN = 1024  # elements of T that one program scans


def takes(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    *_, n, d = q.shape
    *_, keys, dv = v.shape
    if not (n and keys):
        return "it takes at least one query and one key"
    return outside(q, MAX_SIZE, D=d, Dv=dv)


def meta(q: Tensor, v: Tensor) -> dict:
    """The compile-time arguments of the kernels that hold a tile of tokens."""
    d, dv = q.shape[-1], v.shape[-1]
    # tf32x3 holds three times the operands: fewer tokens, more threads.
    tokens, warps = (32, 8) if q.dtype == torch.float32 else (TOKENS, 4)
    return {
        "D": d, "DV": dv, "BN": tokens, "BD": block(d), "BV": block(dv),
        "PRECISION": precision(q), "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def one_launch(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether one program for each (batch, head) is the better way: few tokens, or many heads. It
    takes as many keys as queries."""
    b, h, n, _ = q.shape
    better = n <= FUSED_TOKENS or b * h >= 2 * processors(q.device)
    return better and not causal and n == k.shape[2]


def segments(x: Tensor, v: Tensor, features: int, causal: bool) -> tuple[int, int]:
    """(tokens of x in a segment, segments): enough programs to fill the GPU, fixed when causal."""
    b, h, n, _ = x.shape
    size = SEGMENT
    if not causal:
        tiles = cdiv(features, block(features)) * cdiv(v.shape[-1], block(v.shape[-1]))
        splits = max(1, 4 * processors(x.device) // (b * h * tiles))
        size = max(SEGMENT, cdiv(cdiv(n, splits), TOKENS) * TOKENS)
    return size, cdiv(n, size)


def one_state(s: Tensor, z: Tensor) -> tuple:
    """S (B, H, F, Dv) and z (B, H, F) that all segments see."""
    return s, z, s.shape[2] * s.shape[3], z.shape[2], 0


def each_state(t: Tensor, features: int) -> tuple:
    """Of t, what each segment sees."""
    _, count, size = t.shape
    return t, t.flatten()[size - features :], count * size, count * size, size
