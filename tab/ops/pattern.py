"""BlockPattern: which blocks of queries see which blocks of keys, as compressed rows per head.

Patterns by a rule are in pattern_bigbird.py and pattern_rules.py, FlexAttention's BlockMask in
pattern_flex.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import pattern_rules
from ._options import boolean
from ._typed import typed
from .pattern_bigbird import bigbird
from .pattern_compress import check_least, check_odd, check_size, check_tail, compress, lines

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern:
    """An immutable set of (head, block row, block column), in O(nnz) memory. All int32:

    row_ptr (Hp, nb+1), col (nnz,): block row i of head h sees the block columns
        col[row_ptr[h, i] : row_ptr[h, i+1]], sorted, none twice.
    col_ptr (Hp, mb+1), row (nnz,): the transpose; who sees block column i.

    It is for n queries and n_keys keys, nb and mb blocks of them, of which the last are shorter
    where block_size divides the numbers not. It serves `heads` heads, any number if None; Hp is 1
    where they share the rows, else `heads`. Make one by `bigbird`,
    `sliding_window`, `dilated`, `strided`, `fixed`, `from_blocks` or, of FlexAttention's BlockMask,
    `from_block_mask`; all raise a ValueError that names what does not fit.

    Example: 4 blocks of 16 tokens, each of which sees itself and the first.
        >>> mask = torch.eye(4, dtype=torch.bool)
        >>> mask[:, 0] = True
        >>> tab.BlockPattern.from_blocks(mask, block_size=16, n=64)
        BlockPattern(n=64, block_size=16, heads=None, density=0.438)
    """

    n: int
    block_size: int
    heads: int | None
    row_ptr: Tensor
    col: Tensor
    col_ptr: Tensor
    row: Tensor
    n_keys: int = -1  # as many as queries, unless given
    _copies: dict[str, BlockPattern] = field(default_factory=dict)  # by device, shared by them all

    def __post_init__(self):
        if self.n_keys < 0:
            object.__setattr__(self, "n_keys", self.n)
        self._copies[str(self.row_ptr.device)] = self

    @staticmethod
    @typed
    def bigbird(
        n: int,
        *,
        heads: int,
        block_size: int = 64,
        window: int = 3,
        num_global: int = 1,
        num_random: int = 3,
        seed: int = 0,
    ) -> BlockPattern:
        """BigBird for n tokens; a row with fewer than num_random blocks left takes them all.

        window: odd, in blocks; num_global: at each end. The draw depends on `seed` alone.
        """
        check_size(n, block_size)
        check_odd("bigbird", window)
        check_least(
            "bigbird", heads=(heads, 1), num_global=(num_global, 0), num_random=(num_random, 0)
        )
        with torch.device("cpu"), torch.inference_mode(False):  # whatever goes on around it
            nb = -(-n // block_size)
            seen = bigbird(nb, heads, window // 2, num_global, num_random, seed)
            return _compress(n, block_size, heads, *seen)

    @staticmethod
    @typed
    def from_blocks(
        mask: Tensor, block_size: int, n: int, *, n_keys: int | None = None
    ) -> BlockPattern:
        """mask (nb, mb), or (H, nb, mb) per head, bool: True where seen. nb = ⌈n/block_size⌉, mb
        the same of n_keys, which is n unless given."""
        n_keys = n if n_keys is None else n_keys
        nb, mb = check_size(n, block_size), check_size(n_keys, block_size)
        if mask.dtype != torch.bool or mask.dim() not in (2, 3) or mask.shape[-2:] != (nb, mb):
            keys = f", n_keys={n_keys}" if n_keys != n else ""
            raise ValueError(
                f"BlockPattern of n={n}{keys} in blocks of {block_size} wants a bool mask "
                f"({nb}, {mb}) or (H, {nb}, {mb}), got {tuple(mask.shape)} {mask.dtype}"
            )
        with torch.device("cpu"), torch.inference_mode(False):
            head, row, column = (mask if mask.dim() == 3 else mask[None]).cpu().nonzero().T
            heads = mask.shape[0] if mask.dim() == 3 else None
            return _compress(n, block_size, heads, heads or 1, head, row, column, n_keys)

    @staticmethod
    @typed
    def sliding_window(
        n: int, *, window: int, sinks: int = 0, block_size: int = 64
    ) -> BlockPattern:
        """The last `window` blocks, its own among them, and the first `sinks` blocks of the
        sequence, which hold the attention sinks:

            A(i) = {j ≤ i : j > i − window or j < sinks}, i and j blocks

        Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", sec. 3.2. All
        heads share it. Call `sparse_attention` with causal=True, which cuts the own block.
        """
        nb = check_size(n, block_size)
        check_least("sliding_window", window=(window, 1), sinks=(sinks, 0))
        return _shared(n, block_size, pattern_rules.sliding_window(nb, window, sinks))

    @staticmethod
    @typed
    def dilated(n: int, *, window: int, dilation: int, block_size: int = 64) -> BlockPattern:
        """`window` (odd) blocks around each, `dilation` blocks apart:

            A(i) = {i + dilation·t : |t| ≤ (window − 1)/2}, within the sequence

        Beltagy et al. 2020, "Longformer", sec. 3.1, "dilated sliding window". All heads share it.
        """
        nb = check_size(n, block_size)
        check_odd("dilated", window)
        check_least("dilated", dilation=(dilation, 1))
        return _shared(n, block_size, pattern_rules.dilated(nb, window, dilation))

    @staticmethod
    @typed
    def strided(n: int, *, stride: int, block_size: int = 64) -> BlockPattern:
        """The last `stride` blocks, its own among them, and every stride-th one before:

            A(i) = {j ≤ i : i − j < stride or (i − j) mod stride = 0}, i and j blocks

        Child et al. 2019, "Generating Long Sequences with Sparse Transformers", sec. 4.2, the
        strided pattern, both parts merged in every head (sec. 4.3). stride = ⌈√nb⌉ sees the fewest
        blocks. Call `sparse_attention` with causal=True, which cuts the own block.
        """
        nb = check_size(n, block_size)
        check_least("strided", stride=(stride, 1))
        return _shared(n, block_size, pattern_rules.strided(nb, stride))

    @staticmethod
    @typed
    def fixed(n: int, *, stride: int, summary: int = 1, block_size: int = 64) -> BlockPattern:
        """The blocks of its own stretch of `stride`, and the last `summary` ones of each before:

            A(i) = {j ≤ i : ⌊j/stride⌋ = ⌊i/stride⌋ or j mod stride ≥ stride − summary}

        Child et al. 2019, sec. 4.2, the fixed pattern, both parts merged in every head (sec. 4.3).
        Call `sparse_attention` with causal=True, which cuts the own block.
        """
        nb = check_size(n, block_size)
        check_least("fixed", stride=(stride, 1), summary=(summary, 0))
        if summary > stride:
            raise ValueError(
                f"BlockPattern.fixed wants summary ≤ stride = {stride}, got {summary}; "
                f"nearest: {stride}"
            )
        return _shared(n, block_size, pattern_rules.fixed(nb, stride, summary))

    @staticmethod
    def from_block_mask(mask: BlockMask, *, causal: bool = False) -> BlockPattern:
        """The pattern of FlexAttention's BlockMask, whose blocks have to be seen whole.

        causal: the pattern is for `sparse_attention(…, causal=True)`: of the blocks seen, the mask
            shows the tokens j ≤ i and no later one. Without it, each shows all of its tokens.

        `mask_mod` is called for the blocks that the mask calls partial, to see what they hold.

        Raises:
            ValueError: a block is seen in part; batch entries differ; the blocks are no squares.
                The message says where.

        Example: a causal mask of FlexAttention's, and the same attention here.
            >>> from torch.nn.attention.flex_attention import create_block_mask
            >>> def earlier(b, h, i, j):
            ...     return j <= i
            >>> mask = create_block_mask(earlier, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
            >>> pattern = tab.BlockPattern.from_block_mask(mask, causal=True)
            >>> pattern
            BlockPattern(n=64, block_size=16, heads=None, density=0.625)
        """
        from .pattern_flex import blocks_of  # FlexAttention takes two seconds to import

        causal = boolean("BlockPattern.from_block_mask", "causal", causal)
        seen, size, (n, n_keys) = blocks_of(mask, causal)
        return BlockPattern.from_blocks(seen, size, n, n_keys=n_keys)

    def to_block_mask(self, *, causal: bool = False) -> BlockMask:
        """The same for FlexAttention, on this pattern's device: `flex_attention(q, k, v,
        block_mask=pattern.to_block_mask())` is `sparse_attention(q, k, v, pattern)`, but for
        queries that see nothing. causal: of the blocks seen only tokens j ≤ i.

        O(nb²) memory a head, as every BlockMask. FlexAttention's compiled kernels want blocks of a
        multiple of 128 tokens.
        """
        from .pattern_flex import block_mask_of

        return block_mask_of(self, boolean("BlockPattern.to_block_mask", "causal", causal))

    def tail(self, n: int) -> BlockPattern:
        """For the last n queries alone, over the same keys: `sparse_attention(q[:, :, -n:], k, v,
        pattern.tail(n))` gives the last n rows. Those before are whole blocks.

        Example:
            >>> tab.BlockPattern.sliding_window(64, window=2, block_size=16).tail(16)
            BlockPattern(n=16, n_keys=64, block_size=16, heads=None, density=0.500)
        """
        first = check_tail(n, self.n, self.block_size)
        with torch.device("cpu"), torch.inference_mode(False):
            head, row = lines(self.row_ptr.cpu())
            kept = row >= first
            blocks = head[kept], row[kept] - first, self.col.cpu()[kept].long()
            hp = self.row_ptr.shape[0]
            return _compress(n, self.block_size, self.heads, hp, *blocks, n_keys=self.n_keys)

    @property
    def blocks(self) -> int:
        """nb = ⌈n/block_size⌉"""
        return -(-self.n // self.block_size)

    @property
    def key_blocks(self) -> int:
        """mb = ⌈n_keys/block_size⌉"""
        return -(-self.n_keys // self.block_size)

    @property
    def density(self) -> float:
        """Seen pairs of blocks over all pairs of blocks, 0 to 1."""
        return self.col.numel() / max(1, self.row_ptr.shape[0] * self.blocks * self.key_blocks)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """row_ptr, col, col_ptr, row: what the ops take."""
        return self.row_ptr, self.col, self.col_ptr, self.row

    def to_blocks(self) -> Tensor:
        """(Hp, nb, mb) bool, on the CPU: the inverse of `from_blocks`."""
        row_ptr = self.row_ptr.cpu()
        mask = torch.zeros(len(row_ptr), self.blocks, self.key_blocks, dtype=torch.bool)
        mask[(*lines(row_ptr), self.col.cpu().long())] = True
        return mask

    def to_dense(self) -> Tensor:
        """(Hp, n, n_keys) bool, on the CPU: for tests and pictures."""
        row, column = (torch.arange(x) // self.block_size for x in (self.n, self.n_keys))
        return self.to_blocks()[:, row[:, None], column]

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device; every copy is made once."""
        if device == self.row_ptr.device:
            return self
        key = str(device)
        if key not in self._copies:
            with torch.inference_mode(False):  # else training could not use it later
                row_ptr, col, col_ptr, row = (x.to(device) for x in self.tensors)
            self._copies[key] = BlockPattern(
                self.n, self.block_size, self.heads, row_ptr, col, col_ptr, row, self.n_keys,
                self._copies,
            )  # fmt: skip
        return self._copies[key]

    def __reduce__(self):
        """Pickled, deepcopied and saved without the copies on other devices. torch.load reads it
        with weights_only=True, once `tab` is imported."""
        return BlockPattern, (self.n, self.block_size, self.heads, *self.tensors, self.n_keys)

    def __repr__(self) -> str:
        keys = f"n_keys={self.n_keys}, " if self.n_keys != self.n else ""
        return (
            f"BlockPattern(n={self.n}, {keys}block_size={self.block_size}, heads={self.heads}, "
            f"density={self.density:.3f})"
        )


torch.serialization.add_safe_globals([BlockPattern])


def _shared(n: int, block_size: int, blocks: tuple[Tensor, Tensor]) -> BlockPattern:
    """For all heads, of the rows and columns of the blocks that are seen."""
    return _compress(n, block_size, None, 1, torch.zeros_like(blocks[0]), *blocks)


def _compress(
    n: int, block_size: int, heads: int | None, hp: int, head: Tensor, rows: Tensor, cols: Tensor,
    n_keys: int = -1,
) -> BlockPattern:  # fmt: skip
    """Of coordinates (nnz,) in any order, repeats allowed; as many keys as queries unless given."""
    nb, mb = (-(-x // block_size) for x in (n, n if n_keys < 0 else n_keys))
    tensors = compress(hp, nb, mb, head, rows, cols)
    return BlockPattern(n, block_size, heads, *tensors, n_keys)
