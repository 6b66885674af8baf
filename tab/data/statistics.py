"""Mean and deviation of the channels of images."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std), float64 (3,) in 0…255 units, of images uint8 (N, H, W, 3); std is population.

    From the histogram of each channel, so that no sum can lose digits: a float32 sum over
    51 million pixels does.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(
            f"statistics wants uint8 (N ≥ 1, H, W, 3), got {images.dtype} {tuple(images.shape)}"
        )
    value = torch.arange(256, dtype=torch.float64)
    mean, std = torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    for c in range(3):
        weight = torch.bincount(images[..., c].flatten(), minlength=256).double().cpu()
        weight /= weight.sum()
        mean[c] = (weight * value).sum()
        std[c] = (weight * (value - mean[c]) ** 2).sum().sqrt()
    return mean, std
