"""Block-sparse (BigBird) attention as a layer."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..ops._check import accumulate, autocast
from ..ops._op import choose
from ..ops.pattern import BlockPattern
from ..ops.sparse import sparse_attention, sparse_bwd, sparse_fwd
from ._base import HeadsAttention
from ._registry import register_attention
from ._stacking import OwnAttend, stacks

PATTERNS = 256  # that a process keeps: one for each length, seed and set of options


@register_attention("sparse")
class SparseAttention(HeadsAttention):
    """softmax(QKᵀ/√D) over global, window and random blocks (BigBird; Zaheer et al. 2020).

    block_size: tokens in a block. window: blocks around a block, odd. num_global: blocks at each
    end that see all and are seen by all. num_random: further blocks for each block and head, drawn
    once from `seed`, which is part of the state_dict: a layer that loads it sees the same blocks.
    With few blocks nothing is left out: 64 tokens in blocks of 32, the published configuration, are
    two global blocks, and the layer is multi-head attention; so it is when a block is longer than
    the sequence.

    Raises ValueError: what `tab.BlockPattern.bigbird` does not take, such as an even window.

    >>> layer = build_attention("sparse", 32, seq_len=64, block_size=4, num_random=1)
    >>> layer(x).shape, layer.pattern(64).density < 1
    (torch.Size([2, 64, 32]), True)
    """

    title, colour = "Sparse", 5

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        block_size: int = 32,
        window: int = 3,
        num_global: int = 1,
        num_random: int = 3,
        seed: int = 0,
        rope: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim, rope=rope
        )
        self.rule = [block_size, num_heads, window, num_global, num_random, seed]
        self.register_buffer("seed", torch.tensor(seed))
        self.pattern(seq_len)  # bad options are found here, not in the first step

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        # A state_dict written before the seed was in it leaves the layer its own.
        state_dict.setdefault(f"{prefix}seed", torch.tensor(self.rule[-1], device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.seed.is_meta:
            self.rule[-1] = int(self.seed)

    def pattern(self, n: int) -> BlockPattern:
        """The pattern for n tokens, made once."""
        return _pattern(n, *self.rule)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return bigbird(*autocast(q, k, v), key_mask, self.rule, q.shape[-1] ** -0.5)[0]
        return sparse_attention(q, k, v, self.pattern(q.shape[2]), key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        seen = self.pattern(q.shape[2]).to_dense().to(q.device)  # (Hp, N, N)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@stacks(SparseAttention)
class StackedSparse(OwnAttend, SparseAttention):
    """Each seed attends to its own random blocks."""


@functools.lru_cache(maxsize=PATTERNS)
def _pattern(n, block_size, heads, window, num_global, num_random, seed) -> BlockPattern:
    options = {"heads": heads, "window": window, "num_global": num_global}
    size = min(block_size, n)
    return BlockPattern.bigbird(n, block_size=size, num_random=num_random, seed=seed, **options)


# --- for torch.compile ----------------------------------------------------------------------------

# The pattern depends on N in Python, so that tracing it would compile the layer anew for every N.
# Here it is looked up when the compiled code runs.


@torch.library.custom_op("tab::bigbird", mutates_args=())
def bigbird(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, rule: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """`sparse_fwd` under the pattern of these options for the N of q -> o, lse"""
    pattern = _pattern(q.shape[2], *rule).to(q.device)
    options = key_mask, None, pattern.block_size, False, scale, 0.0
    x = q, k, v, *pattern.tensors, *options
    return sparse_fwd(choose("auto", sparse_fwd, *x, cuda=key_mask is None), *x)


@torch.library.custom_op("tab::bigbird_backward", mutates_args=())
def bigbird_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, o: Tensor, lse: Tensor,
    rule: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of sparse attention under the pattern that `rule` draws."""
    pattern = _pattern(q.shape[2], *rule).to(q.device)
    options = key_mask, None, pattern.block_size, False, scale, 0.0
    backend = choose("auto", sparse_fwd, q, cuda=key_mask is None)
    return sparse_bwd(backend, do, q, k, v, o, lse, *pattern.tensors, *options)


@bigbird.register_fake
def _(q, k, v, key_mask, rule, scale):
    return _like(v), q.new_empty(q.shape[:3], dtype=accumulate(q))


@bigbird_backward.register_fake
def _(do, q, k, v, key_mask, o, lse, rule, scale):
    return _like(q), _like(k), _like(v)


def _like(x: Tensor) -> Tensor:
    """As the kernels lay it out, (B, N, H, D) in memory."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.rule, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, do, _):
    return *bigbird_backward(do, *ctx.saved_tensors, ctx.rule, ctx.scale), None, None, None


bigbird.register_autograd(_gradients, setup_context=_save)
