"""Where the blocks of a causal pattern lie while a later query can see them. Each has a slot, which
the next block takes once no later row of blocks sees this one. All follows from the pattern alone,
and is computed on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..pattern import BlockPattern, _compress


@dataclass(frozen=True)
class Seen:
    """What a row of blocks sees of the slots: the blocks before it, and its own at the end.

    tokens (S,) and own, whether that is seen, for heads that are alike; else tokens (H, S) and
    valid (H, 1, S), padded in front. every: whether these are all slots, and the heads alike.
    """

    tokens: Tensor
    valid: Tensor | None
    before: int  # tokens of other blocks
    own: bool
    every: bool = False

    def upto(self, count: int) -> tuple[Tensor, Tensor | None]:
        """tokens and valid with that many tokens of its own block."""
        end = self.before + count * self.own
        return self.tokens[..., :end], None if self.valid is None else self.valid[..., :end]


Options = ParamSpec("Options")
Result = TypeVar("Result")


def _on_cpu(f: Callable[Options, Result]) -> Callable[Options, Result]:
    """Whatever the default device and mode are."""

    @functools.wraps(f)
    def run(*args: Options.args, **kwargs: Options.kwargs) -> Result:
        with torch.device("cpu"), torch.inference_mode(False):
            return f(*args, **kwargs)

    return run


class Slots:
    """`count` slots of the pattern's block size, and which block lies in which."""

    @_on_cpu
    def __init__(self, pattern: BlockPattern):
        self.pattern, self.size = pattern, pattern.block_size
        row_ptr, col, *_ = pattern.to("cpu").tensors
        many = row_ptr.diff().flatten()  # (Hp·nb,)
        line = torch.arange(len(many)).repeat_interleave(many)
        head, row = line // max(1, pattern.blocks), line % max(1, pattern.blocks)
        kept = col <= row
        self._head, self._row, self._col = head[kept], row[kept], col[kept].long()
        own = torch.arange(pattern.blocks)
        self._last = own.scatter_reduce(0, self._col, self._row, "amax")  # row that sees the block
        self.slot, self.count = _deal(self._last.tolist())
        self._slot = torch.tensor(self.slot, dtype=torch.int64)

    @_on_cpu
    def seen(self, row: int, device: torch.device) -> Seen:
        picked = self._row == row
        heads, columns = self._head[picked], self._col[picked]
        lists = [columns[heads == h] for h in range(self.pattern.row_ptr.shape[0])]
        own = [bool((x == row).any()) for x in lists]
        earlier = [self.tokens(x[x < row]) for x in lists]
        mine = self.tokens([row])
        if len(lists) == 1:
            tokens = torch.cat([earlier[0], mine]).to(device)
            every = own[0] and len(tokens) == self.count * self.size
            return Seen(tokens, None, len(earlier[0]), own[0], every)
        before = max(map(len, earlier))
        tokens = torch.stack([torch.cat([x.new_zeros(before - len(x)), x, mine]) for x in earlier])
        valid = torch.ones_like(tokens, dtype=torch.bool)
        for line, x, sees in zip(valid, earlier, own, strict=True):
            line[: before - len(x)], line[before:] = False, sees
        return Seen(tokens.to(device), valid[:, None].to(device), before, True)

    @_on_cpu
    def tokens(self, blocks: Tensor | list[int]) -> Tensor:
        """Where the tokens of these blocks lie, (len(blocks)·size,)."""
        return (self._slot[blocks][:, None] * self.size + torch.arange(self.size)).flatten()

    @_on_cpu
    def places(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Which of the tokens first … last − 1 a query at the last of them or later can see,
        counted from the first, and where they lie."""
        token = torch.arange(first, last)
        block = token // self.size
        live = self._last[block] >= (last - 1) // self.size
        token, block = token[live], block[live]
        return token - first, self._slot[block] * self.size + token % self.size

    @_on_cpu
    def part(self, first: int, last: int, total: int) -> tuple[Tensor, BlockPattern]:
        """The blocks before `first` that the rows of blocks first … last see, and the pattern of
        these rows over those blocks and their own, of `total` tokens in all; earlier rows see
        nothing."""
        picked = (self._row >= first) & (self._row <= last)
        head, row, col = (x[picked] for x in (self._head, self._row, self._col))
        past = col[col < first].unique()
        place = torch.zeros(last + 1, dtype=torch.int64)
        place[past] = torch.arange(len(past))
        place[first:] = len(past) + torch.arange(last + 1 - first)
        n = len(past) * self.size + total - first * self.size
        heads, hp = self.pattern.heads, self.pattern.row_ptr.shape[0]
        return past, _compress(n, self.size, heads, hp, head, place[row], place[col])


def _deal(last: list[int]) -> tuple[list[int], int]:
    """The slot of each block, and how many there are: a block takes the slot of one whose `last`
    row is over, else a new one."""
    slots, free, count = list[int](), list[int](), 0
    until: dict[int, list[int]] = {}
    for block, end in enumerate(last):
        free += until.pop(block, [])
        if not free:
            free.append(count)
            count += 1
        slot = free.pop()
        slots.append(slot)
        until.setdefault(end + 1, []).append(slot)
    return slots, count
