"""Controls whose tokens meet by a rule that does not look at them: no queries and no keys.

uniform     y_i = W_o · mean_j W_v x_j: every token sees all others, and none more than others
random      y_i = W_o · Σ_j M_ij W_v x_j with fixed random M: tokens differ, nothing is learned
mixer       the same with M learned: who sees whom is learned, but does not depend on x
dwconv      the same with M a depthwise 3×3 convolution: local, and equal at every place
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import Attention
from ._registry import register_attention
from ._sizes import check_heads
from ._stacking import beside, stacks
from ._state import Stateful


class _StaticMix(Attention):
    """y = W_o · mix(W_v x), where `mix` moves the values between tokens by a rule that does not
    look at them: what is left of attention without queries, keys and softmax.

    inner_dim: the width of the values, 2·dim by default: as many weights as multi-head attention
    has, but for those of the mix itself.
    """

    is_attention, size_options = False, ("inner_dim",)

    def __init__(self, dim: int, seq_len: int, num_heads: int, inner_dim: int | None):
        super().__init__()
        inner_dim = 2 * dim if inner_dim is None else inner_dim
        check_heads(type(self).__name__, inner_dim, num_heads, what="inner_dim")
        self.seq_len, self.num_heads, self.inner_dim = seq_len, num_heads, inner_dim
        self._width = dim
        self.value = nn.Linear(dim, inner_dim, bias=False)
        self.out = nn.Linear(inner_dim, dim)

    def compute(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        if x.shape[1] > self.seq_len:
            raise ValueError(
                f"{type(self).__name__} was made for {self.seq_len} tokens, got {x.shape[1]} in x "
                f"{tuple(x.shape)}; build the layer with seq_len={x.shape[1]}"
            )
        return self.out(self.mix(self.value(x), key_mask))

    def mix(self, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """v (B, N, inner), 0 where key_mask hides a token -> (B, N, inner)"""
        raise NotImplementedError


@register_attention("uniform")
class UniformMix(_StaticMix):
    """y_i = W_o · mean_j W_v x_j over the real tokens: attention whose weights are all 1/N."""

    title, stacking = "Uniform 1/N", True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        inner_dim: int | None = None,
    ):
        super().__init__(dim, seq_len, 1, inner_dim)

    def mix(self, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is None:
            mean = v.mean(1, keepdim=True)
        else:
            mean = v.sum(1, keepdim=True) / key_mask.sum(1).clamp(min=1)[:, None, None]
        return mean.expand_as(v)

    def attention_matrix(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return x.new_full((b, 1, n, n), 1 / n)


class _MatrixMix(_StaticMix):
    """`mix` by a matrix M (H, N_max, N_max), one for each head; fewer tokens use its first rows and
    columns."""

    def matrix(self, n: int) -> Tensor:
        """(H, n, n)"""
        raise NotImplementedError

    def mix(self, v: Tensor, key_mask: Tensor | None) -> Tensor:
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
        return (self.matrix(v.shape[2]).to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def attention_matrix(self, x: Tensor) -> Tensor:
        """|M|, each row divided by its sum: M has signs, so this is the share of a token's size."""
        m = F.normalize(self.matrix(x.shape[1]).abs(), p=1, dim=-1)
        return m.expand(x.shape[0], -1, -1, -1)


def first(m: Tensor, n: int, *dims: int) -> Tensor:
    """The first n along these dimensions. Compiled, a copy: a slice is contiguous for n = N alone,
    and to ask that would be one more program."""
    for dim in dims:
        if torch.compiler.is_compiling():
            m = m.index_select(dim, torch.arange(n, device=m.device))
        else:
            m = m.narrow(dim, 0, n)
    return m


