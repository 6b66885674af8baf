"""Batch assembly on the host: C++ threads (tab._host), or NumPy and PyTorch to the same bits.

The dice of an image are a counter-based hash of (seed, epoch, its number): no state, so that no
thread count and no order of calls can change a draw. SplitMix64: Steele, Lea, Flood 2014, OOPSLA,
"Fast Splittable Pseudorandom Number Generators".
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.batches import assemble_reference

try:
    _host: Any = importlib.import_module("tab._host")
except ImportError:  # not built for this machine: `tab doctor` says so
    _host = None

_WORD = 2**64 - 1


def hash(seed: int, epoch: int) -> int:
    """A 64-bit hash of both, each 0…2⁶⁴ − 1."""
    return _host.hash(seed, epoch) if _host else _mix(_mix(seed) ^ epoch)


def moves(seed: int, epoch: int, index: Tensor, translate: int, flip: bool) -> Tensor:
    """(dy, dx, mirror) of each image of `index` (B,) int64 → (B, 3) int8: dy, dx uniform in
    −translate…translate pixels (at most 127), mirror 0 or 1."""
    out = np.empty((len(index), 3), np.int8)
    if _host:
        _host.moves(seed, epoch, index.numpy(), translate, flip, out)
        return torch.from_numpy(out)
    if not 0 <= translate <= 127:
        raise ValueError(f"translate {translate} is not in 0…127")
    with np.errstate(over="ignore"):  # modulo 2⁶⁴, as is meant
        dice = _mix_all(np.uint64(hash(seed, epoch)))
        dice = _mix_all(dice ^ index.numpy().astype(np.uint64))  # 32 + 31 + 1 bits
    span = np.uint64(2 * translate + 1)
    out[:, 0] = ((dice >> np.uint64(32)) * span >> np.uint64(32)).astype(np.int64) - translate
    low = dice >> np.uint64(1) & np.uint64(0x7FFFFFFF)
    out[:, 1] = (low * span >> np.uint64(31)).astype(np.int64) - translate
    out[:, 2] = (dice & np.uint64(1)) * np.uint64(flip)
    return torch.from_numpy(out)


def corners(seed: int, epoch: int, index: Tensor, rows: int, cols: int) -> Tensor:
    """(row, col) of each image of `index` (B,), uniform in 0 … rows − 1 and 0 … cols − 1 -> (B, 2)
    int64; other dice than those of `moves`."""
    with np.errstate(over="ignore"):
        dice = _mix_all(np.uint64(hash(hash(seed, epoch), 1)) ^ index.numpy().astype(np.uint64))
    half = np.uint64(32)
    row = (dice >> half) * np.uint64(rows) >> half
    col = (dice & np.uint64(2**32 - 1)) * np.uint64(cols) >> half
    return torch.from_numpy(np.stack([row, col], 1).astype(np.int64))


def assemble_host(
    images: Tensor, index: Tensor, moves: Tensor, mean: Tensor, scale: Tensor, threads: int
) -> Tensor:
    """images (N, H, W, 3) uint8, index (B,), moves (B, 3) int8 → (B, 3, H, W) float32, stored as
    channels_last."""
    if not _host:
        return assemble_reference(images, index, moves, mean, scale)
    out = torch.empty(len(index), *images.shape[1:])  # (B, H, W, 3)
    arrays = (tensor.numpy() for tensor in (images, index, moves, mean, scale, out))
    _host.assemble(*arrays, threads)
    return out.permute(0, 3, 1, 2)


def _mix(x: int) -> int:
    """The finaliser after one step of the golden-gamma counter."""
    x = x + 0x9E3779B97F4A7C15 & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def _mix_all(x: Any) -> Any:
    """The same of each uint64 of an array, or of one."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
