"""PyTorch's FlexAttention as a layer: any rule for who sees whom, any change of a score.

    o_i = Σ_j softmax_j(score_mod(q_iᵀk_j/√D, b, h, i, j)) v_j  over the j with mask_mod(b, h, i, j)

Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
eq. 2. The compiled kernel trains on CUDA. Elsewhere PyTorch has no backward for it, and the layer
computes the same function from a dense mask.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.local_reference import in_window
from ._base import HeadsAttention
from ._registry import register_attention

if TYPE_CHECKING:  # in the functions that need it: it loads a fifth of all that `tab` does
    from torch.nn.attention.flex_attention import BlockMask

PATTERNS = ("full", "causal", "window", "grid")
SCORES = ("", "relative")
SMALLEST = 16  # head dimension that the compiled kernel takes; smaller ones are padded with zeros
CACHED = 4  # masks that a layer keeps, one for each (N, device)


@register_attention("flex")
class FlexAttention(HeadsAttention):
    """Softmax attention under a mask_mod and a score_mod, run by `torch.nn.attention`.

    pattern: "full" (all tokens), "causal" (j ≤ i), "window" (window_size // 2 tokens to either
        side), or "grid" (as many cells in each direction; without a grid the tokens are one row).
    mask_mod(b, h, i, j) -> bool: in place of the pattern. It must not depend on b.
    score: "", or "relative": s_ij + b_h[Δ], a learned table over Δ = place of j − place of i, in
        rows and columns on a grid (Liu et al. 2021, "Swin Transformer", eq. 4). It starts at 0, and
        has H · (2·rows − 1)(2·cols − 1) entries; a line is a grid of one row of seq_len cells.
    score_mod(score, b, h, i, j) -> score: in place of the score.
    Both functions are pointwise in their indices, as FlexAttention asks, and may read captured
    tensors.
    A token that sees nothing gives 0.

    Raises ValueError: another pattern or score, a negative window_size, score and score_mod at
    once, or, with "relative", more tokens than seq_len.

    >>> layer = build_attention("flex", 32, seq_len=64, mask_mod=lambda b, h, i, j: i >= j)
    >>> layer.attention_matrix(x)[0, 0, 0, :3].tolist()  # the first token sees itself alone
    [1.0, 0.0, 0.0]
    """

    title, colour = "Flex", 10
    stacking: bool | str = True
    undecayed = ("relative",)  # a parameter that weight decay leaves alone

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        pattern: str = "grid",
        window_size: int = 5,
        mask_mod: Callable | None = None,
        score: str = "",
        score_mod: Callable | None = None,
        rope: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim, rope=rope
        )
        self.own_mask, self.named = mask_mod is not None, (pattern, window_size, grid)
        self.mask_mod: Any = mask_mod or pattern_mask(*self.named)
        if score not in SCORES:
            raise ValueError(f"flex: score={score!r}: choose one of {', '.join(map(repr, SCORES))}")
        if score and score_mod is not None:
            raise ValueError(f"flex: score={score!r} and a score_mod: give one of the two")
        self.score_mod = score_mod
        if score_mod is not None:
            self.stacking = "its score_mod may ask which image of the batch it sees"
        self.cells: tuple[int, ...] = ()  # that the table of relative scores is for
        if score == "relative":
            self.cells = grid or (1, seq_len)
            self.relative = nn.Parameter(torch.zeros(num_heads, *(2 * n - 1 for n in self.cells)))
            self.score_mod = self.relative_score
            self.stacking = "its table of relative scores has no stacked form"
        self.masks: dict[tuple[str, int, str], Tensor | BlockMask] = {}

    def __getstate__(self) -> dict:
        # The functions of a named pattern and the masks are made again where the copy is; rules of
        # one's own are pickled if Python can find them by name, as functions of a module.
        return self.__dict__ | {"masks": {}} | ({} if self.own_mask else {"mask_mod": None})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not self.own_mask:
            self.mask_mod = pattern_mask(*self.named)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.cells and q.shape[2] > math.prod(self.cells):
            raise ValueError(
                f"flex: {q.shape[2]} tokens, and score='relative' has places for "
                f"{math.prod(self.cells)}: build the layer with a larger seq_len or grid"
            )
        if q.is_cuda:
            return self.flex(q, k, v, key_mask, _compiled_flex())
        if not (q.is_meta or torch.compiler.is_compiling()):
            _say_dense(q.device.type)
        return self.dense(q, k, v, key_mask)

    def flex(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, run: Callable
    ) -> Tensor:
        """By FlexAttention itself; run is `flex_attention`, compiled or not."""
        score_mod = self.score_mod
        if key_mask is not None:  # not in the block mask, which would be made anew for each batch

            def score_mod(score, b, h, i, j):
                own = score if self.score_mod is None else self.score_mod(score, b, h, i, j)
                return torch.where(key_mask[b, j], own, -torch.inf)

        d = q.shape[-1]
        q, k, v = (F.pad(x, (0, max(0, SMALLEST - d))) for x in (q, k, v))
        o = run(q, k, v, score_mod=score_mod, block_mask=self.block_mask(q), scale=d**-0.5)
        return o[..., :d]

    def dense(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The same function, differentiable on any device."""
        if self.score_mod is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed(q, key_mask))
        return self.weights(q, k, key_mask).to(v.dtype) @ v

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, H, N, N); rows sum to 1, or to 0 where a token sees nothing."""
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        if self.score_mod is not None:
            b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
            scores = self.score_mod(scores, b, *self.indices(q))
        allowed = self.allowed(q, key_mask)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)

    def relative_score(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """s_ij + b_h[Δ], a score_mod."""
        rows, cols = self.cells
        down, right = j // cols - i // cols + rows - 1, j % cols - i % cols + cols - 1
        return score + self.relative[h, down, right].to(score.dtype)

    # --- masks ------------------------------------------------------------------------------------

    def indices(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (1, H, 1, 1), i (1, 1, N, 1), j (1, 1, 1, N)"""
        heads, tokens = (torch.arange(n, device=q.device) for n in q.shape[1:3])
        return heads.view(1, -1, 1, 1), tokens.view(1, 1, -1, 1), tokens.view(1, 1, 1, -1)

    def allowed(self, q: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Who sees whom, (1 or B, 1 or H, N, N) bool; None when all see all."""
        padding = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, N)
        if self.mask_mod is None:
            return padding
        if (
            torch.compiler.is_compiling()
        ):  # in the graph, for every N; a cache would be one for each
            mask = self._dense_mask(q)
        else:
            mask = self._cached("dense", q, self._dense_mask)
        return mask if padding is None else mask & padding

    def block_mask(self, q: Tensor) -> BlockMask | None:
        return None if self.mask_mod is None else self._cached("blocks", q, self._block_mask)

    def _dense_mask(self, q: Tensor) -> Tensor:
        h, i, j = self.indices(q)
        mask = self.mask_mod(torch.zeros_like(h[:, :1]), h, i, j)
        # Not torch.broadcast_shapes, which imports SymPy.
        return torch.broadcast_tensors(mask, mask.new_empty(()).expand(1, 1, *[q.shape[2]] * 2))[0]

    def _block_mask(self, q: Tensor) -> BlockMask:
        from torch.nn.attention.flex_attention import create_block_mask

        heads = self.num_heads if self.own_mask else None  # a named pattern is one for all heads
        n = q.shape[2]
        return create_block_mask(self.mask_mod, None, heads, n, n, device=q.device)

    def _cached(self, kind: str, q: Tensor, make: Callable):
        key = kind, q.shape[2], str(q.device)
        if key not in self.masks:
            if len(self.masks) >= CACHED:
                del self.masks[next(iter(self.masks))]
            with torch.inference_mode(False):  # else training could not use it later
                self.masks[key] = make(q)
        return self.masks[key]


def pattern_mask(pattern: str, window_size: int, grid: tuple[int, int] | None) -> Callable | None:
    """The mask_mod of a named pattern; None for "full"."""
    if pattern not in PATTERNS:
        raise ValueError(f"flex: pattern={pattern!r}: choose one of {', '.join(PATTERNS)}")
    if window_size < 0:
        raise ValueError(f"flex: window_size={window_size} must be ≥ 0; nearest choice: 0")
    reach, cols = window_size // 2, grid[1] if grid and pattern == "grid" else 0
    if pattern == "full":
        return None
    if pattern == "causal":
        return lambda b, h, i, j: j <= i
    return lambda b, h, i, j: in_window(i, j, reach, reach, cols, False)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def _say_dense(device: str) -> None:
    warnings.warn(
        f"PyTorch's FlexAttention has no backward on {device}: the layer flex computes the same "
        "function there from a dense mask, in O(N²) time and memory. Its own kernel runs on CUDA.",
        stacklevel=2,
    )
