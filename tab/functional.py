"""The attention mechanisms as functions on (B, H, N, D) tensors."""

from .ops import BlockPattern, linear_attention, local_attention, sparse_attention

__all__ = ["BlockPattern", "linear_attention", "local_attention", "sparse_attention"]
