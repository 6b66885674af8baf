"""What linear attention and Performer share in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def normalised(fq: Tensor, fk: Tensor, v: Tensor, causal: bool) -> Tensor:
    """φ(q)ᵀS/φ(q)ᵀz of the features φ(q), φ(k) (B, H, N, M) and v (B, H, N, D)."""
    if causal:
        scores = (fq @ fk.mT).tril()
        return (scores @ v) / scores.sum(-1, keepdim=True)
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None])
