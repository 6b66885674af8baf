"""The sizes and numbers that a layer is built with, checked before it is: errors name the argument,
what was given and what to give."""

from __future__ import annotations

import functools

from ..ops._typed import typed

LEAST, MOST = 1e-30, 1e30  # of a number; its products and quotients are float32, too


def check_tokens(
    layer: str,
    *,
    dim: int | None = None,
    seq_len: int | None = None,
    grid: tuple[int, int] | None = None,
    **rest: object,
) -> None:
    """The sizes that all layers have, of which some make no use: they are 1 or more, and the grid
    has seq_len cells."""
    for name, size in (("dim", dim), ("seq_len", seq_len)):
        if size is not None and size < 1:
            raise ValueError(f"{layer}: {name}={size} must be 1 or more")
    if grid is None:
        return
    if min(grid) < 1:
        raise ValueError(f"{layer}: grid={grid} must be (rows, cols), each 1 or more")
    if seq_len not in (None, grid[0] * grid[1]):
        raise ValueError(
            f"{layer}: grid={grid} has {grid[0] * grid[1]} cells, but seq_len={seq_len}; give a "
            "grid of as many cells, or None where the tokens are no cells"
        )


built = functools.partial(typed, rule=check_tokens)  # decorates the constructors of all layers


def check_heads(layer: str, dim: int, num_heads: int, what: str = "dim") -> None:
    """The width must split evenly into heads; the error names the nearest numbers that do it."""
    if dim < 1:
        raise ValueError(f"{layer}: {what}={dim} must be 1 or more")
    if num_heads < 1 or dim % num_heads:
        divisors = [h for h in range(1, min(dim, 4096) + 1) if dim % h == 0]
        near = sorted(divisors, key=lambda h: abs(h - num_heads))[:3]
        raise ValueError(
            f"{layer}: num_heads={num_heads} does not divide {what}={dim}; "
            f"nearest choices: {', '.join(map(str, sorted(near)))}"
        )


def check_number(
    layer: str, name: str, value: float, *, zero: bool = False, more: str = ""
) -> None:
    """A number that tensors are multiplied with or moved by: beyond these, what comes is infinite
    or NaN. zero: 0 is one of them. more: what else the error says."""
    if not (LEAST <= value <= MOST or (zero and value == 0)):
        low = f"0, or at least {LEAST:g}" if zero else f"at least {LEAST:g}"
        raise ValueError(f"{layer}: {name}={value}: must be {low}, and at most {MOST:g}{more}")
