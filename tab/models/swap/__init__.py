"""Attention layers of TAB in models of torch and timm."""

from .carry import swap_attention

__all__ = ["swap_attention"]