@register_attention("mixer")
class LearnedMix(_MatrixMix):
    """y_i = W_o · Σ_j M_ij W_v x_j with learned M, one for each head: a linear, static MLP-Mixer
    (Tolstikhin et al. 2021).

    rank: M = A·B with A (N, rank), B (rank, N); 0: M is free. Long sequences need a rank, as a free
    M has more weights than a whole block. None: free where that takes at most 2·dim² weights in
    all, half of what multi-head attention has; else the largest rank that does, at least 1.
    """

    title = "Learned mix"

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        rank: int | None = None,
        inner_dim: int | None = None,
    ):
        super().__init__(dim, seq_len, num_heads, inner_dim)
        if rank is None:
            free = num_heads * seq_len**2 <= 2 * dim**2 or seq_len == 1
            rank = 0 if free else min(max(1, dim**2 // (num_heads * seq_len)), seq_len - 1)
        if not 0 <= rank < seq_len:
            raise ValueError(
                f"mixer: rank={rank}: 0 for a free matrix, or 1 to {seq_len - 1} for {seq_len} "
                f"tokens; nearest choice: {min(max(rank, 0), seq_len - 1)}"
            )
        columns = rank or seq_len
        self.weight = nn.Parameter(torch.empty(num_heads, columns, seq_len))
        nn.init.normal_(self.weight, std=seq_len**-0.5)  # the mix then has the variance of V
        self.rows = nn.Parameter(torch.empty(num_heads, seq_len, rank)) if rank else None
        if self.rows is not None:
            nn.init.normal_(self.rows, std=rank**-0.5)

    def matrix(self, n: int) -> Tensor:
        if self.rows is None:
            return first(self.weight, n, -2, -1)
        # Not matmul: its decomposition asks whether N is seq_len.
        a, b = first(self.rows, n, -2), first(self.weight, n, -1)
        return torch.einsum("...ir,...rj->...ij", a, b)


@stacks(LearnedMix)
class StackedLearnedMix(LearnedMix):
    """M (S, H, N, N)"""

    def mix(self, v: Tensor, key_mask: None) -> Tensor:
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (S·B, H, N, D)
        m, v = beside(self.matrix(v.shape[2]).to(v.dtype), v)
        return (m @ v).flatten(0, 1).transpose(1, 2).flatten(2)


@register_attention("random")
class RandomMix(Stateful, _MatrixMix):
    """y_i = W_o · Σ_j M_ij W_v x_j with fixed M_ij ~ N(0, 1/N), one for each head: `mixer` as it
    starts, never trained (after the Random Synthesizer of Tay et al. 2021).

    seed: of M, which is part of the state_dict.
    """

    title, exact = "Random mix", ("weight",)

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        seed: int = 0,
        inner_dim: int | None = None,
    ):
        super().__init__(dim, seq_len, num_heads, inner_dim)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_heads, seq_len, seq_len)
        self.register_buffer("weight", torch.empty(shape))
        self.weight.copy_(torch.randn(shape, generator=generator, device="cpu") * seq_len**-0.5)

    def matrix(self, n: int) -> Tensor:
        return first(self.weight, n, -2, -1)


@stacks(RandomMix)
class StackedRandomMix(RandomMix):
    """Each seed has an M of its own."""

    def mix(self, v: Tensor, key_mask: None) -> Tensor:
        parts = zip(self.seeds, v.chunk(len(self.seeds)), strict=True)
        return torch.cat([layer.mix(part, None) for layer, part in parts])


@register_attention("dwconv")
class DepthwiseConv(_StaticMix):
    """y = W_o · conv(W_v x), conv depthwise: 3×3 on the grid of the tokens, or 3 on a line where
    they have none. Tokens beyond the edge, and masked ones, count as 0."""

    title, stacking = "Depthwise 3×3", "its convolution is written for one seed"

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        inner_dim: int | None = None,
    ):
        super().__init__(dim, seq_len, 1, inner_dim)
        self.grid = grid
        c = self.inner_dim
        kind = nn.Conv2d if grid else nn.Conv1d
        self.convolution = kind(c, c, 3, padding=1, groups=c, bias=False)

    def mix(self, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.grid is None:
            return self.convolution(v.mT).mT
        n = v.shape[1]
        whole = F.pad(v, (0, 0, 0, self.seq_len - n)) if n < self.seq_len else v
        cells = whole.unflatten(1, self.grid).permute(0, 3, 1, 2)  # (B, inner, rows, cols)
        return self.convolution(cells).permute(0, 2, 3, 1).flatten(1, 2)[:, :n]

    def attention_matrix(self, x: Tensor) -> Tensor:
        """The mean |weight| of the channels between two tokens, each row divided by its sum."""
        b, n, _ = x.shape
        weight = self.convolution.weight.abs().mean(0, keepdim=True)  # (1, 1, 3[, 3])
        units = torch.eye(n, self.seq_len, dtype=weight.dtype, device=x.device)[:, None]
        if self.grid is None:
            seen = F.conv1d(units[..., :n], weight, padding=1)
        else:
            seen = F.conv2d(units.unflatten(-1, self.grid), weight, padding=1).flatten(2)[..., :n]
        return F.normalize(seen[:, 0].mT, p=1, dim=-1).expand(b, 1, n, n)
