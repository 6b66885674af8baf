"""Retention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tab.layers import HeadsAttention

from .op import rates, retention


class RetentionAttention(HeadsAttention):
    """RMSNorm_h(Σ_{j≤i} γ_h^(i−j) (q_iᵀk_j/√D) v_j), projected out (Sun et al. 2023, eq. 5 and 8,
    without the gate). Images are read in raster order; each head forgets at a rate of its own.

    A masked token adds nothing, as its k and v are 0, but it counts as a step of time.
    Options: those of `HeadsAttention` (num_heads, inner_dim, rope).
    """

    # It has no weights but its projections, and treats the images of a batch alike.
    title, stacking = "Retention", True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        o = retention(q * q.shape[-1] ** -0.5, k, v)
        return F.rms_norm(o, o.shape[-1:])  # in place of a denominator

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The share of token j in the size of row i: the weights themselves have signs."""
        i = torch.arange(q.shape[2], device=q.device)
        gamma = torch.tensor(rates(q.shape[1]), dtype=q.dtype, device=q.device)[:, None, None]
        decay = gamma ** (i[:, None] - i).clamp(min=0)  # (H, N, N)
        return F.normalize(((q @ k.mT) * decay).tril().abs(), p=1, dim=-1)
