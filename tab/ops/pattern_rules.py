"""The blocks that patterns by a rule see: rows and columns (nnz,), in any order, repeats allowed.
The formulas and their sources stand at the methods of BlockPattern that have these names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

Options = ParamSpec("Options")
Blocks = tuple[Tensor, Tensor]


def _rule(columns: Callable[Options, Tensor]) -> Callable[Options, Blocks]:
    """Columns (nb, any number) by row -> rows and columns of those within the sequence; on the CPU
    and outside of inference mode, whatever goes on around it."""

    @functools.wraps(columns)
    def blocks(*args: Options.args, **kwargs: Options.kwargs) -> Blocks:
        with torch.device("cpu"), torch.inference_mode(False):
            seen = columns(*args, **kwargs)
            rows = torch.arange(len(seen))[:, None].expand_as(seen)
            inside = (seen >= 0) & (seen < len(seen))
            return rows[inside], seen[inside]

    return blocks


def _earlier(columns: Tensor) -> Tensor:
    """Without those after the row."""
    return columns.masked_fill(columns > torch.arange(len(columns))[:, None], -1)


@_rule
def sliding_window(nb: int, window: int, sinks: int) -> Tensor:
    """The last blocks, and the sinks."""
    i = torch.arange(nb)[:, None]
    last = i - torch.arange(min(window, nb))
    return torch.cat([last, _earlier(torch.arange(min(sinks, nb)).expand(nb, -1))], 1)


@_rule
def dilated(nb: int, window: int, dilation: int) -> Tensor:
    """Around each, blocks apart."""
    reach = min(window // 2, nb)
    return torch.arange(nb)[:, None] + dilation * torch.arange(-reach, reach + 1)


@_rule
def strided(nb: int, stride: int) -> Tensor:
    """The last blocks, and every stride-th one before."""
    steps = torch.cat([torch.arange(min(stride, nb)), torch.arange(0, nb, stride)])
    return torch.arange(nb)[:, None] - steps


@_rule
def fixed(nb: int, stride: int, summary: int) -> Tensor:
    """The blocks of its own stretch, and the last ones of each stretch before."""
    i, j = torch.arange(nb)[:, None], torch.arange(nb)
    own = i // stride * stride + torch.arange(min(stride, nb))
    return _earlier(torch.cat([own, j[j % stride >= stride - summary].expand(nb, -1)], 1))
