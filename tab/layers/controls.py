"""The control ladder: layers that are no attention, each without one thing that attention has.

    none          y = x, nothing at all (basic.py); none_again: the same, trained with other seeds
    ffn           a token-wise MLP: parameters and a nonlinearity, but no token sees another
    uniform, random, mixer, dwconv    tokens meet, by a rule that does not look at them
                  (static_mixes.py)

What attention is said to bring has to be more than the best of these brings at the same size. All
but `none` grow in one option, at any width of the model, so that sizes can be matched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import Attention
from ._registry import register_attention
from .basic import NoAttention


@register_attention("none_again")
class NoAttentionAgain(NoAttention):
    """`none` under a second name, with other seeds: a comparison of the control with itself.

    The statistics have to find the two equivalent; what they find else is a fault of theirs, or
    one that the threshold allows in 5 of 100 comparisons.

    seed_shift: added to the seed of the run wherever something is drawn (`RunConfig.draws`).

    Raises ValueError: seed_shift = 0, which would be `none` itself.
    """

    title, stacking = "Control again", True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        seed_shift: int = 1000,
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid)
        if not seed_shift:
            raise ValueError(
                "none_again: seed_shift=0 trains the control itself once more; give another number"
            )


@register_attention("ffn")
class FeedForward(Attention):
    """W₂ gelu(W₁ x + b₁) + b₂ of each token by itself (Vaswani et al. 2017, section 3.3).

    width: of the hidden layer, 2·dim by default: as many weights as multi-head attention has.
    """

    is_attention, mixes_tokens = False, False
    size_options, title, stacking = ("width",), "Token-wise FFN", True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        width: int | None = None,
    ):
        super().__init__()
        width = 2 * dim if width is None else width
        if width < 1:
            raise ValueError(f"ffn: width={width}: the hidden layer needs at least 1 unit")
        self._width, self.up = dim, nn.Linear(dim, width)
        self.down = nn.Linear(width, dim)

    def compute(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def attention_matrix(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return torch.eye(n, device=x.device, dtype=x.dtype).expand(b, 1, n, n)
