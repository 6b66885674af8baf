"""Batch assembly where the images live on the device: gather, translate, flip, normalise.

    x[b, c, row, col] = (image[row − dy, col − dx, c] − mean_c) · scale_c,   then mirrored or not

Subtract, then multiply: no fused multiply-add can come of it, so that every backend, and the C++ of
the host (tab._host), gives the same bits. What the moved image leaves uncovered is 0, the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Op, no_flops


def assemble_reference(
    images: Tensor, index: Tensor, moves: Tensor, mean: Tensor, scale: Tensor
) -> Tensor:
    """images (N, H, W, 3) uint8, index (B,) int64, moves (B, 3) int8: dy, dx, mirror; mean, scale
    (3,) float32 -> (B, 3, H, W) float32, channels_last."""
    height, width = images.shape[1:3]
    dy, dx, mirror = moves.long().unbind(1)  # (B,) each
    x = torch.arange(width, device=images.device).expand(len(index), -1)  # (B, W)
    x = torch.where(mirror[:, None] == 1, width - 1 - x, x) - dx[:, None]
    y = torch.arange(height, device=images.device) - dy[:, None]  # (B, H)
    rows, columns = y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]
    out = images[index[:, None, None], rows, columns].float()  # (B, H, W, 3)
    out = (out - mean) * scale
    covered = (y == y.clamp(0, height - 1))[:, :, None] & (x == x.clamp(0, width - 1))[:, None, :]
    return torch.where(covered[..., None], out, 0.0).permute(0, 3, 1, 2)


assemble = Op(
    "assemble",
    "(Tensor images, Tensor index, Tensor moves, Tensor mean, Tensor scale) -> Tensor",
    assemble_reference,
    flops=no_flops,
    shapes="""
        images: N H W 3
        index: B
        moves: B 3
        mean scale: 3
    """,
)
