"""How a trained model takes what it was not trained on: here, Gaussian noise on its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .batches import Batches

NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # σ, in standard deviations of the training images


@torch.no_grad()
def noise_curve(
    model: nn.Module, batches: Batches, *, levels: Sequence[float] = NOISE, seed: int = 0
) -> list[float]:
    """Accuracy on all of `batches` with x + σ·ε for each σ, ε ~ N(0, 1) on the normalised image.

    Every level and every model sees the same ε (seeded), so that curves differ by model alone.
    The model is used as it is: put it in eval mode.
    """
    right, generator = [0] * len(levels), None
    for x, y in batches.epoch(0):  # (B, 3, H, W), (B,)
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(seed)
        noise = torch.empty_like(x).normal_(generator=generator)
        for i, level in enumerate(levels):
            right[i] += (model(x + level * noise).argmax(-1) == y).sum()
    return [float(n) / batches.samples for n in right]
