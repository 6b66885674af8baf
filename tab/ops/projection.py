"""The random projection of FAVOR+: orthogonal rows, each distributed as N(0, I)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._typed import typed


@typed
def orthogonal_projection(
    num_features: int,
    head_dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """W (num_features, head_dim): rows that are N(0, I) each and orthogonal within a block.

    Blocks of D rows of Haar-random orthogonal matrices (the QR decomposition of a Gaussian, its
    columns times sign(diag R): without that it is not Haar, and the estimate is biased; Mezzadri
    2007), each row times an independent χ(D) norm (Choromanski 2021, §2.4 and theorem 2).

    Args:
        generator: where the numbers come from, on its own device; drawn in float64, so that one
            seed gives one W in every dtype.
        dtype, device: of the result; by default torch's default dtype, the generator's device.

    Returns:
        W (num_features, head_dim); a constant, without gradient.

    Raises:
        ValueError: num_features or head_dim is below 1.

    Example:
        >>> w = tab.orthogonal_projection(8, 4, generator=torch.Generator().manual_seed(0))
        >>> w.shape, bool((w[0] @ w[1]).abs() < 1e-5)
        (torch.Size([8, 4]), True)
    """
    if num_features < 1 or head_dim < 1:
        raise ValueError(
            f"orthogonal_projection wants num_features ≥ 1 and head_dim ≥ 1, got {num_features} "
            f"and {head_dim}"
        )
    blocks = -(-num_features // head_dim)
    source = device if generator is None else generator.device
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, device=source)
    orthogonal, r = torch.linalg.qr(draw(blocks, head_dim, head_dim))
    orthogonal = orthogonal * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    norms = draw(num_features, head_dim).norm(dim=-1, keepdim=True)
    w = orthogonal.mT.flatten(0, 1)[:num_features] * norms
    return w.to(dtype=dtype or torch.get_default_dtype(), device=device or source)
