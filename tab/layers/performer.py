"""Performer attention as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..ops._check import accumulate
from ..ops.performer import KERNELS, Kernel, performer_attention
from ..ops.projection import orthogonal_projection
from ._base import HeadsAttention
from ._registry import register_attention
from ._stacking import OwnAttend, stacks
from ._state import Stateful, from_first_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@register_attention("performer")
class PerformerAttention(Stateful, HeadsAttention):
    """FAVOR+ attention (Choromanski et al. 2021); all heads share one projection W (M, D).

    num_features: M. kernel: "softmax" or "relu".
    redraw_interval: a new W every so many optimizer steps (never in eval); 0 keeps the first.
    W is a function of (seed, number of redraws); both, and the steps, are buffers, so a resumed
    run draws what an unbroken one would have drawn, and all ranks have the first one's.

    Raises ValueError: another kernel, num_features below 1, or a negative redraw_interval.

    >>> layer = build_attention("performer", 32, seq_len=64, num_features=16, redraw_interval=100)
    >>> layer(x).shape, layer.projection.shape
    (torch.Size([2, 64, 32]), torch.Size([16, 8]))
    """

    title, colour = "Performer", 3

    exact = ("projection",)

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        num_features: int = 64,
        kernel: str = "softmax",
        redraw_interval: int = 0,
        rope: bool = False,
        seed: int = 0,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim, rope=rope
        )
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r}: choose one of {', '.join(KERNELS)}")
        if num_features < 1:
            raise ValueError(f"num_features={num_features}: performer needs at least 1 feature")
        if redraw_interval < 0:
            raise ValueError(
                f"redraw_interval={redraw_interval}: give a number of steps ≥ 1, or 0 for never"
            )
        self.kernel, self.redraw_interval = cast(Kernel, kernel), redraw_interval
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("projection", torch.empty(num_features, self.head_dim))  # (M, D)
        if not self.projection.is_meta:  # else load_state_dict brings it
            self._draw(0)

    def _draw(self, count: int) -> None:
        # 2¹⁶ redraws per seed before two seeds could meet.
        number = ((int(self.seed) << 16) + count) % 2**64
        generator = torch.Generator().manual_seed(number)
        self.projection.copy_(orthogonal_projection(*self.projection.shape, generator=generator))

    def after_step(self, group: ProcessGroup | None = None) -> None:
        if not (self.redraw_interval and self.training):
            return
        self.steps.add_(1)
        steps = int(self.steps)
        if steps % self.redraw_interval == 0:
            self._draw(steps // self.redraw_interval)
            from_first_rank(self.projection, group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        w = self.projection.to(accumulate(q))
        return performer_attention(q, k, v, w, kernel=self.kernel, key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        # Linear in v: attending to the unit vectors reads the weights off.
        b, h, n, _ = q.shape
        tokens = torch.eye(n, dtype=q.dtype, device=q.device).expand(b, h, n, n)
        w = self.projection.to(accumulate(q))
        return performer_attention(q, k, tokens, w, kernel=self.kernel, backend="reference")


@stacks(PerformerAttention)
class StackedPerformer(OwnAttend, PerformerAttention):
    """Each seed attends by its own random features."""
