"""Latents in pages: a pool (P, S, R+Dr) that sequences share, and a table that says whose is which
(Kwon et al. 2023, "PagedAttention", sec. 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import check_tensors, shapes
from ._softmax import may_look


def check_pages(cache: Tensor, page_table: Tensor, seqlens: Tensor) -> None:
    """page_table (B, M) int32 or int64; on a CPU also that the pages in use are there."""
    check_tensors("mla_decode", page_table=page_table)
    rule, size = None, cache.shape[1]
    if page_table.dim() != 2 or page_table.dtype not in (torch.int32, torch.int64):
        rule = "page_table (B, M) int32 or int64"
    elif page_table.shape[:1] != seqlens.shape or page_table.device != cache.device:
        rule = "page_table and seqlens of the same sequences, on the cache's device"
    elif cache.shape[0] == 0:
        rule = "at least one page"
    elif may_look(page_table):
        used = _used(page_table, seqlens, size)
        bad = used & ((page_table < 0) | (page_table >= cache.shape[0]))
        if bad.any():
            b, i = bad.nonzero()[0].tolist()
            rule = (
                f"pages 0 to {cache.shape[0] - 1} where a sequence has tokens, found "
                f"page_table[{b}, {i}] = {int(page_table[b, i])}"
            )
    if rule:
        given = shapes(cache=cache, page_table=page_table, seqlens=seqlens)
        raise ValueError(f"mla_decode wants {rule}; got {given}")


def gather_pages(cache: Tensor, page_table: Tensor, seqlens: Tensor) -> Tensor:
    """cache (P, S, W) -> (B, M·S, W), the pages of each sequence one after the other; what lies in
    pages that are not in use is of no matter."""
    table = page_table.masked_fill(~_used(page_table, seqlens, cache.shape[1]), 0).long()
    return cache[table].flatten(1, 2)


def _used(page_table: Tensor, seqlens: Tensor, size: int) -> Tensor:
    """(B, M)"""
    page = torch.arange(page_table.shape[1], device=page_table.device)
    return page * size < seqlens[:, None]
