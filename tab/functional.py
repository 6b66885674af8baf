"""The attention mechanisms as functions on (B, H, N, D) tensors."""

from .ops import linear_attention, local_attention

__all__ = ["linear_attention", "local_attention"]
