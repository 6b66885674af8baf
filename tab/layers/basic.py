"""The control and the two softmax attentions that everything else is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._sdpa import once
from ._base import Attention, HeadsAttention
from ._registry import register_attention


@register_attention("none")
class NoAttention(Attention):
    """The control: y = x.

    >>> torch.equal(build_attention("none", 32, seq_len=64)(x), x)
    True
    """

    is_attention, mixes_tokens = False, False
    title, stacking = "Control", True

    def __init__(self, dim: int, *, seq_len: int, grid: tuple[int, int] | None = None):
        super().__init__()

    def compute(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return x

    def attention_matrix(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return torch.eye(n, device=x.device).expand(b, 1, n, n)


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(QKᵀ/√D), (B, H, N, N)"""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class _SoftmaxAttention(HeadsAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, N)
        return once(q, k, v, seen=mask)

    weights = staticmethod(softmax_weights)


@register_attention("self")
class SelfAttention(_SoftmaxAttention):
    """One head over the whole width, softmax(QKᵀ/√D)V, no output projection.

    inner_dim: D, the width of Q and K, `dim` if None; V is as wide as the tokens.

    >>> build_attention("self", 32, seq_len=64)(x).shape
    torch.Size([2, 64, 32])
    """

    title, colour, stacking = "Self-Attention", 0, True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        rope: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim,
            seq_len=seq_len,
            grid=grid,
            num_heads=1,
            rope=rope,
            output=False,
            inner_dim=inner_dim,
        )


@register_attention("multi_head")
class MultiHeadAttention(_SoftmaxAttention):
    """H heads of softmax(QKᵀ/√D)V, concatenated and projected (Vaswani et al. 2017, eq. 1).

    num_heads: H, which divides the width (else a ValueError names the nearest that do).
    rope: rotate q and k by position.

    >>> build_attention("multi_head", 32, seq_len=64, num_heads=8)(x).shape
    torch.Size([2, 64, 32])
    """

    title, colour, stacking = "Multi-Head", 1, True
