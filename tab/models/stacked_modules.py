"""The forms of modules whose weights are those of S seeds, (S, …), for tab/models/stacked.py.

Each is made from the module it derives from: `seeds` are the S ordinary ones, whose weights are
views of its own. Tensors are (S·B, …), the images of the first seed first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers._stacking import Products, beside, stacks
from ..ops._check import autocast
from .backbones import VitBackbone
from .parts import Residual
from .transformer import Block


class SeedLinear(nn.Linear):
    """weight (S, O, I), bias (S, O); x (S·B, …, I)"""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(len(self.weight), -1, x.shape[-1])  # (S, B·…, I)
        y = Products.apply(*autocast(flat, self.weight, self.bias))
        return y.view(*x.shape[:-1], -1)


class SeedLayerNorm(nn.LayerNorm):
    """LayerNorm with the weights of each seed."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return F.layer_norm(x, self.normalized_shape, eps=self.eps)
        w, y = beside(self.weight, F.layer_norm(x, self.normalized_shape, eps=self.eps))
        return torch.addcmul(beside(self.bias, x)[0], y, w).flatten(0, 1)


class SeedRMSNorm(nn.RMSNorm):
    """RMSNorm with the weights of each seed."""

    def forward(self, x: Tensor) -> Tensor:
        w, y = beside(self.weight, F.rms_norm(x, self.normalized_shape, eps=self.eps))
        return (y * w).flatten(0, 1)


class SeedEmbedding(nn.Embedding):
    """weight (S, V, C); x (S·B, …) of numbers below V"""

    def forward(self, x: Tensor) -> Tensor:
        seeds, rows, _ = self.weight.shape
        first = torch.arange(seeds, device=x.device) * rows  # of each seed's rows
        own = x.unflatten(0, (seeds, -1)) + first.view(-1, *[1] * x.dim())
        return F.embedding(own.flatten(0, 1), self.weight.flatten(0, 1))


class SeedConv(nn.Conv2d):
    """weight (S, O, I, 3, 3), bias (S, O) or None; within `Folded`, x (B, S·I, rows, cols)"""

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.flatten(0, 1), None if self.bias is None else self.bias.flatten()
        return F.conv2d(x, w, b, self.stride, self.padding, groups=len(self.weight))


class SeedBatchNorm(nn.BatchNorm2d):
    """All (S, C); within `Folded`, x (B, S·C, rows, cols)"""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var, w, b = (
            t.flatten() for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x, mean, var, w, b, self.training, self.momentum, self.eps)


class Folded(nn.Module):
    """x (S·B, I, rows, cols) -> (S·B, O, rows', cols') by `inner` on seeds beside each other in the
    channels; channels_last throughout, one copy on each side."""

    def __init__(self, inner: nn.Module, seeds: int):
        super().__init__()
        self.inner, self.count = inner, seeds

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).unflatten(0, (self.count, -1))  # (S, B, rows, cols, I)
        x = self.inner(x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2))
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.count, -1))  # (B, rows', cols', S, O)
        return x.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


@stacks(Residual)
class SeedResidual(Residual):
    """scale (S, C)"""

    def forward(self, x: Tensor, attention: nn.Module) -> Tensor:
        scale, y = beside(self.scale, self.branch(x, attention))
        return x + (scale * y).flatten(0, 1)


# PyTorch's own modules, which say nothing of it themselves; what is not here runs seed by seed.
@stacks(Block)
class SeedBlock(Block):
    """gate and ffn_gate (S, C)"""

    def scaled(self, gate: Tensor, y: Tensor) -> Tensor:
        gate, y = beside(gate, y)
        return (gate * y).flatten(0, 1)


@stacks(VitBackbone)
class SeedVit(VitBackbone):
    """class_token (S, C)"""

    def first(self, count: int) -> Tensor:
        return self.class_token.repeat_interleave(count // len(self.class_token), 0)[:, None]


TORCH: dict[type, type | bool] = {
    nn.Linear: SeedLinear,
    nn.Embedding: SeedEmbedding,
    nn.LayerNorm: SeedLayerNorm,
    nn.RMSNorm: SeedRMSNorm,
    **dict.fromkeys((nn.Sequential, nn.ModuleList, nn.Identity, nn.ReLU, nn.MaxPool2d), True),
}
# These only within `Folded`: elsewhere the seeds are images, not channels.
FOLDED: dict[type, type] = {nn.Conv2d: SeedConv, nn.BatchNorm2d: SeedBatchNorm}
