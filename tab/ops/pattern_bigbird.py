"""The blocks that BigBird sees: window, global and random ones.

With nb = ⌈N/b⌉ blocks, the first and last `num_global` rows of blocks see everything and their
columns are seen by all; every other row i sees its window {i − w//2, …, i + w//2} and `num_random`
others, drawn per head, none twice and none that it sees already. Zaheer et al. 2020, sec. 2 and
appendix D, the internal transformer construction.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bigbird(
    nb: int, heads: int, reach: int, num_global: int, num_random: int, seed: int
) -> tuple[int, Tensor, Tensor, Tensor]:
    """-> Hp, which is 1 where all heads are alike, and head, row and column of each block seen."""
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
    return hp, head, rows, cols


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
