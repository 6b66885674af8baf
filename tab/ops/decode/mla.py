"""Multi-head latent attention: a row [c | k_r] a token for all heads, in a piece or in pages."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .._check import accumulate, operands, shapes, token_major
from .._options import finite
from .._softmax import score_scale, softmax_forward
from ..decode_cache import DecodeCache, keeps_no_graph
from ..mla import mla_attention
from ..mla_decode import mla_decode
from ..mla_forms import check_latents
from ..mla_pages import gather_pages
from ._rows import Rows
from .pages import PagePool, Pages

CHUNK = 64  # queries whose scores are held at once


class MLACache(DecodeCache):
    """Causal `mla_attention`, `o_h = softmax((W_uk,hᵀq_n·c + q_r·k_r)·scale) c W_uv,hᵀ`. It holds
    the latent and the rotary key of every token, R + Dr numbers for all heads together, and
    attends to them by `mla_decode`. The sequences of a batch may differ in length.

    Args:
        w_uk: (H, Dn, R); w_uv: (H, Dv, R): the model's, and no part of `state_dict()`.
        pool: a `PagePool`, from which each sequence takes pages as it grows; without one the rows
            lie in one piece, as long for each sequence as for the longest, and double as they fill.
        capacity: tokens that there is room for from the first one on, without a pool.
        scale: 1/√(Dn + Dr) unless given.

    prefill(q_nope (B, H, N, Dn), q_rope (B, H, N, Dr), c_kv (B, N, R), k_rope (B, N, Dr)) ->
    o (B, H, N, Dv), and step with N = 1. lengths (B,) of prefill: how many of the N tokens are
    real, the first ones of each sequence; the outputs of the others are 0. `lengths` of the cache:
    tokens so far of each sequence. A batch without some of its sequences: `reorder`; sequences that
    are named twice share their pages, and a page is copied before one of them writes to it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        RuntimeError: gradients would be recorded, or the pool has no page left; nothing is changed.

    Example: prompts of 10 and 3 tokens, then one token more of each.
        >>> w_uk, w_uv = torch.randn(2, 4, 16, 32)  # H 4, Dn and Dv 16, R 32
        >>> cache = tab.MLACache(w_uk, w_uv)
        >>> q, c = (torch.randn(2, 4, 11, 24), torch.randn(2, 11, 40))  # Dr 8
        >>> prompt = q[:, :, :10].split([16, 8], -1) + c[:, :10].split([32, 8], -1)
        >>> o = cache.prefill(*prompt, lengths=torch.tensor([10, 3]))
        >>> o = cache.step(*q[:, :, 10:].split([16, 8], -1), *c[:, 10:].split([32, 8], -1))
        >>> o.shape, cache.lengths, cache.length
        (torch.Size([2, 4, 1, 16]), [11, 4], 11)
    """

    NAMES = ("rows", "lengths")

    def __init__(
        self,
        w_uk: Tensor,
        w_uv: Tensor,
        *,
        pool: PagePool | None = None,
        capacity: int = 0,
        scale: float | None = None,
    ):
        if w_uk.dim() != 3 or w_uv.dim() != 3 or capacity < 0:
            raise ValueError(
                "MLACache wants w_uk (H, Dn, R), w_uv (H, Dv, R) and capacity ≥ 0; got "
                f"{shapes(w_uk=w_uk, w_uv=w_uv)} and {capacity}"
            )
        self.w_uk, self.w_uv = w_uk, w_uv
        self.scale = None if scale is None else finite("MLACache", "scale", scale)
        self.lengths: list[int] = []
        self._store = Rows(capacity) if pool is None else Pages(pool)
        if pool is not None:  # a cache that is forgotten gives its pages back
            weakref.finalize(self, self._store.clear)

    @property
    def length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def bytes(self) -> int:
        return self._store.bytes

    def reset(self) -> None:
        self._store.clear()
        self.lengths = []

    def prefill(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        c_kv: Tensor,
        k_rope: Tensor,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """q_nope (B, H, N, Dn), q_rope (B, H, N, Dr), c_kv (B, N, R), k_rope (B, N, Dr) of the next
        tokens -> o (B, H, N, Dv); lengths (B,) where only the first ones are real."""
        x = self._given("prefill", q_nope, q_rope, c_kv, k_rope)
        counts = self._counts(lengths, x[2])
        with torch.no_grad():
            rows = torch.cat(x[2:4], -1)
            if self.length:
                o = self._more(x[0], x[1], x[4], x[5], rows, counts)
            else:
                o = mla_attention(*x, causal=True, scale=self.scale)
            self._store.write(rows, self.lengths or [0] * len(counts), counts)
            self._count(counts)
            if lengths is None:
                return o
            idle = torch.arange(x[2].shape[1], device=o.device) >= lengths[:, None].to(o.device)
            return token_major(o.masked_fill(idle[:, None, :, None], 0.0))

    def step(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """The same of one token of each sequence, N = 1."""
        x = self._given("step", q_nope, q_rope, c_kv, k_rope)
        q_nope, q_rope, c_kv, k_rope, w_uk, w_uv = x
        if c_kv.shape[1] != 1:
            raise ValueError(
                "MLACache.step wants one token of each sequence, N = 1; prefill takes any number; "
                f"got {shapes(q_nope=q_nope, c_kv=c_kv)}"
            )
        counts = [1] * c_kv.shape[0]
        with torch.no_grad():
            rows = torch.cat([c_kv, k_rope], -1)
            self._store.write(rows, self.lengths or [0] * len(counts), counts)
            assert self._store.cache is not None
            now = [n + 1 for n in self.lengths] or counts
            seqlens = torch.tensor(now, device=c_kv.device)
            o, _ = mla_decode(
                q_nope[:, :, 0], q_rope[:, :, 0], self._store.cache, seqlens, w_uk, w_uv,
                page_table=self._store.page_table, scale=self.scale,
            )  # fmt: skip
            self._count(counts)  # not before: what raises has added nothing
            return o[:, :, None]

    def _given(self, method: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The operands with both matrices, checked: they fit each other and what is held."""
        where = f"MLACache.{method}"
        names = "q_nope", "q_rope", "c_kv", "k_rope", "w_uk", "w_uv"
        named = dict(zip(names, (*tensors, self.w_uk, self.w_uv), strict=True))
        x = operands(where, **named)
        check_latents(where, *x)
        keeps_no_graph(where, "tab.mla_attention", *x)
        c_kv, held = x[2], self._store.cache
        width = c_kv.shape[2] + x[3].shape[2]
        if self.lengths and len(self.lengths) != c_kv.shape[0]:
            raise ValueError(
                f"{where} wants the {len(self.lengths)} sequences that it was begun with, or "
                f"reset(); got {shapes(c_kv=c_kv)}"
            )
        if held is not None and (
            held.shape[2] != width or held.dtype != c_kv.dtype or held.device != c_kv.device
        ):
            raise ValueError(
                f"{where} wants rows of R + Dr numbers, a dtype and a device as it holds them; it "
                f"holds {shapes(rows=held)} and got {shapes(c_kv=c_kv, k_rope=x[3])}"
            )
        return x

    def _counts(self, lengths: Tensor | None, c_kv: Tensor) -> list[int]:
        """How many tokens of each sequence are real."""
        b, n, _ = c_kv.shape
        if lengths is None:
            return [n] * b
        counts = lengths.tolist() if lengths.dim() == 1 else []
        if len(counts) != b or lengths.is_floating_point() or any(not 0 <= c <= n for c in counts):
            raise ValueError(
                f"MLACache.prefill wants lengths ({b},), whole numbers from 0 to N = {n}; got "
                f"{shapes(lengths=lengths)} of {counts}"
            )
        return counts

    def _count(self, counts: list[int]) -> None:
        before = self.lengths or [0] * len(counts)
        self.lengths = [n + c for n, c in zip(before, counts, strict=True)]

    def _more(
        self, q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, w_uv: Tensor, rows: Tensor,
        counts: list[int],
    ) -> Tensor:  # fmt: skip
        """Queries of the next tokens to what is held and, causally, to their own rows (B, N, W):
        absorbed, the heads of a token as queries of one sequence. -> (B, H, N, Dv)"""
        (b, h, n, dn), r, acc = q_nope.shape, w_uk.shape[2], accumulate(rows)
        scale = score_scale("MLACache", self.scale, dn + q_rope.shape[3])
        w_uv = w_uv.to(acc)
        q = torch.einsum("bhnd,hdr->bnhr", q_nope.to(acc), w_uk.to(acc))
        q = torch.cat([q, q_rope.transpose(1, 2).to(acc)], -1)  # (B, N, H, W)
        most = self.length
        keys = torch.cat([self._past(most), rows], 1).to(acc)  # (B, most + N, W)
        past, own = torch.tensor([self.lengths, counts], device=q.device)[..., None, None]
        j = torch.arange(most + n, device=q.device)
        parts = []
        for start in range(0, n, CHUNK):
            i = torch.arange(start, min(start + CHUNK, n), device=q.device)[:, None]
            seen = (j < past) | (j >= most) & (j - most <= i) & (j - most < own)  # (B, CHUNK, S)
            tile = q[:, start : start + CHUNK].flatten(1, 2), keys, keys[..., :r]
            z, _, _ = softmax_forward(*tile, seen.repeat_interleave(h, 1), scale)
            parts.append(torch.einsum("bnhr,hvr->bhnv", z.unflatten(1, (-1, h)), w_uv))
        o = torch.cat(parts, 2) if parts else q_nope.new_zeros(b, h, 0, w_uv.shape[1])
        return token_major(o.to(q_nope.dtype))

    def _past(self, most: int) -> Tensor:
        """What is held, (B, most, W); behind a sequence's last token it may be anything."""
        cache, table = self._store.cache, self._store.page_table
        assert cache is not None
        if table is not None:
            cache = gather_pages(cache, table, torch.tensor(self.lengths, device=cache.device))
        return cache[:, :most]

    def _batch(self) -> int:
        return len(self.lengths)

    def _tensors(self) -> dict[str, Tensor]:
        if not self.lengths:
            return {}
        rows = self._past(self.length)
        lengths = torch.tensor(self.lengths, device=rows.device)
        unused = torch.arange(self.length, device=rows.device) >= lengths[:, None]
        return {"rows": rows.masked_fill(unused[..., None], 0.0), "lengths": lengths}

    def _sizes(self, length: int) -> dict[str, tuple[int | str, ...]]:
        return {"rows": ("B", length, "W"), "lengths": ("B",)}

    def _restore(self, tensors: dict[str, Tensor], length: int) -> None:
        rows, lengths = tensors["rows"], tensors["lengths"].tolist()
        if max(lengths) != length or min(lengths) < 0:
            raise ValueError(f"MLACache.load_state_dict: lengths {lengths} of {length} tokens")
        self._store.write(rows, [0] * len(lengths), lengths)
        self.lengths = lengths

    def _pick(self, index: Tensor) -> None:
        picked = index.tolist()
        self._store.pick(picked)
        self.lengths = [self.lengths[i] for i in picked]
