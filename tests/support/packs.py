"""Packed batches for the tests: inputs of each function, and the loop over their sequences."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import tab

H, D, DV, M = 4, 8, 5, 6
LENGTHS = (5, 0, 3, 3, 70, 1, 1, 0)  # some empty, neighbours of one length
NAMES = ("linear", "performer", "local", "mla")


def dims(name: str) -> tuple[int | None, ...]:
    """The dimension of the tokens in each operand; None: it has none."""
    return (2, 2, 1, 1, None, None) if name == "mla" else (2, 2, 2)


def draw(name: str, tokens: int, dtype=torch.float32, heads: int = H, seed: int = 0):
    """Operands of one packed batch, leaves."""
    g = torch.Generator().manual_seed(seed)
    shapes: tuple[tuple[int, ...], ...] = (
        (1, H, tokens, D), (1, heads, tokens, D), (1, heads, tokens, DV)
    )  # fmt: skip
    if name == "mla":
        shapes = (
            (1, H, tokens, D), (1, H, tokens, 4), (1, tokens, 6), (1, tokens, 4), (H, D, 6),
            (H, DV, 6),
        )  # fmt: skip
    return [
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def call(name: str, dtype=torch.float32, **options):
    """The function, on operands and what else is given."""
    if name == "performer":
        g = torch.Generator().manual_seed(1)
        acc = torch.promote_types(dtype, torch.float32)
        w = tab.orthogonal_projection(M, D, generator=g).to(acc)
        return partial(_performer, w, **options)
    if name == "local":
        options.setdefault("window", (4, 2))
    if name == "mla":
        options.setdefault("form", "fused")
    return partial(getattr(tab, f"{name}_attention"), **options)


def _performer(w, q, k, v, **options):
    return tab.performer_attention(q, k, v, w, **options)


def cu(lengths: Sequence[int], dtype=torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def cut(name: str, x: Sequence[Tensor], lengths: Sequence[int]):
    """-> the operands of each sequence."""
    parts = [
        [t] * len(lengths) if dim is None else t.split(list(lengths), dim)
        for t, dim in zip(x, dims(name), strict=True)
    ]
    return list(zip(*parts, strict=True))


def loop(name: str, f, x: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """What packing is held to: f on each sequence by itself, whose results are put together."""
    outs = [_flat(f(*part)) for part in cut(name, x, lengths)]
    every = list(zip(*outs, strict=True))
    # o and lse go on along the tokens; of states and of max_logits each sequence has its own.
    return [
        torch.cat(column, 2 if i == 0 or _is_lse(column, lengths) else 0)
        for i, column in enumerate(every)
    ]


def _is_lse(column: Sequence[Tensor], lengths: Sequence[int]) -> bool:
    return [x.shape[-1] for x in column] == list(lengths) and column[0].dim() == 3


def _flat(tree) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [x for part in tree for x in _flat(part)]


def results(f, x: Sequence[Tensor], seed: int = 5) -> list[Tensor]:
    """All outputs of f(*x), then the gradient of each operand under random cotangents."""
    outs = _flat(f(*x))
    g = torch.Generator().manual_seed(seed)
    total = sum(
        (o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum()
        for o in outs
        if o.requires_grad
    )
    return [*outs, *torch.autograd.grad(total, x)]
