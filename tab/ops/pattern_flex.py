"""BlockPattern and the BlockMask of PyTorch's FlexAttention (Dong et al. 2024, sec. 3.2).

A BlockMask holds full blocks, and partial ones that a function of the tokens, mask_mod, cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

if TYPE_CHECKING:
    from .pattern import BlockPattern

PAIRS = 2**22  # of tokens, for which mask_mod is asked at once


def blocks_of(mask: BlockMask, causal: bool) -> tuple[Tensor, int, tuple[int, int]]:
    """-> blocks seen (nb, mb), or (H, nb, mb) per head; block size; N and N_k."""
    lengths, (size, other) = mask.seq_lengths, mask.BLOCK_SIZE
    if size != other:
        raise ValueError(
            f"A BlockPattern has square blocks; the BlockMask has blocks of {size} × {other}"
        )
    partial = _table(mask.kv_num_blocks, mask.kv_indices)  # (B, H, nb, mb)
    seen = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        seen = _table(mask.full_kv_num_blocks, mask.full_kv_indices)
        later = ~_earlier(seen.shape[2:], size, lengths, seen.device)[0]
        if causal and bool((seen & later).any()):
            _, h, row, column = (seen & later).nonzero()[0].tolist()
            raise ValueError(
                f"The BlockMask shows block row {row} of head {h} all of block {column}, and so "
                "tokens after its own, which causal=True hides; leave causal out"
            )
    blocks = partial.nonzero()  # (P, 4)
    step = max(1, PAIRS // size**2)
    for some in blocks.split(step) if len(blocks) else ():
        inside, shown = _pairs(mask, some, lengths, size)
        earlier = inside & _not_later(some, size, lengths)
        wanted = earlier if causal else inside
        none, whole = ~shown.flatten(1).any(1), (shown == wanted).flatten(1).all(1)
        if not bool((whole | none).all()):
            is_causal = not causal and bool((shown == earlier).flatten(1).all())
            _refuse(some, shown, wanted, whole | none, size, is_causal)
        seen[tuple(some[whole & ~none].T)] = True
    if not bool((seen == seen[:1]).all()):
        raise ValueError(
            "A BlockPattern is the same for the whole batch; the BlockMask has different blocks "
            f"for its {len(seen)} batch entries: make one pattern for each"
        )
    return (seen[0, 0] if seen.shape[1] == 1 else seen[0]).cpu(), size, lengths


def _table(count: Tensor, index: Tensor) -> Tensor:
    """The first count (…, R) of index (…, R, C) -> (…, R, C) bool."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    table = torch.zeros_like(listed)
    return table.scatter_reduce(-1, index.long(), listed, "amax")


def _pairs(
    mask: BlockMask, blocks: Tensor, lengths: tuple[int, int], size: int
) -> tuple[Tensor, Tensor]:
    """Of blocks (P, 4), each (batch entry, head, row, column): which of their pairs of tokens are
    within the sequence, and which of those the mask shows, (P, size, size)."""
    (batch, head, row, column), (n, keys) = blocks.T, lengths

    def shown(_, p, i, j):  # past the end the last token, for functions that read captured tensors
        i, j = (row[p] * size + i).clamp(max=n - 1), (column[p] * size + j).clamp(max=keys - 1)
        return mask.mask_mod(batch[p], head[p], i, j)

    token = torch.arange(size, device=blocks.device)
    rows, columns = (x[:, None] * size + token < m for x, m in ((row, n), (column, keys)))
    inside = rows[:, :, None] & columns[:, None]
    return inside, create_mask(shown, 1, len(blocks), size, size, blocks.device)[0] & inside


def _earlier(
    blocks: torch.Size, size: int, lengths: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Blocks (nb, mb) whose pairs all have j ≤ i + N_k − N, and those of which one has."""
    (nb, mb), (n, keys) = blocks, lengths
    first = torch.arange(nb, device=device)[:, None] * size + keys - n  # place of the first query
    last = (first + size - 1).clamp(max=keys - 1)
    start = torch.arange(mb, device=device) * size
    return start + size - 1 <= first, start <= last


def _not_later(blocks: Tensor, size: int, lengths: tuple[int, int]) -> Tensor:
    """Where j ≤ i + N_k − N, (P, size, size)."""
    token = torch.arange(size, device=blocks.device)
    i, j = (x[:, None] * size + token for x in blocks.T[2:])
    return j[:, None] <= i[:, :, None] + (lengths[1] - lengths[0])


def _refuse(blocks, shown, wanted, fine, size: int, is_causal: bool) -> None:
    p = int((~fine).nonzero()[0])
    at, to = (shown[p] != wanted[p]).nonzero()[0].tolist()
    _, head, row, column = blocks[p].tolist()
    i, j, sees = row * size + at, column * size + to, bool(shown[p, at, to])
    if is_causal:
        way = "all are cut at j ≤ i: pass causal=True here and to sparse_attention"
    elif size > 1:
        way = "a BlockMask of smaller BLOCK_SIZE may have no such block"
    else:
        way = "leave causal out"
    raise ValueError(
        f"A BlockPattern lists blocks whole, and block ({row}, {column}) of head {head} is seen in "
        f"part: query {i} {'sees' if sees else 'does not see'} key {j}, other pairs of the block "
        f"{'are hidden' if sees else 'are seen'}; {way}"
    )


def block_mask_of(pattern: BlockPattern, causal: bool) -> BlockMask:
    """Blocks at the end that are shorter, or cut by causal, are partial: so create_block_mask has
    them."""
    lengths, size, device = (pattern.n, pattern.n_keys), pattern.block_size, pattern.row_ptr.device
    table = pattern.to_blocks().to(device)  # (Hp, nb, mb)
    counts = zip(table.shape[1:], lengths, strict=True)
    rows, columns = (torch.arange(1, nb + 1, device=device) * size <= n for nb, n in counts)
    whole = rows[:, None] & columns
    if causal:
        every, some = _earlier(table.shape[1:], size, lengths, device)
        table, whole = table & some, whole & every

    def seen(b, h, i, j):
        listed = table[h if len(table) > 1 else 0, i // size, j // size]
        return listed & (j <= i + (lengths[1] - lengths[0])) if causal else listed

    return BlockMask.from_kv_blocks(
        *_listed(table & ~whole), *_listed(table & whole), size, seen, lengths
    )


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """(Hp, nb, mb) bool -> how many (1, Hp, nb) and which columns (1, Hp, nb, mb), those first."""
    order = table.int().argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None], order.int()[None]
