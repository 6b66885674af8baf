"""Latents in pages of one pool, which sequences take as they grow and give back when they end
(Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention", sec. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import DTYPES
from .._typed import typed
from ..decode_cache import ordinary


class PagePool:
    """Memory for the latents of many sequences, in pages that a sequence takes when it needs one:
    each wastes less than a page, whatever their lengths, and a page that one gives back serves the
    next.

    Args:
        pages: how many; page_size: rows of each; width: numbers of a row, R + Dr.
        dtype, device: of the rows.

    Several `MLACache` may share a pool. `rows` (pages, page_size, width) is what
    `mla_decode(…, page_table=…)` reads.

    Raises:
        ValueError: a size below 1, or a dtype that TAB does not take.

    Example: two sequences of 10 and 3 tokens; the pages of the first are free again in the end.
        >>> pool = tab.PagePool(pages=8, page_size=4, width=40)
        >>> cache = tab.MLACache(*torch.randn(2, 2, 16, 32), pool=pool)
        >>> q_nope, q_rope = torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 8)
        >>> c_kv, k_rope = torch.randn(2, 10, 32), torch.randn(2, 10, 8)
        >>> o = cache.prefill(q_nope, q_rope, c_kv, k_rope, lengths=torch.tensor([10, 3]))
        >>> pool.used, pool.free
        (4, 4)
        >>> cache.reorder(torch.tensor([1]))
        >>> pool.used, pool.free
        (1, 7)
    """

    @typed
    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if min(pages, page_size, width) < 1 or dtype not in DTYPES:
            raise ValueError(
                "PagePool wants pages, page_size and width ≥ 1 and a dtype of float16, bfloat16, "
                f"float32 or float64; got {pages}, {page_size}, {width} and {dtype}"
            )
        with ordinary():
            self.rows = torch.zeros(pages, page_size, width, dtype=dtype, device=device)
        self._free = list(range(pages))[::-1]
        self._users = [0] * pages

    @property
    def page_size(self) -> int:
        """Rows of a page."""
        return self.rows.shape[1]

    @property
    def free(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many pages are taken."""
        return len(self._users) - self.free

    @property
    def bytes(self) -> int:
        """Of all pages."""
        return self.rows.nbytes

    def take(self) -> int:
        """A page for one user."""
        page = self._free.pop()
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user of this page."""
        self._users[page] += 1

    def give_back(self, page: int) -> None:
        """One user less; the page is free without any."""
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    def shared(self, page: int) -> bool:
        return self._users[page] > 1


class Pages:
    """The pages of the sequences of one cache. A page that several sequences share (`pick`) is
    copied before one of them writes to it."""

    def __init__(self, pool: PagePool):
        self.pool, self.tables = pool, list[list[int]]()
        self._table: Tensor | None = None  # of `tables`, until they change

    @property
    def bytes(self) -> int:
        own = {page for table in self.tables for page in table}
        return len(own) * self.pool.rows[0].nbytes

    @property
    def cache(self) -> Tensor:
        return self.pool.rows

    @property
    def page_table(self) -> Tensor:
        """(B, M) int64, −1 behind the last page of a sequence."""
        if self._table is None:
            most = max(map(len, self.tables), default=0)
            padded = [table + [-1] * (most - len(table)) for table in self.tables]
            self._table = torch.tensor(padded, device=self.cache.device).view(-1, most)
        return self._table

    def write(self, rows: Tensor, lengths: list[int], counts: list[int]) -> None:
        """The first counts[b] of rows (B, N, W) behind the lengths[b] that sequence b has."""
        size = self.pool.page_size
        self.tables = self.tables or [[] for _ in lengths]
        every = list(zip(self.tables, lengths, counts, strict=True))
        copies = [t for t, n, c in every if c and n % size and self.pool.shared(t[-1])]
        fresh = [(t, -(-(n + c) // size) - len(t)) for t, n, c in every]
        needed = len(copies) + sum(count for _, count in fresh)
        if needed > self.pool.free:
            raise RuntimeError(
                f"the pool has {self.pool.free} pages of {size} rows left, and {needed} are "
                "needed; reset() a cache, reorder() ended sequences away, or make a larger PagePool"
            )
        if needed:
            self._table = None
        for table in copies:
            old, table[-1] = table[-1], self.pool.take()
            self.cache[table[-1]] = self.cache[old]
            self.pool.give_back(old)
        for table, count in fresh:
            table += [self.pool.take() for _ in range(count)]
        places = [t[j // size] * size + j % size for t, n, c in every for j in range(n, n + c)]
        at = torch.tensor(places, dtype=torch.int64, device=rows.device)
        given = rows[:, 0] if rows.shape[1] == 1 and all(counts) else torch.cat(
            [x[:c] for x, c in zip(rows, counts, strict=True)]
        )  # fmt: skip
        self.cache.view(-1, rows.shape[2])[at] = given

    def pick(self, index: list[int]) -> None:
        """The sequences `index`, which share what they have in common."""
        tables = [list(self.tables[b]) for b in index]
        for page in (page for table in tables for page in table):
            self.pool.share(page)
        self.clear()
        self.tables = tables

    def clear(self) -> None:
        for page in (page for table in self.tables for page in table):
            self.pool.give_back(page)
        self.tables, self._table = [], None
