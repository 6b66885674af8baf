"""Block-sparse attention on a packed batch: each sequence under the pattern of its own length.

The blocks of a sequence begin at its first token, so that they lie as in a batch of this one
sequence, whatever lies before it; the last block of a sequence may be shorter. Neighbours of one
length are one call. Everything is made of views, the op, and one concatenation of the outputs, so
derivatives are those of the op, of any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._check import accumulate
from ._packed_op import cut, join, split
from ._softmax import empty_outputs
from .pattern import BlockPattern

PatternOf = Callable[[int], BlockPattern]


def pattern_of(make: PatternOf, n: int) -> BlockPattern:
    """What the caller's function gives for n tokens, checked."""
    pattern = make(n)
    if not isinstance(pattern, BlockPattern) or (pattern.n, pattern.n_keys) != (n, n):
        raise ValueError(
            f"sparse_attention wants of pattern({n}) a BlockPattern for {n} queries and as many "
            f"keys; got {pattern!r}"
        )
    return pattern


def each_sequence(*given) -> tuple[Tensor, Tensor]:
    """What _each_sequence returns, and never in a compiled graph: it reads the lengths, and calls
    the caller's function with them."""
    return (_uncompiled if torch.compiler.is_compiling() else _each_sequence)(*given)


def _each_sequence(
    attend: Callable[..., tuple[Tensor, Tensor]], options: tuple, make: PatternOf,
    cu_seqlens: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attend(q, k, v, key_mask, pattern, *options) -> o and lse, for each sequence of q (1, H, T,
    D)."""
    if q.is_meta:  # lengths are values
        return empty_outputs(q, v, accumulate(q))
    groups = cut("sparse_attention", cu_seqlens, q.shape[2]) or [(0, 0)]
    patterns = {n: pattern_of(make, n) for _, n in groups if n}
    given = {"q": q, "k": k, "v": v, "key_mask": key_mask}
    parts = zip(*(split(x, name, groups) for name, x in given.items()), strict=True)
    outs = [
        attend(*part, patterns[n], *options) if n else _nothing(*part)
        for (_, n), part in zip(groups, parts, strict=True)
    ]
    count = sum(many for many, _ in groups)
    o, lse = zip(*outs, strict=True)
    return join(o, "o", count, q), join(lse, "lse", count, q)


# torch.compiler.disable would import Dynamo here and now: two thirds again of what torch takes.
_uncompiled = _disable_dynamo(_each_sequence)


def _nothing(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of sequences without tokens."""
    return empty_outputs(q, v, accumulate(q))
