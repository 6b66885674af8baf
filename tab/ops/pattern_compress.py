"""Compressed rows of a BlockPattern and their transpose, and what all its constructors check."""

from __future__ import annotations

import torch
from torch import Tensor

Compressed = tuple[Tensor, Tensor, Tensor, Tensor]  # row_ptr, col, col_ptr, row


def compress(hp: int, nb: int, mb: int, head: Tensor, rows: Tensor, cols: Tensor) -> Compressed:
    """Coordinates (nnz,) in any order, repeats allowed, of nb rows and mb columns of blocks."""

    def csr(major: Tensor, minor: Tensor, many: int, width: int) -> tuple[Tensor, Tensor]:
        key = ((head * many + major) * width + minor).unique()  # sorted
        count = key.div(max(1, width), rounding_mode="floor").bincount(minlength=hp * many)
        end = count.cumsum(0).view(hp, many)
        start = end[:, :1] - count.view(hp, many)[:, :1] if many else end.new_zeros(hp, 1)
        return torch.cat([start, end], 1).int(), (key % max(1, width)).int()

    return (*csr(rows, cols, nb, mb), *csr(cols, rows, mb, nb))


def lines(ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry behind ptr (Hp, nb+1): its head and its row."""
    many = ptr.diff().flatten()  # (Hp·nb,)
    line = torch.arange(len(many)).repeat_interleave(many)
    nb = max(1, ptr.shape[1] - 1)
    return line // nb, line % nb


def check_size(n: int, block_size: int) -> int:
    """-> ⌈n/block_size⌉"""
    if n < 0 or block_size < 1:
        raise ValueError(f"BlockPattern wants n ≥ 0, block_size ≥ 1; got {n} and {block_size}")
    return -(-n // block_size)


def check_least(rule: str, **given: tuple[int, int]) -> None:
    """Each (value, least value) by its name."""
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(
                f"BlockPattern.{rule} wants {name} ≥ {least}, got {value}; nearest: {least}"
            )


def check_odd(rule: str, window: int) -> None:
    """A window of blocks around each."""
    if window < 1 or window % 2 == 0:
        near = f"{window - 1} or {window + 1}" if window > 1 else "1"
        raise ValueError(
            f"BlockPattern.{rule} wants an odd window, as many blocks before as after: got "
            f"{window}; nearest: {near}"
        )


def check_tail(n: int, total: int, size: int) -> int:
    """-> the block row at which the last n of `total` queries begin."""
    before = total - n
    if not 0 <= n <= total or before % size:
        near = {
            total - min(max(x, 0), total // size) * size
            for x in (-(-before // size), before // size)
        }
        raise ValueError(
            f"BlockPattern.tail wants 0 ≤ n ≤ {total} behind whole blocks of {size} queries, got "
            f"{n}; nearest: {' or '.join(map(str, sorted(near)))}"
        )
    return before // size
