"""BlockPattern: which blocks of queries see which blocks of keys, as compressed rows per head.

Patterns by a rule are in pattern_bigbird.py and pattern_rules.py, FlexAttention's BlockMask in
pattern_flex.py.

BigBird (Zaheer et al. 2020, sec. 2 and appendix D, the internal transformer construction): with
nb = ⌈N/b⌉ blocks, the first and last `num_global` rows of blocks see everything and their columns
are seen by all; every other row i sees its window {i − w//2, …, i + w//2} and `num_random` others,
drawn per head, none twice and none that it sees already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import pattern_rules
from .pattern_bigbird import bigbird

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern:
    """An immutable set of (head, block row, block column), in O(nnz) memory. All int32:

    row_ptr (Hp, nb+1), col (nnz,): block row i of head h sees the block columns
        col[row_ptr[h, i] : row_ptr[h, i+1]], sorted, none twice.
    col_ptr (Hp, nb+1), row (nnz,): the transpose; who sees block column i.

    It serves `heads` heads, any number if None; Hp is 1 where they share the rows, else `heads`.
    The last block is shorter when block_size does not divide n. Make one by `bigbird`,
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
    _copies: dict[str, BlockPattern] = field(default_factory=dict)  # by device, shared by them all

    def __post_init__(self):
        self._copies[str(self.row_ptr.device)] = self

    @staticmethod
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
        _check_size(n, block_size)
        if window < 1 or window % 2 == 0:
            near = max(1, window - 1) if window < 2 else f"{window - 1} or {window + 1}"
            raise ValueError(
                f"BigBird's window is odd, as many blocks before as after: got {window}; "
                f"nearest: {near}"
            )
        _check_least(
            "bigbird", heads=(heads, 1), num_global=(num_global, 0), num_random=(num_random, 0)
        )
        with torch.device("cpu"), torch.inference_mode(False):  # whatever goes on around it
            nb = -(-n // block_size)
            seen = bigbird(nb, heads, window // 2, num_global, num_random, seed)
            return _compress(n, block_size, heads, *seen)

    @staticmethod
    def from_blocks(mask: Tensor, block_size: int, n: int) -> BlockPattern:
        """mask (nb, nb), or (H, nb, nb) per head, bool, nb = ⌈n/block_size⌉: True where seen."""
        nb = _check_size(n, block_size)
        if mask.dtype != torch.bool or mask.dim() not in (2, 3) or mask.shape[-2:] != (nb, nb):
            raise ValueError(
                f"BlockPattern of n={n} in blocks of {block_size} wants a bool mask ({nb}, {nb}) "
                f"or (H, {nb}, {nb}), got {tuple(mask.shape)} {mask.dtype}"
            )
        with torch.device("cpu"), torch.inference_mode(False):
            coordinates = (mask if mask.dim() == 3 else mask[None]).cpu().nonzero().T  # (3, nnz)
            heads = mask.shape[0] if mask.dim() == 3 else None
            return _compress(n, block_size, heads, heads or 1, *coordinates)

    @staticmethod
    def sliding_window(
        n: int, *, window: int, sinks: int = 0, block_size: int = 64
    ) -> BlockPattern:
        """The last `window` blocks, its own among them, and the first `sinks` blocks of the
        sequence, which hold the attention sinks:

            A(i) = {j ≤ i : j > i − window or j < sinks}, i and j blocks

        Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", sec. 3.2. All
        heads share it. Call `sparse_attention` with causal=True, which cuts the own block.
        """
        nb = _check_size(n, block_size)
        _check_least("sliding_window", window=(window, 1), sinks=(sinks, 0))
        return _shared(n, block_size, pattern_rules.sliding_window(nb, window, sinks))

    @staticmethod
    def dilated(n: int, *, window: int, dilation: int, block_size: int = 64) -> BlockPattern:
        """`window` (odd) blocks around each, `dilation` blocks apart:

            A(i) = {i + dilation·t : |t| ≤ (window − 1)/2}, within the sequence

        Beltagy et al. 2020, "Longformer", sec. 3.1, "dilated sliding window". All heads share it.
        """
        nb = _check_size(n, block_size)
        _check_least("dilated", window=(window, 1), dilation=(dilation, 1))
        if window % 2 == 0:
            raise ValueError(
                "BlockPattern.dilated wants an odd window, as many blocks before as after: got "
                f"{window}; nearest: {window - 1} or {window + 1}"
            )
        return _shared(n, block_size, pattern_rules.dilated(nb, window, dilation))

    @staticmethod
    def strided(n: int, *, stride: int, block_size: int = 64) -> BlockPattern:
        """The last `stride` blocks, its own among them, and every stride-th one before:

            A(i) = {j ≤ i : i − j < stride or (i − j) mod stride = 0}, i and j blocks

        Child et al. 2019, "Generating Long Sequences with Sparse Transformers", sec. 4.2, the
        strided pattern, both parts merged in every head (sec. 4.3). stride = ⌈√nb⌉ sees the fewest
        blocks. Call `sparse_attention` with causal=True, which cuts the own block.
        """
        nb = _check_size(n, block_size)
        _check_least("strided", stride=(stride, 1))
        return _shared(n, block_size, pattern_rules.strided(nb, stride))

    @staticmethod
    def fixed(n: int, *, stride: int, summary: int = 1, block_size: int = 64) -> BlockPattern:
        """The blocks of its own stretch of `stride`, and the last `summary` ones of each before:

            A(i) = {j ≤ i : ⌊j/stride⌋ = ⌊i/stride⌋ or j mod stride ≥ stride − summary}

        Child et al. 2019, sec. 4.2, the fixed pattern, both parts merged in every head (sec. 4.3).
        Call `sparse_attention` with causal=True, which cuts the own block.
        """
        nb = _check_size(n, block_size)
        _check_least("fixed", stride=(stride, 1), summary=(summary, 0))
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
            ValueError: a block is seen in part; batch entries differ; N_q ≠ N_k; the blocks are no
                squares. The message says where.

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

        return BlockPattern.from_blocks(*blocks_of(mask, causal))

    def to_block_mask(self, *, causal: bool = False) -> BlockMask:
        """The same for FlexAttention, on this pattern's device: `flex_attention(q, k, v,
        block_mask=pattern.to_block_mask())` is `sparse_attention(q, k, v, pattern)`, but for
        queries that see nothing. causal: of the blocks seen only tokens j ≤ i.

        O(nb²) memory a head, as every BlockMask. FlexAttention's compiled kernels want blocks of a
        multiple of 128 tokens.
        """
        from .pattern_flex import block_mask_of

        return block_mask_of(self, causal)

    @property
    def blocks(self) -> int:
        """nb = ⌈n/block_size⌉"""
        return -(-self.n // self.block_size)

    @property
    def density(self) -> float:
        """Seen pairs of blocks over all pairs of blocks, 0 to 1."""
        return self.col.numel() / max(1, self.row_ptr.shape[0] * self.blocks**2)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """row_ptr, col, col_ptr, row: what the ops take."""
        return self.row_ptr, self.col, self.col_ptr, self.row

    def to_blocks(self) -> Tensor:
        """(Hp, nb, nb) bool, on the CPU: the inverse of `from_blocks`."""
        lengths = self.row_ptr.cpu().diff().flatten()  # (Hp·nb,)
        mask = torch.zeros(len(lengths), self.blocks, dtype=torch.bool)
        mask[torch.arange(len(mask)).repeat_interleave(lengths), self.col.cpu().long()] = True
        return mask.view(self.row_ptr.shape[0], self.blocks, self.blocks)

    def to_dense(self) -> Tensor:
        """(Hp, n, n) bool, on the CPU: for tests and pictures."""
        block = torch.arange(self.n) // self.block_size
        return self.to_blocks()[:, block[:, None], block]

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device; every copy is made once."""
        if device == self.row_ptr.device:
            return self
        key = str(device)
        if key not in self._copies:
            with torch.inference_mode(False):  # else training could not use it later
                row_ptr, col, col_ptr, row = (x.to(device) for x in self.tensors)
            self._copies[key] = BlockPattern(
                self.n, self.block_size, self.heads, row_ptr, col, col_ptr, row, self._copies
            )
        return self._copies[key]

    def __reduce__(self):
        """Pickled, deepcopied and saved without the copies on other devices. torch.load reads it
        with weights_only=True, once `tab` is imported."""
        return BlockPattern, (self.n, self.block_size, self.heads, *self.tensors)

    def __repr__(self) -> str:
        return (
            f"BlockPattern(n={self.n}, block_size={self.block_size}, heads={self.heads}, "
            f"density={self.density:.3f})"
        )


torch.serialization.add_safe_globals([BlockPattern])


def _check_size(n: int, block_size: int) -> int:
    if n < 0 or block_size < 1:
        raise ValueError(f"BlockPattern wants n ≥ 0, block_size ≥ 1; got {n} and {block_size}")
    return -(-n // block_size)


def _check_least(rule: str, **given: tuple[int, int]) -> None:
    """Each (value, least value) by its name."""
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(
                f"BlockPattern.{rule} wants {name} ≥ {least}, got {value}; nearest: {least}"
            )


def _shared(n: int, block_size: int, blocks: tuple[Tensor, Tensor]) -> BlockPattern:
    """For all heads, of the rows and columns of the blocks that are seen."""
    return _compress(n, block_size, None, 1, torch.zeros_like(blocks[0]), *blocks)


def _compress(
    n: int, block_size: int, heads: int | None, hp: int, head: Tensor, rows: Tensor, cols: Tensor
) -> BlockPattern:
    """Coordinates (nnz,) in any order, repeats allowed -> compressed rows and their transpose."""
    nb = -(-n // block_size)

    def csr(major: Tensor, minor: Tensor) -> tuple[Tensor, Tensor]:
        key = ((head * nb + major) * nb + minor).unique()  # sorted
        count = (key // nb).bincount(minlength=hp * nb)
        end = count.cumsum(0).view(hp, nb)
        start = end[:, :1] - count.view(hp, nb)[:, :1]
        return torch.cat([start, end], 1).int(), (key % nb).int()

    return BlockPattern(n, block_size, heads, *csr(rows, cols), *csr(cols, rows))
