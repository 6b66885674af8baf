"""Linear attention as a layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.linear import FEATURE_MAPS, FeatureMap, linear_attention
from ..ops.linear_reference import feature
from ._base import HeadsAttention
from ._registry import register_attention


@register_attention("linear")
class LinearAttention(HeadsAttention):
    """o = φ(q)ᵀS/φ(q)ᵀz (Katharopoulos et al. 2020).

    feature_map "learned": φ(x) = elu(W x) + 1 with W (kernel_size, D) trained, one for q and k;
    kernel_size is only used there. Or "elu1", "relu", "softmax".

    Raises ValueError: another feature map, or a kernel_size below 1.

    >>> layer = build_attention("linear", 32, seq_len=64, feature_map="elu1")
    >>> layer(x).shape, layer.attention_matrix(x).shape
    (torch.Size([2, 64, 32]), torch.Size([2, 4, 64, 64]))
    """

    title, colour, stacking = "Linear", 2, True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        feature_map: str = "learned",
        kernel_size: int = 64,
        rope: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim, rope=rope
        )
        choices = ("learned", "elu1", "relu", "softmax")
        if feature_map not in choices:
            raise ValueError(f"feature_map={feature_map!r}: choose one of {', '.join(choices)}")
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size}: the feature map needs at least 1 feature")
        self.map = cast(FeatureMap, "elu1" if feature_map == "learned" else feature_map)
        learned = feature_map == "learned"
        self.feature = nn.Linear(self.head_dim, kernel_size, bias=False) if learned else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return (q, k, v) if self.feature is None else (self.feature(q), self.feature(k), v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return linear_attention(q, k, v, feature_map=self.map, key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        if self.map == "softmax":
            return q.softmax(-1) @ k.softmax(-2).mT
        fq, fk = (feature(x, FEATURE_MAPS[self.map]) for x in (q, k))
        return F.normalize(fq @ fk.mT, p=1, dim=-1)
