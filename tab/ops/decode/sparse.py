"""Sparse attention: the blocks of keys and values that a later query can still see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._check import accumulate, shapes
from .._options import finite
from .._softmax import score_scale, softmax_forward
from ..decode_cache import ordinary
from ..pattern import BlockPattern
from ..sparse import sparse_attention
from ._held import Held
from ._slots import Seen, Slots
from ._softmax import attend_one


class SparseCache(Held):
    """Causal `sparse_attention`, `o_i = Σ_j softmax_j(scale·q_i·k_j) v_j` over the tokens j ≤ i of
    the blocks that the block of i sees. It holds k and v of the blocks that a later query of any
    head can still see, as many at a time as the pattern asks for, reserved at the first token: a
    sliding window keeps its blocks and the sinks, a pattern whose last rows see everything keeps
    everything.

    Args:
        pattern: for as many tokens as there will be at most, and for H heads or shared by all.
        scale: of the scores, 1/√D unless given.

    Raises:
        ValueError: more tokens than the pattern has, or tokens or heads that do not fit those
            before; the message prints them.
        RuntimeError: gradients would be recorded, which no cache but H2OCache does.

    Example: two sinks and three blocks of 8 tokens, whatever the length.
        >>> pattern = tab.BlockPattern.sliding_window(128, window=3, sinks=2, block_size=8)
        >>> q, k, v = torch.randn(3, 1, 2, 128, 32)  # each (B, H, N, D)
        >>> cache = tab.SparseCache(pattern)
        >>> o = [cache.step(q[:, :, [i]], k[:, :, [i]], v[:, :, [i]]) for i in range(128)]
        >>> whole = tab.sparse_attention(q, k, v, pattern, causal=True)
        >>> torch.allclose(torch.cat(o, 2), whole, atol=1e-5)
        True
        >>> cache.bytes == 5 * 8 * 2 * 2 * 32 * 4
        True
    """

    NAMES = ("k", "v")
    FUNCTION = "tab.sparse_attention"

    def __init__(self, pattern: BlockPattern, *, scale: float | None = None):
        super().__init__()
        if pattern.n != pattern.n_keys:
            raise ValueError(
                f"SparseCache wants a pattern with as many keys as queries, that of the whole "
                f"sequence; got {pattern!r}"
            )
        self.pattern = pattern
        self.scale = None if scale is None else finite("SparseCache", "scale", scale)
        self._slots = Slots(pattern)
        self._row = -1  # of blocks, whose `_seen` that is
        self._seen: Seen | None = None
        self._hidden = torch.zeros(0)  # (slots·block_size,): 0, or −∞ for a row that waits

    def reset(self) -> None:
        super().reset()
        self._row = -1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        n, total = q.shape[2], self._length + q.shape[2]
        if total > self.pattern.n or self.pattern.heads not in (None, q.shape[1]):
            raise ValueError(
                f"SparseCache has a pattern for {self.pattern.n} tokens and "
                f"{self.pattern.heads or 'any'} heads, holds {self._length} tokens and got "
                f"{shapes(q=q, k=k, v=v)}; make the pattern for these"
            )
        self._begin(k, v)
        scale = score_scale("SparseCache", self.scale, q.shape[3])
        o = self._one(q, k, v, scale) if n == 1 else self._more(q, k, v, scale)
        self._length = total
        return o

    def _one(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        row, within = divmod(self._length, self.pattern.block_size)
        keys, values = self._held.values()
        at = self._slots.slot[row] * self.pattern.block_size + within
        keys[:, :, at], values[:, :, at] = k[:, :, 0], v[:, :, 0]
        if row != self._row or self._seen is None:
            self._row, self._seen = row, self._slots.seen(row, q.device)
            if self._seen.every:
                self._clear(at, self.pattern.block_size - within)
        if self._seen.every and q.is_cpu and q.dtype == accumulate(q):  # no copy of what is seen
            self._hidden[at] = 0.0
            return attend_one(q, keys, values, scale, self._hidden)
        tokens, valid = self._seen.upto(within + 1)
        if valid is None:  # the heads are alike, and see all of these
            if not len(tokens):
                return q.new_zeros(*q.shape[:3], values.shape[3])
            keys, values = (x.index_select(2, tokens) for x in (keys, values))
            return attend_one(q, keys, values, scale)
        heads = torch.arange(q.shape[1], device=q.device) * keys.shape[1] // q.shape[1]
        acc = accumulate(q)
        rows = heads[:, None], tokens  # (H, 1), (H, S)
        keys, values = (x[:, *rows].to(acc) for x in (keys, values))
        return softmax_forward(q.to(acc), keys, values, valid, scale)[0].to(q.dtype)

    def _clear(self, at: int, count: int) -> None:
        """The rows of the own block from `at` on, which hold another block's tokens still, hide."""
        later = slice(at + 1, at + count)
        for x in self._held.values():
            x[:, :, later] = 0.0  # NaN would not hide
        with ordinary():
            self._hidden = x.new_zeros(x.shape[2])
        self._hidden[later] = -torch.inf

    def _more(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What the tokens see of earlier blocks, and their own blocks, are a sequence of its own
        with a pattern of its own, in which the queries of earlier tokens are idle."""
        self._row = -1  # what a step found may be over
        size, n = self.pattern.block_size, q.shape[2]
        first, last = self._length // size, (self._length + n - 1) // size
        past, pattern = self._slots.part(first, last, self._length + n)
        begun = self._slots.tokens([first])[: self._length % size]
        held = torch.cat([self._slots.tokens(past), begun]).to(q.device)
        mine = self._held.values()
        keys, values = (
            torch.cat([x.index_select(2, held), new], 2)
            for x, new in zip(mine, (k, v), strict=True)
        )
        q = F.pad(q, (0, 0, len(held), 0))
        o = sparse_attention(q, keys, values, pattern, causal=True, scale=scale)[:, :, len(held) :]
        token, at = (x.to(q.device) for x in self._slots.places(self._length, self._length + n))
        for x, new in zip(mine, (k, v), strict=True):
            x[:, :, at] = new[:, :, token]
        return o

    def _begin(self, k: Tensor, v: Tensor) -> None:
        if not self._held:
            rows = self._slots.count * self.pattern.block_size
            with ordinary():
                self._held = {
                    name: x.new_zeros(*x.shape[:2], rows, x.shape[3])
                    for name, x in (("k", k), ("v", v))
                }

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        rows = self._slots.count * self.pattern.block_size
        return {"k": ("B", "H", rows, "D"), "v": ("B", "H", rows, "Dv")}

    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        super()._restore(tensors, length)
        self._row = -1
