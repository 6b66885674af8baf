"""BlockPattern: which blocks of queries see which blocks of keys, as compressed rows per head.

BigBird (Zaheer et al. 2020, sec. 2 and appendix D, the internal transformer construction): with
nb = ⌈N/b⌉ blocks, the first and last `num_global` rows of blocks see everything and their columns
are seen by all; every other row i sees its window {i − w//2, …, i + w//2} and `num_random` others,
drawn per head, none twice and none that it sees already.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern:
    """An immutable set of (head, block row, block column), in O(nnz) memory. All int32:

    row_ptr (Hp, nb+1), col (nnz,): block row i of head h sees the block columns
        col[row_ptr[h, i] : row_ptr[h, i+1]], sorted, none twice.
    col_ptr (Hp, nb+1), row (nnz,): the transpose; who sees block column i.

    It serves `heads` heads, any number if None; Hp is 1 where they share the rows, else `heads`.
    The last block is shorter when block_size does not divide n. Make one by `bigbird` or
    `from_blocks`; both raise a ValueError that names what does not fit.

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
        for name, value, least in (
            ("heads", heads, 1), ("num_global", num_global, 0), ("num_random", num_random, 0)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"BigBird wants {name} ≥ {least}, got {value}; nearest: {least}")
        with torch.device("cpu"), torch.inference_mode(False):  # whatever goes on around it
            return _bigbird(n, block_size, heads, window // 2, num_global, num_random, seed)

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


def _bigbird(
    n: int, block_size: int, heads: int, reach: int, num_global: int, num_random: int, seed: int
) -> BlockPattern:
    nb = -(-n // block_size)
    ends = min(num_global, (nb + 1) // 2)
    full = torch.tensor(sorted({*range(ends), *range(nb - ends, nb)}), dtype=torch.int64)
    middle = torch.arange(ends, max(ends, nb - ends))  # (R,)
    fixed = _fixed_columns(middle, full, reach, nb)  # (R, F)
    drawn = _draw(fixed, nb, heads, num_random, seed)  # (Hp, R, num_random)
    hp = drawn.shape[0]
    seen = torch.cat([fixed.expand(hp, -1, -1), drawn], -1)
    rows = middle[:, None].expand_as(seen)
    head = torch.arange(hp)[:, None, None].expand_as(seen)
    real = seen < nb
    every = torch.cartesian_prod(torch.arange(hp), full, torch.arange(nb)).reshape(-1, 3)
    head, rows, cols = (
        torch.cat([a[real], b]) for a, b in zip((head, rows, seen), every.T, strict=True)
    )
    return _compress(n, block_size, heads, hp, head, rows, cols)


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


def _fixed_columns(rows: Tensor, full: Tensor, reach: int, nb: int) -> Tensor:
    """rows (R,) -> the window and the global columns of each, (R, F), sorted; nb where there is
    none."""
    window = rows[:, None] + torch.arange(-reach, reach + 1)
    window = window.masked_fill((window < 0) | (window >= nb), nb)
    columns = torch.cat([window, full.expand(len(rows), -1)], 1).sort(1).values
    repeat = columns[:, 1:] == columns[:, :-1]
    columns[:, 1:] = columns[:, 1:].masked_fill(repeat, nb)
    return columns.sort(1).values


def _draw(fixed: Tensor, nb: int, heads: int, count: int, seed: int) -> Tensor:
    """`count` columns outside fixed (R, F) for each head and row, (H, R, count); nb where no column
    is left. Without a draw all heads are the same: (1, R, 0).

    Floyd's sampling (Bentley 1987): the j-th of r from m candidates is t = random(0 … m−r+j), or
    m−r+j itself if t was drawn before. O(r²) a row, whatever m is.
    """
    rows = len(fixed)
    left = nb - (fixed < nb).sum(1)  # (R,) candidates
    if count == 0 or rows == 0 or int(left.max()) == 0:
        return fixed.new_empty(1, rows, 0)
    wanted = left.clamp(max=count)
    generator = torch.Generator().manual_seed(seed)
    drawn = fixed.new_full((heads, rows, min(count, int(left.max()))), nb)
    for j in range(drawn.shape[-1]):
        last = left - wanted + j
        uniform = torch.rand(heads, rows, generator=generator, dtype=torch.float64)
        t = (uniform * (last + 1)).long().minimum(last)
        t = torch.where((drawn == t[..., None]).any(-1), last, t)
        drawn[..., j] = torch.where(j < wanted, t, nb)
    for column in fixed.T:  # ascending: the rank among the candidates becomes a column
        drawn = drawn + ((drawn >= column[:, None]) & (drawn < nb))
    return drawn
