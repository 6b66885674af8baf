"""Latents in one piece, a row of memory for each sequence, that doubles as it fills."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..decode_cache import ordinary

LEAST = 64  # rows that are reserved at first


class Rows:
    """What `Pages` is without a pool."""

    page_table = None

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.cache: Tensor | None = None  # (B, C, W)

    @property
    def bytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def write(self, rows: Tensor, lengths: list[int], counts: list[int]) -> None:
        """The first counts[b] of rows (B, N, W) behind the lengths[b] that sequence b has."""
        b, n, width = rows.shape
        need = max((n + c for n, c in zip(lengths, counts, strict=True)), default=0)
        with ordinary():
            if self.cache is None:
                self.cache = rows.new_zeros(b, max(need, self.capacity or LEAST), width)
            elif need > self.cache.shape[1]:
                more = max(need, 2 * self.cache.shape[1]) - self.cache.shape[1]
                self.cache = F.pad(self.cache, (0, 0, 0, more))
        first = lengths[0] if lengths else 0
        if all(x == first for x in lengths) and all(c == n for c in counts):
            self.cache[:, first : first + n] = rows
            return
        for i, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            self.cache[i, start : start + count] = rows[i, :count]

    def pick(self, index: list[int]) -> None:
        if self.cache is not None:
            with ordinary():
                self.cache = self.cache[index]

    def clear(self) -> None:
        self.cache = None
